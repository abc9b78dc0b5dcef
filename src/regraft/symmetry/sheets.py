"""Values with units along several dimensions at once: a product of two weights, the state of a state-space model.

A label names one unit. Where a scalar has two (the state of channel d at place n), they are kept apart as *factors*: a
value's dimensions fall into sets, and the units along each set move independently of the others. A parameter of several
axes is such a value; what is computed is one through a computed leaf, with one axis for each factor.

Three rules serve all operators: operands that meet (:func:`meet`), reductions (:func:`reduce_factors`), and
contractions (:func:`contract_factors`). Each returns None, and demands nothing, where dimensions do not fall apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regraft.symmetry.labels import Flow, Leaf, Relation, Value, is_repeating, places, varying
from regraft.symmetry.units import How, first, unexpand

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Factor:
    """``labels``: int32, of the value's lengths along ``dims`` and of length 1 along the others."""

    dims: Dims
    labels: Tensor
    leaf: Leaf | None = None  # the parameter whose axis it is, or of what met the first
    orderly: bool = True  # no activation or buffer met there


@dataclass(frozen=True)
class Parts:
    """What an operand has along each dimension: factors, fixed places, a constant's values (``keys``), or nothing,
    where it is broadcast."""

    factors: tuple[Factor, ...]
    places: Dims = ()
    keys: Tensor | None = None
    distrusted: bool = False  # a constant of a dimension of length 1, told apart by place

    def move(self, dims: Sequence[int], ndim: int) -> Parts:
        """The same of a tensor of ``ndim`` dimensions, in which dimension d is ``dims[d]``."""

        def move_sheets(x: Tensor) -> Tensor:
            order = sorted(range(len(dims)), key=lambda d: dims[d])
            lengths = [1] * ndim
            for d, new in enumerate(dims):
                lengths[new] = x.shape[d]
            return x.permute(order).reshape(lengths)

        factors = [Factor(tuple(sorted(dims[d] for d in f.dims)), move_sheets(f.labels), f.leaf) for f in self.factors]
        keys = None if self.keys is None else move_sheets(self.keys)
        return Parts(tuple(factors), tuple(dims[d] for d in self.places), keys, self.distrusted)


def is_sheet(x: object) -> bool:
    """Whether a value may have units along several dimensions: a view of a leaf of several axes that nothing has used
    scalar by scalar."""
    if not isinstance(x, Value) or not isinstance(x.base, Leaf):
        return False
    return x.base.scalars is None and sum(n > 1 for n in x.base.shape) > 1


# ---- taking values apart


def take_apart(flow: Flow, x: Value | Tensor) -> Parts | None:
    """The factors of a value or a constant; None where they share dimensions in a way that is none of ours."""
    if isinstance(x, Tensor):
        if not flow.lengths.trusts(x):
            return Parts((), tuple(d for d, n in enumerate(x.shape) if n > 1), distrusted=True)
        return Parts((), keys=x.detach() if varying(x) else None)
    return _parts_of_leaf(flow, x) if is_sheet(x) else _parts_of_labels(flow, x)


def _parts_of_labels(flow: Flow, x: Value) -> Parts:
    labels = flow.labels(x)
    real = _real_dims(x)
    dims = tuple(varying(flow.units.roots(labels)))
    others = [d for d in range(labels.ndim) if d not in dims]
    once = first(labels, others)
    flow.tie(labels, places(once.shape).expand(labels.shape), once)
    if not dims:  # one unit everywhere: nothing may take its place
        flow.freeze(once)
        return Parts((), real)
    leaf = x.base if isinstance(x.base, Leaf) and x.base.learned else None
    return Parts((Factor(dims, once, leaf),), tuple(d for d in real if d not in dims))


def _real_dims(x: Value) -> Dims:
    """The dimensions along which a value is not broadcast."""
    if x.positions is None:
        return tuple(d for d, n in enumerate(x.shape) if n > 1)
    return tuple(varying(x.positions))


