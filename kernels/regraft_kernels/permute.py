"""pi(theta): gather or scatter of every layer of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from regraft_kernels.backend import resolve, tl, triton, triton_dtype
from regraft_kernels.cases import (
    BY_HAND,
    COPY,
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
from regraft_kernels.packing import Packing, Tensors, addresses, allocate
from regraft_kernels.tiles import FAMILIES, family

BLOCK_BYTES = 512 << 10
"""The torch path moves a block of rows of this size at a time: what it gathers first is still in the cache."""


def permute_reference(
    tensors: Tensors, indices: Mapping[str, Tensor], packing: Packing, *, inverse: bool = False
) -> dict[str, Tensor]:
    """The definition of `permute`: one index_select per permuted axis."""
    moved = {}
    for name, tensor in tensors.items():
        lead = tensor.ndim - len(packing.shapes[name])
        moved[name] = tensor.clone()
        for axis, slot in enumerate(packing.axes[name]):
            if slot is not None:
                index = indices[slot].argsort() if inverse else indices[slot]
                moved[name] = moved[name].index_select(axis + lead, index)
    return moved


def row_blocks(matrix: Tensor | np.ndarray) -> list[slice]:
    """Slices of about BLOCK_BYTES each that cover the rows (the first dimension) of a tensor or an array."""
    rows = len(matrix)
    each = max(1, BLOCK_BYTES * rows // max(matrix.nbytes, 1))
    return [slice(start, min(start + each, rows)) for start in range(0, rows, each)]


class Scratch:
    """Memory for what is on its way, used again and again: new pages cost more than what is done in them."""

    def __init__(self) -> None:
        self._held: dict[torch.dtype, Tensor] = {}
        self._views: dict[tuple[torch.Size, torch.dtype], Tensor] = {}

    def like(self, block: Tensor, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of the block's shape, its contents arbitrary; the one given before is void."""
        key = block.shape, dtype
        if key not in self._views:
            size = block.numel()
            if dtype not in self._held or len(self._held[dtype]) < size:
                self._held[dtype] = torch.empty(size, dtype=dtype, device=block.device)
                self._views = {known: view for known, view in self._views.items() if known[1] != dtype}
            self._views[key] = self._held[dtype][:size].view(block.shape)
        return self._views[key]

    def rows(self, source: Tensor, rows: Tensor | None, block: slice) -> Tensor:
        """A block of the rows of `source` that `rows` gathers: in here, or in place where nothing is gathered."""
        here = source[block]
        if rows is None:
            return here
        return torch.index_select(source, 0, rows[block], out=self.like(here, source.dtype))


def _permute_torch(
    tensors: Tensors, out: Tensors, indices: Mapping[str, Tensor], packing: Packing, inverse: bool
) -> None:
    device = next(iter(tensors.values())).device
    vectors = packing.vectors(indices, list(tensors), device, inverse=inverse)
    scratch = Scratch()
    for name, tensor in tensors.items():
        segment = packing.segments[name]
        if not segment.size:
            continue
        rows, columns = vectors.of(segment.row_factors), vectors.of(segment.column_factors)
        shape = (segment.rows, segment.columns, segment.tail)
        if tensor.ndim == len(segment.shape):
            _gather_one(tensor.reshape(shape), out[name].view(shape), rows, columns, scratch)
            continue
        for source, result in zip(tensor.reshape(-1, *shape), out[name].view(-1, *shape), strict=True):
            _gather_one(source, result, rows, columns, scratch)


def _gather_one(
    source: Tensor, out: Tensor, rows: Tensor | None, columns: Tensor | None, scratch: Scratch
) -> None:
    """Fill `out` with the gathered rows and columns of `source`, both [rows, columns, tail]."""
    if columns is None and rows is None:
        out.copy_(source)
    elif columns is None:
        torch.index_select(source, 0, rows, out=out)
    else:
        for block in row_blocks(source):
            torch.index_select(scratch.rows(source, rows, block), 1, columns, out=out[block])


