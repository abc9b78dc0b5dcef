"""similarity without Triton: products of views where the strides allow it, of transient blocks otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft_kernels.terms import Buffer, Operand, Term, accumulator, operands_of

BLOCK_BYTES = 10 << 20
"""What must be gathered, cast or reordered is made in blocks of at most about this size, which are transient: one step
of a 3x3 convolution of 512 channels in float32."""

SHORT_RUN = 8
"""With fewer elements than this behind a unit, reordering a block is cheaper than a product per run."""


def similarity_torch(terms: Sequence[Term]) -> Tensor:
    """Term after term: without a copy where the strides allow it, otherwise block after block."""
    n = terms[0].units
    total = torch.zeros((n, n), dtype=accumulator(terms[0].target), device=terms[0].target.device)
    for term in terms:
        _accumulate_(total, term, *operands_of(term))
    return total


def update_torch_(S: Tensor, term: Term, axis: int, changed: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """S += <target, source gathered by new - source gathered by old> over the changed entries of an axis."""
    target, source = operands_of(term)
    _accumulate_(
        S,
        term,
        target.with_gather(axis + 1, changed),
        source.with_gather(axis + 1, new),
        source.with_gather(axis + 1, old),
    )
    return S


@dataclass(frozen=True)
class _Split:
    """How the dimension of the units splits in two: `sizes`, of which number `units` counts the units."""

    sizes: tuple[int, int]
    units: int


def _accumulate_(total: Tensor, term: Term, *operands: Operand) -> None:
    """Add <target, source> of one term, or <target, source - minus> of three operands, to `total`."""
    dim = term.axis + 1
    operands, split = _bring_units_together(operands, dim, term)
    target = operands[0].stack
    order = sorted(range(target.ndim), key=lambda d: -target.stride()[d])
    place = order.index(dim)
    buffers = [Buffer() for _ in operands]
    for block in _blocks(operands, order, dim, total.dtype):
        left, right, *minus = (
            operand.gathered(order, total.dtype, buffer)
            for operand, buffer in zip(block, buffers, strict=True)
        )
        if minus:
            right = right - minus[0]
        left, right = left.unflatten(place, split.sizes), right.unflatten(place, split.sizes)
        _multiply_add_(total, left, right, place + split.units)


def _bring_units_together(
    operands: tuple[Operand, ...], dim: int, term: Term
) -> tuple[tuple[Operand, ...], _Split]:
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
        operand.with_gather(dim, flat if (index := operand.gathers[dim]) is None else index[flat])
        for operand in operands
    )
    return gathered, _Split((n, repeats), 0)


def _blocks(
    operands: tuple[Operand, ...], order: Sequence[int], dim: int, dtype: torch.dtype
) -> Iterator[tuple[Operand, ...]]:
    """The operands in parts to work on one after the other: whole unless something must be copied.

    Steps are cut first. Where one alone is too large, it is cut along what stands outermost in it and is long enough,
    so that contiguous runs stay long.
    """
    target = operands[0]
    lengths = [n if g is None else len(g) for n, g in zip(target.stack.shape, target.gathers, strict=True)]
    views = all(
        operand.stack.dtype == dtype
        and operand.stack.permute(*order).is_contiguous()
        and all(index is None for index in operand.gathers)
        for operand in operands
    )
    pieces = 1 if views else -(-math.prod(lengths) * dtype.itemsize // BLOCK_BYTES)
    for block in _cut(operands, 0, lengths[0], pieces):
        more = -(-pieces // max(lengths[0], 1))
        others = [d for d in order if d not in (0, dim)]
        if more <= 1 or not others:
            yield block
            continue
        longest = max(others, key=lengths.__getitem__)
        along = next((d for d in others if lengths[d] >= more), longest)
        yield from _cut(block, along, lengths[along], more)


def _cut(operands: tuple[Operand, ...], dim: int, length: int, pieces: int) -> Iterator[tuple[Operand, ...]]:
    """At most so many parts of nearly the same length along a dimension."""
    each = max(1, -(-length // max(pieces, 1)))
    for start in range(0, length, each):
        yield tuple(operand.block(dim, start, min(each, length - start)) for operand in operands)


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
