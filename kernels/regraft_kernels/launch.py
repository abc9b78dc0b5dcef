"""How a kernel is launched: tiles for each GPU family, and what permute and graft share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from regraft_kernels.backend import resolve, tl, triton, triton_dtype, use_device
from regraft_kernels.indices import GRID, Indices
from regraft_kernels.memory import ALIGNMENT, upload_words
from regraft_kernels.packing import (
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
    Layout,
    MoveKind,
    Packing,
    Piece,
    lay_out,
)


@dataclass(frozen=True)
class MoveTile:
    """A program of permute and graft: `repeat` times rows x columns, one below the other; a column is an element."""

    rows: int
    columns: int
    repeat: int
    warps: int

    @property
    def size(self) -> int:
        """Elements that a program moves."""
        return self.rows * self.repeat * self.columns

    def in_steps(self, times: int) -> MoveTile:
        """The same work in more steps of fewer rows, which takes fewer registers."""
        times = min(times, self.rows)
        return MoveTile(self.rows // times, self.columns, self.repeat * times, self.warps)

    def for_size(self, itemsize: int) -> MoveTile:
        """The same tile for elements of so many bytes, where it is one for four: 16 bytes a thread and step."""
        return replace(self, warps=max(1, self.warps * itemsize // 4))


@dataclass(frozen=True)
class FlatTile:
    """A tile of combine: `block` consecutive elements."""

    block: int
    warps: int


@dataclass(frozen=True)
class DotTile:
    """A tile of similarity: m x n of the result, k at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class DeviceFamily:
    """The tiles of one GPU family: `move` for rows as they stand, `gather` for gathered columns, from narrow to wide;
    `dot` by precision, from small to large, where "half" stands for bf16 and fp16; `substitutes` names what is
    multiplied instead where the hardware lacks a precision: never a lesser one."""

    name: str
    move: MoveTile
    gather: tuple[MoveTile, ...]
    flat: FlatTile
    dot: Mapping[str, tuple[DotTile, ...]]
    substitutes: dict[str, str] = field(default_factory=dict)


_AMPERE_DOT = {
    "half": (DotTile(64, 64, 64, 4, 3), DotTile(128, 128, 32, 8, 4)),
    "tf32": (DotTile(64, 64, 32, 4, 3), DotTile(128, 128, 32, 8, 3)),
    "tf32x3": (DotTile(64, 64, 32, 4, 3), DotTile(128, 64, 32, 8, 3)),
    "ieee": (DotTile(32, 32, 32, 4, 3), DotTile(64, 64, 16, 4, 3)),
}
_HOPPER_DOT = {
    "half": (DotTile(64, 64, 64, 4, 4), DotTile(128, 128, 64, 8, 3), DotTile(128, 256, 64, 8, 3)),
    "tf32": (DotTile(64, 64, 32, 4, 4), DotTile(128, 128, 32, 8, 3), DotTile(128, 256, 32, 8, 3)),
    # Its operands are split in registers, where no product overlaps the next: so two blocks a multiprocessor overlap.
    "tf32x3": (DotTile(64, 64, 32, 4, 4), DotTile(64, 128, 32, 4, 3)),
    "ieee": (DotTile(32, 32, 32, 4, 3), DotTile(64, 64, 16, 4, 3)),
}
_BLACKWELL_DOT = {**_HOPPER_DOT, "tf32x3": (DotTile(128, 64, 32, 8, 3), DotTile(128, 128, 32, 8, 4))}
_CDNA3_DOT = {
    "half": (DotTile(64, 64, 64, 4, 2), DotTile(128, 128, 64, 8, 2)),
    "tf32": (DotTile(64, 64, 32, 4, 2), DotTile(128, 128, 32, 8, 2)),
    "ieee": (DotTile(64, 64, 16, 4, 2), DotTile(128, 64, 16, 8, 2)),
}

