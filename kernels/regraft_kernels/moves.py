"""What permute and graft share: where a tile of a tensor stands, and where it is gathered from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft_kernels.backend import on, tl, triton, triton_dtype
from regraft_kernels.indices import GRID, Indices
from regraft_kernels.packing import Packing
from regraft_kernels.tables import (
    FIELDS,
    S_COLUMN_TABLE,
    S_LENGTH,
    S_ROW_TABLE,
    S_ROWS,
    S_SIZE,
    T_COLUMNS,
    T_ROWS,
    T_SEGMENT,
    TILE_FIELDS,
    Kind,
    Layout,
    lay_out,
    uploaded,
)
from regraft_kernels.tiles import Family, MoveTile, family

SIGNATURE = {
    "addresses": "*i64",
    "count": "i32",
    "segments": "*i64",
    "tiles": "*i32",
    "tables": "*i32",
    "entries": "i32",
    "programs": "i32",
    "moved": "fp32",
}
"""The types of the arguments that permute and graft share, for compiling ahead of time."""

RUN_TIME = ["count", "entries", "programs", "moved", "steps", "sources"]
"""Arguments of which a kernel is compiled once for all values."""


@triton.jit
def find_tile(
    tiles,
    segments,
    tables,
    VEC: tl.constexpr,
    GATHERED: tl.constexpr,
    SPAN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The tile of this program: its segment's number, rows, row length and size; its first row and column; where its
    rows come from (a table); and for each of its columns, relative to the first and to `origin`, whether it is inside
    the row and where it comes from. Row lengths are multiples of VEC; SPAN rows a program."""
    tile = tiles + tl.program_id(0) * TILE_FIELDS
    number = tl.load(tile + T_SEGMENT)
    segment = segments + number * FIELDS
    rows = tl.load(segment + S_ROWS).to(tl.int32)
    length = tl.multiple_of(tl.load(segment + S_LENGTH), VEC)
    size = tl.multiple_of(tl.load(segment + S_SIZE), VEC)
    first_row = tl.load(tile + T_ROWS) * SPAN
    first = tl.load(tile + T_COLUMNS).to(tl.int64) * COLUMNS
    j = tl.arange(0, COLUMNS)
    inside = j < tl.multiple_of(tl.minimum(length - first, COLUMNS).to(tl.int32), VEC)
    row_table = tables + tl.load(segment + S_ROW_TABLE)
    if GATHERED:
        from_j = tl.load(tables + tl.load(segment + S_COLUMN_TABLE) + first + j, mask=inside, other=0)
        origin = first * 0
    else:
        from_j = j
        origin = first
    return number, rows, length, size, first_row, first, row_table, origin, inside, from_j


@triton.jit
def pointer(addresses, DTYPE: tl.constexpr):
    """The tensor whose address stands there."""
    return tl.load(addresses).to(tl.pointer_type(DTYPE))


@triton.jit
def aligned(memory, offset, DTYPE: tl.constexpr, VEC: tl.constexpr):
    """memory + offset, which is at a multiple of VEC elements."""
    return tl.multiple_of(memory + offset, VEC * DTYPE.primitive_bitwidth // 8)


def launch_bytes(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    """For the profiler: the kernel's name and the bytes of tensors that a launch reads and writes."""
    return {"name": kernel.name, "bytes": args["moved"]}


def memory_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The same values, contiguous and as they stand in memory: a negative or conjugate view is no such thing."""
    return [
        tensor
        if tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj()
        else tensor.resolve_conj().resolve_neg().contiguous()
        for tensor in tensors
    ]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of a dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_device(numbers: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on the device, of this dtype, flat: one copy, and none where the same numbers are still there."""
    table = torch.tensor(numbers, dtype=dtype).flatten()
    padded = torch.zeros(-(-table.nbytes // 16) * 2, dtype=torch.int64)
    padded.view(dtype)[: len(table)] = table
    return uploaded(padded.numpy(), device).view(dtype)


def layout_of(
    packing: Packing,
    names: tuple[str, ...],
    kinds: tuple[tuple[torch.dtype, int], ...],
    pointers: np.ndarray,
    checked: Indices,
    device: torch.device,
) -> Layout:
    """The launches for these tensors; `kinds`: the dtype that moves each, and how many of it make an element;
    `pointers` [columns, tensors]. Kept for the next call that looks the same."""
    on_line = (pointers % 16 == 0).all(axis=0)
    key = names, kinds, on_line.tobytes(), len(pointers), tuple(checked.places.items()), device

    def span(kind: Kind) -> tuple[int, int]:
        tile = tile_of(family(device), kind, 1)
        return tile.rows * tile.repeat, tile.columns

    def make() -> Layout:
        return lay_out(
            [packing.segments[name] for name in names],
            [dtype for dtype, _ in kinds],
            [width for _, width in kinds],
            on_line.tolist(),
            len(pointers),
            span,
            checked.places,
            device,
        )

    return packing.layouts.get(key, make)


def launch_moves(
    kernel: Any,
    layout: Layout,
    pointers: np.ndarray,
    checked: Indices,
    programs: int,
    live: int,
    extra: Callable[[torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]],
) -> None:
    """Launch each part of a layout, for so many models or targets.

    `live`: see `tile_of`. `extra`: what else the kernel takes for a dtype, its arguments and its compile-time ones.
    """
    device = checked.joined.device
    buffer = uploaded(pointers.ravel()[layout.order], device)
    with on(device):
        tables = checked.tables(layout.recipe, layout)
        for launch in layout.launches:
            kind = launch.kind
            arguments, constants = extra(kind.dtype)
            tile = tile_of(family(device), kind, live)
            kernel[len(launch.tiles), min(programs, GRID)](
                buffer[launch.start : launch.end],
                launch.count,
                launch.segments,
                launch.tiles,
                tables,
                tables.shape[1],
                programs,
                float(programs * len(pointers) * launch.size * kind.dtype.itemsize),
                *arguments,
                DTYPE=triton_dtype(kind.dtype),
                **constants,
                **shape_of(tile, kind),
                num_warps=tile.warps,
            )


def tile_of(tiles: Family, kind: Kind, live: int) -> MoveTile:
    """The tile that moves a kind, where a kernel has so many values of each element in registers at a time."""
    tile = tiles.gather if kind.gathered else tiles.move
    return tile.lower(live if kind.aligned else 2 * live)


def shape_of(tile: MoveTile, kind: Kind) -> dict[str, Any]:
    """The compile-time arguments that say how a kind is moved."""
    return {
        "VEC": kind.vector,
        "GATHERED": kind.gathered,
        "ROWS": tile.rows,
        "SPAN": tile.rows * tile.repeat,
        "COLUMNS": tile.columns,
    }
