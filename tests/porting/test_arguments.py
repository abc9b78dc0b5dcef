"""What a command is given wrongly is one sentence that names it; a user's module does not move the command."""

from __future__ import annotations

import sys

import pytest
from checkpoints import MLP, one_line, written


@pytest.mark.parametrize("shape", [(-2, 8), (0, 6), (1, -1), (1, 10**18)])
def test_a_shape_that_is_none(shape, run, module):
    assert "shape" in one_line(run("symmetry", f"{module()}:mlp", "--shape", *shape), status=[2])


@pytest.mark.parametrize("weights", [("1e308", "1e308"), ("nan", "1"), ("1e39", "0"), ("-1e308", "1")])
def test_weights_that_no_sum_can_have(weights, run, two, tmp_path):
    assert "weight" in one_line(run("fuse", *two, "--weights", *weights, "--out", tmp_path / "out"))
    assert not (tmp_path / ".out.part").exists()


MOVE = "import os; os.chdir('/')\n"


@pytest.mark.parametrize("text", [MOVE + MLP, MLP.replace("    return", f"    {MOVE}    return")])
def test_a_module_that_changes_directory(text, run, module, two, tmp_path):
    before, name = list(sys.path), module(text)
    how = ["--model", f"{name}:mlp", "--shape", 1, 6, "--out", "out"]
    done = run("match", two[0].name, two[1].name, *how)
    assert done.status == 0, done.text
    assert written(tmp_path / "out") and sys.path == before
