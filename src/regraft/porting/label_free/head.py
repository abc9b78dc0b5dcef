"""A new base with a head that answers as the fine-tune does: ridge regression on the fine-tune's logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regraft.core.arguments import NotNegative, check_arguments
from regraft.core.forward import call, hooks, name_inputs
from regraft.core.guard import evaluating
from regraft.core.tensors import Inputs, Tensors, check_finite, complete, copies
from regraft.networks.heads import find_head, linear_of
from regraft.porting.label_free.outputs import finite_logits
from regraft.training.evaluation import NotFinite

RIDGES = torch.logspace(-9, 2, 45, dtype=torch.float64)
"""Strengths to choose from, relative to the mean square of the features."""


@check_arguments
def fit_head(
    model: nn.Module,
    tuned: Mapping[str, Tensor],
    new_base: Mapping[str, Tensor],
    batches: Iterable[Inputs],
    *,
    new_model: nn.Module | None = None,
    ridge: NotNegative | None = None,
) -> Tensors:
    """``new_base`` with the head whose logits are nearest to the fine-tune's, in closed form and one pass.

    The new base's features, the input of its last linear layer, are regressed on the fine-tune's logits; the mean of
    both is left free where the head has a bias. Everything below the head stays as it is.

    Args:
        model: the fine-tune's network.
        tuned: its parameters and buffers.
        new_base: those of the new base, with a head of the fine-tune's classes, whose values do not matter.
        batches: unlabelled inputs; read once, and never held together.
        new_model: the new base's network, where it is another one.
        ridge: its strength, relative to the features' mean square; chosen by generalised cross-validation (Golub,
            Heath and Wahba, 1979) if not given.

    Raises ValueError where there are fewer inputs than half of the classes, for a head of another number of classes,
    or as `regraft.networks.heads.find_head`; `NotFinite` for features or logits that are not finite.
    """
    own = model if new_model is None else new_model
    name = find_head(own)
    layer = linear_of(own, name)
    sums = Sums(layer.in_features, bias=layer.bias is not None)
    for number, (features, logits) in enumerate(_features_and_logits(model, tuned, own, new_base, batches)):
        if logits.shape[-1] != layer.out_features:
            raise ValueError(
                f"the new base's head {name!r} has {layer.out_features} outputs, the fine-tune has "
                f"{logits.shape[-1]} classes: give it a head of as many (regraft.networks.heads.adopt)"
            )
        if features.shape[:-1] != logits.shape[:-1]:
            raise ValueError(
                f"batch {number}: the head {name!r} sees {list(features.shape)}, the fine-tune answers "
                f"{list(logits.shape)}: one answer is wanted for each row"
            )
        sums.add(features.flatten(0, -2), logits.flatten(0, -2))
    if 2 * sums.count < layer.out_features:
        raise ValueError(
            f"{sums.count} inputs are too few to fit a head of {layer.out_features} classes: give at least "
            f"{-(-layer.out_features // 2)}, better {20 * layer.out_features}"
        )
    weight, bias = sums.solve(ridge)
    like = new_base[f"{name}.weight"]
    fitted = {f"{name}.weight": weight.to(like)} | ({f"{name}.bias": bias.to(like)} if layer.bias is not None else {})
    return {**complete(own, new_base), **fitted}


def _features_and_logits(
    model: nn.Module,
    tuned: Mapping[str, Tensor],
    new_model: nn.Module,
    new_base: Mapping[str, Tensor],
    batches: Iterable[Inputs],
) -> Iterable[tuple[Tensor, Tensor]]:
    """Of each batch, what the new base's head sees, and what the fine-tune answers."""
    head = find_head(new_model)
    teacher, student = copies(model, tuned), copies(new_model, new_base)
    seen: list[Tensor] = []

    def see(_name: str, inputs: tuple[Any, ...], _output: Any) -> None:
        seen.append(inputs[0])

    for number, inputs in enumerate(batches):
        where = f"batch {number}"
        check_finite(name_inputs(inputs), where)
        with torch.no_grad(), evaluating(model):
            logits = finite_logits(call(model, teacher, inputs, where), number)
        with torch.no_grad(), evaluating(new_model), hooks({head: new_model.get_submodule(head)}, see):
            call(new_model, student, inputs, where)
        features = seen.pop()
        if not bool(features.isfinite().all()):
            raise NotFinite(f"{where}: the new base's features, the input of layer {head!r}, are not finite")
        yield features, logits


class Sums:
    """Sums over rows of features [D] and targets [C] from which a ridge regression follows, in float64."""

    def __init__(self, features: int, *, bias: bool) -> None:
        self.bias, self.features, self.count = bias, features, 0
        self._total: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """x: [N, D], y: [N, C], floating."""
        x, y = x.double(), y.double()
        parts = [x.T @ x, x.T @ y, y.square().sum(), x.sum(0), y.sum(0)]
        self._total = [a + b for a, b in zip(self._total, parts, strict=True)] if self._total else parts
        self.count += len(x)

    def solve(self, ridge: float | None = None) -> tuple[Tensor, Tensor]:
        """(weight [C, D], bias [C]) with the least ``sum |y - W x - b|^2 + ridge s |W|^2``, s the mean of the
        eigenvalues of the features' second moments; b is 0 without a bias."""
        xx, xy, yy, x, y = self._total
        x, y = (x / self.count, y / self.count) if self.bias else (torch.zeros_like(x), torch.zeros_like(y))
        xx, xy = xx - self.count * torch.outer(x, x), xy - self.count * torch.outer(x, y)
        squares, axes = torch.linalg.eigh(xx)
        kept = squares > squares[-1].clamp(min=1e-300) * len(squares) * torch.finfo(torch.float64).eps
        squares, axes = squares[kept], axes[:, kept]
        if not len(squares):  # the features never change
            return torch.zeros_like(xy.T), y
        along = axes.T @ xy / squares.sqrt()[:, None]  # the targets in the basis of the features
        scale = xx.diagonal().mean()
        if ridge is None:
            left = (yy - self.count * y.square().sum() - along.square().sum()).clamp(min=0)
            ridge = float(min(RIDGES, key=lambda r: self._cross_validate(squares, along, left, r * scale)))
        weight = axes @ (along * (squares.sqrt() / (squares + ridge * scale))[:, None])
        return weight.T, y - x @ weight

    def _cross_validate(self, squares: Tensor, along: Tensor, left: Tensor, ridge: Tensor) -> float:
        """The generalised cross-validation score of one strength."""
        shrunk = ridge / (squares + ridge)
        residual = left + (shrunk[:, None] * along).square().sum()
        free = self.count - self.bias - len(squares) + shrunk.sum()
        return float(residual / free.clamp(min=1e-12).square())
