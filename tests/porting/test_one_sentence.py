"""What is asked wrongly of `port`, `match` and `fuse` is one sentence that says what to do instead."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from checkpoints import one_line
from safetensors.torch import load_file


@pytest.mark.parametrize("weights", [("1e308", "1e308"), ("nan", "1"), ("inf", "1"), ("1e39", "0"), ("-1e308", "1")])
def test_weights_of_a_sum_that_is_not_finite(weights, run, three, tmp_path):
    """--weights beyond what the tensors' dtype holds: one line that names the weight, before anything is written."""
    done = run("fuse", three[0], three[2], "--weights", *weights, "--out", tmp_path / "out")
    assert "weight" in one_line(done)
    assert not (tmp_path / ".out.part").exists()


@pytest.mark.parametrize("method", ["fgmt", "gradfix", "fgmt+gradfix"])
def test_a_method_that_needs_data_says_how_to_give_them(method, run, three, tmp_path):
    """ "needs data" names --data, and the methods that need none."""
    one_line(run("port", *three, "--method", method, "--out", tmp_path / "out"), "--data", "--method weights")


@pytest.mark.parametrize("what", ["checkpoint", "spec"])
def test_what_is_not_there_is_named_without_a_number(what, tmp_path, run, two):
    """A missing file: its path and that it is not there; no "[Errno 2]"."""
    gone, out = tmp_path / "gone", ["--out", tmp_path / "out"]
    words = {
        "checkpoint": ["fuse", gone, "--weights", 1, *out],
        "spec": ["match", *two, "--spec", gone, *out],
    }[what]
    assert "Errno" not in one_line(run(*words), "gone")


FIXED = """
import torch
from torch import nn

class Fixed(nn.Module):
    def forward(self, x):
        return torch.relu(x) * torch.arange(1, 9)

def made():
    return nn.Sequential(nn.Linear(6, 8), Fixed(), nn.Linear(8, 5))
"""


def test_a_match_without_a_group_says_so(tmp_path, run, module, two):
    """No unit of the model can be exchanged: it is said that nothing was aligned."""
    model = ["--model", f"{module(FIXED)}:made", "--shape", 1, 6, "--out", tmp_path / "out"]
    done = run("match", *two, *model)
    assert done.status == 0 and "no group" in done.out


def start_no_driver():
    raise RuntimeError("Found no NVIDIA driver on your system.")


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "foo", "meta", ""])
@pytest.mark.parametrize("verb", ["match", "fuse"])
def test_a_device_that_is_not_there(verb, device, run, two, module, tmp_path, monkeypatch):
    """--device without its driver, or no device at all: named, before the model is made."""
    monkeypatch.setattr("torch.cuda._lazy_init", start_no_driver)
    model = ["--model", f"{module('raise AssertionError')}:none", "--shape", 1, 6, "--out", tmp_path / "out"]
    weights = ["--weights", 1, 1] if verb == "fuse" else []
    assert f"device: torch cannot compute on {device!r}" in one_line(
        run(verb, *two, *weights, *model, "--device", device)
    )


def test_a_shard_that_may_not_be_read_is_not_called_damaged(run, two, tmp_path, monkeypatch):
    """An index whose file belongs to somebody else: the file and the reason, as the system says it."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(two[0]), two[0].name)}))
    opened = Path.open

    def refuse(path, *arguments, **options):
        if path == two[0]:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    said = one_line(run("fuse", index, two[1], "--weights", 1, 1, "--out", tmp_path / "out"), two[0].name, "Permission")
    assert "truncated" not in said
