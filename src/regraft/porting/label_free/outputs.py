"""What networks answer to unlabelled inputs.

An unlabelled batch is what a model is called with (`regraft.core.tensors.Inputs`): one tensor, a tuple of positional
arguments, or a mapping of keyword arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from regraft.core.arguments import check_arguments
from regraft.core.forward import call, name_inputs
from regraft.core.guard import evaluating
from regraft.core.tensors import Inputs, check_finite, copies
from regraft.training.evaluation import NotFinite


@check_arguments
def predict(model: nn.Module, tensors: Mapping[str, Tensor], batches: Iterable[Inputs]) -> list[Tensor]:
    """The logits of each unlabelled batch, in evaluation mode: [B, C] or [B, ..., C], detached.

    Raises ValueError for no batch or inputs that are not finite, `NotFinite` for logits that are not, each with the
    number of the batch (from 0).
    """
    values, answers = copies(model, tensors), []
    with torch.no_grad(), evaluating(model):
        for number, inputs in enumerate(batches):
            check_finite(name_inputs(inputs), f"batch {number}")
            answers.append(finite_logits(call(model, values, inputs, f"batch {number}"), number))
    if not answers:
        raise ValueError("there is no batch of inputs")
    return answers


def finite_logits(logits: Tensor, number: int) -> Tensor:
    """The logits. Raises `NotFinite` where one is not finite."""
    if not bool(logits.isfinite().all()):
        raise NotFinite(f"the logits of batch {number} are not finite: the network is not sound on these inputs")
    return logits