def _parts_of_leaf(flow: Flow, x: Value) -> Parts | None:
    leaf, keys = x.base, None
    assert isinstance(leaf, Leaf)
    owner = leaf if leaf.learned else None
    axes = [a for a, n in enumerate(leaf.shape) if n > 1]
    if x.positions is None:
        own = {a: flow.axis(leaf, a) for a in axes}
        lengths = {a: [-1 if d == a else 1 for d in range(len(leaf.shape))] for a in axes}
        moving = [Factor((a,), u.view(lengths[a]), owner) for a, u in own.items() if not flow.is_fixed(u)]
        return Parts(tuple(moving), tuple(a for a in axes if flow.is_fixed(own[a])))
    positions = x.positions
    if bool((unexpand(positions) < 0).any()):
        positions, keys = _without_padding(positions)
        if keys is None:
            return None
    coordinates = torch.unravel_index(unexpand(positions).long(), leaf.shape)
    factors: list[Factor] = []
    fixed: list[tuple[Dims, Tensor]] = []
    for a in axes:
        units, dims = flow.axis(leaf, a), tuple(varying(coordinates[a]))
        at = first(coordinates[a], [d for d in range(coordinates[a].ndim) if d not in dims])
        if not dims:  # one slice: nothing may take its place
            flow.freeze(units[at.flatten()], "fixed")
        elif flow.is_fixed(units):
            fixed.append((dims, at))
        elif any(set(f.dims) & set(dims) for f in factors):
            flow.freeze(units)  # several axes flattened: the units of the first, at several places each
            fixed.append((dims, at))
        else:
            whole = torch.equal(at.flatten(), torch.arange(leaf.shape[a]))
            factors.append(Factor(dims, units.view(at.shape) if whole else flow.gather(at.int(), units), owner))
    rest: set[int] = set()
    for dims, at in fixed:
        shared = [f for f in factors if set(f.dims) & set(dims)]
        if any(not set(dims) <= set(f.dims) for f in shared):
            return None
        for factor in shared:
            flow.tie(factor.labels, at.int().expand(factor.labels.shape))
        rest |= set() if shared else set(dims)
    return Parts(tuple(factors), tuple(sorted(rest)), keys)


def _without_padding(positions: Tensor) -> tuple[Tensor, Tensor | None]:
    """Positions along the dimensions that are padded as at the first place that is not; and where padding is. None
    where that is no box."""
    inside = positions >= 0
    dims = varying(inside)
    lines = [inside.amax([e for e in range(inside.ndim) if e != d], keepdim=True) for d in range(inside.ndim)]
    box = lines[0]
    for along in lines[1:]:
        box = box & along
    if not bool(inside.any()) or not torch.equal(box.expand(inside.shape), inside):
        return positions, None
    for d in dims:
        n = positions.shape[d]
        places_in = lines[d].flatten().nonzero().flatten()
        if len(places_in) > 1:  # what is padded has places of its own
            return positions, None
        positions = positions.narrow(d, int(places_in[0]), 1).expand(
            *(n if e == d else m for e, m in enumerate(positions.shape))
        )
    return positions, first(inside, [d for d in range(inside.ndim) if d not in dims])


# ---- putting values together


