"""What the kernels read to find their way: one launch for all tensors of a kind, whatever their number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from regraft_kernels.backend import Recent, tl
from regraft_kernels.indices import Factors, recipe_of

if TYPE_CHECKING:
    from regraft_kernels.packing import Segment

ALIGNMENT = 16
"""Bytes that one instruction can move: addresses and row lengths that are its multiples have variants of their own."""

FIELDS = tl.constexpr(5)
"""Columns of a segment table, int64: a tensor as [rows, length]; its size; where its gather tables start."""
S_ROWS, S_LENGTH, S_SIZE, S_ROW_TABLE, S_COLUMN_TABLE = (tl.constexpr(n) for n in range(5))

TILE_FIELDS = tl.constexpr(3)
"""Columns of a tile table, int32: the segment, and which block of its rows and of its columns."""
T_SEGMENT, T_ROWS, T_COLUMNS = (tl.constexpr(n) for n in range(3))

FOLD = 1024
"""What nothing gathers is moved as rows of up to so many elements, so that a tile has work for all its rows."""

LIMIT = 2**31
"""Offsets inside a row, and numbers of rows, are int32."""


@dataclass(frozen=True)
class Kind:
    """What one launch is compiled for: the dtype it moves or computes in, and whether columns are gathered and all
    addresses and row lengths are multiples of ALIGNMENT."""

    dtype: torch.dtype
    gathered: bool
    aligned: bool

    @property
    def label(self) -> str:
        """ "float32 columns aligned"."""
        return f"{str(self.dtype).removeprefix('torch.')} {'columns' if self.gathered else 'rows'} {self.alignment}"

    @property
    def alignment(self) -> str:
        return "aligned" if self.aligned else "general"

    @property
    def vector(self) -> int:
        """Elements that stand together and aligned."""
        return ALIGNMENT // self.dtype.itemsize if self.aligned else 1


@dataclass(frozen=True)
class Launch:
    """Segments [N, FIELDS] and tiles [programs, TILE_FIELDS] of one kind, on the device; `size`: elements of all.

    `start`, `end`: where its addresses stand in the buffer of the whole call.
    """

    kind: Kind
    segments: Tensor
    tiles: Tensor
    size: int
    start: int
    end: int

    @property
    def count(self) -> int:
        return len(self.segments)


@dataclass(frozen=True, eq=False)
class Layout:
    """The launches of a call; `order` brings the addresses [columns, tensors], flat, to the order of the launches.

    `recipe`: how the gather tables that the segments point into are composed, on the device.
    """

    launches: tuple[Launch, ...]
    order: np.ndarray
    recipe: Tensor


def lay_out(
    segments: Sequence[Segment],
    dtypes: Sequence[torch.dtype],
    widths: Sequence[int],
    aligned: Sequence[bool],
    columns: int,
    tiles: Callable[[Kind], tuple[int, int]],
    places: Mapping[str, tuple[int, int]],
    device: torch.device,
    *,
    fold: bool = True,
) -> Layout:
    """Sort tensors into launches and lay tiles over them, in Python integers, beyond 2^31 elements.

    `dtypes`: what a kernel moves; `widths`: how many of these make an element of the tensor; `columns`: how many
    addresses each tensor has; `tiles`: rows and columns of a program's work, by kind; `fold`: as FOLD says. Raises
    ValueError, naming the tensor, where a row that is gathered, or the number of rows, exceeds LIMIT.
    """
    members: dict[Kind, list[int]] = {}
    for number, (segment, dtype, width, on_line) in enumerate(
        zip(segments, dtypes, widths, aligned, strict=True)
    ):
        if segment.size:
            length = _as_matrix(segment, width, fold)[1]
            whole = on_line and length * dtype.itemsize % ALIGNMENT == 0
            members.setdefault(Kind(dtype, bool(segment.column_factors), whole), []).append(number)
    tables: dict[tuple[Factors, int], int] = {}
    filled = 0
    launches, order, start = [], [], 0
    for kind, numbers in members.items():
        rows_each, columns_each = tiles(kind)
        table, grids, size = [], [], 0
        for place, number in enumerate(numbers):
            segment, width = segments[number], widths[number]
            rows, length = _as_matrix(segment, width, fold)
            if rows >= LIMIT or (kind.gathered and length >= LIMIT):
                raise ValueError(f"{segment.name!r} has {rows} rows of {length}, beyond what a kernel counts")
            starts = []
            row_key = (segment.row_factors or ((rows, None),), 1)
            for key in (row_key, (segment.column_factors, segment.tail * width)):
                if key[0] and key not in tables:
                    tables[key] = filled
                    filled += math.prod(n for n, _ in key[0]) * key[1]
                starts.append(tables.get(key, 0))
            table.append((rows, length, segment.size * width, *starts))
            grid = np.indices((-(-rows // rows_each), -(-length // columns_each)), np.int32).reshape(2, -1)
            grids.append(np.column_stack([np.full(grid.shape[1], place, np.int32), *grid]))
            size += segment.size * width
        block = np.arange(columns)[:, None] * len(segments) + np.array(numbers)
        padding = block.size % 2  # so that every launch's addresses start at a multiple of 16 bytes
        order.append(np.concatenate([block.ravel(), block.ravel()[:padding]]))
        launches.append(
            Launch(
                kind,
                torch.tensor(table, dtype=torch.int64).to(device),
                torch.from_numpy(np.concatenate(grids)).to(device),
                size,
                start,
                start + block.size,
            )
        )
        start += block.size + padding
    recipe = torch.from_numpy(recipe_of(list(tables), places)).to(device)
    return Layout(tuple(launches), np.concatenate([np.zeros(0, np.int64), *order]), recipe)


def _as_matrix(segment: Segment, width: int, fold: bool) -> tuple[int, int]:
    """Rows and their length; what nothing gathers is folded."""
    length = segment.columns * segment.tail * width
    if not fold or segment.row_factors or segment.column_factors or segment.rows > 1:
        return segment.rows, length
    folded = math.gcd(length, FOLD)
    return (length // folded, folded) if folded * 8 >= FOLD else (1, length)


_UPLOADED: Recent[tuple[int, Tensor]] = Recent(64)
_CAPTURED: list[Tensor] = []
"""What captured graphs read: a few kilobytes for each captured call, for as long as the process lives."""


def uploaded(numbers: np.ndarray, device: torch.device) -> Tensor:
    """int64 numbers on the device: one copy, and none where the same numbers are still there.

    While a CUDA graph captures nothing can be copied: raises RuntimeError unless the same call was made before.
    """
    if device.type != "cuda":
        return torch.from_numpy(numbers)
    key = numbers.tobytes(), device
    if torch.cuda.is_current_stream_capturing():
        if key not in _UPLOADED:
            raise RuntimeError(
                "call it once with the same tensors, and `out`, before a CUDA graph captures it"
            )
        table = _UPLOADED.get(key, lambda: (0, torch.empty(0)))[1]
        _CAPTURED.append(table)
        return table
    stream = torch.cuda.current_stream(device).cuda_stream

    def copy() -> tuple[int, Tensor]:
        return stream, torch.from_numpy(numbers).pin_memory().to(device, non_blocking=True)

    owner, table = _UPLOADED.get(key, copy)
    # A copy on another stream may still be on its way.
    return table if owner == stream else copy()[1]
