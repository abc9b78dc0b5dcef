"""Permutation symmetries of a network: a specification as data, its application, and its proof.

A *unit* is a neuron, a channel or a feature: something whose numbering is arbitrary. Units that may trade places
form a *group*. A permutation is a dictionary ``group -> perm`` (int64 index vectors), and
``(pi theta)[i] = theta[perm[i]]`` along every axis that is tied to the group.

:func:`trace` finds the groups of a model, :func:`verify` proves them by computing, :func:`apply` moves tensors.

Specifications as data
----------------------
A :class:`PermutationSpec` can be written by hand, in Python (:meth:`PermutationSpec.build`) or as JSON
(:meth:`PermutationSpec.from_json`). Both read like a shape in which group names replace sizes::

    {
      "groups": {"fc1": 512, "conv2": 16},
      "axes": {
        "fc1.weight": ["fc1", [["conv2", 0, 16, 25]]],
        "fc1.bias":   ["fc1"],
        "fc2.weight": [10, "fc1"],
        "steps":      []
      }
    }

An axis is one of

- a number: an axis of that length that stays as it is;
- a group's name: all of the group's units, once each, in order;
- a list of segments ``[group, start, count, repeat]`` that cover the axis in order: ``count`` consecutive units
  from ``start``, each standing ``repeat`` times in a row; group ``null`` (``[null, 0, count, 1]``) stays fixed.

A group that occurs in an axis must occur with all its units, and with each equally often.
"""

from __future__ import annotations

import difflib
import importlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from regraft.evaluation import evaluating
from regraft.files import write_beside
from regraft_kernels import Packing, permute

if TYPE_CHECKING:
    from rich.table import Table

Tensors = dict[str, Tensor]
Perm = dict[str, Tensor]


class Segment(NamedTuple):
    """``count`` consecutive units of ``group`` from ``start``, each standing ``repeat`` times in a row.

    ``group`` None: ``count * repeat`` positions that no permutation moves.
    """

    group: str | None
    start: int
    count: int
    repeat: int = 1

    @property
    def length(self) -> int:
        return self.count * self.repeat


Axis = tuple[Segment, ...]


