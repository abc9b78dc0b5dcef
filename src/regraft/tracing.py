"""The tracer behind :func:`regraft.symmetry.trace`: unit labels that flow through an exported graph.

Every scalar of every activation carries an integer label that names its unit; label 0 (and whatever is joined
with it) is fixed. Shape operators are run on *positions*, so that whatever they do to scalars they do to labels.
Operators that combine scalars of different tensors join labels (union-find). What labels alone cannot say, which
occurrence of a unit goes with which, is recorded as a *tie* between two label tensors.

A permutation sigma of units acts on a tensor by taking the k-th occurrence of u (in row-major order) to the k-th
occurrence of sigma(u). A tie through ``positions`` demands that this action on one tensor and on another agree:
the k-th occurrence of u must sit at the same occurrence of the other tensor for every unit that u may trade
places with. So each tie adds, for every unit, a hash of its pairs of occurrences to the unit's signature, and
units of equal signature form a group. Fixed scalars count as their own position: a unit that is tied to all
different positions is alone, and does not move.

To teach the tracer an operator, write one function here and register it with ``@rule``.
"""

from __future__ import annotations

import contextlib
import logging
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from regraft.evaluation import evaluating

# ---- units: disjoint sets of labels


class Units:
    """Disjoint sets over labels 0..n-1, all in arrays. Label 0 is fixed, and so is what is joined with it."""

    def __init__(self) -> None:
        self._root = torch.zeros(1 << 16, dtype=torch.int32)
        self.count = 1

    def fresh(self, *shape: int) -> Tensor:
        """New labels, int32, each a unit of its own."""
        n = math.prod(shape)
        if self.count + n > len(self._root):
            spare = torch.zeros(max(len(self._root), n), dtype=torch.int32)
            self._root = torch.cat([self._root, spare])
        new = torch.arange(self.count, self.count + n, dtype=torch.int32)
        self._root[self.count : self.count + n] = new
        self.count += n
        return new.view(shape)

    def roots(self, labels: Tensor) -> Tensor:
        """The smallest label of each label's set."""
        return _per_distinct(lambda x: self._root[x], labels)

    def join(self, a: Tensor, b: Tensor) -> None:
        """Makes one unit of ``a`` and ``b``, element by element, after broadcasting."""
        a, b = _compact(*torch.broadcast_tensors(a, b))
        a, b = self._root[a].flatten(), self._root[b].flatten()
        differ = a != b
        if not differ.any():
            return
        pairs = torch.stack([a[differ], b[differ]]).numpy()
        nodes, edges = np.unique(pairs, return_inverse=True)
        left, right = edges.reshape(2, -1)
        graph = coo_array((np.ones(len(left), dtype=bool), (left, right)), shape=(len(nodes),) * 2)
        _, part = connected_components(graph, directed=False)
        _, first = np.unique(part, return_index=True)  # nodes are sorted: the first of a part is its smallest
        became = torch.arange(self.count, dtype=torch.int32)
        became[torch.from_numpy(nodes)] = torch.from_numpy(nodes[first][part])
        self._root[: self.count] = became[self._root[: self.count]]


def _compact(*tensors: Tensor) -> list[Tensor]:
    """Without the dimensions that are expanded in all tensors (of one shape): they would say the same again."""
    for d in range(tensors[0].ndim):
        if tensors[0].shape[d] > 1 and all(t.stride(d) == 0 for t in tensors):
            tensors = tuple(t.narrow(d, 0, 1) for t in tensors)
    return list(tensors)


def _per_distinct(function: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
    (small,) = _compact(labels)
    return function(small).expand(labels.shape)


# ---- values that flow


@dataclass
class Leaf:
    """A parameter or floating buffer. An axis gets labels when an operator first gives it a meaning."""

    name: str
    shape: tuple[int, ...]
    learned: bool
    axes: list[Tensor | None] = field(init=False)
    scalars: Tensor | None = None  # labels of single scalars, where it is used element by element

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

    def places(self) -> Tensor:
        """int32 of this shape: the place of every scalar in the base."""
        return _places(self.shape) if self.positions is None else self.positions


def _places(shape: Sequence[int]) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.int32).view(tuple(shape))


@dataclass(frozen=True)
class Tie:
    """The action on ``labels`` must agree, through ``positions``, with that on ``sources``, read one after the
    other. No source: a position is a key of its own. Position -1 is a constant."""

    labels: Tensor
    positions: Tensor
    sources: tuple[Tensor, ...]


