"""The Fisher information of a network's parameters, and averages that it weighs (Matena and Raffel, 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.core.arguments import check_arguments
from regraft.core.forward import call, map_inputs
from regraft.core.guard import evaluating
from regraft.core.tensors import Batch, Inputs, Tensors, complete
from regraft.fusion.sums import fuse
from regraft.training.evaluation import check_batches

TINY = 1e-12  # importance of a parameter that nothing depends on


@check_arguments
def estimate_fisher(
    model: nn.Module, tensors: Mapping[str, Tensor], batches: Iterable[Batch], *, generator: torch.Generator
) -> Tensors:
    """The diagonal of the Fisher information at `tensors`, one tensor per parameter.

    Mean over all inputs of the squared gradient of the log-likelihood, one by one, of a label that is drawn from the
    model's own prediction (labels of the batches are not read); in evaluation mode. Raises ValueError for no inputs,
    and for a model that does not answer each with one row of logits, or whose inputs cannot be told apart by
    `torch.func.vmap`.
    """
    parameters = {name: tensors[name].detach() for name, _ in model.named_parameters()}
    buffers = {name: value for name, value in complete(model, tensors).items() if name not in parameters}

    def loss(values: Tensors, inputs: Inputs, label: Tensor) -> Tensor:
        one = map_inputs(lambda x: x[None], inputs)
        return F.cross_entropy(call(model, {**values, **buffers}, one), label[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    total, count = {name: torch.zeros_like(value) for name, value in parameters.items()}, 0
    with evaluating(model):
        for number, (inputs, _) in enumerate(check_batches(batches)):
            with torch.no_grad():
                logits = call(model, {**parameters, **buffers}, inputs, f"batch {number}")
            if logits.ndim != 2:
                raise ValueError(f"Fisher information is of one answer an input: logits have shape {[*logits.shape]}")
            labels = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0].to(logits.device)
            try:
                gradients = each(parameters, inputs, labels)
            except RuntimeError as problem:
                said = str(problem).partition("\n")[0]
                raise ValueError(f"this model's gradients cannot be taken input by input: {said}") from problem
            for name, squares in gradients.items():
                total[name] += squares.square().sum(0)
            count += len(labels)
    if not count:
        raise ValueError("there are no images to estimate the Fisher information on")
    return {name: value / count for name, value in total.items()}


def merge_by_importance(
    networks: Sequence[Tensors], importances: Sequence[Tensors], shares: Sequence[float]
) -> Tensors:
    """Parameters averaged with weights ``shares[i] * importances[i]``; those of no importance by the shares alone.

    importances: the Fisher information of each network, by parameter. shares: sum to one.
    """
    merged = fuse(networks, shares)
    for name in importances[0]:
        weights = [share * (of[name] + TINY) for share, of in zip(shares, importances, strict=True)]
        scaled = [weight * network[name] for weight, network in zip(weights, networks, strict=True)]
        merged[name] = sum(scaled[1:], scaled[0]) / sum(weights[1:], weights[0])
    return merged
