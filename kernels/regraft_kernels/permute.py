"""pi(theta): gather or scatter of every layer of a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from regraft_kernels.backend import resolve
from regraft_kernels.packing import Packing, Tensors


def permute_reference(
    tensors: Tensors, indices: Mapping[str, Tensor], packing: Packing, *, inverse: bool = False
) -> dict[str, Tensor]:
    """The definition of `permute`: one index_select per permuted axis."""
    moved = {}
    for name, tensor in tensors.items():
        lead = tensor.ndim - len(packing.shapes[name])
        moved[name] = tensor.clone()
        for axis, slot in enumerate(packing.axes[name]):
            if slot is not None:
                index = indices[slot].argsort() if inverse else indices[slot]
                moved[name] = moved[name].index_select(axis + lead, index)
    return moved


def permute(
    tensors: Tensors,
    indices: Mapping[str, Tensor],
    packing: Packing,
    *,
    inverse: bool = False,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Gather (or scatter, where `inverse`) every axis of every tensor: out[i, j, ...] = x[p[i], q[j], ...].

    `tensors` is name -> [*shape], or [B, *shape] for all; `indices` slot -> int64 [length] on the same
    device. Any dtype. Returns new tensors, exact to the bit; nothing that was given is changed.

    Raises ValueError for names, shapes or devices that do not fit `packing`, and for index vectors that are
    missing or no permutations.
    """
    packing.check(tensors)
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    resolve(backend, device)
    packing.vectors(indices, list(tensors), device, inverse=inverse)
    return permute_reference(tensors, indices, packing, inverse=inverse)
