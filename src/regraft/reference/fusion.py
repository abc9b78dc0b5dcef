"""Gradient assignment and model fusion as the paper writes them: slow, obvious, the measure of the fast path.

"Rethinking the Dependence Between Gradients and the Initial Point in Deep Learning", equations 5 to 7 and
appendix B. The fusion of BatchNorm statistics follows "REPAIR: REnormalizing Permuted Activations for
Interpolation Repair" (Jordan et al., 2022) where it goes beyond the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from regraft.core.tensors import Tensors


def cumulative_gradient(start: Tensors, end: Tensors) -> Tensors:
    """Equation 5: g = theta_A - theta_0."""
    return {name: end[name] - start[name] for name in start}


def assign_scaled_gradient(target: Tensors, gradient: Tensors, alpha: float) -> Tensors:
    """Equation 6: theta_n + alpha g."""
    return {name: target[name] + alpha * gradient[name] for name in target}


def assign_weights(target: Tensors, theta_a: Tensors, alpha: float) -> Tensors:
    """Equation 7: theta_n + alpha theta_A."""
    return {name: target[name] + alpha * theta_a[name] for name in target}


def fuse_pair(theta_a: Tensors, theta_b: Tensors, alpha: float, beta: float) -> Tensors:
    """Section 5: alpha theta_A + beta theta_B."""
    return {name: alpha * theta_a[name] + beta * theta_b[name] for name in theta_a}


def assign_two_gradients(start: Tensors, g1: Tensors, g2: Tensors, alpha: float, beta: float) -> Tensors:
    """Appendix B.3.1: theta_0 + alpha g_1 + beta g_2."""
    return {name: start[name] + alpha * g1[name] + beta * g2[name] for name in start}


def grid_logits(
    model: nn.Module, sources: Sequence[Tensors], coefficients: Sequence[Sequence[float]], images: Tensor
) -> list[Tensor]:
    """The logits [N, C] of every point of a grid: one parameter set and one pass over the images at a time."""
    logits = []
    for row in coefficients:
        point: Tensors = {
            name: cast(Tensor, sum(c * s[name] for c, s in zip(row, sources, strict=True))) for name in sources[0]
        }
        with torch.no_grad():
            logits.append(functional_call(model, point, (images,)))
    return logits


def correct_answers(logits: Tensor, labels: Tensor) -> int:
    """Images whose largest logit is the label's; an image with a logit that is not finite counts as wrong."""
    return sum(
        1
        for row, label in zip(logits, labels, strict=True)
        if bool(torch.isfinite(row).all()) and int(row.argmax()) == int(label)
    )


def repair(
    model: nn.Module,
    layers: Sequence[str],
    sources: Sequence[Tensors],
    weights: Sequence[float],
    tensors: Tensors,
    images: Tensor,
) -> Tensors:
    """REPAIR, layer by layer: each channel's mean and deviation become the weighted mean of the sources'.

    Every layer costs one pass, in which the layers before it are already mended. `layers` are in the order
    of the data flow, each with a bias.
    """
    tensors = dict(tensors)
    for layer in layers:
        goals = [channel_moments(model, source, layer, images) for source in sources]
        goal_mean = sum(w * mean for w, (mean, _) in zip(weights, goals, strict=True))
        goal_deviation = sum(w * deviation for w, (_, deviation) in zip(weights, goals, strict=True))
        mean, deviation = channel_moments(model, tensors, layer, images)
        scale = goal_deviation / deviation
        weight = tensors[f"{layer}.weight"]
        tensors[f"{layer}.weight"] = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
        tensors[f"{layer}.bias"] = (tensors[f"{layer}.bias"] - mean) * scale + goal_mean
    return tensors


def channel_moments(model: nn.Module, tensors: Tensors, layer: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [channels] of what `layer` puts out for `images`."""
    seen = []
    hook = model.get_submodule(layer).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        functional_call(model, tensors, (images,))
    hook.remove()
    flat = seen[0].transpose(0, 1).flatten(1)
    return flat.mean(1), flat.std(1, correction=0)


def sequential_steps(
    loss_a: Callable[[Tensor], Tensor],
    loss_b: Callable[[Tensor], Tensor],
    start: Tensor,
    rate_a: float,
    rate_b: float,
) -> tuple[Tensor, Tensor]:
    """Appendix B.1 with one step a task: (theta_BA, theta'_BA), trained one after the other and assigned."""
    theta_b = start - rate_b * torch.func.grad(loss_b)(start)
    trained = theta_b - rate_a * torch.func.grad(loss_a)(theta_b)
    assigned = theta_b - rate_a * torch.func.grad(loss_a)(start)
    return trained, assigned


def cancellation_term(
    loss_a: Callable[[Tensor], Tensor], loss_b: Callable[[Tensor], Tensor], start: Tensor, rate_b: float
) -> Tensor:
    """Appendix B.2: - beta_B H_A g_B at the initial point, from the whole Hessian."""
    hessian = torch.func.hessian(loss_a)(start)
    result: Tensor = -rate_b * hessian @ torch.func.grad(loss_b)(start)
    return result
