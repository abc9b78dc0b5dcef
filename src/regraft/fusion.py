"""Gradient assignment and model fusion: sums of networks, and what to do about their activations.

With g = theta_A - theta_0 ("Rethinking the Dependence Between Gradients and the Initial Point in Deep
Learning", equations 5 to 7): :func:`assign_gradient` is theta_n + alpha g, :func:`fuse` any weighted sum:
theta_n + alpha theta_A, alpha theta_A + beta theta_B, theta_0 + alpha g_1 + beta g_2, of any number of models.

Four ways to treat BatchNorm statistics, of which the caller takes one:

- fused like weights: nothing to do, running means and variances are summed as everything else is;
- :func:`batch_statistics`: every batch is normalised with its own (training mode, nothing updated);
- :func:`reset_on`: re-estimated on data;
- :func:`repair_on`: as `reset_on`, and the activations of layers without BatchNorm get back the mean and
  deviation that the fused networks had (REPAIR, Jordan et al., 2022).

The last two return a :data:`Finish`, which :func:`fuse` and :func:`regraft.grids.evaluate` take.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from regraft.evaluation import reset_batchnorm
from regraft_kernels import combine

Tensors = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
Finish = Callable[[Tensors, Tensor], Tensors]  # (fused tensors, their coefficients [m]) -> mended tensors

SMALLEST_DEVIATION = 1e-12  # a channel that never changes has nothing to rescale


def fuse(
    models: Sequence[Tensors], coefficients: Sequence[float], *, finish: Finish | None = None
) -> Tensors:
    """sum_i coefficients[i] * models[i]; integer and boolean tensors are the first model's.

    Args:
        models: m >= 1 dictionaries name -> tensor with the same names, shapes and dtypes.
        coefficients: m finite numbers.
        finish: mends the activations afterwards, e.g. :func:`reset_on`.

    Returns:
        A new dictionary; nothing is shared with what was given.

    Raises:
        ValueError: no models, a model that differs in a name, shape or dtype, coefficients of another
            number than the models, a coefficient that is not finite.
    """
    row = torch.as_tensor([float(c) for c in coefficients], dtype=torch.float64)
    fused = {name: tensor[0].clone() for name, tensor in fuse_many(models, row[None]).items()}
    return fused if finish is None else finish(fused, row)


def fuse_many(models: Sequence[Tensors], coefficients: Tensor | Sequence[Sequence[float]]) -> Tensors:
    """K sums at once: coefficients [K, m] -> tensors [K, *shape]. Raises as :func:`fuse` does."""
    rows = torch.as_tensor(coefficients, dtype=torch.float64)
    check(models, rows)
    return combine(models, rows)


def gradient(start: Tensors, end: Tensors) -> Tensors:
    """The cumulative gradient g = end - start (equation 5), of parameters and BatchNorm statistics alike."""
    return fuse([end, start], [1.0, -1.0])


def assign_gradient(
    target: Tensors, gradient: Tensors, alpha: float, *, finish: Finish | None = None
) -> Tensors:
    """theta_n + alpha g (equation 6); g is made by :func:`gradient`. Raises as :func:`fuse` does."""
    return fuse([target, gradient], [1.0, alpha], finish=finish)


def check(models: Sequence[Tensors], coefficients: Tensor) -> None:
    """Raise ValueError unless coefficients [K, m] are finite and fit m models that match tensor by tensor."""
    if not models:
        raise ValueError("there is no model to fuse")
    if coefficients.dim() != 2 or coefficients.shape[1] != len(models):
        raise ValueError(
            f"{len(models)} models need rows of {len(models)} coefficients, "
            f"got shape {tuple(coefficients.shape)}"
        )
    if not bool(coefficients.isfinite().all()):
        row, column = (~coefficients.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"coefficient {column} of row {row} is {float(coefficients[row, column])}")
    first = models[0]
    for number, model in enumerate(models[1:], start=1):
        if missing := first.keys() - model.keys():
            raise ValueError(f"model {number} lacks tensor {sorted(missing)[0]!r}, which model 0 has")
        if extra := model.keys() - first.keys():
            raise ValueError(f"model {number} has a tensor {sorted(extra)[0]!r}, which model 0 lacks")
        for name, tensor in model.items():
            if tensor.shape != first[name].shape:
                raise ValueError(
                    f"tensor {name!r}: shape {tuple(tensor.shape)} in model {number}, "
                    f"{tuple(first[name].shape)} in model 0"
                )
            if tensor.dtype != first[name].dtype:
                raise ValueError(
                    f"tensor {name!r}: dtype {tensor.dtype} in model {number}, {first[name].dtype} in model 0"
                )


# ---------------------------------------------------------------- activations


def batch_statistics(model: nn.Module) -> nn.Module:
    """A copy of `model`, in evaluation mode, whose BatchNorms use each batch's own mean and variance.

    It takes the same dictionaries as `model`; the running statistics in them are not read.
    """
    model = copy.deepcopy(model).eval()
    for module in _batchnorms(model).values():
        module.__class__ = _OwnStatistics  # keeps the names of its tensors, and survives a deep copy
    return model


class _OwnStatistics(_BatchNorm):
    """A BatchNorm that reads and writes no running statistics, in any mode."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


def reset_on(model: nn.Module, batches: Iterable[Batch]) -> Finish:
    """Re-estimate the running statistics of every BatchNorm over `batches` (cumulative average)."""
    return lambda tensors, _coefficients: reset_batchnorm(model, tensors, batches)


