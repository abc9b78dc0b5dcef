"""ReLU's other symmetry: a unit's inputs times c > 0, and what reads it times 1 / c, compute the same function.

The normal form has inputs of norm 1 for every unit. It is worth something to matching only if pairs of trained networks
differ in these scales; whether they do is measured here, with the permutation applied to the networks as they were.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regraft.core.forward import call
from regraft.core.tensors import Tensors
from regraft.symmetry import PermutationSpec

NORM_TOLERANCE = 1e-3
"""Of the outputs, relative: BatchNorm adds a constant to the variance, which is not scaled."""


@torch.no_grad()
def normalise_scales(spec: PermutationSpec, model: nn.Module, tensors: Tensors, images: Tensor) -> Tensors:
    """The same function with the inputs of every unit of norm 1, in the groups whose scale is free.

    Whether it is, is tried: the outputs on ``images`` must stay. Filters before a BatchNorm are normalised alone.
    """
    before = call(model, tensors, images)
    for family in spec.families:
        if len(family) == 1:
            for change in (_scale_before_norm, _scale_units):
                changed = change(spec, family[0], tensors)
                error = float((call(model, changed, images) - before).norm() / before.norm())
                tensors = changed if error < NORM_TOLERANCE else tensors
    return tensors


def _scale_before_norm(spec: PermutationSpec, group: str, tensors: Tensors) -> Tensors:
    """Each filter before a BatchNorm over its norm, and the running statistics with it."""
    changed = dict(tensors)
    norms = {name.removesuffix(".running_var") for name, _ in spec.tensors_of(group) if name.endswith(".running_var")}
    weights = [name for name, axis in spec.tensors_of(group) if axis == 0 and tensors[name].dim() > 1]
    for norm, weight in zip(sorted(norms), sorted(weights), strict=False) if len(norms) == len(weights) else ():
        scale = _norms([tensors[weight]])
        changed[weight] = _along(tensors[weight], 0, 1 / scale)
        changed[f"{norm}.running_mean"] = tensors[f"{norm}.running_mean"] / scale
        changed[f"{norm}.running_var"] = tensors[f"{norm}.running_var"] / scale**2
    return changed


def _scale_units(spec: PermutationSpec, group: str, tensors: Tensors) -> Tensors:
    """What makes a unit over the norm of it all: weight and bias of BatchNorms, of the layers where there is none."""
    members = [(name, axis) for name, axis in spec.tensors_of(group) if tensors[name].is_floating_point()]
    norms = {name.removesuffix(".running_var") for name, _ in members if name.endswith(".running_var")}
    if norms:
        makers = [f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias")]
    else:
        makers = [name for name, axis in members if axis == 0]
    changed = dict(tensors)
    scale = _norms([tensors[name] for name in makers])
    for name in makers:
        changed[name] = _along(tensors[name], 0, 1 / scale)
    for name, axis in members:
        if axis == 1:
            positions = spec.positions(name, axis, group)
            factor = torch.ones(tensors[name].shape[1])
            factor[positions] = scale[:, None].expand(positions.shape)
            changed[name] = _along(changed[name], 1, factor)
    return changed


def _norms(makers: Sequence[Tensor]) -> Tensor:
    """Of each unit's inputs; 1 for a dead unit."""
    norms = torch.cat([tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None] for tensor in makers], 1).norm(dim=1)
    return torch.where(norms > 0, norms, 1)


def _along(tensor: Tensor, axis: int, factor: Tensor) -> Tensor:
    return tensor * factor.reshape(-1, *[1] * (tensor.dim() - axis - 1))
