"""Matching: the permutation that moves one network's units onto another's.

``regraft.match`` minimises sum_t ||G2[t] - pi G1[t]||^2 over pi by coordinate descent over the permutation groups
(Ainsworth et al., Git Re-Basin, Algorithm 1; Chijiwa, eqs. 2, 3 and 6). One group's step is a similarity matrix and
a linear assignment.

Where the descent begins decides which optimum it finds. A step from the identity pays for agreeing with neighbours
that stand anywhere; so the groups are **placed** first, one after the other in the order of the specification (from
the network's input to its output), each by the terms alone whose other axes are placed already or fixed. Measured on
independent initial values, against the best of five descents from the identity with a random order of the groups in
every sweep: the objective is 5 to 8 % higher on MLPs 784-256x3-10 (6 pairs), 8 to 9 % on 784-512x3-10 (4), 8 % on
784-1024x3-10 (2), and 0.9 % on torchvision's resnet18 (2 pairs, three orders; a tenth of what the identity lacks),
with 2 or 3 sweeps where those took 7 to 16. Other orders of placing (from the output, or inside out) are worse.

What is known is not computed again:

- a group is visited only when a neighbouring permutation, or the data, changed since its last solve;
- its similarity is kept: what the placing computed stays, terms of neighbours placed later are added, and where m
  entries of a neighbour changed it is corrected by their rank-m product;
- new steps (FGMT appends one pair of gradients at a time) add their own product and leave the rest alone;
- an assignment starts from the duals of the group's last one;
- groups that share no tensor are solved at the same time.

All of these leave the result as it is: `regraft.reference.matching` finds the same objective without them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regraft.core.arguments import CountOrNone, check_arguments
from regraft.core.clock import Clock, Cost, total_charge
from regraft.core.tensors import Perm
from regraft.matching.nested import BlockAssignment, nested_families
from regraft.matching.stacks import AxisIndices, Neighbourhood, Slot, Stacks, Streamed
from regraft.symmetry import PermutationSpec
from regraft_kernels import Assignment, assign_many, similarity, similarity_update_

# A new assignment must raise the objective by more than this part of the similarity that it collects: below lies
# the rounding of float32 sums, and ties, where "improvements" would go round in circles.
RELATIVE_GAIN = {torch.float32: 1e-7, torch.float64: 1e-12}
# Each rank-m correction adds a rounding error of its own (40 of them, at 2048 units: 7e-7 of the largest entry, what a
# product in float32 has too); float32 similarities are built anew after so many.
CORRECTIONS_BEFORE_REBUILD = 64
# From this part of a rebuild's products on, correcting (which gathers columns, too) gains nothing.
WORTH_CORRECTING = 0.8
# The duals of an assignment are recovered only where more than this part of it moved: older ones start the next solve
# nearly as well, and recovering takes longer than a warm solve.
RENEW_DUALS = 0.2


@dataclass(frozen=True)
class Match:
    """The result of `match`.

    Attributes:
        perm: group -> int64 index vector [n]; (pi theta)[i] = theta[perm[i]].
        objective: sum_t <G2[t], pi G1[t]>, the part of the squared distance that depends on pi, negated and halved.
        sweeps: rounds over the groups after the first placing, the last of which changed nothing.
        seconds: by phase: "similarity", "assignment", "objective".
    """

    perm: Perm
    objective: float
    sweeps: int
    seconds: dict[str, Cost]

    @property
    def cost(self) -> Cost:
        """The sum over the phases."""
        return total_charge(self.seconds)


@check_arguments
def match(
    spec: PermutationSpec,
    target: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    *,
    start: Perm | None = None,
    generator: torch.Generator | None = None,
    max_sweeps: CountOrNone = 100,
    backend: str = "auto",
    assignment: str = "auto",
) -> Match:
    """The permutation pi that brings `source` closest to `target`, by coordinate descent.

    Args:
        spec: the model's permutation groups.
        target, source: tensors by name, each of the model's shape (weights) or [T, *shape] (stacks, for example
            of gradients); the same names and floating dtypes on both sides (others do not count). Names that the
            spec knows and these lack do not take part: buffers, where parameters alone are matched.
        start: where the descent begins; where the placing of the groups leads, or at the identity if that is better,
            when not given.
        generator: draws the order in which the sweeps visit the groups; without one it is the spec's.
        max_sweeps: an upper bound that ends a descent early.
        backend: of the similarity, "auto", "torch" or "triton".
        assignment: of the linear assignment, "auto" or a name that `regraft_kernels.assign` knows.

    Raises:
        ValueError: names, shapes, dtypes or devices that differ, a tensor that the spec does not know, values that
            are not finite, zero steps; the tensor is named.
    """
    stacks = Stacks.of(spec, target, source)
    descent = Descent.over(stacks, start=start, generator=generator, backend=backend)
    return descent.descend_(max_sweeps=max_sweeps, assignment=assignment)


def match_streamed(spec: PermutationSpec, target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> Match:
    """The permutation that `match` finds, of networks that memory does not hold: one pair of tensors at a time.

    Args:
        target, source: mappings that read a tensor each time one is asked for; finite floating tensors of the spec's
            names and shapes, the same on both sides.

    Similarities are built anew at every visit, as none is kept but the last.
    """
    descent = Descent.over(Streamed(spec, target, source))
    descent.colours = tuple((group,) for colour in descent.colours for group in colour)
    descent.cached, descent.solutions = _Newest(), _Newest()
    return descent.descend_()


@dataclass
class _Cached:
    """The similarity of one group and what it was built from."""

    similarity: Tensor  # [n, n], the terms in which the group stands on one axis only
    slots: tuple[Slot, ...]  # whose terms are in it
    steps: int
    indices: AxisIndices  # what the other axes were gathered with
    corrections: int = 0


class _Newest(dict[str, Any]):
    """Holds one entry, the last: each entry keeps a similarity matrix in memory."""

    def __setitem__(self, group: str, value: Any) -> None:
        self.clear()
        super().__setitem__(group, value)


@dataclass
class Descent:
    """The state of a coordinate descent; lives as long as stacks are appended to (FGMT).

    Attributes:
        stacks: what is matched.
        colours: groups by colour; those of one colour share no tensor.
        perm: the current permutation.
        backend: of the similarity kernels.
        unplaced: groups that have no permutation yet (in `perm` they stand as the identity).
        objective: the permutation's objective over the first `counted` steps.
        version: group -> how often its permutation changed.
        solved: group -> what its last solve looked at.
        solutions: group -> the assignment whose duals start the next one.
    """

    stacks: Stacks
    colours: tuple[tuple[str, ...], ...]
    around: dict[str, Neighbourhood]
    perm: Perm
    backend: str = "auto"
    unplaced: set[str] = field(default_factory=set)
    objective: float = 0.0
    counted: int = 0
    version: Counter[str] = field(default_factory=Counter)
    solved: dict[str, object] = field(default_factory=dict)
    cached: dict[str, _Cached] = field(default_factory=dict)
    solutions: dict[str, Assignment] = field(default_factory=dict)

    @classmethod
    def over(
        cls,
        stacks: Stacks,
        *,
        start: Perm | None = None,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> Descent:
        """A descent over given stacks, which are empty or filled."""
        groups = stacks.groups
        perm = stacks.spec.identity() if start is None else start
        stacks.spec.check(perm)
        return cls(
            stacks,
            colours(stacks.spec, frozenset(stacks.target), generator),
            {group: stacks.around(group) for group in groups},
            {group: index.to(stacks.device) for group, index in perm.items()},
            backend,
            set(groups) if start is None else set(),
        )

    def restart_(self, perm: Perm) -> None:
        """Let the next descent begin at `perm`."""
        for group, index in perm.items():
            index = index.to(self.perm[group].device)
            if not torch.equal(index, self.perm[group]):
                self.perm[group] = index
                self.version[group] += 1
        self.counted, self.objective = 0, 0.0
        self.unplaced.clear()
        self.solved.clear()

    def clear_(self) -> None:
        """Forget all steps and what was computed from them; keep the permutation and the duals to start from."""
        self.stacks.steps = 0
        self.counted, self.objective = 0, 0.0
        self.cached.clear()
        self.solved.clear()

    def descend_(self, *, max_sweeps: int = 100, assignment: str = "auto") -> Match:
        """Place the groups that have no permutation yet, then sweep over all until nothing improves.

        Updates `perm`. Raises ValueError for no step, or fewer than one sweep.
        """
        stacks, clock = self.stacks, Clock()
        if stacks.steps < 1:
            raise ValueError("there is nothing to match: zero steps")
        if max_sweeps < 1:
            raise ValueError(f"max_sweeps must be at least 1, got {max_sweeps}")
        if self.unplaced:
            _place_(self, clock, assignment)
        with clock.phase("objective", stacks.device):
            self.objective += stacks.objective(stacks.target, self.perm, self.counted)
            self.counted = stacks.steps
        sweeps, improved = 0, True
        while improved and sweeps < max_sweeps:
            improved = any([_visit_(self, colour, clock, assignment) for colour in self.colours])
            for family in nested_families(stacks.spec):
                improved |= _visit_family_(self, family, clock, assignment)
            sweeps += 1
        return Match(dict(self.perm), self.objective, sweeps, clock.seconds)


def _place_(descent: Descent, clock: Clock, assignment: str) -> None:
    """Give the groups their first permutations, one after the other; the identity, if that is better."""
    stacks, device = descent.stacks, descent.stacks.device
    identity, rest, objective = dict(descent.perm), dict.fromkeys(stacks.target), 0.0
    for group, *nested in stacks.spec.families:
        if nested:
            _visit_family_(descent, (group, *nested), clock, assignment)
            descent.unplaced.difference_update((group, *nested))
        if nested or group not in descent.around:
            continue
        _visit_(descent, (group,), clock, assignment)
        descent.unplaced.discard(group)
        with clock.phase("objective", device):
            slots = descent.cached[group].slots
            if all(slot.whole for slot in slots):  # then all of their tensors' other axes have been placed before
                objective += _sum_matched(descent.cached[group].similarity, descent.perm[group])
                for slot in slots:
                    del rest[slot.name]
    with clock.phase("objective", device):
        objective += stacks.objective(rest, descent.perm)
        if stacks.objective(stacks.target, identity) > objective:
            descent.restart_(identity)
        else:
            descent.objective, descent.counted = objective, stacks.steps


def colours(
    spec: PermutationSpec, names: frozenset[str], generator: torch.Generator | None = None
) -> tuple[tuple[str, ...], ...]:
    """The groups that stand in `names`, sorted into classes without a common tensor (greedy colouring).

    Visiting class after class is a sweep: within one the order does not matter, as no similarity of a class depends
    on another permutation of it.
    """
    alone = [g for g, *nested in spec.families if not nested]
    groups = [g for g in alone if any(name in names for name, _ in spec.tensors_of(g))]
    if generator is not None:
        groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    tensors = {g: {name for name, _ in spec.tensors_of(g)} & names for g in groups}
    classes: list[list[str]] = []
    for group in groups:
        free = (c for c in classes if all(tensors[group].isdisjoint(tensors[other]) for other in c))
        members = next(free, None)
        if members is None:
            classes.append(members := [])
        members.append(group)
    return tuple(tuple(members) for members in classes)


def _visit_(descent: Descent, colour: tuple[str, ...], clock: Clock, assignment: str) -> bool:
    """Solve the groups of one colour anew where anything they depend on changed; true if one improved."""
    stale = [group for group in colour if descent.solved.get(group) != _depends_on(descent, group)]
    if not stale:
        return False
    device = descent.stacks.device
    with clock.phase("similarity", device):
        own = _similarities_(descent, stale)
        both = {group: _coupled_similarity(descent, group) for group in stale}
        scores = {g: own[g] if (more := both[g]) is None else own[g] + more for g in stale}
    with clock.phase("assignment", device):
        solutions = assign_many(
            [scores[g] for g in stale],
            backend=assignment,
            warm=[descent.solutions[g].start if g in descent.solutions else None for g in stale],
            names=[f"similarity of group {g!r}" for g in stale],
        )
    improved = False
    with clock.phase("objective", device):
        for group, solution in zip(stale, solutions, strict=True):
            changed = _share_changed(descent.perm[group].cpu(), solution.perm)
            if group not in descent.solutions or changed > RENEW_DUALS:
                descent.solutions[group] = solution
            descent.solved[group] = _depends_on(descent, group)
            improved |= _accept_(descent, group, own[group], solution.perm.to(device))
    return improved


def _visit_family_(descent: Descent, family: tuple[str, ...], clock: Clock, assignment: str) -> bool:
    """Solve groups that are nested in one another; true if the true objective rose, or they had no permutation yet."""
    stacks, others = descent.stacks, descent.unplaced.difference(family)
    around = {g: descent.around[g] for g in family if g in descent.around}
    depends = stacks.steps, *(descent.version[other] for g in around for other in (g, *around[g].groups))
    if descent.solved.get(family[0]) == depends:
        return False
    slots = {g: [slot for slot in (*n.single, *n.coupled) if slot.groups.isdisjoint(others)] for g, n in around.items()}
    members = [g for g in around if slots[g]]
    with clock.phase("similarity", stacks.device):
        indices = [stacks.axis_indices(slots[g], descent.perm) for g in members]
        scores = stacks.similarities([slots[g] for g in members], indices, descent.backend)
    descent.solved[family[0]] = depends
    if not scores:
        return False
    on_cpu = dict(zip(members, (score.cpu() for score in scores), strict=True))
    names, improved = sorted({slot.name for g in around for slot in slots[g]}), False
    for part in BlockAssignment(stacks.spec, family, on_cpu, assignment).candidates(descent.perm):
        candidate = descent.perm | {group: index.to(stacks.device) for group, index in part.items()}
        with clock.phase("objective", stacks.device):
            before, after = (stacks.objective(names, perm) for perm in (descent.perm, candidate))
        if after - before > RELATIVE_GAIN[scores[0].dtype] * max(abs(before), abs(after)):
            for group in family:
                descent.version[group] += not torch.equal(descent.perm[group], candidate[group])
            descent.perm, descent.objective, improved = candidate, descent.objective + after - before, True
    return improved


def _accept_(descent: Descent, group: str, own: Tensor, candidate: Tensor) -> bool:
    """Move to `candidate` if the true objective rises by more than rounding; true if it did."""
    current = descent.perm[group]
    before, after = _sum_matched(own, current), _sum_matched(own, candidate)
    if descent.around[group].coupled and group not in descent.unplaced:
        before += _coupled_objective(descent, group, current)
        after += _coupled_objective(descent, group, candidate)
    scale = max(abs(before), abs(after))
    if after - before <= RELATIVE_GAIN[own.dtype] * scale:
        return False
    descent.perm[group] = candidate
    descent.version[group] += 1
    descent.objective += after - before
    return True


def _usable_slots(descent: Descent, group: str) -> tuple[Slot, ...]:
    """The slots that count for a group's similarity: those whose other axes are fixed, or moved by placed groups."""
    return tuple(p for p in descent.around[group].single if p.groups.isdisjoint(descent.unplaced))


