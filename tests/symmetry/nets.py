"""What the tracer's tests share: a module in one expression, and its proof."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from regraft.symmetry import PermutationSpec, trace, verify


def proved(model: nn.Module, *shape: int, draws: int = 2) -> PermutationSpec:
    """Traced without a warning, and proved."""
    x = torch.rand(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = trace(model, x)
    assert verify(spec, model, x, draws=draws) < 1e-10
    return spec


def share(spec: PermutationSpec, model: nn.Module) -> float:
    """The share of parameters that may move."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    fixed = [
        math.prod(sum(s.length for s in axis if s.group is None) for axis in spec.axes[name])
        for name in sizes
    ]
    return 1 - sum(fixed) / sum(sizes.values())


class Net(nn.Module):
    """A module from its layers and a function of them."""

    def __init__(self, forward: Callable[..., Tensor], **members: nn.Module | nn.Parameter | Tensor) -> None:
        super().__init__()
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.3)
