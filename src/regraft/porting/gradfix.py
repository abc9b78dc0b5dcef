"""GradFix: add to a network what another one learned, where the first network's own descent agrees.

``theta_B + alpha m tau`` with ``m = [tau g < 0]`` entry by entry (Rinaldi et al., Gradient-Sign Masking for Task Vector
Transport Across Pre-Trained Models, arXiv 2510.09658): tau is what a fine-tuning changed, and g says in which
direction the loss of the new base rises, on a few labelled images of the task. Every entry that is kept has a
negative product with g, so that the sum descends to first order. Nothing is trained.

g is :func:`majority` of few images, or :func:`regraft.training.gradients.gradients`, the mean, of many. What
has been permuted before (by :func:`regraft.match` or :func:`regraft.transfer`) is masked afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.core.arguments import Finite, check_arguments
from regraft.core.forward import portion
from regraft.core.guard import evaluating
from regraft.core.tensors import Batch, Loss, Tensors, check_finite, copies
from regraft.training.evaluation import check_batches
from regraft.training.gradients import batch_gradient, check_gradients

Direction = Callable[[nn.Module, Mapping[str, Tensor], Iterable[Batch], Loss], Tensors]
"""(model, theta, batches, loss) -> for each parameter where the loss rises; only signs count."""


@check_arguments
def majority(
    model: nn.Module, theta: Mapping[str, Tensor], batches: Iterable[Batch], loss: Loss = F.cross_entropy
) -> Tensors:
    """The sum of the signs of each image's own gradient, for each parameter: the vote of the majority of images.

    In evaluation mode, since a batch of one image has no statistics: BatchNorm uses theta's running ones. Batches may
    have any size and form (`regraft.core.forward`); every image is one vote. A parameter that the loss does
    not depend on has votes 0.

    Raises ValueError for no batch, images that are not finite, or labels that the model has no output for (the batch
    is named), `NotFinite` for a gradient that is not finite, naming its tensor.
    """
    values = copies(model, theta)
    parameters = {name: values[name].requires_grad_() for name, _ in model.named_parameters()}
    votes = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    images_seen = 0
    with evaluating(model):
        for number, (inputs, labels) in enumerate(check_batches(batches)):
            for i, label in enumerate(labels.split(1)):
                image = (portion(inputs, i, i + 1), label)
                gradient = batch_gradient(model, values, parameters, image, loss, number)
                check_gradients(list(parameters), gradient)  # the sign of NaN would be 0
                torch._foreach_add_(list(votes.values()), [g.sign() for g in gradient])
                images_seen += 1
    if images_seen == 0:
        raise ValueError("there is no image to take a gradient on")
    return {name: vote.contiguous() for name, vote in votes.items()}


@check_arguments
def mask(task_vector: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> Tensors:
    """``m tau``: the entries whose product with the direction is negative, and 0 elsewhere (so where it is 0).

    Args:
        task_vector: tau, name -> tensor of any shape.
        direction: g, alike; only signs count. May have more names.

    Raises ValueError for a tensor that `direction` lacks, has in another shape, or that is not finite in either.
    """
    for name, tau in task_vector.items():
        if name not in direction:
            raise ValueError(f"there is no direction for tensor {name!r} of the task vector")
        if tau.shape != direction[name].shape:
            raise ValueError(
                f"tensor {name!r}: shape {tuple(tau.shape)} in the task vector, {tuple(direction[name].shape)} "
                "in the direction"
            )
        check_finite({name: tau}, "the task vector")
        check_finite({name: direction[name]}, "the direction")
    # Signs, not values: a product of two small numbers underflows to 0.
    return {
        name: torch.where(tau.sign() * direction[name].sign() < 0, tau, torch.zeros_like(tau))
        for name, tau in task_vector.items()
    }


@check_arguments
def transport(
    model: nn.Module,
    new_base: Mapping[str, Tensor],
    task_vector: Mapping[str, Tensor],
    batches: Iterable[Batch],
    *,
    alpha: Finite = 1.0,
    direction: Direction = majority,
    loss: Loss = F.cross_entropy,
) -> Tensors:
    """``theta_B + alpha m tau``: the task vector on the new base, where the new base's descent agrees.

    Args:
        model: any classifier; its own values are neither used nor changed.
        new_base: theta_B, all parameters (and buffers) of the model, with a head for the task: with a head of zeros
            the gradients of all other layers are 0, and nothing is kept.
        task_vector: tau, of parameters alone: those it lacks stay as they are in theta_B, as all buffers do
            (estimate BatchNorm statistics anew afterwards, :func:`regraft.training.statistics.reset_batchnorm`).
        batches: a few labelled images of the task.
        alpha: a scale.
        direction: :func:`majority`, or :func:`regraft.training.gradients.gradients` where images are many.
        loss: of (logits, labels), mean over the batch.

    Returns:
        A new dictionary with the names of `new_base`.

    Raises:
        ValueError: a tensor of the task vector that is no parameter of the model, or of another shape; a value that is
            not finite; and whatever the direction raises.
    """
    parameters = dict(model.named_parameters())
    for name in task_vector:
        if name not in parameters:
            raise ValueError(f"tensor {name!r} of the task vector is no parameter of the model")
    check_finite(dict(new_base), "the new base")
    kept = mask(task_vector, direction(model, new_base, batches, loss))
    return {name: value + alpha * kept[name] if name in kept else value.clone() for name, value in new_base.items()}
