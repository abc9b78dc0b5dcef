"""The n x n similarity of one permutation group, summed over steps and tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regraft_kernels.backend import Kernel, interpreting, resolve, triton_dtype
from regraft_kernels.packing import check_index, check_ranges
from regraft_kernels.tiles import dot_choice, family

if TYPE_CHECKING:
    import triton.language as tl

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
    return by_position.flatten(1)


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


@Kernel
def _similarity_kernel(
    programs,  # int64 [programs, 6]: first and last part, n, first row, first column, place in `out`
    parts,  # int64 [parts, 8]: see _Work.add
    rows,  # int64: where the units stand in a stack, in elements
    columns,  # int64: where everything else stands
    out,  # float32: one [n, n] for each group and split
    DTYPE: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """One tile of S, over one split of the sum; the splits are added afterwards, always in the same order."""
    program = programs + tl.program_id(0).to(tl.int64) * 6
    first_part, last_part, n = tl.load(program), tl.load(program + 1), tl.load(program + 2)
    i = tl.load(program + 3) + tl.arange(0, M)
    j = tl.load(program + 4) + tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for number in range(first_part, last_part):
        part = parts + number * 8
        target = tl.load(part).to(tl.pointer_type(DTYPE))
        source = tl.load(part + 1).to(tl.pointer_type(DTYPE))
        target_row = tl.load(rows + tl.load(part + 2) + i, mask=i < n, other=0)
        source_row = tl.load(rows + tl.load(part + 3) + j, mask=j < n, other=0)
        first, last = tl.load(part + 4), tl.load(part + 5)
        to_source = tl.load(part + 6)
        kind = tl.load(part + 7)
        if kind >= 2:
            total = -total
        # Neighbouring threads read neighbouring memory: along the units where these stand innermost.
        if kind % 2 == 1:
            for place in range(first, last, K):
                k = place + tl.arange(0, K)
                here = tl.load(columns + k, mask=k < last, other=0)
                there = tl.load(columns + to_source + k, mask=k < last, other=0)
                ok_left = (k < last)[:, None] & (i < n)[None, :]
                ok_right = (k < last)[:, None] & (j < n)[None, :]
                left = tl.load(target + here[:, None] + target_row[None, :], mask=ok_left, other=0.0)
                right = tl.load(source + there[:, None] + source_row[None, :], mask=ok_right, other=0.0)
                total = tl.dot(tl.trans(left).to(FACTOR), right.to(FACTOR), total, input_precision=PRECISION)
        else:
            for place in range(first, last, K):
                k = place + tl.arange(0, K)
                here = tl.load(columns + k, mask=k < last, other=0)
                there = tl.load(columns + to_source + k, mask=k < last, other=0)
                ok_left = (i < n)[:, None] & (k < last)[None, :]
                ok_right = (j < n)[:, None] & (k < last)[None, :]
                left = tl.load(target + target_row[:, None] + here[None, :], mask=ok_left, other=0.0)
                right = tl.load(source + source_row[:, None] + there[None, :], mask=ok_right, other=0.0)
                total = tl.dot(left.to(FACTOR), tl.trans(right).to(FACTOR), total, input_precision=PRECISION)
        if kind >= 2:
            total = -total
    place = out + tl.load(program + 5) + i.to(tl.int64)[:, None] * n + j[None, :]
    tl.store(place, total, mask=(i < n)[:, None] & (j < n)[None, :])


@dataclass
class _Work:
    """The tables of one launch of `_similarity_kernel`, as they grow term by term."""

    device: torch.device
    parts: list[list[int]] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    columns: list[Tensor] = field(default_factory=list)
    rows_filled: int = 0
    columns_filled: int = 0

    def add(self, term: Term, target: _Operand, source: _Operand, sign: int = 1) -> None:
        """Append one part for each occurrence of the units on the axis: the addresses of target and source,
        the places of their row offsets, the range of the target's column offsets, how far behind these the
        source's lie, and a kind: 1 where units stand innermost, 2 more where the part is subtracted."""
        dim = term.axis + 1
        order = sorted(
            (d for d in range(target.stack.ndim) if d != dim), key=lambda d: -target.stack.stride(d)
        )
        length = 0
        for operand in (target, source):
            columns = _offsets(operand, order, self.device)
            length = len(columns)
            self.columns.append(columns)
        inner = target.stack.stride(dim) == 1 and target.stack.shape[dim] > 1
        occurrences = (
            torch.arange(term.units, device=self.device)[:, None]
            if term.positions is None
            else term.positions
        )
        for positions in occurrences.T:
            for operand in (target, source):
                index = operand.gathers[dim]
                place = positions if index is None else index[positions]
                self.rows.append(place * operand.stack.stride(dim))
            addresses = [target.stack.data_ptr(), source.stack.data_ptr()]
            rows = [self.rows_filled, self.rows_filled + term.units]
            columns = [self.columns_filled, self.columns_filled + length, length]
            self.parts.append([*addresses, *rows, *columns, int(inner) + (2 if sign < 0 else 0)])
            self.rows_filled += 2 * term.units
        self.columns_filled += 2 * length


def _offsets(operand: _Operand, order: Sequence[int], device: torch.device) -> Tensor:
    """Where the entries of the gathered dimensions in `order` stand in the stack, in elements, int64."""
    offsets = torch.zeros(1, dtype=torch.int64, device=device)
    for dim in order:
        index = operand.gathers[dim]
        place = torch.arange(operand.stack.shape[dim], device=device) if index is None else index
        offsets = (offsets[:, None] + place * operand.stack.stride(dim)).flatten()
    return offsets


PROGRAMS = 512
"""So many programs at least, where the sum is long enough, so that they fill a GPU: the sum is split."""

