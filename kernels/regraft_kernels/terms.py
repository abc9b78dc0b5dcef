"""What similarity sums over: the terms of a group, and the stacks in them with their gathers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regraft_kernels.packing import check_index, check_ranges

Gathers = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Term:
    """One (tensor, axis) of a group: what it adds to the group's similarity.

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

    def gathered(self, order: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The gathered stack, its dimensions in `order`; a view of the stack where there is nothing to do."""
        result = self.stack.permute(*order)
        for place, dim in enumerate(order):
            index = self.gathers[dim]
            if index is not None:
                # On three dimensions, because index_select takes several times as long on more.
                before, after = result.shape[:place], result.shape[place + 1 :]
                flat = result.reshape(before.numel(), result.shape[place], after.numel())
                result = flat.index_select(1, index).view(*before, len(index), *after)
        return result.to(dtype)


def operands_of(term: Term) -> tuple[Operand, Operand]:
    nothing: Gathers = (None,) * term.target.ndim
    gathers = (None, *term.gathers) if term.gathers else nothing
    return Operand(term.target, nothing), Operand(term.source, gathers)


def accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def check_terms(terms: Sequence[Term]) -> None:
    """Raise ValueError unless the terms belong to one group and everything in them fits."""
    if not terms:
        raise ValueError("similarity needs at least one term")
    first = terms[0]
    ranges: list[tuple[str, Tensor, int]] = []
    for number, term in enumerate(terms):
        ranges += _check_term(term, f"term {number}")
        if (term.target.dtype, term.target.device) != (first.target.dtype, first.target.device):
            raise ValueError(
                f"term {number} is {term.target.dtype} on {term.target.device}, "
                f"but term 0 {first.target.dtype} on {first.target.device}"
            )
        if term.units != first.units:
            raise ValueError(f"term {number} has {term.units} units, but term 0 {first.units}")
    check_ranges(ranges)


def _check_term(term: Term, where: str) -> list[tuple[str, Tensor, int]]:
    """Check one term; returns the index vectors whose entries remain to be looked at, with their bounds."""
    target, source = term.target, term.source
    for kind in ("shape", "dtype", "device"):
        if getattr(target, kind) != getattr(source, kind):
            raise ValueError(
                f"{where}: {kind} is {getattr(target, kind)} for the target, "
                f"{getattr(source, kind)} for the source"
            )
    if not target.is_floating_point():
        raise ValueError(f"{where}: tensors must be real and floating, not {target.dtype}")
    shape = target.shape[1:]
    if not 0 <= term.axis < len(shape):
        raise ValueError(f"{where}: axis {term.axis} of tensors with {len(shape)} axes besides the steps")
    ranges = []
    if term.positions is not None:
        if term.positions.ndim != 2:
            raise ValueError(
                f"{where}: positions must be [n, multiplicity], not {tuple(term.positions.shape)}"
            )
        check_index(f"{where}: positions", term.positions.flatten(), None, source.device)
        ranges.append((f"{where}: positions", term.positions, shape[term.axis]))
    if term.gathers and len(term.gathers) != len(shape):
        raise ValueError(f"{where}: {len(term.gathers)} gathers for {len(shape)} axes")
    for axis, index in enumerate(term.gathers):
        if index is not None:
            check_index(f"{where}: gather of axis {axis}", index, shape[axis], source.device)
            ranges.append((f"{where}: gather of axis {axis}", index, shape[axis]))
    return ranges
