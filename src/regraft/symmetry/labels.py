"""Unit labels, and what may be demanded of them.

Every scalar of every activation carries an integer label that names its unit; label 0 (and whatever is joined
with it) is fixed. Operators that combine scalars of different tensors *join* labels (union-find). What labels
alone cannot say, which occurrence of a unit goes with which, is recorded as a *tie* between two label tensors.

A permutation sigma of units acts on a tensor by taking the k-th occurrence of u (in row-major order) to the k-th
occurrence of sigma(u). A tie through ``positions`` demands that this action on one tensor and on another agree:
the k-th occurrence of u must sit at the same occurrence of the other tensor for every unit that u may trade
places with (:mod:`regraft.symmetry.groups` turns that into groups). The other tensor may have other units there:
then u is *within* one of them, a block such as an attention head, and goes where that goes; or it is the *twin* of
one: units of one twin, in different blocks, move alike (:mod:`regraft.symmetry.nesting`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_map

from regraft.symmetry.lengths import Lengths
from regraft.symmetry.units import How, Units, compact, expanded_dims, first, unexpand


def is_repeating(labels: Tensor) -> bool:
    """Whether some label stands at several places."""
    return len(labels.unique()) < labels.numel()


def constant_keys(tensor: Tensor) -> Tensor:
    """int64 of the same shape: equal where a constant's values are."""
    if tensor.is_complex():
        keys: Tensor = torch.unique(torch.view_as_real(tensor).reshape(-1, 2), dim=0, return_inverse=True)[1]
        return keys.view(tensor.shape)
    return torch.unique(tensor, return_inverse=True)[1]  # type: ignore[no-any-return]


# ---- values that flow

Relation = Literal["within", "twin"]
"""How a unit stands to another one: see this module's docstring."""


@dataclass
class Leaf:
    """A parameter or floating buffer. An axis gets labels when an operator first gives it a meaning."""

    name: str
    shape: tuple[int, ...]
    learned: bool
    axes: list[Tensor | None] = field(init=False)
    scalars: Tensor | None = None  # labels of single scalars, where it is used element by element
    used_at: int = -1  # the event of that
    computed: bool = False  # a value with units along several dimensions (see `sheets`)

    def __post_init__(self) -> None:
        self.axes = [None] * len(self.shape)


@dataclass
class Value:
    """A tensor of the graph: its scalars stand at ``positions`` of a base (None: in the base's own order).

    The base is a leaf or the label tensor of an activation. Position -1 is the constant ``fill``.
    """

    base: Leaf | Tensor
    shape: tuple[int, ...]
    positions: Tensor | None = None
    fill: float = 0.0
    changed: bool = False  # a function of the leaf's scalars, not these themselves
    labels: Tensor | None = None  # once an operator has read them
    repeats: tuple[Tensor, Tensor] | None = None  # of an expanded base: the place in its unexpanded form, and the turn

    def places(self) -> Tensor:
        """int32 of this shape: the place of every scalar in the base."""
        return places(self.shape) if self.positions is None else self.positions

    def rearrange(self, function: Callable[[Tensor], Tensor]) -> Value:
        """What an operator with one result makes of it that only moves scalars."""
        result: Value = self.map_positions(function)
        return result

    def map_positions(self, function: Callable[[Tensor], Any]) -> Any:
        """What an operator makes of it that only moves scalars, by running it on positions (-1: a constant)."""
        repeats = self.repeats
        if self.positions is None and isinstance(self.base, Tensor) and expanded_dims(self.base):
            repeats = _lines(self.base), _turns(self.base)
        if repeats is None:
            made = function(self.places())
            return tree_map(lambda p: self._view(p), made)
        made = map(function, (self.places(), *repeats))
        return tree_map(lambda p, line, turn: self._view(p, (line, turn)), *made)

    def _view(self, positions: Tensor, repeats: tuple[Tensor, Tensor] | None = None) -> Value:
        return Value(self.base, tuple(positions.shape), positions, self.fill, self.changed, repeats=repeats)


def places(shape: Sequence[int], start: int = 0) -> Tensor:
    """int32 of this shape: the row-major place of every scalar, counted from ``start``."""
    return torch.arange(start, start + math.prod(shape), dtype=torch.int32).view(tuple(shape))


@dataclass(frozen=True)
class Choice:
    """Places along an axis of units, ``line`` (int32 [n], each unit once), that data chose: an index that moves with
    them, of this shape. What it looks up there does not move."""

    line: Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Tie:
    """The action on ``labels`` must agree, through ``positions``, with that on ``sources``, read one after the
    other. No source: a position is a key of its own. Position -1 is a constant. ``kind``: how the units of the labels
    stand to those of the source, "same", "within" or "twin"."""

    labels: Tensor
    positions: Tensor
    sources: tuple[Tensor, ...]
    kind: Literal["same"] | Relation = "same"
    event: int = -1  # that demanded it


