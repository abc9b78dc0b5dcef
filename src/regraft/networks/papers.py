"""The networks of the papers and small ones for two cores, as plain modules, and their initial values.

A model is only the description of a function; its values travel beside it as a dictionary
name -> tensor (`Tensors`). All initial values are PyTorch's defaults, drawn from a generator that is
handed in: `build` and `initialise` neither read nor change torch's global random state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.core.registry import register
from regraft.core.tensors import Tensors, live_state, state, use_generator


def build(factory: Callable[[], nn.Module], generator: torch.Generator) -> nn.Module:
    """The module that ``factory`` makes, its initial values drawn from the generator.

    For any constructor, torchvision's included: ``build(lambda: resnet18(num_classes=10), generator)``.
    """
    with use_generator(generator):
        return factory()


def initialise(model: nn.Module, generator: torch.Generator) -> Tensors:
    """Fresh initial values for the model, drawn from the generator; the model itself keeps its own.

    Every module is reset as its constructor would (``reset_parameters``). Raises ValueError naming a
    parameter that belongs to a module without that method: use `build` for such a model.
    """
    fresh = copy.deepcopy(model).cpu()
    with use_generator(generator):
        # Parts before wholes: a module that resets what it is made of has the last word.
        for name, module in reversed(list(fresh.named_modules())):
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
            if reset is not None:
                reset()
            elif own:
                raise ValueError(
                    f"parameter {'.'.join(filter(None, [name, own[0]]))!r} has no reset_parameters: "
                    "draw this model's initial values with regraft.networks.papers.build"
                )
    return {name: tensor.to(live_state(model)[name].device) for name, tensor in state(fresh).items()}


def _scale_channels(width: float, *channels: int) -> list[int]:
    """Numbers of channels times a width factor, at least one each."""
    if width <= 0:
        raise ValueError(f"the width factor must be positive, not {width}")
    return [max(1, round(width * count)) for count in channels]


class MLP(nn.Module):
    """Linear layers with ReLU between; images are flattened first."""

    def __init__(self, sizes: Sequence[int], bias: bool = True) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"an MLP needs the sizes of its input and output at least, not {list(sizes)}")
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out, bias=bias) for fan_in, fan_out in pairwise(sizes))

    def forward(self, images: Tensor) -> Tensor:
        hidden = images.flatten(1)
        for layer in self.layers[:-1]:
            hidden = F.relu(layer(hidden))
        logits: Tensor = self.layers[-1](hidden)
        return logits


@register
def mlp(sizes: Sequence[int], bias: bool = True) -> nn.Module:
    """An MLP: ``mlp([784, 4096, 10])`` is the 2-MLP of "Transferring Learning Trajectories", table 1."""
    return MLP(sizes, bias)


class ConvNet(nn.Module):
    """Convolutional features, then an MLP on their flattened output."""

    def __init__(self, features: Sequence[nn.Module], classifier: Sequence[int]) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        self.classifier = MLP(classifier)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images))
        return logits


def _conv(channels_in: int, channels_out: int, kernel: int = 3, padding: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, kernel, padding=padding), nn.ReLU()]


@register
def small_cnn(num_classes: int = 10, in_channels: int = 3, size: int = 32) -> nn.Module:
    """The network of "Rethinking the Dependence", sections 3 and 4 (its appendix A.2).

    Two 5x5 convolutions (6, 16), each with ReLU and max-pooling, and linear 400-120-84-classes.
    """
    side = ((size - 4) // 2 - 4) // 2
    features = [*_conv(in_channels, 6, 5, 0), nn.MaxPool2d(2), *_conv(6, 16, 5, 0), nn.MaxPool2d(2)]
    return ConvNet(features, [16 * side * side, 120, 84, num_classes])


@register
def digits_conv(num_classes: int = 10, in_channels: int = 1, width: float = 1.0) -> nn.Module:
    """A small convolutional network for 8x8 images: 3x3 convolutions 32, 64, 64 and linear 256-64-classes."""
    a, b, c = _scale_channels(width, 32, 64, 64)
    features = [
        *_conv(in_channels, a), *_conv(a, b), nn.MaxPool2d(2), *_conv(b, c), nn.MaxPool2d(2),
    ]  # fmt: skip
    return ConvNet(features, [4 * c, c, num_classes])


def _pairs(in_channels: int, *stages: int) -> list[nn.Module]:
    """Two 3x3 convolutions a stage; 2x2 max-pooling after all stages but the last."""
    features: list[nn.Module] = []
    for channels_in, channels in pairwise([in_channels, *stages]):
        features += [*_conv(channels_in, channels), *_conv(channels, channels), nn.MaxPool2d(2)]
    return features[:-1]


@register
def conv8(num_classes: int = 10, width: float = 1.0, in_channels: int = 3) -> nn.Module:
    """Conv8 of "Transferring Learning Trajectories", table 2, for 32x32 images; all layers times ``width``.

    3x3 convolutions 64, 64, pool 2, 128, 128, pool 2, 256, 256, pool 2, 512, 512, pool 4, and linear
    512-256-256-classes. (The table prints a ninth convolution, row 13, which is not part of it, and gives its last
    layer 512 inputs, but what flows into it are the 256 outputs of the one before.)
    """
    *stages, hidden = _scale_channels(width, 64, 128, 256, 512, 256)
    features = [*_pairs(in_channels, *stages), nn.MaxPool2d(4)]
    return ConvNet(features, [stages[-1], hidden, hidden, num_classes])


@register
def conv6(num_classes: int = 10, width: float = 1.0, in_channels: int = 3, size: int = 16) -> nn.Module:
    """Conv8's little sister for images of ``size`` x ``size`` pixels (at least 8); all layers times ``width``.

    3x3 convolutions 64, 64, 128, 128, 256, 256, 2x2 max-pooling after each two, and linear
    256 (size // 8)^2 - 256 - classes.
    """
    if size < 8:
        raise ValueError(f"conv6 halves its images three times: they need at least 8 pixels, not {size}")
    stages = _scale_channels(width, 64, 128, 256)
    features = [*_pairs(in_channels, *stages), nn.MaxPool2d(2)]
    return ConvNet(features, [stages[-1] * (size // 8) ** 2, stages[-1], num_classes])


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut (a 1x1 convolution where shapes change)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(images)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(images))


class CifarResNet18(nn.Module):
    """ResNet-18 for small images: a 3x3 stem without pooling, four stages of two blocks."""

    def __init__(self, num_classes: int, width: float, in_channels: int) -> None:
        super().__init__()
        stages = _scale_channels(width, 64, 128, 256, 512)
        self.conv1 = nn.Conv2d(in_channels, stages[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stages[0])
        blocks, channels = [], stages[0]
        for stage, count in enumerate(stages):
            blocks += [
                BasicBlock(channels, count, stride=2 if stage else 1),
                BasicBlock(count, count, stride=1),
            ]
            channels = count
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.blocks(F.relu(self.bn1(self.conv1(images))))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(hidden, 1).flatten(1))
        return logits


@register
def cifar_resnet18(num_classes: int = 10, width: float = 1.0, in_channels: int = 3) -> nn.Module:
    """ResNet-18 (He et al., 2016) in its usual form for 32x32 images; all layers times ``width``."""
    return CifarResNet18(num_classes, width, in_channels)


class Residual8(nn.Module):
    """Eight blocks (3x3 convolution, BatchNorm, ReLU), with shortcuts from 2 to 4 and from 6 to 8."""

    def __init__(self, num_classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        counts = [in_channels, *_scale_channels(width, 64, 128, 128, 128, 256, 512, 512, 512)]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.BatchNorm2d(fan_out), nn.ReLU())
            for fan_in, fan_out in pairwise(counts)
        )
        self.fc = nn.Linear(counts[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        block = self.blocks
        hidden = F.max_pool2d(block[1](block[0](images)), 2)
        hidden = hidden + block[3](block[2](hidden))
        hidden = F.max_pool2d(block[4](hidden), 2)
        hidden = F.max_pool2d(block[5](hidden), 2)
        hidden = hidden + block[7](block[6](hidden))
        logits: Tensor = self.fc(F.adaptive_max_pool2d(hidden, 1).flatten(1))
        return logits


@register
def residual8(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> nn.Module:
    """The residual network of "Rethinking the Dependence", section 5 (its appendix A.2).

    The paper gives neither the numbers of channels nor the place of the poolings. These are the ones of
    the widely used network of that form: 64, 128, 128, 128, 256, 512, 512, 512, with pooling by two
    after blocks 2, 5 and 6 (a shortcut starts at the pooled output), and max-pooling over what is left.
    """
    return Residual8(num_classes, in_channels, width)


class TransformerBlock(nn.Module):
    """Self-attention, then an MLP four times as wide; each behind a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        seen = self.norm1(tokens)
        tokens = tokens + self.attention(seen, seen, seen, need_weights=False)[0]
        hidden: Tensor = self.mlp(self.norm2(tokens))
        return tokens + hidden


class VisionTransformer(nn.Module):
    """Patches as tokens with learnt positions, blocks of attention, and a linear layer on the tokens' mean."""

    def __init__(self, patches: nn.Conv2d, tokens: int, blocks: Sequence[nn.Module], head: nn.Linear) -> None:
        super().__init__()
        self.patches = patches
        self.positions = nn.Parameter(torch.empty(tokens, patches.out_channels))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(patches.out_channels)
        self.head = head
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Positions have no default in PyTorch; this is torchvision's. All other values keep theirs."""
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


@register
def vit(
    num_classes: int = 10,
    *,
    size: int = 32,
    patch: int = 4,
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
    in_channels: int = 3,
) -> nn.Module:
    """A small vision transformer (Dosovitskiy et al., 2021) with mean pooling in place of a class token.

    size, patch: pixels along a side of an image and of a patch. width: of a token; a multiple of ``heads``.

    Raises ValueError unless ``size`` is a multiple of ``patch``, and ``width`` of ``heads``.
    """
    if size % patch or width % heads:
        raise ValueError(f"size {size} must be a multiple of patch {patch}, and width {width} of heads {heads}")
    return VisionTransformer(
        nn.Conv2d(in_channels, width, patch, patch),
        (size // patch) ** 2,
        [TransformerBlock(width, heads) for _ in range(depth)],
        nn.Linear(width, num_classes),
    )


@dataclass(frozen=True)
class Torchvision:
    """A model of torchvision by its name, such as ``Torchvision("resnet18")``; imported when it is made (160 MB)."""

    name: str

    def __call__(self, **arguments: Any) -> nn.Module:
        from torchvision import models

        model: nn.Module = models.get_model(self.name, **arguments)
        return model
