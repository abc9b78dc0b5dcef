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

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regraft.core.arguments import CountOrNone, check_arguments
from regraft.core.clock import Clock, Cost, total_charge
from regraft.core.tensors import Batch, Perm
from regraft.matching.activations import correlate_units
from regraft.matching.joint import find_joint_start
from regraft.matching.kept import KeptSimilarities, measure_change
from regraft.matching.nested import BlockAssignment, assign_groups, nested_families
from regraft.matching.stacks import Neighbourhood, Slot, Stacks, Streamed
from regraft.symmetry import PermutationSpec
from regraft_kernels import Assignment, assign_many, similarity

# A new assignment must raise the objective by more than this part of the similarity that it collects: below lies
# the rounding of float32 sums, and ties, where "improvements" would go round in circles.
RELATIVE_GAIN = {torch.float32: 1e-7, torch.float64: 1e-12}
# The duals of an assignment are recovered only where more than this part of it moved: older ones start the next solve
# nearly as well, and recovering takes longer than a warm solve.
RENEW_DUALS = 0.2

# The part of every group's units that a restart shuffles.
SHUFFLED = 0.25


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
    start: Perm | Literal["joint", "placed"] | None = None,
    restarts: CountOrNone = 0,
    model: nn.Module | None = None,
    batches: Iterable[Batch] | None = None,
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
        start: where the descent begins. "placed" (when not given): where the placing of the groups leads, or at the
            identity if that is better. "joint": where Frank-Wolfe over all groups at once leads (Crisostomi et al.,
            C2M3, 2024; see `regraft.matching.joint`), in two to three times the time: of networks that were trained
            the objective is higher, of initial values lower.
        restarts: so many descents more, each from the best permutation so far after a quarter of every group's units
            (in no blocks) were shuffled. The best objective wins. One takes about .7 of the first descent's time.
        model, batches: with both, groups are matched by the correlation of their units' outputs on this data (see
            `regraft.matching.activations`), and those that are not seen there by weights; `target` and `source` are
            then whole networks, single, with buffers. `start` and `restarts` concern weights, and are not given.
        generator: draws the order in which the sweeps visit the groups (without one it is the spec's), and what
            restarts shuffle (without one, numbers of seed 0).
        max_sweeps: an upper bound that ends a descent early.
        backend: of the similarity, "auto", "torch" or "triton".
        assignment: of the linear assignment, "auto" or a name that `regraft_kernels.assign` knows.

    Raises:
        ValueError: names, shapes, dtypes or devices that differ, a tensor that the spec does not know, values that
            are not finite, zero steps, and the tensor is named; no group that moves one of the tensors; a model
            without batches, batches without a model, or either with a start or restarts.
    """
    if model is not None or batches is not None:
        if model is None or batches is None or start is not None or restarts:
            raise ValueError("matching by activations takes a model and batches, and neither start nor restarts")
        return _match_by_activations(spec, target, source, model, batches, assignment)
    stacks, clock = _stack_both(spec, target, source), Clock()
    begin = None if isinstance(start, str) else start
    descent = Descent.over(stacks, start=begin, generator=generator, backend=backend)
    if start == "joint" and stacks.steps:
        descent.restart_(find_joint_start(stacks, descent.around, clock, backend, assignment))
    best = descent.descend_(max_sweeps=max_sweeps, assignment=assignment)
    clock.add(best.seconds)
    generator = generator or torch.Generator().manual_seed(0)
    for _ in range(restarts):
        descent.restart_(_shuffle_some(spec, best.perm, generator))
        again = descent.descend_(max_sweeps=max_sweeps, assignment=assignment)
        clock.add(again.seconds)
        best = max(best, again, key=lambda result: result.objective)
    return replace(best, seconds=clock.seconds)


def _stack_both(spec: PermutationSpec, target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> Stacks:
    stacks = Stacks.of(spec, target, source)
    if not stacks.groups:
        raise ValueError("there is nothing to match: the specification has no group that moves one of these tensors")
    return stacks


def _match_by_activations(
    spec: PermutationSpec,
    target: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    model: nn.Module,
    batches: Iterable[Batch],
    assignment: str,
) -> Match:
    parameters = [{n: t for n, t in side.items() if n not in spec.optional} for side in (target, source)]
    stacks, clock = _stack_both(spec, *parameters), Clock()
    with clock.phase("similarity", stacks.device):
        scores = correlate_units(spec, model, target, source, batches)
    for family in nested_families(spec):
        if any(spec.moves_freely(group) and group not in scores for group in family):  # then none by activations
            scores = {group: score for group, score in scores.items() if group not in family}
    with clock.phase("assignment", stacks.device):
        start = {group: index.to(stacks.device) for group, index in spec.identity().items()}
        perm, _ = assign_groups(spec, scores, start, assignment, {})
    descent = Descent.over(stacks, start=perm)
    descent.held = frozenset(scores)
    rest = descent.descend_(assignment=assignment)
    clock.add(rest.seconds)
    return replace(rest, seconds=clock.seconds)


def _shuffle_some(spec: PermutationSpec, perm: Perm, generator: torch.Generator) -> Perm:
    """Another start: a few units of every group trade places; groups that are nested in one another stay."""
    shuffled = dict(perm)
    for group, *nested in spec.families:
        if not nested:
            size = spec.groups[group]
            some = torch.randperm(size, generator=generator)[: max(2, round(SHUFFLED * size))]
            index = perm[group].clone()
            index[some] = perm[group][some[torch.randperm(len(some), generator=generator)]]
            shuffled[group] = index
    return shuffled


def match_streamed(spec: PermutationSpec, target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> Match:
    """The permutation that `match` finds, of networks that memory does not hold: one pair of tensors at a time.

    Args:
        target, source: mappings that read a tensor each time one is asked for; finite floating tensors of the spec's
            names and shapes, the same on both sides.

    Similarities are built anew at every visit, as none is kept but the last.
    """
    descent = Descent.over(Streamed(spec, target, source))
    descent.colours = tuple((group,) for colour in descent.colours for group in colour)
    descent.kept.entries, descent.solutions = _Newest(), _Newest()
    return descent.descend_()


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
        kept: the similarities of the last visits.
        unplaced: groups that have no permutation yet (in `perm` they stand as the identity).
        held: groups that keep the permutation that they have.
        objective: the permutation's objective over the first `counted` steps.
        version: group -> how often its permutation changed.
        solved: group -> what its last solve looked at.
        solutions: group -> the assignment whose duals start the next one.
    """

    stacks: Stacks
    colours: tuple[tuple[str, ...], ...]
    around: dict[str, Neighbourhood]
    perm: Perm
    kept: KeptSimilarities
    unplaced: set[str] = field(default_factory=set)
    held: frozenset[str] = frozenset()
    objective: float = 0.0
    counted: int = 0
    version: Counter[str] = field(default_factory=Counter)
    solved: dict[str, object] = field(default_factory=dict)
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
            KeptSimilarities(stacks, backend),
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
        self.kept.entries.clear()
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
        if self.counted < stacks.steps:
            with clock.phase("objective", stacks.device):
                self.objective += stacks.objective(stacks.target, self.perm, self.counted)
                self.counted = stacks.steps
        sweeps, improved = 0, True
        while improved and sweeps < max_sweeps:
            improved = any([_visit_(self, colour, clock, assignment) for colour in self.colours])
            for family in nested_families(stacks.spec):
                if self.held.isdisjoint(family):
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
            slots = descent.kept.entries[group].slots
            if all(slot.whole for slot in slots):  # then all of their tensors' other axes have been placed before
                objective += _sum_matched(descent.kept.entries[group].similarity, descent.perm[group])
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
    free = [group for group in colour if group not in descent.held]
    stale = [group for group in free if descent.solved.get(group) != _depends_on(descent, group)]
    if not stale:
        return False
    device = descent.stacks.device
    with clock.phase("similarity", device):
        own = descent.kept.refresh_({group: _usable_slots(descent, group) for group in stale}, descent.perm)
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
            changed = measure_change(descent.perm[group].cpu(), solution.perm)
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
        scores = stacks.similarities([slots[g] for g in members], indices, descent.kept.backend)
    descent.solved[family[0]] = depends
    if not scores:
        return False
    on_cpu = dict(zip(members, (score.cpu() for score in scores), strict=True))
    names, improved = sorted({slot.name for g in around for slot in slots[g]}), False
    with clock.phase("objective", stacks.device):
        before = stacks.objective(names, descent.perm)
    with clock.phase("assignment", stacks.device):
        parts = list(BlockAssignment(stacks.spec, family, on_cpu, assignment).candidates(descent.perm))
    for part in parts:
        candidate = descent.perm | {group: index.to(stacks.device) for group, index in part.items()}
        with clock.phase("objective", stacks.device):
            after = stacks.objective(names, candidate)
        if after - before > RELATIVE_GAIN[scores[0].dtype] * max(abs(before), abs(after)):
            for group in family:
                descent.version[group] += not torch.equal(descent.perm[group], candidate[group])
            descent.perm, descent.objective = candidate, descent.objective + after - before
            before, improved = after, True
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


def _coupled_similarity(descent: Descent, group: str) -> Tensor | None:
    """S of the tensors in which `group` stands on several axes: the objective's gradient at the current permutation."""
    slots, stacks = descent.around[group].coupled, descent.stacks
    if not slots or group in descent.unplaced:
        return None
    terms = stacks.terms(slots, 0, stacks.steps, stacks.axis_indices(slots, descent.perm))
    return similarity(terms, backend=descent.kept.backend)


def _coupled_objective(descent: Descent, group: str, candidate: Tensor) -> float:
    names = sorted({slot.name for slot in descent.around[group].coupled})
    return descent.stacks.objective(names, {**descent.perm, group: candidate})


def _sum_matched(similarity: Tensor, perm: Tensor) -> float:
    """sum_i S[i, perm[i]] in float64."""
    return float(similarity.gather(1, perm[:, None]).sum(dtype=torch.float64))
