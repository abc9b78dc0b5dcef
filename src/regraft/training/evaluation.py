"""Evaluate a set of parameters: accuracy, loss, gradients, BatchNorm statistics, landscapes.

A network is a module (the function) and a dictionary of tensors (its values). Every function here takes
both, runs the module on copies of those values (`torch.func.functional_call`), and leaves module, values, random
states and torch's settings as they were (`regraft.core.guard`). While one runs, the module must not be used by another
thread.

Batches are any iterable of what `regraft.core.forward` knows ((images, labels), dictionaries, ...), on the
device of the tensors. Inputs that are not finite and labels that the model has no output for raise ValueError with
the number of the batch (from 0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from regraft.core.forward import call, loss_of, name_inputs, run, split
from regraft.core.guard import preserve_state, same_streams
from regraft.core.tensors import (
    Batch,
    Inputs,
    Loss,
    Tensors,
    check_finite,
    live_state,
    sum_networks,
    use_generator,
)
from regraft.networks.heads import check_labels


class NotFinite(FloatingPointError, ValueError):
    """A result that is not finite: a ValueError, as it comes from the given values; a run that ends so diverged."""


@contextmanager
def mode(model: nn.Module, training: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Put each submodule in training mode if ``training(submodule)``, for the body; then restore the model."""
    with preserve_state(model):
        for module in model.modules():
            module.training = training(module)
        yield


@contextmanager
def evaluating(model: nn.Module, *, heads: bool = False) -> Iterator[None]:
    """Put the model in evaluation mode for the body; then restore it and the global random states.

    ``heads``: composite modules stay in training mode, so that auxiliary heads run; layers (dropout, norms) do not.
    """

    def training(module: nn.Module) -> bool:
        return heads and any(module.children()) and not type(module).__module__.startswith("torch.nn")

    with same_streams(device_of(model)), mode(model, training):
        yield


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lies; the CPU for a model without any."""
    return next((tensor.device for tensor in live_state(model).values()), torch.device("cpu"))


def check_batches(batches: Iterable[Batch]) -> Iterator[tuple[Inputs, Tensor]]:
    """(inputs, labels) of each batch. Raises ValueError, with the batch's number (from 0), for inputs that are not
    finite, for images and labels that differ in number, and as `regraft.core.forward.split`."""
    for number, batch in enumerate(batches):
        inputs, labels = split(batch, number)
        if isinstance(inputs, Tensor) and len(inputs) != len(labels):
            raise ValueError(f"batch {number} has {len(inputs)} images and {len(labels)} labels")
        check_finite(name_inputs(inputs), f"batch {number}")
        yield inputs, labels


def complete(model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensors:
    """``tensors`` with the model's own buffers where they are absent.

    Raises ValueError naming a parameter that is missing, a name that the model does not have, or a shape
    that differs.
    """
    own = live_state(model)
    parameters = dict(model.named_parameters())
    missing = sorted(parameters.keys() - tensors.keys())
    extra = sorted(tensors.keys() - own.keys())
    if missing or extra:
        words = [f"lack {', '.join(missing[:5])}"] * bool(missing)
        words += [f"have {', '.join(extra[:5])}, which the model has not"] * bool(extra)
        raise ValueError(f"the tensors {' and '.join(words)}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, the model's is {list(own[name].shape)}")
    return {**{name: own[name] for name in own if name not in parameters}, **tensors}


def copies(model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensors:
    """Copies of `complete`: in-place changes by the model never reach the user's tensors.

    Convolution weights have the memory format in which convolutions are fastest.
    """
    layouts = {True: torch.channels_last, False: torch.contiguous_format}
    return {
        name: value.detach().clone(memory_format=layouts[value.ndim == 4])
        for name, value in complete(model, tensors).items()
    }


def loss_and_accuracy(
    model: nn.Module, tensors: Mapping[str, Tensor], batches: Iterable[Batch], loss: Loss = F.cross_entropy
) -> tuple[float, float]:
    """Mean loss and share of right answers (0 to 1) over all images of ``batches``, in evaluation mode.

    ``loss(logits, labels)`` gives the mean over a batch. Logits that are not finite are wrong answers;
    the loss is then not finite either. Raises ValueError where there is no batch.
    """
    return _evaluate(model, [tensors], batches, loss)


def accuracy(model: nn.Module, tensors: Mapping[str, Tensor], batches: Iterable[Batch]) -> float:
    """Share of right answers (0 to 1) over all images of ``batches``, in evaluation mode.

    Logits that are not finite are wrong answers. Raises ValueError where there is no batch.
    """
    return ensemble_accuracy(model, [tensors], batches)


def ensemble_accuracy(
    model: nn.Module, networks: Sequence[Mapping[str, Tensor]], batches: Iterable[Batch]
) -> float:
    """`accuracy` of the mean of the networks' logits. Raises ValueError for no networks, too."""
    if not networks:
        raise ValueError("there is no network to evaluate")
    return _evaluate(model, networks, batches)[1]


