"""The tensors of a whole model as one segment table, so that one launch serves all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regraft_kernels.tiles import MoveTile

Tensors = Mapping[str, Tensor]
Factors = tuple[tuple[int, str | None], ...]
"""Consecutive axes that one index vector gathers together: (length, slot or None) for each."""

LONG_TAIL = 512
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
    _tables: dict[tuple, Table] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def build(
        shapes: Mapping[str, Sequence[int]], axes: Mapping[str, Sequence[str | None]] | None = None
    ) -> Packing:
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
            name: tuple(axes[name]) if name in axes else (None,) * len(shape)
            for name, shape in fixed_shapes.items()
        }
        slots = _slot_lengths(fixed_shapes, fixed_axes)
        segments, offset = {}, 0
        for name, shape in fixed_shapes.items():
            segments[name] = _segment(name, shape, fixed_axes[name], offset)
            offset += segments[name].size
        return Packing(fixed_shapes, fixed_axes, slots, segments)

    def check(self, tensors: Tensors, what: str = "tensors") -> tuple[int, ...]:
        """The leading batch dimension of `tensors`: () or (B,).

        Any subset of the packing's names may be given. Raises ValueError, naming the tensor, for a name or
        a shape that does not fit, for tensors of which only some have a batch, and for mixed devices.
        """
        batch: tuple[int, ...] | None = None
        device = None
        for name, tensor in tensors.items():
            if name not in self.shapes:
                raise ValueError(f"{what}: {name!r} is not in the packing")
            shape = self.shapes[name]
            lead = tuple(tensor.shape[: max(0, tensor.ndim - len(shape))])
            if tensor.shape[len(lead) :] != torch.Size(shape) or len(lead) > 1:
                raise ValueError(
                    f"{what}: {name!r} has shape {tuple(tensor.shape)}, expected {shape} "
                    "or that with one leading batch dimension"
                )
            if batch is not None and lead != batch:
                raise ValueError(f"{what}: {name!r} has leading dimensions {lead}, the others {batch}")
            if device is not None and tensor.device != device:
                raise ValueError(f"{what}: {name!r} is on {tensor.device}, the others on {device}")
            batch, device = lead, tensor.device
        return () if batch is None else batch

    def vectors(
        self,
        indices: Mapping[str, Tensor],
        names: Sequence[str],
        device: torch.device,
        *,
        inverse: bool = False,
        targets: int | None = None,
    ) -> Indices:
        """Check the index vectors that the named tensors need, and compose those that act together.

        `indices` is slot -> int64 [length], or [targets, length] where `targets` is given. Raises ValueError,
        naming the slot, for a vector that is missing, of the wrong dtype, shape or device, or no permutation.
        """
        needed = {slot: None for name in names for slot in self.axes[name] if slot is not None}
        checked = {}
        for slot in needed:
            if slot not in indices:
                raise ValueError(f"indices: slot {slot!r} is missing")
            checked[slot] = _check_vector(slot, indices[slot], self.slots[slot], device, targets)
        _check_permutations(checked)
        if inverse:
            checked = {slot: vector.argsort(dim=-1) for slot, vector in checked.items()}
        composed: dict[Factors, Tensor] = {}
        for name in names:
            for factors in (self.segments[name].row_factors, self.segments[name].column_factors):
                if factors and factors not in composed:
                    composed[factors] = _compose(factors, checked)
        return Indices(composed)

    def table(
        self, names: Sequence[str], widths: Sequence[int], tile: MoveTile, device: torch.device
    ) -> Table:
        """The segment table of the named tensors for the kernels, made at its first use and kept.

        `widths`: for each tensor, how many of the kernel's elements make one of its own.
        """
        key = (tuple(names), tuple(widths), tile, device)
        if key not in self._tables:
            self._tables[key] = Table.build([self.segments[n] for n in names], widths, tile, device)
        return self._tables[key]


@dataclass(frozen=True)
class Indices:
    """Checked index vectors: factors -> int64 [n] or [P, n]."""

    vectors: dict[Factors, Tensor]

    def of(self, factors: Factors, target: int | None = None) -> Tensor | None:
        """The index vector of these factors (of one target), None where nothing is gathered."""
        if not factors:
            return None
        vector = self.vectors[factors]
        return vector if target is None else vector[target]


FIELDS = 6
"""Columns of a segment table: rows, row length, tail, row vector, column vector (-1: none), size."""


@dataclass(frozen=True)
class Table:
    """What a kernel reads to find its way: int64 tensors on the device.

    `segments` [N, FIELDS]; `tiles` [programs, 3]: segment, first row, first element of the row. `factors` are
    the index vectors that the segments point into, in the order in which they are concatenated.
    """

    segments: Tensor
    tiles: Tensor
    factors: tuple[Factors, ...]

    @staticmethod
    def build(
        segments: Sequence[Segment], widths: Sequence[int], tile: MoveTile, device: torch.device
    ) -> Table:
        """Lay the tiles over the segments; all in Python integers and int64, beyond 2^31 elements."""
        places: dict[Factors, int] = {(): -1}
        filled = 0
        rows, tiles = [], []
        for number, (segment, width) in enumerate(zip(segments, widths, strict=True)):
            for factors in (segment.row_factors, segment.column_factors):
                if factors not in places:
                    places[factors] = filled
                    filled += math.prod(n for n, _ in factors)
            tail = segment.tail * width
            length = segment.columns * tail
            places_of = places[segment.row_factors], places[segment.column_factors]
            rows.append((segment.rows, length, tail, *places_of, segment.size * width))
            tiles.append(_tile_grid(number, segment.rows, length, tile))
        return Table(
            torch.tensor(rows, dtype=torch.int64).reshape(-1, FIELDS).to(device),
            torch.cat([torch.zeros(0, 3, dtype=torch.int64), *tiles]).to(device),
            tuple(factors for factors in places if factors),
        )

    def vectors(self, indices: Indices, targets: int | None = None) -> Tensor:
        """The index vectors one after the other, [length] or [targets, length]."""
        lead = () if targets is None else (targets,)
        empty = torch.zeros((*lead, 0), dtype=torch.int64, device=self.tiles.device)
        # Vectors of fixed axes alone are the same for every target.
        parts = [indices.vectors[f].expand(*lead, -1) for f in self.factors]
        return torch.cat([empty, *parts], dim=-1)


def addresses(columns: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """The addresses of tensors as int64 [len(columns), N] on the device."""
    table = torch.tensor([[t.data_ptr() for t in column] for column in columns], dtype=torch.int64)
    if device.type == "cuda":
        return table.pin_memory().to(device, non_blocking=True)
    return table


def _tile_grid(number: int, rows: int, length: int, tile: MoveTile) -> Tensor:
    first_rows = torch.arange(0, rows if length else 0, tile.rows)
    first_columns = torch.arange(0, length, tile.columns)
    grid = torch.cartesian_prod(torch.tensor([number]), first_rows, first_columns)
    return grid.reshape(-1, 3)


def _slot_lengths(
    shapes: dict[str, tuple[int, ...]], axes: dict[str, tuple[str | None, ...]]
) -> dict[str, int]:
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
    tail = math.prod(shape[last + 1 :])
    before = tuple(zip(shape[:last], axes[:last], strict=True))
    column = ((shape[last], axes[last]),)
    if len(permuted) == 1:
        # One gathered axis: long runs are table rows, short ones stay columns so that a tile spans many.
        if tail >= LONG_TAIL:
            return Segment(
                name, shape, offset, math.prod(n for n, _ in before) * shape[last], 1, tail,
                before + column if before else column, (),
            )  # fmt: skip
        return Segment(name, shape, offset, math.prod(n for n, _ in before), shape[last], tail, (), column)
    return Segment(name, shape, offset, math.prod(n for n, _ in before), shape[last], tail, before, column)


def check_index(what: str, index: Tensor, length: int | None, device: torch.device) -> None:
    """Raise ValueError unless `index` is an int64 vector (of `length`, where given) on `device`."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.ndim != 1:
        kind = f"{index.ndim}-D {index.dtype}" if isinstance(index, Tensor) else type(index).__name__
        raise ValueError(f"{what} must be an int64 vector, not {kind}")
    if length is not None and len(index) != length:
        raise ValueError(f"{what} has {len(index)} entries, expected {length}")
    if index.device != device:
        raise ValueError(f"{what} is on {index.device}, the tensors on {device}")


