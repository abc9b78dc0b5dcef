"""The n x n similarity of one permutation group, summed over steps and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft_kernels.backend import resolve

PRECISIONS = ("ieee", "tf32x3", "tf32")


@dataclass(frozen=True)
class Term:
    """One (tensor, axis) of a group: what it adds to the group's similarity.

    `target`, `source`: [T, *shape] on one device and of one floating dtype, any strides. `axis`: 0-based in
    shape. `positions`: int64 [n, multiplicity], the positions on that axis at which unit u stands, or None
    for "position u, once". `gathers`: for each axis of shape the int64 index vector that is applied to the
    *source* before it is unfolded, or None; an empty tuple is None for every axis.
    """

    target: Tensor
    source: Tensor
    axis: int
    positions: Tensor | None = None
    gathers: tuple[Tensor | None, ...] = ()

    @property
    def units(self) -> int:
        """n, the number of units of the group."""
        return self.target.shape[self.axis + 1] if self.positions is None else self.positions.shape[0]


def similarity_reference(terms: Sequence[Term]) -> Tensor:
    """The definition of `similarity`: gather, unfold to [units, everything else], multiply, add."""
    n = terms[0].units
    total = torch.zeros((n, n), dtype=_accumulator(terms[0].target), device=terms[0].target.device)
    for term in terms:
        source = term.source
        for axis, index in enumerate(term.gathers):
            if index is not None:
                source = source.index_select(axis + 1, index)
        total += _unfold(term.target, term) @ _unfold(source, term).T
    return total


def _unfold(stack: Tensor, term: Term) -> Tensor:
    """[T, *shape] as [n, multiplicity * T * everything else]."""
    by_position = stack.movedim(term.axis + 1, 0).to(_accumulator(stack))
    if term.positions is not None:
        by_position = by_position[term.positions]
    return by_position.reshape(term.units, -1)


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def similarity(terms: Sequence[Term], *, precision: str = "tf32x3", backend: str = "auto") -> Tensor:
    """S[i, j] = sum over terms and steps of <target unit i, source unit j>, as [n, n].

    Accumulates in float32, and returns it; in float64 where the tensors are float64. `precision` is that of
    float32 products on a GPU: "ieee", "tf32x3" (three tf32 products: nearly float32) or "tf32"; elsewhere
    they are exact float32. Deterministic.

    Raises ValueError for no terms, for terms of different n, dtype or device, and for shapes, axes, positions
    or index vectors that do not fit.
    """
    return similarity_many([terms], precision=precision, backend=backend)[0]


def similarity_many(
    groups: Sequence[Sequence[Term]], *, precision: str = "tf32x3", backend: str = "auto"
) -> list[Tensor]:
    """`similarity` of several groups (of one colour, or of several pairs of models): one launch on a GPU."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    for terms in groups:
        _check(terms)
        resolve(backend, terms[0].target.device)
    return [similarity_reference(terms) for terms in groups]


def similarity_update_(S: Tensor, term: Term, axis_changed: int, old: Tensor, new: Tensor) -> Tensor:
    """Bring S up to date, in place, after the gather of one axis of a term changed from `old` to `new`.

    `axis_changed` (0-based in shape, not the term's own axis); `old` and `new` int64 [length]. The rank-m
    correction reads only the m entries of that axis at which they differ; `term.gathers` serves the other
    axes. Returns S.
    """
    changed = (old != new).nonzero().squeeze(1)
    gathers = list(term.gathers) or [None] * (term.target.ndim - 1)
    gathers[axis_changed] = None
    dim = axis_changed + 1
    difference = term.source.index_select(dim, new[changed]) - term.source.index_select(dim, old[changed])
    part = Term(term.target.index_select(dim, changed), difference, term.axis, term.positions, tuple(gathers))
    return S.add_(similarity_reference([part]))


def _check(terms: Sequence[Term]) -> None:
    if not terms:
        raise ValueError("similarity needs at least one term")
    first = terms[0]
    for number, term in enumerate(terms):
        where = f"term {number}"
        if term.target.shape != term.source.shape:
            raise ValueError(
                f"{where}: target has shape {tuple(term.target.shape)}, source {tuple(term.source.shape)}"
            )
        for tensor in (term.target, term.source):
            if not tensor.is_floating_point():
                raise ValueError(f"{where}: tensors must be floating, not {tensor.dtype}")
            if tensor.dtype != first.target.dtype or tensor.device != first.target.device:
                raise ValueError(
                    f"{where}: {tensor.dtype} on {tensor.device}, "
                    f"but term 0 is {first.target.dtype} on {first.target.device}"
                )
        dims = term.target.ndim - 1
        if not 0 <= term.axis < dims:
            raise ValueError(f"{where}: axis {term.axis} of a tensor with {dims} axes")
        if term.positions is not None and term.positions.ndim != 2:
            raise ValueError(f"{where}: positions must be [n, multiplicity]")
        if term.gathers and len(term.gathers) != dims:
            raise ValueError(f"{where}: {len(term.gathers)} gathers for {dims} axes")
        if term.units != first.units:
            raise ValueError(f"{where}: {term.units} units, but term 0 has {first.units}")
