"""Grids: how accurate are hundreds of weighted sums of a few networks, without hundreds of passes.

What is shared by all points is done once: images are loaded and normalised by the caller; the first layer
is linear in its parameters, so its output for a sum of networks is the sum of its outputs, and the images
are convolved once for each source instead of once for each point. Points are made in chunks that fit the
memory asked for, and a grid that was interrupted goes on from its last finished chunk.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from regraft.clock import synchronise
from regraft.fusion import Finish, Tensors, check, fuse_many
from regraft.results import write

MEMORY = 1 << 30  # bytes
CHUNK = 32  # points at most between two savings of what is finished
TOGETHER = 8  # models run at once; more gains nothing and costs activations
WORTH_TIMING = 50  # batches of so many points; below, the first strategy runs untimed
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


def lattice(
    rows: Sequence[float], columns: Sequence[float], point: Callable[[float, float], Sequence[float]]
) -> Tensor:
    """Coefficients [len(rows) * len(columns), m], row by row: `point(row, column)` gives one line of m."""
    return torch.tensor([list(point(r, c)) for r in rows for c in columns], dtype=torch.float64)


def harmonic_mean(first: Tensor, second: Tensor) -> Tensor:
    """2ab / (a + b), elementwise; 0 where both are 0. One number for the accuracy on two tasks."""
    total = first + second
    return torch.where(total > 0, 2 * first * second / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)


# ---------------------------------------------------------------- the network, with its first layer split off


class _Given(nn.Module):
    """Stands in for the first layer and returns an output that was made elsewhere."""

    value: Tensor

    def forward(self, _inputs: Tensor) -> Tensor:
        return self.value


class _Stop(Exception):
    """Ends a forward pass as soon as the first layer's input is known."""


