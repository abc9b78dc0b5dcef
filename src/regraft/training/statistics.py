"""BatchNorm statistics, estimated anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from regraft.core.arguments import Count, check_arguments
from regraft.core.forward import run
from regraft.core.guard import mode, same_streams
from regraft.core.tensors import Batch, Tensors, complete, copies, device_of
from regraft.training.evaluation import check_batches


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The model's BatchNorm modules that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }


@check_arguments
def reset_batchnorm(
    model: nn.Module, tensors: Mapping[str, Tensor], batches: Iterable[Batch], limit: Count | None = None
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
                run(model, values, inputs, f"batch {count}")
            count += 1
    if count == 0:
        raise ValueError("there is no batch to estimate BatchNorm statistics on")
    return {**complete(model, tensors), **statistics}


def _statistics(norm: str) -> tuple[str, ...]:
    return tuple(f"{norm}.{name}" for name in ("running_mean", "running_var", "num_batches_tracked"))
