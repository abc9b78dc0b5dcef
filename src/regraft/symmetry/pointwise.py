"""Operators that compute every scalar from those at its place, from its slice, or from its channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regraft.symmetry.labels import Flow, Leaf, Relation, Value, is_repeating, line, places, varying
from regraft.symmetry.rules import Operation, each_size, first_of, rule, words
from regraft.symmetry.sheets import is_sheet, meet, reduce_factors
from regraft.symmetry.units import first, unexpand

UNARY = words(
    "dropout feature_dropout alpha_dropout to _to_copy type_as hardswish log_sigmoid celu rrelu zero fill "
    "real imag conj _conj conj_physical resolve_conj resolve_neg"
)
"""Operators that compute every scalar from the one at its place (beside those that torch tags pointwise). A constant
that is filled in keeps the labels of what it replaces."""


BRANCHES = 4
"""Where so few tensors are added, or weighed against each other, their channels correspond."""


# ---- scalars of one place


@rule(*UNARY)
def _unary(flow: Flow, op: Operation, x: Any, *_: Any) -> Any:
    if op.name == "type_as" and isinstance(x, Tensor):  # whatever it is like
        return x
    alone = isinstance(x, Value) and (len(op.values) == 1 or op.name in ("type_as", "to"))
    return mark_changed(flow, x) if alone else NotImplemented


def pointwise(flow: Flow, op: Operation) -> Value:
    """The rule of every operator that torch tags pointwise."""
    constants = [x for x in op.leaves if isinstance(x, Tensor)]
    if len(op.values) == 1:
        (value,) = op.values
        if all(x.numel() == 1 and x.ndim <= len(value.shape) for x in constants):
            return mark_changed(flow, value)
    return join_operands(flow, op.out, [*op.values, *constants])


def mark_changed(flow: Flow, value: Value) -> Value:
    """Every scalar stays at its place and meets only constants that are the same everywhere."""
    if isinstance(value.base, Leaf):
        return replace(value, changed=True, fill=math.nan)
    return flow.new(flow.labels(value))


def join_operands(flow: Flow, out: torch.Size, operands: Sequence[Value | Tensor]) -> Value:
    """Scalars that meet become one unit. A fixed operand that is broadcast only keeps units where they see the
    same of it: dividing by a norm moves nothing."""
    values = [x for x in operands if isinstance(x, Value)]
    weights = [w for v in values if v.positions is None and v.shape == tuple(out) and (w := flow.weight(v))]
    if len(weights) == len(operands):
        for other in weights[1:]:  # a weight that is computed from weights has their axes
            for a in range(len(out)):
                flow.join(flow.axis(weights[0], a), flow.axis(other, a))
        return mark_changed(flow, values[0])
    if scaled := _scale_weight(flow, out, operands):
        return scaled
    by_factors = any(map(is_sheet, values)) or _are_crossed(values)
    if by_factors and (met := meet(flow, out, operands)) is not None:
        return met
    _freeze_scalars(flow, out, values)
    fixed = [v for v in values if flow.is_fixed(_read_labels(flow, v))]
    moving = [v for v in values if not any(v is f for f in fixed)]
    if not moving:
        return _fixed_result(flow, out, operands)
    constants = [x for x in operands if isinstance(x, Tensor) and not _is_uniform_constant(flow, x)]
    result = _join_where_met(flow, [(value, _broadcast(flow, value, out)) for value in moving])
    for x in constants:
        flow.tie_constant(result, x.expand(out) if flow.lengths.trusts(x) else x)
    for v in fixed:
        seen = v.places().expand(out)
        if _are_distinct(seen):
            flow.freeze(result, "fixed")
        else:
            flow.tie(result, seen)
    return flow.new(result)


def _fixed_result(flow: Flow, out: torch.Size, operands: Sequence[Value | Tensor]) -> Value:
    """Of what does not move; broadcast where all operands are."""
    real = [d for d in range(len(out)) if out[d] > 1 and any(_is_real(x, d - len(out)) for x in operands)]
    lengths = [n if d in real else 1 for d, n in enumerate(out)]
    if lengths == list(out):
        return flow.fixed_value(out)
    return replace(flow.fixed_value(lengths), shape=tuple(out), positions=places(lengths).expand(out))


def _is_real(x: Value | Tensor, dim: int) -> bool:
    """Whether an operand is not the same along a dimension, counted from the last."""
    if len(x.shape) < -dim or x.shape[dim] == 1:
        return False
    if isinstance(x, Tensor):
        return bool((x != x.narrow(dim, 0, 1)).any())
    return x.positions is None or x.positions.stride(dim) != 0


def _are_crossed(values: Sequence[Value]) -> bool:
    """Whether each of two is broadcast along a dimension of the other, as in an outer product."""
    real = [
        {d - len(v.shape) for d, n in enumerate(v.shape) if n > 1 and (v.positions is None or v.positions.stride(d))}
        for v in values
    ]
    return any(a - b and b - a for i, a in enumerate(real) for b in real[:i])


def _is_uniform_constant(flow: Flow, x: Tensor) -> bool:
    return flow.lengths.trusts(x) and not bool((x != x.reshape(-1)[:1]).any())


def _freeze_scalars(flow: Flow, out: torch.Size, values: Sequence[Value]) -> None:
    """A single scalar that meets different units: nothing may take its place, and it tells no units apart."""
    single = [v for v in values if math.prod(v.shape) == 1]
    if math.prod(out) > 1 and any(varying(flow.units.roots(flow.labels(v))) for v in values):
        for v in single:
            flow.freeze(flow.labels(v), "fixed")


def _read_labels(flow: Flow, value: Value) -> Tensor:
    """Those of a scalar, or all that a value is a view of."""
    return flow.labels(value) if math.prod(value.shape) == 1 else flow.base(value)


def _scale_weight(flow: Flow, out: torch.Size, operands: Sequence[Value | Tensor]) -> Value | None:
    """A weight, less or times something for each place along one of its axes; None for anything else."""
    whole = [x for x in operands if isinstance(x, Value) and _whole_weight(flow, x) and x.shape == tuple(out)]
    others = [x for x in operands if not any(x is w for w in whole)]
    weight = _whole_weight(flow, whole[0]) if len(whole) == 1 else None
    if weight is None or any(len(x.shape) not in (0, len(out)) for x in others):
        return None
    if any(sum(n > 1 for n in x.shape) > (0 if isinstance(x, Tensor) else 1) for x in others):
        return None
    for x in others:
        if not isinstance(x, Value):
            continue
        if math.prod(x.shape) == 1:  # one scalar for all: nothing may take its place
            flow.freeze(flow.labels(x))
        for d, n in enumerate(x.shape):
            if n > 1:
                flow.join(flow.axis(weight, d), flow.labels(x).flatten())
    return mark_changed(flow, whole[0])


def _join_where_met(flow: Flow, operands: Sequence[tuple[Value, Tensor]]) -> Tensor:
    """The labels of what is computed from several labels of one shape. They become one, but for two kinds of
    broadcasting: what is the same for a block of units (the gate of a head) is what they are within, and a parameter
    that is the same for several blocks (the scale of every head) holds their twins."""
    (_, largest), *others = sorted(operands, key=lambda pair: -unexpand(pair[1]).numel())
    equal = [largest]
    for value, labels in others:
        if kind := _kind_of_broadcast(flow, largest, value, labels):
            flow.relate(largest, labels, kind)
        else:
            flow.join(largest, labels)
            equal.append(labels)
    return largest if len(equal) <= len(others) else equal[-1]


def _kind_of_broadcast(flow: Flow, largest: Tensor, value: Value, labels: Tensor) -> Relation | None:
    roots = flow.units.roots(unexpand(largest))
    along, own = varying(roots), varying(flow.units.roots(unexpand(labels)))
    again = [d for d in along if d not in own]
    stretched = [d for d, n in enumerate(((1,) * labels.ndim + tuple(value.shape))[-labels.ndim :]) if n == 1]
    if not again or not set(again) <= set(stretched):  # of one unit, but with a value for each place
        return None
    if not set(own) <= set(along) or is_repeating(roots) or not roots.all():
        return None
    if not isinstance(value.base, Leaf):
        return "within"
    return _relation_of_leaf(again, own)


def _relation_of_leaf(again: Sequence[int], own: Sequence[int]) -> Relation | None:
    """A parameter with a value for each block, or one for each unit of every block."""
    if own and max(own) < min(again):
        return "within"
    return "twin" if own and max(again) < min(own) else None


@rule("_weight_norm", "_weight_norm_interface")
def _weight_norm(flow: Flow, op: Operation, v: Any, g: Any, *_: Any) -> Any:
    """v times g / |v|, a norm for each place along some axes, those in which g is long."""
    if not all(isinstance(x, Value) and isinstance(x.base, Leaf) and x.positions is None for x in (v, g)):
        return NotImplemented
    for a, length in enumerate(g.shape):
        if length > 1:
            flow.join(flow.axis(v.base, a), flow.axis(g.base, a))
    return first_of(flow, op.out, mark_changed(flow, v))


def _broadcast(flow: Flow, value: Value, shape: torch.Size) -> Tensor:
    labels = flow.labels(value)
    if labels.shape == shape:
        return labels
    expanded = labels.expand(shape)
    if sum(length > 1 for length in value.shape) > 1:  # else there is only one order to agree on
        flow.tie(expanded, places(value.shape).expand(shape), labels)
    return expanded


def _are_distinct(seen: Tensor) -> bool:
    if any(stride == 0 and length > 1 for stride, length in zip(seen.stride(), seen.shape, strict=True)):
        return False
    return bool(seen.numel() == 0 or torch.bincount(seen.flatten() + 1).max() <= 1)


@rule("prelu")
def _prelu(flow: Flow, op: Operation, x: Any, slope: Any) -> Value:
    if isinstance(slope, Value) and math.prod(slope.shape) > 1:
        flow.join(flow.labels(slope), channel_units(flow, x, len(x.shape) - 2))
    elif isinstance(slope, Value):
        flow.freeze(flow.labels(slope))
    return flow.new(flow.labels(x))


WITHOUT_TAG = words(
    "__and __or __xor __lshift __rshift complex polar heaviside multiply subtract divide true_divide negative absolute "
    "greater greater_equal less less_equal not_equal clip arctan arctanh arcsin arcsinh arccos arccosh arctan2 fix"
)
"""Operators that are pointwise without torch's tag."""


