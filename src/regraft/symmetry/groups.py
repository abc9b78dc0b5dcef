"""From labels to groups: units of equal signature may trade places.

Each tie, and each axis of a parameter, adds for every unit a hash of its pairs of occurrences to the unit's
signature. Fixed scalars count as their own position: a unit that is tied to all different positions is alone, and
does not move.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from regraft.symmetry.axes import Axis, Segment
from regraft.symmetry.labels import Event, Flow, Leaf, Tie, Value, line, varying
from regraft.symmetry.nesting import arrange, mix, nest
from regraft.symmetry.spec import PermutationSpec


def specify(flow: Flow, leaves: Sequence[Leaf]) -> PermutationSpec:
    """The specification that a finished pass of labels amounts to."""
    all_leaves = [*leaves, *flow.derived]
    fix_elementwise_axes(flow, all_leaves)
    flow.begin(Event("the nesting of blocks"))
    groups, blocks = arrange(flow, nest(flow, lambda: signatures(flow, all_leaves)))
    # of every root: the number of its group (-1: fixed), and of its unit
    group = np.full(flow.units.count, -1)
    unit = np.zeros(flow.units.count, dtype=np.int64)
    for number, units in enumerate(groups.values()):
        group[units] = number
        unit[units] = np.arange(len(units))
    names = list(groups)

    def axis(labels: Tensor | None, length: int) -> Axis:
        roots = np.zeros(length, dtype=np.int64) if labels is None else flow.units.roots(labels).numpy()
        return _segments(names, group[roots], unit[roots])

    axes = {leaf.name: tuple(map(axis, leaf.axes, leaf.shape)) for leaf in leaves}
    return PermutationSpec({name: len(units) for name, units in groups.items()}, axes, blocks=blocks)


def fix_elementwise_axes(flow: Flow, leaves: Iterable[Leaf]) -> None:
    """A tensor used element by element moves along one axis, or not at all."""
    for leaf in leaves:
        if leaf.scalars is None or not leaf.shape:
            continue
        flow.units.event = leaf.used_at
        along = varying(flow.units.roots(leaf.scalars))
        if len(along) > 1:
            flow.freeze(Value(leaf, leaf.shape))
            continue
        axis = along[0] if along else int(np.argmax(leaf.shape))
        flow.join(flow.axis(leaf, axis), line(leaf.scalars, axis))
        for other, labels in enumerate(leaf.axes):
            if other != axis and labels is not None:
                flow.freeze(labels, "fixed")


# ---- signatures


def signatures(flow: Flow, leaves: Sequence[Leaf]) -> np.ndarray:
    """uint64 for every label that is a root: equal where units may trade places."""
    total = torch.zeros(flow.units.count, dtype=torch.int64)
    ranks = _Ranks(flow)
    for number, tie in enumerate(flow.ties, 1):
        _add_tie(flow, total, tie, number, ranks)
    number = len(flow.ties)
    for leaf in leaves:
        for labels in leaf.axes:
            number += 1
            if labels is not None:
                own_ranks = ranks(labels)
                _add(total, flow.units.roots(labels), _mix(_salt(own_ranks, number)) + own_ranks)
    return total.numpy().view(np.uint64)


def tie_hashes(flow: Flow) -> Iterator[tuple[int, Tensor]]:
    """The event of every tie, and what it adds to the signatures: int64 for every label that is a root."""
    ranks = _Ranks(flow)
    for tie in flow.ties:
        total = torch.zeros(flow.units.count, dtype=torch.int64)
        _add_tie(flow, total, tie, 1, ranks)
        yield tie.event, total


class _Ranks:
    """:func:`occurrences` of label tensors, each computed once."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.known: dict[int, Tensor] = {}

    def __call__(self, labels: Tensor) -> Tensor:
        if id(labels) not in self.known:
            self.known[id(labels)] = occurrences(self.flow.units.roots(labels))
        return self.known[id(labels)]


def _add_tie(flow: Flow, total: Tensor, tie: Tie, number: int, ranks: _Ranks) -> None:
    keys = tie.positions.long()
    if tie.sources:
        table = torch.cat([ranks(source).flatten() + (j << 40) for j, source in enumerate(tie.sources)])
        keys = torch.where(keys < 0, torch.iinfo(torch.int64).min, table[keys.clamp(min=0)])
    _add(total, flow.units.roots(tie.labels), _mix(_salt(ranks(tie.labels), number)) + keys)


def _salt(ranks: Tensor, number: int) -> Tensor:
    return ranks + number * 0x9E3779B97F4A7C15 % (1 << 62)


def _add(total: Tensor, roots: Tensor, keys: Tensor) -> None:
    """Adds to every unit a hash of the key at each of its places."""
    total.index_add_(0, roots.flatten().long(), _mix(keys).flatten())


def _mix(x: Tensor) -> Tensor:
    """`mix` on int64 with wrap-around."""
    return torch.from_numpy(mix(x.numpy().view(np.uint64)).view(np.int64)).view(x.shape)


def occurrences(roots: Tensor) -> Tensor:
    """int64 of the same shape: the rank of each scalar among those of its unit, in row-major order (a fixed one:
    its own place, from below)."""
    along = varying(roots)
    if not roots.numel():
        return roots.long()
    if len(along) > 1:
        ranks = _ranks(roots.flatten()).view(roots.shape)
    else:  # one line, repeated: any numbering of the repetitions will do, as long as it is the same for all units
        axis = along[0] if along else 0
        units = line(roots, axis) if roots.ndim else roots.reshape(1)
        shape = [1 if d == axis else length for d, length in enumerate(roots.shape)]
        ranks = torch.arange(math.prod(shape)).view(shape) * (len(units) + 1)
        ranks = ranks + _ranks(units).view([-1 if d == axis else 1 for d in range(roots.ndim)])
    return torch.where(roots == 0, -1 - torch.arange(roots.numel()).view(roots.shape), ranks)


def _ranks(line: Tensor) -> Tensor:
    order = line.argsort(stable=True)
    ordered = line[order]
    start = torch.searchsorted(ordered, ordered)  # where each unit's run begins
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(line)) - start
    return ranks


# ---- segments


def _segments(names: Sequence[str], group: np.ndarray, unit: np.ndarray) -> Axis:
    """One axis as few segments: runs of equal positions first, then runs of consecutive units."""
    runs, repeat = _runs((np.diff(group) != 0) | (np.diff(unit) != 0) & (group[1:] >= 0), len(group))
    group, unit = group[runs], unit[runs]
    same = (np.diff(group) == 0) & (np.diff(unit) == 1) & (np.diff(repeat) == 0) & (group[1:] >= 0)
    starts, count = _runs(~same, len(group))
    return tuple(
        Segment(names[g], u, n, r) if g >= 0 else Segment(None, 0, r)
        for g, u, n, r in zip(*(x.tolist() for x in (group[starts], unit[starts], count, repeat[starts])), strict=True)
    )


def _runs(edges: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Where runs start, and how long they are; ``edges``: between which neighbours they end."""
    starts = np.concatenate([[0], np.flatnonzero(edges) + 1]) if length else np.zeros(0, dtype=np.int64)
    return starts, np.diff(starts, append=length)
