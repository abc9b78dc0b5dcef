"""One launch that gathers, transposes and pads all the stacks that a product cannot read where they stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from regraft_kernels.backend import tl, triton

# The columns of `copies`, int64: addresses; how many rows, entries of each, and from one row to the next; and for each
# of DIMS dimensions of the entries, the innermost first: its length, its stride, its index vector's address (0: none).
FROM, TO, ROWS_TO, ENTRIES, PITCH_TO, ROW_STRIDE, DIMENSIONS = map(tl.constexpr, range(7))
SIZE, STRIDE, INDEX, INDEX_STRIDE, DIM_COLUMNS = map(tl.constexpr, range(5))
DIMS = tl.constexpr(5)
"""More than the four that a convolution in three dimensions has with its steps, the units left out."""
COPY_COLUMNS = tl.constexpr(6 + 5 * 4)

TILE = (32, 64)
"""Rows and entries of a program."""


@triton.jit
def _collect_kernel(  # type: ignore[no-untyped-def]
    copies,  # int64 [copies, COPY_COLUMNS]
    tiles,  # int64 [programs, 3]: the copy, its first row, its first entry
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of one copy; what is beyond the entries of a row is zero."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    copy = copies + tl.load(tile) * COPY_COLUMNS
    i = tl.load(tile + 1) + tl.arange(0, ROWS)
    k = (tl.load(tile + 2) + tl.arange(0, COLUMNS)).to(tl.int32)
    entries = tl.load(copy + ENTRIES).to(tl.int32)
    pitch = tl.load(copy + PITCH_TO)
    rest = k
    place = tl.zeros((COLUMNS,), tl.int64)
    for d in tl.static_range(DIMS):
        dim = copy + DIMENSIONS + d * DIM_COLUMNS
        size = tl.load(dim + SIZE).to(tl.int32)
        digit = (rest % size).to(tl.int64)
        rest = rest // size
        index = tl.load(dim + INDEX)
        vector = index.to(tl.pointer_type(tl.int64))
        gathered = digit * 0 + index != 0
        taken = tl.load(vector + digit * tl.load(dim + INDEX_STRIDE), mask=(k < entries) & gathered, other=0)
        place += tl.where(gathered, taken, digit) * tl.load(dim + STRIDE)
    inside = (i < tl.load(copy + ROWS_TO))[:, None]
    source = tl.load(copy + FROM).to(tl.pointer_type(DTYPE))
    result = tl.load(copy + TO).to(tl.pointer_type(DTYPE))
    value = tl.load(
        source + (i * tl.load(copy + ROW_STRIDE))[:, None] + place[None, :],
        mask=inside & (k < entries)[None, :],
        other=0,
    )
    tl.store(result + (i * pitch)[:, None] + k[None, :], value, mask=inside & (k < pitch)[None, :])


@dataclass
class Copies:
    """The copies that one launch makes; the tensors that it writes and reads are kept until then."""

    rows: list[list[int]] = field(default_factory=list)
    tiles: list[np.ndarray] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

    def add(
        self, stack: Tensor, gathers: Sequence[Tensor | None], dim: int, order: Sequence[int], pitch: int
    ) -> Tensor:
        """The copy [positions of `dim`, pitch] that the launch will fill: the other dimensions in `order`, gathered."""
        dims = _merge_dims(stack, gathers, order)
        lengths = [size for size, *_ in dims]
        result = stack.new_empty((stack.shape[dim], pitch))
        numbers = [stack.data_ptr(), result.data_ptr(), len(result), math.prod(lengths), pitch, stack.stride(dim)]
        for size, stride, index in reversed(dims):
            numbers += [size, stride, *((0, 0) if index is None else (index.data_ptr(), index.stride(0)))]
        padding = DIMS.value - len(dims)
        if padding < 0:
            raise ValueError(
                f"a term has {len(dims)} dimensions besides its units that stand apart, at most {DIMS.value}"
            )
        self.rows.append([*numbers, *[1, 0, 0, 0] * padding])
        steps = [np.arange(0, length, each) for length, each in zip(result.shape, TILE, strict=True)]
        grid = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1).reshape(-1, 2)
        self.tiles.append(np.column_stack([np.full(len(grid), len(self.rows) - 1), grid]))
        self.tensors += [stack, result, *(index for *_, index in dims if index is not None)]
        return result

    def tables(self) -> list[np.ndarray]:
        """The two tables of the launch, int64."""
        return [np.array(self.rows, np.int64), np.concatenate(self.tiles).astype(np.int64)] if self.rows else []

    def launch(self, tables: Sequence[Tensor]) -> None:
        """Fill all copies, by the tables on the device."""
        if tables:
            copies, tiles = tables
            units = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
            unit = units[self.tensors[0].element_size()]
            _collect_kernel[(len(tiles),)](copies, tiles, DTYPE=unit, ROWS=TILE[0], COLUMNS=TILE[1])


def _merge_dims(
    stack: Tensor, gathers: Sequence[Tensor | None], order: Sequence[int]
) -> list[tuple[int, int, Tensor | None]]:
    """Length, stride and index vector of each dimension in `order`; neighbours that one stride serves are one."""
    dims: list[tuple[int, int, Tensor | None]] = []
    for d in order:
        index, size, stride = gathers[d], stack.shape[d], stack.stride(d)
        size = size if index is None else len(index)
        if size == 1 and index is None:
            continue
        if dims and index is None and dims[-1][2] is None and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride, None)
        else:
            dims.append((size, stride, index))
    return dims
