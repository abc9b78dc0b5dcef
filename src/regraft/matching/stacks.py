"""What is matched: stacks of two networks' tensors, where a group's units stand in them, and the objective."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from regraft.core.tensors import Perm, Tensors, check_alike, check_finite
from regraft.symmetry import PermutationSpec
from regraft.symmetry.axes import groups_of
from regraft_kernels import Term, similarity, similarity_many

AxisIndices = dict[tuple[str, int], Tensor]  # (tensor, axis) -> index vector


@dataclass(frozen=True, eq=False)
class Slot:
    """One axis of one tensor on which a group's units stand."""

    name: str
    axis: int
    others: tuple[int, ...]  # the tensor's other axes that permutations move
    groups: frozenset[str]  # which move them
    positions: Tensor | None  # [n, mult], or None where position i is unit i
    whole: bool  # the units fill the axis


@dataclass(frozen=True)
class Neighbourhood:
    """What the similarity of one group is made of, and what it depends on."""

    single: tuple[Slot, ...]  # tensors that have the group on one axis: linear in its permutation
    coupled: tuple[Slot, ...]  # tensors that have it on several: quadratic
    groups: tuple[str, ...]  # whose permutations the similarity depends on; itself where something is coupled


@dataclass
class Stacks:
    """Pairs of tensors by name, [capacity, *shape] on each side, of which the first `steps` are filled."""

    spec: PermutationSpec
    target: Mapping[str, Tensor]
    source: Mapping[str, Tensor]
    steps: int

    @classmethod
    def of(cls, spec: PermutationSpec, target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> Stacks:
        """Of given tensors, [*shape] or [T, *shape]; views of them, except for convolutions' kernels.

        Raises ValueError as `regraft.match` says.
        """
        check_alike(target, source, "the target", "the source")
        sides = _stack_all(spec, target), _stack_all(spec, source)
        for side, where in zip(sides, ("the target", "the source"), strict=True):
            check_finite(side, where)
        left, right = ({n: _unfoldable(t) for n, t in side.items()} for side in sides)
        return cls(spec, left, right, _steps(sides[0]))

    @classmethod
    def allocate(cls, spec: PermutationSpec, like: Tensors, capacity: int) -> Stacks:
        """Empty ones, with room for `capacity` steps of tensors like those of `like`."""
        left, right = ({name: _room(tensor, capacity) for name, tensor in like.items()} for _ in range(2))
        return cls(spec, left, right, 0)

    @cached_property
    def device(self) -> torch.device:
        return next(iter(self.target.values())).device

    @property
    def groups(self) -> list[str]:
        """Those that move one of the tensors, in the order of the specification."""
        spec = self.spec
        return [g for g in spec.groups if any(name in self.target for name, _ in spec.tensors_of(g))]

    def append_(self, target: Tensors, source: Tensors) -> None:
        """Add one step's tensors at the next free place."""
        for side, tensors in ((self.target, target), (self.source, source)):
            for name, stack in side.items():
                stack[self.steps].copy_(tensors[name])
        self.steps += 1

    def around(self, group: str) -> Neighbourhood:
        spec = self.spec
        slots = [self._slot(name, axis, group) for name, axis in spec.tensors_of(group) if name in self.target]
        count = Counter(slot.name for slot in slots)
        single = tuple(slot for slot in slots if count[slot.name] == 1)
        coupled = tuple(slot for slot in slots if count[slot.name] > 1)
        neighbours = tuple(
            other
            for other in spec.groups
            if (other != group or coupled) and any(name in count for name, _ in spec.tensors_of(other))
        )
        return Neighbourhood(single, coupled, neighbours)

    def _slot(self, name: str, axis: int, group: str) -> Slot:
        spec = self.spec
        axes, positions = spec.axes[name], spec.positions(name, axis, group)
        others = tuple(other for other in range(len(axes)) if other != axis and groups_of(axes[other]))
        in_order = positions.shape == (spec.shapes[name][axis], 1) and _is_identity(positions)
        return Slot(
            name,
            axis,
            others,
            frozenset(moving for other in others for moving in groups_of(axes[other])),
            None if in_order else positions.to(self.device),
            positions.numel() == spec.shapes[name][axis],
        )

    def axis_indices(self, slots: Sequence[Slot], perm: Perm) -> AxisIndices:
        """What a permutation means for the other axes of each place's tensor."""
        return {
            (slot.name, other): cast(Tensor, self.spec.axis_index(slot.name, other, perm))  # it moves
            for slot in slots
            for other in slot.others
        }

    def terms(self, slots: Sequence[Slot], first: int, last: int, gathers: AxisIndices) -> list[Term]:
        """The slots' terms over the steps first .. last - 1, the source's other axes gathered."""
        return [
            Term(
                target=self.target[slot.name][first:last],
                source=self.source[slot.name][first:last],
                axis=slot.axis,
                positions=slot.positions,
                gathers=tuple(
                    gathers[slot.name, axis] if axis in slot.others else None
                    for axis in range(len(self.spec.shapes[slot.name]))
                ),
            )
            for slot in slots
        ]

    def similarities(
        self, slots: Sequence[Sequence[Slot]], gathers: Sequence[AxisIndices], backend: str
    ) -> list[Tensor]:
        """S [n, n] over all steps, of each sequence of slots; none of them empty."""
        terms = [self.terms(p, 0, self.steps, g) for p, g in zip(slots, gathers, strict=True)]
        return similarity_many(terms, backend=backend) if terms else []

    def objective(self, names: Iterable[str], perm: Perm, first: int = 0) -> float:
        """sum over the filled steps from `first` on of <G2[t], pi G1[t]> of the named tensors.

        Rows are multiplied in the tensors' own dtype and added in float64.
        """
        total = 0.0
        for name in names:
            target, source = (side[name][first : self.steps] for side in (self.target, self.source))
            for axis in range(len(self.spec.shapes[name])):
                index = self.spec.axis_index(name, axis, perm)
                if index is not None and not _is_identity(index):
                    source = _gather(source, axis + 1, index)
            total += _dot(target, source)
        return total


class Streamed(Stacks):
    """One pair of tensors at a time: each is read when it is needed, and not kept.

    target, source: mappings that read; finite floating tensors of the spec's shapes, the same names on both sides.
    """

    def __init__(self, spec: PermutationSpec, target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
        super().__init__(spec, _Read(target), _Read(source), 1)

    def similarities(
        self, slots: Sequence[Sequence[Slot]], gathers: Sequence[AxisIndices], backend: str
    ) -> list[Tensor]:
        _trim()
        return [self._sum(p, g, backend) for p, g in zip(slots, gathers, strict=True)]

    def _sum(self, slots: Sequence[Slot], gathers: AxisIndices, backend: str) -> Tensor:
        total = similarity(self.terms(slots[:1], 0, 1, gathers), backend=backend)
        for slot in slots[1:]:
            total += similarity(self.terms([slot], 0, 1, gathers), backend=backend)
        return total


def _trim() -> None:
    """Give freed memory back: among small results that stay, glibc keeps what large temporaries left."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other systems' libraries have none
    if trim is not None:
        trim(0)


@dataclass(frozen=True, eq=False)
class _Read(Mapping[str, Tensor]):
    """Tensors as stacks of one step, made when asked for."""

    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return _unfoldable(self.tensors[name].detach()[None])

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _stack_all(spec: PermutationSpec, tensors: Mapping[str, Tensor]) -> Tensors:
    """The floating tensors as detached stacks [T, *shape]; a single set becomes a stack of one (a view)."""
    stacks = {}
    for name, tensor in tensors.items():
        if name not in spec.shapes:
            raise ValueError(f"the spec has no tensor {name!r}")
        shape, actual = spec.shapes[name], tuple(tensor.shape)
        if shape not in (actual, actual[1:]):
            raise ValueError(f"tensor {name!r} has shape {actual}, neither {shape} nor a stack of them")
        if tensor.is_floating_point():
            stacks[name] = tensor.detach()[None] if actual == shape else tensor.detach()
    if not stacks:
        raise ValueError("there is nothing to match: no floating-point tensor")
    return stacks


def _steps(stacks: Tensors) -> int:
    first, *others = stacks
    steps = len(stacks[first])
    for name in others:
        if len(stacks[name]) != steps:
            raise ValueError(f"tensor {name!r} has {len(stacks[name])} steps, {first!r} has {steps}")
    return steps


def _room(like: Tensor, capacity: int) -> Tensor:
    """Room for [capacity, *shape], the second axis innermost: then both of the axes that units stand on unfold
    into matrices without a copy, whatever the size of the kernel between them."""
    if like.dim() < 3:
        return like.new_empty(capacity, *like.shape)
    rows, columns, *tail = like.shape
    return like.new_empty(capacity, rows, *tail, columns).movedim(-1, 2)


def _unfoldable(stack: Tensor) -> Tensor:
    """A stack in the layout of `_room`: copied once, where it has kernels larger than one in another."""
    if stack.dim() < 4 or stack.movedim(2, -1).is_contiguous():
        return stack
    return _room(stack[0], len(stack)).copy_(stack) if len(stack) else stack


def _gather(stack: Tensor, dim: int, index: Tensor) -> Tensor:
    """index_select that keeps the layout of `_room`."""
    if stack.dim() < 4:
        return stack.index_select(dim, index)
    inner = stack.movedim(2, -1)
    slot = {1: 1, 2: stack.dim() - 1}.get(dim, dim - 1)
    return inner.index_select(slot, index).movedim(-1, 2)


def _dot(a: Tensor, b: Tensor) -> float:
    if a.dim() > 3:
        a, b = a.movedim(2, -1), b.movedim(2, -1)
    return float(torch.linalg.vecdot(a, b).sum(dtype=torch.float64))


def _is_identity(index: Tensor) -> bool:
    flat = index.reshape(-1)
    return torch.equal(flat, torch.arange(len(flat), device=flat.device))