MOVE, FLAT = MoveTile(8, 512, 4, 4), FlatTile(2048, 4)
# A narrow tile of a long row reads nearly every 32-byte sector of it for a few entries of each: with 128 columns
# ResNet-50 fetches 3.4 times its bytes from the second-level cache and ViT-B/16 5.5 times, with 1024 1.4 and 1.7 times.
GATHER = (MoveTile(2, 256, 16, 4), MoveTile(1, 1024, 8, 8))

# Chosen so that nothing spills (results/micro/tables.md); not yet tuned by measurement on any GPU.
FAMILIES = {
    "sm_80": DeviceFamily("sm_80", MOVE, GATHER, FLAT, _AMPERE_DOT),
    "sm_90": DeviceFamily("sm_90", MOVE, GATHER, FLAT, _HOPPER_DOT),
    "sm_100": DeviceFamily("sm_100", MOVE, GATHER, FLAT, _BLACKWELL_DOT),
    # Blackwell without the matrix units of sm_100, and with less shared memory: what fits Ampere spills nothing here.
    "sm_120": DeviceFamily("sm_120", MOVE, GATHER, FlatTile(1024, 4), _AMPERE_DOT),
    "gfx942": DeviceFamily("gfx942", MOVE, GATHER, FLAT, _CDNA3_DOT, {"tf32x3": "ieee"}),
}
INTERPRETER = DeviceFamily(
    "interpreter",
    MoveTile(2, 16, 2, 1),
    (MoveTile(2, 4, 2, 1), MoveTile(1, 8, 4, 1)),
    FlatTile(32, 1),
    {p: (DotTile(16, 16, 16, 1, 1),) for p in ("half", "tf32", "tf32x3", "ieee")},
)
"""Small tiles for Triton's interpreter, so that small tests cross their borders."""


_TUNED: dict[torch.device, DeviceFamily] = {}


def use_tiles(device: torch.device, tiles: DeviceFamily | None) -> None:
    """Launch by these tiles on a device (one with an index) from now on; None: by those of the table again."""
    if tiles is None:
        _TUNED.pop(device, None)
    else:
        _TUNED[device] = tiles


def device_family(device: torch.device) -> DeviceFamily:
    """The tiles for a device; those of the nearest older NVIDIA family where there are none of its own."""
    return _TUNED.get(device) or _family_in_table(device)


@cache
def _family_in_table(device: torch.device) -> DeviceFamily:
    if device.type != "cuda":
        return INTERPRETER
    if torch.version.hip:
        return FAMILIES["gfx942"]
    major, _ = torch.cuda.get_device_capability(device)
    return FAMILIES["sm_120" if major >= 12 else "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"]


@cache
def has_matrix_units(device: torch.device) -> bool:
    """Whether Triton's products use matrix units: on NVIDIA's GPUs before Ampere they do not, and spill."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def resolve_products(backend: str, stack: torch.Tensor) -> str:
    """Which implementation multiplies such stacks: torch where they are float64, whose own product is as fast as a
    matrix unit allows, and on a GPU whose matrix units Triton does not use."""
    chosen = resolve(backend, stack.device)
    if stack.dtype == torch.float64:
        reason = "multiplies float32, bfloat16 and float16, not float64"
    elif not has_matrix_units(stack.device):
        reason = "multiplies on GPUs of compute capability 8.0 or later"
    else:
        return chosen
    if backend == "triton":
        raise ValueError(f"backend 'triton' {reason}")
    return "torch"


def choose_dot(tiles: DeviceFamily, dtype: torch.dtype, precision: str, units: int) -> tuple[DotTile, str]:
    """The tile of similarity for inputs of `dtype` and groups of `units`, the largest of which two stand side by side;
    and the precision to multiply in."""
    precision = "ieee" if dtype != torch.float32 else tiles.substitutes.get(precision, precision)
    kind = "half" if dtype != torch.float32 else precision
    small, *larger = tiles.dot[kind]
    return next((tile for tile in reversed(larger) if 2 * tile.n <= units), small), precision


# ---------------------------------------------------------------- moves

RUN_TIME = ["count", "entries", "programs", "moved", "steps", "sources"]
"""Arguments of which a kernel is compiled once for all values."""


@triton.jit
def find_tile(  # type: ignore[no-untyped-def]
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
def tensor_pointer(addresses, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tensor whose address stands there."""
    return tl.load(addresses).to(tl.pointer_type(DTYPE))


