"""Permutation symmetries as data: a specification, its permutations, and their application to tensors.

A *unit* is a neuron, a channel or a feature: something whose numbering is arbitrary. Units that may trade places
form a *group*. A permutation is a dictionary ``group -> perm`` (int64 index vectors), and
``(pi theta)[i] = theta[perm[i]]`` along every axis that is tied to the group.

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

A group that occurs in an axis must occur with all its units, and with each equally often. Names in a list
``"optional"`` (buffers, and second names of shared tensors) may be absent from what is permuted.

Equal blocks of units (heads, groups of channels) may be exchanged whole. The blocks are a group of their own, and
``"blocks": {"values": ["heads"]}`` says that the group "values" consists of as many blocks as there are "heads", each
of consecutive units: block b of the permuted order holds units of block ``perm["heads"][b]``, in any order.
``"blocks": {"channels": ["groups", "inner"]}``: in all blocks in the order of one permutation, that of "inner".
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from msgspec import Meta, Struct
from torch import Tensor, nn

from regraft.core.arguments import check_arguments
from regraft.core.files import parse_json, read_json, write_text
from regraft.core.tensors import Perm, Tensors
from regraft.core.text import clean_text
from regraft.symmetry.axes import (
    Axis,
    Segment,
    check_axis,
    fixed_length,
    groups_of,
    is_simple,
    parse_axis,
    plain_axis,
    positions_of,
)
from regraft.symmetry.blocks import check_blocks, check_inside, families, outermost_first, random_inside
from regraft_kernels import Packing, permute

if TYPE_CHECKING:
    from rich.table import Table


SHOWN = 12
"""How many weights of which an axis stays are named in print."""

_UnitCount = Annotated[int, Meta(ge=0, le=1 << 24)]
"""A number of units: far beyond any layer, and still one that fits in memory."""


class _SpecFile(Struct, forbid_unknown_fields=True):
    """The JSON form; an axis is a length, a group, or segments."""

    groups: dict[str, _UnitCount]
    axes: dict[str, list[int | str | list[Segment]]]
    blocks: dict[str, list[str]] = {}
    optional: list[str] = []
    proven: str | None = None


@dataclass(frozen=True)
class PermutationSpec:
    """Which axes of which tensors are permuted together.

    ``groups``: name -> number of units. ``axes``: the name of every parameter and buffer -> one :data:`Axis` per
    dimension, whose segments cover it in order. ``blocks``: a group -> that of the blocks that it consists of; and,
    where the blocks' units move alike, that of one block's units. ``optional``: names that tensors may lack: buffers,
    and second names of shared tensors. ``proven``: whether :func:`regraft.symmetry.verify` proved it; it and a file
    that was not edited keep the mark, a changed specification has none. ``reasons``: "tensor:axis" -> why nothing moves
    along it, of a traced weight; ``idle``: "tensor:axis" without an effect on the output, of which a proof says
    nothing (neither is saved).

    Raises ValueError, naming the tensor or the group, where these do not fit.
    """

    groups: dict[str, int]
    axes: dict[str, tuple[Axis, ...]]
    optional: frozenset[str] = frozenset()
    blocks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    proven: bool = field(default=False, compare=False)
    reasons: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    idle: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        check_blocks(self.groups, self.blocks)
        if unknown := self.optional - self.axes.keys():
            raise ValueError(f"the optional tensor {min(unknown)!r} is not in the specification")
        for name, axes in self.axes.items():
            for a, axis in enumerate(axes):
                check_axis(self.groups, f"axis {a} of tensor {name!r}", axis)

    # ---- construction and storage

    @classmethod
    def build(
        cls,
        groups: Mapping[str, int],
        axes: Mapping[str, Sequence[Any]],
        optional: Iterable[str] = (),
        blocks: Mapping[str, Sequence[str]] | None = None,
    ) -> PermutationSpec:
        """A specification written by hand, in the format of this module's docstring."""
        sizes = {str(name): int(size) for name, size in groups.items()}
        return cls(
            sizes,
            {
                name: tuple(parse_axis(sizes, f"axis {a} of tensor {name!r}", axis) for a, axis in enumerate(row))
                for name, row in axes.items()
            },
            frozenset(optional),
            {name: tuple(around) for name, around in (blocks or {}).items()},
        )

    def with_axis(self, name: str, axis: int, segments: Axis) -> PermutationSpec:
        """This specification, but for one axis of one tensor."""
        axes = list(self.axes[name])
        axes[axis] = segments
        return replace(self, axes={**self.axes, name: tuple(axes)}, proven=False)

    def mark(self, *, proven: bool, idle: Sequence[str] = ()) -> None:
        """What :func:`regraft.symmetry.verify` found; nothing else changes."""
        object.__setattr__(self, "proven", proven)
        object.__setattr__(self, "idle", tuple(idle))

    def to_json(self) -> str:
        """One line per tensor; :meth:`from_json` gives an equal specification back."""
        rows = ",\n".join(
            f"    {json.dumps(name)}: {json.dumps([plain_axis(self.groups, axis) for axis in axes])}"
            for name, axes in self.axes.items()
        )
        body = f'"groups": {json.dumps(self.groups)},\n  "axes": {{\n{rows}\n  }}'
        if self.blocks:
            body += f',\n  "blocks": {json.dumps(self.blocks)}'
        if self.optional:
            body += f',\n  "optional": {json.dumps(sorted(self.optional))}'
        if self.proven:
            body += f',\n  "proven": "{self._digest}"'
        return f"{{\n  {body}\n}}\n"

    @property
    def _digest(self) -> str:
        """Of all that it says: the mark of a proof is void where a file was edited."""
        text = json.dumps([self.groups, self.axes, sorted(self.optional), self.blocks])
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> PermutationSpec:
        """Reads what :meth:`to_json` or a person wrote. Raises ValueError saying what is wrong, and where."""
        return cls._of(parse_json(text, _SpecFile, "not a permutation specification"))

    @classmethod
    def _of(cls, data: _SpecFile) -> PermutationSpec:
        spec = cls.build(data.groups, data.axes, data.optional, data.blocks)
        spec.mark(proven=data.proven == spec._digest)
        return spec

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON; a kill at any moment leaves the earlier file."""
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PermutationSpec:
        """Reads :meth:`save`'s file. Raises OSError or ValueError naming the path."""
        data = read_json(Path(path), _SpecFile, "a permutation specification")
        try:
            return cls._of(data)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    # ---- permutations of this specification

    def identity(self) -> Perm:
        """The permutation that moves nothing."""
        return {group: torch.arange(size) for group, size in self.groups.items()}

    def random(self, generator: torch.Generator) -> Perm:
        """A uniformly random permutation of every group, on the CPU, from the given CPU generator: of blocks, and of
        the units in each."""
        perm: Perm = {}
        for group in outermost_first(self.groups, self.blocks):
            around = [perm[name] for name in self.blocks.get(group, ())]
            perm[group] = random_inside(self.groups[group], around, generator)
        return {group: perm[group] for group in self.groups}

    @cached_property
    def families(self) -> tuple[tuple[str, ...], ...]:
        """The groups, those together that permute together: blocks, and what is in them; the outermost first."""
        return families(self.groups, self.blocks)

    def moves_freely(self, group: str) -> bool:
        """Whether a group's permutation is more than what the groups around it make of it."""
        outer, *inner = self.blocks.get(group, (None,))
        return outer is None or (not inner and self.groups[outer] < self.groups[group])

    def check(self, perm: Perm) -> None:
        """Raises ValueError, naming the group, unless ``perm`` has one permutation per group and nothing else."""
        if missing := self.groups.keys() - perm.keys():
            raise ValueError(f"the permutation lacks group {min(missing)!r}")
        if extra := perm.keys() - self.groups.keys():
            raise ValueError(f"the permutation has group {min(extra)!r}, which the specification does not know")
        for group, size in self.groups.items():
            index = perm[group]
            if index.dtype != torch.int64 or index.shape != (size,):
                raise ValueError(
                    f"group {group!r}: expected {size} int64 indices, found shape {tuple(index.shape)} {index.dtype}"
                )
            if not torch.equal(index.sort().values, torch.arange(size, device=index.device)):
                raise ValueError(f"group {group!r}: the index vector is not a permutation of 0..{size - 1}")
        for group, around in self.blocks.items():
            check_inside(group, perm[group], [perm[name] for name in around])

    # ---- what an axis holds

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: tuple(sum(s.length for s in axis) for axis in axes) for name, axes in self.axes.items()}

    @cached_property
    def _members(self) -> dict[str, tuple[tuple[str, int], ...]]:
        members: dict[str, list[tuple[str, int]]] = {group: [] for group in self.groups}
        for name, axes in self.axes.items():
            for a, axis in enumerate(axes):
                for group in groups_of(axis):
                    members[group].append((name, a))
        return {group: tuple(pairs) for group, pairs in members.items()}

    @cached_property
    def _positions(self) -> dict[Axis, dict[str, Tensor]]:
        return {axis: positions_of(axis) for axes in self.axes.values() for axis in axes if groups_of(axis)}

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
        moved = self.axes[name][axis]
        return self._gather(moved, perm) if groups_of(moved) else None

    def _gather(self, axis: Axis, perm: Perm) -> Tensor:
        """Of an axis that moves."""
        groups = groups_of(axis)
        if is_simple(self.groups, axis):
            return perm[groups[0]]
        index = torch.arange(sum(segment.length for segment in axis), device=perm[groups[0]].device)
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
                if axis not in slots and groups_of(axis):
                    slots[axis] = groups_of(axis)[0] if is_simple(self.groups, axis) else f"{name}:{a}"
        return slots

    @cached_property
    def _packing(self) -> Packing:
        slots = {name: tuple(self._slots.get(axis) for axis in axes) for name, axes in self.axes.items()}
        return Packing.build(self.shapes, slots)

    def packing(self) -> Packing:
        """:class:`regraft_kernels.packing.Packing`: the slot of every axis of every tensor. Built once."""
        return self._packing

    def indices(self, perm: Perm) -> Perm:
        """slot -> int64 index vector, as the kernels take them."""
        return {slot: self._gather(axis, perm) for axis, slot in self._slots.items()}

    # ---- checks and printing

    def validate(self, tensors: Mapping[str, Tensor]) -> bool:
        """Checks names and shapes against the specification; True where the tensors are stacks [T, *shape].

        Raises ValueError naming the tensor that is missing (and not optional), unknown or of another shape, or
        where some tensors have a leading stack dimension and others have not.
        """
        for name in self.axes:
            if name not in tensors and name not in self.optional:
                raise ValueError(f"tensor {name!r} of the specification is missing")
        for name in tensors:
            if name not in self.axes:
                raise ValueError(
                    f"the specification lacks tensor {name!r}; trace the model again, or add it (buffers that a "
                    "state dictionary does not hold never move: leave them out)"
                )
        shapes = {name: shape for name, shape in self.shapes.items() if name in tensors}
        stacked = _stack_size(shapes, tensors)
        for name, shape in shapes.items():
            expected = shape if stacked is None else (stacked, *shape)
            if tuple(tensors[name].shape) != expected:
                raise ValueError(
                    f"tensor {name!r} has shape {tuple(tensors[name].shape)}, the specification expects {expected}"
                )
        return stacked is not None

    def count_moved(self, perm: Perm) -> dict[str, int]:
        """How many scalars of each tensor ``perm`` moves to another place."""
        moved = {}
        for name, shape in self.shapes.items():
            indices = [self.axis_index(name, axis, perm) for axis in range(len(shape))]
            moved[name] = math.prod(shape) - math.prod(map(_staying, indices, shape))
        return moved

    def shares(self) -> tuple[float, float]:
        """The share of the entries that may move, and of the weights (tensors of two axes or more) those, by
        entries, of which the first two axes both may; what is optional is not counted."""
        counted = [name for name in self.axes if name not in self.optional]
        sizes = {name: math.prod(self.shapes[name]) for name in counted}
        fixed = {name: math.prod(map(fixed_length, self.axes[name])) for name in counted}
        weights = [name for name in counted if len(self.axes[name]) > 1]
        both = sum(sizes[name] for name in weights if not self.staying_axes(name))
        return (
            1 - sum(fixed.values()) / max(sum(sizes.values()), 1),
            both / max(sum(sizes[name] for name in weights), 1),
        )

    def staying_axes(self, name: str) -> list[int]:
        """Of the first two axes of a weight, those longer than one along which nothing moves."""
        axes = self.axes[name][:2]
        return [a for a, axis in enumerate(axes) if self.shapes[name][a] > 1 and not groups_of(axis)]

    @property
    def _title(self) -> str:
        moved, both = self.shares()
        return (
            f"{len(self.groups)} groups, {sum(self.groups.values())} units; {moved:.1%} of the entries may move, "
            f"{both:.1%} of the weights along both axes; {'proved' if self.proven else 'not proved'}"
        )

    @property
    def _lacking(self) -> str:
        """The weights of which an axis stays, the largest first."""
        weights = [n for n in self.axes if n not in self.optional and len(self.axes[n]) > 1]
        lacking = [(n, a) for n in weights for a in self.staying_axes(n)]
        lacking.sort(key=lambda pair: -math.prod(self.shapes[pair[0]]))
        more = f" and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else ""
        named = [f"{name}:{axis}" for name, axis in lacking[:SHOWN]]
        return ", ".join(f"{at} ({self.reasons[at]})" if at in self.reasons else at for at in named) + more

    def table(self) -> Table:
        """A rich table: one row per group."""
        from rich.table import Table

        table = Table(title=self._title, caption="\n".join(map(clean_text, self._notes)))
        table.add_column("group", overflow="fold")
        table.add_column("units", justify="right")
        table.add_column("tensors (axis)", overflow="fold")
        for group, size in self.groups.items():
            table.add_row(*map(clean_text, (group, str(size), self._describe(group, "{} ({})"))))
        return table

    def __str__(self) -> str:
        lines = [f"{group} [{size}]: {self._describe(group, '{}:{}')}" for group, size in self.groups.items()]
        return "\n".join([self._title, *lines, *self._notes])

    @property
    def _notes(self) -> list[str]:
        notes = [f"stay along an axis: {self._lacking or 'none'}"]
        return [*notes, f"no effect on the output, not proved: {', '.join(self.idle)}"] if self.idle else notes

    def _describe(self, group: str, pair: str) -> str:
        """The (tensor, axis) pairs of a group, and the groups that it is nested in."""
        members = ", ".join(pair.format(name, axis) for name, axis in self._members[group])
        outer, *inner = self.blocks.get(group, ("",))
        alike = f", all in the order of {inner[0]}" if inner else ""
        return members + (f" (in blocks that move as {outer}{alike})" if outer else "")


