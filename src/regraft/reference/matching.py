"""Matching by coordinate descent, literally (Ainsworth et al., Git Re-Basin, Algorithm 1; Chijiwa, eqs. 2 and 3).

One group after the other, one step after the other, one tensor after the other, in float64: every similarity
is built anew and every assignment solved from scratch. `regraft.match` must find the same objective; `place` is what
it begins with. `frank_wolfe` moves all groups at once, and is what it begins with where the start is "joint".
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from regraft.core.tensors import Perm, Tensors
from regraft.matching.nested import BlockAssignment, nested_families
from regraft.symmetry import PermutationSpec
from regraft.symmetry.axes import groups_of


def permute_tensors(spec: PermutationSpec, perm: Perm, tensors: Tensors) -> Tensors:
    """pi(theta), for some or all of the model's tensors: every axis gathered, one after the other."""
    moved = {}
    for name, tensor in tensors.items():
        for axis in range(tensor.dim()):
            index = spec.axis_index(name, axis, perm)
            if index is not None:
                tensor = tensor.index_select(axis, index)
        moved[name] = tensor
    return moved


def unfold(tensor: Tensor, axis: int, positions: Tensor) -> Tensor:
    """The rows of `tensor` along `axis`, one a unit: [n, mult * everything else].

    `positions` [n, mult] says where the occurrences of each unit stand along the axis.
    """
    rows = tensor.movedim(axis, 0)[positions]
    return rows.reshape(len(positions), -1).double()


def similarity(
    spec: PermutationSpec,
    group: str,
    target: Sequence[Tensors],
    source: Sequence[Tensors],
    perm: Perm,
    without: Collection[str] = (),
) -> Tensor:
    """S [n, n] of one group, float64: S[i, j] = sum over steps and tensors of <target unit i, source unit j>,
    the source's other axes permuted by `perm`; without the tensors of which other axes belong to groups `without`."""
    n = spec.groups[group]
    total = torch.zeros(n, n, dtype=torch.float64)
    for g2, g1 in zip(target, source, strict=True):
        for name, axis in spec.tensors_of(group):
            others = [a for g in without for n, a in spec.tensors_of(g) if n == name and a != axis]
            if name not in g2 or others:
                continue
            moved = g1[name]
            for other in range(moved.dim()):
                index = spec.axis_index(name, other, perm)
                if other != axis and index is not None:
                    moved = moved.index_select(other, index)
            positions = spec.positions(name, axis, group)
            total += unfold(g2[name], axis, positions) @ unfold(moved, axis, positions).T
    return total


def objective(spec: PermutationSpec, target: Sequence[Tensors], source: Sequence[Tensors], perm: Perm) -> float:
    """sum_t <G2[t], pi G1[t]>: what matching maximises (the distance's only part that depends on pi)."""
    total = 0.0
    for g2, g1 in zip(target, source, strict=True):
        moved = permute_tensors(spec, perm, g1)
        total += sum(float((g2[name].double() * moved[name].double()).sum()) for name in g2)
    return total


def place(spec: PermutationSpec, target: Sequence[Tensors], source: Sequence[Tensors]) -> Perm:
    """A first permutation: group after group in the order of the specification, each by the tensors alone whose other
    axes are fixed or have been placed before; or the identity, if that is better."""
    identity = spec.identity()
    perm, unplaced = (
        dict(identity),
        [g for g in spec.groups if any(n in target[0] for n, _ in spec.tensors_of(g))],
    )
    for group, *nested in spec.families:
        if nested:
            family = (group, *nested)
            unplaced = [g for g in unplaced if g not in family]
            scores = {g: similarity(spec, g, target, source, perm, unplaced) for g in family}
            unknown = {name for g in unplaced for name, _ in spec.tensors_of(g)}
            known = [
                [{n: t for n, t in step.items() if n not in unknown} for step in side] for side in (target, source)
            ]
            for moved in BlockAssignment(spec, family, scores, "scipy").candidates(perm):
                perm = max(perm, perm | moved, key=partial(objective, spec, known[0], known[1]))
        if nested or group not in unplaced:
            continue
        s = similarity(spec, group, target, source, perm, unplaced)
        _, columns = linear_sum_assignment(s.numpy(), maximize=True)
        candidate = torch.from_numpy(columns)
        if _sum_matched(s, candidate) > _sum_matched(s, perm[group]) * (1 + 1e-12):
            perm[group] = candidate
        unplaced.remove(group)
    return max(perm, identity, key=lambda perm: objective(spec, target, source, perm))


def _sum_matched(s: Tensor, perm: Tensor) -> float:
    return float(s.gather(1, perm[:, None]).sum())


