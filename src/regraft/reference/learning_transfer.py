"""Learning transfer, line by line (Chijiwa, Transferring Learning Trajectories of Neural Networks, Algorithms 1 and 2).

The batches are handed in, so that the fast path can be given the same ones: `batches[s][t]` for GMT, `batches[s]`
for FGMT, each a list of mini-batches over which a gradient is averaged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from regraft.core.tensors import Pair, Perm, Tensors
from regraft.reference.matching import coordinate_descent, permute_tensors
from regraft.symmetry import PermutationSpec

Minibatches = Sequence[Pair]


def mean_gradient(model: nn.Module, theta: Tensors, batches: Minibatches) -> Tensors:
    """g = 1/b sum_i grad L(f(x_i; theta), y_i), in training mode, averaged over `batches`."""
    model.train()
    parameters = {name: theta[name].detach().clone().requires_grad_() for name, _ in model.named_parameters()}
    buffers = {name: theta[name].clone() for name, _ in model.named_buffers() if name in theta}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for images, labels in batches:
        logits = torch.func.functional_call(model, {**parameters, **buffers}, (images,))
        loss = nn.functional.cross_entropy(logits, labels)
        for name, g in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            total[name] = total[name] + g / len(batches)
    return total


def rebuild(spec: PermutationSpec, path: Sequence[Tensors], target_start: Tensors, perm: Perm, s: int) -> list[Tensors]:
    """theta_2^t = theta_2^(t-1) + pi (theta_1^t - theta_1^(t-1)) for t = 1 .. s, theta_2^0 first."""
    transferred = [target_start]
    for t in range(1, s + 1):
        step = {name: path[t][name] - path[t - 1][name] for name in target_start}
        moved = permute_tensors(spec, perm, step)
        transferred.append({name: transferred[-1][name] + moved[name] for name in target_start})
    return transferred


def algorithm_1(
    model: nn.Module,
    spec: PermutationSpec,
    path: Sequence[Tensors],
    target_start: Tensors,
    batches: Sequence[Sequence[Minibatches]],
    order: Sequence[str],
) -> tuple[list[Tensors], list[Perm]]:
    """Algorithm 1. `batches[s - 1][t - 1]` is the sample of lines 3 to 5; each matching but the
    first starts from the last pi.

    Returns the transferred path theta_2^0 .. theta_2^T and pi_1 .. pi_T.
    """
    transferred, perms = [target_start], [spec.identity()]
    for s in range(1, len(path)):
        g1, g2 = [], []
        for t in range(1, s + 1):
            g1.append(mean_gradient(model, path[t - 1], batches[s - 1][t - 1]))
            g2.append(mean_gradient(model, transferred[t - 1], batches[s - 1][t - 1]))
        perms.append(coordinate_descent(spec, g2, g1, order, start=perms[-1] if s > 1 else None)[0])
        transferred = rebuild(spec, path, target_start, perms[-1], s)
    return transferred, perms[1:]


def algorithm_2(
    model: nn.Module,
    spec: PermutationSpec,
    path: Sequence[Tensors],
    target_start: Tensors,
    batches: Sequence[Minibatches],
    order: Sequence[str],
) -> tuple[list[Tensors], list[Perm]]:
    """Algorithm 2: only the newest pair of gradients is computed, the earlier ones are kept."""
    transferred, perms = [target_start], [spec.identity()]
    g1: list[Tensors] = []
    g2: list[Tensors] = []
    for s in range(1, len(path)):
        g1.append(mean_gradient(model, path[s - 1], batches[s - 1]))
        g2.append(mean_gradient(model, transferred[s - 1], batches[s - 1]))
        perms.append(coordinate_descent(spec, g2, g1, order, start=perms[-1] if s > 1 else None)[0])
        transferred = rebuild(spec, path, target_start, perms[-1], s)
    return transferred, perms[1:]
