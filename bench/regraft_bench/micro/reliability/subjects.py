"""What the campaigns work on: one small network with its data, and one whole file of every format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from regraft.core import tensors
from regraft.core.tensors import Tensors
from regraft.data import Dataset, Split
from regraft.fusion.grids import evaluate
from regraft.learning_transfer.trajectory import INDEX_FILE, Trajectory
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


@lru_cache
def model() -> nn.Module:
    return build(layers, seed(0))


@lru_cache
def weights(number: int) -> Tensors:
    """Values of the network, as good as trained ones here. Not to be changed."""
    return tensors.state(build(layers, seed(number)))


@lru_cache
def spec() -> PermutationSpec:
    return trace(model(), images()[:2])


@lru_cache
def images(count: int = 16) -> Tensor:
    return torch.randn(count, 1, 6, 6, generator=seed(7))


@lru_cache
def labels(count: int = 16) -> Tensor:
    return torch.arange(count) % CLASSES


def batches() -> list[tuple[Tensor, Tensor]]:
    return list(zip(images().split(8), labels().split(8), strict=True))


def dataset(x: Tensor | None = None, y: Tensor | None = None) -> Dataset:
    x, y = images() if x is None else x, labels() if y is None else y
    train_, held = Split(x, y), Split(images(6), labels(6))
    return Dataset("little", train_, held, held, ("a", "b", "c"), (0.0,), (1.0,))


def path(number: int = 0) -> Trajectory:
    return Trajectory.linear(weights(number), weights(number + 1), 4)


def grid(file: Path) -> Tensor:
    return evaluate(
        model(),
        [weights(1), weights(2)],
        [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]],
        images(),
        labels(),
        resume=file,
    ).correct


def trained(file: Path, epochs: int = 2) -> Tensors:
    return train(model(), weights(1), dataset(), RECIPE, generator=seed(1), checkpoint=file).tensors


def row(number: int = 0) -> Row:
    return Row(
        "micro", "reliability", "row", number, {}, {"value": 1.0}, {}, {}, {}, None, environment(), code()
    )


@dataclass(frozen=True)
class Format:
    """A file format. write: makes a whole file in a folder and returns it. read: reads it, wherever it was written.

    sealed: whether a hash covers every byte. optional: whether a file that is missing is nothing wrong.
    """

    name: str
    write: Callable[[Path], Path]
    read: Callable[[Path], object]
    sealed: bool = True
    optional: bool = False


def _saved(folder: Path) -> Path:
    path().save(folder / "path")
    return folder / "path" / INDEX_FILE


def _anchor(folder: Path) -> Path:
    return sorted(_saved(folder).parent.glob("*.safetensors"))[0]


def _spec(folder: Path) -> Path:
    spec().save(folder / "spec.json")
    return folder / "spec.json"


def _made(name: str, make: Callable[[Path], object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        make(folder / name)
        return folder / name

    return write


FORMATS = {
    format.name: format
    for format in (
        Format("index of a trajectory", _saved, lambda file: list(Trajectory.open(file.parent))),
        Format("tensors of a trajectory", _anchor, lambda file: list(Trajectory.open(file.parent))),
        Format(
            "specification", _spec, lambda file: PermutationSpec.load(file).validate(weights(1)), sealed=False
        ),
        Format("state of a grid", _made("grid.json", grid), grid, optional=True),
        Format("state of a training", _made("run.safetensors", trained), trained, optional=True),
        Format("rows", _made("rows.jsonl", lambda file: append(file, row())), read_rows, sealed=False),
    )
}