def coordinate_descent(
    spec: PermutationSpec,
    target: Sequence[Tensors],
    source: Sequence[Tensors],
    order: Sequence[str],
    start: Perm | None = None,
    max_sweeps: int = 100,
) -> tuple[Perm, list[float]]:
    """Coordinate descent over the groups in `order` until a sweep changes nothing.

    Args:
        target, source: for each step t the gradients (or weights) by name.
        start: where it begins; where `place` leads when not given.

    Returns:
        The permutation, and the objective at the start and after each sweep.
    """
    perm = dict(start or place(spec, target, source))
    objectives = [objective(spec, target, source, perm)]
    for _ in range(max_sweeps):
        best = objectives[-1]
        for group in order:
            s = similarity(spec, group, target, source, perm)
            _, columns = linear_sum_assignment(s.numpy(), maximize=True)
            candidate = {**perm, group: torch.from_numpy(columns)}
            value = objective(spec, target, source, candidate)
            if value > best + 1e-9 * abs(best):
                perm, best = candidate, value
        for family in nested_families(spec):
            scores = {group: similarity(spec, group, target, source, perm) for group in family}
            for moved in BlockAssignment(spec, family, scores, "scipy").candidates(perm):
                candidate = perm | moved
                value = objective(spec, target, source, candidate)
                if value > best + 1e-9 * abs(best):
                    perm, best = candidate, value
        objectives.append(best)
        if best == objectives[-2]:
            break
    return perm, objectives


def frank_wolfe(
    spec: PermutationSpec, target: Sequence[Tensors], source: Sequence[Tensors], steps: int, gain: float = 0.0
) -> Perm:
    """All groups at once, over doubly stochastic matrices (Vogelstein et al., 2015; Crisostomi et al., C2M3, 2024).

    Every matrix begins with all entries 1 / n. An assignment of its gradient (by autograd) is the direction, and a step
    goes as far as the objective rises, until its slope is at most `gain` times the objective. The permutations are the
    nearest to the matrices at the end.
    """
    groups = [g for g in spec.groups if any(n in target[0] for n, _ in spec.tensors_of(g))]
    shares = {g: torch.full((n, n), 1 / n, dtype=torch.float64) for g in groups if (n := spec.groups[g])}
    perm = spec.identity()
    for _ in range(steps):
        here = {g: share.requires_grad_() for g, share in shares.items()}
        relaxed = relaxed_objective(spec, target, source, here)
        scores = dict(zip(here, torch.autograd.grad(relaxed, list(here.values())), strict=True))
        value = float(relaxed.detach())
        shares = {g: share.detach() for g, share in here.items()}
        perm = assign_all(spec, scores, perm)
        ends = {g: torch.eye(len(share), dtype=torch.float64)[perm[g]] for g, share in shares.items()}
        slope = sum(float((scores[g] * (ends[g] - shares[g])).sum()) for g in shares)
        if slope <= gain * abs(value):
            break
        bend = float(relaxed_objective(spec, target, source, ends)) - value - slope
        rate = 1.0 if 2 * bend >= -slope else -slope / (2 * bend)
        shares = {g: (1 - rate) * share + rate * ends[g] for g, share in shares.items()}
    return assign_all(spec, shares, perm)


def relaxed_objective(
    spec: PermutationSpec, target: Sequence[Tensors], source: Sequence[Tensors], shares: Tensors
) -> Tensor:
    """`objective` where each group has a matrix P [n, n] instead: unit i becomes the sum over j of P[i, j] unit j."""
    total = torch.zeros((), dtype=torch.float64)
    for g2, g1 in zip(target, source, strict=True):
        for name in g2:
            moved = g1[name].double()
            for axis in range(moved.dim()):
                for group in groups_of(spec.axes[name][axis]):
                    positions = spec.positions(name, axis, group)
                    rows = moved.movedim(axis, 0)
                    mixed = torch.tensordot(shares[group], rows[positions], 1).flatten(0, 1)
                    moved = rows.index_copy(0, positions.flatten(), mixed).movedim(0, axis)
            total = total + (g2[name].double() * moved).sum()
    return total


def assign_all(spec: PermutationSpec, scores: Tensors, perm: Perm) -> Perm:
    """The permutations that collect most of the scores; a group without any keeps its own."""
    perm = dict(perm)
    for group, *nested in spec.families:
        if nested:
            known = {g: scores[g] for g in (group, *nested) if g in scores}
            perm |= next(BlockAssignment(spec, (group, *nested), known, "scipy").candidates(perm))
        elif group in scores:
            perm[group] = torch.from_numpy(linear_sum_assignment(scores[group].numpy(), maximize=True)[1])
    return perm