def _evaluate(
    model: nn.Module,
    networks: Sequence[Mapping[str, Tensor]],
    batches: Iterable[Batch],
    loss: Loss | None = None,
) -> tuple[float, float]:
    """(mean loss, share of right answers) of the mean of the networks' logits; loss 0 where none is given."""
    values = [copies(model, tensors) for tensors in networks]
    count = 0
    right: int | Tensor = 0  # on the device
    total: float | Tensor = 0.0
    with torch.inference_mode(), evaluating(model):
        for number, (inputs, labels) in enumerate(check_batches(batches)):
            each = [call(model, tensors, inputs) for tensors in values]
            logits = each[0] if len(each) == 1 else torch.stack(each).mean(0)
            _check_answers(logits, labels, number)
            count += labels.numel()
            right = right + ((logits.argmax(-1) == labels) & logits.isfinite().all(-1)).sum()
            if loss is not None:
                total = total + loss_of(loss, logits, labels).double() * labels.numel()
    if count == 0:
        raise ValueError("there is no batch to evaluate on")
    return float(total) / count, int(right) / count


def _check_answers(logits: Tensor, labels: Tensor, number: int) -> None:
    if labels.device != logits.device:
        raise ValueError(f"batch {number} has labels on {labels.device} for an output on {logits.device}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"batch {number} has labels {list(labels.shape)} for an output {list(logits.shape)}: "
            "accuracy wants one label for each row of logits"
        )
    check_labels(labels, logits.shape[-1], f"batch {number}")


# ---------------------------------------------------------------------------------------------------
# Gradients and BatchNorm


def gradients(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    batches: Iterable[Batch],
    loss: Loss = F.cross_entropy,
    *,
    generator: torch.Generator | None = None,
) -> Tensors:
    """Gradients of the loss at ``tensors``, one per parameter (same shape and dtype), averaged over batches.

    Taken in training mode: BatchNorm normalises with the batch's own statistics. Running statistics stay as
    they are, in the model and in ``tensors``. A parameter that the loss does not depend on has gradient 0.

    Dropout modules are off unless a generator is given; it then decides their masks, so that equal
    generators give equal masks.

    Raises ValueError where there is no batch, `NotFinite` for a gradient that is not finite, naming its tensor.
    Labels are checked for the default loss alone: another loss checks its own.
    """
    values = copies(model, tensors)
    parameters = {name: values[name].requires_grad_() for name, _ in model.named_parameters()}
    # Training mode updates buffers in place: these are copies, thrown away afterwards.
    buffers = {name: value for name, value in values.items() if name not in parameters}
    device = device_of(model)
    if generator is None:
        with mode(model, lambda module: not isinstance(module, nn.modules.dropout._DropoutNd)):
            return _mean_gradients(model, parameters, buffers, batches, loss, lambda: same_streams(device))
    with same_streams(device), use_generator(generator, device), mode(model, lambda _: True):
        return _mean_gradients(model, parameters, buffers, batches, loss, nullcontext)


def _mean_gradients(
    model: nn.Module,
    parameters: Tensors,
    buffers: Tensors,
    batches: Iterable[Batch],
    loss: Loss,
    around: Callable[[], AbstractContextManager[None]],
) -> Tensors:
    """around: context of each forward pass; the batches draw their random numbers outside of it."""
    total: list[Tensor] | tuple[Tensor, ...] | None = None
    count = 0
    for inputs, labels in check_batches(batches):
        with around():
            gradient = batch_gradient(
                model, {**parameters, **buffers}, parameters, (inputs, labels), loss, count
            )
        total = list(gradient) if total is None else torch._foreach_add(total, gradient)
        count += 1
    if total is None:
        raise ValueError("there is no batch to take a gradient on")
    if count > 1:
        total = torch._foreach_div(total, count)
    check_gradients(list(parameters), total)
    return {name: g.contiguous() for name, g in zip(parameters, total, strict=True)}