@rule(*WITHOUT_TAG)
def _pointwise_without_tag(flow: Flow, op: Operation, *_: Any) -> Value:
    return pointwise(flow, op)


@rule("tril", "triu")
def _triangle(flow: Flow, op: Operation, x: Any, *_: Any) -> Value:
    kept = op.run([torch.ones(x.shape), *list(op.arguments.values())[1:]])
    return join_operands(flow, op.out, [x, kept])


@rule("where")
def _where(flow: Flow, op: Operation, *operands: Any) -> Any:
    """torch tags only some of its overloads."""
    if len(operands) != 3:
        return NotImplemented
    return join_operands(flow, op.out, [x for x in operands if isinstance(x, Value | Tensor)])


# ---- slices


@rule("max", "min")
def _extreme(flow: Flow, op: Operation, x: Any, *rest: Any) -> Any:
    """Over ``dim`` with its places, over everything, or of two tensors."""
    if not isinstance(x, Value) or isinstance(op.arguments.get("other"), Value | Tensor):
        return NotImplemented
    if "dim" not in op.arguments:
        return reduce(flow, op.out, x, ())
    values = reduce(flow, op.out[0], x, [op.arguments["dim"]])
    if 1 in flow.wanted and not flow.passes(x, op.arguments["dim"]):
        return NotImplemented  # the winner's place tells units apart
    return [values, values]


