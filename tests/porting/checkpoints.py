"""Small checkpoints that the tests make, and how a run of the command is judged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]

MLP = """
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
"""


@dataclass(frozen=True)
class Ended:
    """How a run of the command ended: its exit status and what it printed."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


def names_of(text: str) -> dict[str, Any]:
    """What a module of this text defines."""
    space: dict[str, Any] = {}
    exec(text, space)
    return space


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))


def drawn(seed: int, like: nn.Module | None = None) -> dict[str, Tensor]:
    """Random values of a small model's floating tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value.clone()
        for name, value in (mlp() if like is None else like).state_dict().items()
    }


def near(tensors: Tensors, seed: int = 9, by: float = 0.1) -> dict[str, Tensor]:
    """What a fine-tuning might have made of the tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + by * torch.randn(value.shape, generator=generator).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in tensors.items()
    }


def save(path: Path, tensors: Tensors) -> Path:
    """A safetensors file, or a PyTorch file, by its name."""
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    else:
        torch.save(dict(tensors), path)
    return path


def written(out: Path) -> dict[str, Tensor]:
    """All tensors of a finished folder."""
    return {name: value for path in sorted(out.glob("*.safetensors")) for name, value in load_file(path).items()}


def files(folder: Path) -> set[str]:
    """The files below a folder, by their relative paths."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


OF_TESTS = re.compile(r"\S*?/pytest-of-[^/\s]+/(?:[^/\s]+/)*?test_[^/\s'\"]*")
"""The folder of a test, whose name says what the test is about and so must not count."""


def one_line(ended: Ended, *words: str, status: Sequence[int] = (1, 2)) -> str:
    """The single line with which the command refuses, without the test's own folder.

    Checks its status, and that it names the words (those with a slash anywhere in it).
    """
    assert "Traceback" not in ended.err, ended.err[-800:]
    assert ended.status in status, ended
    lines = ended.err.strip().splitlines()
    assert len(lines) == 1, ended.err
    said = OF_TESTS.sub("", lines[0])
    for word in words:
        assert word in (lines[0] if "/" in word else said), lines[0]
    return said


FOUR = ["port", "match", "fuse", "fuse --align"]


def three_verbs(folder, base, tuned, new, model: list) -> dict[str, list]:
    """The words of each verb of `FOUR` for three networks that are saved in a folder."""
    paths = [save(folder / f"{n}.safetensors", t) for n, t in {"base": base, "tuned": tuned, "new": new}.items()]
    out = ["--out", folder / "out"]
    return {
        "port": ["port", *paths, "--method", "weights", *model, *out],
        "match": ["match", paths[0], paths[2], *model, *out],
        "fuse": ["fuse", paths[0], paths[2], "--weights", ".5", ".5", *out],
        "fuse --align": ["fuse", paths[0], paths[2], "--weights", ".5", ".5", "--align", *model, *out],
    }
