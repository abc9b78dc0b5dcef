"""Index vectors: all of them checked at once, and composed to the tables that a kernel gathers by."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from regraft_kernels.backend import reports_assertions, tl, triton, use_device, wait_for
from regraft_kernels.memory import LRUCache

Factors = tuple[tuple[int, str | None], ...]
"""Consecutive axes that one index vector gathers together: (length, slot or None) for each."""

BLOCK = 256
"""Entries that one program of the two kernels below looks at."""

GRID = 65_535
"""The most programs that a grid may have along its second dimension."""


def check_index(what: str, index: Tensor, shape: Sequence[int | None], device: torch.device) -> None:
    """Raise ValueError unless `index` is an int64 tensor of this shape (None: any length) on `device`."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.layout is not torch.strided:
        kind = f"{index.dtype}, {index.layout}" if isinstance(index, Tensor) else type(index).__name__
        raise ValueError(f"{what} must be an int64 tensor, not {kind}")
    if index.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, index.shape, strict=True)):
        raise ValueError(f"{what} has shape {tuple(index.shape)}, expected {tuple(shape)}")
    if index.device != device:
        raise ValueError(f"{what} is on {index.device}, the tensors on {device}")


def check_ranges(vectors: Sequence[tuple[str, Tensor, int]]) -> None:
    """Raise ValueError unless the entries of each (what, vector, bound) are within 0..bound - 1.

    Looks at the device once for all of them; not at all on a GPU of NVIDIA's, which finds out later, as `from_vectors`
    says.
    """
    full = {(id(index), bound): (what, index, bound) for what, index, bound in vectors if index.numel()}
    if not full:
        return
    device = vectors[0][1].device
    if reports_assertions(device):
        joined = torch.cat([index.flatten() for _, index, _ in full.values()])
        bounds = _ranges(tuple((index.numel(), bound - 1) for _, index, bound in full.values()), device)
        within = (joined.clamp(*bounds) == joined).all()
        torch._assert_async(within, "regraft_kernels: an index vector has entries out of range")
        return
    extremes = torch.stack([torch.stack(index.aminmax()) for _, index, _ in full.values()]).tolist()
    for (what, _, bound), (low, high) in zip(full.values(), extremes, strict=True):
        if low < 0 or high >= bound:
            raise ValueError(f"{what} has entries outside 0..{bound - 1}")


@triton.jit(do_not_specialize=["length"])
def _check_kernel(  # type: ignore[no-untyped-def]
    vectors,  # int64 [P, L]: the index vectors, one after the other
    starts,  # int64 [L]: for each entry, where its vector starts in L
    lasts,  # int64 [L]: the largest value that the entry may have
    inverse,  # int32 [P * L + 1], all -1: the inverse permutations; the last entry stays -1 while all is well
    length,  # L
    BLOCK: tl.constexpr,
):
    """Program (block, target): scatter each position to where it goes; a place may be taken once."""
    here = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = here < length
    row = tl.program_id(1).to(tl.int64) * length
    value = tl.load(vectors + row + here, mask=inside, other=0)
    start = tl.load(starts + here, mask=inside, other=0)
    last = tl.load(lasts + here, mask=inside, other=0)
    within = inside & (value >= 0) & (value <= last)
    before = tl.atomic_xchg(inverse + row + start + value, (here - start).to(tl.int32), mask=within)
    wrong = inside & ((value < 0) | (value > last) | (within & (before != -1)))
    tl.store(inverse + tl.num_programs(1).to(tl.int64) * length + here * 0, here * 0, mask=wrong)