def check_ranges(vectors: Sequence[tuple[str, Tensor, int]]) -> None:
    """Raise ValueError unless the entries of each (what, vector, bound) are within 0..bound - 1.

    Looks at the device once for all of them.
    """
    full = {(id(index), bound): (what, index, bound) for what, index, bound in vectors if index.numel()}
    if not full:
        return
    extremes = torch.stack([torch.stack(index.aminmax()) for _, index, _ in full.values()]).tolist()
    for (what, _, bound), (low, high) in zip(full.values(), extremes, strict=True):
        if low < 0 or high >= bound:
            raise ValueError(f"{what} has entries outside 0..{bound - 1}")


def _check_vector(
    slot: str, vector: Tensor, length: int, device: torch.device, targets: int | None
) -> Tensor:
    expected = (length,) if targets is None else (targets, length)
    if not isinstance(vector, Tensor) or vector.dtype != torch.int64:
        kind = vector.dtype if isinstance(vector, Tensor) else type(vector).__name__
        raise ValueError(f"indices: slot {slot!r} must be an int64 tensor, not {kind}")
    if tuple(vector.shape) != expected:
        raise ValueError(f"indices: slot {slot!r} has shape {tuple(vector.shape)}, expected {expected}")
    if vector.device != device:
        raise ValueError(f"indices: slot {slot!r} is on {vector.device}, the tensors on {device}")
    return vector


