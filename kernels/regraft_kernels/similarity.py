"""The n x n similarity of one permutation group, summed over steps and tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regraft_kernels.backend import resolve
from regraft_kernels.packing import check_index, check_ranges

PRECISIONS = ("ieee", "tf32x3", "tf32")

BLOCK_BYTES = 8 << 20
"""What must be gathered, cast or reordered is made in blocks of about this size, which are transient."""

SHORT_RUN = 8
"""With fewer elements than this behind a unit, reordering a block is cheaper than a product per run."""

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


def similarity_reference(terms: Sequence[Term]) -> Tensor:
    """The definition of `similarity`: gather, unfold to [units, everything else], multiply, add."""
    n = terms[0].units
    total = torch.zeros((n, n), dtype=_accumulator(terms[0].target), device=terms[0].target.device)
    for term in terms:
        source = term.source
        for axis, index in enumerate(term.gathers):
            if index is not None:
                source = source.index_select(axis + 1, index)
        total += _unfold(term.target, term) @ _unfold(source, term).T
    return total


def _unfold(stack: Tensor, term: Term) -> Tensor:
    """[T, *shape] as [n, multiplicity * T * everything else]."""
    by_position = stack.movedim(term.axis + 1, 0).to(_accumulator(stack))
    if term.positions is not None:
        by_position = by_position[term.positions]
    return by_position.reshape(term.units, -1)


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@dataclass(frozen=True)
class _Operand:
    """A stack and the index vectors that gather from it, one or None for each of its dimensions."""

    stack: Tensor
    gathers: Gathers

    def with_gather(self, dim: int, index: Tensor) -> _Operand:
        return replace(self, gathers=(*self.gathers[:dim], index, *self.gathers[dim + 1 :]))

    def block(self, dim: int, start: int, length: int) -> _Operand:
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


def _similarity_torch(terms: Sequence[Term]) -> Tensor:
    """Term after term: without a copy where the strides allow it, otherwise block after block."""
    n = terms[0].units
    total = torch.zeros((n, n), dtype=_accumulator(terms[0].target), device=terms[0].target.device)
    for term in terms:
        _accumulate_(total, term, *_operands(term))
    return total


def _update_torch_(S: Tensor, term: Term, axis: int, changed: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """S += <target, source gathered by new - source gathered by old> over the changed entries of an axis."""
    target, source = _operands(term)
    _accumulate_(
        S,
        term,
        target.with_gather(axis + 1, changed),
        source.with_gather(axis + 1, new),
        source.with_gather(axis + 1, old),
    )
    return S


def _operands(term: Term) -> tuple[_Operand, _Operand]:
    nothing: Gathers = (None,) * term.target.ndim
    gathers = (None, *term.gathers) if term.gathers else nothing
    return _Operand(term.target, nothing), _Operand(term.source, gathers)


@dataclass(frozen=True)
class _Split:
    """How the dimension of the units splits in two: `sizes`, of which number `units` counts the units."""

    sizes: tuple[int, int]
    units: int


def _accumulate_(total: Tensor, term: Term, *operands: _Operand) -> None:
    """Add <target, source> of one term, or <target, source - minus> of three operands, to `total`."""
    dim = term.axis + 1
    operands, split = _bring_units_together(operands, dim, term)
    target = operands[0].stack
    order = sorted(range(target.ndim), key=lambda d: -target.stride(d))
    place = order.index(dim)
    for block in _blocks(operands, order, dim, total.dtype):
        left, right, *minus = (operand.block(*block).gathered(order, total.dtype) for operand in operands)
        if minus:
            right = right - minus[0]
        left, right = left.unflatten(place, split.sizes), right.unflatten(place, split.sizes)
        _multiply_add_(total, left, right, place + split.units)


def _bring_units_together(
    operands: tuple[_Operand, ...], dim: int, term: Term
) -> tuple[tuple[_Operand, ...], _Split]:
    """Narrow to the positions of the units where they are one run, otherwise gather them."""
    positions = term.positions
    if positions is None:
        return operands, _Split((term.units, 1), 0)
    n, repeats = positions.shape
    flat = positions.flatten()
    start = int(flat.min()) if len(flat) else 0
    run = torch.arange(start, start + len(flat), device=flat.device)
    for split, grid in (
        (_Split((n, repeats), 0), run.view(n, repeats)),
        (_Split((repeats, n), 1), run.view(repeats, n).T),
    ):
        if torch.equal(positions, grid) and all(operand.gathers[dim] is None for operand in operands):
            return tuple(operand.block(dim, start, len(flat)) for operand in operands), split
    gathered = tuple(
        operand.with_gather(dim, flat if operand.gathers[dim] is None else operand.gathers[dim][flat])
        for operand in operands
    )
    return gathered, _Split((n, repeats), 0)


def _blocks(
    operands: tuple[_Operand, ...], order: Sequence[int], dim: int, dtype: torch.dtype
) -> Iterator[tuple[int, int, int]]:
    """(dimension, start, length) of the blocks to work in: all at once unless something must be copied."""
    target = operands[0]
    lengths = [n if g is None else len(g) for n, g in zip(target.stack.shape, target.gathers, strict=True)]
    views = all(
        operand.stack.dtype == dtype
        and operand.stack.permute(*order).is_contiguous()
        and all(index is None for index in operand.gathers)
        for operand in operands
    )
    if views:
        yield 0, 0, lengths[0]
        return
    size = math.prod(lengths) * dtype.itemsize
    along = 0
    if size > BLOCK_BYTES * lengths[0]:  # one step alone is too large: take the longest dimension instead
        along = max((d for d in range(len(lengths)) if d != dim), key=lengths.__getitem__)
    each = max(1, BLOCK_BYTES * lengths[along] // max(size, 1))
    for start in range(0, lengths[along], each):
        yield along, start, min(each, lengths[along] - start)


def _multiply_add_(total: Tensor, left: Tensor, right: Tensor, place: int) -> None:
    """total += unfold(left) @ unfold(right)^T, with the units at dimension `place` of both."""
    n, before, after = len(total), left.shape[:place].numel(), left.shape[place + 1 :].numel()
    left, right = left.reshape(before, n, after), right.reshape(before, n, after)
    if after == 1:
        total.addmm_(left.squeeze(2).T, right.squeeze(2))
    elif before > 1 and after < SHORT_RUN:
        rows = before * after
        total.addmm_(left.mT.reshape(rows, n).T, right.mT.reshape(rows, n))
    else:
        total.addbmm_(left, right.mT)


def similarity(terms: Sequence[Term], *, precision: str = "tf32x3", backend: str = "auto") -> Tensor:
    """S[i, j] = sum over terms and steps of <target unit i, source unit j>, as [n, n].

    Accumulates in float32, and returns it; in float64 where the tensors are float64. `precision` is that of
    float32 products on a GPU: "ieee", "tf32x3" (three tf32 products: nearly float32) or "tf32"; elsewhere
    they are exact float32. Deterministic. Source: Ainsworth et al., Git Re-Basin, section 3 (their sum of
    products over the layers that share a permutation), summed over steps as well.

    Raises ValueError for no terms, for terms of different n, dtype or device, and for shapes, axes, positions
    or index vectors that do not fit.
    """
    return similarity_many([terms], precision=precision, backend=backend)[0]


def similarity_many(
    groups: Sequence[Sequence[Term]], *, precision: str = "tf32x3", backend: str = "auto"
) -> list[Tensor]:
    """`similarity` of several groups (of one colour, or of several pairs of models): one launch on a GPU."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    for terms in groups:
        check_terms(terms)
        resolve(backend, terms[0].target.device)
    return [_similarity_torch(terms) for terms in groups]


