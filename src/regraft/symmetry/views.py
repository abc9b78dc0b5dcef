"""Operators that only move scalars. They are run on *positions*: what they do to scalars they do to labels."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from regraft.symmetry.labels import Flow, Leaf, Value, places
from regraft.symmetry.rules import Operation, rule, words

ALIASES = words("alias clone contiguous detach lift lift_fresh lift_fresh_copy positive")
"""Operators that give back what they are given."""

VIEWS = words(
    "broadcast_to channel_shuffle chunk diagonal expand expand_as flatten flip index index_select "
    "moveaxis movedim native_channel_shuffle narrow numpy_T mT permute pixel_shuffle pixel_unshuffle "
    "ravel reflection_pad1d reflection_pad2d repeat repeat_interleave replication_pad1d replication_pad2d "
    "reshape reshape_as roll rot90 select slice split split_with_sizes squeeze swapaxes swapdims t "
    "tensor_split tile transpose unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze "
    "view view_as _unsafe_view"
)

LIKE = words("expand_as view_as reshape_as")
"""Of whose second tensor only the shape matters."""


@rule(*ALIASES)
def _alias(flow: Flow, op: Operation, x: Any, *_: Any) -> Any:
    return x


@rule(*VIEWS)
def _view(flow: Flow, op: Operation, x: Any, *rest: Any) -> Any:
    if op.name == "index" and isinstance(x, Value) and len(op.values) > 1:
        return _look_up_by_data(flow, op, x, rest[0])
    if not isinstance(x, Value) or (len(op.values) > 1 and op.name not in LIKE):
        return NotImplemented

    def on_places(positions: Tensor) -> Any:
        if op.name in ("view", "_unsafe_view"):  # strides differ from the real tensor's
            return positions.reshape(*rest)
        return op.run([positions, *map(_blank, rest)])

    with contextlib.suppress(RuntimeError, TypeError):  # such as a view as another type
        return x.map_positions(on_places)
    return NotImplemented


def _look_up_by_data(flow: Flow, op: Operation, x: Value, indices: Any) -> Any:
    """What is read depends on data: units must stand along the whole of every dimension that is looked up."""
    if not all(flow.is_fixed(flow.labels(i)) for i in indices if isinstance(i, Value)):
        return NotImplemented
    if any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices):
        return NotImplemented
    if len(indices) == 1 and (table := table_of(x)):
        flow.freeze(flow.axis(table, 0))
        return slices_of(flow, op.out, table)
    labels = flow.labels(x)
    if flow.is_fixed(labels):
        return flow.fixed_value(op.out)
    dims = [d for d, i in enumerate(indices) if i is not None]
    if not all(flow.passes(x, d) for d in dims):
        return NotImplemented
    first = labels[tuple(slice(0, 1) if d in dims else slice(None) for d in range(labels.ndim))]
    flow.tie(labels, places(first.shape).expand(labels.shape), first)
    blank = [torch.zeros(i.shape, dtype=torch.int64) if isinstance(i, Value) else i for i in indices]
    positions = op.run([places(first.shape).expand(labels.shape), blank])
    return Value(first, tuple(positions.shape), positions) if positions.shape == op.out else NotImplemented


def table_of(x: Value) -> Leaf | None:
    """The parameter of several axes that a value is all of, if nothing has used it element by element."""
    leaf = x.base
    if not isinstance(leaf, Leaf) or x.positions is not None or x.shape != leaf.shape:
        return None
    return leaf if len(leaf.shape) > 1 and leaf.scalars is None else None


def slices_of(flow: Flow, out: torch.Size, leaf: Leaf) -> Value:
    """Some slices along a parameter's first axis, [..., *slice]: each has the parameter's other axes."""
    part = Leaf(leaf.name, leaf.shape[1:], learned=leaf.learned)
    part.axes = [flow.axis(leaf, a) for a in range(1, len(leaf.shape))]
    flow.derived.append(part)
    return Value(part, tuple(out), places(part.shape).expand(out), changed=True)


@rule(
    "empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_zeros", "ones_like", "zeros_like"
)  # fmt: skip
def _constant_like(flow: Flow, op: Operation, *arguments: Any) -> Any:
    return op.run([_blank(x) for x in arguments])


def _blank(x: Any) -> Any:
    """What stands for a tensor of which only the shape is read."""
    return torch.empty(x.shape) if isinstance(x, Value) else x


@rule("copy")
def _copy(flow: Flow, op: Operation, x: Any, source: Any, *_: Any) -> Any:
    if isinstance(source, Value):
        return source.rearrange(lambda positions: positions.expand(op.out))
    return source.expand(op.out)


@rule("pad", "constant_pad_nd")
def _pad(flow: Flow, op: Operation, x: Value, pad: list[int], *options: Any) -> Value:
    mode = options[0] if options and isinstance(options[0], str) else "constant"
    fill = float(options[-1] or 0.0) if options else 0.0
    if x.positions is not None and fill != x.fill and (x.positions < 0).any():
        x = flow.new(flow.labels(x))
    constant = {"value": -1.0} if mode == "constant" else {}
    padded = x.rearrange(lambda p: torch.nn.functional.pad(p, pad, mode=mode, **constant))
    return replace(padded, fill=fill)


@rule("cat", "concat", "concatenate", "hstack", "select_scatter", "slice_scatter", "stack", "vstack")
def _assemble(flow: Flow, op: Operation, *arguments: Any) -> Value:
    """Several tensors become one: run on positions in all that they come from, one after the other."""
    leaves, structure = pytree.tree_flatten(list(arguments))
    bases: dict[int, Tensor] = {}
    starts: dict[int, int] = {}
    count = 0
    for i, x in enumerate(leaves):
        if not isinstance(x, Value | Tensor):
            continue
        if isinstance(x, Tensor):
            x = flow.new(flow.constant(x))
        elif x.changed or bool((x.places() < 0).any()):  # other parts may be changed, or filled, otherwise
            x = flow.new(flow.labels(x))
        base = flow.base(x)
        if id(base) not in bases:
            bases[id(base)], starts[id(base)] = base, count
            count += base.numel()
        leaves[i] = x.places() + starts[id(base)]
    positions = op.run(pytree.tree_unflatten(leaves, structure))
    return flow.new(flow.gather(positions, *bases.values()))
