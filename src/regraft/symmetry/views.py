"""Operators that only move scalars, and operators that choose some of them.

Those that move are run on *positions*: what they do to scalars they do to labels. Those that choose (a router's best
experts) give a :class:`Choice`, and what belongs to the chosen units is looked up by it.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils import _pytree as pytree

from regraft.symmetry.labels import Choice, Flow, Leaf, Value, is_repeating, line, places, varying
from regraft.symmetry.lines import are_adjacent, indexed_dims, line_units, pass_lines
from regraft.symmetry.rules import Operation, Rule, each_size, freeze_operands, operator_name, rule, words
from regraft.symmetry.sheets import assemble, is_sheet
from regraft.symmetry.units import unexpand

ALIASES = words("alias clone contiguous detach lift lift_fresh lift_fresh_copy positive")
"""Operators that give back what they are given."""

VIEWS = words(
    "broadcast_to channel_shuffle chunk diagonal expand expand_as flatten flip index "
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
    if isinstance(x, Tensor) and op.name in LIKE:
        return op.run([x, *map(_blank, rest)])
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
    covered, behind = indexed_dims(flow, indices)
    if len(indices) == len(covered) == 1 and (table := table_of(x)):
        flow.freeze(flow.axis(table, 0))
        return slices_of(flow, op.out, table)
    labels = flow.labels(x)
    if flow.is_fixed(labels):
        return flow.fixed_value(op.out)
    if not covered or (once := line_units(flow, x, covered)) is None:
        return NotImplemented
    kept = [n for d, n in enumerate(once.shape) if d not in covered]
    start = covered[0] if are_adjacent(covered) else 0
    kept[start:start] = [1] * behind
    return flow.new(once.reshape(kept).expand(op.out))


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
    if op.name in ("cat", "concat", "concatenate", "stack") and any(map(is_sheet, op.values)):
        behind = assemble(flow, op.out, arguments[0], op.arguments["dim"], new=op.name == "stack")
        if behind is not None:
            return behind
    if all(flow.stays(x) for x in op.values):
        return flow.fixed_value(op.out)
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


# ---- choices

SELECTING = ALIASES | VIEWS | {"to", "_to_copy"}
"""Operators that give, of places that were chosen, the same or some of them."""


CONTRACTIONS = words(
    "addmm baddbmm bmm conv1d conv2d conv3d convolution einsum layer_norm linear matmul mm native_layer_norm rms_norm"
)
"""Operators whose results differ, whatever goes in."""

DISTINCT = words(
    "add atan celu cos div dropout elu erf exp expm1 gelu leaky_relu log log1p log_sigmoid log_softmax logaddexp mean "
    "mul neg pow reciprocal rsqrt rsub selu sigmoid silu sin softmax _log_softmax _softmax softplus sqrt square sub "
    "sum tanh"
)
"""Operators whose results differ where what goes in does."""


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
    if units is None and (passed := pass_lines(flow, op, x, op.arguments["dim"])) is not NotImplemented:
        return passed
    if units is None or op.arguments.get("sorted") is False:
        return NotImplemented
    if flow.node is not None and _may_be_equal(flow.node.args[0]):
        freeze_operands(flow, [x], " of values that may be equal")
        return each_size(flow.fixed_value, op.out)
    if isinstance(op.out, torch.Size):
        return Choice(units, tuple(op.out))
    values, places_chosen = op.out
    return [flow.fixed_value(values), Choice(units, tuple(places_chosen))]


def _may_be_equal(node: Any) -> bool:
    """Whether several units may have the very same value (zero, behind ReLU): their places then decide."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    name = operator_name(node.target) if isinstance(node.target, OpOverload) else ""
    if not name or name in CONTRACTIONS:
        return False
    return name not in SELECTING | DISTINCT or any(map(_may_be_equal, node.all_input_nodes))


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


def _embedding(flow: Flow, op: Operation, weight: Any, chosen: Choice, *_: Any) -> Any:
    return _index(flow, op, weight, [chosen])


LOOKUPS: dict[str, Rule] = {"index": _index, "embedding": _embedding, "gather": _gather, "scatter": _scatter}