@dataclass(frozen=True)
class PermutationSpec:
    """Which axes of which tensors are permuted together.

    ``groups``: name -> number of units. ``axes``: the name of every parameter and buffer -> one :data:`Axis` per
    dimension, whose segments cover it in order. Raises ValueError, naming the tensor, where these do not fit.
    """

    groups: dict[str, int]
    axes: dict[str, tuple[Axis, ...]]

    def __post_init__(self) -> None:
        for name, axes in self.axes.items():
            for a, axis in enumerate(axes):
                _check_axis(self.groups, f"axis {a} of tensor {name!r}", axis)

    # ---- construction and storage

    @classmethod
    def build(cls, groups: Mapping[str, int], axes: Mapping[str, Sequence[Any]]) -> PermutationSpec:
        """A specification written by hand, in the format of this module's docstring."""
        sizes = {str(name): int(size) for name, size in groups.items()}
        return cls(
            sizes,
            {
                name: tuple(
                    _parse_axis(sizes, f"axis {a} of tensor {name!r}", axis) for a, axis in enumerate(row)
                )
                for name, row in axes.items()
            },
        )

    def to_json(self) -> str:
        """One line per tensor; :meth:`from_json` gives an equal specification back."""
        rows = ",\n".join(
            f"    {json.dumps(name)}: {json.dumps([_plain_axis(self.groups, axis) for axis in axes])}"
            for name, axes in self.axes.items()
        )
        return f'{{\n  "groups": {json.dumps(self.groups)},\n  "axes": {{\n{rows}\n  }}\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> PermutationSpec:
        """Reads what :meth:`to_json` or a person wrote. Raises ValueError saying what is wrong, and where."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a permutation specification: the JSON is broken ({error})") from error
        if not isinstance(data, dict) or not all(
            isinstance(data.get(key), dict) for key in ("groups", "axes")
        ):
            raise ValueError('not a permutation specification: expected an object with "groups" and "axes"')
        for name, row in data["axes"].items():
            if not isinstance(row, list):
                raise ValueError(f"tensor {name!r}: expected a list with one entry per axis, found {row!r}")
        return cls.build(data["groups"], data["axes"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON; a kill at any moment leaves the earlier file."""
        write_beside(Path(path), lambda part: part.write_text(self.to_json(), encoding="utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PermutationSpec:
        """Reads :meth:`save`'s file. Raises FileNotFoundError, or ValueError naming the path."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    # ---- permutations of this specification

    def identity(self) -> Perm:
        """The permutation that moves nothing."""
        return {group: torch.arange(size) for group, size in self.groups.items()}

    def random(self, generator: torch.Generator) -> Perm:
        """A uniformly random permutation of every group, on the CPU, from the given CPU generator."""
        return {group: torch.randperm(size, generator=generator) for group, size in self.groups.items()}

    def check(self, perm: Perm) -> None:
        """Raises ValueError, naming the group, unless ``perm`` has one permutation per group and nothing else."""
        if missing := self.groups.keys() - perm.keys():
            raise ValueError(f"the permutation lacks group {min(missing)!r}")
        if extra := perm.keys() - self.groups.keys():
            raise ValueError(
                f"the permutation has group {min(extra)!r}, which the specification does not know"
            )
        for group, size in self.groups.items():
            index = perm[group]
            if index.dtype != torch.int64 or index.shape != (size,):
                raise ValueError(
                    f"group {group!r}: expected {size} int64 indices, found shape {tuple(index.shape)} {index.dtype}"
                )
            if not torch.equal(index.sort().values, torch.arange(size, device=index.device)):
                raise ValueError(f"group {group!r}: the index vector is not a permutation of 0..{size - 1}")

    # ---- what an axis holds

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: tuple(_length(axis) for axis in axes) for name, axes in self.axes.items()}

    @cached_property
    def _members(self) -> dict[str, tuple[tuple[str, int], ...]]:
        members: dict[str, list[tuple[str, int]]] = {group: [] for group in self.groups}
        for name, axes in self.axes.items():
            for a, axis in enumerate(axes):
                for group in _groups_of(axis):
                    members[group].append((name, a))
        return {group: tuple(pairs) for group, pairs in members.items()}

    @cached_property
    def _positions(self) -> dict[Axis, dict[str, Tensor]]:
        return {axis: _positions(axis) for axes in self.axes.values() for axis in axes if _groups_of(axis)}

    def tensors_of(self, group: str) -> tuple[tuple[str, int], ...]:
        """The (tensor, axis) pairs that the group moves, in the order of the specification."""
        return self._members[group]

    def positions(self, name: str, axis: int, group: str) -> Tensor:
        """int64 [units, multiplicity]: where each unit of ``group`` stands along this axis, in rising order."""
        return self._positions[self.axes[name][axis]][group]

    def axis_index(self, name: str, axis: int, perm: Perm) -> Tensor | None:
        """int64 [axis length], the gather that ``perm`` means for this axis; None where it is fixed.

        Where a unit stands several times, its k-th place takes what stood in the k-th place of the new unit.
        """
        return self._gather(self.axes[name][axis], perm)

    def _gather(self, axis: Axis, perm: Perm) -> Tensor | None:
        groups = _groups_of(axis)
        if not groups:
            return None
        if _is_simple(self.groups, axis):
            return perm[axis[0].group]
        index = torch.arange(_length(axis), device=perm[groups[0]].device)
        for group, positions in self._positions[axis].items():
            positions = positions.to(index.device)
            index[positions] = positions[perm[group]]
        return index

    # ---- the kernels' view

    @cached_property
    def _slots(self) -> dict[Axis, str]:
        """The slot of every axis that moves: its group where it is simple, else the first place it occurs at."""
        slots: dict[Axis, str] = {}
        for name, axes in self.axes.items():
            for a, axis in enumerate(axes):
                if axis not in slots and _groups_of(axis):
                    slots[axis] = axis[0].group if _is_simple(self.groups, axis) else f"{name}:{a}"
        return slots

    @cached_property
    def _packing(self) -> Packing:
        slots = {name: tuple(self._slots.get(axis) for axis in axes) for name, axes in self.axes.items()}
        return Packing.build(self.shapes, slots)

    def packing(self) -> Packing:
        """:class:`regraft_kernels.packing.Packing`: the slot of every axis of every tensor. Built once."""
        return self._packing

    def indices(self, perm: Perm) -> dict[str, Tensor]:
        """slot -> int64 index vector, as the kernels take them."""
        return {slot: self._gather(axis, perm) for axis, slot in self._slots.items()}

    # ---- checks and printing

    def validate(self, tensors: Mapping[str, Tensor]) -> bool:
        """Checks names and shapes against the specification; True where the tensors are stacks [T, *shape].

        Raises ValueError naming the tensor that is missing, unknown or of another shape, or where some tensors
        have a leading stack dimension and others have not.
        """
        for name in self.axes:
            if name not in tensors:
                raise ValueError(f"tensor {name!r} of the specification is missing")
        for name in tensors:
            if name not in self.axes:
                raise ValueError(f"the specification lacks tensor {name!r}; trace the model again, or add it")
        stacked = _stack_size(self.shapes, tensors)
        for name, shape in self.shapes.items():
            expected = shape if stacked is None else (stacked, *shape)
            if tuple(tensors[name].shape) != expected:
                raise ValueError(
                    f"tensor {name!r} has shape {tuple(tensors[name].shape)}, the specification expects {expected}"
                )
        return stacked is not None

    def moved(self, perm: Perm | None = None) -> dict[str, int]:
        """How many scalars of each tensor ``perm`` moves to another place; if not given, some permutation could."""
        return {
            name: math.prod(self.shapes[name]) - math.prod(self._staying(axis, perm) for axis in axes)
            for name, axes in self.axes.items()
        }

    def _staying(self, axis: Axis, perm: Perm | None) -> int:
        """How many positions of an axis keep what they hold."""
        index = None if perm is None else self._gather(axis, perm)
        if index is not None:
            return int((index.cpu() == torch.arange(len(index))).sum())
        return sum(segment.length for segment in axis if segment.group is None or perm is not None)

    def table(self) -> Table:
        """A rich table: one row per group."""
        from rich.table import Table

        table = Table(title=f"{len(self.groups)} groups, {sum(self.groups.values())} units")
        table.add_column("group", overflow="fold")
        table.add_column("units", justify="right")
        table.add_column("tensors (axis)", overflow="fold")
        for group, size in self.groups.items():
            table.add_row(
                group, str(size), ", ".join(f"{name} ({axis})" for name, axis in self._members[group])
            )
        return table

    def __str__(self) -> str:
        lines = [f"{len(self.groups)} groups, {sum(self.groups.values())} units"]
        for group, size in self.groups.items():
            members = ", ".join(f"{name}:{axis}" for name, axis in self._members[group])
            lines.append(f"{group} [{size}]: {members}")
        return "\n".join(lines)


def _length(axis: Axis) -> int:
    return sum(segment.length for segment in axis)


def _groups_of(axis: Axis) -> list[str]:
    return list(dict.fromkeys(s.group for s in axis if s.group is not None))


def _is_simple(groups: Mapping[str, int], axis: Axis) -> bool:
    """The whole group, once, in order."""
    return len(axis) == 1 and axis[0].group is not None and axis[0][1:] == (0, groups[axis[0].group], 1)


def _positions(axis: Axis) -> dict[str, Tensor]:
    """group -> int64 [units, multiplicity], the places of each unit in rising order."""
    units: dict[str, list[Tensor]] = {}
    places: dict[str, list[Tensor]] = {}
    offset = 0
    for group, start, count, repeat in axis:
        if group is not None:
            units.setdefault(group, []).append(torch.arange(start, start + count).repeat_interleave(repeat))
            places.setdefault(group, []).append(torch.arange(offset, offset + count * repeat))
        offset += count * repeat
    result = {}
    for group, held in units.items():
        unit = torch.cat(held)
        size = int(unit.max()) + 1
        result[group] = torch.cat(places[group])[unit.argsort(stable=True)].view(size, -1)
    return result


def _check_axis(groups: Mapping[str, int], where: str, axis: Axis) -> None:
    held: dict[str, Tensor] = {}
    for group, start, count, repeat in axis:
        if start < 0 or count < 0 or repeat < 1:
            raise ValueError(f"{where}: the segment {(group, start, count, repeat)} is malformed")
        if group is None:
            continue
        if group not in groups:
            raise ValueError(f"{where}: there is no group {group!r}")
        if start + count > groups[group]:
            raise ValueError(f"{where}: group {group!r} has {groups[group]} units, not {start + count}")
        times = held.setdefault(group, torch.zeros(groups[group], dtype=torch.int64))
        times[start : start + count] += repeat
    for group, times in held.items():
        if times.min() != times.max():
            raise ValueError(f"{where}: not every unit of group {group!r} occurs, or not each equally often")


def _parse_axis(groups: Mapping[str, int], where: str, axis: Any) -> Axis:
    if isinstance(axis, bool):
        raise ValueError(f"{where}: expected a length, a group or a list of segments, found {axis!r}")
    if isinstance(axis, int):
        return (Segment(None, 0, axis),)
    if isinstance(axis, str):
        if axis not in groups:
            raise ValueError(f"{where}: there is no group {axis!r}")
        return (Segment(axis, 0, groups[axis]),)
    try:
        segments = tuple(Segment(*segment) for segment in axis)
    except TypeError:
        segments = ()
    well_typed = all(
        (s.group is None or isinstance(s.group, str)) and all(type(number) is int for number in s[1:])
        for s in segments
    )
    if not segments or not well_typed:
        raise ValueError(
            f"{where}: expected a length, a group or a list of segments [group, start, count, repeat], found {axis!r}"
        )
    return segments


def _plain_axis(groups: Mapping[str, int], axis: Axis) -> Any:
    if _is_simple(groups, axis):
        return axis[0].group
    if len(axis) == 1 and axis[0] == Segment(None, 0, axis[0].count):
        return axis[0].count
    return [list(segment) for segment in axis]


def _stack_size(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> int | None:
    """T where tensors are stacks [T, *shape]; None where they are single."""
    sizes = {
        name: tensors[name].shape[0] if tensors[name].ndim == len(shape) + 1 else None
        for name, shape in shapes.items()
    }
    for (one, size), (other, next_size) in pairwise(sizes.items()):
        if (size is None) != (next_size is None) or size != next_size:
            raise ValueError(
                f"tensors {one!r} {tuple(tensors[one].shape)} and {other!r} {tuple(tensors[other].shape)} do not "
                "agree on a leading stack dimension"
            )
    return next(iter(sizes.values()), None)


# ---- permutations


def apply(spec: PermutationSpec, perm: Perm, tensors: Mapping[str, Tensor]) -> Tensors:
    """pi(theta): every tensor gathered along the axes that the specification ties to a group.

    ``tensors``: parameters and buffers by name, any dtypes, all single or all stacks [T, *shape]; not changed.
    ``perm``: group -> int64 index vector, on any device. Raises ValueError naming the tensor or group that does
    not fit.
    """
    spec.validate(tensors)
    spec.check(perm)
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"the tensors are on several devices: {', '.join(sorted(map(str, devices)))}")
    placed = {group: index.to(device) for device in devices for group, index in perm.items()}
    return permute(dict(tensors), spec.indices(placed), spec.packing())


def inverse(perm: Perm) -> Perm:
    """The permutation that undoes ``perm``: the argsort of every index vector."""
    return {group: index.argsort() for group, index in perm.items()}


def compose(outer: Perm, inner: Perm) -> Perm:
    """The permutation that does ``inner`` first: ``apply(compose(p, q), x) == apply(p, apply(q, x))``.

    Raises ValueError, naming the group, where the two are not permutations of the same groups.
    """
    if different := outer.keys() ^ inner.keys():
        raise ValueError(f"group {min(different)!r} is in only one of the two permutations")
    for group, index in outer.items():
        if index.shape != inner[group].shape:
            raise ValueError(
                f"group {group!r} has {len(index)} units in one permutation and {len(inner[group])} in the other"
            )
    return {group: inner[group][index] for group, index in outer.items()}


# ---- finding the symmetry


def trace(model: nn.Module, example_inputs: Tensor | tuple[Any, ...]) -> PermutationSpec:
    """Finds which axes of a model's parameters and buffers share a permutation.

    The model is exported in evaluation mode (its own mode is left as it is) with ``example_inputs``: one tensor,
    or the tuple of positional arguments; small images and a small batch make it fast. Operators that the tracer
    does not know freeze what they touch, with one warning for each kind of operator.

    Raises ValueError, naming the model's class and the cause, where ``torch.export`` cannot trace the model.
    """
    from regraft.tracing import find_units

    found = find_units(model, example_inputs if isinstance(example_inputs, tuple) else (example_inputs,))
    names = list(found.groups)
    axes = {
        name: tuple(_segments(names, group, unit) for group, unit in axes)
        for name, axes in found.axes.items()
    }
    return PermutationSpec(found.groups, axes)


def _segments(names: list[str], group: np.ndarray, unit: np.ndarray) -> Axis:
    """One axis as few segments: runs of equal positions first, then runs of consecutive units."""
    segments: list[Segment] = []
    edges = np.flatnonzero((np.diff(group) != 0) | (np.diff(unit) != 0) & (group[1:] >= 0)) + 1
    for start, stop in pairwise([0, *edges.tolist(), len(group)]):
        if group[start] < 0:
            segments.append(Segment(None, 0, stop - start))
            continue
        here = Segment(names[group[start]], int(unit[start]), 1, stop - start)
        last = segments[-1] if segments else None
        if last and (last.group, last.start + last.count, last.repeat) == (
            here.group,
            here.start,
            here.repeat,
        ):
            segments[-1] = last._replace(count=last.count + 1)
        else:
            segments.append(here)
    return tuple(segments)


# ---- the proof


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
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    spec.validate(held)
    unread = {name for name, axes in spec.axes.items() if any(map(_groups_of, axes))}
    worst = 0.0
    for heads in (False, True):
        with evaluating(model, heads=heads), torch.no_grad():
            for perm in _telling(spec, draws, generator):
                error, read = _compare(spec, perm, model, held, inputs, generator)
                unread -= read
                if not error < tolerance:
                    tensors, _ = _generic(model, held, inputs, generator)
                    raise ValueError(_blame(spec, model, tensors, inputs, generator, error))
                worst = max(worst, error)
        if not unread:  # else auxiliary heads are still to be proved
            break
    return worst


def _compare(
    spec: PermutationSpec,
    perm: Perm,
    model: nn.Module,
    held: Mapping[str, Tensor],
    inputs: Any,
    generator: torch.Generator,
) -> tuple[float, set[str]]:
    """The error of one draw, and the names of the tensors that the model reads."""
    tensors, read = _generic(model, held, inputs, generator)
    before = functional_call(model, tensors, inputs)
    after = functional_call(model, _moved(spec, perm, tensors), inputs)
    return _difference(before, after), read


def _telling(spec: PermutationSpec, draws: int, generator: torch.Generator) -> list[Perm]:
    """Random permutations, ``draws`` or (where groups are tiny) more: so many that each group moves in one of them,
    and that no two groups always move alike."""
    perms: list[Perm] = []
    while True:
        codes = [
            torch.cat([perm[group] for perm in perms]).tolist() if perms else []
            for group, size in spec.groups.items()
            if size > 1
        ]
        still = [list(range(size)) * len(perms) for size in set(spec.groups.values()) if size > 1]
        if len(perms) >= draws and len(set(map(tuple, codes + still))) == len(codes + still):
            return perms
        perms.append(spec.random(generator))


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _moved(spec: PermutationSpec, perm: Perm, tensors: Tensors) -> Tensors:
    """Like :func:`apply`, but empties what it is given: a big model fits once, not twice."""
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    indices = spec.indices({group: index.to(device) for group, index in perm.items()})
    moved = {}
    for name in list(tensors):
        moved |= permute({name: tensors.pop(name)}, indices, spec.packing())
    return moved


def _generic(
    model: nn.Module, held: Mapping[str, Tensor], inputs: Any, generator: torch.Generator
) -> Tensors:
    """Random float64 parameters and buffers near the model's own, none of them constant or zero; and the names of
    those that the model reads."""
    tensors = {}
    for name, tensor in held.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"tensor {name!r} of the model is not finite")
        tensors[name] = _perturbed(tensor.detach(), generator)
    with _Statistics(generator) as statistics:
        functional_call(model, tensors, inputs)
    return tensors, {name for name, tensor in tensors.items() if id(tensor) in statistics.read}


def _perturbed(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return tensor.clone()
    value = tensor.double()
    spread = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value.device).add_(0.5)
    level = value.flatten()[0]
    if level != 0 and bool((value == level).all()):
        return spread.mul_(level.sign() * level.abs().clamp(min=0.5))
    moved = spread.mul_(value)
    zero = value == 0
    if zero.any():
        fan_in = value[0].numel() if value.ndim > 1 else 10
        noise = torch.randn(int(zero.sum()), generator=generator, dtype=torch.float64) / fan_in**0.5
        moved[zero] = noise.to(value.device)
    return moved


class _Statistics(TorchFunctionMode):
    """Sets the running statistics of every BatchNorm that runs inside to what it sees, give or take a half.

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
                mean.copy_(x.mean() * self._spread(mean))
                var.copy_(x.square().mean() * self._spread(var) + 1e-6)
        return function(*args, **kwargs)

    def _spread(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self.generator, dtype=torch.float64).add_(0.5).to(like.device)


def _difference(before: Any, after: Any) -> float:
    """The largest relative difference of the tensors of two results; NaN where one is not finite."""
    errors = [
        float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-300))
        for a, b in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True)
        if isinstance(a, Tensor) and a.numel()
    ]
    return math.nan if any(math.isnan(error) for error in errors) else max(errors, default=0.0)


