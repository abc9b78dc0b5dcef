"""Published algorithms as their authors' code does them, to compare ours with."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment

from regraft.core.tensors import Perm, Tensors
from regraft.matching.descent import colours
from regraft.symmetry import PermutationSpec

GIT_REBASIN = "weights (Git Re-Basin)"


def match_like_git_rebasin(
    spec: PermutationSpec, target: Tensors, source: Tensors, generator: torch.Generator | None = None
) -> Perm:
    """What one would write first, and what is published: from the identity, at every step the whole similarity by
    torch in float32, scipy, no memory. The order of the groups is the specification's, or drawn anew in every sweep, as
    the authors' is. Groups that are nested in one another, which it does not know, stay as they are.
    """
    perm = spec.identity()
    groups = [group for members in colours(spec, frozenset(target)) for group in members]
    improved = True
    while improved:
        improved = False
        if generator is not None:
            groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
        for group in groups:
            score = _similarity(spec, group, target, source, perm).double().numpy()
            _, columns = linear_sum_assignment(score, maximize=True)
            before = score[range(len(score)), perm[group].numpy()].sum()
            after = score[range(len(score)), columns].sum()
            if after > before + 1e-7 * abs(before):
                perm = {**perm, group: torch.from_numpy(columns)}
                improved = True
    return perm


def _similarity(spec: PermutationSpec, group: str, target: Tensors, source: Tensors, perm: Perm) -> torch.Tensor:
    total = torch.zeros(spec.groups[group], spec.groups[group])
    for name, axis in spec.tensors_of(group):
        if name not in target:
            continue
        moved = source[name]
        for other in range(moved.dim()):
            index = spec.axis_index(name, other, perm)
            if other != axis and index is not None:
                moved = moved.index_select(other, index)
        positions = spec.positions(name, axis, group)
        left, right = (tensor.movedim(axis, 0)[positions].flatten(1) for tensor in (target[name], moved))
        total += left @ right.T
    return total
