"""sum_i c_ki theta_i, for many rows k of coefficients: the fusion grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

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
from regraft_kernels.permute import row_blocks
from regraft_kernels.tiles import FAMILIES, MoveTile, family


def combine_reference(sources: Sequence[Tensors], coefficients: Tensor) -> dict[str, Tensor]:
    """The definition of `combine`: scale and add, source by source."""
    out = {}
    for name, first in sources[0].items():
        if not first.is_floating_point():
            out[name] = first.repeat(len(coefficients), *(1,) * first.ndim)
            continue
        wide = torch.promote_types(first.dtype, torch.float32)
        total = torch.zeros((len(coefficients), *first.shape), dtype=wide, device=first.device)
        for source, column in zip(sources, coefficients.to(first.device, wide).T, strict=True):
            total += column.reshape(-1, *(1,) * first.ndim) * source[name].to(wide)
        out[name] = total.to(first.dtype)
    return out


SMALL = 1 << 14
"""Up to so many elements, the number of calls costs more than the passes over memory."""


def _combine_torch(sources: Sequence[Tensors], coefficients: Tensor, out: Tensors) -> None:
    """Block by block, so that each source is read from memory once for all K results."""
    table = coefficients.tolist()
    for name, first in sources[0].items():
        tensors, results = [source[name] for source in sources], out[name]
        if first.numel() <= SMALL:
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
    done = 1
    if len(parts) > 1 and coefficients[0] != 0 and out.ndim == 1 and out.numel() > SMALL:
        # a x + b y in one pass over memory, where mul and add_ take two; but a = 0 would hide a NaN in x.
        one = parts[1].new_ones(1)
        torch.addr(
            parts[0].unsqueeze(0),
            one,
            parts[1],
            beta=coefficients[0],
            alpha=coefficients[1],
            out=out.unsqueeze(0),
        )
        done = 2
    else:
        torch.mul(parts[0], coefficients[0], out=out)
    for coefficient, part in zip(coefficients[done:], parts[done:], strict=True):
        out.add_(part, alpha=coefficient)
    return out


@triton.jit
def _combine_kernel(
    addresses,  # int64 [m + 1, N]: of the sources, of the results
    count,  # N
    segments,  # int64 [N, 6]
    tiles,  # int64 [programs, 3]
    coefficients,  # [K, m], of the dtype of the arithmetic
    steps,  # K
    sources,  # m
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one tensor, all K results of it: after the first, the sources come from the cache."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    number = tl.load(tile)
    size = tl.load(segments + number * 6 + 5)
    here = tl.load(tile + 2) + tl.arange(0, BLOCK)
    inside = here < size
    result = tl.load(addresses + sources * count + number).to(tl.pointer_type(DTYPE))
    for k in range(steps):
        total = tl.zeros((BLOCK,), WIDE)
        for s in range(sources):
            source = tl.load(addresses + s * count + number).to(tl.pointer_type(DTYPE))
            value = tl.load(source + here, mask=inside).to(WIDE)
            total += tl.load(coefficients + k * sources + s) * value
        tl.store(result + k * size + here, total.to(DTYPE), mask=inside)


@cache
def _flat_packing(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> Packing:
    return Packing.build(dict(shapes))


def _combine_triton(sources: Sequence[Tensors], coefficients: Tensor, out: Tensors) -> None:
    """One launch for each dtype among the tensors."""
    first = sources[0]
    device = next(iter(first.values())).device
    packing = _flat_packing(tuple((name, tuple(tensor.shape)) for name, tensor in first.items()))
    tile = family(device).flat
    for dtype in dict.fromkeys(tensor.dtype for tensor in first.values()):
        names = [name for name, tensor in first.items() if tensor.dtype == dtype and tensor.numel()]
        if not names:
            continue
        wide = torch.promote_types(dtype, torch.float32)
        table = packing.table(names, [1] * len(names), MoveTile(1, tile.block, tile.warps), device)
        columns = [[tensors[name].contiguous() for name in names] for tensors in (*sources, out)]
        _combine_kernel[(len(table.tiles),)](
            addresses(columns, device),
            len(names),
            table.segments,
            table.tiles,
            coefficients.to(device, wide).contiguous(),
            len(coefficients),
            len(sources),
            DTYPE=triton_dtype(dtype),
            WIDE=triton_dtype(wide),
            BLOCK=tile.block,
            num_warps=tile.warps,
        )


@torch.no_grad()
def combine(
    sources: Sequence[Tensors],
    coefficients: Tensor | Sequence[Sequence[float]],
    *,
    backend: str = "auto",
    out: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """K parameter sets sum_i coefficients[k][i] * sources[i], as name -> [K, *shape].

    `sources`: m dictionaries with the same names, shapes, dtypes and devices; `coefficients` [K, m], finite.
    Arithmetic is in float32 (float64 for float64 tensors). A tensor that is not floating is copied from the
    first source, K times. The result is new, or that of `out`, which must share no memory with what is read.

    Gradients are not tracked.

    Raises ValueError for no source, sources that differ, or coefficients of another shape or not finite.
    """
    if not sources:
        raise ValueError("combine needs at least one source")
    table = torch.as_tensor(coefficients, dtype=torch.float64)
    if table.numel() == 0 and table.ndim < 2:
        table = table.reshape(0, len(sources))
    if table.ndim != 2 or table.shape[1] != len(sources):
        raise ValueError(f"coefficients have shape {tuple(table.shape)}, expected (K, {len(sources)})")
    if not table.isfinite().all():
        raise ValueError("coefficients must be finite")
    _check_sources(sources)
    check_real(sources[0], "sources")
    first = sources[0]
    if not first:
        return {}
    chosen = resolve(backend, next(iter(first.values())).device)
    shapes = {name: (len(table), *tensor.shape) for name, tensor in first.items()}
    results = allocate(shapes, first, out, sources)
    floating = [name for name in first if first[name].is_floating_point()]
    for name in first.keys() - set(floating):
        results[name].copy_(first[name].expand(shapes[name]))
    if floating and len(table):
        used = [{name: source[name] for name in floating} for source in sources]
        run = _combine_triton if chosen == "triton" else _combine_torch
        run(used, table, results)
    return results


def _check_sources(sources: Sequence[Tensors]) -> None:
    first = sources[0]
    device = next((t.device for t in first.values()), None)
    for number, source in enumerate(sources):
        if source.keys() != first.keys():
            different = ", ".join(sorted(source.keys() ^ first.keys()))
            raise ValueError(f"source {number} and source 0 differ in {different}")
        for name, tensor in source.items():
            if tensor.device != device:
                raise ValueError(f"{name!r} of source {number} is on {tensor.device}, not on {device}")
            if tensor.shape != first[name].shape:
                shapes = f"{tuple(tensor.shape)} in source {number}, {tuple(first[name].shape)} in source 0"
                raise ValueError(f"{name!r}: shape is {shapes}")
            if tensor.dtype != first[name].dtype:
                raise ValueError(
                    f"{name!r}: dtype is {tensor.dtype} in source {number}, {first[name].dtype} in source 0"
                )


# ---------------------------------------------------------------- what to compile, what to time


def _variants(target: str) -> list[Variant]:
    found, tile = [], FAMILIES[target].flat
    for dtype in FLOATING:
        wide = torch.promote_types(dtype, torch.float32)
        pointer = "*fp64" if wide == torch.float64 else "*fp32"
        signature = {**TABLES, "coefficients": pointer, "steps": "i32", "sources": "i32"}
        constants = {"DTYPE": dtype, "WIDE": wide, "BLOCK": tile.block}
        label = f"combine {dtype_name(dtype)}"
        found.append(Variant(_combine_kernel, target, label, signature, constants, tile.warps))
    return found


def _case(network: str, into_given: bool, count: int) -> Case:
    def make(device: torch.device) -> dict[str, Callable[[], object]]:
        net = Network.of(NETWORKS[network](), device)
        a, b = net.draw(0), net.draw(1)
        table = [[0.1 * k + 0.5, 0.5 - 0.1 * k] for k in range(count)]
        out = combine([a, b], table) if into_given else None
        return {
            OURS: lambda: combine([a, b], table, out=out),
            BY_HAND: lambda: {name: [x * a[name] + y * b[name] for x, y in table] for name in a},
            COPY: copy_of(a, 2 + count, out=into_given),
        }

    name = f"combine, {network}, 2 sources, {count} result{'s' * (count > 1)}{', out' * into_given}"
    return Case(name, make, (OURS, BY_HAND, COPY), bytes=(2 + count) * size(NETWORKS[network]()))


VARIANTS = each_family(_variants)
CASES = tuple(_case(*plan, count) for plan in PLANS for count in (1, 4))
