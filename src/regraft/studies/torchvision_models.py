"""Networks of torchvision that scenarios name, imported when one is made: that takes 160 MB, and reports make none."""

from __future__ import annotations

from typing import Any

from torch import nn


def resnet18(**arguments: Any) -> nn.Module:
    """`torchvision.models.resnet18`."""
    return _made("resnet18", arguments)


def vgg19(**arguments: Any) -> nn.Module:
    """`torchvision.models.vgg19`."""
    return _made("vgg19", arguments)


def densenet201(**arguments: Any) -> nn.Module:
    """`torchvision.models.densenet201`."""
    return _made("densenet201", arguments)


def resnext101(**arguments: Any) -> nn.Module:
    """`torchvision.models.resnext101_32x8d`."""
    return _made("resnext101_32x8d", arguments)


def _made(name: str, arguments: dict[str, Any]) -> nn.Module:
    from torchvision import models

    return models.get_model(name, **arguments)
