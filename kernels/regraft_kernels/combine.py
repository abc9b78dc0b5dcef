"""sum_i c_ki theta_i, for many rows k of coefficients: the fusion grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft_kernels.backend import accumulator, resolve, tl, triton, triton_dtype
from regraft_kernels.launch import (
    RUN_TIME,
    FlatTile,
    device_family,
    launch_bytes,
    tensor_pointer,
    vector_pointer,
)
from regraft_kernels.memory import (
    ALIGNMENT,
    as_in_memory,
    group_small,
    of_one_dtype,
    row_blocks,
    stack_named,
    unstack_into,
    upload_numbers,
    upload_words,
)
from regraft_kernels.operators import by_number, choose_route, define
from regraft_kernels.packing import (
    FIELDS,
    S_SIZE,
    T_COLUMNS,
    T_SEGMENT,
    TILE_FIELDS,
    Layout,
    MoveKind,
    Packing,
    Piece,
    Tensors,
    allocate,
    check_addable,
    lay_out,
)
from regraft_kernels.plans import Plan, Step, check_bindable, finish_binding

SMALL_SUM = 1 << 14
"""Up to so many elements, the number of calls costs more than the passes over memory."""


def combine_reference(sources: Sequence[Tensors], coefficients: Tensor) -> dict[str, Tensor]:
    """The definition of `combine`: scale and add, source by source."""
    out = {}
    for name, first in sources[0].items():
        if not first.is_floating_point():
            out[name] = first.repeat(len(coefficients), *(1,) * first.ndim)
            continue
        wide = accumulator(first.dtype)
        total = torch.zeros((len(coefficients), *first.shape), dtype=wide, device=first.device)
        for source, column in zip(sources, coefficients.to(first.device, wide).T, strict=True):
            total = total + column.reshape(len(column), *(1,) * first.ndim) * source[name].to(wide)
        out[name] = total.to(first.dtype)
    return out


def _combine_torch(sources: Sequence[Tensors], table: Sequence[Sequence[float]], out: Tensors) -> None:
    """Block by block, so that each source is read from memory once for all K results."""
    stacked = set()
    for names in group_small((name, t.numel(), t.shape) for name, t in sources[0].items()):
        if of_one_dtype(sources[0], names):
            stacks = [stack_named(source, names) for source in sources]
            sums = stacks[0].new_empty((len(table), *stacks[0].shape))
            _weighted_sums(stacks, table, sums)
            unstack_into(out, names, sums.transpose(0, 1))
            stacked.update(names)
    for name, first in sources[0].items():
        if name in stacked:
            continue
        tensors, results = [source[name] for source in sources], out[name]
        if first.numel() <= SMALL_SUM or (len(table) == 1 and _one_pass(table[0])):
            _weighted_sums(tensors, table, results)
            continue
        flat, results = [tensor.reshape(-1) for tensor in tensors], results.view(len(table), -1)
        for block in row_blocks(flat[0]) if len(table) > 1 else [slice(None)]:
            _weighted_sums([tensor[block] for tensor in flat], table, results[:, block])


def _weighted_sums(parts: Sequence[Tensor], table: Sequence[Sequence[float]], out: Tensor) -> None:
    """out[k] = sum_i table[k][i] * parts[i], in float32 or float64."""
    narrow = parts[0].element_size() < 4
    if narrow:
        parts = [part.float() for part in parts]
    for k, row in enumerate(table):
        if narrow:
            out[k] = _weighted_sum(parts, row, torch.empty_like(parts[0]))
        else:
            _weighted_sum(parts, row, out[k])


def _weighted_sum(parts: Sequence[Tensor], coefficients: Sequence[float], out: Tensor) -> Tensor:
    """In as few passes over memory as torch has operations for."""
    done = 2
    if len(parts) > 1 and coefficients[0] == 1:
        torch.add(parts[0], parts[1], alpha=coefficients[1], out=out)
    elif len(parts) > 1 and _one_pass(coefficients[:2]):
        # By the smaller coefficient: lerp computes the other in float32, where 1 - 1e-9 is 1 and leaves nothing.
        small = int(coefficients[1] <= coefficients[0])
        torch.lerp(parts[1 - small], parts[small], coefficients[small], out=out)
    elif len(parts) > 1 and coefficients[0] != 0 and out.ndim == 1 and out.numel() > SMALL_SUM:
        # a x + b y in one pass, where mul and add_ take two; but a = 0 would hide a NaN in x.
        one = parts[1].new_ones(1)
        first, rest = parts[0].unsqueeze(0), coefficients[:2]
        torch.addr(first, one, parts[1], beta=rest[0], alpha=rest[1], out=out.unsqueeze(0))
    else:
        done = 1
        torch.mul(parts[0], coefficients[0], out=out)
    for coefficient, part in zip(coefficients[done:], parts[done:], strict=True):
        out.add_(part, alpha=coefficient)
    return out


def _one_pass(row: Sequence[float]) -> bool:
    """Whether a x + b y is x + b y, or lies between x and y, which is what torch.lerp computes."""
    return len(row) == 2 and (row[0] == 1 or (0 <= row[1] <= 1 and (row[0] == 1 - row[1] or row[1] == 1 - row[0])))


# ---------------------------------------------------------------- Triton


MOST_IN_REGISTERS = 4
"""So many sources a program keeps in registers; more it reads again for each result."""


@triton.jit
def _read(addresses, first, here, inside, DTYPE: tl.constexpr, WIDE: tl.constexpr, VEC: tl.constexpr):  # type: ignore[no-untyped-def]
    """The block that begins at `first` of the tensor whose address stands there."""
    source = vector_pointer(tensor_pointer(addresses, DTYPE), first, DTYPE, VEC)
    return tl.load(source + here, mask=inside).to(WIDE)


@triton.jit(do_not_specialize=RUN_TIME, launch_metadata=launch_bytes)
def _combine_kernel(  # type: ignore[no-untyped-def]
    addresses,  # int64 [m + 1, N]: of the sources, of the results
    count,  # N
    segments,  # int64 [N, FIELDS]
    tiles,  # int32 [programs, TILE_FIELDS]
    moved,  # bytes, for the profiler
    coefficients,  # [K, m], of the dtype of the arithmetic
    steps,  # K
    sources,  # m
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    VEC: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one tensor, all K results of it. m = HELD sources are read once and kept in registers; where HELD is
    0 they come from the cache after the first result."""
    tile = tiles + tl.program_id(0) * TILE_FIELDS
    number = tl.load(tile + T_SEGMENT)
    size = tl.multiple_of(tl.load(segments + number * FIELDS + S_SIZE), VEC)
    first = tl.load(tile + T_COLUMNS).to(tl.int64) * BLOCK
    here = tl.arange(0, BLOCK)
    inside = here < tl.multiple_of(tl.minimum(size - first, BLOCK).to(tl.int32), VEC)
    result = tensor_pointer(addresses + sources * count + number, DTYPE)
    result = vector_pointer(result, first, DTYPE, VEC)
    own = addresses + number
    if HELD > 0:
        a = _read(own, first, here, inside, DTYPE, WIDE, VEC)
    if HELD > 1:
        b = _read(own + count, first, here, inside, DTYPE, WIDE, VEC)
    if HELD > 2:
        c = _read(own + 2 * count, first, here, inside, DTYPE, WIDE, VEC)
    if HELD > 3:
        d = _read(own + 3 * count, first, here, inside, DTYPE, WIDE, VEC)
    for k in range(steps):
        row = coefficients + k * sources
        if HELD > 0:
            total = tl.load(row) * a
            if HELD > 1:
                total += tl.load(row + 1) * b
            if HELD > 2:
                total += tl.load(row + 2) * c
            if HELD > 3:
                total += tl.load(row + 3) * d
        else:
            total = tl.zeros((BLOCK,), WIDE)
            for s in range(sources):
                total += tl.load(row + s) * _read(own + s * count, first, here, inside, DTYPE, WIDE, VEC)
        tl.store(result + here, total.to(DTYPE), mask=inside)
        result = vector_pointer(result, size, DTYPE, VEC)


