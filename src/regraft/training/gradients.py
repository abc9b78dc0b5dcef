"""Gradients as learning transfer matches them: means over batches, in training mode, on the tensors handed in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.core.arguments import check_arguments
from regraft.core.forward import call, loss_of, takes_classes
from regraft.core.guard import mode, same_streams
from regraft.core.labels import rows_that_count
from regraft.core.tensors import Batch, Inputs, Loss, Tensors, copies, device_of, use_generator
from regraft.training.evaluation import NotFinite, check_batches


@check_arguments
def gradients(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    batches: Iterable[Batch],
    loss: Loss = F.cross_entropy,
    *,
    generator: torch.Generator | None = None,
    first: int = 0,
) -> Tensors:
    """Gradients of the loss at ``tensors``, one per parameter (same shape and dtype), averaged over batches.

    Taken in training mode: BatchNorm normalises with the batch's own statistics. Running statistics stay as
    they are, in the model and in ``tensors``. A parameter that the loss does not depend on has gradient 0.

    Dropout modules are off unless a generator is given; it then decides their masks, so that equal
    generators give equal masks. Messages count the batches from ``first``.

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
            return _mean_gradients(model, (parameters, buffers), (batches, first), loss, lambda: same_streams(device))
    with same_streams(device), use_generator(generator, device), mode(model, lambda _: True):
        return _mean_gradients(model, (parameters, buffers), (batches, first), loss, nullcontext)


def _mean_gradients(
    model: nn.Module,
    values: tuple[Tensors, Tensors],
    numbered: tuple[Iterable[Batch], int],
    loss: Loss,
    around: Callable[[], AbstractContextManager[None]],
) -> Tensors:
    """values: parameters and buffers. numbered: batches, and the number of the first.

    around: context of each forward pass; the batches draw their random numbers outside of it.
    """
    (parameters, buffers), (batches, first) = values, numbered
    total: list[Tensor] | tuple[Tensor, ...] | None = None
    count = 0
    for count, batch in enumerate(check_batches(batches, first), 1):
        with around():
            gradient = batch_gradient(model, {**parameters, **buffers}, parameters, batch, loss, first + count - 1)
        total = list(gradient) if total is None else torch._foreach_add(total, gradient)
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
    where = f"batch {number}"
    logits = call(model, values, inputs, where)
    if takes_classes(loss, logits, labels):
        logits, labels = rows_that_count(logits, labels, where)
        if len(labels) == 0:
            raise ValueError(f"no label of {where} counts: there is nothing to take a gradient of")
    value = loss_of(loss, logits, labels, where)
    if not value.requires_grad:
        raise ValueError(f"{where}: the loss has no gradient, as it depends on no parameter of {type(model).__name__}")
    return torch.autograd.grad(
        value,
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