def batch_gradient(
    model: nn.Module,
    values: Tensors,
    parameters: Tensors,
    batch: tuple[Inputs, Tensor],
    loss: Loss,
    number: int = 0,
) -> tuple[Tensor, ...]:
    """Of the loss on one (checked) batch, by parameter; ``parameters`` are those of ``values`` that want one.

    Raises ValueError, naming the batch by its number, for labels that the model has no output for.
    """
    inputs, labels = batch
    logits = call(model, values, inputs)
    # Labels of the outputs' own shape are probabilities of the classes.
    if loss is F.cross_entropy and labels.shape != logits.shape:
        check_labels(labels, logits.shape[1], f"batch {number}")
    return torch.autograd.grad(
        loss_of(loss, logits, labels),
        list(parameters.values()),
        allow_unused=True,
        materialize_grads=True,
    )


def check_gradients(names: Sequence[str], gradients: Sequence[Tensor]) -> None:
    """Raises `NotFinite` for a gradient that is not finite, naming its tensor."""
    # The largest entry is not finite where any entry is not; one number per tensor goes to the host.
    largest = torch.stack([g.abs().amax() if g.numel() else g.new_zeros(()) for g in gradients])
    for name, finite in zip(names, largest.isfinite().tolist(), strict=True):
        if not finite:
            raise NotFinite(f"the gradient of {name} is not finite")


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The model's BatchNorm modules that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }


def reset_batchnorm(
    model: nn.Module, tensors: Mapping[str, Tensor], batches: Iterable[Batch], limit: int | None = None
) -> Tensors:
    """``tensors`` with BatchNorm statistics estimated anew: the plain average over the batches' own.

    Uses the first ``limit`` batches (all of them without a limit). BatchNorm is in training mode, everything
    else (dropout) in evaluation mode. The running variance is the average of unbiased variances, as torch
    keeps it. A model without BatchNorm gets its tensors back, and no batch is read.

    Raises ValueError where there is no batch.
    """
    norms = batch_norms(model)
    if not norms:
        return dict(tensors)
    if limit is not None and limit < 1:
        raise ValueError(f"at least one batch is needed, not {limit}")
    values = copies(model, tensors)
    statistics = {name: values[name] for norm in norms for name in _statistics(norm)}
    for name, value in statistics.items():
        value.fill_(1 if name.endswith("running_var") else 0)
    device, count = device_of(model), 0
    with torch.no_grad(), mode(model, lambda module: module in norms.values()):
        for module in norms.values():
            module.momentum = None  # torch's name for a cumulative average
        for inputs, _ in islice(check_batches(batches), limit):
            with same_streams(device):
                run(model, values, inputs)
            count += 1
    if count == 0:
        raise ValueError("there is no batch to estimate BatchNorm statistics on")
    return {**complete(model, tensors), **statistics}


def _statistics(norm: str) -> tuple[str, ...]:
    return tuple(f"{norm}.{name}" for name in ("running_mean", "running_var", "num_batches_tracked"))


# ---------------------------------------------------------------------------------------------------
# Loss landscapes


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


def interpolate(
    model: nn.Module,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    batches: Iterable[Batch],
    points: int | Sequence[float] = 11,
    *,
    statistics: Iterable[Batch] | None = None,
    loss: Loss = F.cross_entropy,
) -> Line:
    """The landscape along the line from a to b, at ``points`` evenly spaced places or at those given.

    ``statistics``: batches from which BatchNorm statistics are estimated anew at every place; without
    them, buffers are interpolated as the parameters are.
    """
    if isinstance(points, int):
        if points < 2:
            raise ValueError(f"a line needs two points at least, not {points}")
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


def plane(
    model: nn.Module,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    c: Mapping[str, Tensor],
    batches: Iterable[Batch],
    points: int = 11,
    *,
    margin: float = 0.2,
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
    x, y = (
        torch.linspace(float(l), float(h), points, dtype=torch.float64)
        for l, h in zip(low, high, strict=True)
    )
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