class Flow:
    """One pass of labels through a graph. The rules below call its methods."""

    def __init__(self) -> None:
        self.units = Units()
        self.ties: list[Tie] = []
        self.made: list[tuple[Leaf, Tensor]] = []  # labels in the order in which parameters produce them
        self.unknown: dict[str, None] = {}

    # -- labels of values

    def fixed(self, shape: Sequence[int]) -> Value:
        """A tensor that no permutation moves."""
        return Value(torch.zeros((), dtype=torch.int32).expand(tuple(shape)), tuple(shape))

    def new(self, labels: Tensor) -> Value:
        """A tensor of its own, although it may have the labels of another."""
        return Value(labels.view(labels.shape), tuple(labels.shape))

    def is_fixed(self, labels: Tensor) -> bool:
        return not self.units.roots(labels).any()

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
            long = [a for a, length in enumerate(leaf.shape) if length != 1]
            if not long:
                leaf.scalars = torch.zeros(leaf.shape, dtype=torch.int32)
            elif len(long) == 1:
                leaf.scalars = self.axis(leaf, long[0]).view(leaf.shape)
            else:
                leaf.scalars = self.units.fresh(*leaf.shape)
            self.produce(leaf, leaf.scalars)
        return leaf.scalars

    def labels(self, value: Value) -> Tensor:
        """int32 of the value's shape, tied to its base."""
        if value.labels is None:
            base = self.base(value)
            value.labels = base if value.positions is None else self.gather(value.positions, base)
        return value.labels

    def base(self, value: Value) -> Tensor:
        """The labels that the value's positions point into."""
        return self.scalars(value.base) if isinstance(value.base, Leaf) else value.base

    def gather(self, positions: Tensor, *sources: Tensor) -> Tensor:
        """A new tensor whose scalars come from ``positions`` of the sources, read one after the other."""
        labels = torch.cat([source.reshape(-1) for source in sources])[positions.clamp(min=0)]
        padding = positions < 0
        if padding.any():
            labels[padding] = self.units.fresh(int(padding.sum()))  # a constant takes any unit's part
        self.tie(labels, positions, *sources)
        return labels

    def constant(self, tensor: Tensor) -> Tensor:
        """Labels of a constant: it takes the part of any units, but only of such as see the same values."""
        labels = self.units.fresh(*tensor.shape)
        _, keys = torch.unique(tensor.detach(), return_inverse=True)
        self.tie(labels, keys)
        return labels

    # -- what rules demand

    def join(self, a: Tensor, b: Tensor) -> None:
        """Element by element one unit, after broadcasting."""
        self.units.join(a, b)

    def freeze(self, value: Value | Tensor) -> None:
        """Never moves, from here back to where it came from."""
        if isinstance(value, Value) and isinstance(value.base, Leaf):
            for a in range(len(value.base.shape)):
                self.freeze(self.axis(value.base, a))
            if value.base.scalars is not None:
                self.freeze(value.base.scalars)
        else:
            labels = self.labels(value) if isinstance(value, Value) else value
            self.join(labels, torch.zeros((), dtype=torch.int32))

    def tie(self, labels: Tensor, positions: Tensor, *sources: Tensor) -> None:
        """See :class:`Tie`; without sources: units may only trade places that have equal ``positions``."""
        if not self.is_fixed(labels):
            self.ties.append(Tie(labels, positions.expand(labels.shape), sources))

    def produce(self, leaf: Leaf, labels: Tensor) -> None:
        """These units owe their order to this parameter (an input or a buffer alone gives nobody an order)."""
        if leaf.learned:
            self.made.append((leaf, labels))

    def plane(self, value: Value, dim: int) -> Tensor | None:
        """int32 [value.shape[dim]]: the labels of one dimension of a weight; None where the value is no leaf, or
        a view of one in which this dimension is not one axis."""
        if not isinstance(value.base, Leaf):
            return None
        leaf = value.base
        if value.positions is None:
            return self.axis(leaf, dim)
        if (value.positions < 0).any():
            return None
        along: dict[int, list[int]] = {d: [] for d in range(len(value.shape))}
        origin = (0,) * len(value.shape)
        coordinates = torch.unravel_index(value.positions.long(), leaf.shape)
        for a, coordinate in enumerate(coordinates):
            dims = _varying(coordinate)
            if len(dims) > 1:
                return None
            if dims:
                along[dims[0]].append(a)
            elif leaf.shape[a] > 1:  # one slice of this axis: nothing may take its place
                self.freeze(self.axis(leaf, a)[coordinate[origin]])
        if len(along[dim]) == 1:
            return self.axis(leaf, along[dim][0])[line(coordinates[along[dim][0]], dim)]
        return self.units.fresh(1) if value.shape[dim] == 1 else None


def line(tensor: Tensor, dim: int) -> Tensor:
    """The first line along one dimension."""
    return tensor[tuple(slice(None) if d == dim else 0 for d in range(tensor.ndim))]


def _varying(tensor: Tensor) -> list[int]:
    """The dimensions along which a tensor is not constant."""
    return [
        d
        for d, length in enumerate(tensor.shape)
        if length > 1 and tensor.stride(d) != 0 and bool((tensor != tensor.narrow(d, 0, 1)).any())
    ]


# ---- rules: one operator each


RULES: dict[Any, Callable[..., Any]] = {}


