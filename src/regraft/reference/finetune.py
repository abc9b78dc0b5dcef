"""Fine-tuning as the FAST paper writes it (Varno et al., algorithms 1 and 2), line by line.

A feature extractor ``A = phi(X; theta)``, a classifier ``Z = A W^T`` without bias, logistic softmax, the mean
negative log-likelihood. The gradients are those of equations 4, 8 and 12: no loss is differentiated. Only the
Jacobian dA / dtheta of a feature extractor that may be anything is left to autograd.

X: [M, ...]; A: [M, D]; W: [N, D]; Y, Y_hat, Delta: [M, N], Y one-hot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Features = Callable[[Tensors, Tensor], Tensor]
Momentum = Callable[[Tensor, Tensor, float], Tensor]


def softmax(z: Tensor) -> Tensor:
    """Equation 1."""
    e = torch.exp(z)
    return e / (e @ torch.ones(z.shape[-1], z.shape[-1], dtype=z.dtype))


def error(w: Tensor, a: Tensor, y: Tensor) -> Tensor:
    """Delta = Y - Y_hat."""
    return y - softmax(a @ w.T)


def loss(w: Tensor, a: Tensor, y: Tensor) -> Tensor:
    """Equation 2, averaged over the batch."""
    return -(y * torch.log(softmax(a @ w.T))).sum(1).mean()


def feature_gradient(delta: Tensor, w: Tensor) -> Tensor:
    """Equation 4: dl / da = -delta W of each example, [M, D]."""
    return -delta @ w


def velocity_w(alpha: float, delta: Tensor, a: Tensor) -> Tensor:
    """Equation 8: V_W = alpha / M Delta^T A."""
    return alpha / len(a) * delta.T @ a


def velocity_theta(
    beta: float, delta: Tensor, w: Tensor, phi: Features, theta: Tensors, x: Tensor
) -> Tensors:
    """Equation 12: V_theta = beta / M (Delta W)^T dA / dtheta."""
    live = {name: value.detach().requires_grad_() for name, value in theta.items()}
    a = phi(live, x)
    products = torch.autograd.grad(a, list(live.values()), grad_outputs=delta @ w)
    return {name: beta / len(x) * product for name, product in zip(live, products, strict=True)}


def paper_momentum(v: Tensor, step: Tensor, m: float) -> Tensor:
    """V <- M V + (1 - M) step, as in the algorithms."""
    return m * v + (1 - m) * step


def torch_momentum(v: Tensor, step: Tensor, m: float) -> Tensor:
    """V <- M V + step, as torch.optim.SGD does."""
    return m * v + step


def fine_tune(
    phi: Features,
    theta: Tensors,
    w: Tensor,
    batches: Iterable[tuple[Tensor, Tensor]],
    alpha: float,
    beta: float,
    m: float,
    momentum: Momentum = paper_momentum,
) -> tuple[Tensors, Tensor]:
    """The loop that both algorithms share; returns (theta, W).

    (The listing of algorithm 1 repeats V_W where theta's momentum is computed; it is V_theta.)
    """
    v_w = torch.zeros_like(w)
    v_theta = {name: torch.zeros_like(value) for name, value in theta.items()}
    for x, y in batches:
        a = phi(theta, x).detach()
        delta = error(w, a, y)
        step_w = velocity_w(alpha, delta, a)
        step_theta = velocity_theta(beta, delta, w, phi, theta, x)
        v_w = momentum(v_w, step_w, m)
        v_theta = {name: momentum(v_theta[name], step_theta[name], m) for name in theta}
        w = w + v_w
        theta = {name: theta[name] + v_theta[name] for name in theta}
    return theta, w


def traditional(
    phi: Features,
    theta: Tensors,
    w: Tensor,
    batches: Iterable[tuple[Tensor, Tensor]],
    rate: float,
    m: float,
    momentum: Momentum = paper_momentum,
) -> tuple[Tensors, Tensor]:
    """Algorithm 1: a random W, handed in, and alpha = beta."""
    return fine_tune(phi, theta, w, batches, rate, rate, m, momentum)


def fast(
    phi: Features,
    theta: Tensors,
    classes: int,
    width: int,
    batches: Iterable[tuple[Tensor, Tensor]],
    alpha: float,
    beta: float,
    m: float,
    momentum: Momentum = paper_momentum,
) -> tuple[Tensors, Tensor]:
    """Algorithm 2: W = 0, and two rates."""
    w = torch.zeros(classes, width, dtype=next(iter(theta.values())).dtype)
    return fine_tune(phi, theta, w, batches, alpha, beta, m, momentum)
