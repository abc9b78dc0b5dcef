"""What the campaigns work on: one small network with its data, and one whole file of every format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regraft.core.tensors import Tensors, state
from regraft.data import Dataset, Split
from regraft.fusion.grids import evaluate
from regraft.learning_transfer.trajectory import TRAJECTORY_INDEX, Trajectory
from regraft.networks.papers import build
from regraft.symmetry import PermutationSpec, trace
from regraft.training.loop import Recipe, train
from regraft_bench.rows import Row, append, code, environment, read_rows

CLASSES = 3
RECIPE = Recipe(epochs=2, lr=0.05, batch_size=8)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def layers() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(),
        nn.Linear(8, CLASSES),
    )  # fmt: skip


MODEL = build(layers, seed(0))
IMAGES, LABELS = torch.randn(16, 1, 6, 6, generator=seed(7)), torch.arange(16) % CLASSES
BATCHES = list(zip(IMAGES.split(8), LABELS.split(8), strict=True))


@lru_cache
def weights(number: int) -> Tensors:
    """Values of the network, as good as trained ones here. Not to be changed."""
    return state(build(layers, seed(number)))


@lru_cache
def spec() -> PermutationSpec:
    return trace(MODEL, IMAGES[:2])


def dataset(x: Tensor = IMAGES, y: Tensor = LABELS) -> Dataset:
    other = Split(IMAGES[:6], LABELS[:6])
    return Dataset("little", Split(x, y), other, other, ("a", "b", "c"), (0.0,), (1.0,))


def path(number: int = 0) -> Trajectory:
    return Trajectory.linear(weights(number), weights(number + 1), 4)


def grid(file: Path | None) -> Tensor:
    points = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
    return evaluate(MODEL, [weights(1), weights(2)], points, IMAGES, LABELS, resume=file).correct


def trained(file: Path, **options: Any) -> Tensors:
    return train(MODEL, weights(1), dataset(), RECIPE, generator=seed(1), checkpoint=file, **options).tensors


def row(number: int = 0) -> Row:
    return Row("micro", "two", "row", number, {}, {"value": 1.0}, {}, {}, {}, None, environment(), code())


@dataclass(frozen=True)
class Format:
    """A file format. write: makes a whole file at a path. read: reads it, wherever it was written.

    sealed: whether a hash covers every byte. optional: whether a file that is missing is nothing wrong.
    """

    file: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]
    sealed: bool = True
    optional: bool = False


def save_path(file: Path) -> None:
    path().save(file.parent)


def read_path(file: Path) -> list[Tensors]:
    return list(Trajectory.open(file.parent))


FORMATS = {
    "index of a trajectory": Format(TRAJECTORY_INDEX, save_path, read_path),
    "tensors of a trajectory": Format("*.safetensors", save_path, read_path),
    "specification": Format(
        "spec.json",
        lambda file: spec().save(file),
        lambda file: PermutationSpec.load(file).validate(weights(1)),
        sealed=False,
    ),
    "state of a grid": Format("grid.json", grid, grid, optional=True),
    "state of a training": Format("run.safetensors", trained, trained, optional=True),
    "rows": Format("rows.jsonl", lambda file: append(file, row()), read_rows, sealed=False),
}