@triton.jit
def _permute_kernel(
    addresses,  # int64 [2, N]: of the sources, of the results
    count,  # N
    segments,  # int64 [N, 6]
    tiles,  # int64 [programs, 3]
    vectors,  # int64: the index vectors, one after the other
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of one tensor of one model: program (tile, model)."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    model = tl.program_id(1).to(tl.int64)
    number = tl.load(tile)
    segment = segments + number * 6
    rows, length, tail = tl.load(segment), tl.load(segment + 1), tl.load(segment + 2)
    row_vector, column_vector = tl.load(segment + 3), tl.load(segment + 4)
    start = model * tl.load(segment + 5)
    source = tl.load(addresses + number).to(tl.pointer_type(DTYPE)) + start
    result = tl.load(addresses + count + number).to(tl.pointer_type(DTYPE)) + start

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
    value = tl.load(source + from_i[:, None] * length + from_j[None, :], mask=inside)
    tl.store(result + i[:, None] * length + j[None, :], value, mask=inside)


def _permute_triton(
    tensors: Tensors, out: Tensors, indices: Mapping[str, Tensor], packing: Packing, inverse: bool
) -> None:
    """One launch, in units of the smallest element size; a second one where there are tensors of bytes."""
    first = next(iter(tensors.values()))
    device = first.device
    checked = packing.vectors(indices, list(tensors), device, inverse=inverse)
    for wide in (True, False):
        names = [name for name, t in tensors.items() if (t.element_size() > 1) == wide and t.numel()]
        if not names:
            continue
        unit = min(8, *(tensors[name].element_size() for name in names))
        widths = [tensors[name].element_size() // unit for name in names]
        tile = family(device).move
        table = packing.table(names, widths, tile, device)
        sources = [tensors[name].contiguous() for name in names]
        models = sources[0].numel() // packing.segments[names[0]].size
        _permute_kernel[len(table.tiles), models](
            addresses([sources, [out[name] for name in names]], device),
            len(names),
            table.segments,
            table.tiles,
            table.vectors(checked),
            DTYPE=triton_dtype({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[unit]),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
        )


@torch.no_grad()
def permute(
    tensors: Tensors,
    indices: Mapping[str, Tensor],
    packing: Packing,
    *,
    inverse: bool = False,
    backend: str = "auto",
    out: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Gather (or scatter, where `inverse`) every axis of every tensor: out[i, j, ...] = x[p[i], q[j], ...].

    `tensors` is name -> [*shape], or [B, *shape] for all, any dtype, and may lack tensors of the packing;
    `indices` slot -> int64 [length] on the same device. Returns contiguous tensors, exact to the bit: new
    ones, or those of `out`, which must share no memory with what is read. Gradients are not tracked.

    Raises ValueError for names, shapes or devices that do not fit `packing`, and for index vectors that are
    missing or no permutations.
    """
    packing.check(tensors)
    if not tensors:
        return {}
    device = next(iter(tensors.values())).device
    chosen = resolve(backend, device)
    results = allocate({n: tuple(t.shape) for n, t in tensors.items()}, tensors, out, [tensors])
    run = _permute_triton if chosen == "triton" else _permute_torch
    run(tensors, results, indices, packing, inverse)
    return results


# ---------------------------------------------------------------- what to compile, what to time


def _variants(target: str) -> list[Variant]:
    tile = FAMILIES[target].move
    signature = {**TABLES, "vectors": "*i64"}
    return [
        Variant(
            _permute_kernel,
            target,
            f"permute {dtype_name(dtype)}",
            signature,
            {"DTYPE": dtype, "ROWS": tile.rows, "COLUMNS": tile.columns},
            tile.warps,
        )
        for dtype in (torch.int8, torch.int16, torch.int32, torch.int64)
    ]


def _case(network: str, into_given: bool) -> Case:
    def make(device: torch.device) -> dict[str, Callable[[], object]]:
        net = Network.of(NETWORKS[network](), device)
        tensors = net.draw(0)
        out = net.draw(1) if into_given else None
        return {
            OURS: lambda: permute(tensors, net.indices, net.packing, out=out),
            BY_HAND: lambda: {name: net.moved(name, tensor) for name, tensor in tensors.items()},
            COPY: copy_of(tensors, 2, out=into_given),
        }

    name = f"permute, {network}{', out' * into_given}"
    return Case(name, make, (OURS, BY_HAND, COPY), bytes=2 * size(NETWORKS[network]()))


VARIANTS = each_family(_variants)
CASES = tuple(_case(*plan) for plan in PLANS)
