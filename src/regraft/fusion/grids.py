"""Grids: the accuracy of hundreds of weighted sums of a few networks, without hundreds of full passes.

Work that all points share is done once. The first layer is linear in its parameters, so its output for a sum of
networks is the sum of its outputs: the images are convolved once for each source instead of once for each point.
Points are made in chunks that fit the given memory; an interrupted grid resumes after its last finished chunk.

Sums run one after the other: on a CPU, batching them over networks (`torch.func.vmap`) was no faster for an MLP and
slower for convolutional networks.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct
from torch import Tensor, nn

from regraft.core.arguments import Count, check_arguments
from regraft.core.files import clean, read_sealed, write_sealed
from regraft.core.forward import call, examples, hooks, map_inputs, name_inputs, portion, run
from regraft.core.guard import same_settings, same_streams
from regraft.core.labels import check_labels
from regraft.core.tensors import Inputs, Tensors, check_finite, complete, digest_tensors, weighted_sum
from regraft.fusion.repair import Finish, reads_batches
from regraft.fusion.sums import check, fuse_many

MEMORY = 1 << 30  # bytes
CHUNK = 32  # points at most between two savings of what is finished
LIVE_ACTIVATIONS = 3  # outputs of the largest layer that are alive at one time, about


@dataclass(frozen=True)
class Grid:
    """How many images each point of a grid gets right.

    Attributes:
        coefficients: float64 [K, m], one row a point, one column a source.
        correct: int64 [K].
        nonfinite: int64 [K]: images with a logit that is NaN or infinite; they count as wrong.
        images: how many images every point saw.
    """

    coefficients: Tensor
    correct: Tensor
    nonfinite: Tensor
    images: int

    @property
    def accuracy(self) -> Tensor:
        """float64 [K], from 0 to 1."""
        return self.correct.double() / self.images

    def best(self) -> int:
        """The most accurate point; the first of several."""
        return int(self.correct.argmax())


@check_arguments
def lattice(
    rows: Sequence[float], columns: Sequence[float], point: Callable[[float, float], Sequence[float]]
) -> Tensor:
    """Coefficients [len(rows) * len(columns), m], row by row: `point(row, column)` gives one line of m."""
    return torch.tensor([list(point(r, c)) for r in rows for c in columns], dtype=torch.float64)


def harmonic_mean(first: Tensor, second: Tensor) -> Tensor:
    """2ab / (a + b), elementwise; 0 where both are 0. One number for the accuracy on two tasks."""
    total = first + second
    return torch.where(total > 0, 2 * first * second / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)


@same_settings()
@check_arguments
def evaluate(
    model: nn.Module,
    sources: Sequence[Tensors],
    coefficients: Tensor | Sequence[Sequence[float]],
    images: Inputs,
    labels: Tensor,
    *,
    finish: Finish | None = None,
    memory: int = MEMORY,
    batch_size: Count = 250,
    resume: Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Grid:
    """How many of `images` every network sum_i coefficients[k, i] * sources[i] gets right.

    Args:
        model: gives the architecture; its own parameters are not used. Run in evaluation mode.
        sources: m networks (or gradients), parameters and buffers by name, on the images' device.
        coefficients: [K, m].
        images: float [N, ...], already normalised; or several inputs, or a mapping of keyword inputs, of N examples.
        labels: int64 [N].
        finish: repairs the activations of each point, e.g. :func:`regraft.fusion.repair.reset_on`.
        memory: bytes that parameter sets and activations may take beside sources and images, about. Never
            less than one network and one image need.
        batch_size: images at a time, small enough for the cache; with `regraft.fusion.repair.batch_statistics` each
            batch is normalised by itself. Lowered only to fit `memory`, never where a BatchNorm reads its batch.
        resume: a file that keeps finished points, from which an interrupted grid goes on. It identifies networks,
            points, images and labels by digest, `finish` by name.
        progress: called with (points finished, K) after every chunk.

    Raises:
        ValueError: as :func:`regraft.fusion.sums.fuse` for sources and coefficients; no images, or one that is not
            finite; another number of labels; a label without a class; `resume` that is damaged or another grid's.
        OSError: `resume` that is not a plain file.
    """
    rows = torch.as_tensor(coefficients, dtype=torch.float64)
    check(sources, rows)
    complete(model, sources[0])
    count = _check_data(images, labels)
    model = copy.deepcopy(model).eval()
    sources = [{name: tensor.clone() for name, tensor in source.items()} for source in sources]
    if labels.device.type == "cpu":
        _use_fast_pooling(model)
    with torch.no_grad(), same_streams(labels.device):
        classes, image_bytes = _probe(model, sources[0], images)
        check_labels(labels, classes, "the data set")
        if not reads_batches(model):
            batch_size = max(1, min(batch_size, memory // 2 // image_bytes))
        first = FirstLayer.of(model, sources[0], images) if isinstance(images, Tensor) else None
        points = _Points(model, first, sources, finish, images, labels, batch_size)
        done = _Counts(len(rows), count)
        if resume is not None:
            done.resume(Path(resume), points.fingerprint(rows))
        chunk = _chunk(sources[0], memory, finish)
        for begin in range(len(done.correct), len(rows), chunk):
            done.add(*points.count(rows[begin : begin + chunk]))
            if progress is not None:
                progress(len(done.correct), len(rows))
    correct, nonfinite = torch.tensor([done.correct, done.nonfinite], dtype=torch.int64)
    return Grid(rows, correct, nonfinite, count)


def _check_data(images: Inputs, labels: Tensor) -> int:
    """The number of images. Raises ValueError for none, another number of labels, or values that are not finite."""
    count = examples(images)
    if count == 0:
        raise ValueError("the data set is empty: there is nothing to evaluate on")
    if labels.shape != (count,):
        raise ValueError(f"{count} images need {count} labels, got shape {tuple(labels.shape)}")
    check_finite(name_inputs(images), "the data set")
    return count


def _probe(model: nn.Module, tensors: Tensors, images: Inputs) -> tuple[int, int]:
    """(the head's classes, bytes of activations that one image keeps alive, about)."""
    # two, because a BatchNorm that reads its batch wants more than one value a channel
    two = map_inputs(lambda x: x.expand(2, *x.shape[1:]) if x.ndim and len(x) == 1 else x, portion(images, 0, 1))
    sizes = [x.numel() * x.element_size() for x in name_inputs(two).values()]

    def see(_name: str, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.numel() * output.element_size())

    with hooks(dict(model.named_modules()), see):
        logits = call(model, tensors, two)
    return logits.shape[-1], max(1, LIVE_ACTIVATIONS * max(sizes) // 2)


def _chunk(tensors: Tensors, memory: int, finish: Finish | None) -> int:
    """Points whose parameters take half the memory (a quarter with a finish, as both are alive)."""
    bytes_each = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return max(1, min(CHUNK, memory // (2 if finish is None else 4) // max(1, bytes_each)))


@dataclass(frozen=True, eq=False)
class _Points:
    """What all points of a grid share; `cut` is the model's first layer, split off, where that can be done."""

    model: nn.Module
    cut: FirstLayer | None
    sources: Sequence[Tensors]
    finish: Finish | None
    images: Inputs
    labels: Tensor
    batch_size: int

    def count(self, rows: Tensor) -> tuple[list[int], list[int]]:
        """(images that are right, images with a logit that is not finite) of each row of coefficients."""
        stack = fuse_many(self.sources, rows)
        networks = [{name: tensor[k] for name, tensor in stack.items()} for k in range(len(rows))]
        cut = self.cut
        if self.finish is not None:
            repaired = [self.finish(network, row) for network, row in zip(networks, rows, strict=True)]
            if cut is not None and cut.differs(networks, repaired):
                cut = None
            networks = repaired
        if cut is not None:
            networks = [cut.without_first(network) for network in networks]
        counts = torch.zeros(2, len(rows), dtype=torch.int64, device=self.labels.device)
        for begin in range(0, len(self.labels), self.batch_size):
            images, labels = (portion(of, begin, begin + self.batch_size) for of in (self.images, self.labels))
            firsts = [] if cut is None else cut.outputs(self.sources, images)
            for k, (network, row) in enumerate(zip(networks, rows.tolist(), strict=True)):
                if cut is None:
                    logits = call(self.model, network, images)
                else:
                    logits = cut.run(network, weighted_sum(firsts, row), images)
                finite = logits.isfinite().all(-1)
                counts[0, k] += ((logits.argmax(-1) == labels) & finite).sum()
                counts[1, k] += (~finite).sum()
        correct, nonfinite = counts.tolist()
        return correct, nonfinite

    def fingerprint(self, rows: Tensor) -> str:
        """Everything that a result depends on; of `finish` only its name, and the batch size where it matters."""
        tensors = {f"{i}: {name}": t for i, source in enumerate(self.sources) for name, t in source.items()}
        tensors |= {"points": rows, **name_inputs(self.images), "labels": self.labels}
        finish = getattr(self.finish, "__qualname__", repr(self.finish))
        batch_size = self.batch_size if reads_batches(self.model) else None
        described = json.dumps([repr(self.model), finish, batch_size, digest_tensors(tensors)])
        return hashlib.sha256(described.encode()).hexdigest()


# ---------------------------------------------------------------- the network, with its first layer split off


class _Reached(Exception):
    """Ends a forward pass as soon as the first layer's input is known."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs


class _Given(nn.Module):
    """Replaces the first layer: returns a given output, or raises `_Reached` with its input."""

    value: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        if self.value is None:
            raise _Reached(inputs)
        return self.value


@dataclass(frozen=True)
class FirstLayer:
    """A model cut behind its first convolution or linear layer.

    Attributes:
        layer: the first layer.
        prefix: of its tensors' names.
        rest: a copy of the model in which the layer is a stand-in.
        given: that stand-in.
    """

    layer: nn.Module
    prefix: str
    rest: nn.Module
    given: _Given

    @classmethod
    def of(cls, model: nn.Module, tensors: Tensors, images: Tensor) -> FirstLayer | None:
        """Cut `model`, or None where it cannot be cut.

        It can where a plain convolution or linear layer is called before any other one, once, nothing that learns
        stands before it (with NaN parameters its input has to stay the same), and nothing else reads the images
        (with NaN images and the layer's true output, the answer has to stay the same).
        """
        called: list[str] = []
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
        images = images[:2]
        with torch.no_grad(), hooks(layers, lambda name, _inputs, _output: called.append(name)):
            expected = call(model, tensors, images)
        if not called or not called[0] or called.count(called[0]) != 1:  # "": the model is one layer
            return None
        name, rest, given = called[0], copy.deepcopy(model), _Given()
        rest.set_submodule(name, given)
        cut = cls(layers[name], f"{name}.", rest, given)
        if not cut._own(tensors).keys() <= {"weight", "bias"}:
            return None
        unknown = {name: torch.full_like(t, torch.nan) for name, t in tensors.items() if t.is_floating_point()}
        with torch.no_grad():
            if not torch.equal(cut.inputs({**tensors, **unknown}, images), cut.inputs(tensors, images)):
                return None
            (first,) = cut.outputs([tensors], images)
            try:
                logits = cut.run(cut.without_first(tensors), first, torch.full_like(images, torch.nan))
            except (RuntimeError, ValueError):
                return None
        return cut if torch.allclose(logits, expected, rtol=1e-4, atol=1e-5, equal_nan=True) else None

    def inputs(self, tensors: Tensors, images: Tensor) -> Tensor:
        """What reaches the first layer."""
        self.given.value = None
        try:
            run(self.rest, self.without_first(tensors), images)
        except _Reached as reached:
            return reached.inputs
        raise AssertionError("the first layer was called once, and then not again")

    def outputs(self, sources: Sequence[Tensors], images: Tensor) -> list[Tensor]:
        """The first layer's output for every source."""
        inputs = self.inputs(sources[0], images)
        return [run(self.layer, self._own(source), inputs) for source in sources]

    def run(self, tensors: Tensors, first: Tensor, images: Tensor) -> Tensor:
        """Logits [B, C] from the first layer's output and the tensors of the rest."""
        self.given.value = first
        return call(self.rest, tensors, images)

    def without_first(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """The tensors of the rest."""
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(self.prefix)}

    def differs(self, before: Sequence[Tensors], after: Sequence[Tensors]) -> bool:
        """Whether the first layer of any network has changed."""
        pairs = zip(before, after, strict=True)
        return any(
            not torch.equal(tensor, self._own(b)[name]) for a, b in pairs for name, tensor in self._own(a).items()
        )

    def _own(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """The first layer's tensors, by the names that it gives them."""
        return {name.removeprefix(self.prefix): t for name, t in tensors.items() if name.startswith(self.prefix)}


class _MaxOfFour(nn.Module):
    """2x2 max-pooling as maxima of slices: the same values, and on a CPU nine times as fast as torch's."""

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2]
        rows = torch.maximum(x[..., ::2, :], x[..., 1::2, :])
        return torch.maximum(rows[..., ::2], rows[..., 1::2])


def _use_fast_pooling(model: nn.Module) -> None:
    """Replace the model's plain 2x2 max-poolings."""
    for name, module in list(model.named_modules()):
        if name and isinstance(module, nn.MaxPool2d) and not module.ceil_mode and not module.return_indices:
            shape = [module.kernel_size, module.stride, module.padding, module.dilation]
            if [n if isinstance(n, tuple) else (n, n) for n in shape] == [(2, 2), (2, 2), (0, 0), (1, 1)]:
                model.set_submodule(name, _MaxOfFour())


# ---------------------------------------------------------------- resuming after an interruption


GRID_FORMAT = "regraft-grid-1"


class _Kept(Struct, forbid_unknown_fields=True):
    grid: str
    correct: list[int]
    nonfinite: list[int]


@dataclass
class _Counts:
    """What is finished of a grid: in memory, and in a file where there is one."""

    points: int
    images: int
    correct: list[int] = field(default_factory=list)
    nonfinite: list[int] = field(default_factory=list)
    path: Path | None = None
    grid: str = ""

    def resume(self, path: Path, grid: str) -> None:
        """Keep what is finished in `path`, and take what is there."""
        self.path, self.grid = path, grid
        clean(path)
        if not path.exists():
            return
        kept = read_sealed(path, GRID_FORMAT, _Kept)
        if kept.grid != grid:
            raise ValueError(f"{path}: belongs to a grid with other networks, points, images or batches")
        self.correct, self.nonfinite = kept.correct, kept.nonfinite
        try:
            self._check()
        except ValueError as problem:
            raise ValueError(f"{path}: not a {GRID_FORMAT} file: {problem}") from None

    def _check(self) -> None:
        """Raise ValueError for counts that do not fit the numbers of points and images."""
        if not len(self.correct) == len(self.nonfinite) <= self.points:
            raise ValueError(f"{len(self.correct)} and {len(self.nonfinite)} counts for {self.points} points")
        for counts in zip(self.correct, self.nonfinite, strict=True):
            if min(counts) < 0 or sum(counts) > self.images:
                raise ValueError(f"{counts[0]} right and {counts[1]} not finite of {self.images} images")

    def add(self, correct: list[int], nonfinite: list[int]) -> None:
        self.correct += correct
        self.nonfinite += nonfinite
        if self.path is not None:
            state = {"grid": self.grid, "correct": self.correct, "nonfinite": self.nonfinite}
            write_sealed(self.path, GRID_FORMAT, state)