# ---- permutations


@torch.no_grad()
@check_arguments
def apply(spec: PermutationSpec, perm: Perm, tensors: Mapping[str, Any]) -> Tensors:
    """pi(theta): every tensor gathered along the axes that the specification ties to a group.

    ``tensors``: parameters and buffers by name, such as a model's state dictionary or its parameters alone; any
    dtypes, all single or all stacks [T, *shape]; not changed. Anything else that a state dictionary holds is
    passed on. ``perm``: group -> int64 index vector, on any device. Raises ValueError naming the tensor or group
    that does not fit.
    """
    state = tensors
    passed = {name: x for name, x in tensors.items() if not isinstance(x, Tensor)}
    tensors = {name: x for name, x in tensors.items() if name not in passed}
    spec.validate(tensors)
    spec.check(perm)
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"the tensors are on several devices: {', '.join(sorted(map(str, devices)))}")
    placed = {group: index.to(device) for device in devices for group, index in perm.items()}
    return like_state(permute(tensors, spec.indices(placed), spec.packing()) | passed, state)


def like_state(tensors: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """With the versions of modules that a state dictionary carries: some modules load nothing without theirs."""
    versions = getattr(state, "_metadata", None)
    if versions is None:
        return dict(tensors)
    ordered = OrderedDict(tensors)
    ordered._metadata = versions  # type: ignore[attr-defined]  # where torch looks for it
    return ordered


@check_arguments
def inverse(perm: Perm) -> Perm:
    """The permutation that undoes ``perm``: the argsort of every index vector."""
    return {group: index.argsort() for group, index in perm.items()}


def parameters_moved(spec: PermutationSpec, model: nn.Module) -> float:
    """The share of a model's parameters that a random permutation (of seed 0) moves to another place."""
    moved = spec.count_moved(spec.random(torch.Generator().manual_seed(0)))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(moved[name] for name in sizes) / max(sum(sizes.values()), 1)


def _staying(index: Tensor | None, length: int) -> int:
    """How many positions of an axis keep what they hold."""
    return length if index is None else int((index.cpu() == torch.arange(length)).sum())


def _stack_size(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> int | None:
    """T where tensors are stacks [T, *shape]; None where they are single."""
    sizes = {
        name: tensors[name].shape[0] if tensors[name].ndim == len(shape) + 1 else None for name, shape in shapes.items()
    }
    for (one, size), (other, next_size) in pairwise(sizes.items()):
        if size != next_size:
            raise ValueError(
                f"tensors {one!r} {tuple(tensors[one].shape)} and {other!r} {tuple(tensors[other].shape)} do not "
                "agree on a leading stack dimension"
            )
    return next(iter(sizes.values()), None)
