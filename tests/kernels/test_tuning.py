"""Tiles by measurement: chosen once, kept in a file, used from then on; with a device that is made up."""

import json
from pathlib import Path

import pytest
import torch

from regraft_kernels import tune, tuning
from regraft_kernels.launch import FAMILIES, device_family, use_tiles

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def timed(monkeypatch):
    """A GPU of the family sm_90 on which the last tile of each part is the fastest and the first does not compile."""
    calls = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr("regraft_kernels.launch._family_in_table", lambda device: FAMILIES["sm_90"])
    monkeypatch.setattr(tuning, "_workloads", lambda device: {part: part for part in tuning.CANDIDATES})

    def measure(part):
        family = device_family(DEVICE)
        tile = {"gather": family.gather[-1], "move": family.move, "flat": family.flat}.get(part)
        tile = family.dot[part][-1] if tile is None else tile
        place = tuning.CANDIDATES[part].index(tile)
        calls.append((part, place))
        if place == 0:
            raise RuntimeError("out of resources")
        return 1.0 / place

    monkeypatch.setattr(tuning, "seconds_of", measure)
    yield calls
    use_tiles(DEVICE, None)


def test_tiles_are_measured_once_and_used_from_then_on(timed, tmp_path):
    path = tmp_path / "folder" / "tiles.json"
    best = tune("cuda", cache=path)
    assert len(timed) == sum(map(len, tuning.CANDIDATES.values()))
    family = device_family(DEVICE)
    assert (family.gather[0], family.gather[-1]) == (
        FAMILIES["sm_90"].gather[0],
        tuning.CANDIDATES["gather"][-1],
    )
    assert family.dot["tf32x3"] == (FAMILIES["sm_90"].dot["tf32x3"][0], tuning.CANDIDATES["tf32x3"][-1])
    assert family.dot["ieee"] == FAMILIES["sm_90"].dot["ieee"]
    timed.clear()
    use_tiles(DEVICE, None)
    assert device_family(DEVICE) == FAMILIES["sm_90"]
    assert tune("cuda", cache=path) == best
    assert not timed
    assert device_family(DEVICE) == family
    assert [file.name for file in path.parent.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"a GPU": 3}', None])
def test_a_choice_that_cannot_be_read_is_measured_again(timed, tmp_path, text):
    path = tmp_path / "tiles.json"
    if text is not None:
        path.write_text(text)
    best = tune("cuda:0", cache=path)
    assert timed
    (kept,) = [choice for key, choice in json.loads(path.read_text()).items() if "triton" in key]
    assert kept == best


def test_the_choice_is_kept_in_the_users_cache_folder(timed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tune("cuda")
    assert (tmp_path / "regraft" / "tiles.json").is_file()


def test_a_device_without_triton_is_refused():
    with pytest.raises(ValueError, match="tune needs a GPU and Triton; the device is cpu"):
        tune("cpu", cache=Path("nowhere"))
