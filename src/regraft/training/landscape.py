"""Loss and accuracy on the line between two networks, and on the plane through three."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.core.arguments import MANY, Between, Count, Finite, check_arguments
from regraft.core.tensors import Batch, Loss, Tensors, complete, sum_networks
from regraft.training.evaluation import loss_and_accuracy
from regraft.training.statistics import reset_batchnorm


@dataclass(frozen=True)
class Line:
    """Loss and accuracy at points (1 - p) a + p b; all float64 [P]."""

    points: Tensor
    loss: Tensor
    accuracy: Tensor

    @property
    def barrier(self) -> float:
        """The largest rise of the loss above the straight line between the losses of the ends; at least 0.

        (Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", with the line of
        Entezari et al. in place of the mean.) The ends are the first and the last point.
        """
        share = (self.points - self.points[0]) / (self.points[-1] - self.points[0])
        straight = (1 - share) * self.loss[0] + share * self.loss[-1]
        return float((self.loss - straight).max())


@check_arguments
def interpolate(
    model: nn.Module,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    batches: Iterable[Batch],
    points: Annotated[int, Between(2, MANY)] | Sequence[float] = 11,
    *,
    statistics: Iterable[Batch] | None = None,
    loss: Loss = F.cross_entropy,
) -> Line:
    """The landscape along the line from a to b, at ``points`` evenly spaced places or at those given.

    ``statistics``: batches from which BatchNorm statistics are estimated anew at every place; without
    them, buffers are interpolated as the parameters are.
    """
    if isinstance(points, int):
        points = torch.linspace(0, 1, points, dtype=torch.float64).tolist()
    a, b = complete(model, a), complete(model, b)
    measure = partial(_measure_sum, model, batches, statistics, loss, [a, b])
    losses, accuracies = torch.tensor([measure([1 - p, p]) for p in points], dtype=torch.float64).T
    return Line(torch.tensor(points, dtype=torch.float64), losses, accuracies)


@dataclass(frozen=True)
class Plane:
    """Loss and accuracy on a grid of the plane through three sets of parameters.

    x: float64 [X], y: float64 [Y], in units of Euclidean distance; loss, accuracy: float64 [Y, X];
    corners: float64 [3, 2], where the three lie.
    """

    x: Tensor
    y: Tensor
    loss: Tensor
    accuracy: Tensor
    corners: Tensor


@check_arguments
def plane(
    model: nn.Module,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    c: Mapping[str, Tensor],
    batches: Iterable[Batch],
    points: Count = 11,
    *,
    margin: Finite = 0.2,
    statistics: Iterable[Batch] | None = None,
    loss: Loss = F.cross_entropy,
) -> Plane:
    """The landscape on the plane through a, b and c (Garipov et al., "Loss Surfaces, Mode Connectivity").

    The origin is a, the first axis points to b, the second is the part of c - a that is orthogonal to
    the first. The grid of points x points covers the three with a ``margin`` (a share of the extent) on
    each side. ``statistics`` as in `interpolate`. Raises ValueError where the three lie on one line.
    """
    a, b, c = complete(model, a), complete(model, b), complete(model, c)
    parameters = [name for name, _ in model.named_parameters()]

    def difference(end: Tensors) -> Tensor:
        return torch.cat([(end[name].double() - a[name].double()).flatten() for name in parameters])

    u, v = difference(b), difference(c)
    uu, uv, vv = float(u @ u), float(u @ v), float(v @ v)
    height_squared = vv - uv * uv / uu if uu else 0.0
    if height_squared <= 1e-12 * vv:
        raise ValueError("the three sets of parameters lie on one line: they span no plane")
    width, foot, height = uu**0.5, uv / uu**0.5, height_squared**0.5
    corners = torch.tensor([[0.0, 0.0], [width, 0.0], [foot, height]], dtype=torch.float64)
    low, high = corners.min(0).values, corners.max(0).values
    low, high = low - margin * (high - low), high + margin * (high - low)
    x, y = (torch.linspace(float(l), float(h), points, dtype=torch.float64) for l, h in zip(low, high, strict=True))
    measure = partial(_measure_sum, model, batches, statistics, loss, [a, b, c])
    values = []
    for ordinate in y.tolist():
        for abscissa in x.tolist():
            along_c = ordinate / height
            along_b = (abscissa - along_c * foot) / width
            values.append(measure([1 - along_b - along_c, along_b, along_c]))
    losses, accuracies = torch.tensor(values, dtype=torch.float64).T.reshape(2, points, points)
    return Plane(x, y, losses, accuracies, corners)


def _measure_sum(
    model: nn.Module,
    batches: Iterable[Batch],
    statistics: Iterable[Batch] | None,
    loss: Loss,
    sources: Sequence[Tensors],
    weights: Sequence[float],
) -> tuple[float, float]:
    """Loss and accuracy of a weighted sum of networks."""
    tensors = {name: sum_networks(sources, weights, name) for name in sources[0]}
    if statistics is not None:
        tensors = reset_batchnorm(model, tensors, statistics)
    return loss_and_accuracy(model, tensors, batches, loss)
