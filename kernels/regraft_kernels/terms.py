"""What similarity sums over: the terms of a group, and the stacks in them with their gathers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regraft_kernels.backend import accumulator
from regraft_kernels.copies import Copies
from regraft_kernels.indices import check_index, check_ranges
from regraft_kernels.memory import ALIGNMENT, Scratch

Gathers = tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class Term:
    """One (tensor, axis) of a group: what it adds to the group's similarity. Compared by identity, as tensors are.

    `target`, `source`: [T, *shape] on one device and of one floating dtype, any strides; fastest on a CPU
    where both have the same memory order, and the axis stands first (after T) or last in it. `axis`: 0-based
    in shape. `positions`: int64 [n, multiplicity], the positions on that axis at which unit u stands, or None
    for "position u, once". `gathers`: for each axis of shape the int64 index vector that is applied to the
    *source* before it is unfolded, or None; an empty tuple is None for every axis.
    """

    target: Tensor
    source: Tensor
    axis: int
    positions: Tensor | None = None
    gathers: Gathers = ()

    @property
    def units(self) -> int:
        """n, the number of units of the group."""
        return self.target.shape[self.axis + 1] if self.positions is None else self.positions.shape[0]


@dataclass(frozen=True)
class Operand:
    """A stack and the index vectors that gather from it, one or None for each of its dimensions."""

    stack: Tensor
    gathers: Gathers

    def with_gather(self, dim: int, index: Tensor) -> Operand:
        return replace(self, gathers=(*self.gathers[:dim], index, *self.gathers[dim + 1 :]))

    def block(self, dim: int, start: int, length: int) -> Operand:
        """The part at start..start+length of a dimension of the gathered stack."""
        index = self.gathers[dim]
        if index is not None:
            return self.with_gather(dim, index[start : start + length])
        return replace(self, stack=self.stack.narrow(dim, start, length))

    def gather(self, order: Sequence[int], dtype: torch.dtype, scratch: Scratch) -> Tensor:
        """The gathered stack, its dimensions in `order`; a view of the stack where there is nothing to do."""
        result = self.stack.permute(*order)
        for place, dim in enumerate(order):
            index = self.gathers[dim]
            if index is not None:
                # On three dimensions, because index_select takes several times as long on more.
                before, after = result.shape[:place], result.shape[place + 1 :]
                flat = result.reshape(before.numel(), result.shape[place], after.numel())
                into = scratch.empty((len(flat), len(index), flat.shape[2]), flat)
                result = torch.index_select(flat, 1, index, out=into).view(*before, len(index), *after)
        return result.to(dtype)


@dataclass(frozen=True)
class Runs:
    """A stack as the kernel reads it: behind each of its positions `count` runs of `length` contiguous entries,
    `distance` apart; `pitch` is from one position to the next."""

    stack: Tensor
    pitch: int
    count: int
    length: int
    distance: int

    @staticmethod
    def in_place(operand: Operand, dim: int, order: Sequence[int]) -> Runs | None:
        """The stack as it is, where nothing but its positions is gathered and all is aligned; otherwise None."""
        stack = operand.stack
        if any(operand.gathers[d] is not None for d in order):
            return None
        length = count = distance = 1
        for d in reversed(order):
            size, stride = stack.shape[d], stack.stride(d)
            if size == 1:
                continue
            if count == 1 and stride == length:
                length *= size
            elif count == 1 or stride == distance * count:
                distance = stride if count == 1 else distance
                count *= size
            else:
                return None
        distance = distance if count > 1 else length
        pitch, size = stack.stride(dim), stack.element_size()
        if any(x % ALIGNMENT for x in (stack.data_ptr(), size * pitch, size * length, size * distance)):
            return None
        return Runs(stack, pitch, count, length, distance)

    @staticmethod
    def copy_of(operand: Operand, dim: int, order: Sequence[int], count: int, copies: Copies) -> Runs:
        """A copy [positions, everything else], gathered, as `count` runs; one run is filled up with zeros."""
        sizes, gathers = operand.stack.shape, operand.gathers
        entries = math.prod(sizes[d] if (index := gathers[d]) is None else len(index) for d in order)
        unit = ALIGNMENT // operand.stack.element_size()
        pitch = -(-entries // unit) * unit
        rest = copies.add(operand.stack, gathers, dim, order, pitch)
        return Runs(rest, pitch, count, pitch // count, pitch // count)

    @staticmethod
    def of(target: Operand, source: Operand, dim: int, copies: Copies) -> tuple[Runs, Runs]:
        """Both stacks in the same runs."""
        order = sorted((d for d in range(target.stack.ndim) if d != dim), key=lambda d: -target.stack.stride()[d])
        left, right = (Runs.in_place(operand, dim, order) for operand in (target, source))
        if left is None:
            return Runs.copy_of(target, dim, order, 1, copies), Runs.copy_of(source, dim, order, 1, copies)
        if right is None or right.count != left.count:
            right = Runs.copy_of(source, dim, order, left.count, copies)
        return left, right


def operands_of(term: Term) -> tuple[Operand, Operand]:
    """Target and source; views that are to be negated are, for a kernel sees only memory."""
    nothing: Gathers = (None,) * term.target.ndim
    gathers = (None, *term.gathers) if term.gathers else nothing
    return Operand(term.target.resolve_neg(), nothing), Operand(term.source.resolve_neg(), gathers)


def unfold(operand: Operand, term: Term) -> Tensor:
    """The gathered [T, *shape] as [n, multiplicity * T * everything else], in the dtype of the sum."""
    stack = operand.stack
    for dim, index in enumerate(operand.gathers):
        if index is not None:
            stack = stack.index_select(dim, index)
    by_position = stack.movedim(term.axis + 1, 0).to(accumulator(stack.dtype))
    if term.positions is not None:
        by_position = by_position[term.positions]
    return by_position.flatten(1)


def fold(units: Tensor, operand: Operand, term: Term) -> Tensor:
    """The transpose of `unfold`: what is at several places is added up."""
    stack, dim = operand.stack, term.axis + 1
    others = [size for d, size in enumerate(stack.shape) if d != dim]
    by_position = units.reshape(-1, *others)
    if term.positions is not None:
        whole = units.new_zeros(stack.shape[dim], *others)
        by_position = whole.index_add(0, term.positions.flatten(), by_position)
    folded = by_position.movedim(0, dim)
    for d, index in enumerate(operand.gathers):
        if index is not None:
            folded = torch.zeros_like(folded).index_add(d, index, folded)
    return folded.to(stack.dtype)


def check_terms(terms: Sequence[Term]) -> None:
    """Raise ValueError unless the terms belong to one group and all shapes, dtypes and devices fit."""
    if not terms:
        raise ValueError("similarity needs at least one term")
    first = terms[0]
    for number, term in enumerate(terms):
        _check_term(term, f"term {number}")
        if (term.target.dtype, term.target.device) != (first.target.dtype, first.target.device):
            raise ValueError(
                f"term {number} is {term.target.dtype} on {term.target.device}, "
                f"but term 0 {first.target.dtype} on {first.target.device}"
            )
        if term.units != first.units:
            raise ValueError(f"term {number} has {term.units} units, but term 0 {first.units}")


def check_entries(terms: Sequence[Term]) -> None:
    """Raise ValueError unless the entries of all positions and gathers are within their axes."""
    ranges: list[tuple[str, Tensor, int]] = []
    for number, term in enumerate(terms):
        shape, where = term.target.shape[1:], f"term {number}"
        if term.positions is not None:
            ranges.append((f"{where}: positions", term.positions, shape[term.axis]))
        for axis, index in enumerate(term.gathers):
            if index is not None:
                ranges.append((f"{where}: gather of axis {axis}", index, shape[axis]))
    check_ranges(ranges)


def _check_term(term: Term, where: str) -> None:
    target, source = term.target, term.source
    for kind in ("shape", "dtype", "device"):
        if getattr(target, kind) != getattr(source, kind):
            raise ValueError(
                f"{where}: {kind} is {getattr(target, kind)} for the target, {getattr(source, kind)} for the source"
            )
    if not target.is_floating_point():
        raise ValueError(f"{where}: tensors must be real and floating, not {target.dtype}")
    shape = target.shape[1:]
    if not 0 <= term.axis < len(shape):
        raise ValueError(f"{where}: axis {term.axis} of tensors with {len(shape)} axes besides the steps")
    if term.positions is not None:
        if term.positions.ndim != 2:
            given = tuple(term.positions.shape)
            raise ValueError(f"{where}: positions must be [n, multiplicity], not {given}")
        check_index(f"{where}: positions", term.positions, (None, None), source.device)
    if term.gathers and len(term.gathers) != len(shape):
        raise ValueError(f"{where}: {len(term.gathers)} gathers for {len(shape)} axes")
    for axis, index in enumerate(term.gathers):
        if index is not None:
            check_index(f"{where}: gather of axis {axis}", index, shape[axis : axis + 1], source.device)


# ---------------------------------------------------------------- in parts, for torch

PART_BYTES = 10 << 20
"""What must be gathered, cast or reordered is made in parts of at most about this size, which are transient: one step
of a 3x3 convolution of 512 channels in float32."""


@dataclass(frozen=True)
class UnitSplit:
    """How the dimension of the units splits in two: `sizes`, of which number `units` counts the units."""

    sizes: tuple[int, int]
    units: int


def bring_units_together(operands: tuple[Operand, ...], dim: int, term: Term) -> tuple[tuple[Operand, ...], UnitSplit]:
    """Narrow to the positions of the units where they are one run, otherwise gather them."""
    positions = term.positions
    if positions is None:
        return operands, UnitSplit((term.units, 1), 0)
    n, repeats = positions.shape
    flat = positions.flatten()
    start = int(flat.min()) if len(flat) else 0
    run = torch.arange(start, start + len(flat), device=flat.device)
    for split, grid in (
        (UnitSplit((n, repeats), 0), run.view(n, repeats)),
        (UnitSplit((repeats, n), 1), run.view(repeats, n).T),
    ):
        if torch.equal(positions, grid) and all(operand.gathers[dim] is None for operand in operands):
            return tuple(operand.block(dim, start, len(flat)) for operand in operands), split
    together = tuple(
        operand.with_gather(dim, flat if (index := operand.gathers[dim]) is None else index[flat])
        for operand in operands
    )
    return together, UnitSplit((n, repeats), 0)


def split_to_parts(
    operands: tuple[Operand, ...], order: Sequence[int], dim: int, dtype: torch.dtype
) -> Iterator[tuple[Operand, ...]]:
    """The operands in parts to work on one after the other: whole unless something must be copied.

    Steps are cut first. Where one alone is too large, it is cut along what stands outermost in it and is long enough,
    so that contiguous runs stay long.
    """
    target = operands[0]
    lengths = [n if g is None else len(g) for n, g in zip(target.stack.shape, target.gathers, strict=True)]
    are_views = all(
        operand.stack.dtype == dtype
        and operand.stack.permute(*order).is_contiguous()
        and all(index is None for index in operand.gathers)
        for operand in operands
    )
    pieces = 1 if are_views else -(-math.prod(lengths) * dtype.itemsize // PART_BYTES)
    for block in _split_dim(operands, 0, lengths[0], pieces):
        more = -(-pieces // max(lengths[0], 1))
        others = [d for d in order if d not in (0, dim)]
        if more <= 1 or not others:
            yield block
            continue
        longest = max(others, key=lengths.__getitem__)
        along = next((d for d in others if lengths[d] >= more), longest)
        yield from _split_dim(block, along, lengths[along], more)


def _split_dim(operands: tuple[Operand, ...], dim: int, length: int, pieces: int) -> Iterator[tuple[Operand, ...]]:
    """At most so many parts of nearly the same length along a dimension."""
    each = max(1, -(-length // max(pieces, 1)))
    for start in range(0, length, each):
        yield tuple(operand.block(dim, start, min(each, length - start)) for operand in operands)


# ---------------------------------------------------------------- as an operator's arguments


def flatten_terms(groups: Sequence[Sequence[Term]]) -> tuple[list[Any], ...]:
    """The terms of all groups as the operator takes them: gathers one for each axis, and how many terms a group has."""
    terms = [term for group in groups for term in group]
    gathers = [index for t in terms for index in t.gathers or (None,) * (t.target.ndim - 1)]
    return (
        [term.target for term in terms],
        [term.source for term in terms],
        [term.axis for term in terms],
        [term.positions for term in terms],
        gathers,
        [len(group) for group in groups],
    )


def unflatten_terms(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    axes: Sequence[int],
    positions: Sequence[Tensor | None],
    gathers: Sequence[Tensor | None],
    counts: Sequence[int],
) -> list[list[Term]]:
    """The inverse of `flatten_terms`."""
    left, terms = iter(gathers), []
    for target, source, axis, place in zip(targets, sources, axes, positions, strict=True):
        own = tuple(next(left) for _ in range(target.ndim - 1))
        terms.append(Term(target, source, axis, place, own if any(index is not None for index in own) else ()))
    following = iter(terms)
    return [[next(following) for _ in range(count)] for count in counts]


def count_flops(targets: list[Any], sources: Any, axes: Any, positions: list[Any], *_: Any, **__: Any) -> int:
    """Of these terms, as shapes: a product and a sum for each unit of one side and each entry of the other."""
    units = (t[axis + 1] if p is None else p[0] for t, axis, p in zip(targets, axes, positions, strict=True))
    return sum(2 * n * math.prod(shape) for n, shape in zip(units, targets, strict=True))
