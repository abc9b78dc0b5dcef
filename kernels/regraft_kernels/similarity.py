"""The n x n similarity of one permutation group, summed over steps and tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft_kernels.backend import (
    INTERPRETING,
    accumulator,
    tl,
    triton,
    triton_dtype,
    use_device,
    use_float32_products,
)
from regraft_kernels.copies import Copies
from regraft_kernels.indices import check_index, check_ranges
from regraft_kernels.launch import DotTile, choose_dot, device_family, resolve_products
from regraft_kernels.memory import Scratch, upload_tables
from regraft_kernels.operators import choose_route, define, is_readable, is_transformed
from regraft_kernels.packing import Tensors
from regraft_kernels.terms import (
    Operand,
    Runs,
    Term,
    bring_units_together,
    check_entries,
    check_terms,
    count_flops,
    flatten_terms,
    fold,
    operands_of,
    split_to_parts,
    unflatten_terms,
    unfold,
)

PRECISIONS = ("ieee", "tf32x3", "tf32")
SIDES = ("target", "source")

SHORT_RUN = 8
"""With fewer elements than this behind a unit, reordering a block is cheaper than a product per run."""


SMALL_TERM = 1 << 16
"""Up to so many elements a copy takes less time than to find out how to do without."""


def similarity_reference(terms: Sequence[Term]) -> Tensor:
    """The definition of `similarity`: gather, unfold to [units, everything else], multiply, add."""
    n = terms[0].units
    total = torch.zeros((n, n), dtype=accumulator(terms[0].target.dtype), device=terms[0].target.device)
    for term in terms:
        left, right = (unfold(operand, term) for operand in operands_of(term))
        total = total + left @ right.T
    return total


# ---------------------------------------------------------------- torch: products of views where the strides allow it


def _similarity_torch(terms: Sequence[Term]) -> Tensor:
    """Term after term: without a copy where the strides allow it, otherwise block after block."""
    n = terms[0].units
    total = torch.zeros((n, n), dtype=accumulator(terms[0].target.dtype), device=terms[0].target.device)
    for term in terms:
        target, source = operands_of(term)
        if term.target.numel() <= SMALL_TERM:
            total.addmm_(unfold(target, term), unfold(source, term).T)
        else:
            _accumulate_(total, term, target, source)
    return total


def _update_torch_(S: Tensor, term: Term, axis: int, changed: Tensor, old: Tensor, new: Tensor) -> Tensor:
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


def _accumulate_(total: Tensor, term: Term, *operands: Operand) -> None:
    """Add <target, source> of one term, or <target, source - minus> of three operands, to `total`."""
    dim = term.axis + 1
    operands, split = bring_units_together(operands, dim, term)
    target = operands[0].stack
    order = sorted(range(target.ndim), key=lambda d: -target.stride()[d])
    place = order.index(dim)
    scratches = [Scratch() for _ in operands]
    for block in split_to_parts(operands, order, dim, total.dtype):
        left, right, *minus = (
            operand.gather(order, total.dtype, scratch) for operand, scratch in zip(block, scratches, strict=True)
        )
        if minus:
            right = right - minus[0]
        left, right = left.unflatten(place, split.sizes), right.unflatten(place, split.sizes)
        _multiply_add_(total, left, right, place + split.units)


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


# ---------------------------------------------------------------- Triton

# The columns of `programs`: one row for each tile of S and split of the sum. Places count elements.
FIRST, LAST, UNITS, PITCH, ROW, COLUMN, PLACE, PROGRAM_COLUMNS = map(tl.constexpr, range(8))
# The columns of `parts`: one row for each stretch of the sum whose entries stand at regular distances.
# And where its units stand: addresses of int64 vectors, 0 for "unit u at u", their strides; distances of two units.
TARGET, SOURCE, STEPS, ROOM, RUN, TARGET_SKIP, SOURCE_SKIP = map(tl.constexpr, range(7))
POSITIONS, POSITIONS_STRIDE, GATHER, GATHER_STRIDE, TARGET_PITCH, SOURCE_PITCH, PART_COLUMNS = map(
    tl.constexpr, range(7, 14)
)


@triton.jit
def _look_up(address, stride, places, inside):  # type: ignore[no-untyped-def]
    """The entries of a vector at `places`; these themselves where there is no vector."""
    vector = address.to(tl.pointer_type(tl.int64))
    looked_up = places * 0 + address != 0
    entries = tl.load(vector + places * stride, mask=inside & looked_up, other=0)
    return tl.where(looked_up, entries, places)


@triton.jit
def _similarity_kernel(  # type: ignore[no-untyped-def]
    programs,  # int64 [programs, PROGRAM_COLUMNS]
    parts,  # int64 [parts, PART_COLUMNS]
    out,  # float32: [n, pitch] for each group and split
    DTYPE: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """One tile of S over one split of the sum; the splits are added afterwards, always in the same order.

    Everything but the units is contiguous in runs, and begins at multiples of 16 bytes: K entries of a run a step.
    """
    ALIGNED: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    program = programs + tl.program_id(0).to(tl.int64) * PROGRAM_COLUMNS
    n = tl.load(program + UNITS).to(tl.int32)
    pitch = tl.multiple_of(tl.load(program + PITCH).to(tl.int32), 4)
    i = tl.load(program + ROW).to(tl.int32) + tl.arange(0, M)
    j = tl.multiple_of(tl.load(program + COLUMN).to(tl.int32), 4) + tl.arange(0, N)
    k = tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for number in range(tl.load(program + FIRST), tl.load(program + LAST)):
        part = parts + number * PART_COLUMNS
        target = tl.multiple_of(tl.load(part + TARGET).to(tl.pointer_type(DTYPE)), 16)
        source = tl.multiple_of(tl.load(part + SOURCE).to(tl.pointer_type(DTYPE)), 16)
        # Past the last unit the first is read once more; what comes of it is not stored.
        positions = tl.load(part + POSITIONS)
        stride = tl.load(part + POSITIONS_STRIDE)
        target_row = _look_up(positions, stride, tl.where(i < n, i, 0).to(tl.int64), i < n)
        source_row = _look_up(positions, stride, tl.where(j < n, j, 0).to(tl.int64), j < n)
        source_row = _look_up(tl.load(part + GATHER), tl.load(part + GATHER_STRIDE), source_row, j < n)
        target_row *= tl.load(part + TARGET_PITCH)
        source_row *= tl.load(part + SOURCE_PITCH)
        target_block = target + tl.multiple_of(target_row, ALIGNED)[:, None] + k[None, :]
        source_block = source + tl.multiple_of(source_row, ALIGNED)[:, None] + k[None, :]
        run = tl.multiple_of(tl.load(part + RUN).to(tl.int32), ALIGNED)
        room = tl.multiple_of(tl.load(part + ROOM).to(tl.int32), ALIGNED)
        target_skip = tl.multiple_of(tl.load(part + TARGET_SKIP), ALIGNED)
        source_skip = tl.multiple_of(tl.load(part + SOURCE_SKIP), ALIGNED)
        here = tl.zeros((), tl.int64)
        there = tl.zeros((), tl.int64)
        for _ in range(tl.load(part + STEPS).to(tl.int32)):
            inside = (k < room)[None, :]
            left = tl.load(target_block + here, mask=inside, other=0.0)
            right = tl.load(source_block + there, mask=inside, other=0.0)
            total = tl.dot(left.to(FACTOR), tl.trans(right).to(FACTOR), total, input_precision=PRECISION)
            room -= K
            ended = room <= 0
            here += K + tl.where(ended, target_skip, 0)
            there += K + tl.where(ended, source_skip, 0)
            room = tl.where(ended, run, room)
    place = out + tl.multiple_of(tl.load(program + PLACE), 4) + i.to(tl.int64)[:, None] * pitch + j[None, :]
    tl.store(place, total, mask=(i < n)[:, None] & (j < pitch)[None, :])


@dataclass
class _Work:
    """The tables of one group in a launch of `_similarity_kernel`, as they grow term by term."""

    units: int
    copies: Copies
    parts: list[tuple[Runs, Runs, list[int]]] = field(default_factory=list)  # with where their units stand

    def add(self, term: Term, target: Operand, source: Operand) -> None:
        """One part for each occurrence of the units on the axis."""
        dim = term.axis + 1
        if not math.prod(n if g is None else len(g) for n, g in zip(source.stack.shape, source.gathers, strict=True)):
            return
        runs = Runs.of(target, source, dim, self.copies)
        pitches = [side.pitch for side in runs]
        gather = _vector(source.gathers[dim])
        columns = (None,) if term.positions is None else term.positions.T
        self.parts += [(*runs, [*_vector(column), *gather, *pitches]) for column in columns]

    def splits(self, count: int, k: int) -> list[list[list[int]]]:
        """The rows of `parts`, k entries a step, in at most `count` lists of nearly as many steps."""
        steps = [target.count * -(-target.length // k) for target, *_ in self.parts]
        each = max(1, -(-sum(steps) // count), SPLIT // k)
        splits: list[list[list[int]]] = [[]]
        room = each
        for part, length in zip(self.parts, steps, strict=True):
            first = 0
            while first < length:
                if room == 0:
                    splits.append([])
                    room = each
                taken = min(length - first, room)
                splits[-1].append(_part(part, first, taken, k))
                room -= taken
                first += taken
        return splits


def _vector(vector: Tensor | None) -> tuple[int, int]:
    """Address and stride of an index vector, as the kernel reads it."""
    return (0, 0) if vector is None else (vector.data_ptr(), vector.stride(0))


def _part(occurrence: tuple[Runs, Runs, list[int]], first: int, steps: int, k: int) -> list[int]:
    """A row of `parts`: so many steps from the first on."""
    target, source, units = occurrence
    each = -(-target.length // k)
    run, step = divmod(first, each)
    sides = (target, source)
    addresses = [s.stack.data_ptr() + (run * s.distance + step * k) * s.stack.element_size() for s in sides]
    skips = [s.distance - each * k for s in sides]
    return [*addresses, steps, target.length - step * k, target.length, *skips, *units]


PROGRAMS = 264
"""So many programs fill a GPU (two for each multiprocessor)."""

SPLIT = 512
"""No split of the sum is shorter than this."""


def _count_splits(tiles: int) -> int:
    """In how many parts the sum is computed: those that take the fewest rounds of PROGRAMS for their length."""
    counts = range(1, -(-PROGRAMS // max(tiles, 1)) + 1)
    return min(counts, key=lambda count: -(-tiles * count // PROGRAMS) / count)


def _launch(groups: Sequence[_Work], like: Tensor, precision: str) -> list[Tensor]:
    """Launch the kernel once for all groups; return their S, the splits of each added in order."""
    units = max(work.units for work in groups)
    tile, precision = choose_dot(device_family(like.device), like.dtype, precision, units)
    grids = [[(r, c) for r in range(0, w.units, tile.m) for c in range(0, w.units, tile.n)] for w in groups]
    count = _count_splits(sum(map(len, grids)))
    programs: list[list[int]] = []
    parts: list[list[int]] = []
    shapes: list[tuple[int, int, int]] = []
    place = 0
    for work, grid in zip(groups, grids, strict=True):
        n, pitch = work.units, -(-work.units // 4) * 4
        runs = work.splits(count, tile.k)
        for run in runs:
            span = [len(parts), len(parts) + len(run)]
            programs += [[*span, n, pitch, row, column, place] for row, column in grid]
            parts += run
            place += n * pitch
        shapes.append((len(runs), n, pitch))
    out = torch.empty(place, dtype=torch.float32, device=like.device)
    if programs:
        copies = groups[0].copies
        filled = [np.array(programs, np.int64), np.array(parts, np.int64).reshape(-1, PART_COLUMNS.value)]
        tables = upload_tables([*filled, *copies.tables()], like.device)
        with use_device(like.device):
            copies.launch(tables[2:])
        _run(tables[:2], out, like.dtype, tile, precision)
    stacks = [part.view(s) for part, s in zip(out.split([math.prod(s) for s in shapes]), shapes, strict=True)]
    # Also where there is one split, so that no two results share memory, which PyTorch allows no operator.
    return [stack[:, :, : stack.shape[1]].sum(0) for stack in stacks]


def _run(tables: Sequence[Tensor], out: Tensor, dtype: torch.dtype, tile: DotTile, precision: str) -> None:
    with use_device(out.device):
        _similarity_kernel[(len(tables[0]),)](
            *tables,
            out,
            DTYPE=triton_dtype(dtype),
            # Triton's interpreter multiplies the bit patterns of bfloat16; products of it are exact in float32.
            FACTOR=triton_dtype(torch.float32 if INTERPRETING and dtype == torch.bfloat16 else dtype),
            PRECISION=precision,
            M=tile.m,
            N=tile.n,
            K=tile.k,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def _similarity_triton(groups: Sequence[Sequence[Term]], precision: str) -> list[Tensor]:
    copies = Copies()
    works = [_Work(terms[0].units, copies) for terms in groups]
    for work, terms in zip(works, groups, strict=True):
        for term in terms:
            work.add(term, *operands_of(term))
    return _launch(works, groups[0][0].target, precision)


def _update_triton_(
    S: Tensor, term: Term, axis: int, changed: Tensor, old: Tensor, new: Tensor, precision: str
) -> Tensor:
    target, source = operands_of(term)
    there = target.stack.index_select(axis + 1, changed)
    work = _Work(term.units, Copies())
    for taken, index in ((there, new), (-there, old)):
        work.add(term, Operand(taken, target.gathers), source.with_gather(axis + 1, index))
    return S.add_(_launch([work], term.target, precision)[0])


# ---------------------------------------------------------------- the functions


def similarity(terms: Sequence[Term], *, precision: str = "tf32x3", backend: str = "auto") -> Tensor:
    """S[i, j] = sum over terms and steps of <target unit i, source unit j>, as [n, n].

    Accumulates in float32, and returns it; in float64 where the tensors are float64. `precision` is that of
    float32 products on a GPU: "ieee", "tf32x3" (three tf32 products: nearly float32) or "tf32"; elsewhere
    they are exact float32. Deterministic. An operator of PyTorch (`torch.ops.regraft.similarity`): it compiles,
    exports, and has gradients with respect to both sides. Source: Ainsworth et al., Git Re-Basin, section 3 (their
    sum of products over the layers that share a permutation), summed over steps as well.

    Raises ValueError for no terms, for terms of different n, dtype or device, for wrapper subclasses such as DTensor,
    and for shapes, axes, positions or index vectors that do not fit.
    """
    return similarity_many([terms], precision=precision, backend=backend)[0]


def similarity_many(
    groups: Sequence[Sequence[Term]], *, precision: str = "tf32x3", backend: str = "auto"
) -> list[Tensor]:
    """`similarity` of several groups (of one colour, or of several pairs of models): one launch on a GPU."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if not groups:
        return []
    route = choose_route(_stacks_of([term for terms in groups for term in terms]))
    for terms in groups:
        check_terms(terms)
    first = groups[0][0].target
    for terms in groups[1:]:
        if (terms[0].target.dtype, terms[0].target.device) != (first.dtype, first.device):
            other = f"{terms[0].target.dtype} on {terms[0].target.device}"
            raise ValueError(f"the groups differ: one is {first.dtype} on {first.device}, another {other}")
    chosen = resolve_products(backend, first)
    if route == "launch":
        return _run_similarity(groups, precision, chosen)
    flat = flatten_terms(groups)
    if route == "definition":
        vectors = [vector for vector in (*flat[3], *flat[4]) if vector is not None]
        if is_readable([dict(zip(map(str, range(len(vectors))), vectors, strict=True))]):
            check_entries([term for terms in groups for term in terms])
        return [similarity_reference(terms) for terms in groups]
    return list(torch.ops.regraft.similarity(*flat, precision, backend))


