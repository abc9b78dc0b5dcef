"""A new base trained to answer as the fine-tune does, or as labels say."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.core.arguments import Count, NotNegative, check_arguments
from regraft.core.forward import arguments, logits_of
from regraft.core.guard import mode, same_streams
from regraft.core.labels import align_labels
from regraft.core.tensors import Inputs, Tensors, complete, device_of, fill_, state
from regraft.porting.label_free.outputs import predict
from regraft.training.loop import Diverged

RATES = (3e-3, 3e-4, 3e-5)
TRIAL = 5
"""Updates with each of the rates, of which the one with the lowest loss afterwards is taken."""


@check_arguments
def distil(
    model: nn.Module,
    tuned: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    batches: Iterable[Inputs],
    *,
    steps: Count = 100,
    lr: NotNegative | None = None,
    new_model: nn.Module | None = None,
) -> Tensors:
    """``start`` trained for ``steps`` updates on the fine-tune's predictions (Hinton et al., 2015, temperature 1).

    Args:
        model: the fine-tune's network.
        tuned: its parameters and buffers.
        start: those of the new base, with a head of the fine-tune's classes: zeros, or better of `fit_head`, or of
            `match_functions`.
        batches: unlabelled inputs, held in memory with the fine-tune's logits.
        steps, lr: as `train_on_targets` takes them.
        new_model: the new base's network, where it is another one.

    Raises ValueError as `predict`, and as `train_on_targets`.
    """
    batches = list(batches)
    targets = [logits.softmax(-1) for logits in predict(model, tuned, batches)]
    own = model if new_model is None else new_model
    return train_on_targets(own, start, list(zip(batches, targets, strict=True)), steps=steps, lr=lr)


@check_arguments
def train_on_targets(
    model: nn.Module,
    start: Mapping[str, Tensor],
    batches: Sequence[tuple[Inputs, Tensor]],
    *,
    steps: Count = 100,
    lr: NotNegative | None = None,
) -> Tensors:
    """``start`` trained by cross-entropy, one batch an update, over and over.

    Adam; the rate falls linearly from ``lr`` to 0. Without it the one of `RATES` is taken whose loss on the first
    batches is lowest after `TRIAL` updates. Dropout is off; BatchNorm normalises with each batch's own statistics, and
    its running ones follow.

    batches: (inputs, classes as integers or the probabilities of all classes).

    Raises ValueError for targets of other classes, `Diverged` for a loss that is not finite.
    """
    if lr is None:
        trial = list(islice(cycle(batches), TRIAL))
        lr = min(RATES, key=lambda rate: _lowest_loss(model, start, trial, rate))
    network = _copy(model, start)
    for _ in _update(network, islice(cycle(batches), steps), [lr * (1 - step / steps) for step in range(steps)]):
        pass
    return state(network)


def _copy(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    network = copy.deepcopy(model)
    fill_(network, complete(model, values))
    return network.requires_grad_(True)


def _lowest_loss(
    model: nn.Module, start: Mapping[str, Tensor], trial: Sequence[tuple[Inputs, Tensor]], lr: float
) -> float:
    """The mean loss of the last updates of a short training at one rate; infinite where it diverges."""
    try:
        losses = list(_update(_copy(model, start), iter([*trial, *trial[:2]]), [lr] * (len(trial) + 2)))
    except Diverged:
        return float("inf")
    return sum(losses[-2:])


def _update(network: nn.Module, batches: Iterator[tuple[Inputs, Tensor]], rates: Sequence[float]) -> Iterator[float]:
    """An update of the network for each rate; yields the loss before it."""
    optimiser = torch.optim.Adam(network.parameters(), fused=True)
    dropouts = nn.modules.dropout._DropoutNd
    with same_streams(device_of(network)), mode(network, lambda module: not isinstance(module, dropouts)):
        for step, ((inputs, wanted), rate) in enumerate(zip(batches, rates, strict=True)):
            positional, named = arguments(inputs)
            logits = logits_of(network(*positional, **named), network)
            if wanted.is_floating_point():
                if logits.shape != wanted.shape:
                    raise ValueError(
                        f"the new base answers {list(logits.shape)} where the fine-tune answers {list(wanted.shape)}: "
                        "give it a head of as many classes (regraft.networks.heads.adopt)"
                    )
                logits, wanted = logits.flatten(0, -2), wanted.flatten(0, -2)
            else:
                logits, wanted = align_labels(logits, wanted, f"batch {step}")
            loss = F.cross_entropy(logits, wanted)
            if not bool(loss.isfinite()):
                raise Diverged(step)
            optimiser.param_groups[0]["lr"] = rate
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            yield float(loss.detach())
