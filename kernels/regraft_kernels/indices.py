"""Index vectors: all of them checked at once, and composed to what a kernel gathers by."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from regraft_kernels.backend import Recent, on, tl, triton

Factors = tuple[tuple[int, str | None], ...]
"""Consecutive axes that one index vector gathers together: (length, slot or None) for each."""

BLOCK = 256
"""Entries that one program of the two kernels below looks at."""


@triton.jit(do_not_specialize=["length"])
def _check_kernel(
    vectors,  # int64 [P, L]: the index vectors, one after the other
    spans,  # int32 [2, L]: for each entry, where its vector starts and ends in L
    taken,  # int32 [P * L + 1], all -1: the inverse permutations; the last entry stays -1 while all is well
    length,  # L
    BLOCK: tl.constexpr,
):
    """Program (block, target): scatter each position to where it goes; a place may be taken once."""
    here = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = here < length
    row = tl.program_id(1).to(tl.int64) * length
    value = tl.load(vectors + row + here, mask=inside, other=0)
    start = tl.load(spans + here, mask=inside, other=0)
    end = tl.load(spans + length + here, mask=inside, other=0)
    within = inside & (value >= 0) & (value < end - start)
    before = tl.atomic_xchg(taken + row + start + value, here - start, mask=within)
    wrong = inside & ((value < 0) | (value >= end - start) | (within & (before != -1)))
    tl.store(taken + tl.num_programs(1).to(tl.int64) * length + here * 0, here * 0, mask=wrong)


@triton.jit(do_not_specialize=["length", "entries"])
def _compose_kernel(
    vectors,  # [P, L], as above or inverted
    recipe,  # int32 [1 + 3 F, E]: a number, then F times (place in L, stride, length of the vector)
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
    total = tl.load(recipe + here, mask=inside, other=0)
    for factor in tl.static_range(FACTORS):
        row = recipe + (1 + 3 * factor) * entries
        place = tl.load(row + here, mask=inside, other=0)
        stride = tl.load(row + entries + here, mask=inside, other=0)
        limit = tl.load(row + 2 * entries + here, mask=inside, other=1)
        value = tl.load(vectors + target * length + place, mask=inside, other=0).to(tl.int32)
        total += tl.minimum(tl.maximum(value, 0), limit - 1) * stride
    tl.store(tables + target * entries + here, total, mask=inside)


@dataclass(frozen=True)
class Indices:
    """Checked index vectors, ready to be used again and again; made by `Packing.prepare`.

    `joined`: [L] or [P, L], the vectors of all slots one after the other; `places`: slot -> where its vector
    starts and ends. `inverse`: whether they were inverted.
    """

    joined: Tensor
    places: dict[str, tuple[int, int]]
    targets: int | None
    inverse: bool
    _composed: dict[Factors, Tensor] = field(default_factory=dict, repr=False, compare=False)
    _tables: Recent[Tensor] = field(default_factory=lambda: Recent(8), repr=False, compare=False)

    @staticmethod
    def checked(
        indices: Mapping[str, Tensor],
        lengths: Mapping[str, int],
        device: torch.device,
        targets: int | None,
        inverse: bool,
        backend: str,
        *,
        wait: bool = False,
    ) -> Indices:
        """Check the vectors of the slots in `lengths`. On a GPU a vector that is no permutation is found by the
        device, later, unless `wait`: as PyTorch reports an index out of range, by a device-side assertion.

        Raises ValueError, naming the slot, for a vector that is missing, of the wrong dtype, shape or device, or
        (where it is known) no permutation.
        """
        for slot, length in lengths.items():
            _check_kind(slot, indices.get(slot), length, device, targets)
        places, end = {}, 0
        for slot, length in lengths.items():
            places[slot] = end, end + length
            end += length
        lead = () if targets is None else (targets,)
        if not end or targets == 0:
            return Indices(
                torch.zeros((*lead, end), dtype=torch.int64, device=device), places, targets, inverse
            )
        joined = torch.cat([indices[slot] for slot in lengths], dim=-1)
        check = _check_triton if backend == "triton" else _check_torch
        inverted, fine = check(joined, tuple(places.values()))
        if wait or device.type != "cuda":
            if not fine.item():
                raise ValueError(_wrong(indices, lengths))
        else:
            torch._assert_async(fine, "regraft_kernels: an index vector is no permutation")
        return Indices(inverted if inverse else joined, places, targets, inverse)

    def check_use(self, lengths: Mapping[str, int], device: torch.device, targets: int | None) -> None:
        """Raise ValueError unless these indices serve such slots, device and number of targets."""
        for slot, length in lengths.items():
            start, end = self.places.get(slot, (0, -1))
            if end < start:
                raise ValueError(f"indices: slot {slot!r} is missing")
            if end - start != length:
                raise ValueError(f"indices: slot {slot!r} has shape {(end - start,)}, expected {(length,)}")
        if self.joined.device != device:
            raise ValueError(f"indices are on {self.joined.device}, the tensors on {device}")
        if self.targets != targets:
            raise ValueError(f"indices are for {self.targets} targets, the tensors for {targets}")

    def by_slot(self) -> dict[str, Tensor]:
        """Slot -> int64 [length] or [P, length], views."""
        return {slot: self.joined[..., start:end].long() for slot, (start, end) in self.places.items()}

    def of(self, factors: Factors, target: int | None = None) -> Tensor | None:
        """The index vector of these factors (of one target), None where nothing is gathered."""
        if not factors:
            return None
        if factors not in self._composed:
            self._composed[factors] = self._compose(factors)
        vector = self._composed[factors]
        return vector if target is None or vector.ndim == 1 else vector[target]

    def _compose(self, factors: Factors) -> Tensor:
        """One index vector for consecutive axes: out[i, j] takes i' * n_j + j'."""
        if len(factors) == 1 and factors[0][1] is not None:
            start, end = self.places[factors[0][1]]
            return self.joined[..., start:end].long()
        device = self.joined.device
        composed = torch.zeros(1, dtype=torch.int64, device=device)
        for length, slot in factors:
            if slot is None:
                part = torch.arange(length, device=device)
            else:
                start, end = self.places[slot]
                part = self.joined[..., start:end]
            composed = (composed[..., :, None] * length + part[..., None, :]).flatten(-2)
        return composed

    def tables(self, recipe: Tensor, key: Hashable) -> Tensor:
        """int32 [P or 1, E], composed on the device by `_compose_kernel`; made once for each key."""
        return self._tables.get(key, lambda: self._new_tables(recipe))

    def _new_tables(self, recipe: Tensor) -> Tensor:
        programs, entries = self.targets if self.targets is not None else 1, recipe.shape[1]
        tables = torch.empty((programs, entries), dtype=torch.int32, device=recipe.device)
        for first in range(0, programs, GRID):  # a grid's second dimension ends at 65,535
            some = tables[first : first + GRID]
            vectors = self.joined if self.targets is None else self.joined[first : first + GRID]
            _compose_kernel[-(-entries // BLOCK), len(some)](
                vectors,
                recipe,
                some,
                self.joined.shape[-1],
                entries,
                FACTORS=recipe.shape[0] // 3,
                BLOCK=BLOCK,
            )
        return tables


GRID = 65_535
"""The most programs that a grid may have along its second dimension."""


def _check_torch(joined: Tensor, places: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
    """The inverse of every vector, and whether all are permutations, a 0-d tensor."""
    starts, lasts, own = _spans(places, joined.device)
    within = joined.clamp(starts.new_zeros(()), lasts)
    inverted = torch.full_like(joined, -1).scatter_(-1, within + starts, own.expand_as(joined))
    return inverted, (within == joined).all() & (inverted >= 0).all()


def _check_triton(joined: Tensor, places: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
    """The same in one launch; a GPU finds it out later."""
    length, rows = joined.shape[-1], joined.numel() // joined.shape[-1]
    if rows > GRID:
        return _check_torch(joined, places)
    taken = torch.full((rows * length + 1,), -1, dtype=torch.int32, device=joined.device)
    spans = _device_spans(places, joined.device)
    with on(joined.device):
        _check_kernel[-(-length // BLOCK), rows](joined, spans, taken, length, BLOCK=BLOCK)
    return taken[:-1].view(joined.shape), taken[-1]


@lru_cache(maxsize=32)
def _spans(places: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each entry: where its vector starts, the largest value it may have, its own place in the vector."""
    starts = torch.cat([torch.full((end - start,), start) for start, end in places])
    lasts = torch.cat([torch.full((end - start,), end - start - 1) for start, end in places])
    own = torch.arange(len(starts)) - starts
    return starts.to(device), lasts.to(device), own.to(device)


