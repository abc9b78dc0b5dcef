"""Operators that act along one dimension: a unit passes where it has whole lines of that dimension.

One rule for all of them: along the dimension every line must be a single unit (time, when the units are channels).
What an operator does to the line it does to the line of any unit, if what else it takes (an index) is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from regraft.symmetry.labels import Flow, Value, places, varying
from regraft.symmetry.pointwise import join_operands, reduce
from regraft.symmetry.rules import Operation, each_size, is_size, rule
from regraft.symmetry.sheets import is_sheet, pass_factors
from regraft.symmetry.units import first


def pass_lines(flow: Flow, op: Operation, x: Any, dims: int | Sequence[int] | None) -> Any:
    """Every result has the units of x, dimensions ``dims`` are of any length or gone; NotImplemented where some line
    holds several units."""
    if is_sheet(x) and dims is not None:
        along = [dims] if isinstance(dims, int) else dims
        passed = [pass_factors(flow, size, x, along) for size in tree_leaves(op.out, is_leaf=is_size)]
        if all(p is not None for p in passed):
            return passed[0] if is_size(op.out) else passed
    lines = line_units(flow, x, dims)
    if lines is None:
        return NotImplemented
    gone = [d % lines.ndim for d in ([dims] if isinstance(dims, int) else dims or ())]

    def spread_lines(size: torch.Size) -> Value:
        kept = lines if len(size) == lines.ndim else lines.squeeze(gone)
        return flow.new(kept.expand(size))

    return each_size(spread_lines, op.out)


def line_units(flow: Flow, x: Any, dims: int | Sequence[int] | None) -> Tensor | None:
    """int32, of length 1 along ``dims``: the units of the lines; None where some line holds several."""
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(x, Value) or not x.shape or dims is None:
        return None
    labels = flow.labels(x)
    once = labels
    for d in dims:
        if not flow.passes(x, d):
            return None
        once = once.narrow(d, 0, 1)
    flow.tie(labels, places(once.shape).expand(labels.shape), once)
    return once


@rule(
    "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "kthvalue", "median", "nanmedian", "mode", "diff",
    "fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft", "fft_fft2", "fft_ifft2", "fft_rfft2",
    "fft_irfft2", "fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn", "_fft_c2c", "_fft_r2c", "_fft_c2r",
    "fft_fftshift",
)  # fmt: skip
def _along(flow: Flow, op: Operation, x: Any, *_: Any) -> Any:
    if not isinstance(x, Value) or len(op.values) > 1 or any(isinstance(t, Tensor) for t in op.leaves):
        return NotImplemented
    if flow.is_fixed(flow.labels(x)):
        return each_size(flow.fixed_value, op.out)
    return pass_lines(flow, op, x, op.arguments.get("dim"))


@rule("gather", "take_along_dim")
def _gather(flow: Flow, op: Operation, x: Any, *_: Any) -> Any:
    """Each unit reads its own line, at places that must be the same for all, or move with it."""
    index, dim = op.arguments.get("index", op.arguments.get("indices")), op.arguments["dim"]
    if not isinstance(x, Value) or not isinstance(index, Value | Tensor) or dim is None:
        return NotImplemented
    if not _is_alike(x.shape, index.shape, dim):
        return NotImplemented
    lines = line_units(flow, x, dim)
    return NotImplemented if lines is None else join_operands(flow, op.out, [flow.new(lines.expand(op.out)), index])


@rule("scatter", "scatter_add", "scatter_reduce")
def _scatter(flow: Flow, op: Operation, x: Any, dim: int, index: Any, *_: Any) -> Any:
    source = op.arguments.get("src")
    if not isinstance(source, Value) or source.shape != tuple(index.shape) or not _is_alike(x.shape, index.shape, dim):
        return NotImplemented
    lines = line_units(flow, join_operands(flow, index.shape, [source, index]), dim)
    return _write_lines(flow, op, x, dim, lines)


@rule("index_add", "index_copy", "index_reduce")
def _index_add(flow: Flow, op: Operation, x: Any, dim: int, index: Any, source: Any, *_: Any) -> Any:
    if not isinstance(source, Value) or not _is_the_same_for_all(flow, index):
        return NotImplemented
    return _write_lines(flow, op, x, dim, line_units(flow, source, dim))


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def _index_put(flow: Flow, op: Operation, x: Any, indices: Sequence[Any], values: Any, *_: Any) -> Any:
    """Whole lines of every unit are written, to places that are the same for all."""
    covered, behind = indexed_dims(flow, indices)
    if (
        not covered
        or not are_adjacent(covered)
        or not all(_is_the_same_for_all(flow, i) for i in indices if i is not None)
    ):
        return NotImplemented
    if isinstance(x, Value) and line_units(flow, x, covered) is None:
        return NotImplemented
    if isinstance(values, Value) and values.shape:
        after = len(op.out) - max(covered) - 1
        written = range(max(len(values.shape) - after - behind, 0), len(values.shape) - after)
        if written and line_units(flow, values, written) is None:
            return NotImplemented
        lengths = list(values.shape)
        lengths[max(len(lengths) - after - behind, 0) : len(lengths) - after] = [1] * min(len(covered), len(op.out))
        values = values.rearrange(lambda p: first(p, written).reshape(lengths).expand(op.out))
    elif isinstance(values, Tensor) and bool((values != values.reshape(-1)[:1]).any()):
        return NotImplemented
    written_to = [x] if isinstance(values, Tensor) else [values, x]
    result = join_operands(flow, op.out, written_to)
    if flow.is_fixed(flow.labels(result)):
        return flow.fixed_value(op.out)
    return result if all(flow.passes(result, d) for d in covered) else NotImplemented


def indexed_dims(flow: Flow, indices: Sequence[Any]) -> tuple[list[int], int]:
    """The dimensions that indices look up, and how many stand for them. A mask covers as many as it has."""
    nodes = flow.node.args[1] if flow.node is not None else indices
    covered: list[int] = []
    behind, dim = 0, 0
    for index, node in zip(indices, nodes, strict=True):  # type: ignore[arg-type]
        mask = index is not None and (index if isinstance(index, Tensor) else node.meta["val"]).dtype is torch.bool
        length = len(index.shape) if mask else 1
        if index is not None:
            covered += range(dim, dim + length)
            behind = max(behind, 1 if mask else len(index.shape))
        dim += length
    return covered, behind


def are_adjacent(dims: Sequence[int]) -> bool:
    """Whether they follow one another; looked-up dimensions that do not are put first."""
    return list(dims) == list(range(dims[0], dims[-1] + 1))


@rule("masked_scatter")
def _masked_scatter(flow: Flow, op: Operation, x: Any, mask: Any, source: Any) -> Any:
    """Rows of the last dimension are written, one after the other, where a mask that is the same for all units says."""
    whole_rows = (
        isinstance(mask, Value) and mask.positions is not None and -1 % len(mask.shape) not in varying(mask.positions)
    )
    if not whole_rows or not flow.is_fixed(flow.labels(mask)) or source.shape[-1] != op.out[-1]:
        return NotImplemented
    rows = [line_units(flow, t, range(len(t.shape) - 1)) for t in (x, source)]
    if any(r is None for r in rows):
        return NotImplemented
    return join_operands(flow, op.out, [flow.new(r.reshape(-1).expand(op.out)) for r in rows if r is not None])


def _write_lines(flow: Flow, op: Operation, x: Any, dim: int, lines: Tensor | None) -> Any:
    """Into x, whose lines have the same units then."""
    if lines is None or (isinstance(x, Value) and line_units(flow, x, dim) is None):
        return NotImplemented
    result = join_operands(flow, op.out, [flow.new(lines.expand(op.out)), x])
    return result if flow.passes(result, dim) else NotImplemented


@rule("index_select")
def _index_select(flow: Flow, op: Operation, x: Any, dim: int, index: Any) -> Any:
    if not isinstance(index, Value):  # a constant: see views
        return op.run([x, dim, index]) if isinstance(x, Tensor) else x.map_positions(lambda p: op.run([p, dim, index]))
    return pass_lines(flow, op, x, dim) if _is_the_same_for_all(flow, index) else NotImplemented


def _is_the_same_for_all(flow: Flow, index: Any) -> bool:
    return isinstance(index, Tensor) or flow.is_fixed(flow.labels(index))


def _is_alike(shape: Sequence[int], other: Sequence[int], dim: int) -> bool:
    """Whether two shapes differ in one dimension only."""
    return len(shape) == len(other) and all(
        n == m for d, (n, m) in enumerate(zip(shape, other, strict=True)) if d != dim % len(shape)
    )


@rule("cosine_similarity")
def _cosine(flow: Flow, op: Operation, a: Any, b: Any, dim: int, *_: Any) -> Any:
    shape = torch.broadcast_shapes(a.shape, b.shape)
    return reduce(flow, op.out, join_operands(flow, shape, [a, b]), [dim])


@rule("glu")
def _glu(flow: Flow, op: Operation, x: Value, dim: int) -> Value:
    """One half, each scalar weighed by that of the other half in its place."""
    return join_operands(flow, op.out, x.map_positions(lambda p: list(p.chunk(2, dim))))


@rule("view_as_complex")
def _view_as_complex(flow: Flow, op: Operation, x: Value) -> Any:
    """The two parts of a number are one unit."""
    if is_sheet(x) and (passed := pass_factors(flow, op.out, x, [-1], held=True)) is not None:
        return passed
    labels = flow.labels(x)
    flow.join(labels, labels[..., :1])
    return pass_lines(flow, op, flow.new(labels), -1)


@rule("view_as_real")
def _view_as_real(flow: Flow, op: Operation, x: Value) -> Value:
    labels = flow.labels(x)
    parts = labels.unsqueeze(-1).expand(op.out)
    flow.tie(parts, places(labels.shape).unsqueeze(-1).expand(op.out), labels)
    return flow.new(parts)
