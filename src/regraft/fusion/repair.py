"""What to do about the activations of a sum of networks.

Four ways to treat BatchNorm statistics:

- sum them like weights, which is the default;
- :func:`batch_statistics`: normalise every batch with its own (training mode, nothing updated);
- :func:`reset_on`: estimate them again on data;
- :func:`repair_on`: as `reset_on`, and give the activations of layers without BatchNorm the mean and
  deviation that they had in the summed networks (REPAIR, Jordan et al., 2022).

The last two return a :data:`Finish`, which `regraft.fusion.sums.fuse` and `regraft.fusion.grids.evaluate` take.
Models run in evaluation mode and are left as they were: mode, statistics, random state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from regraft.core.arguments import check_arguments
from regraft.core.forward import See, hooks, portion, run
from regraft.core.guard import evaluating
from regraft.core.tensors import Batch, Inputs, Tensors, copies, weighted_sum
from regraft.training.evaluation import check_batches
from regraft.training.statistics import reset_batchnorm

Finish = Callable[[Tensors, Tensor], Tensors]
"""(summed tensors, their coefficients [m]) -> repaired tensors."""

Moments = dict[str, tuple[Tensor, Tensor]]
"""Layer -> mean and standard deviation of its channels, float64 [channels] each."""

SMALLEST_DEVIATION = 1e-12  # a channel that never changes has nothing to rescale


class OwnStatistics(_BatchNorm):
    """A BatchNorm that normalises each batch with its own mean and variance and writes nothing, in any mode."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


@check_arguments
def batch_statistics(model: nn.Module) -> nn.Module:
    """A copy of `model`, in evaluation mode, whose BatchNorms are :class:`OwnStatistics`.

    It takes the same dictionaries as `model`; the running statistics in them are not read.
    """
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = OwnStatistics  # keeps the names of its tensors, and survives a deep copy
    return model


def reads_batches(model: nn.Module) -> bool:
    """Whether an output depends, in evaluation mode, on what else is in its batch."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return any(isinstance(module, OwnStatistics) or module.running_mean is None for module in norms)


@check_arguments
def reset_on(model: nn.Module, batches: Iterable[Batch]) -> Finish:
    """Re-estimate the running statistics of every BatchNorm over `batches` (cumulative average)."""
    return lambda tensors, _coefficients: reset_batchnorm(model, tensors, batches)


@check_arguments
def repair_on(model: nn.Module, sources: Sequence[Tensors], batches: Iterable[Batch]) -> Finish:
    """REPAIR: give every channel the weighted mean of the sources' means and deviations on `batches`.

    The weights are |c_i| / sum |c_i|, so they sum to one for any coefficients. Convolutions and linear
    layers with a bias are rescaled (the correction is folded into weight and bias), but for the last one
    called, which returns the logits. A BatchNorm that follows a layer undoes any rescaling before it, so there
    the statistics are estimated again, which amounts to REPAIR.

    Args:
        sources: the networks being fused. The activations of a gradient mean nothing: give it a coefficient of 0
            or use :func:`reset_on`.
        batches: calibration data, iterated over once for each source and once for each fused network.

    Raises:
        ValueError: when finishing, if all coefficients are 0; when made, if `batches` is empty or has an image that
            is not finite, or a layer is called twice.
    """
    seen = list(check_batches(batches))
    if not seen:
        raise ValueError("repair_on: there are no batches to take activations from")
    layers = _biased_layers(model, sources[0], seen[0][0])
    moments = [_moments(model, source, seen, layers) for source in sources]

    def finish(tensors: Tensors, coefficients: Tensor) -> Tensors:
        total = float(coefficients.abs().sum())
        if total == 0:
            raise ValueError("repair_on: all coefficients are 0, there is no activation to aim at")
        shares = (coefficients.abs() / total).tolist()
        goals: Moments = {}
        for layer in layers:
            means, deviations = zip(*(of[layer] for of in moments), strict=True)
            goals[layer] = weighted_sum(means, shares), weighted_sum(deviations, shares)
        repaired = _rescale(tensors, _corrections(model, tensors, seen, goals), goals)
        return reset_batchnorm(model, repaired, seen)  # a model without BatchNorm gets its tensors back

    return finish


def _biased_layers(model: nn.Module, tensors: Tensors, inputs: Inputs) -> tuple[str, ...]:
    """Convolutions and linear layers with a bias in the order in which they are called, without the last."""
    called: list[str] = []
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    _run(model, tensors, [portion(inputs, 0, 2)], layers, lambda name, _inputs, _output: called.append(name))
    if twice := [name for name in called if called.count(name) > 1]:
        raise ValueError(f"repair_on: layer {twice[0]!r} is used twice, its channels have no one mean")
    return tuple(name for name in called[:-1] if layers[name].bias is not None)


def _by_channel(layer: nn.Module, output: Tensor) -> Tensor:
    """float64 [channels, everything else]: a linear layer's channels are last, a convolution's come second."""
    return output.double().movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)


def _moments(
    model: nn.Module, tensors: Tensors, batches: Sequence[tuple[Inputs, Tensor]], layers: Sequence[str]
) -> Moments:
    """Exact moments of each layer's output over all batches, one pass."""
    modules = {name: model.get_submodule(name) for name in layers}
    sums: dict[str, Tensor] = {}

    def add(name: str, _inputs: Any, output: Tensor) -> None:
        flat = _by_channel(modules[name], output)
        row = torch.stack([flat.sum(1), flat.square().sum(1), torch.full_like(flat[:, 0], flat.shape[1])])
        sums[name] = sums.get(name, torch.zeros_like(row)) + row

    _run(model, tensors, [inputs for inputs, _ in batches], modules, add)
    moments = {}
    for name, (total, squares, count) in sums.items():
        mean = total / count
        moments[name] = (mean, (squares / count - mean.square()).clamp_min(0).sqrt())
    return moments


