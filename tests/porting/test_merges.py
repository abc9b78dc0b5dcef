"""`regraft fuse --method ...`: as the library merges, streamed, and done again from its recipe."""

from __future__ import annotations

import pytest
import torch
from checkpoints import drawn, mlp, near, one_line, save, written

from regraft import fuse_checkpoints
from regraft.fusion.merging import MERGE_METHODS, MergeProblem, merge
from regraft.porting.checkpoint_files import CheckpointFile

DATA = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))

def batches():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    return {"train": [(x, x[:, :5].argmax(1))], "validation": [(x[:20], x[:20, :5].argmax(1))]}
"""


@pytest.fixture
def tuned(tmp_path):
    """A base, and two fine-tunes of it."""
    base = drawn(0)
    networks = {"base": base, "a": near(base, 1), "b": near(base, 2)}
    return [save(tmp_path / f"{name}.safetensors", tensors) for name, tensors in networks.items()]


def words(method, base, name):
    """What each method needs on the command line."""
    needs = MERGE_METHODS[method].needs
    options = ["--weights", ".5", ".5"] if "weights" in needs else []
    options += ["--base", base] if "base" in needs else []
    return options + (["--model", f"{name}:mlp", "--shape", 1, 6, "--data", f"{name}:batches"] * ("data" in needs))


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_a_merge_is_the_librarys_and_its_recipe_makes_it_again(method, tuned, run, module, tmp_path):
    base, *networks = tuned
    name = module(DATA)
    done = run("fuse", *networks, "--method", method, *words(method, base, name), "--out", tmp_path / "out")
    assert done.status == 0, done.text
    result = written(tmp_path / "out")
    needs = MERGE_METHODS[method].needs
    tensors = [dict(CheckpointFile.open(path).items()) for path in tuned]
    if "data" not in needs:
        weights = [0.5, 0.5] if "weights" in needs else None
        problem = MergeProblem(tensors[1:], weights=weights, base=tensors[0] if "base" in needs else None)
        for key, tensor in merge(method, problem).items():
            torch.testing.assert_close(result[key], tensor)
    again = ["fuse", "--recipe", tmp_path / "out" / "recipe.yaml", "--out", tmp_path / "again"]
    if "data" in needs:  # a file alone does not choose code to run
        one_line(run(*again), f"--model {name}:mlp", status=[2])
        again += ["--model", f"{name}:mlp", "--data", f"{name}:batches"]
    assert run(*again).status == 0
    assert all(torch.equal(tensor, result[key]) for key, tensor in written(tmp_path / "again").items())
    recipes = [(tmp_path / out / "recipe.yaml").read_text() for out in ("out", "again")]
    assert recipes[0] == recipes[1] and (f"method: {method}" in recipes[0] or method == "sum")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "dare"], "--base"),
        (["--method", "fisher"], "--data"),
        (["--method", "greedy-soup", "--model", "resnet18"], "--data"),
        (["--method", "median"], "there are sum, mean"),
        ([], "--weights"),
        (["--method", "ties", "--density", "0"], "density"),
    ],
)
def test_what_a_method_lacks_is_one_sentence(options, said, tuned, run, tmp_path):
    one_line(run("fuse", *tuned[1:], *options, "--out", tmp_path / "out"), said, status=[2])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "", "networks: 3", "networks: [a]\nmethods: ties", "networks: [a]\ndensity: half", "[" * 5000, "a: &a [*a]",
        "networks: !!python/object/apply:os.system [x]", "\0", "networks: [a]\nweights: [.nan]",
    ],
)  # fmt: skip
def test_a_bad_recipe_is_one_sentence(text, run, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    one_line(run("fuse", "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "out"))


def test_beside_a_recipe_nothing_else_says_what_is_merged(tuned, run, tmp_path):
    (tmp_path / "recipe.yaml").write_text("networks: [a]\nmethod: mean")
    how = ["--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "out"]
    for more in (["--method", "ties"], ["--key", "ema"], ["--align"]):
        one_line(run("fuse", *how, *more), "--recipe", status=[2])


def test_aligned_fine_tunes_are_brought_onto_their_base(tuned, tmp_path):
    """With a permuted fine-tune, TIES after --align is TIES of the fine-tunes before they were permuted."""
    base, first, second = tuned
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    b = dict(CheckpointFile.open(second).items())
    moved = b | {"0.weight": b["0.weight"][order], "0.bias": b["0.bias"][order], "2.weight": b["2.weight"][:, order]}
    permuted = save(tmp_path / "permuted.safetensors", moved)
    settings = {"method": "ties", "base": base, "model": mlp(), "inputs": torch.randn(2, 6)}
    fuse_checkpoints([first, second], None, tmp_path / "straight", **settings)
    fuse_checkpoints([first, permuted], None, tmp_path / "aligned", align=True, **settings)
    straight, aligned = written(tmp_path / "straight"), written(tmp_path / "aligned")
    assert all(torch.allclose(aligned[key], straight[key], atol=1e-6) for key in straight)
    assert not (tmp_path / "aligned" / "recipe.yaml").exists()  # the model was an object, which has no name
