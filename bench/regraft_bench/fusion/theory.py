"""Appendix B.2: how much of what sequential training does, and assignment does not, its Hessian term explains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.core.clock import Clock
from regraft.core.forward import call
from regraft.core.guard import mode
from regraft.core.tensors import Pair, Tensors, complete
from regraft.training.gradients import gradients
from regraft_bench.fusion.setting import TRAIN, FusionSetting
from regraft_bench.study import Measured, Method, Series, Task

HESSIAN_VALUES = ("difference", "predicted", "relative_error", "cosine")


def compare_with_hessian(
    model: nn.Module,
    start: Tensors,
    first: Sequence[Pair],
    second: Sequence[Pair],
    rate: float,
    *,
    steps: int = 1,
) -> dict[str, float]:
    """Train task B (`second`) and then task A (`first`) from `start`, and compare with assigning A's gradient.

    Both by full-batch gradient descent, `steps` steps at `rate`. With theta_B = start - sum of B's steps,
    theta_BA is A's training from theta_B, theta'_BA = theta_B + (A's training from start - start). To first
    order they differ by (steps * rate)^2 H_A g_B at `start`, here by a Hessian-vector product (appendix
    B.2 has the term with the sign that it has in the gradient).

    Returns:
        "difference": norm of theta_BA - theta'_BA; "predicted": norm of the term; "relative_error": norm of their
        difference over the norm of the first; "cosine": between the two.
    """
    names = [name for name, _ in model.named_parameters()]

    def descend(begin: Tensors, batches: Sequence[Pair]) -> Tensors:
        values = dict(begin)
        for _ in range(steps):
            slope = gradients(model, values, batches)
            values.update({name: values[name] - rate * slope[name] for name in names})
        return values

    def flat(tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].flatten() for name in names])

    theta_b = descend(start, second)
    sequential = flat(descend(theta_b, first))
    assigned = flat(theta_b) + flat(descend(start, first)) - flat(start)
    difference = sequential - assigned
    g_b = gradients(model, start, second)
    predicted = (steps * rate) ** 2 * flat(hessian_vector_product(model, start, first, g_b))
    return {
        "difference": float(difference.norm()),
        "predicted": float(predicted.norm()),
        "relative_error": float((difference - predicted).norm() / difference.norm()),
        "cosine": float(difference @ predicted / (difference.norm() * predicted.norm())),
    }


def hessian_vector_product(
    model: nn.Module, tensors: Tensors, batches: Iterable[Pair], vector: Mapping[str, Tensor]
) -> Tensors:
    """H v: the Hessian of the mean loss over `batches` at `tensors`, times `vector`, by parameter name.

    One forward-over-reverse pass a batch; in training mode, as :func:`regraft.training.gradients.gradients` is.
    Raises ValueError for no batches.
    """
    values = complete(model, tensors)
    names = [name for name, _ in model.named_parameters()]
    parameters = {name: values[name].detach() for name in names}
    along = {name: vector[name] for name in names}

    def gradient_of(images: Tensor, labels: Tensor) -> Callable[[Tensors], Tensors]:
        buffers = {name: value.clone() for name, value in values.items() if name not in parameters}
        return torch.func.grad(lambda p: F.cross_entropy(call(model, {**p, **buffers}, images), labels))

    total, count = {name: torch.zeros_like(along[name]) for name in names}, 0
    with mode(model, lambda module: not isinstance(module, nn.modules.dropout._DropoutNd)):
        for images, labels in batches:
            product = torch.func.jvp(gradient_of(images, labels), (parameters,), (along,))[1]
            for name in names:
                total[name] += product[name]
            count += 1
    if count == 0:
        raise ValueError("there is no batch to take a Hessian on")
    return {name: value / count for name, value in total.items()}


def measure_hessian_term(setting: FusionSetting) -> Measured:
    """theta_BA - theta'_BA beside its Hessian term (appendix B.2), in float64.

    ReLU and max-pooling have kinks, where the gradient jumps: the Hessian does not see them, and the term explains the
    difference only at rates so small that no unit of any image crosses one.
    """
    settings = setting.settings
    double = {name: tensor.double() for name, tensor in setting.start().items()}

    def full_batch(task: Task) -> list[Pair]:
        split = setting.dataset(replace(task, per_class=settings.images)).train
        images, labels = next(iter(split.batches(len(split), device=setting.device)))
        return [(images.double(), labels)]

    a, b = map(full_batch, setting.tasks)
    clock = Clock()
    with clock.phase(TRAIN, setting.device):
        table = [
            [compare_with_hessian(setting.model, double, a, b, rate, steps=steps) for rate in settings.rates]
            for steps in settings.steps
        ]
    axes, at = ("steps", "rate"), (settings.steps, settings.rates)
    series = {
        name: Series(axes, at, tuple(tuple(values[name] for values in line) for line in table))
        for name in HESSIAN_VALUES
    }
    return Measured({}, series, clock.seconds)


THEORY_METHODS = (Method("Hessian term", measure_hessian_term),)
