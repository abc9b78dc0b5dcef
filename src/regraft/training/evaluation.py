"""Evaluate a set of parameters: accuracy and loss.

A network is a module (the function) and a dictionary of tensors (its values). Every function here takes
both, runs the module on copies of those values (`torch.func.functional_call`), and leaves module, values, random
states and torch's settings as they were (`regraft.core.guard`). While one runs, the module must not be used by another
thread.

Batches are any iterable of what `regraft.core.forward` knows ((images, labels), dictionaries, ...), on the
device of the tensors. Inputs that are not finite and labels that the model has no output for raise ValueError with
the number of the batch (from 0).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.core.arguments import check_arguments
from regraft.core.forward import call, loss_of, name_inputs, split
from regraft.core.guard import evaluating
from regraft.core.labels import rows_that_count
from regraft.core.tensors import Batch, Inputs, Loss, check_finite, copies


class NotFinite(FloatingPointError, ValueError):
    """A result that is not finite: a ValueError, as it comes from the given values; a run that ends so diverged."""


def check_batches(batches: Iterable[Batch], first: int = 0) -> Iterator[tuple[Inputs, Tensor]]:
    """(inputs, labels) of each batch. Raises ValueError, with the batch's number (from ``first``), for inputs that are
    not finite, for images and labels that differ in number or are none, and as `regraft.core.forward.split`."""
    for number, batch in enumerate(batches, first):
        inputs, labels = split(batch, number)
        images = len(labels)
        if isinstance(inputs, Tensor):
            images = len(inputs) if inputs.ndim else 0
        if images != len(labels) or images == 0:
            raise ValueError(f"batch {number} has {images} images and {len(labels)} labels")
        check_finite(name_inputs(inputs), f"batch {number}")
        yield inputs, labels


@check_arguments
def loss_and_accuracy(
    model: nn.Module, tensors: Mapping[str, Tensor], batches: Iterable[Batch], loss: Loss = F.cross_entropy
) -> tuple[float, float]:
    """Mean loss and share of right answers (0 to 1) over all images of ``batches``, in evaluation mode.

    ``loss(logits, labels)`` gives the mean over a batch. Logits that are not finite are wrong answers;
    the loss is then not finite either. Raises ValueError where there is no batch.
    """
    return _evaluate(model, [tensors], batches, loss)


@check_arguments
def accuracy(model: nn.Module, tensors: Mapping[str, Tensor], batches: Iterable[Batch]) -> float:
    """Share of right answers (0 to 1) over all images of ``batches``, in evaluation mode.

    Logits that are not finite are wrong answers. Raises ValueError where there is no batch.
    """
    return ensemble_accuracy(model, [tensors], batches)


@check_arguments
def ensemble_accuracy(model: nn.Module, networks: Sequence[Mapping[str, Tensor]], batches: Iterable[Batch]) -> float:
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
    count, number = 0, -1
    right: int | Tensor = 0  # on the device
    total: float | Tensor = 0.0
    with torch.inference_mode(), evaluating(model):
        for number, (inputs, labels) in enumerate(check_batches(batches)):
            where = f"batch {number}"
            each = [call(model, tensors, inputs, where) for tensors in values]
            logits = each[0] if len(each) == 1 else torch.stack(each).mean(0)
            rows, wanted = rows_that_count(logits, labels, where)
            if len(wanted) == 0:
                continue
            count += len(wanted)
            right = right + ((rows.argmax(-1) == wanted) & rows.isfinite().all(-1)).sum()
            if loss is not None:
                total = total + loss_of(loss, logits, labels, where).double() * len(wanted)
    if count == 0 and number >= 0:
        raise ValueError(f"no label of the {number + 1} batches counts: there is nothing to evaluate on")
    if count == 0:
        raise ValueError("there is no batch to evaluate on")
    return float(total) / count, int(right) / count
