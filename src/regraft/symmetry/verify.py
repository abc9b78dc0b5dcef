"""The proof of a specification, by computing: random permutations must leave the model's function as it is."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from regraft.core.arguments import Count, check_arguments
from regraft.core.forward import cause
from regraft.core.tensors import Perm, check_finite, live_state, use_generator
from regraft.symmetry.axes import Segment, groups_of
from regraft.symmetry.calls import Call, Forward, Output, check_placed, ready
from regraft.symmetry.copies import clone_model, double, to_double
from regraft.symmetry.spec import PermutationSpec, apply, like_state
from regraft_kernels import permute

MAX_IDLE, NAMED_AXES = 16, 6
"""How many axes that seem to have no effect are tried, at one evaluation each, and how many are named."""

LEAST_EFFECT = 1e-8
"""Of the largest output: a wrong order that changes less would not be seen."""

MAX_ORIGINS, MOST_VALUES = 4, 1 << 20
"""How many tensors that an integer is computed from are compared, and how long ones."""

MAX_CANDIDATES = 256
"""How many axes are tried, at one evaluation each, before a failed proof names only the group."""


@check_arguments
def verify(
    spec: PermutationSpec,
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    forward: Forward = None,
    output: Output = None,
    other_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    draws: Count = 2,
    tolerance: float = 1e-9,
) -> float:
    """Proves by computing that f(x; pi theta) = f(x; theta): the largest relative error of all draws, in float64.

    Inputs, ``forward`` and ``output`` are those of :func:`regraft.symmetry.trace`. ``other_inputs`` are a second
    example, proved as well; without it, where inputs have a dimension of length 1 (one token), and the model runs
    with that made 2, this is proved. Each of ``draws`` (more where
    groups of two or three units need it to be told apart) takes a random permutation of every group, and random
    parameters and buffers near the model's own: zero-initialised heads and constant norms are given random values,
    or the comparison would say nothing, and BatchNorm statistics are near what the layer sees. What is compared is
    what will be done with the result: the permuted state dictionary is loaded into a copy of the model as it was.
    The copies compute in evaluation mode and in float64, also where the model casts to less; where that does not
    read everything that moves, auxiliary heads are proved as well, in training mode without dropout. An output of
    integers is compared together with the sorted values that it is made of. The error is max |f(x; pi theta) -
    f(x; theta)| / max |f(x; theta)|, the largest of all outputs that count. The specification is then marked as
    proven. A warning names axes that have no effect on these outputs: a proof says nothing about them.
    ``generator``: a CPU generator (seed 0 if not given).

    Raises ValueError naming the tensor where the specification does not fit the model or an error is not below
    ``tolerance``.
    """
    calls = Call.examples(example_inputs, other_inputs, kwargs, forward, output)
    worst = prove(spec, model, calls, generator or torch.Generator().manual_seed(0), draws, tolerance)
    if spec.idle:
        more = f" and {len(spec.idle) - NAMED_AXES} more" if len(spec.idle) > NAMED_AXES else ""
        where = f"the output of {type(model).__name__}"
        shown = ", ".join(spec.idle[:NAMED_AXES])
        warnings.warn(f"no effect on {where}, so that nothing is proved: axes {shown}{more}", stacklevel=3)
    return worst


def prove(
    spec: PermutationSpec,
    model: nn.Module,
    calls: Sequence[Call],
    generator: torch.Generator,
    draws: int = 2,
    tolerance: float = 1e-9,
) -> float:
    """:func:`verify`, without a warning: the specification has the axes that have no effect."""
    check_placed(model, calls[0])
    spec.validate(live_state(model))
    check_finite(dict(model.named_parameters()), "the model")
    spec.mark(proven=False)
    proofs = [Proof(spec, model, call.double(), generator) for call in calls]
    worst = max(_prove(proof, draws, tolerance) for proof in proofs)
    if len(calls) == 1 and (longer := proofs[0].lengthen()):
        worst = max(worst, _prove(longer, 1, tolerance))
    idle = find_idle_axes(proofs[0], live_state(model))
    spec.mark(proven=True, idle=[f"{name}:{axis}" for name, axis in idle])
    return worst


FORWARDS = 16
"""About how many times a proof costs what one call of the model does."""


def is_cheap(model: nn.Module, calls: Sequence[Call], seconds: float) -> bool:
    """Whether a proof costs less than so many seconds of this thread's time."""
    copied = clone_model(model)  # a forward pass may write into what it reads
    start = time.thread_time()
    with torch.no_grad(), ready(copied):
        for call in calls:
            call.run(copied)
    return FORWARDS * (time.thread_time() - start) < seconds