def _check_permutations(vectors: dict[str, Tensor]) -> None:
    """Raise unless every vector is a permutation. One look at the device for all of them."""
    if not vectors:
        return
    fine = torch.stack([_is_permutation(vector) for vector in vectors.values()]).tolist()
    for slot, good in zip(vectors, fine, strict=True):
        if not good:
            raise ValueError(
                f"indices: slot {slot!r} is not a permutation of 0..{vectors[slot].shape[-1] - 1}"
            )


def _is_permutation(vector: Tensor) -> Tensor:
    n = vector.shape[-1]
    within = ((vector >= 0) & (vector < n)).all()
    seen = torch.zeros(vector.shape, dtype=torch.bool, device=vector.device)
    seen.scatter_(-1, vector.clamp(0, max(n - 1, 0)), True)
    return within & seen.all()


def _compose(factors: Factors, vectors: Mapping[str, Tensor]) -> Tensor:
    """One index vector for consecutive axes: out[i, j] takes i' * n_j + j'."""
    device = next(iter(vectors.values())).device
    composed = torch.zeros(1, dtype=torch.int64, device=device)
    for length, slot in factors:
        part = torch.arange(length, device=device) if slot is None else vectors[slot]
        composed = (composed[..., :, None] * length + part[..., None, :]).flatten(-2)
    return composed


def check_real(tensors: Tensors, what: str) -> None:
    """Raise ValueError for complex tensors, with which graft and combine would not know what to do."""
    for name, tensor in tensors.items():
        if tensor.is_complex():
            raise ValueError(f"{what}: {name!r} is {tensor.dtype}; only real tensors are added and scaled")


def allocate(
    shapes: Mapping[str, tuple[int, ...]],
    like: Tensors,
    out: dict[str, Tensor] | None,
    given: Sequence[Tensors],
) -> dict[str, Tensor]:
    """Output tensors of these shapes, with the dtypes and the device of `like`: new ones, or `out` checked.

    Raises ValueError, naming the tensor, where `out` lacks one, does not fit, is not contiguous, or shares
    memory with an input or with another output.
    """
    if out is None:
        return {name: like[name].new_empty(shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if name not in out:
            raise ValueError(f"out lacks {name!r}")
        found, wanted = out[name], like[name]
        if (tuple(found.shape), found.dtype, found.device) != (shape, wanted.dtype, wanted.device):
            raise ValueError(
                f"out: {name!r} is {tuple(found.shape)} {found.dtype} on {found.device}, "
                f"expected {shape} {wanted.dtype} on {wanted.device}"
            )
        if not found.is_contiguous():
            raise ValueError(f"out: {name!r} is not contiguous")
    results = {name: out[name] for name in shapes}
    _check_overlap(results, given)
    return results


def _check_overlap(results: Tensors, given: Sequence[Tensors]) -> None:
    spans = [(*_span(tensor), True, name) for name, tensor in results.items()]
    spans += [(*_span(tensor), False, name) for tensors in given for name, tensor in tensors.items()]
    reach = [(-1, ""), (-1, "")]  # how far memory is taken so far, by inputs and by outputs
    for start, end, writes, name in sorted(span for span in spans if span[0] < span[1]):
        for other in (True, False) if writes else (True,):
            if start < reach[other][0]:
                raise ValueError(f"out: {name!r} and {reach[other][1]!r} share memory")
        reach[writes] = max(reach[writes], (end, name))


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte and end of the memory that a tensor touches."""
    if not tensor.numel():
        return 0, 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
