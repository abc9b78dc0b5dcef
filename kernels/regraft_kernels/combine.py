"""sum_i c_ki theta_i, for many rows k of coefficients: the fusion grids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regraft_kernels.backend import resolve
from regraft_kernels.packing import Tensors


def combine_reference(sources: Sequence[Tensors], coefficients: Tensor) -> dict[str, Tensor]:
    """The definition of `combine`: scale and add, source by source."""
    out = {}
    for name, first in sources[0].items():
        if not first.is_floating_point():
            out[name] = first.expand(len(coefficients), *first.shape).clone()
            continue
        wide = torch.promote_types(first.dtype, torch.float32)
        total = torch.zeros((len(coefficients), *first.shape), dtype=wide, device=first.device)
        for source, column in zip(sources, coefficients.to(first.device, wide).T, strict=True):
            total += column.reshape(-1, *(1,) * first.ndim) * source[name].to(wide)
        out[name] = total.to(first.dtype)
    return out


def combine(
    sources: Sequence[Tensors], coefficients: Tensor | Sequence[Sequence[float]], *, backend: str = "auto"
) -> dict[str, Tensor]:
    """K parameter sets sum_i coefficients[k][i] * sources[i], as name -> [K, *shape].

    `sources`: m dictionaries with the same names, shapes, dtypes and devices; `coefficients` [K, m], finite.
    Arithmetic is in float32 (float64 for float64 tensors). A tensor that is not floating is copied from the
    first source, K times.

    Raises ValueError for no source, sources that differ, or coefficients of another shape or not finite.
    """
    if not sources:
        raise ValueError("combine needs at least one source")
    table = torch.as_tensor(coefficients, dtype=torch.float64)
    if table.ndim != 2 or table.shape[1] != len(sources):
        raise ValueError(f"coefficients have shape {tuple(table.shape)}, expected (K, {len(sources)})")
    if not table.isfinite().all():
        raise ValueError("coefficients must be finite")
    _check_sources(sources)
    device = next((t.device for t in sources[0].values()), torch.device("cpu"))
    resolve(backend, device)
    return combine_reference(sources, table)


def _check_sources(sources: Sequence[Tensors]) -> None:
    first = sources[0]
    for number, source in enumerate(sources[1:], start=1):
        different = sorted(set(first) ^ set(source))
        if different:
            raise ValueError(f"source {number} and source 0 differ in {', '.join(different)}")
        for name, tensor in first.items():
            for kind in ("shape", "dtype", "device"):
                mine, theirs = getattr(tensor, kind), getattr(source[name], kind)
                if mine != theirs:
                    raise ValueError(f"{name!r}: {kind} is {theirs} in source {number}, {mine} in source 0")