SPLIT = 512
"""No split of the sum is shorter than this."""


def _split(parts: list[list[int]], splits: int) -> list[list[list[int]]]:
    """Cut the sum over all parts into at most `splits` runs of nearly equal length."""
    each = max(1, -(-sum(part[5] - part[4] for part in parts) // splits))
    runs: list[list[list[int]]] = [[]]
    room = each
    for part in parts:
        first, last = part[4], part[5]
        while first < last:
            if room == 0:
                runs.append([])
                room = each
            end = min(last, first + room)
            runs[-1].append([*part[:4], first, end, *part[6:]])
            room -= end - first
            first = end
    return runs


def _launch(groups: Sequence[tuple[int, _Work]], dtype: torch.dtype, precision: str) -> list[Tensor]:
    """Launch the kernel once for all groups (n, work), which share their tables' lists; return their S."""
    device = groups[0][1].device
    tile, asked = dot_choice(family(device), dtype, precision, max(n for n, _ in groups))
    grids = [[(r, c) for r in range(0, n, tile.m) for c in range(0, n, tile.n)] for n, _ in groups]
    wanted = -(-PROGRAMS // max(1, sum(len(grid) for grid in grids)))
    parts: list[list[int]] = []
    programs: list[list[int]] = []
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    counts: list[int] = []
    place = rows_before = columns_before = 0
    for (n, work), grid in zip(groups, grids, strict=True):
        moved = [
            [
                *p[:2],
                p[2] + rows_before,
                p[3] + rows_before,
                p[4] + columns_before,
                p[5] + columns_before,
                *p[6:],
            ]
            for p in work.parts
        ]
        total = sum(p[5] - p[4] for p in moved)
        runs = _split(moved, max(1, min(wanted, total // SPLIT)))
        for run in runs:
            first = len(parts)
            parts += run
            programs += [[first, len(parts), n, row, column, place] for row, column in grid]
            place += n * n
        counts.append(len(runs))
        rows += work.rows
        columns += work.columns
        rows_before += work.rows_filled
        columns_before += work.columns_filled
    out = torch.empty(place, dtype=torch.float32, device=device)
    if programs:
        _similarity_kernel[(len(programs),)](
            torch.tensor(programs, dtype=torch.int64).to(device),
            torch.tensor(parts, dtype=torch.int64).reshape(-1, 8).to(device),
            torch.cat(rows),
            torch.cat(columns),
            out,
            DTYPE=triton_dtype(dtype),
            # Triton's interpreter multiplies the bit patterns of bfloat16; products of it are exact in float32.
            FACTOR=triton_dtype(torch.float32 if interpreting() and dtype == torch.bfloat16 else dtype),
            PRECISION=asked,
            M=tile.m,
            N=tile.n,
            K=tile.k,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    sizes = [count * n * n for count, (n, _) in zip(counts, groups, strict=True)]
    stacks = [
        part.view(count, n, n) for part, count, (n, _) in zip(out.split(sizes), counts, groups, strict=True)
    ]
    return [stack[0] if len(stack) == 1 else stack.sum(0) for stack in stacks]


def _similarity_triton(groups: Sequence[Sequence[Term]], precision: str) -> list[Tensor]:
    works = []
    for terms in groups:
        work = _Work(terms[0].target.device)
        for term in terms:
            work.add(term, *_operands(term))
        works.append((terms[0].units, work))
    return _launch(works, groups[0][0].target.dtype, precision)


def _update_triton_(
    S: Tensor, term: Term, axis: int, changed: Tensor, old: Tensor, new: Tensor, precision: str
) -> Tensor:
    target, source = _operands(term)
    target = target.with_gather(axis + 1, changed)
    work = _Work(S.device)
    work.add(term, target, source.with_gather(axis + 1, new))
    work.add(term, target, source.with_gather(axis + 1, old), sign=-1)
    return S.add_(_launch([(term.units, work)], term.target.dtype, precision)[0])


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


@torch.no_grad()
def similarity_many(
    groups: Sequence[Sequence[Term]], *, precision: str = "tf32x3", backend: str = "auto"
) -> list[Tensor]:
    """`similarity` of several groups (of one colour, or of several pairs of models): one launch on a GPU."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if not groups:
        return []
    for terms in groups:
        check_terms(terms)
    first = groups[0][0].target
    kinds = {(terms[0].target.dtype, terms[0].target.device) for terms in groups}
    if len(kinds) > 1:
        raise ValueError(f"the groups differ in dtype or device: {sorted(map(str, kinds))}")
    if _resolve(backend, first) == "triton":
        return _similarity_triton(groups, precision)
    with _float32_products(first.device, precision):
        return [_similarity_torch(terms) for terms in groups]


@torch.no_grad()
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
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    chosen = _resolve(backend, term.target)
    changed = (old != new).nonzero().squeeze(1)
    if not len(changed):
        return S
    if chosen == "triton":
        return _update_triton_(S, term, axis_changed, changed, old[changed], new[changed], precision)
    with _float32_products(S.device, precision):
        return _update_torch_(S, term, axis_changed, changed, old[changed], new[changed])


def _resolve(backend: str, stack: Tensor) -> str:
    """float64 is torch's: its own product is as fast as a matrix unit allows."""
    if stack.dtype != torch.float64:
        return resolve(backend, stack.device)
    if backend == "triton":
        raise ValueError("backend 'triton' multiplies float32, bfloat16 and float16, not float64")
    resolve(backend, stack.device)
    return "torch"


@contextmanager
def _float32_products(device: torch.device, precision: str) -> Iterator[None]:
    """Torch's products on a GPU in tf32 where that was asked for, and in float32 otherwise."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


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
