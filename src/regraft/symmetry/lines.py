"""Operators that act along one dimension: a unit passes where it has whole lines of that dimension.

One rule for all of them: along the dimension every line must be a single unit (time, when the units are channels).
What an operator does to the line it does to the line of any unit, if what else it takes (an index) is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regraft.symmetry.labels import Flow, Value, places
from regraft.symmetry.pointwise import join_operands, reduce
from regraft.symmetry.rules import Operation, each_size, rule


def pass_lines(flow: Flow, op: Operation, x: Any, dims: int | Sequence[int] | None) -> Any:
    """Every result has the units of x, dimensions ``dims`` are of any length or gone; NotImplemented where some line
    holds several units."""
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
    labels = flow.labels(x)
    flow.join(labels, labels[..., :1])
    return pass_lines(flow, op, flow.new(labels), -1)


@rule("view_as_real")
def _view_as_real(flow: Flow, op: Operation, x: Value) -> Value:
    labels = flow.labels(x)
    parts = labels.unsqueeze(-1).expand(op.out)
    flow.tie(parts, places(labels.shape).unsqueeze(-1).expand(op.out), labels)
    return flow.new(parts)
