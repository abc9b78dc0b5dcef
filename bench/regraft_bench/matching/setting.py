"""What a method of the matching study is given: two networks trained apart, and images to measure their middle on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import nn

from regraft.core.tensors import Pair, Tensors
from regraft.networks.papers import cifar_resnet18, initialise, mlp, vit
from regraft.symmetry import PermutationSpec, trace
from regraft.training.loop import Recipe
from regraft_bench.study import Setting, Task


def _cnn() -> nn.Module:
    """Four 3x3 convolutions with BatchNorm, 8 to 32 channels."""

    def block(channels_in: int, channels: int) -> list[nn.Module]:
        conv = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(channels), nn.ReLU()]

    first, second = [*block(1, 8), *block(8, 16)], [*block(16, 32), *block(32, 32)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(*first, nn.MaxPool2d(2), *second, *head)


PAIR_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: mlp([64, 64, 64, 64, 10]),
    "cnn": _cnn,
    "resnet": lambda: cifar_resnet18(width=0.125, in_channels=1),
    "vit": lambda: vit(size=8, patch=2, width=32, depth=2, heads=4, in_channels=1),
}
"""For digits of 8x8 pixels: narrow, so that a permutation alone does not bring two networks into one basin."""


@dataclass(frozen=True)
class TrainedPair:
    """Two networks of one architecture (a name of `PAIR_NETWORKS`), trained from initial values of their own."""

    network: str
    recipe: Recipe
    task: Task


class MatchingSetting(Setting):
    """The pair of one scenario and seed, trained once."""

    @cached_property
    def model(self) -> nn.Module:
        return PAIR_NETWORKS[self.settings.network]().eval()

    @cached_property
    def spec(self) -> PermutationSpec:
        return trace(self.model, (self.test[0][0][:2],))

    @cached_property
    def pair(self) -> tuple[Tensors, Tensors]:
        """The two networks, parameters and buffers; the second is brought onto the first."""
        first, second = (self._train(number) for number in range(2))
        return first, second

    def _train(self, number: int) -> Tensors:
        start = initialise(self.model, self.generator("start", self.settings.network, number))
        purpose = f"{self.settings.network} {number}"
        return self.train(purpose, self.model, start, self.dataset(self.settings.task), self.settings.recipe).tensors

    @cached_property
    def weights(self) -> tuple[Tensors, Tensors]:
        """Their parameters alone."""
        names = [name for name, _ in self.model.named_parameters()]
        first, second = ({name: tensors[name] for name in names} for tensors in self.pair)
        return first, second

    @cached_property
    def test(self) -> list[Pair]:
        """Batches of all test images."""
        return list(self.dataset(self.settings.task).test.batches(1000, device=self.device))

    @cached_property
    def calibration(self) -> list[Pair]:
        """Four batches of training images: for BatchNorm statistics, REPAIR, and activations."""
        generator = self.generator("calibration")
        batches = self.dataset(self.settings.task).train.batches(250, device=self.device, generator=generator)
        return list(islice(batches, 4))

    def order(self) -> torch.Generator:
        """Random numbers of a method, the same in each of its calls."""
        return self.generator("matching")