def drop_repeats(tie: Tie) -> Tie:
    """The same demand, said once: where a line of units is repeated, and what it is tied to is repeated alike."""
    labels, positions = compact(tie.labels, tie.positions)
    again = expanded_dims(labels)
    if not again:
        return replace(tie, labels=labels, positions=positions)
    if tie.sources:
        constant, sources_at = positions < 0, positions.clamp(min=0)
        sources = tuple(map(unexpand, tie.sources))
        starts = accumulate((s.numel() for s in sources), initial=0)
        lines = map(_lines, tie.sources, starts)
        lines_at, turn = (torch.where(constant, -1, concat(x)[sources_at]) for x in (lines, map(_turns, tie.sources)))
    else:
        sources, lines_at, turn = (), positions, positions
    same_line = set(again).isdisjoint(varying(lines_at))
    same_turn = set(varying(turn)) <= set(again)
    if (same_line and same_turn) if sources else (same_line or same_turn):
        return replace(tie, labels=first(labels, again), positions=first(lines_at, again), sources=sources)
    return replace(tie, labels=labels, positions=positions)


def _lines(source: Tensor, start: int = 0) -> Tensor:
    """int32 of the same shape: the place of each scalar in the unexpanded form."""
    return places(unexpand(source).shape, start).expand(source.shape)


def _turns(source: Tensor) -> Tensor:
    """int32 of the same shape: the number of the repetition that a scalar stands in."""
    again = expanded_dims(source)
    return places([n if d in again else 1 for d, n in enumerate(source.shape)]).expand(source.shape)


def concat(tensors: Iterable[Tensor]) -> Tensor:
    """All scalars of some tensors, one tensor after the other."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


class Event(NamedTuple):
    """An operator of the graph, in its module; ``plain``: an operand depends on no parameter."""

    operator: str
    where: str = ""
    plain: bool = False

    @property
    def name(self) -> str:
        """The operator's bare name."""
        return self.operator.partition("aten.")[2].partition(".")[0]

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.operator} (in {self.where})" if self.where else self.operator


