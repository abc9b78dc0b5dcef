"""Assignments of groups that are nested in one another: blocks that move whole, and the units in them.

The best permutation of blocks is an assignment too: a pair of blocks is worth what the best assignment of the one's
units to the other's is worth. So the inner problems are solved for every pair, then the outer one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from regraft.core.tensors import Perm
from regraft.symmetry import PermutationSpec
from regraft.symmetry.blocks import alike
from regraft_kernels import assign


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
        outer: Perm = {}
        self._assign_blocks_(outer, None, 0, 0)
        yield self._fill(outer)
        yield self._fill({group: perm[group].cpu() for group in outer})

    def _inside(self, outer: str | None) -> list[str]:
        """The groups whose blocks move as ``outer`` (None: those that are in no blocks)."""
        return [group for group in self.groups if self.spec.blocks.get(group, (None,))[0] == outer]

    def _assign_blocks_(self, perm: Perm, outer: str | None, row: int, column: int) -> float:
        """What it is worth to move block ``column`` of ``outer`` to ``row``; fills ``perm`` for the blocks inside."""
        worth = 0.0
        for group in self._inside(outer):
            count = self.spec.groups[group] // (1 if outer is None else self.spec.groups[outer])
            rows, columns = row * count, column * count
            values = torch.zeros(count, count, dtype=torch.float64)
            if group in self.scores:
                values += self.scores[group][rows : rows + count, columns : columns + count]
            parts: dict[tuple[int, int], Perm] = {}
            if self._inside(group):
                for i, j in product(range(count), repeat=2):
                    parts[i, j] = {}
                    values[i, j] += self._assign_blocks_(parts[i, j], group, rows + i, columns + j)
            best = assign(values, backend=self.backend)
            worth += best.objective
            if parts:
                index = torch.zeros(self.spec.groups[group], dtype=torch.int64)
                index[rows : rows + count] = columns + best.perm
                for part in ({group: index}, *(parts[pair] for pair in enumerate(best.perm.tolist()))):
                    _add_(perm, part)
        return worth

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
            blocks = perm[around[0]].tolist() if around else [0]
            count, values = size // len(blocks), self._with_alike(group, perm)
            perm[group] = torch.empty(size, dtype=torch.int64)
            for b, other in enumerate(blocks):
                rows, columns = (slice(x * count, (x + 1) * count) for x in (b, other))
                best = assign(values[rows, columns], backend=self.backend)
                perm[group][rows] = other * count + best.perm
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
            blocks = perm[outer].tolist()
            count = self.spec.groups[group] // len(blocks)
            share = len(blocks) * count // n  # blocks to each count of the inner group's units
            for b, other in enumerate(blocks):
                rows, columns = (slice(x * count, (x + 1) * count) for x in (b, other))
                there, here = (slice(x // share * count, (x // share + 1) * count) for x in (b, other))
                values[there, here] += self.scores[group][rows, columns]
        return values


def _add_(perm: Perm, part: Perm) -> None:
    """What was found for some blocks of a group (everything else in ``part`` is zero) beside that for others."""
    for group, index in part.items():
        perm[group] = perm[group] + index if group in perm else index
