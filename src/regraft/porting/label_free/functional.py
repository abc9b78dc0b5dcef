"""A new base whose layers change as the fine-tune's did, layer after layer, in closed form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from regraft.core.arguments import NotNegative, check_arguments
from regraft.core.forward import call
from regraft.core.guard import evaluating
from regraft.core.tensors import Inputs, Tensors, check_alike, complete
from regraft.networks.heads import find_head
from regraft.porting.label_free.activations import (
    LinearMap,
    MapRecord,
    align_activations,
    choose_rows,
    join,
    observe,
    record,
)
from regraft.porting.label_free.head import Sums
from regraft.porting.label_free.outputs import predict

SMALLEST_GAIN = 1e-6
"""Of a BatchNorm: what is scaled by less does not matter to what follows."""


@check_arguments
def match_functions(
    model: nn.Module,
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    new_base: Mapping[str, Tensor],
    batches: Iterable[Inputs],
    *,
    ridge: NotNegative = 0.1,
) -> Tensors:
    """``new_base`` with every linear map solved so that its output changes as the fine-tuning changed it.

    From the first map to the last: with y the outputs of a map on all inputs (behind the BatchNorm that follows, if
    one does), T the orthogonal Procrustes map from the base's to the new base's, the target is
    ``y_new + T (y_tuned - y_base)``. The weight that comes nearest to it, given what the maps before now let
    through, is a ridge regression towards the new base's own. The head is fitted as `fit_head` does.
    BatchNorm statistics are held, their biases take up the means; everything that is no linear map stays the new
    base's, as do maps that are run more than once a call.

    Args:
        model: the network of all three.
        base, tuned, new_base: parameters and buffers; the new base with a head of the fine-tune's classes.
        batches: unlabelled inputs, of one shape: held in memory, and run as one batch.
        ridge: its strength, relative to the mean square of what goes into a map.

    Raises ValueError and `NotFinite` as `regraft.porting.label_free.fit_head`, naming the layer.
    """
    batches = list(batches)
    check_alike(dict(new_base), dict(tuned), "the new base", "the fine-tune")
    logits = torch.cat([part.flatten(0, -2) for part in predict(model, tuned, batches)])
    whole = [join(batches)]
    before, after, own = (record(model, tensors, whole) for tensors in (base, tuned, new_base))
    result = complete(model, {name: tensor.clone() for name, tensor in new_base.items()})
    head = f"{find_head(model)}.weight"

    def see(linear: LinearMap, x: Tensor, output: Tensor) -> Tensor | None:
        name = linear.name
        if name == head:
            _fit_head(linear, x, logits, result)
            return None
        if name not in own:
            return None
        aligned = align_activations(before[name].outputs, own[name].outputs)
        change = after[name].outputs - before[name].outputs
        target = own[name].outputs + (change.double() @ aligned.T).to(output)
        return _solve(linear, own[name], x, target, result, ridge)

    with torch.no_grad(), evaluating(model), observe(model, see):
        call(model, result, whole[0])
    return result


def _fit_head(linear: LinearMap, x: Tensor, logits: Tensor, result: Tensors) -> None:
    sums = Sums(x.shape[-1], bias=linear.bias is not None)
    sums.add(x.flatten(0, -2), logits)
    weight, bias = sums.solve()
    result[linear.weight] = weight.to(x)
    if linear.bias is not None:
        result[linear.bias] = bias.to(x)


def _solve(linear: LinearMap, own: MapRecord, x: Tensor, target: Tensor, result: Tensors, ridge: float) -> Tensor:
    """Put the weight whose outputs are nearest to the target [R, fan_out] into ``result``; the map's output with it."""
    weight = linear.of_tensor(result[linear.weight])
    bias = None if linear.bias is None else linear.of_tensor(result[linear.bias])
    output = linear.compute(x, weight, bias)
    rows = choose_rows(linear.count(output), weight[0].numel(), 1.0).to(x.device)
    now, scale, free = linear.output_rows(output, rows), torch.ones(len(weight)).to(x), bias
    if own.norm is not None:
        scale, shift = own.norm.affine(result)
        now, free = now * scale + shift, result.get(f"{own.norm.name}.bias", bias)
    sees, missing = linear.input_rows(x, rows).double(), (target - now).double()
    means = (sees.mean(0), missing.mean(0)) if free is not None else (torch.zeros_like(sees[0]), 0.0)
    wanted = (missing - means[1]) / torch.where(scale.abs() > SMALLEST_GAIN, scale, torch.inf)
    change = solve_ridge(sees - means[0], wanted.unflatten(1, (sees.shape[1], -1)), ridge)  # [groups, fan_in, fan_out]
    weight += change.mT.reshape(weight.shape).to(weight)
    if free is not None:
        free += means[1] - scale * (means[0][:, None] @ change).flatten()
    return linear.compute(x, weight, bias)


def solve_ridge(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """W [g, f, o] with the least ``|y - x W|^2 + ridge s |W|^2`` of each group, s the mean square of x times R.

    x: [R, g, f], y: [R, g, o].
    """
    x, y = x.transpose(0, 1), y.transpose(0, 1)
    penalty = (ridge * x.square().sum((1, 2)) / x.shape[2]).clamp(min=1e-12)[:, None, None]
    eye = torch.eye(min(x.shape[1:])).to(x)
    if x.shape[1] < x.shape[2]:
        weight: Tensor = x.mT @ torch.linalg.solve(x @ x.mT + penalty * eye, y)
    else:
        weight = torch.linalg.solve(x.mT @ x + penalty * eye, x.mT @ y)
    return weight