def _prove(proof: Proof, draws: int, tolerance: float) -> float:
    """The largest error; ValueError where one is too large."""
    spec = proof.spec
    unread = live_state(proof.model).keys() & dict(proof.model.named_parameters()).keys()
    worst = 0.0
    for heads in (False, True):
        if heads and not proof.repeats(heads):  # as in training: they drop out, and nothing can be compared
            break
        for perm in _draw_perms(spec, draws, proof.generator):
            error, read = proof.compare(perm, heads)
            unread -= read
            if not error < tolerance:
                raise ValueError(proof.explain(error, heads))
            worst = max(worst, error)
        if not unread:  # else auxiliary heads are still to be proved
            break
    return worst


def find_idle_axes(proof: Proof, tensors: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """The (tensor, axis) pairs that move, and whose order changes no output that counts: first by their gradients,
    then, where these are nearly zero, by computing; of many those with the smallest gradients."""
    spec = proof.spec
    perm = spec.random(proof.generator)
    read: set[str] = set()
    moving = [(n, a) for n in tensors for a, axis in enumerate(spec.axes[n]) if groups_of(axis)]
    idle = moving
    for heads in (False, True):
        idle_heads = heads and any(name not in read for name, _ in idle)
        if not idle or (heads and not (idle_heads and proof.repeats(heads))):
            break
        effects = proof.effects(perm, heads)
        idle = [at for at in idle if not effects.get(at, 0.0) > LEAST_EFFECT]
        idle = sorted(idle, key=lambda at: effects.get(at, 0.0))[:MAX_IDLE]
        if not idle:
            break
        _, state, read = proof.draw(heads)
        before = proof.outputs(state, heads)
        idle = [at for at in idle if not proof.changes_alone(*at, perm, state, before, heads)]
    return idle


@dataclass(frozen=True)
class Proof:
    """What is computed to prove a specification: permuted states, loaded into copies of the model."""

    spec: PermutationSpec
    model: nn.Module
    call: Call
    generator: torch.Generator

    def lengthen(self) -> Proof | None:
        """The same where dimensions of length 1 are longer; None where there are none, or the model does not run so."""
        call = self.call.lengthen()
        longer = call and replace(self, call=call)
        with contextlib.suppress(Exception):
            if longer and longer.repeats(heads=False):
                return longer
        return None

    def compare(self, perm: Perm, heads: bool) -> tuple[float, set[str]]:
        """The error of one draw, and the names of the tensors that the model reads."""
        before, state, read = self.draw(heads)
        return _difference(before, self.outputs(_apply_(self.spec, perm, state), heads)), read

    def draw(self, heads: bool) -> tuple[list[Tensor], dict[str, Any], set[str]]:
        """Outputs and state dictionary for random values, and the names of what was read."""
        with _exactly():
            copied = double(self.model)
            _perturb_(copied, self.generator)
            with _Statistics(self.generator):
                _run(self.call, copied, heads, self.generator)
            outputs, read = _run(self.call, copied, heads, self.generator)
            names = {name for name, tensor in live_state(copied).items() if id(tensor) in read}
            return outputs, copied.state_dict(), names

    def outputs(self, state: Mapping[str, Any], heads: bool) -> list[Tensor]:
        """Those of a copy of the model as it is, into which ``state`` was loaded."""
        with _exactly():
            fresh = double(self.model)
            fresh.load_state_dict(state)
            return _run(self.call, fresh, heads, self.generator)[0]

    def effects(self, perm: Perm, heads: bool) -> dict[tuple[str, int], float]:
        """(tensor, axis) -> how much the output would change, to first order, if this axis alone were permuted; empty
        where the model has no gradients."""
        try:
            with _exactly():
                copied = double(self.model)
                _perturb_(copied, self.generator)
                with _Statistics(self.generator):
                    _run(self.call, copied, heads, self.generator)
                tensors = {n: x for n, x in live_state(copied).items() if _is_floating(x) and any(self.spec.axes[n])}
                with torch.enable_grad():
                    for x in tensors.values():
                        x.requires_grad_(True)
                    made = [x for x in _run(self.call, copied, heads, self.generator)[0] if _is_floating(x)]
                    total = sum(((x / x.detach().abs().max().clamp(min=1e-300)) * _noise(x)).sum() for x in made)
                    grads = torch.autograd.grad(total, list(tensors.values()), allow_unused=True)  # type: ignore[arg-type]
        except Exception:
            return {}
        result = {}
        for (name, x), grad in zip(tensors.items(), grads, strict=True):
            for a in range(x.ndim if grad is not None else 0):
                index = self.spec.axis_index(name, a, perm)
                if index is not None:
                    moved = x.detach().index_select(a, index.to(x.device)) - x.detach()
                    result[name, a] = float((grad * moved).abs().sum())
        return result

    def changes_alone(
        self, name: str, axis: int, perm: Perm, state: Mapping[str, Any], before: Sequence[Tensor], heads: bool
    ) -> bool:
        """Whether permuting one axis of one tensor, and nothing else, changes the output."""
        index = self.spec.axis_index(name, axis, perm)
        moved = {**state, name: state[name].index_select(axis, index.to(state[name].device))}  # type: ignore[union-attr]
        return not _difference(before, self.outputs(like_state(moved, state), heads)) < LEAST_EFFECT

    def repeats(self, heads: bool) -> bool:
        """Whether the model gives the same for the same, and can be run so at all."""
        try:
            state = self.draw(heads)[1]
            return _difference(self.outputs(state, heads), self.outputs(state, heads)) == 0
        except Exception:
            if not heads:
                raise
            return False  # heads may need larger inputs

    def explain(self, error: float, heads: bool) -> str:
        """Which group changes the function, and which of its axes, where a single axis explains it."""
        name = type(self.model).__name__
        _, state, _ = self.draw(heads)
        before = self.outputs(state, heads)
        if not all(x.isfinite().all() for x in before if _is_floating(x)):
            return f"cannot verify: the output of {name} is not finite with random parameters"
        if _difference(before, self.outputs(state, heads)) > 0:
            return f"cannot verify: {name} gives two results for the same input"
        perm = self.spec.random(self.generator)

        def changes(candidate: PermutationSpec, families: Sequence[Sequence[str]]) -> bool:
            moves = {**candidate.identity(), **{g: perm[g] for groups in families for g in groups}}
            after = self.outputs(apply(candidate, moves, state), heads)
            return not _difference(before, after) < 1e-9

        return _culprit(self.spec, error, changes)


def _run(call: Call, model: nn.Module, heads: bool, generator: torch.Generator) -> tuple[list[Tensor], set[int]]:
    """The outputs that count, and the ids of all tensors that were read. Each run draws other random numbers, so that
    a model that uses them is detected."""
    device = next((tensor.device for tensor in live_state(model).values()), "cpu")
    with ready(model, heads=heads), use_generator(generator, device), _Exact() as exact:
        try:
            outputs = call.run(model, heads=heads)[0]
            return [*outputs, *exact.made_of(outputs)], exact.read
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"cannot verify: {type(model).__name__} does not run in float64 ({cause(error, model)})"
            ) from None