def _blame(
    spec: PermutationSpec,
    model: nn.Module,
    tensors: Tensors,
    inputs: Any,
    generator: torch.Generator,
    error: float,
) -> str:
    """Says which group changes the function, and which of its axes, where one axis alone explains it."""
    before = functional_call(model, tensors, inputs)
    if not all(x.isfinite().all() for x in pytree.tree_leaves(before) if _is_floating(x)):
        return f"cannot verify: the output of {type(model).__name__} is not finite with random parameters"
    if _difference(before, functional_call(model, tensors, inputs)) > 0:
        return f"cannot verify: {type(model).__name__} gives two results for the same input"
    perm = spec.random(generator)

    def changes(candidate: PermutationSpec, groups: Sequence[str]) -> bool:
        moves = {**candidate.identity(), **{group: perm[group] for group in groups}}
        return (
            not _difference(before, functional_call(model, apply(candidate, moves, tensors), inputs)) < 1e-9
        )

    suspects = list(spec.groups)
    while len(suspects) > 1:
        half = suspects[: len(suspects) // 2]
        suspects = half if changes(spec, half) else suspects[len(half) :]
    if not suspects:
        return f"the function changes by {error:.1e} although nothing moves"
    (group,) = suspects
    members = ", ".join(f"{name!r} (axis {axis})" for name, axis in spec.tensors_of(group))
    what = f"permuting group {group!r} changes the function (relative error {error:.1e})"
    for name, axis in spec.tensors_of(group):
        if not changes(_with_axis(spec, name, axis, (Segment(None, 0, spec.shapes[name][axis]),)), [group]):
            return f"{what}: axis {axis} of tensor {name!r} does not belong to it; it ties {members}"
    for name, axis in _axes_of_length(spec, spec.groups[group])[:MAX_CANDIDATES]:
        if not changes(_with_axis(spec, name, axis, (Segment(group, 0, spec.groups[group]),)), [group]):
            return f"{what}: it lacks axis {axis} of tensor {name!r}; it ties {members}"
    return f"{what}; it ties {members}"


MAX_CANDIDATES = 256
"""How many axes are tried, at one evaluation each, before a failed proof names only the group."""


def _with_axis(spec: PermutationSpec, name: str, axis: int, new: Axis) -> PermutationSpec:
    axes = list(spec.axes[name])
    axes[axis] = new
    return PermutationSpec(spec.groups, {**spec.axes, name: tuple(axes)})


def _axes_of_length(spec: PermutationSpec, length: int) -> list[tuple[str, int]]:
    return [
        (name, a) for name, shape in spec.shapes.items() for a, size in enumerate(shape) if size == length
    ]


# ---- the command


def describe(name: str, shape: Sequence[int] | None = None) -> PermutationSpec:
    """What ``regraft symmetry NAME`` does: traces a model, prints its groups, and proves them.

    ``name``: a classification model of torchvision, or ``module:factory``, where the factory (a class, a function
    or a model) needs no arguments. ``shape``: of one input, batch first; torchvision's usual one if not given.
    Raises ValueError for a model that cannot be found, called, traced or proved.
    """
    from rich.console import Console

    model, usual = _find_model(name)
    inputs = torch.rand(tuple(shape or usual), generator=torch.Generator().manual_seed(0))
    console = Console()
    with console.status(f"tracing {name}"):
        spec = trace(model, inputs)
    console.print(spec.table())
    with console.status(f"proving {name}"):
        error = verify(spec, model, inputs)
    console.print(
        f"{name}: proved, relative error {error:.1e} in float64; "
        f"a random permutation moves {parameters_moved(spec, model):.1%} of the parameters"
    )
    return spec


def parameters_moved(spec: PermutationSpec, model: nn.Module) -> float:
    """The share of a model's parameters that a random permutation (of seed 0) moves to another place."""
    moved = spec.moved(spec.random(torch.Generator().manual_seed(0)))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(moved[name] for name in sizes) / max(sum(sizes.values()), 1)


def _find_model(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    module, colon, factory = name.partition(":")
    if not colon:
        import torchvision.models as zoo

        known = zoo.list_models(module=zoo)
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            raise ValueError(
                f"torchvision has no classification model {name!r}"
                + (f" (do you mean {' or '.join(close)}?)" if close else "")
                + "; your own model is given as module:factory"
            )
        (crop,) = zoo.get_model_weights(name).DEFAULT.transforms().crop_size
        return zoo.get_model(name), (1, 3, crop, crop)
    sys.path.insert(0, os.getcwd())  # as `python -m` does: the user's own module stands where the user does
    try:
        made = getattr(importlib.import_module(module), factory)
        model = made if isinstance(made, nn.Module) else made()
    except Exception as error:
        raise ValueError(f"cannot make a model of {name!r}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name!r} gives a {type(model).__name__}, not a torch.nn.Module")
    return model, (1, 3, 224, 224)
