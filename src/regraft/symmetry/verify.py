"""The proof of a specification, by computing: random permutations must leave the model's function as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from regraft.evaluation import evaluating
from regraft.symmetry.spec import PermutationSpec, Segment, apply, groups_of
from regraft.tensors import Perm, Tensors, check_finite, live_state
from regraft_kernels import permute

MAX_CANDIDATES = 256
"""How many axes are tried, at one evaluation each, before a failed proof names only the group."""


def verify(
    spec: PermutationSpec,
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    generator: torch.Generator | None = None,
    draws: int = 2,
    tolerance: float = 1e-9,
) -> float:
    """Proves by computing that f(x; pi theta) = f(x; theta): the largest relative error of all draws, in float64.

    Each of ``draws`` (more where groups of two or three units need it to be told apart) takes a random
    permutation of every group, and random parameters and buffers near the model's own:
    zero-initialised heads and constant norms are given random values, or the comparison would say nothing, and
    BatchNorm statistics are near what the layer sees. The model is evaluated in evaluation mode and left as it
    is; where that does not read everything that moves, its auxiliary heads are proved as well. The error is
    max |f(x; pi theta) - f(x; theta)| / max |f(x; theta)|, the largest of all output tensors. ``generator``: a
    CPU generator (seed 0 if not given).

    Raises ValueError naming the tensor where the specification does not fit the model or an error is not below
    ``tolerance``.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    inputs = pytree.tree_map(lambda x: x.double() if _is_floating(x) else x, inputs)
    generator = generator or torch.Generator().manual_seed(0)
    own = live_state(model)
    spec.validate(own)
    check_finite(own, "the model")
    unread = {name for name, axes in spec.axes.items() if any(map(groups_of, axes))}
    worst = 0.0
    for heads in (False, True):
        with evaluating(model, heads=heads), torch.no_grad():
            for perm in _distinguishing(spec, draws, generator):
                error, read = _compare(spec, perm, model, inputs, generator)
                unread -= read
                if not error < tolerance:
                    raise ValueError(_explain(spec, model, inputs, generator, error))
                worst = max(worst, error)
        if not unread:  # else auxiliary heads are still to be proved
            break
    return worst


def _compare(
    spec: PermutationSpec, perm: Perm, model: nn.Module, inputs: Any, generator: torch.Generator
) -> tuple[float, set[str]]:
    """The error of one draw, and the names of the tensors that the model reads."""
    tensors, read = _random_values(model, inputs, generator)
    before = functional_call(model, tensors, inputs)
    after = functional_call(model, _apply_(spec, perm, tensors), inputs)
    return _difference(before, after), read


def _distinguishing(spec: PermutationSpec, draws: int, generator: torch.Generator) -> list[Perm]:
    """Random permutations, ``draws`` or (where groups are tiny) more: so many that each group moves in one of them,
    and that no two groups always move alike."""
    perms: list[Perm] = []
    while len(perms) < draws or not _told_apart(spec, perms):
        perms.append(spec.random(generator))
    return perms


def _told_apart(spec: PermutationSpec, perms: Sequence[Perm]) -> bool:
    sizes = {group: size for group, size in spec.groups.items() if size > 1 and spec.moves_freely(group)}
    moves = [tuple(i for perm in perms for i in perm[group].tolist()) for group in sizes]
    still = [tuple(range(size)) * len(perms) for size in set(sizes.values())]
    return len({*moves, *still}) == len(moves) + len(still)


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _apply_(spec: PermutationSpec, perm: Perm, tensors: Tensors) -> Tensors:
    """Like :func:`apply`, but empties what it is given: a big model fits once, not twice."""
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    indices = spec.indices({group: index.to(device) for group, index in perm.items()})
    moved = {}
    for name in list(tensors):
        moved |= permute({name: tensors.pop(name)}, indices, spec.packing())
    return moved


def _difference(before: Any, after: Any) -> float:
    """The largest relative difference of the tensors of two results; NaN where one is not finite."""
    errors = [
        float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-300))
        for a, b in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True)
        if isinstance(a, Tensor) and a.numel()
    ]
    return math.nan if any(math.isnan(error) for error in errors) else max(errors, default=0.0)


# ---- random parameters and statistics