def _stacks_of(terms: Sequence[Term], **others: Tensor) -> list[Tensors]:
    return [*({f"{side} of term {n}": getattr(t, side) for n, t in enumerate(terms)} for side in SIDES), others]


@torch.no_grad()
def _run_similarity(groups: Sequence[Sequence[Term]], precision: str, chosen: str) -> list[Tensor]:
    check_entries([term for terms in groups for term in terms])
    if chosen == "triton":
        return _similarity_triton(groups, precision)
    with use_float32_products(groups[0][0].target.device, precision):
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

    Raises ValueError as `similarity` does, for an S of another shape, dtype or device, and for tensors without values
    or inside torch.func's transformations, where S must be built anew. torch.compile does not compile it.
    """
    if torch.compiler.is_compiling():  # torch.compiler.disable would import the compiler with this package
        torch._dynamo.graph_break("similarity_update_ works in place and reads its index vectors")
    elif is_transformed() or not is_readable(_stacks_of([term], S=S)):
        raise ValueError("similarity_update_ has no derivative and reads values: build S anew by similarity")
    check_terms([term])
    check_entries([term])
    n = term.units
    if S.shape != (n, n) or S.dtype != accumulator(term.target.dtype) or S.device != term.target.device:
        raise ValueError(f"S is {tuple(S.shape)} {S.dtype} on {S.device}, which does not fit the term")
    if not 0 <= axis_changed < term.target.ndim - 1 or axis_changed == term.axis:
        raise ValueError(f"axis_changed must be another axis than the term's {term.axis}, not {axis_changed}")
    length = term.source.shape[axis_changed + 1]
    for what, index in (("old", old), ("new", new)):
        check_index(what, index, (length,), term.source.device)
    check_ranges([("old", old, length), ("new", new, length)])
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    chosen = resolve_products(backend, term.target)
    changed = (old != new).nonzero().squeeze(1)
    if not len(changed):
        return S
    if chosen == "triton":
        return _update_triton_(S, term, axis_changed, changed, old[changed], new[changed], precision)
    with use_float32_products(S.device, precision):
        return _update_torch_(S, term, axis_changed, changed, old[changed], new[changed])


# ---------------------------------------------------------------- the operator


def _operator(*arguments: Any) -> list[Tensor]:
    *flat, precision, backend = arguments
    groups = unflatten_terms(*flat)
    return _run_similarity(groups, precision, resolve_products(backend, groups[0][0].target))


def _fake(*arguments: Any) -> list[Tensor]:
    *flat, _, _ = arguments
    firsts = [terms[0] for terms in unflatten_terms(*flat)]
    return [t.target.new_empty((t.units, t.units), dtype=accumulator(t.target.dtype)) for t in firsts]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    targets, sources, ctx.axes, positions, gathers, ctx.counts, *_ = inputs
    ctx.lengths = [len(part) for part in (targets, sources, positions, gathers)]
    ctx.save_for_backward(*targets, *sources, *positions, *gathers)


def _backward(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    """S = A B^T, so that dA = dS B and dB = dS^T A; then both go back to where they were gathered from."""
    saved = iter(ctx.saved_tensors)
    targets, sources, positions, gathers = ([next(saved) for _ in range(n)] for n in ctx.lengths)
    groups = unflatten_terms(targets, sources, ctx.axes, positions, gathers, ctx.counts)
    to_targets: list[Tensor | None] = []
    to_sources: list[Tensor | None] = []
    wanted = zip(*ctx.needs_input_grad[:2], strict=True)
    for terms, gradient in zip(groups, gradients, strict=True):
        for term in terms:
            target, source = operands_of(term)
            left, right = next(wanted)
            to_targets.append(fold(gradient @ unfold(source, term), target, term) if left else None)
            to_sources.append(fold(gradient.T @ unfold(target, term), source, term) if right else None)
    return to_targets, to_sources, None, None, None, None, None, None


define(
    "similarity(Tensor[] targets, Tensor[] sources, int[] axes, Tensor?[] positions, Tensor?[] gathers, int[] counts, "
    "str precision, str backend) -> Tensor[]",
    _operator,
    fake=_fake,
    save=_save,
    backward=_backward,
    flops=count_flops,
)
