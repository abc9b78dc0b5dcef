"""--resume goes on with the same work alone: what differs is refused by name, what is damaged is
made again or refused."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import drawn, files, near, one_line, save, written

import regraft

MODULE = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))

def batches():
    return torch.load("batches.pt")
"""


@pytest.fixture
def interrupted(monkeypatch, run):
    """Run the command until it renames a file of this name into place; what it has written before stays."""

    def interrupted(name: str, *words: object) -> None:
        def stop(step):
            def stopped(source, target, **options):
                if name in Path(target).name:
                    raise KeyboardInterrupt
                return step(source, target, **options)

            return stopped

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stop(os.replace))
            patch.setattr(os, "rename", stop(os.rename))
            assert run(*words).status == 130

    return interrupted


INDEX = "index.json"


@pytest.fixture
def place(tmp_path, module):
    """A folder with a base, its fine-tune, a new base, two proven specifications, batches, and the model's module."""
    base, new = drawn(0), drawn(1)
    for name, tensors in {"base": base, "tuned": near(base), "new": new}.items():
        save(tmp_path / f"{name}.safetensors", tensors)
    model, inputs = (
        torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5)),
        torch.ones(1, 6),
    )
    for name, kind in {"free": torch.nn.ReLU(), "fixed": Weighted()}.items():
        model[1] = kind
        spec = regraft.trace(model, inputs)
        regraft.verify(spec, model, inputs)
        spec.save(tmp_path / f"{name}.json")
    write_batches(tmp_path, 0)
    return tmp_path, module(MODULE)


class Weighted(torch.nn.Module):
    """ReLU, whose units count differently: none can be exchanged."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) * torch.arange(1, 9)


def write_batches(folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 6, generator=generator)
    torch.save([(images, torch.randint(5, (4,), generator=generator))], folder / "batches.pt")


def words(place, verb: str, **changed: object) -> list[object]:
    folder, name = place
    b, t, n = (folder / f"{part}.safetensors" for part in ("base", "tuned", "new"))
    how: dict[str, object] = {"model": f"{name}:mlp", "shape": (1, 6), "out": folder / "out"} | changed
    options = [
        word for key, value in how.items() if value is not None
        for word in (f"--{key}", *(value if isinstance(value, tuple) else (value,)))
    ]  # fmt: skip
    return {
        "port": ["port", b, t, n, "--method", "weights"],
        "match": ["match", b, n],
        "fuse": ["fuse", b, n, "--weights", ".5", ".5", "--align"],
    }[verb] + options


VERBS = ["port", "match", "fuse"]


@pytest.mark.parametrize("verb", VERBS)
def test_another_specification_is_refused(verb, place, run, interrupted):
    """Begun with one --spec, resumed with another: refused, naming the specification, and the folder stays."""
    how = {"model": None, "shape": None}
    interrupted(INDEX, *words(place, verb, **how, spec=place[0] / "free.json"))
    before = files(place[0] / ".out.part")
    done = run(*words(place, verb, **how, spec=place[0] / "fixed.json"), "--resume")
    assert "spec" in one_line(done)
    assert files(place[0] / ".out.part") == before and not (place[0] / "out").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_a_specification_that_was_renamed_is_the_same(verb, place, run, interrupted):
    """What counts is what is in a specification, not where it lies."""
    how = {"model": None, "shape": None}
    interrupted(INDEX, *words(place, verb, **how, spec=place[0] / "free.json"))
    shutil.copy(place[0] / "free.json", place[0] / "same.json")
    assert run(*words(place, verb, **how, spec=place[0] / "same.json"), "--resume").status == 0


@pytest.mark.parametrize("verb", VERBS)
def test_other_data_of_the_same_name_are_refused(verb, place, run, interrupted):
    """The data changed behind their name: a card of the first data's numbers must not go with the second's."""
    data = f"{place[1]}:batches"
    interrupted(INDEX, *words(place, verb, data=data))
    write_batches(place[0], 1)
    assert "data" in one_line(run(*words(place, verb, data=data), "--resume"))


def test_other_images_in_the_same_folder_are_refused(tmp_path, module, run, interrupted):
    """The same of a folder of images: a picture was exchanged."""
    from PIL import Image

    for part in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / "images" / part / label).mkdir(parents=True)
            for number in range(10 if part == "train" else 1):
                Image.new("RGB", (8, 8), (20 * number, 9, 9)).save(tmp_path / "images" / part / label / f"{number}.png")
    text = "from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), "
    name = module(text + "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))")
    sys.path.insert(0, str(tmp_path))
    try:
        net = __import__(name).net()
    finally:
        sys.path.remove(str(tmp_path))
    a, b = (save(tmp_path / f"{n}.safetensors", drawn(seed, net)) for seed, n in enumerate("ab"))
    how = [
        "--model",
        f"{name}:net",
        "--shape",
        1,
        3,
        8,
        8,
        "--data",
        tmp_path / "images",
        "--out",
        tmp_path / "out",
    ]
    interrupted(INDEX, "match", a, b, *how)
    Image.new("RGB", (8, 8), (1, 200, 1)).save(tmp_path / "images" / "test" / "cat" / "0.png")
    assert "data" in one_line(run("match", a, b, *how, "--resume"))


def test_a_kept_step_of_other_data_is_not_taken(place, run, interrupted):
    """A path of gradients that was made on other data does not go into the result."""
    how = {"data": f"{place[1]}:batches", "steps": 2}
    command = [w if w != "weights" else "fgmt" for w in words(place, "port", **how)]
    interrupted("model", *command)
    write_batches(place[0], 1)
    assert "data" in one_line(run(*command, "--resume"))


@pytest.mark.parametrize("verb", VERBS)
def test_another_shape_is_refused(verb, place, run, interrupted):
    """--shape decides what was proved and measured."""
    interrupted(INDEX, *words(place, verb))
    assert "shape" in one_line(run(*words(place, verb, shape=(3, 6)), "--resume"))


@pytest.mark.parametrize("verb", VERBS)
def test_another_model_of_the_same_name_is_refused(verb, place, run, interrupted):
    """The user's module changed behind its name, so that other units may be exchanged."""
    interrupted(INDEX, *words(place, verb))
    fixed = "class Weighted(nn.Module):\n    def forward(self, x):\n        return torch.relu(x) * torch.arange(1, 9)\n"
    text = MODULE.replace("nn.ReLU()", "Weighted()").replace("def mlp", fixed + "\ndef mlp", 1)
    (place[0] / f"{place[1]}.py").write_text(text)
    sys.modules.pop(place[1], None)
    shutil.rmtree(place[0] / "__pycache__", ignore_errors=True)
    one_line(run(*words(place, verb), "--resume"), ".out.part")


