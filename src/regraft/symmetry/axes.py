"""One axis of a tensor: which units stand along it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """``count`` consecutive units of ``group`` from ``start``, each standing ``repeat`` times in a row.

    ``group`` None: ``count * repeat`` positions that no permutation moves.
    """

    group: str | None
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which is not used
    repeat: int = 1

    @property
    def length(self) -> int:
        return self.count * self.repeat


Axis = tuple[Segment, ...]


def groups_of(axis: Axis) -> list[str]:
    """The groups that move along an axis, in order of appearance."""
    return list(dict.fromkeys(s.group for s in axis if s.group is not None))


def is_simple(groups: Mapping[str, int], axis: Axis) -> bool:
    """The whole group, once, in order."""
    return len(axis) == 1 and axis[0].group is not None and axis[0][1:] == (0, groups[axis[0].group], 1)


def positions_of(axis: Axis) -> dict[str, Tensor]:
    """group -> int64 [units, multiplicity], the places of each unit in rising order."""
    units: dict[str, list[Tensor]] = {}
    places: dict[str, list[Tensor]] = {}
    offset = 0
    for group, start, count, repeat in axis:
        if group is not None:
            units.setdefault(group, []).append(torch.arange(start, start + count).repeat_interleave(repeat))
            places.setdefault(group, []).append(torch.arange(offset, offset + count * repeat))
        offset += count * repeat
    result = {}
    for group, parts in units.items():
        unit = torch.cat(parts)
        size = int(unit.max()) + 1
        result[group] = torch.cat(places[group])[unit.argsort(stable=True)].view(size, -1)
    return result


def fixed_length(axis: Axis) -> int:
    return sum(segment.length for segment in axis if segment.group is None)


def check_axis(groups: Mapping[str, int], where: str, axis: Axis) -> None:
    counts: dict[str, Tensor] = {}
    for group, start, count, repeat in axis:
        if start < 0 or count < 0 or repeat < 1:
            raise ValueError(f"{where}: the segment {(group, start, count, repeat)} is malformed")
        if group is None:
            continue
        if group not in groups:
            raise ValueError(f"{where}: there is no group {group!r}")
        if start + count > groups[group]:
            raise ValueError(f"{where}: group {group!r} has {groups[group]} units, not {start + count}")
        times = counts.setdefault(group, torch.zeros(groups[group], dtype=torch.int64))
        times[start : start + count] += repeat
    for group, times in counts.items():
        if times.min() != times.max():
            raise ValueError(f"{where}: not every unit of group {group!r} occurs, or not each equally often")


def parse_axis(groups: Mapping[str, int], where: str, axis: Any) -> Axis:
    if isinstance(axis, bool):
        raise ValueError(f"{where}: expected a length, a group or a list of segments, found {axis!r}")
    if isinstance(axis, int):
        return (Segment(None, 0, axis),)
    if isinstance(axis, str):
        if axis not in groups:
            raise ValueError(f"{where}: there is no group {axis!r}")
        return (Segment(axis, 0, groups[axis]),)
    try:
        segments = tuple(Segment(*segment) for segment in axis)
    except TypeError:
        segments = ()
    well_typed = all(
        (s.group is None or isinstance(s.group, str)) and all(type(number) is int for number in s[1:]) for s in segments
    )
    if not segments or not well_typed:
        raise ValueError(
            f"{where}: expected a length, a group or a list of segments [group, start, count, repeat], found {axis!r}"
        )
    return segments


def plain_axis(groups: Mapping[str, int], axis: Axis) -> Any:
    if is_simple(groups, axis):
        return axis[0].group
    if len(axis) == 1 and axis[0] == Segment(None, 0, axis[0].count):
        return axis[0].count
    return [list(segment) for segment in axis]
