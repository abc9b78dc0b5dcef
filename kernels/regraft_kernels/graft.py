"""base + scale_k * pi(end - start), for many scales and many targets: the trajectory update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft_kernels.backend import accumulator, resolve, tl, triton, triton_dtype
from regraft_kernels.indices import Indices
from regraft_kernels.launch import (
    RUN_TIME,
    find_tile,
    launch_bytes,
    layout_of,
    prepare_moves,
    tensor_pointer,
    vector_pointer,
)
from regraft_kernels.memory import (
    Scratch,
    as_in_memory,
    of_one_dtype,
    row_blocks,
    stack_named,
    unstack_into,
    upload_numbers,
)
from regraft_kernels.operators import (
    by_number,
    choose_route,
    define,
    flatten_axes,
    slot_vectors,
    unflatten_packing,
)
from regraft_kernels.packing import Packing, Tensors, allocate, check_addable
from regraft_kernels.permute import gather_stacked, permute_reference
from regraft_kernels.plans import Plan, Step, check_bindable, finish_binding

SMALL_GRAFT = 1 << 16
"""Up to so many elements, the number of calls costs more than the passes over memory."""


def graft_reference(
    base: Tensors,
    start: Tensors,
    end: Tensors,
    scales: Sequence[float] | Tensor,
    indices: Mapping[str, Tensor],
    packing: Packing,
) -> dict[str, Tensor]:
    """The definition of `graft` for one target: subtract, permute, scale, add."""
    out = {}
    for name, tensor in base.items():
        column = (len(scales), *(1,) * tensor.ndim)
        if not tensor.is_floating_point():
            out[name] = tensor.repeat(column)
            continue
        wide = accumulator(tensor.dtype)
        delta = {name: end[name].to(wide) - start[name].to(wide)}
        moved = permute_reference(delta, indices, packing)[name]
        factors = torch.as_tensor(scales, dtype=wide, device=tensor.device).reshape(column)
        out[name] = (tensor.to(wide) + factors * moved).to(tensor.dtype)
    return out


def _graft_targets(
    base: Tensors, start: Tensors, end: Tensors, scales: Tensor, vectors: Tensors, packing: Packing
) -> dict[str, Tensor]:
    """The definition for P targets, one after the other."""
    results = [
        graft_reference(
            {name: tensor[target] for name, tensor in base.items()},
            start,
            end,
            scales,
            {slot: vector[target] for slot, vector in vectors.items()},
            packing,
        )
        for target in range(len(next(iter(base.values()))))
    ]
    shapes = {name: (0, len(scales), *packing.shapes[name]) for name in base}
    return {
        name: torch.stack([result[name] for result in results]) if results else tensor.new_empty(shapes[name])
        for name, tensor in base.items()
    }


def _graft_torch(
    sources: Sequence[Tensors],
    scales: Sequence[float],
    out: Tensors,
    indices: Indices,
    packing: Packing,
) -> None:
    base, start, end = sources
    targets = 1 if indices.targets is None else indices.targets
    scratch = Scratch(), Scratch()
    stacked = _graft_small(sources, scales, out, indices, packing) if scales and indices.targets is None else set()
    for name, tensor in base.items():
        segment = packing.segments[name]
        if not segment.size or not scales or name in stacked:
            continue
        shape = (segment.rows, segment.columns, segment.tail)
        ends = start[name].reshape(shape), end[name].reshape(shape)
        results = out[name].view(targets, len(scales), *shape)
        for target, (here, result) in enumerate(zip(tensor.reshape(targets, *shape), results, strict=True)):
            factors = segment.row_factors, segment.column_factors
            gathers = [indices.vector(f, None if indices.targets is None else target) for f in factors]
            _graft_one(here, ends, scales, result, gathers, scratch)


def _graft_small(
    sources: Sequence[Tensors], scales: Sequence[float], out: Tensors, indices: Indices, packing: Packing
) -> set[str]:
    """Graft the small tensors that are alike as stacks; their names."""
    done: set[str] = set()
    for names in packing.small_groups(tuple(sources[0])):
        if not of_one_dtype(sources[0], names):
            continue
        base, *moves = (stack_named(tensors, names) for tensors in sources)
        wide = accumulator(base.dtype)
        start, end = (move.to(wide) for move in moves)
        change = gather_stacked(end - start, indices, packing.segments[names[0]])
        here, sums = base.to(wide), base.new_empty((len(names), len(scales), *base.shape[1:]))
        for number, scale in enumerate(scales):
            sums[:, number] = torch.add(here, change, alpha=scale)
        unstack_into(out, names, sums)
        done.update(names)
    return done


def _graft_one(
    base: Tensor,
    ends: tuple[Tensor, Tensor],
    scales: Sequence[float],
    out: Tensor,
    gathers: Sequence[Tensor | None],
    scratch: tuple[Scratch, Scratch],
) -> None:
    """Fill `out` [K, rows, columns, tail] for one tensor of one target: subtract, gather once, add."""
    (start, end), (rows, columns), (whole, part) = ends, gathers, scratch
    wide = accumulator(base.dtype)
    if base.numel() <= SMALL_GRAFT and wide == base.dtype:
        change = torch.sub(end, start)
        change = change if rows is None else change.index_select(0, rows)
        change = change if columns is None else change.index_select(1, columns)
        for number, scale in enumerate(scales):
            torch.add(base, change, alpha=scale, out=out[number])
        return
    change = whole.empty(end.shape, end, wide)
    for block in row_blocks(end):
        later, earlier = end[block].to(wide), start[block].to(wide)
        if columns is None:
            torch.sub(later, earlier, out=change[block])
        else:
            difference = torch.sub(later, earlier, out=part.empty(later.shape, later))
            torch.index_select(difference, 1, columns, out=change[block])
    for block in row_blocks(base):
        here, moved = base[block].to(wide), change[block]
        if rows is not None:  # the last result is room enough for what is gathered
            room = out[-1, block] if wide == base.dtype else part.empty(moved.shape, moved)
            moved = torch.index_select(change, 0, rows[block], out=room)
        for number, scale in enumerate(scales):
            if wide == base.dtype:
                torch.add(here, moved, alpha=scale, out=out[number, block])
            else:
                out[number, block] = torch.add(here, moved, alpha=scale)


# ---------------------------------------------------------------- Triton

_LIVE_VALUES = 4
"""Values of each element that the kernel has in registers at a time."""


@triton.jit(do_not_specialize=RUN_TIME, launch_metadata=launch_bytes)
def _graft_kernel(  # type: ignore[no-untyped-def]
    addresses,  # int64 [4, N]: of base, start, end, the results
    count,  # N
    segments,  # int64 [N, FIELDS]
    tiles,  # int32 [programs, TILE_FIELDS]
    tables,  # int32 [P, E]: source row of each row, source column of each column
    entries,  # E
    programs,  # P targets
    moved,  # bytes, for the profiler
    scales,  # [K], of the dtype of the arithmetic
    steps,  # K
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    VEC: tl.constexpr,
    GATHERED: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of one tensor for every target, all K results of it: program (tile, target), and on beyond the grid."""
    j = tl.arange(0, COLUMNS)
    for target in range(tl.program_id(1), programs, tl.num_programs(1)):
        own = tables + entries.to(tl.int64) * target
        number, rows, length, size, first_row, first, row_table, origin, inside_j, from_j = find_tile(
            tiles, segments, own, VEC, GATHERED, SPAN, COLUMNS
        )
        there: tl.constexpr = 1 if GATHERED else VEC
        base = tensor_pointer(addresses + number, DTYPE)
        base = vector_pointer(base, size * target + first, DTYPE, VEC)
        start = vector_pointer(tensor_pointer(addresses + count + number, DTYPE), origin, DTYPE, there)
        end = vector_pointer(tensor_pointer(addresses + 2 * count + number, DTYPE), origin, DTYPE, there)
        result = tensor_pointer(addresses + 3 * count + number, DTYPE)
        result = vector_pointer(result, size * steps * target + first, DTYPE, VEC)
        for row in range(first_row, tl.minimum(first_row + SPAN, rows), ROWS):
            i = row + tl.arange(0, ROWS)
            from_i = tl.load(row_table + i, mask=i < rows, other=0).to(tl.int64) * length
            inside = (i < rows)[:, None] & inside_j[None, :]
            here = (i.to(tl.int64) * length)[:, None] + j[None, :]
            from_here = from_i[:, None] + from_j[None, :]
            later = tl.load(end + from_here, mask=inside).to(WIDE)
            change = later - tl.load(start + from_here, mask=inside).to(WIDE)
            value = tl.load(base + here, mask=inside).to(WIDE)
            step = result
            for k in range(steps):
                total = value + tl.load(scales + k) * change
                tl.store(step + here, total.to(DTYPE), mask=inside)
                step = vector_pointer(step, size, DTYPE, VEC)


