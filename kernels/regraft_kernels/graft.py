"""base + scale_k * pi(end - start), for many scales and many targets: the trajectory update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from regraft_kernels.backend import resolve, tl, triton, triton_dtype
from regraft_kernels.indices import Indices
from regraft_kernels.moves import (
    RUN_TIME,
    accumulator,
    aligned,
    find_tile,
    launch_bytes,
    launch_moves,
    layout_of,
    memory_of,
    on_device,
    pointer,
)
from regraft_kernels.operators import needs_operator, one_by_one, operator_vectors, packing_of
from regraft_kernels.packing import Packing, Tensors, allocate, check_addable
from regraft_kernels.permute import Scratch, permute_reference, row_blocks


def graft_reference(
    base: Tensors,
    start: Tensors,
    end: Tensors,
    scales: Sequence[float],
    indices: Mapping[str, Tensor],
    packing: Packing,
) -> dict[str, Tensor]:
    """The definition of `graft` for one target: subtract, permute, scale, add."""
    out = {}
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            out[name] = tensor.repeat(len(scales), *(1,) * tensor.ndim)
            continue
        wide = torch.promote_types(tensor.dtype, torch.float32)
        delta = {name: end[name].to(wide) - start[name].to(wide)}
        moved = permute_reference(delta, indices, packing)[name]
        steps = [tensor.to(wide) + scale * moved for scale in scales]
        out[name] = torch.stack(steps).to(tensor.dtype) if steps else tensor.new_empty((0, *tensor.shape))
    return out


def _graft_torch(
    base: Tensors,
    start: Tensors,
    end: Tensors,
    scales: Sequence[float],
    out: Tensors,
    indices: Mapping[str, Tensor] | Indices,
    packing: Packing,
    targets: int | None,
) -> None:
    device = next(iter(base.values())).device
    vectors = packing.indices_for(tuple(base), indices, device, targets, False, "torch")
    scratch = Scratch(), Scratch()
    for name, tensor in base.items():
        segment = packing.segments[name]
        if not segment.size:
            continue
        shape = (segment.rows, segment.columns, segment.tail)
        first, last = start[name].reshape(shape), end[name].reshape(shape)
        if targets is None:
            rows, columns = vectors.of(segment.row_factors), vectors.of(segment.column_factors)
            results = out[name].view(len(scales), *shape)
            _graft_one(tensor.reshape(shape), first, last, scales, results, rows, columns, scratch)
            continue
        results = out[name].view(targets, len(scales), *shape)
        for target, here in enumerate(tensor.reshape(targets, *shape)):
            rows = vectors.of(segment.row_factors, target)
            columns = vectors.of(segment.column_factors, target)
            _graft_one(here, first, last, scales, results[target], rows, columns, scratch)


def _graft_one(
    base: Tensor,
    start: Tensor,
    end: Tensor,
    scales: Sequence[float],
    out: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    scratch: tuple[Scratch, Scratch],
) -> None:
    """Fill `out` [K, rows, columns, tail] for one tensor of one target: subtract, gather once, add."""
    wide = torch.promote_types(base.dtype, torch.float32)
    if not scales:
        return
    if base.numel() <= SMALL and wide == base.dtype:
        moved = torch.sub(end, start)
        moved = moved if rows is None else moved.index_select(0, rows)
        moved = moved if columns is None else moved.index_select(1, columns)
        for number, scale in enumerate(scales):
            torch.add(base, moved, alpha=scale, out=out[number])
        return
    whole, part = scratch
    change = whole.like(end, wide)
    for block in row_blocks(end):
        later, earlier = end[block].to(wide), start[block].to(wide)
        if columns is None:
            torch.sub(later, earlier, out=change[block])
        else:
            torch.sub(later, earlier, out=part.like(later, wide))
            torch.index_select(part.like(later, wide), 1, columns, out=change[block])
    for block in row_blocks(base):
        here, moved = base[block].to(wide), change[block]
        if rows is not None:  # the last result is room enough for what is gathered
            room = out[-1, block] if wide == base.dtype else part.like(moved, wide)
            moved = torch.index_select(change, 0, rows[block], out=room)
        for number, scale in enumerate(scales):
            if wide == base.dtype:
                torch.add(here, moved, alpha=scale, out=out[number, block])
            else:
                out[number, block] = torch.add(here, moved, alpha=scale)


SMALL = 1 << 16
"""Up to so many elements, the number of calls costs more than the passes over memory."""

LIVE = 4
"""Values of each element that the kernel has in registers at a time."""


@triton.jit(do_not_specialize=RUN_TIME, launch_metadata=launch_bytes)
def _graft_kernel(
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
        base = aligned(pointer(addresses + number, DTYPE), size * target + first, DTYPE, VEC)
        start = aligned(pointer(addresses + count + number, DTYPE), origin, DTYPE, there)
        end = aligned(pointer(addresses + 2 * count + number, DTYPE), origin, DTYPE, there)
        result = pointer(addresses + 3 * count + number, DTYPE)
        result = aligned(result, size * steps * target + first, DTYPE, VEC)
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
                found = value + tl.load(scales + k) * change
                tl.store(step + here, found.to(DTYPE), mask=inside)
                step = aligned(step, size, DTYPE, VEC)


def _graft_triton(
    base: Tensors,
    start: Tensors,
    end: Tensors,
    scales: Sequence[float],
    out: Tensors,
    indices: Mapping[str, Tensor] | Indices,
    packing: Packing,
    targets: int | None,
) -> None:
    """A launch for each kind among the tensors."""
    names = tuple(base)
    device = base[names[0]].device
    checked = packing.indices_for(names, indices, device, targets, False, "triton")
    if not scales or targets == 0:
        return
    columns = [memory_of(tensors.values()) for tensors in (base, start, end)]
    columns.append([out[name] for name in names])
    pointers = np.array([[tensor.data_ptr() for tensor in column] for column in columns])
    kinds = tuple([(tensor.dtype, 1) for tensor in columns[0]])
    layout = layout_of(packing, names, kinds, pointers, checked, device)

    def extra(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object]]:
        wide = accumulator(dtype)
        return (on_device(scales, wide, device), len(scales)), {"WIDE": triton_dtype(wide)}

    launch_moves(_graft_kernel, layout, pointers, checked, 1 if targets is None else targets, LIVE, extra)


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
    batch = packing.check(base, "base")
    check_addable(base, "base")
    floating = {name: tensor for name, tensor in base.items() if tensor.is_floating_point()}
    moves = [
        _check_move(tensors, floating, packing, what) for what, tensors in (("start", start), ("end", end))
    ]
    if not base:
        return {}
    device = next(iter(base.values())).device
    chosen = resolve(backend, device)
    learned = {"scales": scales} if isinstance(scales, Tensor) else {}
    if needs_operator(base, "base", out, *moves, learned):
        moved = _by_operator(floating, moves, scales, indices, packing, bool(batch), backend)
        steps = len(scales)
        lead = (*batch, steps)
        return {
            n: moved[n] if n in moved else t.unsqueeze(len(batch)).expand(*lead, *packing.shapes[n]).clone()
            for n, t in base.items()
        }
    return _graft_now(base, moves, _check_scales(scales), indices, packing, chosen, out)


@torch.no_grad()
def _graft_now(
    base: Tensors,
    moves: Sequence[Tensors],
    scales: Sequence[float],
    indices: Mapping[str, Tensor] | Indices,
    packing: Packing,
    chosen: str,
    out: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    first = next(iter(base))
    batch = tuple(base[first].shape[: base[first].ndim - len(packing.shapes[first])])
    shapes = {name: (*batch, len(scales), *packing.shapes[name]) for name in base}
    results = allocate(shapes, base, out, [base, *moves])
    floating = {name: tensor for name, tensor in base.items() if tensor.is_floating_point()}
    for name in base.keys() - floating.keys():
        results[name].copy_(base[name].unsqueeze(len(batch)))
    if floating:
        targets = batch[0] if batch else None
        run = _graft_triton if chosen == "triton" else _graft_torch
        start, end = moves
        run(floating, start, end, scales, results, indices, packing, targets)
    return results


# ---------------------------------------------------------------- the operator


def _by_operator(
    base: Tensors,
    moves: Sequence[Tensors],
    scales: Sequence[float] | Tensor,
    indices: Mapping[str, Tensor] | Indices,
    packing: Packing,
    batched: bool,
    backend: str,
) -> dict[str, Tensor]:
    if not base:
        return {}
    slots, vectors = operator_vectors(packing, base, indices)
    places = {slot: place for place, slot in enumerate(slots)}
    axes = [-1 if slot is None else places[slot] for name in base for slot in packing.axes[name]]
    start, end = ([tensors[name] for name in base] for tensors in moves)
    factors = scales.flatten() if isinstance(scales, Tensor) else torch.tensor(scales, dtype=torch.float64)
    found = torch.ops.regraft.graft(list(base.values()), start, end, factors, vectors, axes, batched, backend)
    return dict(zip(base, found, strict=True))


@torch.library.custom_op(
    "regraft::graft",
    mutates_args=(),
    schema="(Tensor[] base, Tensor[] start, Tensor[] end, Tensor scales, Tensor[] indices, int[] axes, "
    "bool batched, str backend) -> Tensor[]",
)
def _operator(base, start, end, scales, indices, axes, batched, backend):
    """Floating tensors alone; `axes` as for `permute`."""
    packing = packing_of(start, axes, False)
    moves = [dict(zip(packing.shapes, tensors, strict=True)) for tensors in (base, start, end)]
    vectors = {str(place): vector for place, vector in enumerate(indices)}
    chosen = resolve(backend, start[0].device)
    factors = _check_scales(scales)
    return list(_graft_now(moves[0], moves[1:], factors, vectors, packing, chosen).values())


@_operator.register_fake
def _fake(base, start, end, scales, indices, axes, batched, backend):
    steps = scales.shape[0]
    return [
        b.new_empty((*b.shape[: int(batched)], steps, *s.shape)) for b, s in zip(base, start, strict=True)
    ]


def _remember(ctx, inputs, output) -> None:
    _, start, end, scales, indices, *ctx.rest = inputs
    ctx.sizes = len(start), len(indices)
    moves = [*start, *end] if scales.requires_grad else []
    ctx.save_for_backward(scales, *indices, *moves)


def _backward(ctx, gradients):
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
            factors = factors + by_step @ moved.flatten().to(scales)
    return base, [-e for e in end], end, factors, [None] * slots, None, None, None


_operator.register_autograd(_backward, setup_context=_remember)
_operator.register_vmap(one_by_one(torch.ops.regraft.graft))


def _check_scales(scales: Sequence[float] | Tensor) -> list[float]:
    """As numbers; those on a GPU are waited for."""
    factors = torch.as_tensor(scales, dtype=torch.float64).reshape(-1).tolist()
    if not all(map(math.isfinite, factors)):
        raise ValueError("scales must be finite")
    return factors


def _check_move(tensors: Tensors, base: Tensors, packing: Packing, what: str) -> dict[str, Tensor]:
    """The tensors of `start` or `end` that `base` needs."""
    if not base.keys() <= tensors.keys():
        raise ValueError(f"{what} lacks {', '.join(sorted(base.keys() - tensors.keys()))}")
    needed = {name: tensors[name] for name in base}
    if packing.check(needed, what):
        raise ValueError(f"{what} must have no batch dimension")
    for name, tensor in needed.items():
        wanted = base[name]
        if tensor.dtype != wanted.dtype or tensor.device != wanted.device:
            kind = "dtype" if tensor.dtype != wanted.dtype else "device"
            raise ValueError(
                f"{what}: {kind} of {name!r} is {getattr(tensor, kind)}, in base {getattr(wanted, kind)}"
            )
    return needed
