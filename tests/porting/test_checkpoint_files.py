"""Checkpoints are read as people have them, refused by name where they are bad, and written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from regraft.core.files import BadFile, only_writer
from regraft.porting.checkpoint_files import (
    INDEX_FILE,
    CheckpointFile,
    Layout,
    write_shards,
)
from regraft.porting.output_folder import beside
from regraft.porting.sizes import parse_size

WEIGHTS = {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.ones(2), "steps": torch.tensor(3)}


def layout(tensors: dict[str, torch.Tensor], limit: int = 10**6) -> Layout:
    return Layout.of({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, limit)


def same(found: CheckpointFile, expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())


# ---------------------------------------------------------------- reading

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(DTYPES, st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=6),
    st.integers(1, 99),
)
def test_what_is_written_is_read_to_the_bit_whatever_the_size_of_a_file(kinds, limit):
    tensors = {f"t{i}": torch.randn(shape).mul(3).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), layout(tensors, limit), tensors)
        assert same(CheckpointFile.open(folder), tensors)
        assert same(CheckpointFile.open(Path(folder) / INDEX_FILE), tensors)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "model.", "net."])
@pytest.mark.parametrize("nested", [None, "state_dict", "model_state_dict"])
def test_prefixes_and_nests_are_taken_away_and_said(prefix, nested, tmp_path):
    named = {prefix + name: tensor for name, tensor in WEIGHTS.items()}
    torch.save(named if nested is None else {nested: named, "epoch": 3}, tmp_path / "a.pt")
    found = CheckpointFile.open(tmp_path / "a.pt").named_as(WEIGHTS)
    assert same(found, WEIGHTS)
    assert any("away from all names" in note for note in found.notes)
    assert nested is None or any(nested in note for note in found.notes)


def test_a_prefix_of_the_models_own_stays_or_is_put_back(tmp_path):
    own = {f"model.{name}": tensor for name, tensor in WEIGHTS.items()}
    save_file(own, tmp_path / "a.safetensors")
    assert same(CheckpointFile.open(tmp_path / "a.safetensors").named_as(own), own)
    save_file(WEIGHTS, tmp_path / "b.safetensors")
    put_back = CheckpointFile.open(tmp_path / "b.safetensors").named_as({f"bert.{name}" for name in WEIGHTS}, "bert.")
    assert set(put_back) == {f"bert.{name}" for name in WEIGHTS}
    assert "put 'bert.'" in put_back.notes[-1]


def test_what_is_no_tensor_is_said(tmp_path):
    torch.save({"state_dict": {**WEIGHTS, "version": 3}}, tmp_path / "a.ckpt")
    assert any("version" in note for note in CheckpointFile.open(tmp_path / "a.ckpt").notes)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def sharded(folder: Path) -> Path:
    write_shards(folder, layout(WEIGHTS, 16), WEIGHTS)
    return folder / INDEX_FILE


def _hostile(folder: Path) -> Path:
    torch.save({"a": Hostile()}, folder / "a.pt")
    return folder / "a.pt"


def _truncated(folder: Path) -> Path:
    path = sorted(sharded(folder).parent.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-3])
    return folder / INDEX_FILE


def _truncated_torch(folder: Path) -> Path:
    torch.save(WEIGHTS, folder / "a.pt")
    (folder / "a.pt").write_bytes((folder / "a.pt").read_bytes()[:200])
    return folder / "a.pt"


def _missing(folder: Path) -> Path:
    sorted(sharded(folder).parent.glob("*.safetensors"))[1].unlink()
    return folder


def _misnamed(change: dict[str, str | None]):
    def make(folder: Path) -> Path:
        path = sharded(folder)
        index = json.loads(path.read_text())
        index["weight_map"] = {n: f for n, f in (index["weight_map"] | change).items() if f}
        path.write_text(json.dumps(index))
        return path

    return make


def _many(folder: Path) -> Path:
    for name in "ab":
        save_file(WEIGHTS, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_hostile, r"a.pt holds \w+.mkdir, which is no tensor and is not run"),
        (_truncated, "00001-of-00002.safetensors is truncated"),
        (_truncated_torch, "a.pt is damaged"),
        (_missing, "index.json names 'model-00002-of-00002.safetensors', which is missing"),
        (_misnamed({"other": "model-00001-of-00002.safetensors"}), "tensor 'other' is in .*, which has none"),
        (_misnamed({"steps": None}), "holds tensor 'steps', and .* does not name it"),
        (
            _misnamed({"steps": "../away.safetensors"}),
            "names '../away.safetensors', which is outside its folder",
        ),
        (_many, "holds 2 files"),
    ],
)
def test_a_bad_file_is_refused_by_name(make, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path)
    with pytest.raises(BadFile, match=said):
        CheckpointFile.open(path)
    assert not (tmp_path / "ran").exists()


def test_where_there_is_nothing(tmp_path):
    for path in (tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(FileNotFoundError, match=str(path)):
            CheckpointFile.open(path)


# ---------------------------------------------------------------- writing


def test_a_value_that_leaves_the_dtype_is_refused(tmp_path):
    with pytest.raises(BadFile, match=r"tensor 'a' .*float16.* not finite"):
        write_shards(tmp_path, Layout.of({"a": (torch.float16, (1,))}, 9), {"a": torch.tensor([1e6])})


def test_what_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), beside(tmp_path / "out", {}, resume=False) as part:
        write_shards(part, layout(WEIGHTS), WEIGHTS)
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_one_goes_on_for_the_same_inputs_alone(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), beside(out, {"inputs": 1}, resume=False) as part:
        write_shards(part, layout(WEIGHTS), WEIGHTS)
        raise KeyboardInterrupt
    assert not out.exists()
    with (
        pytest.raises(ValueError, match="begun with another inputs"),
        beside(out, {"inputs": 2}, resume=True),
    ):
        pass
    with beside(out, {"inputs": 1}, resume=True) as part:
        write_shards(part, layout(WEIGHTS), {})  # none is asked for
    assert same(CheckpointFile.open(out), WEIGHTS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_resume_a_leftover_is_cleared(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), beside(out, {}, resume=False) as part:
        (part / "left").write_text("")
        (part / "folder").mkdir()
        raise KeyboardInterrupt
    with beside(out, {}, resume=False) as part:
        assert [path.name for path in part.iterdir()] == ["identity.json"]


def test_of_two_writers_one_is_told_and_what_is_there_stays(tmp_path):
    with beside(tmp_path / "out", {}, resume=False) as part:
        with pytest.raises(BlockingIOError), beside(tmp_path / "out", {}, resume=False):
            pass
        (part / "a").write_text("mine")
    assert (tmp_path / "out" / "a").read_text() == "mine"
    with pytest.raises(FileExistsError, match="out"), beside(tmp_path / "out", {}, resume=False):
        pass
    with only_writer(tmp_path / "out"):
        pass


@pytest.mark.parametrize(("text", "size"), [("8GB", 8 * 10**9), ("1.5 MiB", 3 * 2**19), ("1000", 1000), ("2k", 2000)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "8 bytes", "GB", "-1GB", "1PB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="no size"):
        parse_size(text)
