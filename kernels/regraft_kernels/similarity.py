"""The n x n similarity of one permutation group, summed over steps and tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regraft_kernels.backend import INTERPRETING, resolve, tl, triton, triton_dtype
from regraft_kernels.cases import BY_HAND, OURS, PRODUCT, Case, Variant, dtype_name, each_family
from regraft_kernels.packing import check_index, check_ranges
from regraft_kernels.similarity_torch import similarity_torch, update_torch_
from regraft_kernels.terms import Operand, Term, accumulator, check_terms, operands_of
from regraft_kernels.tiles import FAMILIES, DotTile, dot_choice, family

PRECISIONS = ("ieee", "tf32x3", "tf32")


def similarity_reference(terms: Sequence[Term]) -> Tensor:
    """The definition of `similarity`: gather, unfold to [units, everything else], multiply, add."""
    n = terms[0].units
    total = torch.zeros((n, n), dtype=accumulator(terms[0].target), device=terms[0].target.device)
    for term in terms:
        source = term.source
        for axis, index in enumerate(term.gathers):
            if index is not None:
                source = source.index_select(axis + 1, index)
        total += _unfold(term.target, term) @ _unfold(source, term).T
    return total


def _unfold(stack: Tensor, term: Term) -> Tensor:
    """[T, *shape] as [n, multiplicity * T * everything else]."""
    by_position = stack.movedim(term.axis + 1, 0).to(accumulator(stack))
    if term.positions is not None:
        by_position = by_position[term.positions]
    return by_position.flatten(1)


@triton.jit
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

    def add(self, term: Term, target: Operand, source: Operand, sign: int = 1) -> None:
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


def _offsets(operand: Operand, order: Sequence[int], device: torch.device) -> Tensor:
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


def _lay_out(
    groups: Sequence[tuple[int, _Work]], tile: DotTile
) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """The programs and parts of one launch for all groups, and in how many splits each group's sum is."""
    grids = [[(r, c) for r in range(0, n, tile.m) for c in range(0, n, tile.n)] for n, _ in groups]
    wanted = -(-PROGRAMS // max(1, sum(len(grid) for grid in grids)))
    programs: list[list[int]] = []
    parts: list[list[int]] = []
    splits: list[int] = []
    place = rows_before = columns_before = 0
    for (n, work), grid in zip(groups, grids, strict=True):
        shift = [0, 0, rows_before, rows_before, columns_before, columns_before, 0, 0]
        moved = [[a + b for a, b in zip(part, shift, strict=True)] for part in work.parts]
        length = sum(part[5] - part[4] for part in moved)
        runs = _split(moved, max(1, min(wanted, length // SPLIT)))
        for run in runs:
            span = [len(parts), len(parts) + len(run)]
            programs += [[*span, n, row, column, place] for row, column in grid]
            parts += run
            place += n * n
        splits.append(len(runs))
        rows_before += work.rows_filled
        columns_before += work.columns_filled
    return programs, parts, splits


def _launch(groups: Sequence[tuple[int, _Work]], dtype: torch.dtype, precision: str) -> list[Tensor]:
    """Launch the kernel once for all groups (n, work); return their S, the splits of each added in order."""
    device = groups[0][1].device
    tile, asked = dot_choice(family(device), dtype, precision, max(n for n, _ in groups))
    programs, parts, splits = _lay_out(groups, tile)
    shapes = [(count, n, n) for count, (n, _) in zip(splits, groups, strict=True)]
    sizes = [math.prod(shape) for shape in shapes]
    out = torch.empty(sum(sizes), dtype=torch.float32, device=device)
    if programs:
        _similarity_kernel[(len(programs),)](
            torch.tensor(programs, dtype=torch.int64).to(device),
            torch.tensor(parts, dtype=torch.int64).reshape(-1, 8).to(device),
            torch.cat([rows for _, work in groups for rows in work.rows]),
            torch.cat([columns for _, work in groups for columns in work.columns]),
            out,
            DTYPE=triton_dtype(dtype),
            # Triton's interpreter multiplies the bit patterns of bfloat16; products of it are exact in float32.
            FACTOR=triton_dtype(torch.float32 if INTERPRETING and dtype == torch.bfloat16 else dtype),
            PRECISION=asked,
            M=tile.m,
            N=tile.n,
            K=tile.k,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    stacks = [part.view(shape) for part, shape in zip(out.split(sizes), shapes, strict=True)]
    return [stack[0] if len(stack) == 1 else stack.sum(0) for stack in stacks]


def _similarity_triton(groups: Sequence[Sequence[Term]], precision: str) -> list[Tensor]:
    works = []
    for terms in groups:
        work = _Work(terms[0].target.device)
        for term in terms:
            work.add(term, *operands_of(term))
        works.append((terms[0].units, work))
    return _launch(works, groups[0][0].target.dtype, precision)


def _update_triton_(
    S: Tensor, term: Term, axis: int, changed: Tensor, old: Tensor, new: Tensor, precision: str
) -> Tensor:
    target, source = operands_of(term)
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
        return [similarity_torch(terms) for terms in groups]


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
    if S.shape != (n, n) or S.dtype != accumulator(term.target) or S.device != term.target.device:
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
        return update_torch_(S, term, axis_changed, changed, old[changed], new[changed])


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


# ---------------------------------------------------------------- what to compile, what to time


def _variants(target: str) -> list[Variant]:
    tiles = FAMILIES[target]
    kinds = [(torch.float32, p) for p in PRECISIONS if p not in tiles.substitutes]
    kinds += [(torch.bfloat16, "half"), (torch.float16, "half")]
    return [_variant(target, *kind, tile) for kind in kinds for tile in dict.fromkeys(tiles.dot[kind[1]])]


def _variant(target: str, dtype: torch.dtype, precision: str, tile: DotTile) -> Variant:
    signature = {"programs": "*i64", "parts": "*i64", "rows": "*i64", "columns": "*i64", "out": "*fp32"}
    constants = {
        "DTYPE": dtype,
        "FACTOR": dtype,
        "PRECISION": "ieee" if precision == "half" else precision,
        "M": tile.m,
        "N": tile.n,
        "K": tile.k,
    }
    kind = dtype_name(dtype) if precision == "half" else f"{dtype_name(dtype)} {precision}"
    label = f"similarity {kind} {tile.m}x{tile.n}x{tile.k}"
    return Variant(_similarity_kernel, target, label, signature, constants, tile.warps, tile.stages)


def _case(steps: int, rows: int, columns: int, area: int, axis: int) -> Case:
    """One term, the other axis gathered. Ours is given channels last, the user's way PyTorch's own order."""
    n = (rows, columns)[axis]

    def make(device: torch.device) -> dict[str, Callable[[], object]]:
        g = torch.Generator(device).manual_seed(0)
        stacks = torch.randn(2, steps, rows, area, columns, generator=g, device=device).movedim(-1, 3)
        target, source = stacks
        plain = target.contiguous(), source.contiguous()
        index = torch.randperm((rows, columns)[1 - axis], generator=g, device=device)
        left, right = torch.randn(2, n, target.numel() // n, generator=g, device=device)
        term = Term(target, source, axis, None, (None, index, None) if axis == 0 else (index, None, None))

        def by_hand() -> Tensor:
            moved = plain[1].index_select(2 - axis, index)
            rows = [stack.movedim(axis + 1, 0).reshape(n, -1) for stack in (plain[0], moved)]
            return rows[0] @ rows[1].T

        return {OURS: lambda: similarity([term]), BY_HAND: by_hand, PRODUCT: lambda: left @ right.T}

    name = f"similarity, [{steps}, {rows}, {columns}, {area}], axis {axis}"
    return Case(name, make, (OURS, BY_HAND, PRODUCT), flop=2 * n * steps * rows * columns * area)


def _update_case(n: int, changed: int) -> Case:
    """Some of a neighbour's units changed, against building the term again."""

    def make(device: torch.device) -> dict[str, Callable[[], object]]:
        g = torch.Generator(device).manual_seed(0)
        target, source = torch.randn(2, 1, n, n, generator=g, device=device)
        old = torch.randperm(n, generator=g, device=device)
        new = old.clone()
        new[:changed] = old[:changed].roll(1)
        total, term = torch.zeros(n, n, device=device), Term(target, source, 0)
        anew = Term(target, source, 0, None, (None, new))
        return {
            OURS: lambda: similarity_update_(total, term, 1, old, new),
            BY_HAND: lambda: similarity([anew]),
        }

    return Case(f"similarity_update_, n = {n}, {changed} changed", make, (OURS, BY_HAND))


VARIANTS = each_family(_variants)
CASES = (
    _case(10, 256, 256, 9, 0),
    _case(10, 256, 256, 9, 1),
    _case(10, 512, 512, 1, 0),
    _case(10, 512, 512, 1, 1),
    _case(10, 512, 512, 9, 0),
    _update_case(1024, 50),
)
