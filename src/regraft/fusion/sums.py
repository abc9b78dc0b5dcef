"""Gradient assignment and model fusion: sums of networks.

With g = theta_A - theta_0 ("Rethinking the Dependence Between Gradients and the Initial Point in Deep
Learning", equations 5 to 7): :func:`assign_gradient` is theta_n + alpha g, :func:`fuse` any weighted sum:
theta_n + alpha theta_A, alpha theta_A + beta theta_B, theta_0 + alpha g_1 + beta g_2, of any number of models.

What to do about the activations of a sum, BatchNorm's statistics first of all, is in `regraft.fusion.repair`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regraft.core.arguments import check_arguments
from regraft.core.tensors import Tensors, check_alike, check_finite
from regraft.fusion.repair import Finish
from regraft_kernels import combine


@check_arguments
def fuse(models: Sequence[Tensors], coefficients: Sequence[float], *, finish: Finish | None = None) -> Tensors:
    """sum_i coefficients[i] * models[i]; integer and boolean tensors are the first model's.

    Args:
        models: m >= 1 dictionaries name -> tensor with the same names, shapes, dtypes and devices.
        coefficients: m finite numbers.
        finish: repairs the activations afterwards, e.g. :func:`regraft.fusion.repair.reset_on`.

    Returns:
        A new dictionary; nothing is shared with what was given.

    Raises:
        ValueError: no models; a model that differs, naming the first tensor that does; coefficients of another
            number than the models or not finite; a sum with a value that is not finite, naming its tensor.
    """
    row = torch.as_tensor([float(c) for c in coefficients], dtype=torch.float64)
    fused = {name: tensor[0] for name, tensor in fuse_many(models, row[None]).items()}
    check_finite(fused, "the sum")
    return fused if finish is None else finish(fused, row)


@torch.no_grad()
@check_arguments
def fuse_many(models: Sequence[Tensors], coefficients: Tensor | Sequence[Sequence[float]]) -> Tensors:
    """K sums at once: coefficients [K, m] -> tensors [K, *shape]; sums may overflow.

    Raises as :func:`fuse` does for models and coefficients.
    """
    rows = torch.as_tensor(coefficients, dtype=torch.float64)
    check(models, rows)
    return combine(models, rows)


@check_arguments
def gradient(start: Tensors, end: Tensors) -> Tensors:
    """The cumulative gradient g = end - start (equation 5), of parameters and BatchNorm statistics alike."""
    return fuse([end, start], [1.0, -1.0])


@check_arguments
def assign_gradient(target: Tensors, gradient: Tensors, alpha: float, *, finish: Finish | None = None) -> Tensors:
    """theta_n + alpha g (equation 6); g is made by :func:`gradient`. Raises as :func:`fuse` does."""
    return fuse([target, gradient], [1.0, alpha], finish=finish)


def check(models: Sequence[Tensors], coefficients: Tensor) -> None:
    """Raise ValueError unless coefficients [K, m] are finite and fit m models that match tensor by tensor."""
    if not models:
        raise ValueError("there is no model to fuse")
    if coefficients.dim() != 2 or coefficients.shape[1] != len(models):
        raise ValueError(
            f"{len(models)} models need rows of {len(models)} coefficients, got shape {tuple(coefficients.shape)}"
        )
    if not bool(coefficients.isfinite().all()):
        row, column = (~coefficients.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"coefficient {column} of row {row} is {float(coefficients[row, column])}")
    largest = float(coefficients.abs().max()) if coefficients.numel() else 0.0
    if largest > torch.finfo(torch.float32).max and any(t.dtype != torch.float64 for t in models[0].values()):
        raise ValueError(f"coefficient {largest:g} is beyond float32, and so is the sum")
    for number, model in enumerate(models[1:], start=1):
        check_alike(models[0], model, "model 0", f"model {number}")
