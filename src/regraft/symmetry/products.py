"""Operators that contract: with a weight, which makes new units, or one activation with another."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regraft.symmetry.labels import Flow, Leaf, Value, is_repeating, places
from regraft.symmetry.pointwise import channel_units, join_operands, spread
from regraft.symmetry.rules import Operation, each_size, first_of, freeze, freeze_operator, rule
from regraft.symmetry.sheets import contract_factors, is_sheet
from regraft.symmetry.units import unexpand

# ---- an activation with a weight


@rule("linear")
def _linear(flow: Flow, op: Operation, x: Any, weight: Any, bias: Any) -> Value:
    return contract(flow, op.out, x, weight, bias)


@rule("addmm")
def _addmm(flow: Flow, op: Operation, bias: Any, x: Any, weight: Any, *_: Any) -> Value:
    return contract(flow, op.out, x, weight, bias, dims=(0, 1))


def contract(
    flow: Flow, out: torch.Size, x: Any, weight: Any, bias: Any = None, *, dims: tuple[int, int] = (1, 0)
) -> Value:
    """x [..., I] and a weight whose ``dims`` are (input, output) give [..., O]: the last axis is contracted."""
    leaf = isinstance(weight, Value) and isinstance(weight.base, Leaf)
    if is_sheet(x) or not leaf or (isinstance(x, Value) and is_uniform(flow, flow.labels(x), -1)):
        terms = [string.ascii_letters[: len(x.shape)], _weight_term(weight, len(x.shape), *dims)]
        result = terms[0][:-1] + terms[1][dims[1]]
        if (made := contract_factors(flow, out, terms, [x, weight], result)) is not None:
            return made if bias is None else join_operands(flow, out, [made, bias])
    inward, outward = planes(flow, weight, *dims)
    if inward is None or outward is None:
        return freeze(flow, out, [x, weight, bias], " with such a weight")
    labels = flow.labels(flow.as_value(x))
    if is_uniform(flow, labels, -1):  # it mixes places of one unit, such as tokens: the unit passes
        for tensor in (weight, bias):
            if isinstance(tensor, Value):
                flow.freeze(tensor)
        return Value(labels.narrow(-1, 0, 1).expand(out), tuple(out))
    flow.join(labels, inward)
    flow.produce(weight.base, outward)
    return spread(flow, out, outward, bias)


def _weight_term(weight: Value | Tensor, ndim: int, inward: int, outward: int) -> str:
    """The letters of a weight's dimensions, beside an operand of ``ndim`` dimensions, the last of which is summed."""
    free = iter(reversed(string.ascii_letters))
    names = [next(free) for _ in weight.shape]
    names[inward] = string.ascii_letters[ndim - 1]
    return "".join(names)


def planes(flow: Flow, weight: Any, *dims: int) -> list[Tensor | None]:
    """The labels of some dimensions of a weight."""
    usable = isinstance(weight, Value) and len(weight.shape) > max(dims, default=0)
    return [flow.plane(weight, d) if usable else None for d in dims]


def is_uniform(flow: Flow, labels: Tensor, dim: int) -> bool:
    """Whether every line along ``dim`` is a single unit that may move, at more than one place."""
    roots = flow.units.roots(unexpand(labels))
    return labels.shape[dim] > 1 and bool((roots != 0).all() and (roots == roots.narrow(dim, 0, 1)).all())


@rule("conv1d", "conv2d", "conv3d")
def _conv(flow: Flow, op: Operation, x: Any, weight: Any, bias: Any, *_: Any) -> Value:
    return convolve(flow, op, x, weight, bias)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(flow: Flow, op: Operation, x: Any, weight: Any, bias: Any, *_: Any) -> Value:
    return convolve(flow, op, x, weight, bias, transposed=True)


@rule("convolution")
def _convolution(flow: Flow, op: Operation, x: Any, weight: Any, bias: Any, *_: Any) -> Value:
    return convolve(flow, op, x, weight, bias, transposed=op.arguments["transposed"])