@lru_cache(maxsize=32)
def _device_spans(places: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    starts = torch.cat([torch.full((end - start,), start, dtype=torch.int32) for start, end in places])
    ends = torch.cat([torch.full((end - start,), end, dtype=torch.int32) for start, end in places])
    return torch.stack([starts, ends]).to(device)


def _check_kind(
    slot: str, vector: Tensor | None, length: int, device: torch.device, targets: int | None
) -> None:
    if vector is None:
        raise ValueError(f"indices: slot {slot!r} is missing")
    if not isinstance(vector, Tensor) or vector.dtype != torch.int64:
        kind = vector.dtype if isinstance(vector, Tensor) else type(vector).__name__
        raise ValueError(f"indices: slot {slot!r} must be an int64 tensor, not {kind}")
    expected = (length,) if targets is None else (targets, length)
    if vector.shape != expected:
        raise ValueError(f"indices: slot {slot!r} has shape {tuple(vector.shape)}, expected {expected}")
    if vector.device != device:
        raise ValueError(f"indices: slot {slot!r} is on {vector.device}, the tensors on {device}")


def _wrong(indices: Mapping[str, Tensor], lengths: Mapping[str, int]) -> str:
    """Which vector is no permutation."""
    for slot, length in lengths.items():
        if not torch.equal(
            indices[slot].sort(dim=-1).values.cpu(), torch.arange(length).expand(indices[slot].shape)
        ):
            return f"indices: slot {slot!r} is not a permutation of 0..{length - 1}"
    raise AssertionError("all vectors are permutations")


def recipe_of(tables: Sequence[tuple[Factors, int]], places: Mapping[str, tuple[int, int]]) -> np.ndarray:
    """How `_compose_kernel` makes tables of (factors, tail), one after the other: int32 [1 + 3 F, E].

    An entry counts elements: (index of the factors) * tail + place within the tail.
    """
    width = max([sum(slot is not None for _, slot in factors) for factors, _ in tables], default=0)
    parts = [np.zeros((1 + 3 * width, 0), np.int32)]
    for factors, tail in tables:
        rest = np.arange(_length(factors) * tail)
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


def _length(factors: Factors) -> int:
    total = 1
    for length, _ in factors:
        total *= length
    return total