@pytest.mark.parametrize("verb", VERBS)
def test_other_code_of_regraft_is_refused(verb, place, python, interrupted):
    """Begun by one code of regraft, resumed by a changed one: the arithmetic may be another."""
    interrupted(INDEX, *words(place, verb))
    changed = place[0] / "changed"
    shutil.copytree(Path(regraft.__file__).parent, changed / "regraft", ignore=shutil.ignore_patterns("__pycache__"))
    with (changed / "regraft" / "core" / "tensors.py").open("a") as file:
        file.write("\nCHANGED = True\n")
    code = f"import sys; sys.path.insert(0, {str(changed)!r}); from regraft.cli import main; "
    done = python(code + "sys.exit(main(sys.argv[1:]))", *words(place, verb), "--resume", cwd=place[0])
    assert "code" in one_line(done) or "version" in done.err


@pytest.mark.parametrize("verb", VERBS)
def test_the_same_work_goes_on(verb, place, run, interrupted):
    """Nothing changed: what is finished is kept, and the result is that of one run."""
    interrupted(INDEX, *words(place, verb))
    assert run(*words(place, verb), "--resume").status == 0
    resumed = written(place[0] / "out")
    assert run(*words(place, verb, out=place[0] / "again")).status == 0
    for name, tensor in written(place[0] / "again").items():
        assert torch.equal(resumed[name], tensor)


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "empty"])
@pytest.mark.parametrize(
    ("what", "before", "byte", "mask"), [("model*.safetensors", INDEX, -1, 64), ("perm*", "model", -8, 1)]
)
@pytest.mark.parametrize("verb", VERBS)
def test_a_damaged_shard_or_permutation_is_not_taken(verb, what, before, byte, mask, damage, place, run, interrupted):
    """What an interrupted run had finished or kept was changed: made again, or refused by name; never published."""
    interrupted(before, *words(place, verb))
    (file,) = (place[0] / ".out.part").glob(what)
    data = bytearray(file.read_bytes())
    data[byte] ^= mask
    file.write_bytes({"flipped bit": bytes(data), "truncated": bytes(data[:-9]), "empty": b""}[damage])
    done = run(*words(place, verb), "--resume")
    if done.status:
        one_line(done, file.name)
        return
    assert run(*words(place, verb, out=place[0] / "again")).status == 0
    resumed = written(place[0] / "out")
    for name, tensor in written(place[0] / "again").items():
        assert torch.equal(resumed[name], tensor), "a damaged file was published"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "regraft-part-1"}'])
def test_a_damaged_mark_is_one_sentence(text, place, run, interrupted):
    """The file that says what an interrupted run was for is damaged: one line that names it; nothing is deleted."""
    interrupted(INDEX, *words(place, "fuse"))
    before = files(place[0] / ".out.part")
    (place[0] / ".out.part" / "identity.json").write_text(text)
    one_line(run(*words(place, "fuse"), "--resume"), "identity.json")
    assert files(place[0] / ".out.part") == before


def test_a_fine_tune_beside_another_base_with_the_same_bytes_resumes(place, run, interrupted):
    """Files are known by their contents: moved ones are the same work."""
    interrupted(INDEX, *words(place, "fuse"))
    moved = place[0] / "moved"
    moved.mkdir()
    command = words(place, "fuse")
    for number in (1, 2):
        command[number] = shutil.copy(command[number], moved)
    assert run(*command, "--resume").status == 0