def convolve(flow: Flow, op: Operation, x: Any, weight: Any, bias: Any, *, transposed: bool = False) -> Value:
    """x [B, I, ...] or [I, ...] and a weight [O, I / groups, ...], or [I, O / groups, ...] if transposed.

    Units stay inside their group of channels, and groups may be exchanged whole. Where the groups share an axis of
    the weight (its input axis, or the output axis of a transposed convolution), units move in all of them alike.
    """
    groups = op.arguments["groups"]
    inward, outward = planes(flow, weight, *((0, 1) if transposed else (1, 0)))
    if inward is None or outward is None:
        return freeze(flow, op.out, [x, weight, bias], " with such a weight")
    x = flow.as_value(x)
    spatial = len(weight.shape) - 2
    before = channel_units(flow, x, spatial)
    channels = op.out[-spatial - 1]
    after = outward.repeat(channels // len(outward))
    if groups == len(before) > 1 and not flow.is_fixed(before):  # depth-wise: a channel goes through
        through = before.repeat_interleave(len(after) // groups)
        if len(outward) == len(after):
            flow.join(outward, through)
        else:  # transposed: the weight's own channels are those that go in
            flow.join(inward, before)
            flow.freeze(outward)
        after = through
    elif groups > 1:
        blocks = flow.blocks(before.view(groups, -1), (1,))
        if transposed:
            flow.join(before, inward)
            after = flow.units.fresh(channels)
            flow.relate(after.view(groups, -1), outward, "twin")
            flow.produce(weight.base, after)
        else:
            flow.relate(before.view(groups, -1), inward, "twin")
            flow.produce(weight.base, inward)
        flow.relate(after.view(groups, -1), blocks, "within")
    else:
        flow.join(before, inward)
    for kernel in planes(flow, weight, *range(2, 2 + spatial)):
        flow.freeze(weight if kernel is None else kernel)
    flow.produce(weight.base, outward)
    return spread(flow, op.out, after, bias, spatial)


@rule("embedding")
def _embedding(flow: Flow, op: Operation, weight: Any, tokens: Any, *_: Any) -> Value:
    rows, columns = planes(flow, weight, 0, 1)
    if rows is None or columns is None:
        return freeze(flow, op.out, [weight, tokens], " with such a weight")
    flow.freeze(rows)
    if isinstance(tokens, Value):
        flow.freeze(tokens)
    flow.produce(weight.base, columns)
    return spread(flow, op.out, columns)


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def _bag(flow: Flow, op: Operation, weight: Any, indices: Any, offsets: Any, *_: Any) -> Any:
    """Sums, means or maxima of rows; per_sample_weights weigh whole rows."""
    rows, columns = planes(flow, weight, 0, 1)
    if rows is None or columns is None:
        return freeze_operator(flow, op, op.values)
    flow.freeze(rows)
    for x in (indices, offsets, op.arguments["per_sample_weights"]):
        if isinstance(x, Value):
            flow.freeze(x)
    flow.produce(weight.base, columns)
    return first_of(flow, op.out, spread(flow, op.out[0], columns))


# ---- recurrent layers

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(flow: Flow, op: Operation, x: Any, hidden: Any, weights: Any, *_: Any) -> Any:
    """x [..., I]; each layer and direction has [G H, I], [G H, H] and biases [G H], gate after gate. The units of
    a state are the same at every time; those of a cell are those of its output."""
    arguments = op.arguments
    packed = "batch_sizes" in arguments
    if packed:
        x, hidden, weights = arguments["data"], arguments["hx"], arguments["params"]
    states = list(hidden) if isinstance(hidden, list | tuple) else [hidden]
    layers, directions = arguments["num_layers"], 1 + arguments["bidirectional"]
    each = 4 if arguments["has_biases"] else 2
    if len(weights) != layers * directions * each:  # such as projections
        return freeze_operator(flow, op, [x, *states, *weights])
    initial_units = [_state_units(flow, s) for s in states]  # [layers, B, H]
    ends: list[Tensor] = []
    for layer in range(layers):
        made = []
        for direction in range(directions):
            k = layer * directions + direction
            initial = [units[k] for units in initial_units]
            units = _cell(flow, GATES[op.name], x, weights[each * k : each * (k + 1)], initial)
            if units is None:
                return freeze_operator(flow, op, [x, *states, *weights])
            made.append(units)
        ends += made
        channels = torch.cat(made)
        x = Value(channels.expand((*x.shape[:-1], len(channels))), (*x.shape[:-1], len(channels)))
    last = [torch.stack([u.expand(size[-2:]) for u in ends]) for size in op.out[1:]]
    return [x, *map(flow.new, last)]


def _state_units(flow: Flow, state: Any) -> Tensor:
    """int32 [layers, B, H]: the units of one layer are the same for all samples; those of one parameter for several
    layers are the same for all layers."""
    units = flow.plane(state, 2) if is_sheet(state) else None
    if units is not None:
        return units.expand(state.shape)
    labels = flow.labels(flow.as_value(state))
    flow.join(labels, labels[:, :1])
    return labels


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def _recurrent_cell(flow: Flow, op: Operation, x: Any, hidden: Any, *weights: Any) -> Any:
    """One step of the above: x [B, I], states [B, H]."""
    present = [w for w in weights if w is not None]
    states = list(hidden) if isinstance(hidden, list | tuple) else [hidden]
    states = [flow.as_value(s) for s in states]
    gates = GATES[op.name.removesuffix("_cell")]
    units = _cell(flow, gates, x, present, [flow.labels(s) for s in states])
    if units is None:
        return freeze_operator(flow, op, [x, *states, *present])
    return each_size(lambda size: Value(units.expand(size), tuple(size)), op.out)


def _cell(flow: Flow, gates: int, x: Any, weights: Sequence[Any], initial: Sequence[Tensor]) -> Tensor | None:
    """int32 [H]: the units of one layer in one direction; None where the weights are no leaves."""
    size = weights[1].shape[1] if isinstance(weights[1], Value) else 0
    outward, inward = planes(flow, weights[0], 0, 1)
    again, units = planes(flow, weights[1], 0, 1)
    if outward is None or inward is None or again is None or units is None:
        return None
    labels = flow.labels(flow.as_value(x))
    flow.join(labels, inward)
    for rows in (outward, again):
        flow.join(rows.view(gates, size), units)
    for bias in weights[2:]:
        flow.join(flow.labels(bias).view(gates, size), units)
    for state in initial:
        flow.join(state, units)
    flow.produce(weights[0].base, units)
    return units


# ---- one activation with another


@rule("matmul", "mm", "bmm")
def _matmul(flow: Flow, op: Operation, a: Any, b: Any, *_: Any) -> Value:
    return multiply(flow, op.out, a, b)


@rule("mv")
def _mv(flow: Flow, op: Operation, matrix: Any, x: Any) -> Value:
    return contract(flow, op.out, x, matrix)


@rule("dot", "vdot")
def _dot(flow: Flow, op: Operation, a: Any, b: Any) -> Any:
    """Units with units: the sum over all of them does not move."""
    if not (isinstance(a, Value) and isinstance(b, Value)):
        return NotImplemented
    flow.join(flow.labels(a), flow.labels(b))
    return flow.fixed_value(op.out)


@rule("bilinear")
def _bilinear(flow: Flow, op: Operation, a: Any, b: Any, weight: Any, bias: Any) -> Any:
    batch = string.ascii_letters[: len(op.out) - 1]
    made = contract_factors(flow, op.out, [batch + "X", batch + "Y", "ZXY"], [a, b, weight], batch + "Z")
    if made is None:
        return NotImplemented
    return made if bias is None else join_operands(flow, op.out, [made, bias])


@rule("tensordot")
def _tensordot(flow: Flow, op: Operation, a: Any, b: Any, dims_a: Sequence[int], dims_b: Sequence[int], *_: Any) -> Any:
    names = [list(string.ascii_lowercase[: len(a.shape)]), list(string.ascii_uppercase[: len(b.shape)])]
    for i, j in zip(dims_a, dims_b, strict=True):
        names[1][j] = names[0][i]
    kept = [[i for i in name if i not in other] for name, other in (names, names[::-1])]
    made = contract_factors(flow, op.out, ["".join(n) for n in names], [a, b], "".join(kept[0] + kept[1]))
    return NotImplemented if made is None else made


@rule("outer", "ger")
def _outer(flow: Flow, op: Operation, a: Any, b: Any) -> Any:
    made = contract_factors(flow, op.out, ["a", "b"], [a, b], "ab")
    return NotImplemented if made is None else made


@rule("cdist", "_cdist_forward")
def _cdist(flow: Flow, op: Operation, a: Any, b: Any, *_: Any) -> Any:
    """Of every row of one to every row of the other, the sum over columns in any order."""
    made = _multiply_factors(flow, op.out, a, b.rearrange(_flip) if isinstance(b, Value) else _flip(b))
    return NotImplemented if made is None else made


@rule("baddbmm")
def _baddbmm(flow: Flow, op: Operation, bias: Any, a: Any, b: Any, *_: Any) -> Value:
    return join_operands(flow, op.out, [multiply(flow, op.out, a, b), bias])


def multiply(flow: Flow, out: torch.Size, a: Any, b: Any) -> Value:
    """a [..., N, K] and b [..., K, M] give [..., N, M], of which one may be a weight, and one a constant."""
    if min(len(a.shape), len(b.shape)) < 2:
        made = _multiply_vector(flow, out, a, b)
        return freeze(flow, out, [a, b]) if made is None else made
    many = _is_many(a) or _is_many(b) or (is_sheet(a) and is_sheet(b))
    if many and (made := _multiply_factors(flow, out, a, b)) is not None:
        return made
    a, b = (flow.fixed_value(x.shape) if isinstance(x, Tensor) else x for x in (a, b))
    if _is_weight(b):
        return contract(flow, out, a, b, dims=(len(b.shape) - 2, len(b.shape) - 1))
    if _is_weight(a) and isinstance(b, Value) and len(b.shape) > 1:
        flipped = torch.Size((*out[:-2], out[-1], out[-2]))
        dims = (len(a.shape) - 1, len(a.shape) - 2)
        return contract(flow, flipped, b.rearrange(_flip), a, dims=dims).rearrange(_flip)
    if not (isinstance(a, Value) and isinstance(b, Value)):
        return freeze(flow, out, [a, b])
    left, right = flow.labels(a), flow.labels(b)
    batch = left.shape[:-2]
    if batch != right.shape[:-2]:
        return freeze(flow, out, [a, b])
    if _is_one_block(flow, left) and (left.shape[-2:] == (1, 1) or is_uniform(flow, right, -2)):
        return _mix_places(flow, out, _give_copies_own_units(flow, b, right, -1), by=left, dim=-2)
    if _is_one_block(flow, right) and is_uniform(flow, left, -1):
        return _mix_places(flow, out, _give_copies_own_units(flow, a, left, -2), by=right, dim=-1)
    uniform = is_uniform(flow, left, -1) or is_uniform(flow, right, -2)
    if uniform and (made := _multiply_factors(flow, out, a, b)) is not None:
        return made
    # Units are contracted with units: those of one side are those of the other, and stay inside their matrix.
    left, right = _give_copies_own_units(flow, a, left, -1), _give_copies_own_units(flow, b, right, -2)
    flow.join(left, right.transpose(-2, -1).narrow(-2, 0, 1))
    flow.join(right, left.transpose(-2, -1).narrow(-1, 0, 1))
    blocks = flow.blocks(left[..., :1, :], (-2, -1))
    flow.relate(left, blocks.expand(*batch, left.shape[-2], 1), "within")
    flow.relate(right, blocks.expand(*batch, 1, right.shape[-1]), "within")
    return Value(blocks.expand(out), tuple(out))


def _is_many(x: Any) -> bool:
    """Whether it has units along several dimensions, and is no weight: a stack of weights, or computed."""
    return is_sheet(x) and (x.base.computed or not _is_weight(x))


def _multiply_factors(flow: Flow, out: torch.Size, a: Any, b: Any) -> Value | None:
    """A matrix product by factors; the batch dimensions of both are those at the end of the result's."""
    letters = string.ascii_letters[: len(out) - 2]
    terms = [letters[len(letters) - (len(x.shape) - 2) :] + end for x, end in ((a, "YZ"), (b, "ZX"))]
    return contract_factors(flow, out, terms, [a, b], letters + "YX")


def _multiply_vector(flow: Flow, out: torch.Size, a: Any, b: Any) -> Value | None:
    """A matrix product with one dimension on one side at least."""
    letters = string.ascii_letters
    if len(a.shape) > 1:
        terms = [letters[: len(a.shape) - 1] + "Z", "Z"]
    elif len(b.shape) == 1:
        terms = ["Z", "Z"]
    else:
        terms = ["Z", letters[: len(b.shape) - 2] + "ZX"]
    result = "".join(i for i in dict.fromkeys("".join(terms)) if i != "Z")
    return contract_factors(flow, out, terms, [a, b], result)


def _give_copies_own_units(flow: Flow, x: Value, labels: Tensor, dim: int) -> Tensor:
    """Labels of matrices x [..., N, M] with units along ``dim``: where some matrices are copies (the keys of several
    query heads), each gets units of its own, whose twins the copied ones are."""
    if x.positions is None or bool((x.positions < 0).any()) or not _are_copies(x.positions):
        return labels
    batch, one = labels.shape[:-2], {-1: (1, labels.shape[-1]), -2: (labels.shape[-2], 1)}[dim]
    own = flow.units.fresh(*batch, *one)
    flow.relate(own.expand(labels.shape), flow.base(x), "twin", x.positions)
    around, which = torch.unique(flow.units.roots(flow.blocks(labels, (-2, -1))), return_inverse=True)
    flow.relate(labels, around, "within", which.int().expand(labels.shape))
    flow.relate(flow.blocks(own, (-2, -1)), around, "within", which.int())
    return own.expand(labels.shape)


def _are_copies(positions: Tensor) -> bool:
    """Whether two matrices show the same."""
    return is_repeating(positions[..., 0, 0].flatten())


def _is_weight(x: Any) -> bool:
    """Whether it is a matrix of a parameter, perhaps the same for a whole batch."""
    if not (isinstance(x, Value) and isinstance(x.base, Leaf)) or len(x.shape) < 2:
        return False
    return len(x.shape) == 2 or (x.positions is not None and math.prod(unexpand(x.positions).shape[:-2]) == 1)


def _flip(matrix: Tensor) -> Tensor:
    return matrix.transpose(-2, -1)


def _is_one_block(flow: Flow, matrices: Tensor) -> bool:
    """Whether each matrix has one unit at all of its places, or none that moves: attention's weights in a head."""
    roots = flow.units.roots(unexpand(matrices))
    return bool((roots == roots[..., :1, :1]).all())


def _mix_places(flow: Flow, out: torch.Size, labels: Tensor, by: Tensor, dim: int) -> Value:
    """Weights that move as whole matrices mix the places of each unit, matrix by matrix: the units pass."""
    if flow.is_fixed(by):
        flow.tie(labels, places((*labels.shape[:-2], 1, 1)))
    else:
        flow.relate(labels, by[..., :1, :1], "within")
    return Value(labels.narrow(dim, 0, 1).expand(out), tuple(out))


@rule("scaled_dot_product_attention")
def _attention(flow: Flow, op: Operation, q: Any, k: Any, v: Any, mask: Any = None, *_: Any) -> Value:
    if not all(isinstance(x, Value) for x in (q, k, v)):
        return freeze(flow, op.out, [q, k, v, mask])
    if op.arguments.get("enable_gqa"):  # a head of keys and values serves its share of those of queries
        k, v = (x.rearrange(lambda t: t.repeat_interleave(q.shape[-3] // t.shape[-3], -3)) for x in (k, v))
    batch = torch.broadcast_shapes(*(x.shape[:-2] for x in (q, k, v)))
    if any(x.shape[:-2] != batch for x in (q, k, v)):
        q, k, v = (x.rearrange(lambda t: t.expand(*batch, *t.shape[-2:])) for x in (q, k, v))
    size = torch.Size((*q.shape[:-1], k.shape[-2]))
    scores = multiply(flow, size, q, k.rearrange(_flip))
    if mask is not None:
        scores = join_operands(flow, size, [scores, mask])
    return multiply(flow, op.out, scores, v)


@rule("einsum")
def _einsum(flow: Flow, op: Operation, equation: str, operands: Sequence[Any], *_: Any) -> Value:
    """Two operands: each is brought to [batch, rows, contracted], and it is a matrix product."""
    names, result = _spell_out(equation, [len(x.shape) for x in operands])
    by_factors = any(map(_is_many, operands)) or not _is_matrix_product(names, result)
    if by_factors and (made := contract_factors(flow, op.out, names, operands, result)) is not None:
        return made
    operands = [flow.fixed_value(x.shape) if isinstance(x, Tensor) else x for x in operands]
    if not _is_matrix_product(names, result) or not all(isinstance(x, Value) for x in operands):
        return freeze(flow, op.out, operands)
    a, b = names
    length = {i: n for name, x in zip(names, operands, strict=True) for i, n in zip(name, x.shape, strict=True)}
    batch = [i for i in a if i in b and i in result]
    summed = [i for i in a if i in b and i not in result]
    rows, columns = [i for i in a if i not in b], [i for i in b if i not in a]

    def matrix(x: Value, name: str, *parts: list[str]) -> Value:
        shape = [length[i] for i in batch] + [math.prod(length[i] for i in part) for part in parts]
        order = [name.index(i) for part in (batch, *parts) for i in part]
        return x.rearrange(lambda t: t.permute(order).reshape(shape))

    left, right = matrix(operands[0], a, rows, summed), matrix(operands[1], b, summed, columns)
    product = multiply(flow, torch.Size((*left.shape[:-1], right.shape[-1])), left, right)
    product_order = [*batch, *rows, *columns]
    lengths, axes = [length[i] for i in product_order], [product_order.index(i) for i in result]
    return product.rearrange(lambda t: t.reshape(lengths).permute(axes))


def _spell_out(equation: str, ndims: Sequence[int]) -> tuple[list[str], str]:
    """The terms and the result of an equation, "..." written as capital letters, a missing result as it is meant."""
    terms, arrow, result = equation.replace(" ", "").partition("->")
    if any(letter.isupper() for letter in terms):
        return terms.split(","), result
    names = []
    longest = ""
    for term, ndim in zip(terms.split(","), ndims, strict=True):
        hidden = ndim - len(term.replace("...", ""))
        letters = string.ascii_uppercase[26 - hidden :] if hidden else ""
        longest = max(longest, letters, key=len)
        names.append(term.replace("...", letters))
    if not arrow:
        letters = "".join(names)
        result = "..." + "".join(sorted(i for i in letters if i.islower() and letters.count(i) == 1))
    return names, result.replace("...", longest)


def _is_matrix_product(names: Sequence[str], result: str) -> bool:
    """Two terms; every index once in a term, and either in the result or in both terms."""
    if len(names) != 2 or not result or "." in "".join((*names, result)):
        return False
    letters = "".join(names)
    return (
        all(term.count(i) == 1 for term in (*names, result) for i in term)
        and all(i in letters for i in result)
        and all(i in result or letters.count(i) == 2 for i in letters)
    )