def _depends_on(descent: Descent, group: str) -> tuple[object, ...]:
    """What a solve of `group` looks at: the steps, the tensors, and its neighbours' permutations (by version)."""
    around = descent.around[group]
    coupled = around.coupled if group not in descent.unplaced else ()
    versions = tuple(descent.version[other] for other in around.groups)
    return descent.stacks.steps, len(_usable_slots(descent, group)), len(coupled), versions


def _similarities_(descent: Descent, groups: Sequence[str]) -> dict[str, Tensor]:
    """S [n, n] of each group, of the tensors in which it stands on one axis; kept up to date by what changed.

    Correcting a tensor whose neighbour changed at m of n entries costs m/n of building its term (of both the old and
    the new columns, one product); where that saves nothing, or rounding could pile up, all terms are built anew, those
    of all such groups at once.
    """
    stacks = descent.stacks
    slots = {group: _usable_slots(descent, group) for group in groups}
    current = {group: stacks.axis_indices(slots[group], descent.perm) for group in groups}
    anew = [group for group in groups if not _worth_correcting(descent, group, slots[group], current[group])]
    known = [group for group in anew if slots[group]]
    sums = stacks.similarities([slots[g] for g in known], [current[g] for g in known], descent.backend)
    built = dict(zip(known, sums, strict=True))
    for group in anew:
        n = stacks.spec.groups[group]
        total = built[group] if group in built else next(iter(stacks.target.values())).new_zeros(n, n)
        descent.cached[group] = _Cached(total, slots[group], stacks.steps, current[group])
    for group in groups:
        if group not in anew:
            _correct_(descent, group, slots[group], current[group])
    return {group: descent.cached[group].similarity for group in groups}


