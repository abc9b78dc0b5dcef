"""Operators that choose units by what they hold (a router's best experts), and look up what belongs to the chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.symmetry.labels import Choice, Flow, Leaf, Value, is_repeating, line, unexpand, varying
from regraft.symmetry.rules import Operation, Rule, each_size, rule
from regraft.symmetry.views import ALIASES, VIEWS, slices_of, table_of

SELECTING = ALIASES | VIEWS | {"to", "_to_copy"}
"""Operators that give, of places that were chosen, the same or some of them."""


def apply_choice(flow: Flow, op: Operation) -> Any:
    """What an operator makes of a :class:`Choice`, NotImplemented where it is not known to move with the units."""
    first = next(iter(op.arguments.values()))
    if isinstance(first, Choice):
        others = [x for x in op.leaves if isinstance(x, Value | Choice | Tensor) and x is not first]
        if op.name in SELECTING and not others:
            return each_size(lambda size: Choice(first.line, tuple(size)), op.out)
        if op.name == "one_hot" and op.out[-1] == len(first.line):
            return Value(first.line.expand(op.out), tuple(op.out))
        return NotImplemented
    if op.name in LOOKUPS:
        return LOOKUPS[op.name](flow, op, *op.arguments.values())
    return NotImplemented


@rule("argmax", "argmin", "argsort", "sort", "topk")
def _choose(flow: Flow, op: Operation, x: Any, *_: Any) -> Any:
    """Along ``dim``; what is chosen stands in the order of its values, in which the order of units does not matter."""
    if not isinstance(x, Value):
        return NotImplemented
    if flow.is_fixed(flow.labels(x)):
        return each_size(flow.fixed_value, op.out)
    units = _only_line(flow, x, op.arguments["dim"])
    if units is None or op.arguments.get("sorted") is False:
        return NotImplemented
    if isinstance(op.out, torch.Size):
        return Choice(units, tuple(op.out))
    values, places_chosen = op.out
    return [flow.fixed_value(values), Choice(units, tuple(places_chosen))]


def _only_line(flow: Flow, x: Value, dim: int | None) -> Tensor | None:
    """int32 [n]: the units along one dimension, where they are all different and the same in every line."""
    if dim is None:
        return None
    roots = flow.units.roots(unexpand(flow.labels(x)))
    units = line(roots, dim % roots.ndim)
    if varying(roots) != [dim % roots.ndim] or is_repeating(units) or not units.all():
        return None
    return units


def _index(flow: Flow, op: Operation, x: Any, indices: Any) -> Any:
    """A slice of a parameter for every place chosen, along its first axis."""
    if len(indices) != 1 or not isinstance(x, Value) or not isinstance(x.base, Leaf):
        return NotImplemented
    leaf, (choice,) = x.base, indices
    vector = x.positions is None and leaf.shape == x.shape == (len(choice.line),)
    if leaf.shape[0] != len(choice.line) or not (vector or table_of(x)):
        return NotImplemented
    flow.join(flow.axis(leaf, 0), choice.line)
    flow.produce(leaf, flow.axis(leaf, 0))
    return flow.fixed_value(op.out) if vector else slices_of(flow, op.out, leaf)


def _gather(flow: Flow, op: Operation, x: Any, dim: int, index: Choice, *_: Any) -> Any:
    """What the chosen hold: in the order in which they were chosen it does not move."""
    units = _only_line(flow, x, dim) if isinstance(x, Value) and isinstance(index, Choice) else None
    if units is None or len(units) != len(index.line):
        return NotImplemented
    flow.join(units, index.line)
    return flow.fixed_value(op.out)


def _scatter(flow: Flow, op: Operation, x: Any, dim: int, index: Choice, source: Any, *_: Any) -> Any:
    """Into constants, all the same: each chosen unit gets what stands in its place of the order."""
    constant = isinstance(x, Tensor) and bool((x == x.reshape(-1)[:1]).all())
    moves = isinstance(source, Value) and not flow.is_fixed(flow.labels(source))
    if not constant or moves or isinstance(source, Tensor | Choice) or x.shape[dim] != len(index.line):
        return NotImplemented
    shape = [-1 if d == dim % len(op.out) else 1 for d in range(len(op.out))]
    return Value(index.line.view(shape).expand(op.out), tuple(op.out))


LOOKUPS: dict[str, Rule] = {"index": _index, "gather": _gather, "scatter": _scatter}