def rule(*packets: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers ``function(flow, out, *args)`` for operators of these names (all their overloads).

    ``out``: the shape of the result. Tensor arguments arrive as :class:`Value`, or as tensors where they are
    constants; all arguments arrive in the order of the operator's schema, defaults filled in.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for packet in packets:
            RULES[packet] = function
        return function

    return register


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ALIASES = _words("alias clone contiguous detach lift lift_fresh lift_fresh_copy positive")
"""Operators that give back what they are given."""

UNARY = _words(
    "dropout feature_dropout alpha_dropout to _to_copy type_as hardswish log_sigmoid celu rrelu zero fill"
)
"""Operators that compute every scalar from the one at its place (beside those that torch tags pointwise). A constant
that is filled in keeps the labels of what it replaces."""

VIEWS = _words(
    "broadcast_to channel_shuffle chunk diagonal expand expand_as flatten flip index index_select "
    "moveaxis movedim native_channel_shuffle narrow numpy_T mT permute pixel_shuffle pixel_unshuffle "
    "ravel reflection_pad1d reflection_pad2d repeat repeat_interleave replication_pad1d replication_pad2d "
    "reshape reshape_as roll rot90 select slice split split_with_sizes squeeze swapaxes swapdims t "
    "tensor_split tile transpose unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze "
    "view view_as _unsafe_view"
)
"""Operators that only move scalars: they are run on positions."""

LIKE = _words("expand_as view_as reshape_as type_as")
"""Of whose second tensor only the shape matters."""

ASSEMBLIES = _words("cat concat concatenate hstack select_scatter slice_scatter stack vstack")
"""Operators that put several tensors together."""

REDUCTIONS = _words(
    "all amax amin aminmax any linalg_vector_norm logsumexp mean nansum norm prod std std_mean sum var var_mean"
)
"""Operators over ``dim`` whose result does not depend on the order in a slice."""

FILLS = _words("empty_like full_like new_empty new_full new_ones new_zeros ones_like zeros_like")
"""Operators that read nothing but the shape."""


def _is_size(x: Any) -> bool:
    return isinstance(x, torch.Size)


def pointwise(flow: Flow, out: torch.Size, operands: Sequence[Any]) -> Value:
    """Scalars that meet become one unit. A fixed operand that is broadcast only keeps units where they see the
    same of it: dividing by a norm moves nothing."""
    values = [x for x in operands if isinstance(x, Value)]
    fixed = [v for v in values if flow.is_fixed(flow.base(v))]
    moving = [v for v in values if not any(v is f for f in fixed)]
    if not moving:
        return flow.fixed(out)
    constants = [x for x in operands if isinstance(x, Tensor) and bool((x != x.reshape(-1)[:1]).any())]
    moving += [Value(flow.constant(x), tuple(x.shape)) for x in constants]
    result, *others = [_broadcast(flow, value, out) for value in moving]
    for other in others:
        flow.join(result, other)
    for v in fixed:
        places = v.places().expand(out)
        if _are_distinct(places):
            flow.freeze(result)
        else:
            flow.tie(result, places)
    return flow.new(result)


def _broadcast(flow: Flow, value: Value, shape: torch.Size) -> Tensor:
    labels = flow.labels(value)
    if labels.shape == shape:
        return labels
    expanded = labels.expand(shape)
    if sum(length > 1 for length in value.shape) > 1:  # else there is only one order to agree on
        flow.tie(expanded, _places(value.shape).expand(shape), labels)
    return expanded


def _are_distinct(places: Tensor) -> bool:
    if any(stride == 0 and length > 1 for stride, length in zip(places.stride(), places.shape, strict=True)):
        return False
    return bool(places.numel() == 0 or torch.bincount(places.flatten() + 1).max() <= 1)


def view(function: Callable[..., Any], value: Value) -> Any:
    """Runs a shape operator on the positions of a value (where 0 stands for a constant)."""
    moved = function(value.places() + 1)
    return pytree.tree_map(
        lambda p: Value(value.base, tuple(p.shape), p.to(torch.int32) - 1, value.fill), moved
    )


@rule("pad", "constant_pad_nd")
def _pad(flow: Flow, out: torch.Size, x: Value, pad: list[int], *options: Any) -> Value:
    mode = options[0] if options and isinstance(options[0], str) else "constant"
    fill = float(options[-1] or 0.0) if options else 0.0
    if x.positions is not None and fill != x.fill and (x.positions < 0).any():
        x = flow.new(flow.labels(x))
    constant = {"value": 0.0} if mode == "constant" else {}
    padded = view(lambda p: torch.nn.functional.pad(p, pad, mode=mode, **constant), x)
    return replace(padded, fill=fill)


def assemble(flow: Flow, function: Callable[[list[Any]], Tensor], args: Sequence[Any]) -> Value:
    """Several tensors become one: run on positions in all that they come from, one after the other."""
    leaves, structure = pytree.tree_flatten(list(args))
    bases: dict[int, Tensor] = {}
    starts: dict[int, int] = {}
    places: dict[int, Tensor] = {}
    count = 0
    for i, x in enumerate(leaves):
        if isinstance(x, Value | Tensor):
            if isinstance(x, Tensor):
                x = flow.new(flow.constant(x))
            elif x.changed or bool(
                (x.places() < 0).any()
            ):  # other parts may be changed, or filled, otherwise
                x = flow.new(flow.labels(x))
            base = flow.base(x)
            if id(base) not in bases:
                bases[id(base)], starts[id(base)] = base, count
                count += base.numel()
            places[i] = x.places() + starts[id(base)]
    filled = [places.get(i, x) for i, x in enumerate(leaves)]
    positions = function(pytree.tree_unflatten(filled, structure))
    return flow.new(flow.gather(positions, *bases.values()))


def reduce(flow: Flow, out: torch.Size, x: Value, dims: Sequence[int]) -> Value:
    """A slice of a single unit passes it on; a slice of several gives what no exchange inside it changes."""
    labels = flow.labels(x)
    if flow.is_fixed(labels):
        return flow.fixed(out)
    dims = tuple(sorted({d % labels.ndim for d in dims})) or tuple(range(labels.ndim))
    first = labels[tuple(slice(0, 1) if d in dims else slice(None) for d in range(labels.ndim))]
    roots = flow.units.roots(labels)
    single = (roots == flow.units.roots(first)).all(dims, keepdim=True)
    passed = torch.where(single, first, 0)
    flow.tie(labels, _places(passed.shape).expand(labels.shape), passed)
    return Value(passed.reshape(out), tuple(out))


@rule("linear")
def _linear(flow: Flow, out: torch.Size, x: Any, weight: Any, bias: Any) -> Value:
    return contract(flow, out, x, weight, bias, dims=(1, 0))


@rule("addmm")
def _addmm(flow: Flow, out: torch.Size, bias: Any, x: Any, weight: Any, *_: Any) -> Value:
    return contract(flow, out, x, weight, bias, dims=(0, 1))


def contract(flow: Flow, out: torch.Size, x: Any, weight: Any, bias: Any, dims: tuple[int, int]) -> Value:
    """x [..., I] and a weight whose ``dims`` are (input, output) give [..., O]: the last axis is contracted."""
    inward, outward = planes(flow, weight, *dims)
    if inward is None or outward is None or not isinstance(x, Value):
        return freeze(flow, out, [x, weight, bias])
    labels = flow.labels(x)
    if uniform(flow, labels, -1):  # it mixes places of one unit, such as tokens: the unit passes
        freeze(flow, out, [weight, bias])
        return Value(labels.narrow(-1, 0, 1).expand(out), tuple(out))
    flow.join(labels, inward)
    return produced(flow, out, weight, outward, outward, bias)


def planes(flow: Flow, weight: Any, *dims: int) -> list[Tensor | None]:
    """The labels of some dimensions of a weight."""
    usable = isinstance(weight, Value) and len(weight.shape) > max(dims, default=0)
    return [flow.plane(weight, d) if usable else None for d in dims]


def produced(
    flow: Flow, out: torch.Size, weight: Value, made: Tensor, channels: Tensor, bias: Any, spatial: int = 0
) -> Value:
    """What a weight gives: channels [O] spread to ``out`` [..., O, *spatial], of which ``made`` are new."""
    flow.produce(weight.base, made)
    if isinstance(bias, Value):
        flow.join(flow.labels(bias), channels)
    elif isinstance(bias, Tensor):
        flow.join(flow.constant(bias), channels)
    return Value(channels.view(-1, *(1,) * spatial).expand(out), tuple(out))


def uniform(flow: Flow, labels: Tensor, dim: int) -> bool:
    """Whether every line along ``dim`` is a single unit that may move, at more than one place."""
    roots = flow.units.roots(labels)
    return labels.shape[dim] > 1 and bool((roots != 0).all() and (roots == roots.narrow(dim, 0, 1)).all())


def freeze(flow: Flow, out: Any, values: Iterable[Any]) -> Any:
    """Always correct: nothing that goes in moves, and nothing that comes out."""
    for value in values:
        if isinstance(value, Value):
            flow.freeze(value)
    return pytree.tree_map(flow.fixed, out, is_leaf=_is_size)


@rule("conv1d", "conv2d", "conv3d")
def _conv(flow: Flow, out: torch.Size, x: Any, weight: Any, bias: Any, *options: Any) -> Value:
    return convolve(flow, out, x, weight, bias, groups=options[3], dims=(1, 0))


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(flow: Flow, out: torch.Size, x: Any, weight: Any, bias: Any, *options: Any) -> Value:
    return convolve(flow, out, x, weight, bias, groups=options[3], dims=(0, 1))


@rule("convolution")
def _convolution(flow: Flow, out: torch.Size, x: Any, weight: Any, bias: Any, *options: Any) -> Value:
    return convolve(flow, out, x, weight, bias, groups=options[5], dims=(0, 1) if options[3] else (1, 0))


def convolve(
    flow: Flow, out: torch.Size, x: Any, weight: Any, bias: Any, *, groups: int, dims: tuple[int, int]
) -> Value:
    """x [B, I, ...] or [I, ...] and a weight whose ``dims`` are (input, output), of all channels or of one group.

    Units stay inside their group of channels. Where the groups share an axis of the weight (its input axis, or
    the output axis of a transposed convolution), a unit moves in all of them alike.
    """
    inward, outward = planes(flow, weight, *dims)
    if inward is None or outward is None or not isinstance(x, Value):
        return freeze(flow, out, [x, weight, bias])
    spatial = len(weight.shape) - 2
    before = channel_units(flow, x, spatial)
    after = outward.repeat(out[-spatial - 1] // len(outward))
    if groups == len(before) > 1 and not flow.is_fixed(before):  # depth-wise: a channel goes through
        through = before.repeat_interleave(len(after) // groups)
        if len(outward) == len(after):
            flow.join(outward, through)
        else:  # transposed: the weight's own channels are those that go in
            flow.join(inward, before)
            flow.freeze(outward)
        after = through
    else:
        flow.join(before, inward.repeat(len(before) // len(inward)))
        if groups > 1:
            for units in (before, after):
                flow.tie(units, torch.arange(groups).repeat_interleave(len(units) // groups))
    for kernel in planes(flow, weight, *range(2, 2 + spatial)):
        flow.freeze(weight if kernel is None else kernel)
    return produced(flow, out, weight, outward, after, bias, spatial)


def channel_units(flow: Flow, x: Value, spatial: int) -> Tensor:
    """int32 [C] for x [..., C, *spatial]: all places of a channel become one unit."""
    labels = flow.labels(x)
    units = line(labels, labels.ndim - spatial - 1)
    flow.join(labels, units.view(-1, *(1,) * spatial))
    return units


@rule("batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "instance_norm")
def _batch_norm(flow: Flow, out: Any, x: Any, *options: Any) -> Any:
    units = channel_units(flow, x, len(x.shape) - 2)
    for tensor in options[:4]:
        if isinstance(tensor, Value):
            flow.join(flow.labels(tensor), units)
    return first_of(flow, out, flow.new(flow.labels(x)))


def first_of(flow: Flow, out: Any, value: Value) -> Any:
    """The result alone, or the first of several (the others are saved for a backward pass)."""
    return value if _is_size(out) else [value, *(flow.fixed(size) for size in out[1:])]


@rule("layer_norm", "rms_norm", "native_layer_norm")
def _layer_norm(flow: Flow, out: Any, x: Any, normalized: list[int], *options: Any) -> Any:
    result = normalised(flow, x, range(len(x.shape) - len(normalized), len(x.shape)))
    for tensor in options[:2]:
        if isinstance(tensor, Value):
            flow.join(flow.labels(result), flow.labels(tensor))
    return first_of(flow, out, result)


def normalised(flow: Flow, x: Value, dims: Sequence[int]) -> Value:
    """Every scalar, and something of its slice along ``dims``."""
    slices = [1 if d in [dim % len(x.shape) for dim in dims] else n for d, n in enumerate(x.shape)]
    return pointwise(flow, torch.Size(x.shape), [x, reduce(flow, torch.Size(slices), x, dims)])


@rule("group_norm")
def _group_norm(flow: Flow, out: torch.Size, x: Any, groups: int, *options: Any) -> Value:
    units = channel_units(flow, x, len(x.shape) - 2)
    for tensor in options[:2]:
        if isinstance(tensor, Value):
            flow.join(flow.labels(tensor), units)
    flow.tie(units, torch.arange(groups).repeat_interleave(len(units) // groups))
    return flow.new(flow.labels(x))


@rule("prelu")
def _prelu(flow: Flow, out: torch.Size, x: Any, slope: Any) -> Value:
    if isinstance(slope, Value) and math.prod(slope.shape) > 1:
        flow.join(flow.labels(slope), channel_units(flow, x, len(x.shape) - 2))
    return flow.new(flow.labels(x))


def _pool(flow: Flow, out: Any, x: Value, *options: Any, spatial: int) -> Any:
    labels = flow.labels(x)
    plane = labels[(..., *(slice(0, 1),) * spatial)]
    flow.join(labels, plane)
    return pytree.tree_map(lambda size: Value(plane.expand(size), tuple(size)), out, is_leaf=_is_size)


for _n in (1, 2, 3):
    rule(
        f"max_pool{_n}d", f"max_pool{_n}d_with_indices", f"avg_pool{_n}d", f"lp_pool{_n}d",
        f"adaptive_avg_pool{_n}d", f"_adaptive_avg_pool{_n}d", f"adaptive_max_pool{_n}d",
        f"upsample_nearest{_n}d", f"_upsample_nearest_exact{_n}d",
    )(partial(_pool, spatial=_n))  # fmt: skip
rule("upsample_linear1d")(partial(_pool, spatial=1))
rule("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")(
    partial(_pool, spatial=2)
)
rule("upsample_trilinear3d")(partial(_pool, spatial=3))


@rule("softmax", "log_softmax", "_softmax", "_log_softmax")
def _softmax(flow: Flow, out: torch.Size, x: Value, dim: int, *options: Any) -> Value:
    return normalised(flow, x, [dim])


@rule("matmul", "mm", "bmm")
def _matmul(flow: Flow, out: torch.Size, a: Any, b: Any, *_: Any) -> Value:
    if _is_weight(b):
        return contract(flow, out, a, b, None, dims=(0, 1))
    if _is_weight(a) and isinstance(b, Value) and len(b.shape) > 1:
        flipped = torch.Size((*out[:-2], out[-1], out[-2]))
        return view(_flip, contract(flow, flipped, view(_flip, b), a, None, dims=(1, 0)))
    if not (isinstance(a, Value) and isinstance(b, Value)) or len(a.shape) < 2 or len(b.shape) < 2:
        return freeze(flow, out, [a, b])
    left, right = flow.labels(a), flow.labels(b)
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    if batch != left.shape[:-2] or batch != right.shape[:-2]:
        return freeze(flow, out, [a, b])
    if flow.is_fixed(left) and uniform(flow, right, -2):
        return mixed(flow, out, right, right.narrow(-2, 0, 1), batch)
    if flow.is_fixed(right) and uniform(flow, left, -1):
        return mixed(flow, out, left, left.narrow(-1, 0, 1), batch)
    # Units are contracted with units: those of one side are those of the other, and stay inside their matrix.
    flow.join(left, right.transpose(-2, -1).narrow(-2, 0, 1))
    flow.join(right, left.transpose(-2, -1).narrow(-1, 0, 1))
    flow.tie(left, _places((*batch, left.shape[-2], 1)))
    flow.tie(right, _places((*batch, 1, right.shape[-1])))
    return flow.fixed(out)


def _is_weight(x: Any) -> bool:
    return isinstance(x, Value) and isinstance(x.base, Leaf) and len(x.shape) == 2


def _flip(matrix: Tensor) -> Tensor:
    return matrix.transpose(-2, -1)


def mixed(flow: Flow, out: torch.Size, labels: Tensor, passed: Tensor, batch: torch.Size) -> Value:
    """Weights that no unit moves mix the places of each unit, matrix by matrix: the units pass."""
    flow.tie(labels, _places((*batch, 1, 1)))
    return Value(passed.expand(out), tuple(out))


@rule("scaled_dot_product_attention")
def _attention(flow: Flow, out: torch.Size, q: Any, k: Any, v: Any, mask: Any = None, *_: Any) -> Value:
    shapes = {x.shape[:-2] for x in (q, k, v) if isinstance(x, Value)}
    if len(shapes) > 1 or not all(isinstance(x, Value) for x in (q, k, v)):
        return freeze(flow, out, [q, k, v, mask])
    freeze(flow, out, [mask])
    scores = torch.Size((*q.shape[:-1], k.shape[-2]))
    return _matmul(flow, out, _matmul(flow, scores, q, view(_flip, k)), v)


@rule("einsum")
def _einsum(flow: Flow, out: torch.Size, equation: str, operands: Sequence[Any], *_: Any) -> Value:
    """Two operands: each is brought to [batch, rows, contracted], and it is a matrix product."""
    terms, _, result = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    letters = "".join(names)
    usable = (
        len(names) == 2 and result and "." not in equation and all(isinstance(x, Value) for x in operands)
    )
    # every index once in a term, and either in the result or in both terms
    if not usable or any(term.count(i) > 1 for term in (*names, result) for i in term):
        return freeze(flow, out, operands)
    if any(i not in letters for i in result) or any(
        i not in result and letters.count(i) < 2 for i in letters
    ):
        return freeze(flow, out, operands)
    a, b = names
    length = {
        i: n for name, x in zip(names, operands, strict=True) for i, n in zip(name, x.shape, strict=True)
    }
    batch = [i for i in a if i in b and i in result]
    summed = [i for i in a if i in b and i not in result]
    rows, columns = [i for i in a if i not in b], [i for i in b if i not in a]

    def matrix(x: Value, name: str, parts: Sequence[list[str]]) -> Value:
        shape = [length[i] for i in batch] + [math.prod(length[i] for i in part) for part in parts]
        order = [name.index(i) for part in (batch, *parts) for i in part]
        return view(lambda t: t.permute(order).reshape(shape), x)

    left, right = matrix(operands[0], a, (rows, summed)), matrix(operands[1], b, (summed, columns))
    product = _matmul(flow, torch.Size((*left.shape[:-1], right.shape[-1])), left, right)
    order = [*batch, *rows, *columns]
    lengths, places = [length[i] for i in order], [order.index(i) for i in result]
    return view(lambda t: t.reshape(lengths).permute(places), product)


@rule("copy")
def _copy(flow: Flow, out: torch.Size, x: Any, source: Any, *_: Any) -> Any:
    if isinstance(source, Value):
        return view(lambda places: places.expand(out), source)
    return source.expand(out)


@rule("embedding")
def _embedding(flow: Flow, out: torch.Size, weight: Any, tokens: Any, *_: Any) -> Value:
    rows, columns = planes(flow, weight, 0, 1)
    if rows is None or columns is None:
        return freeze(flow, out, [weight, tokens])
    flow.freeze(rows)
    if isinstance(tokens, Value):
        flow.freeze(tokens)
    return produced(flow, out, weight, columns, columns, None)


# ---- the graph


@dataclass(frozen=True)
class Labelled:
    """What the tracer found. ``groups``: name -> units. ``axes``: tensor -> per axis, for every position the number
    of its group (in the order of ``groups``; -1: fixed) and of its unit."""

    groups: dict[str, int]
    axes: dict[str, list[tuple[np.ndarray, np.ndarray]]]


def find_units(model: nn.Module, example_inputs: tuple[Any, ...]) -> Labelled:
    """Exports the model, lets labels flow through its graphs, and groups the units of equal signature."""
    programs = export(model, example_inputs)
    try:
        flow, leaves = run(programs, model)
    except Entangled:  # the functional form is slower to make: only where writing in place matters
        flow, leaves = run([program.run_decompositions({}) for program in programs], model)
    settle(flow, leaves)
    for name in flow.unknown:
        warn(f"operator {name} is not known to the tracer: what it touches stays fixed")
    if idle := _unused(programs, model):
        name = type(model).__name__
        warn(f"{len(idle)} parameters of {name} are not used and stay fixed, such as {idle[0]!r}")
    return grouped(flow, leaves)


def warn(message: str) -> None:
    """A warning that points at the caller of :func:`regraft.symmetry.trace`."""
    warnings.warn(message, stacklevel=4)


def export(model: nn.Module, example_inputs: tuple[Any, ...]) -> list[ExportedProgram]:
    """The model's graph in evaluation mode; and, where that leaves parameters unused, the one with its auxiliary
    heads. Raises ValueError where torch.export cannot trace the model."""
    try:
        programs = [_export(model, example_inputs, heads=False)]
    except Exception as error:
        cause = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"torch.export cannot trace {type(model).__name__} ({type(error).__name__}: {cause}); trace it "
            "without data-dependent control flow, or write its specification by hand (PermutationSpec.build)"
        ) from error
    if _unused(programs, model):
        with contextlib.suppress(Exception):  # heads may need larger inputs
            programs.append(_export(model, example_inputs, heads=True))
    return programs


def _export(model: nn.Module, example_inputs: tuple[Any, ...], *, heads: bool) -> ExportedProgram:
    with evaluating(model, heads=heads), _quiet("torch._subclasses.fake_tensor"):
        return torch.export.export(model, example_inputs, strict=False)


@contextlib.contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """What fails inside is reported by an exception, not by a log."""
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _unused(programs: Sequence[ExportedProgram], model: nn.Module) -> list[str]:
    """The parameters that occur in no graph."""
    every = dict(model.named_parameters(remove_duplicate=False))
    used = {
        id(every[spec.target])
        for program in programs
        for spec, node in _inputs(program)
        if spec.target in every and node.users
    }
    return [name for name, parameter in model.named_parameters() if id(parameter) not in used]


def _inputs(program: ExportedProgram) -> Iterable[tuple[Any, Node]]:
    """What every placeholder of a graph stands for."""
    return zip(program.graph_signature.input_specs, program.graph.find_nodes(op="placeholder"), strict=True)


def run(programs: Sequence[ExportedProgram], model: nn.Module) -> tuple[Flow, list[Leaf]]:
    """One pass of labels; every parameter and buffer is a leaf that the graphs share."""
    flow = Flow()
    leaves = {
        id(tensor): Leaf(name, tuple(tensor.shape), learned=learned)
        for pairs, learned in ((model.named_parameters(), True), (model.named_buffers(), False))
        for name, tensor in pairs
    }
    for program in programs:
        held = {
            **program.constants,
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        values: dict[Node, Any] = {}
        for spec, node in _inputs(program):
            tensor = held.get(spec.target)
            if isinstance(tensor, Tensor) and id(tensor) in leaves and tensor.is_floating_point():
                values[node] = Value(leaves[id(tensor)], tuple(tensor.shape))
            elif isinstance(tensor, Tensor):
                values[node] = tensor.detach().cpu().clone()  # operators may write into it
            else:
                content = node.meta.get("val")
                values[node] = flow.fixed(content.shape) if isinstance(content, Tensor) else content
        for node in program.graph.nodes:
            if node.op == "call_function":
                values[node] = call(flow, node, values)
            elif node.op == "get_attr":
                values[node] = getattr(program.graph_module, node.target)
            elif node.op == "output":
                _finish(flow, program, map_arg(node.args[0], values.__getitem__), leaves, held)
    return flow, list(leaves.values())


def _finish(
    flow: Flow, program: Any, results: Sequence[Any], leaves: dict[int, Leaf], held: dict[str, Any]
) -> None:
    """Results never move; what is written to a buffer has the buffer's units."""
    for spec, result in zip(program.graph_signature.output_specs, results, strict=True):
        leaf = leaves.get(id(held.get(spec.target)))
        if not isinstance(result, Value):
            continue
        if leaf is None or tuple(leaf.shape) != result.shape:
            flow.freeze(result)
        else:
            flow.join(flow.labels(result), flow.scalars(leaf))


class Entangled(Exception):
    """An operator writes into a tensor that others may be views of."""


def call(flow: Flow, node: Node, values: dict[Node, Any]) -> Any:
    """What one operator does to labels; to constants it does what it always does."""
    target = node.target
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    if target is operator.getitem:
        return args[0][args[1]]
    given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Value)]
    sizes = pytree.tree_map(lambda x: x.shape if isinstance(x, Tensor) else None, node.meta.get("val"))
    if not isinstance(target, OpOverload):
        return unknown(flow, str(target), sizes, given)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": "cpu"}
    if not given and torch.Tag.nondeterministic_seeded not in target.tags:
        return target(*args, **kwargs)
    if not target._schema.returns:  # an assertion
        return None
    named = bind(target, args, kwargs)
    if not target._schema.is_mutable:
        return operate(flow, target, named, given, sizes)
    if not (_name(target) in UNARY or torch.Tag.pointwise in target.tags) or not _is_alone(node):
        raise Entangled
    result = operate(flow, target, named, given, sizes)
    for same in _written(node):
        values[same] = result
    return result


def operate(flow: Flow, target: OpOverload, named: dict[str, Any], given: list[Value], sizes: Any) -> Any:
    """Chooses the rule for an operator, all of whose arguments are known by name."""
    name = _name(target)
    first, *rest = named.values()
    if name in ALIASES:
        return first
    if _reads_one(target, named, given):
        (value, *_) = given
        leaf = isinstance(value.base, Leaf)
        return replace(value, changed=True, fill=math.nan) if leaf else flow.new(flow.labels(value))
    if name in RULES:
        return RULES[name](flow, sizes, first, *rest)
    if name in FILLS:
        return _run(target, [_blank(x) for x in named.values()])
    if name in VIEWS and isinstance(first, Value) and (len(given) == 1 or name in LIKE):
        with contextlib.suppress(RuntimeError, TypeError):  # such as a view as another type
            return view(partial(_run_view, target, rest), first)
    if name in ASSEMBLIES:
        return assemble(flow, partial(_run, target), list(named.values()))
    if name in REDUCTIONS and len(given) == 1:
        dims = named.get("dim")
        dims = [dims] if isinstance(dims, int) else dims or ()
        return pytree.tree_map(lambda size: reduce(flow, size, given[0], dims), sizes, is_leaf=_is_size)
    if torch.Tag.pointwise in target.tags:
        return pointwise(flow, sizes, pytree.tree_leaves(list(named.values())))
    return unknown(flow, str(target), sizes, given)


def unknown(flow: Flow, name: str, sizes: Any, given: list[Value]) -> Any:
    """Freezes what an operator touches, and remembers to say so."""
    flow.unknown[name] = None
    return freeze(flow, sizes, given)


def _name(target: OpOverload) -> str:
    """The operator's name, that of its functional form where it works in place."""
    return target._schema.name.partition("::")[2].rstrip("_")


def _written(node: Node) -> list[Node]:
    """The tensors that a node writes in place: its own, and those that were written to give that one."""
    tensor = node.args[0]
    if not isinstance(tensor, Node):
        raise Entangled
    mutable = isinstance(tensor.target, OpOverload) and tensor.target._schema.is_mutable
    return [tensor, *(_written(tensor) if mutable else [])]


def _is_alone(node: Node) -> bool:
    """Whether the tensor that a node writes in place is new, and no view of it was made before."""
    *later, first = _written(node)
    before = {user for tensor in (*later, first) for user in tensor.users if user < node}
    return all(map(_is_new, [first, *(before - set(later))]))


def _is_new(node: Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return False
    return _name(node.target) not in ALIASES | UNARY | VIEWS and not node.target._schema.is_mutable


def _blank(x: Any) -> Any:
    return torch.empty(x.shape) if isinstance(x, Value) else x


def _run(target: OpOverload, arguments: Sequence[Any]) -> Any:
    """Calls an operator with all its arguments in the order of the schema."""
    pairs = list(zip(target._schema.arguments, arguments, strict=True))
    keywords = {argument.name: x for argument, x in pairs if argument.kwarg_only}
    return target(*[x for argument, x in pairs if not argument.kwarg_only], **keywords)


def _run_view(target: OpOverload, rest: Sequence[Any], places: Tensor) -> Any:
    """A shape operator on positions: strides differ from the real tensor's, so that a view becomes a reshape."""
    if _name(target) in ("view", "_unsafe_view"):
        return places.reshape(*rest)
    return _run(target, [places, *map(_blank, rest)])


def bind(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, in the order of the schema, defaults filled in."""
    schema = target._schema.arguments
    return {
        argument.name: args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
        for i, argument in enumerate(schema)
    }


def _reads_one(target: OpOverload, named: dict[str, Any], given: Sequence[Value]) -> bool:
    """Whether every scalar stays at its place and meets nothing but constants that are the same everywhere."""
    if _name(target) in UNARY:
        return len(given) == 1 or _name(target) in LIKE
    constants = [x for x in pytree.tree_leaves(list(named.values())) if isinstance(x, Tensor)]
    same = all(x.numel() == 1 and x.ndim <= len(given[0].shape) for x in constants)
    return torch.Tag.pointwise in target.tags and len(given) == 1 and same


# ---- groups


def settle(flow: Flow, leaves: Iterable[Leaf]) -> None:
    """A tensor used element by element moves along one axis, or not at all."""
    for leaf in leaves:
        if leaf.scalars is None or not leaf.shape:
            continue
        along = _varying(flow.units.roots(leaf.scalars))
        if len(along) > 1:
            flow.freeze(Value(leaf, leaf.shape))
            continue
        axis = along[0] if along else int(np.argmax(leaf.shape))
        flow.join(flow.axis(leaf, axis), line(leaf.scalars, axis))
        for other in range(len(leaf.shape)):
            if other != axis and leaf.axes[other] is not None:
                flow.freeze(leaf.axes[other])


def signatures(flow: Flow, leaves: Sequence[Leaf]) -> np.ndarray:
    """uint64 for every label that is a root: equal where units may trade places."""
    total = torch.zeros(flow.units.count, dtype=torch.int64)
    ranks: dict[int, Tensor] = {}

    def rank(labels: Tensor) -> Tensor:
        if id(labels) not in ranks:
            ranks[id(labels)] = occurrences(flow.units.roots(labels))
        return ranks[id(labels)]

    number = 0
    for tie in flow.ties:
        number += 1
        keys = tie.positions.long()
        if tie.sources:
            table = torch.cat([rank(source).flatten() + (j << 40) for j, source in enumerate(tie.sources)])
            keys = torch.where(keys < 0, torch.iinfo(torch.int64).min, table[keys.clamp(min=0)])
        add(total, flow.units.roots(tie.labels), number, rank(tie.labels), keys)
    for leaf in leaves:
        for labels in leaf.axes:
            number += 1
            if labels is not None:
                add(total, flow.units.roots(labels), number, rank(labels), rank(labels))
    return total.numpy().view(np.uint64)


def add(total: Tensor, roots: Tensor, number: int, ranks: Tensor, keys: Tensor) -> None:
    """Adds to every unit a hash of (number, rank, key) for each of its places."""
    total.index_add_(
        0, roots.flatten().long(), mix(mix(ranks + number * 0x9E3779B97F4A7C15 % (1 << 62)) + keys).flatten()
    )


def mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, on int64 with wrap-around."""
    bits = x.numpy().view(np.uint64)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((bits ^ (bits >> np.uint64(31))).view(np.int64))


def occurrences(roots: Tensor) -> Tensor:
    """int64 of the same shape: the how-manieth of its unit each scalar is (a fixed one: its own place, from below)."""
    along = _varying(roots)
    if len(along) > 1:
        rank = _rank(roots.flatten()).view(roots.shape)
    else:  # one line, repeated: any numbering of the repetitions will do, as long as it is the same for all units
        axis = along[0] if along else 0
        units = line(roots, axis) if roots.ndim else roots.reshape(1)
        shape = [1 if d == axis else length for d, length in enumerate(roots.shape)]
        rank = torch.arange(math.prod(shape)).view(shape) * (len(units) + 1)
        rank = rank + _rank(units).view([-1 if d == axis else 1 for d in range(roots.ndim)])
    return torch.where(roots == 0, -1 - torch.arange(roots.numel()).view(roots.shape), rank)


def _rank(line: Tensor) -> Tensor:
    order = line.argsort(stable=True)
    held = line[order]
    start = torch.searchsorted(held, held)  # where each unit's run begins
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(line)) - start
    return rank


def grouped(flow: Flow, leaves: Sequence[Leaf]) -> Labelled:
    """Units of equal signature are a group, named after the parameter that first makes them."""
    signature = signatures(flow, leaves)
    made = [(leaf, flow.units.roots(labels).flatten().numpy()) for leaf, labels in flow.made]
    order: dict[int, dict[int, None]] = {}
    names: dict[int, str] = {}
    for leaf, roots in made:
        stem = leaf.name.removesuffix(".weight").removesuffix(".bias")
        for root in dict.fromkeys(roots.tolist()):
            if root:
                key = int(signature[root])
                names.setdefault(key, stem)
                order.setdefault(key, {}).setdefault(root)
    kept = {key: list(units) for key, units in order.items() if len(units) > 1}
    stems = [names[key] for key in kept]
    labels = _numbered(stems)
    group = np.full(flow.units.count, -1)
    unit = np.zeros(flow.units.count, dtype=np.int64)
    for number, units in enumerate(kept.values()):
        group[units] = number
        unit[units] = np.arange(len(units))
    groups = {name: len(units) for name, units in zip(labels, kept.values(), strict=True)}
    axes = {}
    for leaf in leaves:
        axes[leaf.name] = []
        for axis, length in enumerate(leaf.shape):
            labelled = leaf.axes[axis]
            roots = (
                np.zeros(length, dtype=np.int64) if labelled is None else flow.units.roots(labelled).numpy()
            )
            axes[leaf.name].append((group[roots], unit[roots]))
    return Labelled(groups, axes)


def _numbered(stems: Sequence[str]) -> list[str]:
    """Distinct names: where a parameter makes several groups, they are numbered."""
    seen: dict[str, int] = {}
    names = []
    for stem in stems:
        if stems.count(stem) == 1:
            names.append(stem)
        else:
            names.append(f"{stem}/{seen.setdefault(stem, 0)}")
            seen[stem] += 1
    return names