def _draw_perms(spec: PermutationSpec, draws: int, generator: torch.Generator) -> list[Perm]:
    """Random permutations, ``draws`` or (where groups are tiny) more: so many that each group moves in one of them,
    and that no two groups always move alike."""
    perms: list[Perm] = []
    while len(perms) < draws or not _are_distinguished(spec, perms):
        perms.append(spec.random(generator))
    return perms


def _are_distinguished(spec: PermutationSpec, perms: Sequence[Perm]) -> bool:
    sizes = {group: size for group, size in spec.groups.items() if size > 1 and spec.moves_freely(group)}
    moves = [tuple(i for perm in perms for i in perm[group].tolist()) for group in sizes]
    still = [tuple(range(size)) * len(perms) for size in set(sizes.values())]
    return len({*moves, *still}) == len(moves) + len(still)


def _noise(x: Tensor) -> Tensor:
    """Fixed random numbers of the same shape."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x.device)


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _apply_(spec: PermutationSpec, perm: Perm, state: dict[str, Any]) -> dict[str, Any]:
    """Like :func:`apply`, but empties ``state``: a big model is in memory once, not twice."""
    spec.validate({name: x for name, x in state.items() if isinstance(x, Tensor)})
    device = next((x.device for x in state.values() if isinstance(x, Tensor)), torch.device("cpu"))
    indices = spec.indices({group: index.to(device) for group, index in perm.items()})
    moved: dict[str, Any] = {}
    for name in list(state):
        x = state.pop(name)
        moved |= permute({name: x}, indices, spec.packing()) if isinstance(x, Tensor) else {name: x}
    return like_state(moved, state)


def _difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest relative difference of the tensors of two results; NaN where one is not finite."""
    errors = [
        float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-300))
        for a, b in zip(before, after, strict=True)
        if a.numel()
    ]
    return math.nan if any(math.isnan(error) for error in errors) else max(errors, default=0.0)