def _corrections(
    model: nn.Module, tensors: Tensors, batches: Sequence[tuple[Inputs, Tensor]], goals: Moments
) -> Moments:
    """Moments of each layer's output where the layers before it are already repaired, averaged over batches.

    One pass does for all layers: inside a batch, every output is replaced by what it will be.
    """
    modules = {name: model.get_submodule(name) for name in goals}
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in goals}

    def repair(name: str, _inputs: Any, output: Tensor) -> Tensor:
        flat = _by_channel(modules[name], output)
        mean, deviation = flat.mean(1), flat.std(1, correction=0)
        seen[name].append((mean, deviation.square()))
        scale, shift = _affine((mean, deviation), goals[name])
        if not isinstance(modules[name], nn.Linear):
            scale, shift = (t.reshape(-1, *[1] * (output.dim() - 2)) for t in (scale, shift))
        return output * scale.to(output) + shift.to(output)

    _run(model, tensors, [inputs for inputs, _ in batches], modules, repair)
    averages = {name: [torch.stack(of).mean(0) for of in zip(*pairs, strict=True)] for name, pairs in seen.items()}
    return {name: (mean, variance.sqrt()) for name, (mean, variance) in averages.items()}


def _affine(moments: tuple[Tensor, Tensor], goal: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(scale, shift) that turn a channel's mean and deviation into the goal's; a dead channel is only moved."""
    mean, deviation = moments
    alive = deviation > SMALLEST_DEVIATION
    scale = torch.where(alive, goal[1] / deviation.clamp_min(SMALLEST_DEVIATION), 1.0)
    return scale, goal[0] - scale * mean


def _rescale(tensors: Tensors, measured: Moments, goals: Moments) -> Tensors:
    repaired = dict(tensors)
    for name, moments in measured.items():
        scale, shift = _affine(moments, goals[name])
        weight, bias = repaired[f"{name}.weight"], repaired[f"{name}.bias"]
        repaired[f"{name}.weight"] = weight * scale.reshape(-1, *[1] * (weight.dim() - 1)).to(weight)
        repaired[f"{name}.bias"] = bias * scale.to(bias) + shift.to(bias)
    return repaired


def _run(
    model: nn.Module, tensors: Tensors, inputs: Iterable[Inputs], modules: Mapping[str, nn.Module], see: See
) -> None:
    values = copies(model, tensors)
    with evaluating(model), hooks(modules, see), torch.no_grad():
        for batch in inputs:
            run(model, values, batch)
