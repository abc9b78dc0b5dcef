"""A start for the descent that moves all groups at once: Frank-Wolfe over doubly stochastic matrices.

(Vogelstein et al., Fast approximate quadratic programming for graph matching, 2015; for networks Crisostomi et al.,
C2M3, 2024.) Every group has a doubly stochastic matrix P, which begins with all entries 1 / n. A step goes from there
towards the permutations that the objective's gradient prefers, as far as the objective rises.

The gradient of a group is its similarity, its neighbours averaged by their P. It is linear in each of them, so that no
P is multiplied with weights: after a step to (1 - r) P + r pi it is (1 - r) of the last similarity and r of that at the
permutation pi, which is the same product as in the descent. Terms without a neighbour are computed once. Along a step
the objective is a parabola, as no more than two axes of a weight are permuted: what one axis alone is permuted of
counts once in the sum of <S, P> over the groups, the rest twice.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from regraft.core.clock import Clock
from regraft.core.tensors import Perm, Tensors
from regraft.matching.nested import assign_groups
from regraft.matching.stacks import Neighbourhood, Slot, Stacks
from regraft.symmetry import PermutationSpec
from regraft.symmetry.axes import groups_of
from regraft_kernels import Assignment, Term, similarity_many

JOINT_STEPS = 12
# Ends where a step can raise the objective by no more than this part of it.
JOINT_GAIN = 3e-4


def find_joint_start(
    stacks: Stacks, around: Mapping[str, Neighbourhood], clock: Clock, backend: str, assignment: str
) -> Perm:
    """Where to begin a descent over the filled steps of ``stacks``; ``around``: what each group's similarity is of."""
    slots = {g: (*n.single, *n.coupled) for g, n in around.items()}
    once, twice = (
        {g: part for g, own in slots.items() if (part := tuple(slot for slot in own if bool(slot.others) == others))}
        for others in (False, True)
    )
    solutions: dict[str, Assignment] = {}
    perm = {group: index.to(stacks.device) for group, index in stacks.spec.identity().items()}
    with clock.phase("similarity", stacks.device):
        fixed = dict(zip(once, stacks.similarities([*once.values()], [{}] * len(once), backend), strict=True))
        means = [[_term_of_means(stacks, slot) for slot in own] for own in twice.values()]
        here = dict(zip(twice, similarity_many(means, backend=backend), strict=True))
        shares = {g: torch.full_like((fixed | here)[g], 1 / stacks.spec.groups[g]) for g in around}
    for _ in range(JOINT_STEPS):
        with clock.phase("assignment", stacks.device):
            scores = {g: fixed[g] + here[g] if g in fixed and g in here else (fixed | here)[g] for g in around}
            perm, solutions = assign_groups(stacks.spec, scores, perm, assignment, solutions)
        with clock.phase("similarity", stacks.device):
            indices = [stacks.axis_indices(own, perm) for own in twice.values()]
            there = dict(zip(twice, stacks.similarities([*twice.values()], indices, backend), strict=True))
        with clock.phase("objective", stacks.device):
            rate = _best_rate(fixed, here, there, shares, perm)
        if not rate:
            break
        with clock.phase("similarity", stacks.device):
            for group, share in shares.items():
                share.mul_(1 - rate)[torch.arange(len(share), device=share.device), perm[group]] += rate
            for group, similarity in here.items():
                similarity.lerp_(there[group], rate)
    with clock.phase("assignment", stacks.device):
        return assign_groups(stacks.spec, shares, perm, assignment, {})[0]


def _best_rate(fixed: Tensors, here: Tensors, there: Tensors, shares: Tensors, perm: Perm) -> float:
    """How far to go from P to a permutation: where the objective is highest, 0 where its rise is below `JOINT_GAIN`.

    fixed: the similarities of what one axis is permuted of; here, there: of the rest, at P and at the permutation.
    """
    once, twice = (sum(_collect(s, shares[g]) for g, s in part.items()) for part in (fixed, here))
    once_ahead, twice_ahead, twice_there = (
        sum(_pick(s, perm[g]) for g, s in part.items()) for part in (fixed, here, there)
    )
    slope = once_ahead - once + twice_ahead - twice
    bend = once_ahead - once + (twice_there - twice) / 2 - slope
    if slope <= JOINT_GAIN * abs(once + twice / 2):
        return 0.0
    return 1.0 if 2 * bend >= -slope else -slope / (2 * bend)


def _collect(similarity: Tensor, share: Tensor) -> float:
    return float(torch.linalg.vecdot(similarity, share).sum(dtype=torch.float64))


def _pick(similarity: Tensor, perm: Tensor) -> float:
    return float(similarity.gather(1, perm[:, None]).sum(dtype=torch.float64))


def _term_of_means(stacks: Stacks, slot: Slot) -> Term:
    """Where every P has all entries 1 / n: on the source's other axes each unit is the mean of its group's units."""
    target, source = (side[slot.name][: stacks.steps] for side in (stacks.target, stacks.source))
    for axis in slot.others:
        source = _average_units(stacks.spec, slot.name, axis, source)
    return Term(target, source, slot.axis, slot.positions)


def _average_units(spec: PermutationSpec, name: str, axis: int, stack: Tensor) -> Tensor:
    dim = axis + 1
    for group in groups_of(spec.axes[name][axis]):
        positions = spec.positions(name, axis, group).to(stack.device)
        mean = stack.movedim(dim, 0)[positions].mean(0)  # [occurrences, ...]
        every = mean.expand(len(positions), *mean.shape).flatten(0, 1).movedim(0, dim)
        stack = stack.index_copy(dim, positions.flatten(), every)
    return stack