class Flow:
    """One pass of labels through a graph: what the rules of operators call."""

    def __init__(self) -> None:
        self.units = Units()
        self.ties: list[Tie] = []
        self.made: list[tuple[Leaf, Tensor]] = []  # labels in the order in which parameters produce them
        self.related: dict[Relation, list[tuple[Tensor, Tensor]]] = {"within": [], "twin": []}
        self.derived: list[Leaf] = []  # functions of parameters that have axes as these have
        self.notes: list[str] = []  # what the user must know besides
        self.frozen: dict[str, str] = {}  # operator -> why it froze what it touches, and where first
        self.operator = self.module = ""  # what is being passed through
        self.wanted: set[Any] = set()  # which of its several results are used
        self.lengths = Lengths()
        self.sizes: dict[Any, int] = {}  # of symbols in shapes that constants decide
        self.node: Node | None = None  # what is being passed through, in its graph
        self.events: list[Event] = []
        self.plain: set[Node] = set()  # what depends on no parameter

    def begin(self, event: Event) -> None:
        """What is demanded from now on is demanded by this."""
        self.units.event = len(self.events)
        self.events.append(event)

    # -- labels of values

    def fixed_value(self, shape: Sequence[int]) -> Value:
        """A tensor that no permutation moves."""
        return Value(torch.zeros((), dtype=torch.int32).expand(tuple(shape)), tuple(shape))

    def new(self, labels: Tensor) -> Value:
        """A tensor of its own, although it may have the labels of another."""
        return Value(labels.view(labels.shape), tuple(labels.shape))

    def is_fixed(self, labels: Tensor) -> bool:
        return not self.units.roots(unexpand(labels)).any()

    def stays(self, value: Value) -> bool:
        """Whether nothing of what a value is a view of moves."""
        if not isinstance(value.base, Leaf):
            return self.is_fixed(value.base)
        return all(n == 1 or self.is_fixed(self.axis(value.base, a)) for a, n in enumerate(value.base.shape))

    def passes(self, value: Value, dim: int) -> bool:
        """Whether every line along ``dim`` is a single unit, or fixed."""
        roots = self.units.roots(unexpand(self.labels(value)))
        return bool((roots == roots.narrow(dim, 0, 1)).all()) if roots.ndim else True

    def axis(self, leaf: Leaf, axis: int) -> Tensor:
        """int32 [length]: labels of one axis of a leaf."""
        labels = leaf.axes[axis]
        if labels is None:
            length = leaf.shape[axis]  # one unit alone has no place to go: it is fixed, and joins nobody
            labels = self.units.fresh(length) if length > 1 else torch.zeros(1, dtype=torch.int32)
            leaf.axes[axis] = labels
        return labels

    def scalars(self, leaf: Leaf) -> Tensor:
        """int32 of the leaf's shape: a label for every scalar."""
        if leaf.scalars is None:
            leaf.used_at = self.units.event
            long = [a for a, length in enumerate(leaf.shape) if length != 1]
            if not long:
                leaf.scalars = torch.zeros(leaf.shape, dtype=torch.int32)
            elif len(long) == 1:
                leaf.scalars = self.axis(leaf, long[0]).view(leaf.shape)
            elif leaf.computed:
                leaf.scalars = self._keep_one_axis(leaf)
            else:
                leaf.scalars = self.units.fresh(*leaf.shape)
            self.produce(leaf, leaf.scalars)
        return leaf.scalars

    def _keep_one_axis(self, leaf: Leaf) -> Tensor:
        """int32 of the leaf's shape: its longest axis that moves keeps its units, the others are frozen."""
        units = [0 if self.is_fixed(self.axis(leaf, a)) else n for a, n in enumerate(leaf.shape)]
        kept = units.index(max(units))
        for a in range(len(leaf.shape)):
            if a != kept:
                self.freeze(self.axis(leaf, a))
        labels = self.axis(leaf, kept).view([-1 if a == kept else 1 for a in range(len(leaf.shape))])
        return labels.expand(leaf.shape)

    def labels(self, value: Value) -> Tensor:
        """int32 of the value's shape, tied to its base."""
        if value.labels is None:
            base = self.base(value)
            value.labels = base if value.positions is None else self._read(value, base)
        return value.labels

    def _read(self, value: Value, base: Tensor) -> Tensor:
        positions = value.places()
        if value.repeats is None or bool((unexpand(value.repeats[0]) < 0).any()):
            return self.gather(positions, base)
        line, turn = value.repeats
        once = concat([unexpand(base)])[unexpand(line)]
        labels = once.expand(value.shape)
        if set(varying(turn)) <= set(expanded_dims(line)):
            self.tie(once, unexpand(line), unexpand(base))
        else:
            self.tie(labels, positions, base)
        return labels

    def base(self, value: Value) -> Tensor:
        """The labels that the value's positions point into."""
        return self.scalars(value.base) if isinstance(value.base, Leaf) else value.base

    def gather(self, positions: Tensor, *sources: Tensor) -> Tensor:
        """A new tensor whose scalars come from ``positions`` of the sources, read one after the other."""
        labels = concat(sources)[positions.clamp(min=0)]
        padding = positions < 0
        if padding.any():
            labels[padding] = self.units.fresh(int(padding.sum()))  # a constant takes any unit's part
        again = [d for d, n in enumerate(labels.shape) if n > 1 and d not in varying(labels)]
        labels = first(labels, again).expand(positions.shape)
        self.tie(labels, positions, *sources)
        return labels

    def constant(self, tensor: Tensor) -> Tensor:
        """Labels of a constant: it takes the part of any units, but only of such as see the same values."""
        labels = self.units.fresh(*tensor.shape)
        self.tie_constant(labels, tensor)
        return labels

    def tie_constant(self, labels: Tensor, tensor: Tensor) -> None:
        """Units may only trade places that see equal values of a constant."""
        if self.lengths.trusts(tensor):
            self.tie(labels, constant_keys(tensor.detach()))
        elif not self.is_fixed(labels):
            self.lengths.distrusted.setdefault(self.operator, self.module)
            self.tie(labels, places(unexpand(tensor).shape).expand(tensor.shape))

    def as_value(self, x: Value | Tensor) -> Value:
        """A value, or a constant with labels."""
        return x if isinstance(x, Value) else self.new(self.constant(x))

    # -- what rules demand

    def join(self, a: Tensor, b: Tensor) -> None:
        """Element by element one unit, after broadcasting."""
        self.units.join(a, b)

    def freeze(self, value: Value | Tensor, how: How = "held") -> None:
        """Never moves, from here back to where it came from; ``how``: for the reasons that are given."""
        if isinstance(value, Value) and isinstance(value.base, Leaf):
            for a in range(len(value.base.shape)):
                self.freeze(self.axis(value.base, a), how)
            if value.base.scalars is not None:
                self.freeze(value.base.scalars, how)
        else:
            labels = self.labels(value) if isinstance(value, Value) else value
            self.units.join(labels, torch.zeros((), dtype=torch.int32), how)

    def tie(self, labels: Tensor, positions: Tensor, *sources: Tensor) -> None:
        """See :class:`Tie`; without sources: units may only trade places that have equal ``positions``."""
        if not self.is_fixed(labels):
            tie = Tie(labels, positions.expand(labels.shape), sources, event=self.units.event)
            self.ties.append(drop_repeats(tie))

    def relate(self, labels: Tensor, others: Tensor, kind: Relation, positions: Tensor | None = None) -> None:
        """Every unit of ``labels`` is "within" the unit that ``others`` has at its places, or its "twin"; those that it
        has at several places become one. ``positions``: in ``others``; its own after broadcasting where not given."""
        if self.is_fixed(labels):
            self.freeze(others)
            return
        if positions is None:
            others = unexpand(others)
            positions = places(others.shape).expand(labels.shape)
        self.ties.append(drop_repeats(Tie(labels, positions, (others,), kind, self.units.event)))
        mine, at = compact(labels, positions)
        mine, theirs = self.units.roots(mine).flatten(), others.reshape(-1)[at.flatten()]
        order = mine.argsort(stable=True)
        mine, theirs = mine[order], theirs[order]
        again = mine[1:] == mine[:-1]
        self.join(theirs[1:][again], theirs[:-1][again])
        first = torch.cat([torch.ones(1, dtype=torch.bool), ~again])
        self.related[kind].append((mine[first], theirs[first]))

    def blocks(self, labels: Tensor, dims: Sequence[int]) -> Tensor:
        """int32, of length 1 along ``dims``: a new unit for every slice along them, within which the slice's units are;
        slices that share a unit are one block. One block alone is fixed."""
        dims = [d % labels.ndim for d in dims]
        blocks = self.units.fresh(*(1 if d in dims else n for d, n in enumerate(labels.shape)))
        self.relate(labels, blocks, "within")
        roots = self.units.roots(blocks)
        if bool((roots == roots.flatten()[0]).all()):
            self.freeze(blocks)
        return blocks

    def produce(self, leaf: Leaf, labels: Tensor) -> None:
        """These units owe their order to this parameter (an input or a buffer alone gives nobody an order)."""
        if leaf.learned:
            self.made.append((leaf, labels))

    def weight(self, value: Any) -> Leaf | None:
        """The parameter of two axes or more that a value is all of, in order, whatever its shape."""
        leaf = value.base if isinstance(value, Value) else None
        if not isinstance(leaf, Leaf) or sum(n > 1 for n in leaf.shape) < 2 or not _in_order(value):
            return None
        return leaf

    def plane(self, value: Value, dim: int) -> Tensor | None:
        """int32 [value.shape[dim]]: the labels of one dimension of a weight; None where the value is no leaf, or
        a view of one in which this dimension is not one axis."""
        if not isinstance(value.base, Leaf):
            return None
        leaf = value.base
        if value.shape == leaf.shape and _in_order(value):
            return self.axis(leaf, dim)
        positions = value.places()
        if bool((positions < 0).any()):
            return None
        along: dict[int, list[int]] = {d: [] for d in range(len(value.shape))}
        origin = (0,) * len(value.shape)
        coordinates = torch.unravel_index(unexpand(positions).long(), leaf.shape)
        for a, coordinate in enumerate(coordinates):
            dims = varying(coordinate)
            if len(dims) > 1:
                return None
            if dims:
                along[dims[0]].append(a)
            elif leaf.shape[a] > 1:  # one slice of this axis: nothing may take its place
                self.freeze(self.axis(leaf, a)[coordinate[origin]], "fixed")
        if not along[dim]:
            return self.units.fresh(1) if value.shape[dim] == 1 else None
        first_axis, *others = along[dim]
        along_axis, whole = line(coordinates[first_axis], dim).int(), self.axis(leaf, first_axis)
        in_order = torch.equal(along_axis, places(whole.shape))
        labels = whole if in_order else self.gather(along_axis, whole)  # a part is in the order of the whole
        for a in others:  # several axes flattened, as a kernel's are: the units of the first, at several places each
            self.freeze(self.axis(leaf, a))
            self.tie(labels, line(coordinates[a], dim).int())
        return labels


def _in_order(value: Value) -> bool:
    if value.positions is None:
        return True
    count = math.prod(value.base.shape)
    return value.positions.numel() == count and torch.equal(value.positions.flatten(), places((count,)))


def line(tensor: Tensor, dim: int) -> Tensor:
    """The first line along one dimension."""
    return tensor[tuple(slice(None) if d == dim else 0 for d in range(tensor.ndim))]


def varying(tensor: Tensor) -> list[int]:
    """The dimensions along which a tensor is not constant."""
    return [
        d
        for d, length in enumerate(tensor.shape)
        if length > 1 and tensor.stride(d) != 0 and bool((tensor != tensor.narrow(d, 0, 1)).any())
    ]