def _correct_(descent: Descent, group: str, slots: tuple[Slot, ...], current: AxisIndices) -> None:
    """Bring a group's similarity up to date: first for changed neighbours over the old steps, then for new steps and
    for tensors of which it had nothing."""
    cached, stacks = descent.cached[group], descent.stacks
    for slot in cached.slots:
        for other in slot.others:
            old, new = cached.indices[slot.name, other], current[slot.name, other]
            if torch.equal(old, new):
                continue
            (term,) = stacks.terms([slot], 0, cached.steps, cached.indices)
            similarity_update_(cached.similarity, term, other, old, new, backend=descent.backend)
            cached.indices[slot.name, other] = new
            cached.corrections += 1
    missing = [slot for slot in slots if slot not in cached.slots]
    terms = stacks.terms(missing, 0, stacks.steps, current)
    if cached.steps < stacks.steps:
        terms += stacks.terms(cached.slots, cached.steps, stacks.steps, current)
    if terms:
        cached.similarity += similarity(terms, backend=descent.backend)
    cached.slots, cached.steps, cached.indices = slots, stacks.steps, current


def _worth_correcting(descent: Descent, group: str, slots: tuple[Slot, ...], current: AxisIndices) -> bool:
    cached, stacks = descent.cached.get(group), descent.stacks
    if cached is None or not cached.slots:
        return False
    if cached.corrections >= CORRECTIONS_BEFORE_REBUILD and cached.similarity.dtype != torch.float64:
        return False
    whole = correct = 0.0
    for slot in slots:
        work = math.prod(stacks.spec.shapes[slot.name])
        whole += work * stacks.steps
        if slot not in cached.slots:
            correct += work * stacks.steps
            continue
        correct += work * (stacks.steps - cached.steps)
        for other in slot.others:
            old, new = cached.indices[slot.name, other], current[slot.name, other]
            correct += work * cached.steps * _share_changed(old, new)
    return correct < whole * (WORTH_CORRECTING if len(slots) == len(cached.slots) else 1)


def _coupled_similarity(descent: Descent, group: str) -> Tensor | None:
    """S of the tensors in which `group` stands on several axes: the objective's gradient at the current permutation."""
    slots, stacks = descent.around[group].coupled, descent.stacks
    if not slots or group in descent.unplaced:
        return None
    terms = stacks.terms(slots, 0, stacks.steps, stacks.axis_indices(slots, descent.perm))
    return similarity(terms, backend=descent.backend)


def _coupled_objective(descent: Descent, group: str, candidate: Tensor) -> float:
    names = sorted({slot.name for slot in descent.around[group].coupled})
    return descent.stacks.objective(names, {**descent.perm, group: candidate})


def _sum_matched(similarity: Tensor, perm: Tensor) -> float:
    """sum_i S[i, perm[i]] in float64."""
    return float(similarity.gather(1, perm[:, None]).sum(dtype=torch.float64))


def _share_changed(old: Tensor, new: Tensor) -> float:
    return 0.0 if old is new else float((old != new).float().mean())
