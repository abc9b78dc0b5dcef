import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft import Trajectory
from regraft.trajectory import INDEX


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(3, 4, generator=generator),
        "bias": torch.randn(3, generator=generator),
        "counter": torch.tensor(seed),
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@given(steps=st.integers(1, 12), schedule=st.sampled_from(["uniform", "cosine"]))
@settings(deadline=None)
def test_a_linear_path_goes_from_start_to_end(steps, schedule):
    path = Trajectory.linear(tensors(0), tensors(1), steps, schedule)
    scales = [path.leg(t)[1] for t in range(steps + 1)]
    assert path.steps == steps and len(path) == steps + 1
    assert scales == sorted(scales)
    assert torch.equal(path[0]["weight"], tensors(0)["weight"])
    assert same(path[steps], tensors(1))


def test_the_cosine_schedule_is_the_papers():
    scales = [Trajectory.linear(tensors(0), tensors(1), 4, "cosine").leg(t)[1] for t in range(5)]
    lengths = [1 + math.cos(math.pi * t / 4) for t in range(4)]
    assert [b - a for a, b in pairwise(scales)] == pytest.approx(
        [length / sum(lengths) for length in lengths]
    )


def test_a_uniform_point_is_the_convex_combination():
    middle = Trajectory.linear(tensors(0), tensors(1), 4)[1]
    torch.testing.assert_close(middle["weight"], 0.75 * tensors(0)["weight"] + 0.25 * tensors(1)["weight"])
    assert middle["counter"] == 1


def test_a_leg_is_what_the_formula_says():
    for path in (
        Trajectory.linear(tensors(0), tensors(1), 3),
        Trajectory.recorded([tensors(i) for i in range(4)]),
    ):
        for t in range(path.steps + 1):
            anchor, scale = path.leg(t)
            moved = path.start["weight"] + scale * (anchor["weight"] - path.start["weight"])
            torch.testing.assert_close(path[t]["weight"], moved)


def test_save_and_open(tmp_path):
    path = Trajectory.recorded([tensors(i) for i in range(3)], epochs=[0, 1, 2])
    path.save(tmp_path / "run")
    opened = Trajectory.open(tmp_path / "run")
    assert opened.steps == 2 and opened.metadata == {"epochs": [0, 1, 2]}
    assert all(same(a, b) for a, b in zip(path, opened, strict=True))


def test_saving_again_replaces_the_path_and_cleans_up(tmp_path):
    Trajectory.recorded([tensors(i) for i in range(4)]).save(tmp_path)
    (tmp_path / "killed.safetensors.part").write_bytes(b"half")
    Trajectory.linear(tensors(7), tensors(8), 5).save(tmp_path)
    assert same(Trajectory.open(tmp_path).end, tensors(8))
    assert len(list(tmp_path.iterdir())) == 3  # two anchors and the index


def test_a_kill_before_the_index_leaves_the_old_path(tmp_path, monkeypatch):
    Trajectory.linear(tensors(0), tensors(1), 5).save(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        Trajectory.linear(tensors(2), tensors(3), 5).save(tmp_path)
    monkeypatch.undo()
    assert same(Trajectory.open(tmp_path).end, tensors(1))


def test_bfloat16_and_shared_tensors_survive(tmp_path):
    shared = torch.randn(4, dtype=torch.bfloat16)
    start = {"a": shared, "b": shared}
    Trajectory.linear(start, start, 1).save(tmp_path)
    assert same(Trajectory.open(tmp_path).start, start)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "index", "no folder"])
def test_a_damaged_path_is_refused_by_name(tmp_path, damage):
    folder = tmp_path / "run"
    Trajectory.linear(tensors(0), tensors(1), 5).save(folder)
    file = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(data[:-5])
    elif damage == "flipped":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "missing":
        file.unlink()
    elif damage == "index":
        (folder / INDEX).write_text(json.dumps({"format": "regraft-trajectory-1"}))
    else:
        folder = tmp_path / "other"
    named = {"index": INDEX, "no folder": "other"}.get(damage, file.name)
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        list(Trajectory.open(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("bias"), "bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra"),
        (lambda t: t.update(weight=torch.zeros(4, 3)), "'weight': shape"),
        (lambda t: t.update(weight=t["weight"].double()), "'weight': dtype"),
        (lambda t: t["weight"].fill_(float("nan")), "'weight' of the end"),
    ],
)
def test_mismatched_ends_are_named(change, message):
    end = tensors(1)
    change(end)
    with pytest.raises(ValueError, match=message):
        Trajectory.linear(tensors(0), end, 3)


def test_paths_that_are_none():
    with pytest.raises(ValueError, match="at least one step"):
        Trajectory.linear(tensors(0), tensors(1), 0)
    with pytest.raises(ValueError, match="unknown schedule"):
        Trajectory.linear(tensors(0), tensors(1), 3, "square")
    with pytest.raises(ValueError, match="at least one step"):
        Trajectory.recorded([tensors(0)])
    with pytest.raises(IndexError):
        Trajectory.linear(tensors(0), tensors(1), 3).leg(4)