@rule(
    "all", "amax", "amin", "aminmax", "any", "linalg_vector_norm", "logsumexp", "mean", "nansum", "norm", "prod",
    "std", "std_mean", "sum", "var", "var_mean",
)  # fmt: skip
def _reduction(flow: Flow, op: Operation, *_: Any) -> Any:
    """Over ``dim``; the result does not depend on the order in a slice."""
    if len(op.values) != 1:
        return NotImplemented
    dims = op.arguments.get("dim")
    dims = [dims] if isinstance(dims, int) else dims or ()
    return each_size(lambda size: reduce(flow, size, op.values[0], dims), op.out)


def _whole_weight(flow: Flow, x: Value) -> Leaf | None:
    weight = flow.weight(x)
    return weight if weight and x.shape == weight.shape else None


def reduce(flow: Flow, out: torch.Size, x: Value, dims: Sequence[int]) -> Value:
    """A slice of a single unit passes it on; a slice of several gives what no exchange inside it changes. The units of
    a few branches that are added become one."""
    if is_sheet(x) and (reduced := reduce_factors(flow, out, x, dims)) is not None:
        return reduced
    labels = flow.labels(x)
    if flow.is_fixed(labels):
        return flow.fixed_value(out)
    dims = tuple(sorted({d % labels.ndim for d in dims})) or tuple(range(labels.ndim))
    once = unexpand(labels)
    slices = first(once, dims)
    units = once.numel() // max(slices.numel(), 1)
    if units <= min(BRANCHES, slices.numel() - 1) and not is_repeating(flow.units.roots(once)):
        flow.join(once, slices)
    roots = flow.units.roots(once)
    single = (roots == first(roots, dims)).all(dims, keepdim=True)
    kept = [1 if d in dims else n for d, n in enumerate(labels.shape)]
    passed = torch.where(single, slices, 0).expand(kept)
    flow.tie(labels, places(passed.shape).expand(labels.shape), passed)
    return Value(passed.reshape(out), tuple(out))


