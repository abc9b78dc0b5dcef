"""What is compared: data, network, recipes and transfer settings of every scenario, as frozen data.

Those whose names end in ``-paper`` have the settings of "Transferring Learning Trajectories of Neural Networks"
(appendix B.3) on full-sized data and want a GPU, as ``mnist-mlp-4096`` does without one; the others are made for two
cores. Recipes are SGD with momentum 0.9 and batches of 128 unless a field says otherwise; initial values are PyTorch's
defaults. A new scenario is one entry of ``SCENARIOS``.
"""

from __future__ import annotations

from dataclasses import replace

from torchvision.models import resnet18

from regraft import networks
from regraft.data import CIFAR100_TRANSFER, DIGITS_HIGH, DIGITS_LOW
from regraft.studies.study import Scenario, Task
from regraft.studies.transfer.methods import METHODS, Pretraining, Settings
from regraft.training import Recipe

# ---------------------------------------------------------------- two cores

DIGITS_RECIPE = Recipe(epochs=30, lr=0.05, schedule="cosine")
# The paper trains on with Adam at 1e-4 for ten epochs, on every data set but ImageNet.
PAPER_SUBSEQUENT = Recipe(epochs=10, lr=1e-4, schedule="constant", optimizer="adam")

digits = Settings(
    task=Task("digits"),
    model=networks.mlp,
    arguments={"sizes": (64, 512, 10)},
    recipe=DIGITS_RECIPE,
    subsequent=Recipe(epochs=10, lr=0.01, schedule="cosine"),
    steps=10,
    schedule="cosine",
)
digits_pretrained = replace(
    digits,
    task=Task("digits", DIGITS_HIGH),
    arguments={"sizes": (64, 512, 5)},
    pretraining=Pretraining(Task("digits", DIGITS_LOW), DIGITS_RECIPE),
)
mnist = Settings(
    task=Task("mnist"),
    model=networks.mlp,
    arguments={"sizes": (784, 4096, 10)},
    recipe=Recipe(epochs=10, lr=0.01, schedule="constant"),
    subsequent=replace(PAPER_SUBSEQUENT, epochs=2),
    steps=10,
    schedule="uniform",
)
conv6 = Settings(
    task=Task("cifar10", size=16),
    model=networks.conv6,
    arguments={"num_classes": 10, "width": 0.5},
    recipe=Recipe(epochs=12, lr=0.1, schedule="cosine"),
    subsequent=Recipe(epochs=2, lr=0.02, schedule="cosine"),
    steps=30,
    schedule="uniform",
)
resnet = replace(
    conv6,
    model=networks.cifar_resnet18,
    arguments={"num_classes": 10, "width": 0.25},
    recipe=Recipe(epochs=6, lr=0.1, weight_decay=1e-4, schedule="cosine"),
    subsequent=Recipe(epochs=2, lr=0.02, weight_decay=1e-4, schedule="cosine"),
    gradient_batches=2,
    bn_batches=20,
)
conv8 = Settings(
    task=Task("cifar10"),
    model=networks.conv8,
    arguments={"num_classes": 10, "width": 0.25},
    recipe=Recipe(epochs=10, lr=0.05, weight_decay=1e-4, schedule="cosine"),
    subsequent=replace(PAPER_SUBSEQUENT, epochs=2),
    steps=30,
    schedule="cosine",
    gradient_batches=2,
)
conv8_pretrained = replace(
    conv8,
    task=Task("cifar100", CIFAR100_TRANSFER),
    recipe=replace(conv8.recipe, epochs=30),
    subsequent=PAPER_SUBSEQUENT,
    gradient_batches=1,
    pretraining=Pretraining(conv8.task, conv8.recipe),
)

# ---------------------------------------------------------------- the paper's own

# The paper does not speak of augmentation; on colour photographs these recipes are used with it.
CONV8_RECIPE = replace(conv8.recipe, epochs=60, augment=True)
IMAGENET_RECIPE = Recipe(
    epochs=100, lr=0.1, weight_decay=1e-4, schedule="cosine", warmup_epochs=5, augment=True
)

conv8_paper = replace(
    conv8,
    arguments={"num_classes": 10},
    recipe=CONV8_RECIPE,
    subsequent=replace(PAPER_SUBSEQUENT, augment=True),
)
conv8_pretrained_paper = replace(
    conv8_paper,
    task=conv8_pretrained.task,
    recipe=replace(CONV8_RECIPE, epochs=30),
    gradient_batches=1,
    pretraining=Pretraining(conv8.task, CONV8_RECIPE),
)
imagenet_paper = Settings(
    task=Task("imagenet"),
    model=resnet18,
    arguments={"num_classes": 1000},
    recipe=IMAGENET_RECIPE,
    subsequent=replace(PAPER_SUBSEQUENT, lr=1e-6, augment=True),
    steps=30,
    schedule="cosine",
    gradient_batches=100,
    bn_batches=20,
)
cars_paper = replace(
    imagenet_paper,
    task=Task("cars"),
    recipe=replace(IMAGENET_RECIPE, epochs=30, warmup_epochs=0),
    subsequent=replace(PAPER_SUBSEQUENT, augment=True),
    gradient_batches=10,
    bn_batches=2,
    pretraining=Pretraining(imagenet_paper.task, IMAGENET_RECIPE),
)

# ---------------------------------------------------------------- all of them

SCENARIOS = (
    Scenario("digits-mlp", METHODS, digits, seeds=5),
    Scenario("digits-mlp2", METHODS, replace(digits, arguments={"sizes": (64, 256, 256, 10)}), seeds=5),
    Scenario(
        "digits-conv",
        METHODS,
        replace(digits, model=networks.digits_conv, arguments={"num_classes": 10}),
        seeds=5,
    ),
    Scenario("digits-pretrained", METHODS, digits_pretrained, seeds=5),
    Scenario(
        "digits-pretrained2",
        METHODS,
        replace(digits_pretrained, arguments={"sizes": (64, 256, 256, 5)}),
        seeds=5,
    ),
    Scenario("mnist-mlp-512", METHODS, replace(mnist, arguments={"sizes": (784, 512, 10)})),
    Scenario("mnist-mlp-4096", METHODS, mnist),
    Scenario("cifar10-conv6", METHODS, conv6),
    Scenario("cifar10-resnet", METHODS, resnet),
    Scenario("cifar10-conv8", METHODS, conv8),
    Scenario("cifar100-conv8-pretrained", METHODS, conv8_pretrained),
    Scenario("cifar10-conv8-paper", METHODS, conv8_paper),
    Scenario("cifar100-conv8-pretrained-paper", METHODS, conv8_pretrained_paper),
    Scenario("imagenet-resnet18-paper", METHODS, imagenet_paper),
    Scenario("cars-resnet18-paper", METHODS, cars_paper),
    Scenario("cub200-resnet18-paper", METHODS, replace(cars_paper, task=Task("cub200"))),
)
