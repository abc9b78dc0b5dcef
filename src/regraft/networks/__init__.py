"""The papers' networks, initial values and classifier heads."""

from regraft.networks.papers import (
    Torchvision,
    build,
    cifar_resnet18,
    conv6,
    conv8,
    digits_conv,
    initialise,
    mlp,
    residual8,
    small_cnn,
    vit,
)

__all__ = [
    "Torchvision", "build", "cifar_resnet18", "conv6", "conv8", "digits_conv", "initialise", "mlp",
    "residual8", "small_cnn", "vit"
]  # fmt: skip
