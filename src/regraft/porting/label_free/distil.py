"""A new base trained to answer as the fine-tune does."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.core.arguments import Count, NotNegative, check_arguments
from regraft.core.forward import arguments, logits_of
from regraft.core.guard import mode, same_streams
from regraft.core.tensors import Inputs, Tensors, complete, device_of, fill_, state
from regraft.porting.label_free.outputs import predict
from regraft.training.loop import Diverged


@check_arguments
def distil(
    model: nn.Module,
    tuned: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    batches: Iterable[Inputs],
    *,
    steps: Count = 100,
    lr: NotNegative = 1e-3,
    new_model: nn.Module | None = None,
) -> Tensors:
    """``start`` trained for ``steps`` updates on the fine-tune's predictions (Hinton et al., 2015, temperature 1).

    Adam, one batch an update, over and over; the rate falls linearly to 0. Dropout is off; BatchNorm normalises
    with each batch's own statistics, and its running ones follow.

    Args:
        model: the fine-tune's network.
        tuned: its parameters and buffers.
        start: those of the new base, with a head of the fine-tune's classes: zeros, or better of `fit_head`.
        batches: unlabelled inputs, held in memory with the fine-tune's logits.
        new_model: the new base's network, where it is another one.

    Raises ValueError as `predict`, and for a head of another number of classes; `Diverged` for a loss that is not
    finite.
    """
    own = model if new_model is None else new_model
    batches = list(batches)
    targets = [logits.softmax(-1) for logits in predict(model, tuned, batches)]
    network = copy.deepcopy(own)
    fill_(network, complete(own, start))
    network.requires_grad_(True)
    optimiser = torch.optim.Adam(network.parameters(), lr=lr, fused=True)
    stream = cycle(zip(batches, targets, strict=True))
    dropouts = nn.modules.dropout._DropoutNd
    with same_streams(device_of(own)), mode(network, lambda module: not isinstance(module, dropouts)):
        for step in range(steps):
            inputs, wanted = next(stream)
            positional, named = arguments(inputs)
            logits = logits_of(network(*positional, **named), network)
            if logits.shape != wanted.shape:
                raise ValueError(
                    f"the new base answers {list(logits.shape)} where the fine-tune answers {list(wanted.shape)}: give "
                    "it a head of as many classes (regraft.networks.heads.adopt)"
                )
            loss = F.cross_entropy(logits.flatten(0, -2), wanted.flatten(0, -2))
            if not bool(loss.isfinite()):
                raise Diverged(step)
            optimiser.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
    return state(network)