# ---- exact computing

LOW = {torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex32}


class _Exact(TorchDispatchMode):
    """Computes in float64 what a model casts to less, and records which tensors were read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read: set[int] = set()
        self.origins: dict[int, tuple[Tensor, list[Tensor]]] = {}  # of integers: what they were computed from

    def made_of(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The sorted values from which those outputs are made that are no floating numbers: they change before the
        integers do."""
        origins = [y for x in outputs for y in self.origins.get(id(x), (x, []))[1]]
        return [x.detach().nan_to_num().flatten().sort().values for x in origins]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.read |= set(map(id, tensors))
        if kwargs.get("dtype") in LOW:
            kwargs["dtype"] = torch.complex128 if kwargs["dtype"].is_complex else torch.float64
        low = [x for x in tensors if x.dtype in LOW]
        if low and len(low) < len(tensors) and not function._schema.is_mutable:
            args, kwargs = pytree.tree_map(lambda x: _lift(x), (args, kwargs))
        result = function(*args, **kwargs)
        for made in pytree.tree_leaves(result):
            if isinstance(made, Tensor) and not made.is_floating_point() and not made.is_complex():
                floating = [x for x in tensors if _is_floating(x) and x.numel() <= MOST_VALUES]
                earlier = [y for x in tensors for y in self.origins.get(id(x), (x, []))[1]]
                self.origins[id(made)] = made, list({id(x): x for x in (*floating, *earlier)}.values())[:MAX_ORIGINS]
        return result


def _lift(x: Any) -> Any:
    return to_double(x) if isinstance(x, Tensor) and x.dtype in LOW else x


@contextlib.contextmanager
def _exactly() -> Iterator[None]:
    """Inside, new tensors are float64, and no gradient is tracked."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


# ---- random parameters and statistics

LEAST, MOST = 1e-3, 10.0
"""Parameters whose root mean square is not between these (the least divided by the root of their fan-in) are rescaled,
as are rows that are a thousand times smaller or larger than the median row."""


def _perturb_(model: nn.Module, generator: torch.Generator) -> None:
    """Random float64 parameters and buffers near the model's own, none of them constant or zero."""
    learned = {id(parameter) for parameter in model.parameters()}
    for tensor in live_state(model).values():
        perturbed = _perturb(tensor, generator)
        tensor.copy_(_rescale(perturbed) if id(tensor) in learned else perturbed)


def _rescale(x: Tensor) -> Tensor:
    """A parameter whose every part matters: what is far too small (a layer scale of 1e-9) or too large (a gate at -40,
    one row of 1e11) would hide wrong axes behind rounding errors. Others stay as they are."""
    if not x.is_floating_point() or x.numel() == 0:
        return x
    if x.ndim > 1:
        rows = x.flatten(1).square().mean(1).sqrt().view(-1, *(1,) * (x.ndim - 1))
        x = x * _correction(rows, rows.median() * LEAST, rows.median() / LEAST)
    else:
        x = x * _correction(x.abs(), x.abs().median() * LEAST, x.abs().median() / LEAST)
    size = x.square().mean().sqrt()
    fan_in = x[0].numel() if x.ndim > 1 else 1
    return x * _correction(size, LEAST / fan_in**0.5, MOST)


def _correction(size: Tensor, least: float | Tensor, most: float | Tensor) -> Tensor:
    """What brings sizes between two bounds; 1 where they are."""
    least, most = (torch.as_tensor(x, dtype=size.dtype, device=size.device) for x in (least, most))
    bounded = size.clamp(least, most)
    return torch.where(size > 0, bounded / size.clamp(min=1e-300), 1.0)


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
    """Sets the running statistics of every BatchNorm that runs inside near what it sees, times 0.5 to 1.5.

    Without it the activations of a deep network with random statistics overflow or saturate, and a proof through
    a saturated gate is none. One level serves all channels: normalising each by its own statistics makes a deep
    random network chaotic, and rounding errors grow a millionfold.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.batch_norm:
            x, mean, var = args[:3]
            if mean is not None and var is not None:
                mean.copy_(x.mean() * self._factor(mean))
                var.copy_(x.square().mean() * self._factor(var) + 1e-6)
        return function(*args, **kwargs)

    def _factor(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self.generator, dtype=torch.float64).add_(0.5).to(like.device)


# ---- why a proof failed


def _culprit(
    spec: PermutationSpec, error: float, changes: Callable[[PermutationSpec, Sequence[Sequence[str]]], bool]
) -> str:
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