def _random_values(model: nn.Module, inputs: Any, generator: torch.Generator) -> tuple[Tensors, set[str]]:
    """Random float64 parameters and buffers near the model's own, none of them constant or zero; and the names of
    those that the model reads."""
    tensors = {name: _perturb(tensor.detach(), generator) for name, tensor in live_state(model).items()}
    with _Statistics(generator) as statistics:
        functional_call(model, tensors, inputs)
    return tensors, {name for name, tensor in tensors.items() if id(tensor) in statistics.read}


def _perturb(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Every value times a random factor from 0.5 to 1.5, in float64; zeros and constants get values of their own."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return tensor.clone()
    value = tensor.double()
    factor = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value.device).add_(0.5)
    level = value.flatten()[0]
    if level != 0 and bool((value == level).all()):
        return factor.mul_(level.sign() * level.abs().clamp(min=0.5))
    perturbed = factor.mul_(value)
    zero = value == 0
    if zero.any():
        fan_in = value[0].numel() if value.ndim > 1 else 10
        noise = torch.randn(int(zero.sum()), generator=generator, dtype=torch.float64) / fan_in**0.5
        perturbed[zero] = noise.to(value.device)
    return perturbed


class _Statistics(TorchFunctionMode):
    """Sets the running statistics of every BatchNorm that runs inside near what it sees, times 0.5 to 1.5; and
    remembers what tensors were read.

    Without it the activations of a deep network with random statistics overflow or saturate, and a proof through
    a saturated gate is none. One level serves all channels: normalising each by its own statistics makes a deep
    random network chaotic, and rounding errors grow a millionfold.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator
        self.read: set[int] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.read |= {id(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if function is torch.nn.functional.batch_norm:
            x, mean, var = args[:3]
            if mean is not None and var is not None:
                mean.copy_(x.mean() * self._factor(mean))
                var.copy_(x.square().mean() * self._factor(var) + 1e-6)
        return function(*args, **kwargs)

    def _factor(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self.generator, dtype=torch.float64).add_(0.5).to(like.device)


# ---- why a proof failed


def _explain(
    spec: PermutationSpec, model: nn.Module, inputs: Any, generator: torch.Generator, error: float
) -> str:
    """Says which group changes the function, and which of its axes, where one axis alone explains it."""
    tensors, _ = _random_values(model, inputs, generator)
    before = functional_call(model, tensors, inputs)
    if not all(x.isfinite().all() for x in pytree.tree_leaves(before) if _is_floating(x)):
        return f"cannot verify: the output of {type(model).__name__} is not finite with random parameters"
    if _difference(before, functional_call(model, tensors, inputs)) > 0:
        return f"cannot verify: {type(model).__name__} gives two results for the same input"
    perm = spec.random(generator)

    def changes(candidate: PermutationSpec, families: Sequence[Sequence[str]]) -> bool:
        moves = {**candidate.identity(), **{group: perm[group] for groups in families for group in groups}}
        after = functional_call(model, apply(candidate, moves, tensors), inputs)
        return not _difference(before, after) < 1e-9

    suspects = list(spec.families)
    while len(suspects) > 1:
        half = suspects[: len(suspects) // 2]
        suspects = half if changes(spec, half) else suspects[len(half) :]
    if not suspects:
        return f"the function changes by {error:.1e} although nothing moves"
    (family,) = suspects
    group = family[-1]
    members = ", ".join(f"{name!r} (axis {axis})" for g in family for name, axis in spec.tensors_of(g))
    return (
        f"permuting group {group!r} changes the function (relative error {error:.1e})"
        f"{_wrong_axis(spec, family, changes)}; it ties {members}"
    )


def _wrong_axis(
    spec: PermutationSpec,
    family: Sequence[str],
    changes: Callable[[PermutationSpec, Sequence[Sequence[str]]], bool],
) -> str:
    """The axis that the groups have too much, or that they lack; empty where it takes more than one."""
    for group in family:
        for name, axis in spec.tensors_of(group):
            fixed = (Segment(None, 0, spec.shapes[name][axis]),)
            if not changes(spec.with_axis(name, axis, fixed), [family]):
                return f": axis {axis} of tensor {name!r} does not belong to it"
    for group in family:
        size = spec.groups[group]
        fitting = [(name, a) for name, shape in spec.shapes.items() for a, n in enumerate(shape) if n == size]
        for name, axis in fitting[:MAX_CANDIDATES]:
            if not changes(spec.with_axis(name, axis, (Segment(group, 0, size),)), [family]):
                return f": it lacks axis {axis} of tensor {name!r}"
    return ""
