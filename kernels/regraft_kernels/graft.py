"""base + scale_k * pi(end - start), for many scales and many targets: the trajectory update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from regraft_kernels.backend import resolve, tl, triton, triton_dtype
from regraft_kernels.cases import (
    BY_HAND,
    COPY,
    FLOATING,
    NETWORKS,
    OURS,
    PLANS,
    TABLES,
    Case,
    Network,
    Variant,
    copy_of,
    dtype_name,
    each_family,
    size,
)
from regraft_kernels.packing import Packing, Tensors, addresses, allocate, check_real
from regraft_kernels.permute import Scratch, permute_reference, row_blocks
from regraft_kernels.tiles import FAMILIES, family


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
    indices: Mapping[str, Tensor],
    packing: Packing,
    targets: int | None,
) -> None:
    device = next(iter(base.values())).device
    vectors = packing.vectors(indices, list(base), device, targets=targets)
    scratch = Scratch(), Scratch()
    for name, tensor in base.items():
        segment = packing.segments[name]
        if not segment.size:
            continue
        shape = (segment.rows, segment.columns, segment.tail)
        first, last = start[name].reshape(shape), end[name].reshape(shape)
        if targets is None:
            rows, columns = vectors.of(segment.row_factors), vectors.of(segment.column_factors)
            results = out[name].view(-1, *shape)
            _graft_one(tensor.reshape(shape), first, last, scales, results, rows, columns, scratch)
            continue
        results = out[name].view(targets, -1, *shape)
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
    """Fill `out` [K, rows, columns, tail] for one tensor of one target, a block of rows at a time."""
    wide = torch.promote_types(base.dtype, torch.float32)
    first, second = scratch
    for block in row_blocks(base):
        later, earlier = first.rows(end, rows, block), second.rows(start, rows, block)
        moved = torch.sub(later.to(wide), earlier.to(wide), out=first.like(later, wide))
        if columns is not None:
            moved = torch.index_select(moved, 1, columns, out=second.like(later, wide))
        here = base[block].to(wide)
        for number, scale in enumerate(scales):
            if wide == base.dtype:
                torch.add(here, moved, alpha=scale, out=out[number, block])
            else:
                out[number, block] = torch.add(here, moved, alpha=scale)


@triton.jit
def _graft_kernel(
    addresses,  # int64 [4, N]: of base, start, end, the results
    count,  # N
    segments,  # int64 [N, 6]
    tiles,  # int64 [programs, 3]
    vectors,  # int64 [P, vector_length]: the index vectors, one after the other
    vector_length,
    scales,  # [K], of the dtype of the arithmetic
    steps,  # K
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of one tensor for one target, all K results of it: program (tile, target)."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    target = tl.program_id(1).to(tl.int64)
    number = tl.load(tile)
    segment = segments + number * 6
    rows, length, tail = tl.load(segment), tl.load(segment + 1), tl.load(segment + 2)
    row_vector, column_vector = tl.load(segment + 3), tl.load(segment + 4)
    size = tl.load(segment + 5)
    base = tl.load(addresses + number).to(tl.pointer_type(DTYPE)) + target * size
    start = tl.load(addresses + count + number).to(tl.pointer_type(DTYPE))
    end = tl.load(addresses + 2 * count + number).to(tl.pointer_type(DTYPE))
    result = tl.load(addresses + 3 * count + number).to(tl.pointer_type(DTYPE)) + target * steps * size
    vectors += target * vector_length

    i = tl.load(tile + 1) + tl.arange(0, ROWS)
    j = tl.load(tile + 2) + tl.arange(0, COLUMNS)
    from_i = i
    if row_vector >= 0:
        from_i = tl.load(vectors + row_vector + i, mask=i < rows, other=0)
    from_j = j
    if column_vector >= 0:
        column = j // tail
        from_j = (
            tl.load(vectors + column_vector + column, mask=j < length, other=0) * tail + j - column * tail
        )
    inside = (i < rows)[:, None] & (j < length)[None, :]
    here = i[:, None] * length + j[None, :]
    there = from_i[:, None] * length + from_j[None, :]
    later = tl.load(end + there, mask=inside).to(WIDE)
    moved = later - tl.load(start + there, mask=inside).to(WIDE)
    value = tl.load(base + here, mask=inside).to(WIDE)
    for k in range(steps):
        step = value + tl.load(scales + k) * moved
        tl.store(result + k * size + here, step.to(DTYPE), mask=inside)


def _graft_triton(
    base: Tensors,
    start: Tensors,
    end: Tensors,
    scales: Sequence[float],
    out: Tensors,
    indices: Mapping[str, Tensor],
    packing: Packing,
    targets: int | None,
) -> None:
    """One launch for each dtype among the tensors."""
    device = next(iter(base.values())).device
    checked = packing.vectors(indices, list(base), device, targets=targets)
    tile = family(device).move
    for dtype in dict.fromkeys(tensor.dtype for tensor in base.values()):
        names = [name for name, tensor in base.items() if tensor.dtype == dtype and out[name].numel()]
        if not names:
            continue
        wide = torch.promote_types(dtype, torch.float32)
        table = packing.table(names, [1] * len(names), tile, device)
        vectors = table.vectors(checked, targets)
        columns = [[tensors[name].contiguous() for name in names] for tensors in (base, start, end, out)]
        _graft_kernel[len(table.tiles), 1 if targets is None else targets](
            addresses(columns, device),
            len(names),
            table.segments,
            table.tiles,
            vectors,
            vectors.shape[-1],
            torch.tensor(scales, dtype=wide, device=device),
            len(scales),
            DTYPE=triton_dtype(dtype),
            WIDE=triton_dtype(wide),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
        )


@torch.no_grad()
def graft(
    base: Tensors,
    start: Tensors,
    end: Tensors,
    scales: Sequence[float] | Tensor,
    indices: Mapping[str, Tensor],
    packing: Packing,
    *,
    backend: str = "auto",
    out: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """base + scale_k * pi(end - start), as name -> [K, *shape]; only floating tensors take part.

    `base`, `start`, `end`: name -> [*shape]; `scales` [K]. For P targets `base` is [P, *shape] and every
    index vector [P, length]; the result is then [P, K, *shape]. Arithmetic is in float32 (float64 for
    float64 tensors). Tensors that are not floating are copied from `base`. The result is new, or that of
    `out`, which must share no memory with what is read. Source: Chijiwa et al., Transferring Learning
    Trajectories of Neural Networks, section 3: theta2_0 + pi(theta1_t - theta1_0).

    Gradients are not tracked. Raises ValueError for names, shapes, dtypes or devices that do not fit.
    """
    batch = packing.check(base, "base")
    check_real(base, "base")
    floating = {name: tensor for name, tensor in base.items() if tensor.is_floating_point()}
    moves = [
        _check_move(tensors, floating, packing, what) for what, tensors in (("start", start), ("end", end))
    ]
    factors = _check_scales(scales)
    if not base:
        return {}
    device = next(iter(base.values())).device
    chosen = resolve(backend, device)
    shapes = {n: (*batch, len(factors), *packing.shapes[n]) for n in base}
    results = allocate(shapes, base, out, [base, *moves])
    for name in base.keys() - floating.keys():
        results[name].copy_(base[name].unsqueeze(len(batch)))
    if floating:
        targets = batch[0] if batch else None
        run = _graft_triton if chosen == "triton" else _graft_torch
        run(floating, *moves, factors, results, indices, packing, targets)
    return results


def _check_scales(scales: Sequence[float] | Tensor) -> list[float]:
    factors = torch.as_tensor(scales, dtype=torch.float64).reshape(-1)
    if not factors.isfinite().all():
        raise ValueError("scales must be finite")
    return factors.tolist()


def _check_move(tensors: Tensors, base: Tensors, packing: Packing, what: str) -> dict[str, Tensor]:
    """The tensors of `start` or `end` that `base` needs."""
    missing = sorted(base.keys() - tensors.keys())
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}")
    needed = {name: tensors[name] for name in base}
    if packing.check(needed, what):
        raise ValueError(f"{what} must have no batch dimension")
    for name, tensor in needed.items():
        for kind in ("dtype", "device"):
            if getattr(tensor, kind) != getattr(base[name], kind):
                raise ValueError(
                    f"{what}: {kind} of {name!r} is {getattr(tensor, kind)}, in base {getattr(base[name], kind)}"
                )
    return needed


# ---------------------------------------------------------------- what to compile, what to time


def _variants(target: str) -> list[Variant]:
    found, tile = [], FAMILIES[target].move
    for dtype in FLOATING:
        wide = torch.promote_types(dtype, torch.float32)
        pointer = "*fp64" if wide == torch.float64 else "*fp32"
        rest = {"vectors": "*i64", "vector_length": "i32", "scales": pointer, "steps": "i32"}
        constants = {"DTYPE": dtype, "WIDE": wide, "ROWS": tile.rows, "COLUMNS": tile.columns}
        label = f"graft {dtype_name(dtype)}"
        found.append(Variant(_graft_kernel, target, label, {**TABLES, **rest}, constants, tile.warps))
    return found


def _case(network: str, into_given: bool, count: int) -> Case:
    def make(device: torch.device) -> dict[str, Callable[[], object]]:
        net = Network.of(NETWORKS[network](), device)
        base, start, end = (net.draw(seed) for seed in range(3))
        scales = [(k + 1) / count for k in range(count)]
        out = graft(base, start, end, scales, net.indices, net.packing) if into_given else None

        def by_hand() -> dict[str, list[Tensor]]:
            result = {}
            for name, tensor in base.items():
                moved = net.moved(name, end[name] - start[name])
                result[name] = [tensor + scale * moved for scale in scales]
            return result

        return {
            OURS: lambda: graft(base, start, end, scales, net.indices, net.packing, out=out),
            BY_HAND: by_hand,
            COPY: copy_of(base, 3 + count, out=into_given),
        }

    name = f"graft, {network}, {count} scale{'s' * (count > 1)}{', out' * into_given}"
    return Case(name, make, (OURS, BY_HAND, COPY), bytes=(3 + count) * size(NETWORKS[network]()))


VARIANTS = each_family(_variants)
CASES = tuple(_case(*plan, count) for plan in PLANS for count in (1, 4))