@triton.jit(do_not_specialize=["length", "entries"])
def _compose_kernel(  # type: ignore[no-untyped-def]
    vectors,  # [P, L], as above or inverted
    gather_table,  # int32 [1 + 3 F, E]: a number, then F times (place in L, stride, length of the vector)
    tables,  # int32 [P, E]: number + sum of vectors[place] * stride
    length,  # L
    entries,  # E
    FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (block, target). What is out of range is brought into it, so that no kernel reads elsewhere."""
    here = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = here < entries
    target = tl.program_id(1).to(tl.int64)
    total = tl.load(gather_table + here, mask=inside, other=0)
    for factor in tl.static_range(FACTORS):
        row = gather_table + (1 + 3 * factor) * entries
        place = tl.load(row + here, mask=inside, other=0)
        stride = tl.load(row + entries + here, mask=inside, other=0)
        limit = tl.load(row + 2 * entries + here, mask=inside, other=1)
        value = tl.load(vectors + target * length + place, mask=inside, other=0).to(tl.int32)
        total += tl.minimum(tl.maximum(value, 0), limit - 1) * stride
    tl.store(tables + target * entries + here, total, mask=inside)


@dataclass(frozen=True, eq=False)
class Indices:
    """Checked index vectors, ready to be used again and again; made by `Packing.prepare`.

    `joined`: [L] or [P, L], the vectors of all slots one after the other; `places`: slot -> where its vector
    starts and ends. `inverse`: whether they were inverted. `prepared`: calls on several streams may use them; what is
    composed for the first is waited for, once.
    """

    joined: Tensor
    places: dict[str, tuple[int, int]]
    targets: int | None
    inverse: bool
    prepared: bool = False
    _vectors: dict[Factors, Tensor] = field(default_factory=dict, repr=False, compare=False)
    _tables: LRUCache[Tensor] = field(default_factory=lambda: LRUCache(8), repr=False, compare=False)

    @staticmethod
    def from_vectors(
        indices: Mapping[str, Tensor],
        lengths: Mapping[str, int],
        device: torch.device,
        targets: int | None,
        inverse: bool,
        backend: str,
        wait: bool = False,
    ) -> Indices:
        """Check the vectors of the slots in `lengths`. On a GPU of NVIDIA's a vector that is no permutation is found
        by the device, later, unless `wait`: as PyTorch reports an index out of range, by a device-side assertion.

        Raises ValueError, naming the slot, for a vector that is missing, of the wrong dtype, shape or device, or
        (where it is known) no permutation.
        """
        lead = () if targets is None else (targets,)
        places, end = {}, 0
        for slot, length in lengths.items():
            if slot not in indices:
                raise ValueError(f"indices: slot {slot!r} is missing")
            check_index(f"indices: slot {slot!r}", indices[slot], (*lead, length), device)
            places[slot] = end, end + length
            end += length
        if not end or targets == 0:
            empty = torch.zeros((*lead, end), dtype=torch.int64, device=device)
            return Indices(empty, places, targets, inverse, wait)
        joined = torch.cat([indices[slot] for slot in lengths], dim=-1)
        check = _check_triton if backend == "triton" else _check_torch
        inverted, fine = check(joined, tuple(places.values()))
        if wait or not reports_assertions(device):
            if not fine.item():
                raise ValueError(_describe_wrong(indices, lengths))
        else:
            torch._assert_async(fine, "regraft_kernels: an index vector is no permutation")
        return Indices(inverted if inverse else joined, places, targets, inverse, wait)

    def refuse_inverse(self, inverse: bool) -> None:
        """Raise ValueError where a call says again whether they are inverted."""
        if inverse:
            raise ValueError("indices are prepared: whether they are inverted was said there")

    def check_use(self, lengths: Mapping[str, int], device: torch.device, targets: int | None) -> None:
        """Raise ValueError unless these indices serve such slots, device and number of targets."""
        for slot, length in lengths.items():
            if slot not in self.places:
                raise ValueError(f"indices: slot {slot!r} is missing")
            start, end = self.places[slot]
            if end - start != length:
                raise ValueError(f"indices: slot {slot!r} has shape {(end - start,)}, expected {(length,)}")
        if self.joined.device != device:
            raise ValueError(f"indices are on {self.joined.device}, the tensors on {device}")
        if self.targets != targets:
            raise ValueError(f"indices are for {self.targets} targets, the tensors for {targets}")

    def slot_vector(self, slot: str) -> Tensor:
        """int64 [length] or [P, length], a view where it can be."""
        start, end = self.places[slot]
        return self.joined[..., start:end].long()

    def vector(self, factors: Factors, target: int | None = None) -> Tensor | None:
        """The index vector of these factors (of one target), None where nothing is gathered."""
        if not factors:
            return None
        if factors not in self._vectors:
            self._vectors[factors] = self._wait(self._compose_vector(factors))
        vector = self._vectors[factors]
        return vector if target is None or vector.ndim == 1 else vector[target]

    def _compose_vector(self, factors: Factors) -> Tensor:
        """One index vector for consecutive axes: out[i, j] takes i' * n_j + j'."""
        if len(factors) == 1 and factors[0][1] is not None:
            return self.slot_vector(factors[0][1])
        device = self.joined.device
        vector = torch.zeros(1, dtype=torch.int64, device=device)
        for length, slot in factors:
            part = torch.arange(length, device=device) if slot is None else self.slot_vector(slot)
            vector = (vector[..., :, None] * length + part[..., None, :]).flatten(-2)
        return vector

    def compose_tables(self, gather_table: Tensor, key: Hashable) -> Tensor:
        """int32 [P or 1, E], composed on the device by `_compose_kernel`; made once for each key."""
        return self._tables.get(key, lambda: self._wait(self._new_tables(gather_table)))

    def _wait(self, composed: Tensor) -> Tensor:
        if self.prepared:
            wait_for(composed.device)
        return composed

    def _new_tables(self, gather_table: Tensor) -> Tensor:
        programs, entries = self.targets if self.targets is not None else 1, gather_table.shape[1]
        tables = torch.empty((programs, entries), dtype=torch.int32, device=gather_table.device)
        for first in range(0, programs, GRID):
            some = tables[first : first + GRID]
            vectors = self.joined if self.targets is None else self.joined[first : first + GRID]
            _compose_kernel[-(-entries // BLOCK), len(some)](
                vectors,
                gather_table,
                some,
                self.joined.shape[-1],
                entries,
                FACTORS=gather_table.shape[0] // 3,
                BLOCK=BLOCK,
            )
        return tables


def _check_torch(joined: Tensor, places: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
    """The inverse of every vector, and whether all are permutations, a 0-d tensor."""
    starts, lasts, own = _bounds(places, joined.device)
    within = joined.clamp(starts.new_zeros(()), lasts)
    inverted = torch.full_like(joined, -1).scatter_(-1, within + starts, own.expand_as(joined))
    return inverted, (within == joined).all() & (inverted >= 0).all()


def _check_triton(joined: Tensor, places: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
    """The same in one launch; a GPU finds it out later."""
    length, rows = joined.shape[-1], joined.numel() // joined.shape[-1]
    if rows > GRID:
        return _check_torch(joined, places)
    inverse = torch.full((rows * length + 1,), -1, dtype=torch.int32, device=joined.device)
    starts, lasts, _ = _bounds(places, joined.device)
    with use_device(joined.device):
        _check_kernel[-(-length // BLOCK), rows](joined, starts, lasts, inverse, length, BLOCK=BLOCK)
    return inverse[:-1].view(joined.shape), inverse[-1]


@lru_cache(maxsize=32)
def _bounds(places: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each entry: where its vector starts, the largest value it may have, its own place in the vector."""
    starts = torch.cat([torch.full((end - start,), start) for start, end in places])
    lasts = torch.cat([torch.full((end - start,), end - start - 1) for start, end in places])
    own = torch.arange(len(starts)) - starts
    return starts.to(device), lasts.to(device), own.to(device)


@lru_cache(maxsize=32)
def _ranges(lasts: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Zero, and for each entry of vectors of (length, largest value) the largest value."""
    each = torch.cat([torch.full((length,), last) for length, last in lasts])
    return torch.zeros((), dtype=torch.int64, device=device), each.to(device)


def _describe_wrong(indices: Mapping[str, Tensor], lengths: Mapping[str, int]) -> str:
    """Which vector is no permutation."""
    for slot, length in lengths.items():
        if not torch.equal(indices[slot].sort(dim=-1).values.cpu(), torch.arange(length).expand(indices[slot].shape)):
            return f"indices: slot {slot!r} is not a permutation of 0..{length - 1}"
    raise AssertionError("all vectors are permutations")


def build_gather_table(tables: Sequence[tuple[Factors, int]], places: Mapping[str, tuple[int, int]]) -> np.ndarray:
    """How `_compose_kernel` makes tables of (factors, tail), one after the other: int32 [1 + 3 F, E].

    An entry counts elements: (index of the factors) * tail + place within the tail.
    """
    width = max([sum(slot is not None for _, slot in factors) for factors, _ in tables], default=0)
    parts = [np.zeros((1 + 3 * width, 0), np.int32)]
    for factors, tail in tables:
        rest = np.arange(math.prod(length for length, _ in factors) * tail)
        part = np.zeros((1 + 3 * width, len(rest)), np.int64)
        part[3::3] = 1
        part[0], rest, stride, row = rest % tail, rest // tail, tail, 1
        for length, slot in reversed(factors):
            digit, rest = rest % length, rest // length
            if slot is None:
                part[0] += digit * stride
            else:
                part[row], part[row + 1], part[row + 2] = places[slot][0] + digit, stride, length
                row += 3
            stride *= length
        parts.append(part.astype(np.int32))
    return np.concatenate(parts, axis=1)
