"""The tensors of a whole model as tables, so that one launch serves all of them, whatever their number."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from regraft_kernels.backend import resolve, tl
from regraft_kernels.indices import Factors, Indices, build_gather_table
from regraft_kernels.memory import ALIGNMENT, LRUCache, group_small

Tensors = Mapping[str, Tensor]

LONG_TAIL = 128
"""From this many contiguous elements on, a run is worth a table row of its own."""


@dataclass(frozen=True)
class Segment:
    """One tensor as [rows, columns, tail], the tail contiguous; rows and columns are each gathered by one
    index vector, or by none (an empty tuple of factors)."""

    name: str
    shape: tuple[int, ...]
    offset: int
    rows: int
    columns: int
    tail: int
    row_factors: Factors
    column_factors: Factors
    layout: int = 0
    """The same number for tensors of one shape whose axes are gathered by the same vectors."""

    @property
    def size(self) -> int:
        return self.rows * self.columns * self.tail


@dataclass(frozen=True)
class Packing:
    """Shapes, and the slot that permutes each axis, of the tensors of a model; built once and reused.

    `shapes` is name -> shape, `axes` name -> one slot or None per axis, `slots` slot -> length of its index
    vector. `segments` is name -> Segment; offsets count elements in a buffer that holds the tensors one
    after the other, and are Python integers: they do not overflow at 2^31.
    """

    shapes: dict[str, tuple[int, ...]]
    axes: dict[str, tuple[str | None, ...]]
    slots: dict[str, int]
    segments: dict[str, Segment]
    layouts: LRUCache[Layout] = field(default_factory=lambda: LRUCache(16), repr=False, compare=False)
    _needed: LRUCache[dict[str, int]] = field(default_factory=lambda: LRUCache(64), repr=False, compare=False)
    _small: LRUCache[list[list[str]]] = field(default_factory=lambda: LRUCache(64), repr=False, compare=False)

    @staticmethod
    def build(shapes: Mapping[str, Sequence[int]], axes: Mapping[str, Sequence[str | None]] | None = None) -> Packing:
        """Lay out tensors of these shapes. A name that is absent from `axes` is copied through.

        Raises ValueError, naming the tensor, where `axes` has a name that `shapes` lacks, not one entry per
        dimension, or two lengths for one slot.
        """
        axes = {} if axes is None else axes
        unknown = sorted(set(axes) - set(shapes))
        if unknown:
            raise ValueError(f"axes name tensors without a shape: {', '.join(unknown)}")
        fixed_shapes = {name: tuple(int(n) for n in shape) for name, shape in shapes.items()}
        fixed_axes = {
            name: tuple(axes[name]) if name in axes else (None,) * len(shape) for name, shape in fixed_shapes.items()
        }
        slots = _slot_lengths(fixed_shapes, fixed_axes)
        segments, offset = {}, 0
        layouts: dict[Hashable, int] = {}
        for name, shape in fixed_shapes.items():
            layout = layouts.setdefault((shape, fixed_axes[name]), len(layouts))
            segments[name] = replace(_segment(name, shape, fixed_axes[name], offset), layout=layout)
            offset += segments[name].size
        return Packing(fixed_shapes, fixed_axes, slots, segments)

    def check(self, tensors: Tensors, what: str = "tensors") -> tuple[int, ...]:
        """The leading batch dimension of `tensors`: () or (B,).

        Any subset of the packing's names may be given. Raises ValueError, naming the tensor, for a name or
        a shape that does not fit, for tensors of which only some have a batch, and for mixed devices.
        """
        if not tensors:
            return ()
        device, shapes = next(iter(tensors.values())).device, self.shapes
        for name, tensor in tensors.items():
            shape = shapes.get(name)
            # The number of dimensions first: under a tracer, comparing lengths says something about a batch's.
            if shape is None or tensor.ndim != len(shape) or tensor.shape != shape or tensor.device != device:
                break
        else:
            return ()
        batch: tuple[int, ...] | None = None
        for name, tensor in tensors.items():
            if name not in shapes:
                raise ValueError(f"{what}: {name!r} is not in the packing")
            shape = shapes[name]
            lead = tuple(tensor.shape[: max(0, tensor.ndim - len(shape))])
            if tuple(tensor.shape[len(lead) :]) != shape or len(lead) > 1:
                raise ValueError(
                    f"{what}: {name!r} has shape {tuple(tensor.shape)}, expected {shape} "
                    "or that with one leading batch dimension"
                )
            if batch is not None and lead != batch:
                raise ValueError(f"{what}: {name!r} has leading dimensions {lead}, the others {batch}")
            if tensor.device != device:
                raise ValueError(f"{what}: {name!r} is on {tensor.device}, the others on {device}")
            batch = lead
        return () if batch is None else batch

    def prepare(
        self,
        indices: Mapping[str, Tensor],
        *,
        inverse: bool = False,
        targets: int | None = None,
        backend: str = "auto",
    ) -> Indices:
        """Check index vectors once, to be given to `permute` or `graft` many times in place of the dictionary.

        `indices`: slot -> int64 [length], or [targets, length] where `targets` is given, on one device; only
        tensors whose slots are there can be moved. What `inverse` says here holds for every use. Waits for the
        device, and raises ValueError, naming the slot, as the operations do. Prepared indices are what a CUDA
        graph can capture: call the operation once with the same tensors and `out`, then capture the same call.
        """
        if not indices:
            raise ValueError("indices: there are none to prepare")
        unknown = sorted(indices.keys() - self.slots.keys())
        if unknown:
            raise ValueError(f"indices: no slot is named {', '.join(unknown)}")
        device = next(iter(indices.values())).device
        chosen = resolve(backend, device)
        lengths = {slot: self.slots[slot] for slot in indices}
        return Indices.from_vectors(indices, lengths, device, targets, inverse, chosen, wait=True)

    def indices_for(
        self,
        names: tuple[str, ...],
        indices: Mapping[str, Tensor] | Indices,
        device: torch.device,
        targets: int | None,
        inverse: bool,
        backend: str,
    ) -> Indices:
        """Checked indices for the named tensors: those prepared, or made of a dictionary."""
        needed = self._needed.get(names, lambda: self._slots_of(names))
        if isinstance(indices, Indices):
            indices.refuse_inverse(inverse)
            indices.check_use(needed, device, targets)
            return indices
        return Indices.from_vectors(indices, needed, device, targets, inverse, backend)

    def small_groups(self, names: tuple[str, ...]) -> list[list[str]]:
        """Those of the names whose tensors are small, by what they have in common: shape, and the slots of the axes."""
        segments = (self.segments[name] for name in names)
        return self._small.get(names, lambda: group_small((s.name, s.size, s.layout) for s in segments if s.size))

    def _slots_of(self, names: tuple[str, ...]) -> dict[str, int]:
        slots = dict.fromkeys(slot for name in names for slot in self.axes[name] if slot is not None)
        return {slot: self.slots[slot] for slot in slots}


def _slot_lengths(shapes: dict[str, tuple[int, ...]], axes: dict[str, tuple[str | None, ...]]) -> dict[str, int]:
    slots: dict[str, int] = {}
    for name, shape in shapes.items():
        if len(axes[name]) != len(shape):
            raise ValueError(f"axes of {name!r}: {len(axes[name])} entries for {len(shape)} dimensions")
        for slot, length in zip(axes[name], shape, strict=True):
            if slot is not None and slots.setdefault(slot, length) != length:
                raise ValueError(f"slot {slot!r} has length {slots[slot]}, but {length} in {name!r}")
    return slots


def _segment(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], offset: int) -> Segment:
    """Merge axes to [rows, columns, tail]: columns is the last permuted axis, rows all before it."""
    permuted = [axis for axis, slot in enumerate(axes) if slot is not None]
    if not permuted:
        return Segment(name, shape, offset, 1, 1, math.prod(shape), (), ())
    last = permuted[-1]
    rows, tail = math.prod(shape[:last]), math.prod(shape[last + 1 :])
    before = tuple(zip(shape[:last], axes[:last], strict=True))
    column = ((shape[last], axes[last]),)
    if len(permuted) > 1:
        return Segment(name, shape, offset, rows, shape[last], tail, before, column)
    # One gathered axis: long runs are table rows, short ones stay columns so that a tile spans many.
    if tail >= LONG_TAIL:
        return Segment(name, shape, offset, rows * shape[last], 1, tail, before + column, ())
    return Segment(name, shape, offset, rows, shape[last], tail, (), column)


# ---------------------------------------------------------------- the tables of a launch

FIELDS = tl.constexpr(5)
"""Columns of a segment table, int64: a tensor as [rows, length]; its size; where its gather tables start."""
S_ROWS, S_LENGTH, S_SIZE, S_ROW_TABLE, S_COLUMN_TABLE = (tl.constexpr(n) for n in range(5))

TILE_FIELDS = tl.constexpr(3)
"""Columns of a tile table, int32: the segment, and which block of its rows and of its columns."""
T_SEGMENT, T_ROWS, T_COLUMNS = (tl.constexpr(n) for n in range(3))

FOLD = 1024
"""What nothing gathers is moved as rows of up to so many elements, so that a tile has work for all its rows."""

INT32_LIMIT = 2**31
"""Offsets inside a row, and numbers of rows, are int32."""
MOST_ROWS = INT32_LIMIT - 1024
"""A tile counts rows beyond the last one, fewer than these."""


@dataclass(frozen=True)
class MoveKind:
    """What one launch is compiled for: the dtype it moves or computes in, and whether columns are gathered and all
    addresses and row lengths are multiples of ALIGNMENT."""

    dtype: torch.dtype
    gathered: bool
    aligned16: bool

    @property
    def label(self) -> str:
        """ "float32 columns aligned"."""
        return f"{str(self.dtype).removeprefix('torch.')} {'columns' if self.gathered else 'rows'} {self.alignment}"

    @property
    def alignment(self) -> str:
        return "aligned" if self.aligned16 else "general"

    @property
    def vector(self) -> int:
        """Elements that stand together and aligned."""
        return ALIGNMENT // self.dtype.itemsize if self.aligned16 else 1


@dataclass(frozen=True)
class Piece:
    """A tensor as a kernel moves it: `width` units of `dtype` for each element; whether all its addresses are
    multiples of ALIGNMENT; `fold`: as FOLD says."""

    segment: Segment
    dtype: torch.dtype
    width: int = 1
    aligned16: bool = True
    fold: bool = True

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and their length in units; what nothing gathers is folded."""
        segment, length = self.segment, self.segment.columns * self.segment.tail * self.width
        if not self.fold or segment.row_factors or segment.column_factors or segment.rows > 1:
            return segment.rows, length
        folded = math.gcd(length, FOLD)
        return (length // folded, folded) if folded * 8 >= FOLD else (1, length)

    @property
    def kind(self) -> MoveKind:
        aligned16 = self.aligned16 and self.matrix[1] * self.dtype.itemsize % ALIGNMENT == 0
        return MoveKind(self.dtype, bool(self.segment.column_factors), aligned16)


@dataclass(frozen=True)
class Launch:
    """Segments [N, FIELDS] and tiles [programs, TILE_FIELDS] of one kind, on the device; `size`: units of all;
    `longest`: of the longest row.

    `start`, `end`: where its addresses stand in the buffer of the whole call.
    """

    kind: MoveKind
    segments: Tensor
    tiles: Tensor
    size: int
    longest: int
    start: int
    end: int

    @property
    def count(self) -> int:
        return len(self.segments)


@dataclass(frozen=True, eq=False)
class Layout:
    """The launches of a call; `order` brings the addresses [columns, tensors], flat, to the order of the launches.

    `gather_table`: how the tables that the segments point into are composed, on the device.
    """

    launches: tuple[Launch, ...]
    order: np.ndarray
    gather_table: Tensor


def lay_out(
    pieces: Sequence[Piece],
    columns: int,
    tile_shape: Callable[[MoveKind, int], tuple[int, int]],
    places: Mapping[str, tuple[int, int]],
    device: torch.device,
) -> Layout:
    """Sort tensors into launches and lay tiles over them, in Python integers, beyond 2^31 elements.

    `columns`: how many addresses each tensor has; `tile_shape`: rows and columns of a program's work, by kind and
    longest row. Raises ValueError, naming the tensor, where a row that is gathered exceeds INT32_LIMIT, or their
    number MOST_ROWS.
    """
    members: dict[MoveKind, list[int]] = {}
    for number, piece in enumerate(pieces):
        if piece.segment.size:
            members.setdefault(piece.kind, []).append(number)
    starts: dict[tuple[Factors, int], int] = {}
    launches: list[Launch] = []
    order, start = [np.zeros(0, np.int64)], 0
    for kind, numbers in members.items():
        own = [pieces[number] for number in numbers]
        table = [_segment_row(piece, starts) for piece in own]
        longest = max(piece.matrix[1] for piece in own)
        tiles = [_tile_rows(place, piece, *tile_shape(kind, longest)) for place, piece in enumerate(own)]
        block = (np.arange(columns)[:, None] * len(pieces) + np.array(numbers)).ravel()
        padding = block.size % 2  # so that every launch's addresses start at a multiple of 16 bytes
        order += [block, block[:padding]]
        launches.append(
            Launch(
                kind,
                torch.tensor(table, dtype=torch.int64).to(device),
                torch.from_numpy(np.concatenate(tiles)).to(device),
                sum(piece.segment.size * piece.width for piece in own),
                longest,
                start,
                start + block.size,
            )
        )
        start += block.size + padding
    gather_table = torch.from_numpy(build_gather_table(list(starts), places)).to(device)
    return Layout(tuple(launches), np.concatenate(order), gather_table)


def _segment_row(piece: Piece, starts: dict[tuple[Factors, int], int]) -> tuple[int, ...]:
    """A row of a segment table; `starts`, where each gather table begins, grows by those that are new."""
    segment, (rows, length) = piece.segment, piece.matrix
    if rows > MOST_ROWS or (segment.column_factors and length >= INT32_LIMIT):
        raise ValueError(f"{segment.name!r} has {rows} rows of {length}, beyond what a kernel counts")
    row_key = (segment.row_factors or ((rows, None),), 1)
    column_key = (segment.column_factors, segment.tail * piece.width)
    for key in (row_key, column_key):
        if key[0] and key not in starts:
            starts[key] = _end_of_last(starts)
    return rows, length, segment.size * piece.width, starts[row_key], starts.get(column_key, 0)


def _end_of_last(starts: dict[tuple[Factors, int], int]) -> int:
    if not starts:
        return 0
    (factors, tail), start = next(reversed(starts.items()))
    return start + math.prod(n for n, _ in factors) * tail


def _tile_rows(place: int, piece: Piece, rows_each: int, columns_each: int) -> np.ndarray:
    """The rows of a tile table that cover a tensor."""
    rows, length = piece.matrix
    grid = np.indices((-(-rows // rows_each), -(-length // columns_each)), np.int32).reshape(2, -1)
    return np.column_stack([np.full(grid.shape[1], place, np.int32), *grid])


# ---------------------------------------------------------------- what may be computed with, and into what

ADDABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_addable(tensors: Tensors, what: str) -> None:
    """Raise ValueError for complex and 8-bit floating tensors, with which graft and combine compute nothing."""
    for name, tensor in tensors.items():
        dtype = tensor.dtype
        if dtype not in ADDABLE and (dtype.is_complex or dtype.is_floating_point):
            raise ValueError(f"{what}: {name!r} is {dtype}; only {', '.join(map(str, ADDABLE))} are added and scaled")


def allocate(
    shapes: Mapping[str, tuple[int, ...]] | None,
    like: Tensors,
    out: dict[str, Tensor] | None,
    given: Sequence[Tensors],
) -> dict[str, Tensor]:
    """Output tensors of these shapes (None: those of `like`), with the dtypes and the device of `like`: new ones, or
    `out` checked.

    Raises ValueError, naming the tensor, where `out` lacks one, does not fit, is not contiguous, or shares
    memory with an input or with another output.
    """
    if shapes is None:
        if out is None:  # quicker than by shape
            return {n: torch.empty_like(t) if t.is_contiguous() else t.new_empty(t.shape) for n, t in like.items()}
        shapes = {name: tensor.shape for name, tensor in like.items()}
    if out is None:
        return {name: like[name].new_empty(shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        tensor, wanted = out.get(name), like[name]
        if tensor is None:
            raise ValueError(f"out lacks {name!r}")
        if tensor.shape != shape or tensor.dtype != wanted.dtype or tensor.device != wanted.device:
            raise ValueError(
                f"out: {name!r} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, "
                f"expected {tuple(shape)} {wanted.dtype} on {wanted.device}"
            )
        if not tensor.is_contiguous() or tensor.is_neg() or tensor.is_conj():
            raise ValueError(f"out: {name!r} is not contiguous")
    results = {name: out[name] for name in shapes}
    _check_overlap(results, given)
    return results


def _check_overlap(results: Tensors, given: Sequence[Tensors]) -> None:
    written = list(results.items())
    starts, ends = _memory_spans([tensor for _, tensor in written])
    order = np.argsort(starts)
    starts, ends = starts[order], ends[order]
    for place in np.flatnonzero(starts[1:] < ends[:-1])[:1]:
        one, two = (written[order[n]][0] for n in (place, place + 1))
        raise ValueError(f"out: {two!r} and {one!r} share memory")
    read = [item for tensors in given for item in tensors.items()]
    first, last = _memory_spans([tensor for _, tensor in read])
    near = np.minimum(np.searchsorted(ends, first, side="right"), len(ends) - 1)
    shared = (starts[near] < last) & (first < ends[near]) & (first < last)
    for place in np.flatnonzero(shared)[:1]:
        name = written[order[near[place]]][0]
        raise ValueError(f"out: {name!r} and {read[place][0]!r} share memory")


def _memory_spans(tensors: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """First byte and end of the memory that each tensor touches."""
    starts = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
    return starts, starts + np.array([t.nbytes if t.is_contiguous() else _reach(t) for t in tensors], dtype=np.int64)


def _reach(tensor: Tensor) -> int:
    if not tensor.numel():
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
