"""What is measured: data, network, recipes and transfer settings of every scenario, as frozen data.

Those whose names end in ``-paper`` have the settings of "Transferring Learning Trajectories of Neural
Networks" (appendix B.3) on full-sized data and want a GPU, as ``mnist-mlp-4096`` does without one; the
others are made for two cores. Recipes are SGD with momentum 0.9 and batches of 128 unless a field says
otherwise. A path has steps as long as the learning rate was: cosine where training used a cosine schedule,
uniform where it was constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torchvision.models import resnet18

from regraft import models
from regraft.data import CIFAR100_TRANSFER, DIGITS_HIGH, DIGITS_LOW
from regraft.training import Recipe


@dataclass(frozen=True)
class Task:
    """A data set, or some classes of one: names for :func:`regraft.data.load`."""

    data: str
    classes: tuple[int | str, ...] | None = None


@dataclass(frozen=True)
class Pretraining:
    """What both networks learn, each from its own seed, before the trajectory that is transferred begins."""

    task: Task
    recipe: Recipe


@dataclass(frozen=True)
class Scenario:
    """Source and target differ only in the seed of their initial values and of their data order.

    ``model(**arguments)`` makes the network that is initialised; after pre-training it gets a new head for
    the task. ``recipe`` is plain training, of the source and of the target; ``subsequent`` is the training
    that follows a transfer. ``steps`` is T of the linear path, ``schedule`` its spacing;
    ``gradient_batches`` are averaged in one gradient, ``bn_batches`` re-estimate BatchNorm statistics.
    ``seeds`` is how many a run takes unless told otherwise.
    """

    name: str
    task: Task
    model: Callable[..., nn.Module]
    recipe: Recipe
    subsequent: Recipe
    steps: int
    schedule: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    gradient_batches: int = 1
    bn_batches: int = 0
    pretraining: Pretraining | None = None
    seeds: int = 3


# ---------------------------------------------------------------- two cores

DIGITS = Task("digits")
DIGITS_LOW_TASK = Task("digits", DIGITS_LOW)
DIGITS_HIGH_TASK = Task("digits", DIGITS_HIGH)
MNIST = Task("mnist")
CIFAR10 = Task("cifar10")
CIFAR100_SUBSET = Task("cifar100", CIFAR100_TRANSFER)

DIGITS_RECIPE = Recipe(epochs=30, lr=0.05, schedule="cosine")
DIGITS_SUBSEQUENT = Recipe(epochs=10, lr=0.01, schedule="cosine")
# The paper trains on with Adam at 1e-4 for ten epochs, on every data set but ImageNet.
PAPER_SUBSEQUENT = Recipe(epochs=10, lr=1e-4, schedule="constant", optimizer="adam")

digits_mlp = Scenario(
    name="digits-mlp",
    task=DIGITS,
    model=models.mlp,
    arguments={"sizes": (64, 512, 10)},
    recipe=DIGITS_RECIPE,
    subsequent=DIGITS_SUBSEQUENT,
    steps=10,
    schedule="cosine",
    seeds=5,
)
digits_mlp2 = replace(digits_mlp, name="digits-mlp2", arguments={"sizes": (64, 256, 256, 10)})
digits_conv = replace(digits_mlp, name="digits-conv", model=models.digits_conv, arguments={"num_classes": 10})

digits_pretrained = replace(
    digits_mlp,
    name="digits-pretrained",
    task=DIGITS_HIGH_TASK,
    arguments={"sizes": (64, 512, 5)},
    pretraining=Pretraining(DIGITS_LOW_TASK, DIGITS_RECIPE),
)
digits_pretrained2 = replace(
    digits_pretrained, name="digits-pretrained2", arguments={"sizes": (64, 256, 256, 5)}
)

mnist_mlp_4096 = Scenario(
    name="mnist-mlp-4096",
    task=MNIST,
    model=models.mlp,
    arguments={"sizes": (784, 4096, 10)},
    recipe=Recipe(epochs=10, lr=0.01, schedule="constant"),
    subsequent=replace(PAPER_SUBSEQUENT, epochs=2),
    steps=10,
    schedule="uniform",
)
mnist_mlp_512 = replace(mnist_mlp_4096, name="mnist-mlp-512", arguments={"sizes": (784, 512, 10)})

cifar10_conv8 = Scenario(
    name="cifar10-conv8",
    task=CIFAR10,
    model=models.conv8,
    arguments={"num_classes": 10, "width": 0.25},
    recipe=Recipe(epochs=10, lr=0.05, weight_decay=1e-4, schedule="cosine"),
    subsequent=replace(PAPER_SUBSEQUENT, epochs=2),
    steps=30,
    schedule="cosine",
    gradient_batches=2,
)
cifar100_conv8_pretrained = replace(
    cifar10_conv8,
    name="cifar100-conv8-pretrained",
    task=CIFAR100_SUBSET,
    recipe=replace(cifar10_conv8.recipe, epochs=30),
    subsequent=PAPER_SUBSEQUENT,
    gradient_batches=1,
    pretraining=Pretraining(CIFAR10, cifar10_conv8.recipe),
)

# ---------------------------------------------------------------- the paper's own

# The paper does not speak of augmentation; on colour photographs these recipes are used with it.
CONV8_RECIPE = Recipe(epochs=60, lr=0.05, weight_decay=1e-4, schedule="cosine", augment=True)
IMAGENET_RECIPE = Recipe(
    epochs=100, lr=0.1, weight_decay=1e-4, schedule="cosine", warmup_epochs=5, augment=True
)
IMAGENET = Task("imagenet")

cifar10_conv8_paper = replace(
    cifar10_conv8,
    name="cifar10-conv8-paper",
    arguments={"num_classes": 10},
    recipe=CONV8_RECIPE,
    subsequent=replace(PAPER_SUBSEQUENT, augment=True),
)
cifar100_conv8_pretrained_paper = replace(
    cifar10_conv8_paper,
    name="cifar100-conv8-pretrained-paper",
    task=CIFAR100_SUBSET,
    recipe=replace(CONV8_RECIPE, epochs=30),
    gradient_batches=1,
    pretraining=Pretraining(CIFAR10, CONV8_RECIPE),
)
imagenet_resnet18_paper = Scenario(
    name="imagenet-resnet18-paper",
    task=IMAGENET,
    model=resnet18,
    arguments={"num_classes": 1000},
    recipe=IMAGENET_RECIPE,
    subsequent=replace(PAPER_SUBSEQUENT, lr=1e-6, augment=True),
    steps=30,
    schedule="cosine",
    gradient_batches=100,
    bn_batches=20,
)
cars_resnet18_paper = replace(
    imagenet_resnet18_paper,
    name="cars-resnet18-paper",
    task=Task("cars"),
    recipe=replace(IMAGENET_RECIPE, epochs=30, warmup_epochs=0),
    subsequent=replace(PAPER_SUBSEQUENT, augment=True),
    gradient_batches=10,
    bn_batches=2,
    pretraining=Pretraining(IMAGENET, IMAGENET_RECIPE),
)
cub200_resnet18_paper = replace(
    cars_resnet18_paper,
    name="cub200-resnet18-paper",
    task=Task("cub200"),
)

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        digits_mlp,
        digits_mlp2,
        digits_conv,
        digits_pretrained,
        digits_pretrained2,
        mnist_mlp_512,
        mnist_mlp_4096,
        cifar10_conv8,
        cifar100_conv8_pretrained,
        cifar10_conv8_paper,
        cifar100_conv8_pretrained_paper,
        imagenet_resnet18_paper,
        cars_resnet18_paper,
        cub200_resnet18_paper,
    )
}
DEFAULT = (digits_mlp.name,)
