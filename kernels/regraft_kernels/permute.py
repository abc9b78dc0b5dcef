"""pi(theta): gather or scatter of every layer of a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from regraft_kernels.backend import resolve
from regraft_kernels.packing import Packing, Tensors, allocate

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


def row_blocks(matrix: Tensor) -> list[slice]:
    """Slices of about BLOCK_BYTES each that cover the rows (the first dimension) of a contiguous tensor."""
    rows = len(matrix)
    each = max(1, BLOCK_BYTES * rows // max(matrix.nbytes, 1))
    return [slice(start, min(start + each, rows)) for start in range(0, rows, each)]


def _permute_torch(
    tensors: Tensors, out: Tensors, indices: Mapping[str, Tensor], packing: Packing, inverse: bool
) -> None:
    device = next(iter(tensors.values())).device
    vectors = packing.vectors(indices, list(tensors), device, inverse=inverse)
    for name, tensor in tensors.items():
        segment = packing.segments[name]
        if not segment.size:
            continue
        rows, columns = vectors.of(segment.row_factors), vectors.of(segment.column_factors)
        shape = (segment.rows, segment.columns, segment.tail)
        if tensor.ndim == len(segment.shape):
            _gather_one(tensor.reshape(shape), out[name].view(shape), rows, columns)
            continue
        for source, result in zip(tensor.reshape(-1, *shape), out[name].view(-1, *shape), strict=True):
            _gather_one(source, result, rows, columns)


def _gather_one(source: Tensor, out: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
    """Fill `out` with the gathered rows and columns of `source`, both [rows, columns, tail]."""
    if columns is None and rows is None:
        out.copy_(source)
    elif columns is None:
        torch.index_select(source, 0, rows, out=out)
    else:
        for block in row_blocks(source):
            chosen = source[block] if rows is None else source.index_select(0, rows[block])
            torch.index_select(chosen, 1, columns, out=out[block])


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
    ones, or those of `out`, which must share no memory with what is read.

    Raises ValueError for names, shapes or devices that do not fit `packing`, and for index vectors that are
    missing or no permutations.
    """
    packing.check(tensors)
    if not tensors:
        return {}
    device = next(iter(tensors.values())).device
    chosen = resolve(backend, device)
    results = allocate({n: tuple(t.shape) for n, t in tensors.items()}, tensors, out, [tensors])
    {"torch": _permute_torch}[chosen](tensors, results, indices, packing, inverse)
    return results