def similarity_update_(
    S: Tensor,
    term: Term,
    axis_changed: int,
    old: Tensor,
    new: Tensor,
    *,
    precision: str = "tf32x3",
    backend: str = "auto",
) -> Tensor:
    """Bring S up to date, in place, after the gather of one axis of a term changed from `old` to `new`.

    `axis_changed` (0-based in shape) is another axis than the term's own; `old` and `new` are int64 index
    vectors of its length. The rank-m correction reads only the m entries at which they differ;
    `term.gathers` serves the other axes. Returns S. Each call adds its own rounding error: build S anew now
    and then.

    Raises ValueError as `similarity` does, and for an S of another shape, dtype or device.
    """
    check_terms([term])
    n = term.units
    if S.shape != (n, n) or S.dtype != _accumulator(term.target) or S.device != term.target.device:
        raise ValueError(f"S is {tuple(S.shape)} {S.dtype} on {S.device}, which does not fit the term")
    if not 0 <= axis_changed < term.target.ndim - 1 or axis_changed == term.axis:
        raise ValueError(f"axis_changed must be another axis than the term's {term.axis}, not {axis_changed}")
    length = term.source.shape[axis_changed + 1]
    for what, index in (("old", old), ("new", new)):
        check_index(what, index, length, term.source.device)
    check_ranges([("old", old, length), ("new", new, length)])
    resolve(backend, S.device)
    changed = (old != new).nonzero().squeeze(1)
    if not len(changed):
        return S
    return _update_torch_(S, term, axis_changed, changed, old[changed], new[changed])


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