def _graft_triton(
    sources: Sequence[Tensors],
    scales: Sequence[float],
    out: Tensors,
    indices: Indices,
    packing: Packing,
) -> list[Step]:
    """A launch for each kind among the tensors."""
    names = tuple(sources[0])
    if not scales or indices.targets == 0:
        return []
    columns = [list(tensors.values()) for tensors in sources]
    columns.append([out[name] for name in names])
    pointers = np.array([[tensor.data_ptr() for tensor in column] for column in columns])
    layout = layout_of(packing, names, tuple([(t.dtype, 1) for t in columns[0]]), pointers, indices)

    def extra(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        wide = accumulator(dtype)
        numbers = upload_numbers(scales, wide, indices.joined.device)
        return (numbers, len(scales)), {"WIDE": triton_dtype(wide)}

    targets = 1 if indices.targets is None else indices.targets
    return prepare_moves(_graft_kernel, layout, pointers, indices, targets, _LIVE_VALUES, extra)


# ---------------------------------------------------------------- the function, and the operator


def graft(
    base: Tensors,
    start: Tensors,
    end: Tensors,
    scales: Sequence[float] | Tensor,
    indices: Mapping[str, Tensor] | Indices,
    packing: Packing,
    *,
    backend: str = "auto",
    out: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """base + scale_k * pi(end - start), as name -> [K, *shape]; only floating tensors take part.

    `base`, `start`, `end`: name -> [*shape]; `scales` [K], numbers or a tensor. For P targets `base` is
    [P, *shape] and every index vector [P, length]; the result is then [P, K, *shape]. `indices` may be what
    `packing.prepare` made. Arithmetic is in float32 (float64 for float64 tensors). Tensors that are not floating
    are copied from `base`. The result is new, or that of `out`, which must share no memory with what is read.
    Source: Chijiwa et al., Transferring Learning Trajectories of Neural Networks, section 3:
    theta2_0 + pi(theta1_t - theta1_0).

    Differentiable in `base`, `start`, `end` and `scales`, and an operator of PyTorch (`torch.ops.regraft.graft`).
    Raises ValueError for names, shapes, dtypes or devices that do not fit, and as `permute` does.
    """
    floating = _select_floating(base)
    moves = [_select(tensors, floating, what) for what, tensors in (("start", start), ("end", end))]
    factors = _as_factors(scales)
    route = choose_route([base, *moves, {"scales": factors}], out)
    batch = _check_graft(base, moves, packing)
    if not base:
        return {}
    chosen = resolve(backend, next(iter(base.values())).device)
    if route == "launch":
        return _bind(base, moves, _check_scales(factors), indices, packing, chosen, out)()
    vectors = slot_vectors(packing, floating, indices, route, targets=batch[0] if batch else None)
    if route == "definition":
        define_graft = _graft_targets if batch else graft_reference
        return define_graft(base, moves[0], moves[1], factors, vectors, packing)
    lists = [[tensors[name] for name in floating] for tensors in (base, *moves)]
    axes = flatten_axes(packing, floating, vectors)
    run = torch.ops.regraft.graft
    sums = run(*lists, factors, list(vectors.values()), axes, bool(batch), backend) if floating else []
    results = dict(zip(floating, sums, strict=True))
    lead = (*batch, len(factors))
    return {
        n: results[n] if n in results else t.unsqueeze(len(batch)).expand(*lead, *packing.shapes[n]).clone()
        for n, t in base.items()
    }


def plan_graft(
    base: Tensors,
    start: Tensors,
    end: Tensors,
    scales: Sequence[float] | Tensor,
    indices: Mapping[str, Tensor] | Indices,
    packing: Packing,
    *,
    backend: str = "auto",
    out: dict[str, Tensor] | None = None,
) -> Plan:
    """`graft` with the same arguments, to be called many times: `plan()` does what is left, on a GPU the launches.

    The scales are those of now. Waits for the device. Raises ValueError as `graft` does, and for tensors that are not
    contiguous or that gradients are wanted of.
    """
    floating, factors = _select_floating(base), _as_factors(scales)
    moves = [_select(tensors, floating, what) for what, tensors in (("start", start), ("end", end))]
    check_bindable([base, *moves])
    _check_graft(base, moves, packing)
    if not base:
        return Plan({}, "torch", torch.device("cpu"), (), ())
    chosen = resolve(backend, next(iter(base.values())).device)
    return finish_binding(_bind(base, moves, _check_scales(factors), indices, packing, chosen, out))


@torch.no_grad()
def _bind(
    base: Tensors,
    moves: Sequence[Tensors],
    scales: Sequence[float],
    indices: Mapping[str, Tensor] | Indices,
    packing: Packing,
    chosen: str,
    out: dict[str, Tensor] | None = None,
) -> Plan:
    first = next(iter(base))
    batch = tuple(base[first].shape[: base[first].ndim - len(packing.shapes[first])])
    shapes = {name: (*batch, len(scales), *packing.shapes[name]) for name in base}
    results = allocate(shapes, base, out, [base, *moves])
    floating, device = _select_floating(base), base[first].device
    others = base.keys() - floating.keys()
    steps: list[Step] = [partial(results[name].copy_, base[name].unsqueeze(len(batch))) for name in others]
    if floating:
        vectors = packing.indices_for(tuple(floating), indices, device, batch[0] if batch else None, False, chosen)
        moves = [as_in_memory(s) if chosen == "triton" else s for s in (floating, *moves)]
        given = moves, scales, results, vectors, packing
        steps += _graft_triton(*given) if chosen == "triton" else [partial(_graft_torch, *given)]
    return Plan(results, chosen, device, steps, moves)


def _operator(
    base: list[Tensor],
    start: list[Tensor],
    end: list[Tensor],
    scales: Tensor,
    indices: list[Tensor],
    axes: list[int],
    batched: bool,
    backend: str,
) -> list[Tensor]:
    """Floating tensors alone; `axes` as for `permute`."""
    packing, chosen = unflatten_packing(start, axes, False), resolve(backend, start[0].device)
    moves = [by_number(start), by_number(end)]
    factors = _check_scales(scales)
    return list(_bind(by_number(base), moves, factors, by_number(indices), packing, chosen)().values())


def _fake(base: list[Tensor], start: list[Tensor], end: Any, scales: Tensor, *rest: Any) -> list[Tensor]:
    batched, steps = rest[2], scales.shape[0]
    return [b.new_empty((*b.shape[: int(batched)], steps, *s.shape)) for b, s in zip(base, start, strict=True)]


def _count_flops(base: list[Any], start: Any, end: Any, scales: Any, *_: Any, **__: Any) -> int:
    """A difference; for each scale a product and a sum."""
    return sum((1 + 2 * scales[0]) * math.prod(shape) for shape in base)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, start, end, scales, indices, *ctx.rest = inputs
    ctx.sizes = len(start), len(indices)
    moves = [*start, *end] if scales.requires_grad else []
    ctx.save_for_backward(scales, *indices, *moves)


def _backward(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    """base: the sum over k; end: pi's inverse of the sums weighted by the scales; start: minus that."""
    (axes, batched, backend), (count, slots) = ctx.rest, ctx.sizes
    scales, saved = ctx.saved_tensors[0], ctx.saved_tensors[1:]
    indices, moves = list(saved[:slots]), saved[slots:]
    dim = int(batched)
    base = [g.sum(dim) for g in gradients]
    weighted = [torch.tensordot(g.movedim(dim, -1), scales.to(g), 1) for g in gradients]
    back, forth = [], []
    for target in range(weighted[0].shape[0] if batched else 1):
        some = [vector[target] for vector in indices] if batched else indices
        here = [w[target] for w in weighted] if batched else weighted
        back.append(torch.ops.regraft.permute(here, some, axes, False, True, backend))
        if scales.requires_grad:
            change = [end - start for start, end in zip(moves[:count], moves[count:], strict=True)]
            forth.append(torch.ops.regraft.permute(change, some, axes, False, False, backend))
    end = [torch.stack(parts).sum(0) for parts in zip(*back, strict=True)]
    factors = None
    if forth:
        factors = torch.zeros_like(scales)
        for parts, g in zip(zip(*forth, strict=True), gradients, strict=True):
            moved = torch.stack(parts) if batched else parts[0]
            by_step = g.movedim(dim, 0).flatten(1).to(scales.dtype)
            factors = factors + (by_step @ moved.flatten().to(scales.dtype)).to(scales.device)
    return base, [-e for e in end], end, factors, [None] * slots, None, None, None


define(
    "graft(Tensor[] base, Tensor[] start, Tensor[] end, Tensor scales, Tensor[] indices, int[] axes, bool batched, "
    "str backend) -> Tensor[]",
    _operator,
    fake=_fake,
    save=_save,
    backward=_backward,
    flops=_count_flops,
)


def _select_floating(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def _as_factors(scales: Sequence[float] | Tensor) -> Tensor:
    factors = scales if isinstance(scales, Tensor) else torch.tensor(scales, dtype=torch.float64)
    if factors.ndim > 1:
        raise ValueError(f"scales have shape {tuple(factors.shape)}, expected (K,)")
    return factors if factors.ndim else factors[None]


def _check_graft(base: Tensors, moves: Sequence[Tensors], packing: Packing) -> tuple[int, ...]:
    """The leading batch dimension of `base`, once all tensors were found to fit."""
    batch = packing.check(base, "base")
    check_addable(base, "base")
    floating = _select_floating(base)
    for what, move in zip(("start", "end"), moves, strict=True):
        _check_move(move, floating, packing, what)
    return batch


def _check_scales(scales: Tensor) -> list[float]:
    """As numbers; those on a GPU are waited for."""
    factors = scales.double().tolist()
    if not all(map(math.isfinite, factors)):
        raise ValueError("scales must be finite")
    return factors


def _select(tensors: Tensors, base: Tensors, what: str) -> dict[str, Tensor]:
    """The tensors of `start` or `end` that `base` needs."""
    if not base.keys() <= tensors.keys():
        raise ValueError(f"{what} lacks {', '.join(sorted(base.keys() - tensors.keys()))}")
    return {name: tensors[name] for name in base}


def _check_move(needed: Tensors, base: Tensors, packing: Packing, what: str) -> None:
    if packing.check(needed, what):
        raise ValueError(f"{what} must have no batch dimension")
    for name, tensor in needed.items():
        wanted = base[name]
        if tensor.dtype != wanted.dtype or tensor.device != wanted.device:
            kind = "dtype" if tensor.dtype != wanted.dtype else "device"
            raise ValueError(f"{what}: {kind} of {name!r} is {getattr(tensor, kind)}, in base {getattr(wanted, kind)}")