def put_together(flow: Flow, shape: Sequence[int], factors: Iterable[Factor], name: str = "") -> Value:
    """A value with these factors, which share no dimension."""
    factors = [f for f in factors if not flow.is_fixed(f.labels)]
    for factor in factors:
        _produce(flow, factor)
    if not factors:
        return flow.fixed_value(shape)
    if len(factors) == 1:
        return Value(factors[0].labels.expand(tuple(shape)), tuple(shape))
    others = [d for d in range(len(shape)) if not any(d in f.dims for f in factors)]
    order = [*others, *(d for f in factors for d in f.dims)]
    lengths = [*(shape[d] for d in others), *(f.labels.numel() for f in factors)]
    leaf = Leaf(name, tuple(lengths), learned=False, computed=True)
    leaf.axes = [
        *(torch.zeros(shape[d], dtype=torch.int32) for d in others),
        *(f.labels.expand([shape[d] if d in f.dims else 1 for d in range(len(shape))]).flatten() for f in factors),
    ]
    flow.derived.append(leaf)
    positions = places(lengths).view([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
    return Value(leaf, tuple(shape), positions)


def _produce(flow: Flow, factor: Factor) -> None:
    if factor.leaf is not None:
        flow.produce(factor.leaf, factor.labels)


def meet(flow: Flow, shape: Sequence[int], operands: Sequence[Value | Tensor]) -> Value | None:
    """Every scalar of the result is computed from those at its place, after broadcasting."""
    ndim = len(shape)
    parts = [take_apart(flow, x) for x in operands]
    if not all(parts):
        return None
    spread = [p.move(range(ndim - len(x.shape), ndim), ndim) for p, x in zip(parts, operands, strict=True) if p]
    joined = join_factors(flow, spread)
    return None if joined is None else put_together(flow, shape, joined, flow.module)


def join_factors(flow: Flow, operands: Sequence[Parts]) -> list[Factor] | None:
    """One factor for each set of dimensions; None where sets overlap, or an operand has several in one set."""
    sets: list[set[int]] = []
    for factor in (f for p in operands for f in p.factors):
        touching = [s for s in sets if s & set(factor.dims)]
        union = set(factor.dims).union(*touching)
        sets = [union if s is touching[0] else s for s in sets if s not in touching[1:]] if touching else [*sets, union]
    met = [[(p, [f for f in p.factors if set(f.dims) <= dims]) for p in operands] for dims in sets]
    for dims, entries in zip(sets, met, strict=True):
        if any(len(inside) > 1 for _, inside in entries):
            return None
        if not any(set(f.dims) == dims for _, inside in entries for f in inside):
            return None
    return [_join_set(flow, tuple(sorted(dims)), entries) for dims, entries in zip(sets, met, strict=True)]


def _join_set(flow: Flow, dims: Dims, entries: Sequence[tuple[Parts, list[Factor]]]) -> Factor:
    """All that the operands have along some dimensions; ``entries``: at most one factor each."""
    present = sorted(((p, f) for p, inside in entries for f in inside), key=lambda pair: -len(pair[1].dims))
    (_, largest), *others = present
    for parts, factor in others:
        kind = _relation(flow, largest, parts, factor)
        labels = factor.labels.expand(largest.labels.shape)
        if kind:
            flow.relate(largest.labels, labels, kind)
        else:
            flow.join(largest.labels, factor.labels)
    for parts, _ in entries:
        if at := [d for d in parts.places if d in dims]:
            if parts.distrusted and not flow.is_fixed(largest.labels):
                flow.lengths.distrusted.setdefault(flow.operator, flow.module)
            lengths = [n if d in at else 1 for d, n in enumerate(largest.labels.shape)]
            _tie_to_keys(flow, largest.labels, places(lengths), "fixed")
        if parts.keys is not None:
            _tie_to_constant(flow, dims, largest.labels, parts.keys)
    leaves = [f.leaf for _, f in present if f.leaf is not None]
    return Factor(dims, largest.labels, leaves[0] if leaves else None, orderly=len(leaves) == len(present))


def _relation(flow: Flow, largest: Factor, parts: Parts, factor: Factor) -> Relation | None:
    """How units that are broadcast along some of the others' dimensions stand to these; None: they are these."""
    again = set(largest.dims) - set(factor.dims)
    roots = flow.units.roots(largest.labels)
    if not again or again & set(parts.places) or is_repeating(roots) or not bool(roots.all()):
        return None
    if factor.leaf is None:
        return "within"
    if max(factor.dims) < min(again):
        return "within"
    return "twin" if max(again) < min(factor.dims) else None


def _tie_to_constant(flow: Flow, dims: Dims, labels: Tensor, constant: Tensor) -> None:
    """Units may only trade places that see equal slices of a constant."""
    seen = [d for d in dims if constant.shape[d] > 1]
    if not seen:
        return
    lengths = [n if d in seen else 1 for d, n in enumerate(labels.shape)]
    rows = constant.movedim(seen, list(range(len(seen)))).flatten(len(seen)).flatten(0, len(seen) - 1)
    rows = torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows
    keys = torch.unique(rows, dim=0, return_inverse=True)[1]
    _tie_to_keys(flow, labels, keys.view(lengths).int(), "apart")


def _tie_to_keys(flow: Flow, labels: Tensor, keys: Tensor, how: How) -> None:
    """Units may only trade places that have equal keys; frozen at once where no two have."""
    if keys.shape == labels.shape and not is_repeating(keys):
        flow.freeze(labels, how)
    else:
        flow.tie(labels, keys.expand(labels.shape))


# ---- operators


def reduce_factors(flow: Flow, out: Sequence[int], x: Value, dims: Sequence[int]) -> Value | None:
    """A result for each slice along ``dims``, that no order in the slice changes."""
    parts = take_apart(flow, x)
    if parts is None or parts.keys is not None:
        return None
    gone = {d % len(x.shape) for d in dims} or set(range(len(x.shape)))
    if any(set(f.dims) & gone and not set(f.dims) <= gone for f in parts.factors):
        return None
    kept = [f for f in parts.factors if not set(f.dims) <= gone]
    for factor in parts.factors:
        _produce(flow, factor)
    lengths = [1 if d in gone else n for d, n in enumerate(x.shape)]
    return put_together(flow, lengths, kept, flow.module).rearrange(lambda p: p.reshape(tuple(out)))


def contract_factors(
    flow: Flow, out: Sequence[int], terms: Sequence[str], operands: Sequence[Value | Tensor], result: str
) -> Value | None:
    """A sum of products: the operands' dimensions have letters, and letters that are not in ``result`` are summed."""
    letters = "".join(dict.fromkeys(result + "".join(terms)))
    if any(len(set(term)) < len(term) for term in (*terms, result)):
        return None
    parts = [take_apart(flow, x) for x in operands]
    if not all(parts):
        return None
    named = [p.move([letters.index(i) for i in term], len(letters)) for p, term in zip(parts, terms, strict=True) if p]
    joined = join_factors(flow, named)
    if joined is None:
        return None
    summed = {letters.index(i) for i in letters if i not in result}
    kept: list[Factor] = []
    for factor in joined:
        over = [d for d in factor.dims if d in summed]
        if len(over) == len(factor.dims):
            if factor.orderly:  # an input or a buffer alone gives units no order
                _produce(flow, factor)
            continue
        kept.append(
            Factor(tuple(d for d in factor.dims if d not in over), flow.blocks(factor.labels, over)) if over else factor
        )
    lengths = {i: n for i, n in zip(result, out, strict=True)}
    shape = [lengths.get(i, 1) for i in letters]
    whole = put_together(flow, shape, kept, flow.module)
    return whole.rearrange(lambda p: p.reshape(tuple(out)))


def assemble(flow: Flow, out: Sequence[int], parts: Sequence[Value | Tensor], dim: int, *, new: bool) -> Value | None:
    """Values behind one another along ``dim`` (a ``new`` one), along which none of them has units."""
    ndim = len(out)
    taken = [take_apart(flow, x) for x in parts]
    if not all(taken) or any(p and p.keys is not None for p in taken):
        return None
    order = [d for d in range(ndim) if not (new and d == dim % ndim)]
    moved = [p.move(order, ndim) for p in taken if p]
    if any(dim % ndim in f.dims for p in moved for f in p.factors):
        return None
    joined = join_factors(flow, moved)
    return None if joined is None else put_together(flow, out, joined, flow.module)


def pass_factors(flow: Flow, out: torch.Size, x: Value, dims: Sequence[int], *, held: bool = False) -> Value | None:
    """A result of the same factors, whose lines along ``dims`` are computed from those of x; ``held``: units along
    these are frozen."""
    parts = take_apart(flow, x)
    lines = {d % len(x.shape) for d in dims}
    if parts is not None and held:
        for factor in (f for f in parts.factors if set(f.dims) <= lines):
            flow.freeze(factor.labels)
        parts = replace(parts, factors=tuple(f for f in parts.factors if not set(f.dims) <= lines))
    if parts is None or parts.keys is not None or any(set(f.dims) & lines for f in parts.factors):
        return None
    if len(out) == len(x.shape):
        return put_together(flow, out, parts.factors, flow.module)
    lengths = [1 if d in lines else n for d, n in enumerate(x.shape)]
    if math.prod(lengths) != math.prod(out):
        return None
    return put_together(flow, lengths, parts.factors, flow.module).rearrange(lambda p: p.reshape(tuple(out)))
