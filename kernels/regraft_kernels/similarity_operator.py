"""similarity as an operator of PyTorch: flat arguments, shapes without data, gradients, vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from regraft_kernels.operators import one_by_one
from regraft_kernels.terms import Term, accumulator, fold, operands_of, unfold

NAME = "regraft::similarity"
SCHEMA = (
    "(Tensor[] targets, Tensor[] sources, int[] axes, Tensor?[] positions, Tensor?[] gathers, int[] counts, "
    "str precision, str backend) -> Tensor[]"
)


def flatten(groups: Sequence[Sequence[Term]]) -> tuple[list, list, list, list, list, list]:
    """The terms of all groups as the operator takes them: gathers one for each axis, and how many terms a group has."""
    terms = [term for group in groups for term in group]
    gathers = [index for t in terms for index in t.gathers or (None,) * (t.target.ndim - 1)]
    return (
        [term.target for term in terms],
        [term.source for term in terms],
        [term.axis for term in terms],
        [term.positions for term in terms],
        gathers,
        [len(group) for group in groups],
    )


def unflatten(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    axes: Sequence[int],
    positions: Sequence[Tensor | None],
    gathers: Sequence[Tensor | None],
    counts: Sequence[int],
) -> list[list[Term]]:
    """The inverse of `flatten`."""
    left, terms = iter(gathers), []
    for target, source, axis, place in zip(targets, sources, axes, positions, strict=True):
        own = tuple(next(left) for _ in range(target.ndim - 1))
        terms.append(
            Term(target, source, axis, place, own if any(index is not None for index in own) else ())
        )
    following = iter(terms)
    return [[next(following) for _ in range(count)] for count in counts]


def register(similarity: Callable[..., list[Tensor]]) -> None:
    """Make `similarity` what `torch.ops.regraft.similarity` does where there are data."""
    operator = torch.library.custom_op(NAME, similarity, mutates_args=(), schema=SCHEMA)
    operator.register_fake(_fake)
    operator.register_autograd(_backward, setup_context=_setup)
    operator.register_vmap(one_by_one(operator))


def _fake(*arguments: Any) -> list[Tensor]:
    *flat, _, _ = arguments
    found = []
    for terms in unflatten(*flat):
        first = terms[0].target
        found.append(first.new_empty((terms[0].units, terms[0].units), dtype=accumulator(first)))
    return found


def _setup(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    targets, sources, ctx.axes, positions, gathers, ctx.counts, *_ = inputs
    ctx.lengths = [len(part) for part in (targets, sources, positions, gathers)]
    ctx.save_for_backward(*targets, *sources, *positions, *gathers)


def _backward(ctx: Any, gradients: list[Tensor]) -> tuple:
    """S = A B^T, so that dA = dS B and dB = dS^T A; then both go back to where they were gathered from."""
    saved = iter(ctx.saved_tensors)
    targets, sources, positions, gathers = ([next(saved) for _ in range(n)] for n in ctx.lengths)
    groups = unflatten(targets, sources, ctx.axes, positions, gathers, ctx.counts)
    to_targets: list[Tensor | None] = []
    to_sources: list[Tensor | None] = []
    wanted = zip(*ctx.needs_input_grad[:2], strict=True)
    for terms, gradient in zip(groups, gradients, strict=True):
        for term in terms:
            target, source = operands_of(term)
            left, right = next(wanted)
            to_targets.append(fold(gradient @ unfold(source, term), target, term) if left else None)
            to_sources.append(fold(gradient.T @ unfold(target, term), source, term) if right else None)
    return to_targets, to_sources, None, None, None, None, None, None
