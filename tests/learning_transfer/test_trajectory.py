import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft import Trajectory
from regraft.core.files import write_sealed
from regraft.learning_transfer.trajectory import TRAJECTORY_FORMAT, TRAJECTORY_INDEX


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
    assert [b - a for a, b in pairwise(scales)] == pytest.approx([length / sum(lengths) for length in lengths])


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
    (tmp_path / f".{'0' * 24}.safetensors.1-1.part").write_bytes(b"half")
    (tmp_path / ".index.json.1-1.part").write_bytes(b"half")
    Trajectory.linear(tensors(7), tensors(8), 5).save(tmp_path)
    assert same(Trajectory.open(tmp_path).end, tensors(8))
    assert len(list(tmp_path.iterdir())) == 3  # two anchors and the index


def test_saving_leaves_other_files_alone(tmp_path):
    others = ["model.safetensors", "notes.txt", "upload.part"]
    for name in others:
        (tmp_path / name).write_bytes(b"somebody's")
    Trajectory.linear(tensors(7), tensors(8), 5).save(tmp_path)
    assert all((tmp_path / name).read_bytes() == b"somebody's" for name in others)


def test_a_path_says_what_it_is_in_one_line(tmp_path):
    path = Trajectory.linear({"w": torch.randn(300, 300)}, {"w": torch.randn(300, 300)}, 5, source="run\n7")
    path.save(tmp_path)
    for text in (repr(path), repr(Trajectory.open(tmp_path))):
        assert "steps=5" in text and "schedule" in text and "\n" not in text and len(text) < 200


@pytest.mark.parametrize("renames", range(3))
def test_a_kill_before_the_last_rename_leaves_the_old_path(tmp_path, monkeypatch, renames):
    Trajectory.linear(tensors(0), tensors(1), 5).save(tmp_path)
    replace, left = Path.replace, [renames]

    def killed(self, target):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Trajectory.linear(tensors(2), tensors(3), 5).save(tmp_path)
    monkeypatch.undo()
    assert same(Trajectory.open(tmp_path).start, tensors(0)) and same(Trajectory.open(tmp_path).end, tensors(1))


def test_bfloat16_and_shared_tensors_survive(tmp_path):
    shared = torch.randn(4, dtype=torch.bfloat16)
    start = {"a": shared, "b": shared}
    Trajectory.linear(start, start, 1).save(tmp_path)
    assert same(Trajectory.open(tmp_path).start, start)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-5]), "truncated"),
        (
            lambda file: file.write_bytes(file.read_bytes()[:-1] + b"!"),
            "tensor '.*' does not have the digest",
        ),
        (lambda file: file.unlink(), "missing"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, damage, message):
    Trajectory.linear(tensors(0), tensors(1), 5).save(tmp_path)
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    damage(file)
    with pytest.raises((ValueError, FileNotFoundError), match=f"{file.name}.*{message}"):
        list(Trajectory.open(tmp_path))


@pytest.mark.parametrize("legs", [[[0, 0.0]], [[0, 0.0], [7, 1.0]]])
def test_an_index_of_no_step_or_of_other_anchors_is_refused(tmp_path, legs):
    Trajectory.linear(tensors(0), tensors(1), 5).save(tmp_path)
    index = json.loads((tmp_path / TRAJECTORY_INDEX).read_text())["content"]
    write_sealed(tmp_path / TRAJECTORY_INDEX, TRAJECTORY_FORMAT, index | {"legs": legs})
    with pytest.raises(ValueError, match=TRAJECTORY_INDEX):
        Trajectory.open(tmp_path)


@pytest.mark.parametrize(
    "legs",
    [(), ((0, 1.0),), ((0, 1.0), (-1, 1.0)), ((0, 1.0), (2, 1.0)), ((0, 1.0), (0.5, 1.0)),
     ((0, 0.0), (1, float("nan")), (1, 1.0)), ((0, 1.0), (1, float("inf")))],
)  # fmt: skip
def test_a_path_by_hand_that_leads_nowhere_is_refused(legs):
    with pytest.raises(ValueError, match=r"points|step \d of the path|legs\[1\]"):
        Trajectory((tensors(0), tensors(1)), legs, {})
    with pytest.raises(ValueError, match="needs an anchor"):
        Trajectory((), ((0, 1.0), (0, 1.0)), {})


def test_an_index_of_another_format_is_refused(tmp_path):
    write_sealed(tmp_path / TRAJECTORY_INDEX, "another", {})
    with pytest.raises(ValueError, match="its format is 'another', not 'regraft-trajectory-1'"):
        Trajectory.open(tmp_path)


def test_no_path_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"):
        Trajectory.open(tmp_path / "other")


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
    with pytest.raises(ValueError, match="steps must be a whole number from 1"):
        Trajectory.linear(tensors(0), tensors(1), 0)
    with pytest.raises(ValueError, match="unknown schedule"):
        Trajectory.linear(tensors(0), tensors(1), 3, "square")
    with pytest.raises(ValueError, match="at least one step"):
        Trajectory.recorded([tensors(0)])
    with pytest.raises(IndexError):
        Trajectory.linear(tensors(0), tensors(1), 3).leg(4)