@triton.jit
def vector_pointer(memory, offset, DTYPE: tl.constexpr, VEC: tl.constexpr):  # type: ignore[no-untyped-def]
    """memory + offset, which is at a multiple of VEC elements."""
    return tl.multiple_of(memory + offset, VEC * DTYPE.primitive_bitwidth // 8)


def launch_bytes(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    """For the profiler: the kernel's name and the bytes of tensors that a launch reads and writes."""
    return {"name": kernel.name, "bytes": args["moved"]}


def layout_of(
    packing: Packing,
    names: tuple[str, ...],
    units: tuple[tuple[torch.dtype, int], ...],
    pointers: np.ndarray,
    indices: Indices,
) -> Layout:
    """The launches for these tensors; `units`: the dtype that moves each, and how many of it make an element;
    `pointers` [columns, tensors]. Kept for the next call that looks the same."""
    aligned16, device = (pointers % ALIGNMENT == 0).all(axis=0), indices.joined.device
    tiles = device_family(device)
    key = (
        names,
        units,
        aligned16.tobytes(),
        len(pointers),
        tuple(indices.places.items()),
        device,
        tiles.move,
        tiles.gather,
    )

    def tile_shape(kind: MoveKind, longest: int) -> tuple[int, int]:
        tile = tile_of(tiles, kind, longest, 1)
        return tile.rows * tile.repeat, tile.columns

    def make() -> Layout:
        parts = zip(names, units, aligned16.tolist(), strict=True)
        pieces = [Piece(packing.segments[name], *unit, is_aligned) for name, unit, is_aligned in parts]
        return lay_out(pieces, len(pointers), tile_shape, indices.places, device)

    return packing.layouts.get(key, make)


def prepare_moves(
    kernel: Any,
    layout: Layout,
    pointers: np.ndarray,
    indices: Indices,
    programs: int,
    live_values: int,
    extra: Callable[[torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]],
) -> list[Callable[[], object]]:
    """The launches of a layout, for so many models or targets.

    `live_values`: see `tile_of`. `extra`: what else the kernel takes for a dtype, its arguments and its compile-time
    ones.
    """
    device = indices.joined.device
    buffer = upload_words(pointers.ravel()[layout.order], device)
    with use_device(device):
        tables = indices.compose_tables(layout.gather_table, layout)
    launches: list[Callable[[], object]] = []
    for launch in layout.launches:
        kind = launch.kind
        arguments, constants = extra(kind.dtype)
        tile = tile_of(device_family(device), kind, launch.longest, live_values)
        prepared = partial(
            kernel[len(launch.tiles), min(programs, GRID)],
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
        launches.append(prepared)
    return launches


def tile_of(tiles: DeviceFamily, kind: MoveKind, longest: int, live_values: int) -> MoveTile:
    """The tile that moves a kind with rows of up to `longest`, where a kernel has so many values of each element in
    registers at a time. However many they are, the tile covers the same elements."""
    if kind.gathered:
        wide = next((tile for tile in tiles.gather if longest <= tile.columns), tiles.gather[-1])
        return wide.for_size(kind.dtype.itemsize)
    steps = live_values if kind.aligned16 else 2 * live_values
    return tiles.move.in_steps(max(steps, 2 // kind.dtype.itemsize))  # bytes in half the rows: nothing spills


def shape_of(tile: MoveTile, kind: MoveKind) -> dict[str, Any]:
    """The compile-time arguments that say how a kind is moved."""
    return {
        "VEC": kind.vector,
        "GATHERED": kind.gathered,
        "ROWS": tile.rows,
        "SPAN": tile.rows * tile.repeat,
        "COLUMNS": tile.columns,
    }
