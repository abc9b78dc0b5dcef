"""The tensors of a whole model as one segment table, so that one launch serves all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from regraft_kernels.backend import Recent, resolve
from regraft_kernels.indices import Factors, Indices
from regraft_kernels.tables import Layout

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
    layouts: Recent[Layout] = field(default_factory=lambda: Recent(16), repr=False, compare=False)
    _needed: Recent[dict[str, int]] = field(default_factory=lambda: Recent(64), repr=False, compare=False)

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
        if not tensors:
            return ()
        first = next(iter(tensors.values()))
        device, shapes = first.device, self.shapes
        if all(t.shape == shapes.get(name) and t.device == device for name, t in tensors.items()):
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
        return Indices.checked(
            indices, {slot: self.slots[slot] for slot in indices}, device, targets, inverse, chosen, wait=True
        )

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
            if inverse:
                raise ValueError("indices are prepared: whether they are inverted was said there")
            indices.check_use(needed, device, targets)
            return indices
        return Indices.checked(indices, needed, device, targets, inverse, backend)

    def _slots_of(self, names: tuple[str, ...]) -> dict[str, int]:
        slots = dict.fromkeys(slot for name in names for slot in self.axes[name] if slot is not None)
        return {slot: self.slots[slot] for slot in slots}


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


ADDABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_addable(tensors: Tensors, what: str) -> None:
    """Raise ValueError for complex and 8-bit floating tensors, with which graft and combine compute nothing."""
    for name, tensor in tensors.items():
        dtype = tensor.dtype
        if dtype not in ADDABLE and (dtype.is_complex or dtype.is_floating_point):
            raise ValueError(
                f"{what}: {name!r} is {dtype}; only {', '.join(map(str, ADDABLE))} are added and scaled"
            )


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
        return {name: _new(like[name], shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        found, wanted = out.get(name), like[name]
        if found is None:
            raise ValueError(f"out lacks {name!r}")
        if found.shape != shape or found.dtype != wanted.dtype or found.device != wanted.device:
            raise ValueError(
                f"out: {name!r} is {tuple(found.shape)} {found.dtype} on {found.device}, "
                f"expected {tuple(shape)} {wanted.dtype} on {wanted.device}"
            )
        if not found.is_contiguous() or found.is_neg() or found.is_conj():
            raise ValueError(f"out: {name!r} is not contiguous")
    results = {name: out[name] for name in shapes}
    _check_overlap(results, given)
    return results


def _new(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    if like.shape == shape:  # the quicker of the two
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return like.new_empty(shape)


def _check_overlap(results: Tensors, given: Sequence[Tensors]) -> None:
    written = list(results.items())
    starts, ends = _spans([tensor for _, tensor in written])
    order = np.argsort(starts)
    starts, ends = starts[order], ends[order]
    for place in np.flatnonzero(starts[1:] < ends[:-1])[:1]:
        one, two = (written[order[n]][0] for n in (place, place + 1))
        raise ValueError(f"out: {two!r} and {one!r} share memory")
    read = [item for tensors in given for item in tensors.items()]
    first, last = _spans([tensor for _, tensor in read])
    near = np.minimum(np.searchsorted(ends, first, side="right"), len(ends) - 1)
    shared = (starts[near] < last) & (first < ends[near]) & (first < last)
    for place in np.flatnonzero(shared)[:1]:
        name = written[order[near[place]]][0]
        raise ValueError(f"out: {name!r} and {read[place][0]!r} share memory")


def _spans(tensors: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """First byte and end of the memory that each tensor touches."""
    starts = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
    return starts, starts + np.array(
        [t.nbytes if t.is_contiguous() else _reach(t) for t in tensors], dtype=np.int64
    )


def _reach(tensor: Tensor) -> int:
    if not tensor.numel():
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