@dataclass(frozen=True)
class FirstLayer:
    """A model cut behind its first convolution or linear layer.

    Attributes:
        model: the whole model.
        name: the first layer's name.
        rest: a copy of the model in which the layer is a :class:`_Given`.
    """

    model: nn.Module
    name: str
    rest: nn.Module

    @classmethod
    def of(cls, model: nn.Module, tensors: Tensors, images: Tensor) -> FirstLayer | None:
        """Cut `model`, or None where it cannot be cut.

        It can where a plain convolution or linear layer is called before any other one, once, and nothing
        else reads the images: with NaN images and the layer's true output, the answer has to stay the same.
        """
        called: list[str] = []
        handles = [
            module.register_forward_pre_hook(lambda _module, _inputs, name=name: called.append(name))
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
        ]
        images = images[:2]
        with torch.no_grad():
            expected = functional_call(model, tensors, (images,))
        for handle in handles:
            handle.remove()
        if not called or not called[0] or called.count(called[0]) != 1:  # "": the model is one layer
            return None
        name = called[0]
        rest = copy.deepcopy(model)
        rest.set_submodule(name, _Given())
        cut = cls(model, name, rest)
        if any(
            key.startswith(f"{name}.") and key[len(name) + 1 :] not in ("weight", "bias") for key in tensors
        ):
            return None
        with torch.no_grad():
            rest.get_submodule(name).value = cut.output(tensors, cut.inputs(tensors, images))
            try:
                found = functional_call(
                    rest, cut.without_first(tensors), (torch.full_like(images, torch.nan),)
                )
            except (RuntimeError, ValueError):
                return None
        return cut if torch.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True) else None

    def inputs(self, tensors: Tensors, images: Tensor) -> Tensor:
        """What reaches the first layer."""
        seen: list[Tensor] = []

        def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0])
            raise _Stop

        handle = self.model.get_submodule(self.name).register_forward_pre_hook(stop)
        try:
            functional_call(self.model, tensors, (images,))
        except _Stop:
            pass
        finally:
            handle.remove()
        return seen[0]

    def output(self, tensors: Tensors, inputs: Tensor) -> Tensor:
        """The first layer of one network."""
        own = {key[len(self.name) + 1 :]: t for key, t in tensors.items() if key.startswith(f"{self.name}.")}
        return functional_call(self.model.get_submodule(self.name), own, (inputs,))

    def without_first(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """The tensors of the rest."""
        return {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{self.name}.")}

    def run(self, tensors: Tensors, first: Tensor, images: Tensor) -> Tensor:
        """Logits [B, C] from the first layer's output."""
        self.rest.get_submodule(self.name).value = first
        return functional_call(self.rest, tensors, (images,))


class _MaxOfFour(nn.Module):
    """2x2 max-pooling as maxima of slices: the same values, and on a CPU nine times as fast as torch's."""

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2]
        rows = torch.maximum(x[..., ::2, :], x[..., 1::2, :])
        return torch.maximum(rows[..., ::2], rows[..., 1::2])


def _with_fast_pooling(model: nn.Module) -> nn.Module:
    """`model`, its plain 2x2 max-poolings replaced in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MaxPool2d) and not module.ceil_mode and not module.return_indices:
            shape = [module.kernel_size, module.stride, module.padding, module.dilation]
            if [n if isinstance(n, tuple) else (n, n) for n in shape] == [(2, 2), (2, 2), (0, 0), (1, 1)]:
                model.set_submodule(name, _MaxOfFour())
    return model


# ---------------------------------------------------------------- many points on one batch

Strategy = Callable[[nn.Module, FirstLayer | None, Tensors, Tensor | None, Tensor, Tensor], Tensor]


def one_by_one(
    model: nn.Module,
    cut: FirstLayer | None,
    stack: Tensors,
    firsts: Tensor | None,
    coefficients: Tensor,
    images: Tensor,
) -> Tensor:
    """Logits [k, B, C] of k networks, one after the other.

    Args:
        stack: tensors [k, *shape] of the networks (of what lies behind the cut, where there is one).
        firsts: [m, *], the first layer's output for every source, or None without a cut.
        coefficients: [k, m], in the dtype of `firsts`.
        images: [B, ...].
    """
    found = []
    for point, row in enumerate(coefficients.tolist()):
        tensors = {name: tensor[point] for name, tensor in stack.items()}
        if cut is None:
            found.append(functional_call(model, tensors, (images,)))
            continue
        first = firsts[0] * row[0]
        for source, c in zip(firsts[1:], row[1:], strict=True):
            if c:
                first.add_(source, alpha=c)
        found.append(cut.run(tensors, first, images))
    return torch.stack(found)


def all_at_once(
    model: nn.Module,
    cut: FirstLayer | None,
    stack: Tensors,
    firsts: Tensor | None,
    coefficients: Tensor,
    images: Tensor,
) -> Tensor:
    """As :func:`one_by_one`, in batched operations over `TOGETHER` networks at a time."""
    found = []
    for start in range(0, len(coefficients), TOGETHER):
        part = {name: tensor[start : start + TOGETHER] for name, tensor in stack.items()}
        if cut is None:
            found.append(vmap(lambda tensors: functional_call(model, tensors, (images,)))(part))
        else:
            given = torch.tensordot(coefficients[start : start + TOGETHER], firsts, dims=1)
            found.append(vmap(lambda tensors, first: cut.run(tensors, first, images))(part, given))
    return torch.cat(found)


STRATEGIES: tuple[Strategy, ...] = (one_by_one, all_at_once)


def faster(strategies: Sequence[Strategy], arguments: tuple, device: torch.device) -> Strategy:
    """The strategy that takes least time on these arguments: each runs once to warm up, then is timed twice."""

    def seconds(strategy: Strategy) -> float:
        try:
            strategy(*arguments)
        except (
            RuntimeError
        ):  # not every operator can be batched over models; the loop raises what is really wrong
            return float("inf")
        times = []
        for _ in range(2):
            synchronise(device)
            begin = time.perf_counter()
            strategy(*arguments)
            synchronise(device)
            times.append(time.perf_counter() - begin)
        return min(times)

    return min(strategies, key=seconds)


# ---------------------------------------------------------------- the grid


def evaluate(
    model: nn.Module,
    sources: Sequence[Tensors],
    coefficients: Tensor | Sequence[Sequence[float]],
    images: Tensor,
    labels: Tensor,
    *,
    finish: Finish | None = None,
    memory: int = MEMORY,
    batch_size: int = 250,
    strategies: Sequence[Strategy] = STRATEGIES,
    resume: Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Grid:
    """How many of `images` every network sum_i coefficients[k, i] * sources[i] gets right.

    Args:
        model: gives the architecture; its own tensors are not used. Run in evaluation mode.
        sources: m networks (or gradients), parameters and buffers by name, on the images' device.
        coefficients: [K, m].
        images: float [N, ...], already normalised. labels: int64 [N].
        finish: mends the activations of each point, e.g. :func:`regraft.fusion.reset_on`.
        memory: bytes that parameter sets and activations may take beside sources and images, about. Never
            less than one network and one image need.
        batch_size: images at a time; smaller batches stay in the cache, and with
            :func:`regraft.fusion.batch_statistics` it is what each batch is normalised with. It is lowered
            only where `memory` asks for it, and never where a BatchNorm reads its batch.
        strategies: where there are several, and enough points and images, all are timed on the first batch
            and the fastest runs; else the first.
        resume: a file that keeps what is finished after every chunk; a grid called again with the same
            file goes on from there.
        progress: called with (points finished, K) after every chunk.

    Raises:
        ValueError: as :func:`regraft.fusion.fuse`; no images; another number of labels than of images; a
            label that the head has no class for; `resume` belonging to another grid.
    """
    rows = torch.as_tensor(coefficients, dtype=torch.float64)
    check(sources, rows)
    if len(images) == 0:
        raise ValueError("the data set is empty: there is nothing to evaluate on")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{len(images)} images need {len(images)} labels, got shape {tuple(labels.shape)}")
    model = copy.deepcopy(model).eval()
    if images.device.type == "cpu":
        model = _with_fast_pooling(model)
    with torch.no_grad():
        classes = functional_call(model, sources[0], (images[:2],)).shape[-1]
        cut = FirstLayer.of(model, sources[0], images)
    if int(labels.max()) >= classes or int(labels.min()) < 0:
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, but the head has {classes} classes"
        )
    footprint = _footprint(model, sources[0], images)
    chunk = _chunk(sources[0], memory, finish is None)
    together = TOGETHER if all_at_once in strategies else 1
    if not _reads_batches(model):
        batch_size = max(1, min(batch_size, memory // 2 // max(1, footprint * together)))
    saved = _Saved.open(resume, _fingerprint(model, sources, rows, images, labels, finish))
    # Timing costs six runs of a few points: only where there is enough to gain.
    short = len(rows) * len(images) < WORTH_TIMING * TOGETHER * batch_size
    strategy = strategies[0] if len(strategies) == 1 or short else None
    with torch.no_grad():
        for start in range(len(saved.correct), len(rows), chunk):
            part = rows[start : start + chunk]
            stack = fuse_many(sources, part)
            linear = cut
            if finish is not None:
                stack, moved = _finished(stack, part, finish, cut)
                linear = None if moved else cut
            if linear is not None:
                stack = linear.without_first(stack)
            weights = part.to(images)
            correct = torch.zeros(len(part), dtype=torch.int64, device=images.device)
            nonfinite = torch.zeros_like(correct)
            for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
                arguments = (model, linear, stack, _firsts(linear, sources, x), weights, x)
                strategy = strategy or faster(strategies, _few(arguments), images.device)
                logits = strategy(*arguments)
                finite = logits.isfinite().all(-1)
                correct += ((logits.argmax(-1) == y) & finite).sum(-1)
                nonfinite += (~finite).sum(-1)
            saved.add(correct.tolist(), nonfinite.tolist())
            if progress is not None:
                progress(len(saved.correct), len(rows))
    return Grid(rows, torch.tensor(saved.correct), torch.tensor(saved.nonfinite), len(images))


def _firsts(cut: FirstLayer | None, sources: Sequence[Tensors], images: Tensor) -> Tensor | None:
    if cut is None:
        return None
    inputs = cut.inputs(sources[0], images)
    return torch.stack([cut.output(source, inputs) for source in sources])


def _few(arguments: tuple) -> tuple:
    """The same call for the first few points: enough to see which strategy is faster."""
    model, cut, stack, firsts, weights, images = arguments
    few = {name: tensor[:TOGETHER] for name, tensor in stack.items()}
    return model, cut, few, firsts, weights[:TOGETHER], images


def _finished(stack: Tensors, rows: Tensor, finish: Finish, cut: FirstLayer | None) -> tuple[Tensors, bool]:
    """(mended tensors [k, *shape], whether the first layer is another one now)."""
    points = [finish({name: t[k] for name, t in stack.items()}, row) for k, row in enumerate(rows)]
    mended = {name: torch.stack([point[name] for point in points]) for name in stack}
    first = [name for name in stack if cut is not None and name.startswith(f"{cut.name}.")]
    return mended, any(not torch.equal(mended[name], stack[name]) for name in first)


def _chunk(tensors: Tensors, memory: int, untouched: bool) -> int:
    """Points whose parameters take half the memory (a quarter where they are mended, as both are alive)."""
    bytes_each = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return max(1, min(CHUNK, memory // (2 if untouched else 4) // max(1, bytes_each)))


def _footprint(model: nn.Module, tensors: Tensors, images: Tensor) -> int:
    """Bytes of activations that one image keeps alive in one network, about."""
    sizes = [images[:1].numel() * images.element_size()]

    def see(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.numel() * output.element_size() // 2)

    handles = [module.register_forward_hook(see) for module in model.modules()]
    with torch.no_grad():
        functional_call(model, tensors, (images[:1].expand(2, *images.shape[1:]),))
    for handle in handles:
        handle.remove()
    return LIVE_ACTIVATIONS * max(sizes)


def _reads_batches(model: nn.Module) -> bool:
    return any(type(module).__name__ == "_OwnStatistics" for module in model.modules())


# ---------------------------------------------------------------- going on after an interruption


@dataclass
class _Saved:
    """What is finished: in memory, and in a file where there is one."""

    path: Path | None
    fingerprint: str
    correct: list[int]
    nonfinite: list[int]

    @classmethod
    def open(cls, path: Path | str | None, fingerprint: Callable[[], str]) -> _Saved:
        if path is None:
            return cls(None, "", [], [])
        path, own = Path(path), fingerprint()
        if not path.exists():
            return cls(path, own, [], [])
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            found = cls(path, state["grid"], list(state["correct"]), list(state["nonfinite"]))
        except (json.JSONDecodeError, KeyError, TypeError) as problem:
            raise ValueError(f"{path}: not the state of a grid ({problem})") from None
        if found.fingerprint != own:
            raise ValueError(f"{path}: belongs to a grid with other networks, points or images; remove it")
        return found

    def add(self, correct: list[int], nonfinite: list[int]) -> None:
        self.correct += correct
        self.nonfinite += nonfinite
        if self.path is not None:
            state = {"grid": self.fingerprint, "correct": self.correct, "nonfinite": self.nonfinite}
            write(self.path, json.dumps(state))


def _fingerprint(
    model: nn.Module,
    sources: Sequence[Tensors],
    rows: Tensor,
    images: Tensor,
    labels: Tensor,
    finish: Finish | None,
) -> Callable[[], str]:
    """Everything that a result depends on, hashed when it is needed; of `finish`, only its name."""

    def compute() -> str:
        digest = hashlib.sha256(repr(model).encode())
        digest.update(getattr(finish, "__qualname__", repr(finish)).encode())
        tensors = [(name, source[name]) for source in sources for name in sorted(source)]
        for name, tensor in itertools.chain(tensors, [("", rows), ("", images), ("", labels)]):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    return compute