def count_held(sources: int) -> int:
    """How many of so many sources the kernel keeps in registers: all or none."""
    return sources if sources <= MOST_IN_REGISTERS else 0


def block_of(tile: FlatTile, kind: MoveKind, held: int) -> int:
    """Elements a program; half of them where they move one by one, and where more than two sources are kept, so that
    registers suffice; but 16 bytes a thread where these can be moved at once."""
    block = tile.block // ((1 if kind.aligned16 else 2) * (2 if held > 2 else 1))
    return max(block, 32 * tile.warps * kind.vector)


@lru_cache(maxsize=32)
def _flat_packing(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> Packing:
    return Packing.build(dict(shapes))


def _combine_triton(sources: Sequence[Tensors], table: Sequence[Sequence[float]], out: Tensors) -> list[Step]:
    """A launch for each dtype among the tensors, and for each alignment."""
    names = tuple(sources[0])
    device = sources[0][names[0]].device
    columns = [list(source.values()) for source in sources]
    packing = _flat_packing(tuple((name, tuple(t.shape)) for name, t in zip(names, columns[0], strict=True)))
    columns.append([out[name] for name in names])
    pointers = np.array([[tensor.data_ptr() for tensor in column] for column in columns])
    dtypes = tuple([tensor.dtype for tensor in columns[0]])
    aligned16 = (pointers % ALIGNMENT == 0).all(axis=0)
    tile, held = device_family(device).flat, count_held(len(sources))

    def make() -> Layout:
        parts = zip(packing.segments.values(), dtypes, aligned16.tolist(), strict=True)
        pieces = [Piece(segment, dtype, 1, is_aligned, fold=False) for segment, dtype, is_aligned in parts]
        return lay_out(pieces, len(pointers), lambda kind, _: (1, block_of(tile, kind, held)), {}, device)

    layout = packing.layouts.get((dtypes, aligned16.tobytes(), len(pointers), device, tile), make)
    buffer = upload_words(pointers.ravel()[layout.order], device)
    launches: list[Step] = []
    for launch in layout.launches:
        wide = accumulator(launch.kind.dtype)
        prepared = partial(
            _combine_kernel[(len(launch.tiles),)],
            buffer[launch.start : launch.end],
            launch.count,
            launch.segments,
            launch.tiles,
            float((len(sources) + len(table)) * launch.size * launch.kind.dtype.itemsize),
            upload_numbers(table, wide, device),
            len(table),
            len(sources),
            DTYPE=triton_dtype(launch.kind.dtype),
            WIDE=triton_dtype(wide),
            VEC=launch.kind.vector,
            HELD=held,
            BLOCK=block_of(tile, launch.kind, held),
            num_warps=tile.warps,
        )
        launches.append(prepared)
    return launches


# ---------------------------------------------------------------- the function, and the operator


def combine(
    sources: Sequence[Tensors],
    coefficients: Tensor | Sequence[Sequence[float]],
    *,
    backend: str = "auto",
    out: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """K parameter sets sum_i coefficients[k][i] * sources[i], as name -> [K, *shape].

    `sources`: m dictionaries with the same names, shapes, dtypes and devices; `coefficients` [K, m], finite,
    numbers or a tensor. Arithmetic is in float32 (float64 for float64 tensors). A tensor that is not floating is
    copied from the first source, K times. The result is new, or that of `out`, which must share no memory with
    what is read.

    Differentiable in `sources` and `coefficients`, and an operator of PyTorch (`torch.ops.regraft.combine`).

    Raises ValueError for no source, sources that differ, coefficients of another shape or not finite, tensors
    without memory (DTensor), and for `out` where gradients or a compiler are at work.
    """
    table = _as_table(coefficients, len(sources))
    route = choose_route([*sources, {"coefficients": table}], out)
    _check_sources(sources)
    first = sources[0]
    if not first:
        return {}
    chosen = resolve(backend, next(iter(first.values())).device)
    if route == "launch":
        return _bind(sources, table, chosen, out)()
    if route == "definition":
        return combine_reference(sources, table)
    floating = [name for name, tensor in first.items() if tensor.is_floating_point()]
    tensors = [source[name] for source in sources for name in floating]
    sums = torch.ops.regraft.combine(tensors, table, backend) if floating else []
    results = dict(zip(floating, sums, strict=True))
    steps = table.shape[0]
    return {n: results[n] if n in results else t.expand(steps, *t.shape).clone() for n, t in first.items()}


def plan_combine(
    sources: Sequence[Tensors],
    coefficients: Tensor | Sequence[Sequence[float]],
    *,
    backend: str = "auto",
    out: dict[str, Tensor] | None = None,
) -> Plan:
    """`combine` with the same arguments, to be called many times: `plan()` does what is left, on a GPU the launches.

    The coefficients are those of now. Waits for the device. Raises ValueError as `combine` does, and for tensors that
    are not contiguous or that gradients are wanted of.
    """
    table = _as_table(coefficients, len(sources))
    check_bindable(sources)
    _check_sources(sources)
    if not sources[0]:
        return Plan({}, "torch", torch.device("cpu"), (), ())
    chosen = resolve(backend, next(iter(sources[0].values())).device)
    return finish_binding(_bind(sources, table, chosen, out))


@torch.no_grad()
def _bind(sources: Sequence[Tensors], table: Tensor, chosen: str, out: dict[str, Tensor] | None = None) -> Plan:
    rows = table.tolist()
    if not all(math.isfinite(number) for row in rows for number in row):
        raise ValueError("coefficients must be finite")
    first = sources[0]
    shapes = {name: (len(rows), *tensor.shape) for name, tensor in first.items()}
    results = allocate(shapes, first, out, sources)
    floating = [name for name in first if first[name].is_floating_point()]
    others = first.keys() - set(floating)
    steps: list[Step] = [partial(results[name].copy_, first[name].expand(shapes[name])) for name in others]
    floats = [{name: source[name] for name in floating} for source in sources]  # all in one order
    if floating and rows:
        floats = [as_in_memory(source) if chosen == "triton" else source for source in floats]
        given = floats, rows, results
        steps += _combine_triton(*given) if chosen == "triton" else [partial(_combine_torch, *given)]
    return Plan(results, chosen, next(iter(first.values())).device, steps, floats)


def _as_table(coefficients: Tensor | Sequence[Sequence[float]], count: int) -> Tensor:
    if not count:
        raise ValueError("combine needs at least one source")
    table = coefficients if isinstance(coefficients, Tensor) else torch.tensor(coefficients, dtype=torch.float64)
    if table.numel() == 0 and table.ndim < 2:
        table = table.reshape(0, count)
    if table.ndim != 2 or table.shape[1] != count:
        raise ValueError(f"coefficients have shape {tuple(table.shape)}, expected (K, {count})")
    return table


def _check_sources(sources: Sequence[Tensors]) -> None:
    first = sources[0]
    device = next((t.device for t in first.values()), None)
    for number, source in enumerate(sources):
        if source.keys() != first.keys():
            different = ", ".join(sorted(source.keys() ^ first.keys()))
            raise ValueError(f"source {number} and source 0 differ in {different}")
        for name, tensor in source.items():
            wanted = first[name]
            if tensor.device != device:
                raise ValueError(f"{name!r} of source {number} is on {tensor.device}, not on {device}")
            for kind in ("shape", "dtype") if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype else ():
                ours, theirs = (str(getattr(t, kind)).removeprefix("torch.Size") for t in (tensor, wanted))
                if ours != theirs:
                    raise ValueError(f"{name!r}: {kind} is {ours} in source {number}, {theirs} in source 0")
    check_addable(first, "sources")


def _operator(sources: list[Tensor], coefficients: Tensor, backend: str) -> list[Tensor]:
    """`sources`: the floating tensors of the first source, then of the second, and so on."""
    chosen = resolve(backend, sources[0].device)
    return list(_bind(_by_source(sources, coefficients), coefficients, chosen)().values())


def _by_source(tensors: Sequence[Tensor], coefficients: Tensor) -> list[dict[str, Tensor]]:
    each = len(tensors) // coefficients.shape[1]
    return [by_number(tensors[start : start + each]) for start in range(0, len(tensors), each)]


def _fake(sources: list[Tensor], coefficients: Tensor, backend: str) -> list[Tensor]:
    steps, count = coefficients.shape
    return [t.new_empty((steps, *t.shape)) for t in sources[: len(sources) // count]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    sources, coefficients, _ = inputs
    ctx.save_for_backward(coefficients, *(sources if coefficients.requires_grad else []))


def _backward(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    """The transposed sums: of source i, sum_k c_ki g_k; of c_ki, <g_k, theta_i>."""
    coefficients, *sources = ctx.saved_tensors
    wide = coefficients.dtype
    sums = [torch.tensordot(column.to(g), g, 1) for column in coefficients.unbind(1) for g in gradients]
    if not sources:
        return sums, None, None
    columns = []
    for source in _by_source(sources, coefficients):
        dots = [g.flatten(1).to(wide) @ t.flatten().to(wide) for g, t in zip(gradients, source.values(), strict=True)]
        columns.append(torch.stack(dots).sum(0))
    return sums, torch.stack(columns, dim=1).to(coefficients.device), None


define(
    "combine(Tensor[] sources, Tensor coefficients, str backend) -> Tensor[]",
    _operator,
    fake=_fake,
    save=_save,
    backward=_backward,
    flops=lambda sources, table, *_, **__: sum(2 * table[0] * math.prod(shape) for shape in sources),
)