def normalise_slices(flow: Flow, x: Value, dims: Sequence[int]) -> Value:
    """Every scalar, and something of its slice along ``dims``."""
    slices = [1 if d in [dim % len(x.shape) for dim in dims] else n for d, n in enumerate(x.shape)]
    return join_operands(flow, torch.Size(x.shape), [x, reduce(flow, torch.Size(slices), x, dims)])


@rule("softmax", "log_softmax", "_softmax", "_log_softmax")
def _softmax(flow: Flow, op: Operation, x: Value, dim: int, *_: Any) -> Value:
    return normalise_slices(flow, x, [dim])


@rule("layer_norm", "rms_norm", "native_layer_norm")
def _layer_norm(flow: Flow, op: Operation, x: Any, normalized_shape: list[int], *options: Any) -> Any:
    result = normalise_slices(flow, x, range(len(x.shape) - len(normalized_shape), len(x.shape)))
    for tensor in options[:2]:
        if isinstance(tensor, Value):
            result = join_operands(flow, torch.Size(x.shape), [result, tensor])
    return first_of(flow, op.out, result)


# ---- channels


def channel_units(flow: Flow, x: Value, spatial: int) -> Tensor:
    """int32 [C] for x [..., C, *spatial]: all places of a channel become one unit."""
    labels = flow.labels(x)
    units = line(labels, labels.ndim - spatial - 1)
    flow.join(labels, units.view(-1, *(1,) * spatial))
    return units


def spread(flow: Flow, out: torch.Size, channels: Tensor, bias: Any = None, spatial: int = 0) -> Value:
    """``channels`` [O], to which a bias is added, at every place of ``out`` [..., O, *spatial]."""
    if bias is not None:
        flow.join(flow.labels(flow.as_value(bias)), channels)
    return Value(channels.view(-1, *(1,) * spatial).expand(out), tuple(out))


@rule("batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "instance_norm")
def _batch_norm(flow: Flow, op: Operation, x: Any, *options: Any) -> Any:
    if weight := flow.weight(x):  # standardised weights: each row by its own mean and deviation
        if x.shape[:2] != (1, weight.shape[0]) or any(isinstance(t, Tensor) for t in options[:4]):
            return NotImplemented
        _join_values(flow, options[:4], flow.axis(weight, 0))
        return first_of(flow, op.out, mark_changed(flow, x))
    units = _join_channels(flow, x, options[:4])
    return first_of(flow, op.out, spread(flow, x.shape, units, spatial=len(x.shape) - 2))


@rule("group_norm")
def _group_norm(flow: Flow, op: Operation, x: Any, groups: int, *options: Any) -> Value:
    units = _join_channels(flow, x, options[:2])
    flow.blocks(units.view(groups, -1), (1,))
    return spread(flow, x.shape, units, spatial=len(x.shape) - 2)


def _join_channels(flow: Flow, x: Value, tensors: Sequence[Any]) -> Tensor:
    """Parameters and statistics [C] have the units of the channels of x [B, C, ...]: int32 [C]."""
    units = channel_units(flow, x, len(x.shape) - 2)
    _join_values(flow, tensors, units)
    return units


def _join_values(flow: Flow, tensors: Sequence[Any], units: Tensor) -> None:
    for tensor in tensors:
        if isinstance(tensor, Value):
            flow.join(flow.labels(tensor), units)


def _pool(flow: Flow, op: Operation, x: Value, *_: Any, spatial: int) -> Any:
    labels = flow.labels(x)
    plane = first(labels, range(labels.ndim - spatial, labels.ndim))
    flow.join(labels, plane)
    return each_size(lambda size: Value(plane.expand(size), tuple(size)), op.out)


@rule("im2col")
def _im2col(flow: Flow, op: Operation, x: Value, kernel: Sequence[int], *_: Any) -> Value:
    """x [..., C, H, W] gives [..., C K, L]: the K places of a window of each channel."""
    units = channel_units(flow, x, 2).repeat_interleave(math.prod(kernel))
    return Value(units.view(-1, 1).expand(op.out), tuple(op.out))


@rule("col2im")
def _col2im(flow: Flow, op: Operation, x: Value, size: Any, kernel: Sequence[int], *_: Any) -> Value:
    """x [..., C K, L] gives [..., C, H, W]: what stands at the K places of a window is added."""
    rows = channel_units(flow, x, 1).view(-1, math.prod(kernel))
    flow.join(rows, rows[:, :1])
    return Value(rows[:, 0].reshape(-1, 1, 1).expand(op.out), tuple(op.out))


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
