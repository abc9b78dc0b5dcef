"""Similarities that are kept from visit to visit, brought up to date by what changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regraft.core.tensors import Perm
from regraft.matching.stacks import AxisIndices, Slot, Stacks
from regraft_kernels import similarity, similarity_update_

# Each rank-m correction adds a rounding error of its own (40 of them, at 2048 units: 7e-7 of the largest entry, what a
# product in float32 has too); float32 similarities are built anew after so many.
CORRECTIONS_BEFORE_REBUILD = 64
# From this part of a rebuild's products on, correcting (which gathers columns, too) gains nothing.
WORTH_CORRECTING = 0.8
# With fewer multiplications than this, products take less time than to find out which of them can be saved.
SMALL_REBUILD = 1 << 22


@dataclass
class Kept:
    """The similarity of one group and what it was built from."""

    similarity: Tensor  # [n, n], the terms in which the group stands on one axis only
    slots: tuple[Slot, ...]  # whose terms are in it
    steps: int
    indices: AxisIndices  # what the other axes were gathered with
    corrections: int = 0


@dataclass
class KeptSimilarities:
    """S [n, n] of each group, of tensors in which it stands on one axis."""

    stacks: Stacks
    backend: str
    entries: dict[str, Kept] = field(default_factory=dict)

    def refresh_(self, slots: Mapping[str, tuple[Slot, ...]], perm: Perm) -> dict[str, Tensor]:
        """The similarities of some groups, of these slots, at a permutation.

        Correcting a tensor whose neighbour changed at m of n entries costs m/n of building its term (of both the old
        and the new columns, one product); where that saves nothing, or rounding could pile up, all terms are built
        anew, those of all such groups at once.
        """
        stacks = self.stacks
        current = {group: stacks.axis_indices(own, perm) for group, own in slots.items()}
        anew = [group for group in slots if not self._worth_correcting(group, slots[group], current[group])]
        known = [group for group in anew if slots[group]]
        sums = stacks.similarities([slots[g] for g in known], [current[g] for g in known], self.backend)
        built = dict(zip(known, sums, strict=True))
        for group in anew:
            n = stacks.spec.groups[group]
            total = built[group] if group in built else next(iter(stacks.target.values())).new_zeros(n, n)
            self.entries[group] = Kept(total, slots[group], stacks.steps, current[group])
        for group in slots:
            if group not in anew:
                self._correct_(self.entries[group], slots[group], current[group])
        return {group: self.entries[group].similarity for group in slots}

    def _correct_(self, kept: Kept, slots: tuple[Slot, ...], current: AxisIndices) -> None:
        """Bring a similarity up to date: first for changed neighbours over the old steps, then for new steps and for
        tensors of which it had nothing."""
        stacks = self.stacks
        for slot in kept.slots:
            for other in slot.others:
                old, new = kept.indices[slot.name, other], current[slot.name, other]
                if torch.equal(old, new):
                    continue
                (term,) = stacks.terms([slot], 0, kept.steps, kept.indices)
                similarity_update_(kept.similarity, term, other, old, new, backend=self.backend)
                kept.indices[slot.name, other] = new
                kept.corrections += 1
        missing = [slot for slot in slots if slot not in kept.slots]
        terms = stacks.terms(missing, 0, stacks.steps, current)
        if kept.steps < stacks.steps:
            terms += stacks.terms(kept.slots, kept.steps, stacks.steps, current)
        if terms:
            kept.similarity += similarity(terms, backend=self.backend)
        kept.slots, kept.steps, kept.indices = slots, stacks.steps, current

    def _worth_correcting(self, group: str, slots: tuple[Slot, ...], current: AxisIndices) -> bool:
        kept, stacks = self.entries.get(group), self.stacks
        if kept is None or not kept.slots:
            return False
        if kept.corrections >= CORRECTIONS_BEFORE_REBUILD and kept.similarity.dtype != torch.float64:
            return False
        whole = correct = 0.0
        for slot in slots:
            work = math.prod(stacks.spec.shapes[slot.name]) * stacks.spec.groups[group]
            whole += work * stacks.steps
            if slot not in kept.slots:
                correct += work * stacks.steps
                continue
            correct += work * (stacks.steps - kept.steps)
            for other in slot.others:
                old, new = kept.indices[slot.name, other], current[slot.name, other]
                correct += work * kept.steps * measure_change(old, new)
        if whole <= SMALL_REBUILD:
            return False
        return correct < whole * (WORTH_CORRECTING if len(slots) == len(kept.slots) else 1)


def measure_change(old: Tensor, new: Tensor) -> float:
    """The part of an index vector's entries that differ."""
    return 0.0 if old is new else float((old != new).float().mean())
