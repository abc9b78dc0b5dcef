"""Why an axis of a weight stays: the operator, the module, and what it does to the units.

Units stop moving in four ways: they meet values that do not move, an operator holds them, an operator makes one unit of
them, or each is told apart from all others. Which one is read off the history of the disjoint sets (each union knows
the operator that demanded it) and off the ties.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from regraft.symmetry.groups import tie_hashes
from regraft.symmetry.labels import Flow, Leaf
from regraft.symmetry.spec import PermutationSpec


class Cause(NamedTuple):
    """How units along an axis stopped moving, and at which event of the flow (-1: none)."""

    kind: str
    event: int


INPUT, OUTPUT, UNUSED = "an input", "an output", "no units"

LOOKUP_OPERATORS = ("embedding", "index", "embedding_bag")
"""Operators whose first operand has rows that inputs choose: that these stay is no loss of units."""

SAYS = {
    "fixed": "lets them meet values that do not move",
    "held": "holds them in place",
    "one": "makes one unit of them",
    "apart": "tells them apart",
}


@dataclass(frozen=True)
class Reason:
    """``text``: for people. ``lost``: units that an operator took, of which the user is told."""

    text: str
    cause: Cause
    lost: bool


def find_reasons(flow: Flow, spec: PermutationSpec, leaves: Iterable[Leaf]) -> dict[tuple[str, int], Reason]:
    """(tensor, axis) -> why it stays, of the first two axes of every weight."""
    staying: dict[tuple[str, int], Tensor | None] = {}
    element_wise: dict[tuple[str, int], Cause] = {}
    for leaf in leaves:
        if leaf.name in spec.axes and leaf.learned and len(leaf.shape) > 1:
            staying |= {(leaf.name, a): leaf.axes[a] for a in spec.staying_axes(leaf.name)}
            if leaf.scalars is not None:
                element_wise |= {
                    (leaf.name, a): Cause("fixed", leaf.used_at) for a, x in enumerate(leaf.axes) if x is None
                }
    causes = {key: element_wise.get(key) or _cause_of_union(flow, labels) for key, labels in staying.items()}
    apart = {key: x for key, x in staying.items() if causes[key] is None and x is not None}
    causes |= _causes_of_ties(flow, apart)
    return {key: _say(flow, cause) for key, cause in causes.items() if cause is not None}


def _say(flow: Flow, cause: Cause) -> Reason:
    if cause.event < 0:
        return Reason(cause.kind, cause, lost=False)
    event = flow.events[cause.event]
    if event.operator in (OUTPUT, UNUSED):
        return Reason(event.operator, cause, lost=False)
    if cause.kind == "fixed" and event.plain:
        return Reason(INPUT, cause, lost=False)
    looked_up = cause.kind == "held" and event.name in LOOKUP_OPERATORS
    lost = cause.kind != "fixed" and not looked_up and event.operator not in flow.frozen
    return Reason(f"{event.text} {SAYS[cause.kind]}", cause, lost)


def _cause_of_union(flow: Flow, labels: Tensor | None) -> Cause | None:
    """None where the units are neither fixed nor one: ties keep them apart."""
    if labels is None:
        return Cause(UNUSED, -1)
    roots = flow.units.roots(labels).flatten()
    if not bool(roots.any()):
        events, how = zip(*(flow.units.when_fixed(x) for x in labels.flatten().tolist()), strict=True)
        if events[0] < 0:
            return Cause(INPUT, -1)
        event = Counter(events).most_common(1)[0][0]
        before = _count_merged(flow, labels, event)
        return Cause("one", before) if before >= 0 else Cause(how[events.index(event)], event)
    if len(roots.unique()) <= max(len(roots) // 2, 1):
        merged = _count_merged(flow, labels, len(flow.events))
        return Cause("one", merged) if merged >= 0 else None
    return None


def _count_merged(flow: Flow, labels: Tensor, before: int) -> int:
    """The event at which most neighbours along an axis became one, if it was ``before`` another; else -1."""
    line = labels.flatten().tolist()
    when = Counter(flow.units.when_joined(a, b) for a, b in pairwise(line) if a != b)
    if not when:
        return -1
    event, times = when.most_common(1)[0]
    return event if 0 <= event < before and times > len(line) // 2 else -1


def _causes_of_ties(flow: Flow, axes: dict[tuple[str, int], Tensor]) -> dict[tuple[str, int], Cause | None]:
    """The first tie that tells most units of an axis apart."""
    roots = {key: flow.units.roots(labels).flatten().unique().long() for key, labels in axes.items()}
    best: dict[tuple[str, int], tuple[int, int]] = {}
    for event, total in tie_hashes(flow) if axes else ():
        for key, units in roots.items():
            classes = len(total[units].unique())
            if classes > best.get(key, (1, -1))[0]:
                best[key] = (classes, event)
    return {key: Cause("apart", best[key][1]) if key in best else Cause("alone of their kind", -1) for key in axes}


def format_losses(reasons: dict[tuple[str, int], Reason]) -> list[str]:
    """One sentence for each operator and module that took units."""
    lost: dict[str, list[tuple[str, int]]] = {}
    for key, reason in reasons.items():
        if reason.lost:
            lost.setdefault(reason.text, []).append(key)
    return [f"units of {_name_axes(keys)} stay fixed: operator {text}" for text, keys in lost.items()]


def _name_axes(keys: Sequence[tuple[str, int]]) -> str:
    (name, axis), *more = keys
    return f"axis {axis} of {name!r}" + (f" and of {len(more)} more axes" if more else "")


def reason_texts(reasons: dict[tuple[str, int], Reason]) -> dict[str, str]:
    """tensor:axis -> why it stays."""
    return {f"{name}:{axis}": reason.text for (name, axis), reason in reasons.items()}
