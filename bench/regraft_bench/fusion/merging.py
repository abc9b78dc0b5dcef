"""Two networks merged parameter by parameter, by published methods other than weighted sums.

TIES (Yadav et al., 2023), and averages by importance (Matena and Raffel, 2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.core.forward import call
from regraft.core.guard import evaluating
from regraft.core.tensors import Tensors, complete
from regraft.fusion.sums import fuse

TINY = 1e-12  # importance of a parameter that nothing depends on


def trim(g: Tensors, names: Sequence[str], share: float) -> Tensors:
    """`g`, with zeros but for the `share` of the named tensors' values that are largest by magnitude."""
    sizes = torch.cat([g[name].abs().flatten() for name in names])
    least = sizes.sort().values[-max(1, round(share * len(sizes)))]
    return g | {name: torch.where(g[name].abs() >= least, g[name], 0) for name in names}


def merge_ties(parts: Sequence[Tensors]) -> Tensors:
    """Value by value the mean of those parts that are not zero and have the sign of the parts' sum."""
    merged = {}
    for name, first in parts[0].items():
        stack = torch.stack([part[name] for part in parts])
        agree = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
        total = torch.where(agree, stack, 0).sum(0)
        merged[name] = (total / agree.sum(0).clamp_min(1)).to(first.dtype)
    return merged


def merge_by_importance(pair: Sequence[Tensors], importances: Sequence[Tensors], share: float) -> Tensors:
    """Parameters averaged with weights share * F_A and (1 - share) * F_B; buffers by the share alone.

    importances: the Fisher information of each network, by parameter. One that neither network needs is averaged by
    the share alone.
    """
    merged = fuse(pair, (share, 1 - share))
    for name in importances[0]:
        a, b = share * (importances[0][name] + TINY), (1 - share) * (importances[1][name] + TINY)
        merged[name] = (a * pair[0][name] + b * pair[1][name]) / (a + b)
    return merged


def estimate_fisher(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    images: Tensor,
    *,
    generator: torch.Generator,
    batch_size: int = 100,
) -> Tensors:
    """The diagonal of the Fisher information at `tensors`, one tensor per parameter.

    Mean over `images` [N, ...] of the squared gradient of the log-likelihood, image by image, of a label
    that is drawn from the model's own prediction; in evaluation mode. Raises ValueError for no images.
    """
    if len(images) == 0:
        raise ValueError("there are no images to estimate the Fisher information on")
    parameters = {name: tensors[name].detach() for name, _ in model.named_parameters()}
    buffers = {name: value for name, value in complete(model, tensors).items() if name not in parameters}

    def loss(values: Tensors, image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(call(model, {**values, **buffers}, image[None]), label[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    with evaluating(model):
        for part in images.split(batch_size):
            with torch.no_grad():
                chances = call(model, {**parameters, **buffers}, part).softmax(-1).cpu()
            labels = torch.multinomial(chances, 1, generator=generator)[:, 0].to(part.device)
            for name, squares in each(parameters, part, labels).items():
                total[name] += squares.square().sum(0)
    return {name: value / len(images) for name, value in total.items()}
