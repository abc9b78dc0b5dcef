"""What the tracer's tests share: a module in one expression, and its proof."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.symmetry import PermutationSpec, trace, verify


def proved(model: nn.Module, *shape: int, draws: int = 2, losses: bool = False) -> PermutationSpec:
    """Traced without a warning, and proved; with ``losses`` units may be lost."""
    x = torch.rand(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if losses:
            warnings.filterwarnings("ignore", "units of ")
        spec = trace(model, x)
    assert verify(spec, model, x, draws=draws) < 1e-10
    return spec


def share(spec: PermutationSpec, model: nn.Module) -> float:
    """The share of parameters that may move."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    fixed = [math.prod(sum(s.length for s in axis if s.group is None) for axis in spec.axes[name]) for name in sizes]
    return 1 - sum(fixed) / sum(sizes.values())


class Net(nn.Module):
    """A module from its layers and a function of them; a pair (in, out) is a linear layer."""

    def __init__(
        self, forward: Callable[..., Tensor], **members: tuple[int, int] | nn.Module | nn.Parameter | Tensor
    ) -> None:
        super().__init__()
        for name, member in members.items():
            if isinstance(member, tuple):
                setattr(self, name, nn.Linear(*member))
            elif isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.3)


def attention(heads: int, shared: int = 1, *, width: int = 4, rotary: bool = False) -> Net:
    """Attention in which ``shared`` heads of queries look at one of keys and values."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem(x)
        split = [layer(x).unflatten(-1, (-1, width)).transpose(1, 2) for layer in (m.q, m.k, m.v)]
        if rotary:
            angles = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1]).repeat(2)
            turned = [torch.cat([-t[..., 2:], t[..., :2]], -1) for t in split[:2]]
            split[:2] = [t * angles.cos() + u * angles.sin() for t, u in zip(split, turned, strict=False)]
        q, *others = split
        k, v = (t[:, :, None].expand(-1, -1, shared, -1, -1).flatten(1, 2) for t in others)
        return m.out(m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))

    few = heads // shared * width
    layers = {"q": (6, heads * width), "k": (6, few), "v": (6, few)}
    ends = {"stem": (3, 6), "proj": (heads * width, 6), "out": (6, 2)}
    return Net(forward, **ends, **layers)


def grouped(groups: int, *, transposed: bool = False) -> nn.Module:
    """A convolution in groups, between two that are whole: 2 channels -> 3."""
    layer = nn.ConvTranspose2d if transposed else nn.Conv2d
    middle = [nn.BatchNorm2d(12), layer(12, 24, 3, groups=groups), nn.ReLU()]
    return nn.Sequential(nn.Conv2d(2, 12, 1), *middle, nn.Conv2d(24, 3, 1))