def repair_on(model: nn.Module, sources: Sequence[Tensors], batches: Iterable[Batch]) -> Finish:
    """REPAIR: give every channel the weighted mean of the sources' means and deviations on `batches`.

    The weights are |c_i| / sum |c_i|, so they sum to one for any coefficients. Convolutions and linear
    layers with a bias are rescaled (the correction is folded into weight and bias), but for the last one
    called, whose outputs are the answer. A BatchNorm that follows a layer undoes any rescaling before it,
    so there the statistics are re-estimated, which is what REPAIR comes to.

    Args:
        sources: the networks being fused. One that is no network (a gradient) has activations that mean
            nothing; give it a coefficient of 0 or use :func:`reset_on`.
        batches: calibration data, iterated over once for each source and once for each fused network.

    Raises:
        ValueError: when finishing, if all coefficients are 0; when made, if `batches` is empty.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("repair_on: there are no batches to take activations from")
    layers = _biased_layers(model, sources[0], batches[0][0])
    moments = [_moments(model, source, batches, layers) for source in sources]

    def finish(tensors: Tensors, coefficients: Tensor) -> Tensors:
        total = float(coefficients.abs().sum())
        if total == 0:
            raise ValueError("repair_on: all coefficients are 0, there is no activation to aim at")
        shares = (coefficients.abs() / total).tolist()
        goals = {
            layer: [sum(w * m[layer][part] for w, m in zip(shares, moments, strict=True)) for part in (0, 1)]
            for layer in layers
        }
        mended = _rescale(tensors, _corrections(model, tensors, batches, goals), goals)
        return reset_batchnorm(model, mended, batches) if _batchnorms(model) else mended

    return finish


def _batchnorms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def _biased_layers(model: nn.Module, tensors: Tensors, images: Tensor) -> tuple[str, ...]:
    """Convolutions and linear layers with a bias in the order in which they are called, without the last."""
    called: list[str] = []
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    with _hooks(layers, lambda name, _output: called.append(name)), torch.no_grad():
        functional_call(model, tensors, (images[:2],))
    if len(set(called)) != len(called):
        twice = next(name for name in called if called.count(name) > 1)
        raise ValueError(f"repair_on: layer {twice!r} is used twice, its channels have no one mean")
    return tuple(name for name in called[:-1] if layers[name].bias is not None)


Moments = dict[str, tuple[Tensor, Tensor]]  # layer -> mean and standard deviation of its channels


def _moments(model: nn.Module, tensors: Tensors, batches: Sequence[Batch], layers: Sequence[str]) -> Moments:
    """Exact moments of each layer's output over all batches, in evaluation mode, one pass."""
    sums: dict[str, Tensor] = {}

    def add(name: str, output: Tensor) -> None:
        flat = output.double().transpose(0, 1).flatten(1)
        row = torch.stack([flat.sum(1), flat.square().sum(1), torch.full_like(flat[:, 0], flat.shape[1])])
        sums[name] = sums.get(name, torch.zeros_like(row)) + row

    _run(model, tensors, batches, {name: model.get_submodule(name) for name in layers}, add)
    found = {}
    for name, (total, squares, count) in sums.items():
        mean = total / count
        found[name] = (mean, (squares / count - mean.square()).clamp_min(0).sqrt())
    return found


def _corrections(
    model: nn.Module, tensors: Tensors, batches: Sequence[Batch], goals: Mapping[str, Sequence[Tensor]]
) -> Moments:
    """Moments of each layer's output where the layers before it are already mended, averaged over batches.

    One pass does for all layers: inside a batch, every output is replaced by what it will be.
    """
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in goals}

    def mend(name: str, output: Tensor) -> Tensor:
        channels = (1, -1, *[1] * (output.dim() - 2))
        flat = output.double().transpose(0, 1).flatten(1)
        mean, deviation = flat.mean(1), flat.std(1, correction=0)
        seen[name].append((mean, deviation.square()))
        scale, shift = _affine(mean, deviation, *goals[name])
        return output * scale.reshape(channels).to(output) + shift.reshape(channels).to(output)

    _run(model, tensors, batches, {name: model.get_submodule(name) for name in goals}, mend)
    return {
        name: (
            torch.stack([mean for mean, _ in pairs]).mean(0),
            torch.stack([square for _, square in pairs]).mean(0).sqrt(),
        )
        for name, pairs in seen.items()
    }


def _affine(
    mean: Tensor, deviation: Tensor, goal_mean: Tensor, goal_deviation: Tensor
) -> tuple[Tensor, Tensor]:
    """(scale, shift) that turn a channel's mean and deviation into the goal's; a dead channel is only moved."""
    alive = deviation > SMALLEST_DEVIATION
    scale = torch.where(alive, goal_deviation / deviation.clamp_min(SMALLEST_DEVIATION), 1.0)
    return scale, goal_mean - scale * mean


def _rescale(tensors: Tensors, measured: Moments, goals: Mapping[str, Sequence[Tensor]]) -> Tensors:
    mended = dict(tensors)
    for name, (mean, deviation) in measured.items():
        scale, shift = _affine(mean, deviation, *goals[name])
        weight, bias = mended[f"{name}.weight"], mended[f"{name}.bias"]
        mended[f"{name}.weight"] = weight * scale.reshape(-1, *[1] * (weight.dim() - 1)).to(weight)
        mended[f"{name}.bias"] = bias * scale.to(bias) + shift.to(bias)
    return mended


def _run(
    model: nn.Module,
    tensors: Tensors,
    batches: Iterable[Batch],
    modules: Mapping[str, nn.Module],
    see: Callable[[str, Tensor], Tensor | None],
) -> None:
    training = model.training
    model.eval()
    try:
        with _hooks(modules, see), torch.no_grad():
            for images, _ in batches:
                functional_call(model, tensors, (images,))
    finally:
        model.train(training)


@contextmanager
def _hooks(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """While inside, `see(name, output)` is called for every output; what it returns replaces the output."""
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: see(name, output))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
