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

from regraft.core.tensors import Pair, Tensors

Features = Callable[[Tensors, Tensor], Tensor]
Momentum = Callable[[Tensor, Tensor], Tensor]


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


def velocity_theta(beta: float, delta_w: Tensor, phi: Features, theta: Tensors, x: Tensor) -> Tensors:
    """Equation 12: V_theta = beta / M (Delta W)^T dA / dtheta; delta_w: Delta W, [M, D]."""
    live = {name: value.detach().requires_grad_() for name, value in theta.items()}
    products = torch.autograd.grad(phi(live, x), list(live.values()), grad_outputs=delta_w)
    return {name: beta / len(x) * product for name, product in zip(live, products, strict=True)}


def paper_momentum(v: Tensor, step: Tensor, m: float = 0.9) -> Tensor:
    """V <- M V + (1 - M) step, as in the algorithms."""
    return m * v + (1 - m) * step


def torch_momentum(v: Tensor, step: Tensor, m: float = 0.9) -> Tensor:
    """V <- M V + step, as torch.optim.SGD does."""
    return m * v + step


def fine_tune_by_hand(
    phi: Features,
    theta: Tensors,
    w: Tensor,
    batches: Iterable[Pair],
    rates: tuple[float, float],
    momentum: Momentum = paper_momentum,
) -> tuple[Tensors, Tensor]:
    """The loop of both algorithms; returns (theta, W). rates: alpha, of W, and beta, of theta.

    Algorithm 1 (traditional) has a random W and alpha = beta; algorithm 2 (FAST) has W = 0 and two rates. (The listing
    of algorithm 1 repeats V_W where theta's momentum is computed; it is V_theta.)
    """
    alpha, beta = rates
    v_w = torch.zeros_like(w)
    v_theta = {name: torch.zeros_like(value) for name, value in theta.items()}
    for x, y in batches:
        a = phi(theta, x).detach()
        delta = error(w, a, y)
        step_w = velocity_w(alpha, delta, a)
        step_theta = velocity_theta(beta, delta @ w, phi, theta, x)
        v_w = momentum(v_w, step_w)
        v_theta = {name: momentum(v_theta[name], step_theta[name]) for name in theta}
        w = w + v_w
        theta = {name: theta[name] + v_theta[name] for name in theta}
    return theta, w
