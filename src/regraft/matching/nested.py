"""Assignments of groups that are nested in one another: blocks that move whole, and the units in them.

The best permutation of blocks is an assignment too: a pair of blocks is worth what the best assignment of the one's
units to the other's is worth. So the inner problems are solved for every pair, then the outer one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.core.tensors import Perm
from regraft.symmetry import PermutationSpec
from regraft.symmetry.blocks import alike
from regraft_kernels import Assignment, assign_many
from regraft_kernels.assignment import assign_stack


def assign_groups(
    spec: PermutationSpec, scores: Mapping[str, Tensor], perm: Perm, backend: str, last: Mapping[str, Assignment]
) -> tuple[Perm, dict[str, Assignment]]:
    """The permutations that collect most of the scores [n, n], and the assignments of groups in no blocks.

    perm: of groups without a score, kept. last: the assignments of similar scores, to start from.
    """
    alone = [g for g, *nested in spec.families if not nested and g in scores]
    solutions = assign_many(
        [scores[g] for g in alone],
        backend=backend,
        warm=[last[g].start if g in last else None for g in alone],
        names=[f"similarity of group {g!r}" for g in alone],
    )
    perm = perm | {g: solution.perm.to(scores[g].device) for g, solution in zip(alone, solutions, strict=True)}
    for family in nested_families(spec):
        if known := {g: scores[g] for g in family if g in scores}:
            on_cpu = {g: score.cpu() for g, score in known.items()}
            best = next(BlockAssignment(spec, family, on_cpu, backend).candidates(perm))
            perm |= {group: index.to(perm[group].device) for group, index in best.items()}
    return perm, dict(zip(alone, solutions, strict=True))


def nested_families(spec: PermutationSpec) -> list[tuple[str, ...]]:
    """Those of ``spec.families`` that are more than one group."""
    return [family for family in spec.families if len(family) > 1]


@dataclass(frozen=True)
class BlockAssignment:
    """Groups that permute together (one of ``spec.families``), and their similarities.

    scores: group -> [n, n] on the CPU; groups that no tensor holds are absent. backend: of `regraft_kernels.assign`.
    """

    spec: PermutationSpec
    groups: Sequence[str]
    scores: Mapping[str, Tensor]
    backend: str = "auto"

    def candidates(self, perm: Perm) -> Iterator[Perm]:
        """Permutations of these groups: with blocks assigned anew, then with those of ``perm``, read when asked for.

        Each is optimal in what it assigns, but where the units of several blocks must move alike: there blocks are
        compared as if they need not.
        """
        first = torch.zeros(1, dtype=torch.int64)
        outer = {group: index[0] for group, index in self._assign_blocks(None, first, first)[1].items()}
        yield self._fill(outer)
        yield self._fill({group: perm[group].cpu() for group in outer})

    def _inside(self, outer: str | None) -> list[str]:
        """The groups whose blocks move as ``outer`` (None: those that are in no blocks)."""
        return [group for group in self.groups if self.spec.blocks.get(group, (None,))[0] == outer]

    def _assign_blocks(self, outer: str | None, rows: Tensor, columns: Tensor) -> tuple[Tensor, Perm]:
        """What it is worth to move block ``columns[b]`` of ``outer`` to ``rows[b]``, [B] for B pairs; and of each group
        inside that holds blocks the units that come with it, [B, units in one block]."""
        worth, perm = torch.zeros(len(rows), dtype=torch.float64), {}
        for group in self._inside(outer):
            count = self.spec.groups[group] // (1 if outer is None else self.spec.groups[outer])
            values = self._blocks(group, count, rows, columns)
            parts: Perm = {}
            if self._inside(group):
                inner = [block[:, None] * count + torch.arange(count) for block in (rows, columns)]
                pairs = (inner[0][:, :, None].expand(values.shape), inner[1][:, None, :].expand(values.shape))
                within, parts = self._assign_blocks(group, *(pair.flatten() for pair in pairs))
                values = values + within.view(values.shape)
            best, objectives = assign_stack(values, backend=self.backend)
            worth += objectives
            if self._inside(group):
                perm[group] = columns[:, None] * count + best
            for name, index in parts.items():
                each = index.view(*values.shape, -1)
                perm[name] = each.take_along_dim(best[:, :, None, None], 2).flatten(1)
        return worth, perm

    def _blocks(self, group: str, count: int, rows: Tensor, columns: Tensor) -> Tensor:
        """[B, count, count]: pairs of blocks of a group's similarity, zeros where no tensor holds it."""
        if group not in self.scores:
            return torch.zeros(len(rows), count, count, dtype=torch.float64)
        return _in_blocks(self.scores[group], count)[rows, columns]

    def _fill(self, holding: Perm) -> Perm:
        """The permutation of all groups, given those of the groups that hold blocks."""
        perm = dict(holding)
        for group in self.groups:  # the outermost first
            around, size = self.spec.blocks.get(group, ()), self.spec.groups[group]
            if group in perm:
                continue
            if len(around) == 2:
                perm[group] = alike(perm[around[0]], perm[around[1]], size)
                continue
            blocks = perm[around[0]] if around else torch.zeros(1, dtype=torch.int64)
            count = size // len(blocks)
            values = _in_blocks(self._with_alike(group, perm), count)[torch.arange(len(blocks)), blocks]
            best, _ = assign_stack(values, backend=self.backend)
            perm[group] = (blocks[:, None] * count + best).flatten()
        return perm

    def _with_alike(self, inner: str, perm: Perm) -> Tensor:
        """The similarity of a group, and of all groups whose blocks' units move as it does."""
        n = self.spec.groups[inner]
        values = torch.zeros(n, n, dtype=torch.float64)
        if inner in self.scores:
            values += self.scores[inner]
        for group in self.groups:
            outer, *others = self.spec.blocks.get(group, ("",))
            if others != [inner] or group not in self.scores:
                continue
            blocks, rows = perm[outer], torch.arange(self.spec.groups[outer])
            count = self.spec.groups[group] // len(blocks)
            share = len(blocks) * count // n  # blocks to each count of the inner group's units
            added = self._blocks(group, count, rows, blocks).double()
            _in_blocks(values, count).index_put_((rows // share, blocks // share), added, accumulate=True)
        return values


def _in_blocks(similarity: Tensor, count: int) -> Tensor:
    """[m count, m count] as pairs of blocks [m, m, count, count]; a view of a contiguous one."""
    blocks = len(similarity) // count
    return similarity.reshape(blocks, count, blocks, count).transpose(1, 2)
