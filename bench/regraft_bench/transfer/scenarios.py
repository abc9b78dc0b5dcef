"""What is compared: data, network, recipes and transfer settings of every scenario, as frozen data.

Those whose names end in ``-paper`` have the settings of "Transferring Learning Trajectories of Neural Networks"
(appendix B.3) on full-sized data and want a GPU, as ``mnist-mlp-4096`` does without one; the others are made for two
cores. Recipes are SGD with momentum 0.9 and batches of 128 unless a field says otherwise; initial values are PyTorch's
defaults. A new comparison is one entry of ``MAIN``; what is asked of several of them stands in `sweeps`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from regraft.data import CIFAR100_TRANSFER, DIGITS_HIGH, DIGITS_LOW
from regraft.networks import papers as networks
from regraft.training.loop import Recipe
from regraft_bench.study import Scenario, Task
from regraft_bench.transfer import sweeps
from regraft_bench.transfer.methods import METHODS
from regraft_bench.transfer.ports import PortSettings
from regraft_bench.transfer.setting import Pretraining, Settings

# ---------------------------------------------------------------- two cores

DIGITS_RECIPE = Recipe(epochs=30, lr=0.05, schedule="cosine")
LOOKS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233)


def after(recipe: Recipe, **changes: Any) -> Recipe:
    """The training that follows a transfer: as the source's, at "slightly small" initial rates (second version,
    appendix D.3.5, whose numbers we do not have: these are six tenths).
    """
    return replace(recipe, **{"lr": 0.6 * recipe.lr, **changes})


digits = Settings(
    task=Task("digits"),
    model=networks.mlp,
    arguments={"sizes": (64, 512, 10)},
    recipe=DIGITS_RECIPE,
    subsequent=after(DIGITS_RECIPE),
    steps=10,
    schedule="uniform",
    looks=LOOKS,
)
digits_pretrained = replace(
    digits,
    task=Task("digits", DIGITS_HIGH),
    arguments={"sizes": (64, 512, 5)},
    pretraining=Pretraining(Task("digits", DIGITS_LOW), DIGITS_RECIPE),
)
digits_conv = replace(digits, model=networks.digits_conv, arguments={"num_classes": 10})
digits_conv_half = replace(digits, model=networks.digits_conv, arguments={"num_classes": 10, "width": 0.5})
digits_resnet = replace(
    digits,
    model=networks.cifar_resnet18,
    arguments={"num_classes": 10, "width": 0.125, "in_channels": 1},
    recipe=Recipe(epochs=10, lr=0.1, weight_decay=1e-4, schedule="cosine"),
    subsequent=Recipe(epochs=10, lr=0.06, weight_decay=1e-4, schedule="cosine"),
    gradient_batches=2,
    bn_batches=10,
)
digits_resnet_fast = replace(
    digits_resnet,
    recipe=replace(digits_resnet.recipe, lr=0.3),
    subsequent=replace(digits_resnet.recipe, lr=0.18),
)
VIT_RECIPE = Recipe(epochs=30, lr=1e-3, schedule="cosine", optimizer="adam")
digits_vit = replace(
    digits,
    model=networks.vit,
    arguments={"num_classes": 10, "size": 8, "patch": 2, "width": 32, "depth": 2, "in_channels": 1},
    recipe=VIT_RECIPE,
    subsequent=after(VIT_RECIPE),
)
MNIST_RECIPE = Recipe(epochs=10, lr=0.01, schedule="constant")
mnist = Settings(
    task=Task("mnist"),
    model=networks.mlp,
    arguments={"sizes": (784, 512, 10)},
    recipe=MNIST_RECIPE,
    subsequent=after(MNIST_RECIPE, epochs=3),  # the rate is constant: ten epochs begin with these
    steps=10,
    schedule="uniform",
    looks=LOOKS,
)
mnist_pretrained = replace(
    mnist,
    task=Task("mnist", DIGITS_HIGH),
    arguments={"sizes": (784, 512, 5)},
    pretraining=Pretraining(Task("mnist", DIGITS_LOW), replace(MNIST_RECIPE, epochs=5)),
    steps=30,
)
# The papers do not speak of augmentation; on colour photographs these recipes are used with it.
CONV6_RECIPE = Recipe(epochs=12, lr=0.1, schedule="cosine", augment=True)
RESNET_RECIPE = Recipe(epochs=6, lr=0.1, weight_decay=1e-4, schedule="cosine", augment=True)
CONV8_RECIPE = Recipe(epochs=60, lr=0.05, weight_decay=1e-4, schedule="cosine", augment=True)
conv6 = Settings(
    task=Task("cifar10", size=16),
    model=networks.conv6,
    arguments={"num_classes": 10, "width": 0.5},
    recipe=CONV6_RECIPE,
    subsequent=after(CONV6_RECIPE, epochs=4),
    steps=30,
    schedule="uniform",
    looks=(20, 50, 100, 200),
)
resnet = replace(
    conv6,
    model=networks.cifar_resnet18,
    arguments={"num_classes": 10, "width": 0.25},
    recipe=RESNET_RECIPE,
    subsequent=after(RESNET_RECIPE, epochs=2),
    gradient_batches=2,
    bn_batches=20,
)
conv8 = Settings(
    task=Task("cifar10"),
    model=networks.conv8,
    arguments={"num_classes": 10, "width": 0.25},
    recipe=replace(CONV8_RECIPE, epochs=10),
    subsequent=after(CONV8_RECIPE, epochs=2),
    steps=30,
    schedule="uniform",
    gradient_batches=2,
)
conv6_pretrained = replace(
    conv6,
    task=Task("cifar100", CIFAR100_TRANSFER, size=16),
    recipe=replace(conv6.recipe, epochs=20),
    subsequent=after(conv6.recipe, epochs=20),
    pretraining=Pretraining(conv6.task, conv6.recipe),
)
conv8_pretrained = replace(
    conv8,
    task=Task("cifar100", CIFAR100_TRANSFER),
    recipe=replace(conv8.recipe, epochs=30),
    subsequent=after(conv8.recipe, epochs=30),
    gradient_batches=1,
    pretraining=Pretraining(conv8.task, conv8.recipe),
)

# ---------------------------------------------------------------- the paper's own

IMAGENET_RECIPE = Recipe(
    epochs=100, lr=0.1, weight_decay=1e-4, schedule="cosine", warmup_epochs=5, augment=True
)
CARS_RECIPE = replace(IMAGENET_RECIPE, epochs=30, warmup_epochs=0)

mnist_4096 = replace(mnist, arguments={"sizes": (784, 4096, 10)}, subsequent=after(MNIST_RECIPE, epochs=2))
conv8_paper = replace(
    conv8, arguments={"num_classes": 10}, recipe=CONV8_RECIPE, subsequent=after(CONV8_RECIPE)
)
conv8_pretrained_paper = replace(
    conv8_paper,
    task=conv8_pretrained.task,
    recipe=replace(CONV8_RECIPE, epochs=30),
    subsequent=after(CONV8_RECIPE, epochs=30),
    gradient_batches=1,
    pretraining=Pretraining(conv8.task, CONV8_RECIPE),
)
imagenet_paper = Settings(
    task=Task("imagenet"),
    model=networks.Torchvision("resnet18"),
    arguments={"num_classes": 1000},
    recipe=IMAGENET_RECIPE,
    # the first version's, for ImageNet alone: the second has no figure of it
    subsequent=Recipe(epochs=10, lr=1e-6, schedule="constant", optimizer="adam", augment=True),
    steps=30,
    schedule="uniform",
    gradient_batches=100,
    bn_batches=20,
)
cars_paper = replace(
    imagenet_paper,
    task=Task("cars"),
    recipe=CARS_RECIPE,
    subsequent=after(CARS_RECIPE),
    gradient_batches=10,
    bn_batches=2,
    pretraining=Pretraining(imagenet_paper.task, IMAGENET_RECIPE),
)

# ---------------------------------------------------------------- all of them

digits2 = replace(digits, arguments={"sizes": (64, 256, 256, 10)})
digits_pretrained2 = replace(digits_pretrained, arguments={"sizes": (64, 256, 256, 5)})

MAIN = (
    Scenario("digits-mlp", METHODS, digits, seeds=5),
    Scenario("digits-mlp2", METHODS, digits2, seeds=5),
    Scenario("digits-conv", METHODS, digits_conv, seeds=5),
    Scenario("digits-resnet", METHODS, digits_resnet),
    Scenario("digits-resnet-lr-0.3", METHODS, digits_resnet_fast),
    Scenario("digits-vit", METHODS, digits_vit),
    Scenario("digits-pretrained", METHODS, digits_pretrained, seeds=5),
    Scenario("digits-pretrained2", METHODS, digits_pretrained2, seeds=5),
    Scenario("mnist-mlp-512", METHODS, mnist),
    Scenario("mnist-pretrained", METHODS, mnist_pretrained),
    Scenario("mnist-mlp-4096", METHODS, mnist_4096),
    Scenario("cifar10-conv6", METHODS, conv6),
    Scenario("cifar100-conv6-pretrained", METHODS, conv6_pretrained),
    Scenario("cifar10-resnet", METHODS, resnet),
    Scenario("cifar10-conv8", METHODS, conv8),
    Scenario("cifar100-conv8-pretrained", METHODS, conv8_pretrained),
    Scenario("cifar10-conv8-paper", METHODS, conv8_paper),
    Scenario("cifar100-conv8-pretrained-paper", METHODS, conv8_pretrained_paper),
    Scenario("imagenet-resnet18-paper", METHODS, imagenet_paper),
    Scenario("cars-resnet18-paper", METHODS, cars_paper),
    Scenario("cub200-resnet18-paper", METHODS, replace(cars_paper, task=Task("cub200"))),
)
"""The comparison of methods, table after table."""

REGIME = (
    *sweeps.regime("mlp", digits, sweeps.MLP_WIDTHS),
    *sweeps.regime("conv", digits_conv_half, sweeps.CONV_WIDTHS),
    *sweeps.regime("resnet", digits_resnet, {}, rates=(0.03, 0.2, 0.3, 0.5)),
)
PEERS = (
    *sweeps.peers({"digits-mlp2": digits2, "digits-pretrained2": digits_pretrained2}),
    *sweeps.peers(
        {"digits-conv": digits_conv, "mnist-mlp-512": mnist, "cifar10-conv6": conv6}, train_on=False
    ),
)
SCHEDULES = tuple(
    scenario
    for name, base in {
        "mlp2": digits2,
        "conv": digits_conv_half,
        "pretrained2": digits_pretrained2,
        "cifar10": conv6,
    }.items()
    for scenario in sweeps.schedules(name, base)
)
SENSITIVITY = (*sweeps.sensitivity("mlp2", digits2), *sweeps.sensitivity("conv", digits_conv_half))
FAILURES = (*sweeps.failures("mlp2", digits2), *sweeps.far_apart("pretrained2", digits_pretrained2))
INHERITED = (
    sweeps.inherited(
        "digits",
        replace(digits_pretrained2, task=Task("digits", DIGITS_HIGH, per_class=30)),
        per_class=7,
    ),
    sweeps.inherited(
        "mnist",
        replace(
            mnist_pretrained,
            task=Task("mnist", DIGITS_HIGH, per_class=100),
            recipe=replace(MNIST_RECIPE, epochs=50),
        ),
        per_class=500,
    ),
)
ASSUMPTION = sweeps.assumption(
    {
        "mlp": digits,
        "mlp-64": replace(digits, arguments={"sizes": (64, 64, 10)}),
        "mlp-2048": replace(digits, arguments={"sizes": (64, 2048, 10)}),
        "mlp2": digits2,
        "conv": digits_conv_half,
        "resnet": digits_resnet,
        "vit": digits_vit,
        "pretrained2": digits_pretrained2,
        "mnist": mnist,
        "mnist-pretrained": mnist_pretrained,
    }
)
THEOREM = sweeps.theorem(digits)
BASINS = sweeps.basins(
    {
        "digits-mlp2": digits2,
        "digits-conv": digits_conv,
        "digits-resnet": digits_resnet,
        "digits-pretrained2": digits_pretrained2,
        "mnist-mlp-512": mnist,
        "mnist-pretrained": mnist_pretrained,
        "cifar10-conv6": conv6,
    }
)
ENSEMBLES = sweeps.ensembles(
    {"digits-mlp2": (digits2, 5), "digits-conv-half": (digits_conv_half, 5), "mnist-mlp-512": (mnist, 1)}
)
COSTS = sweeps.costs(
    {"digits-mlp": digits, "digits-conv": digits_conv, "mnist-mlp-512": mnist, "cifar10-conv6": conv6}
)
NORMALISED = sweeps.normalised(
    {
        "digits-mlp": digits,
        "digits-mlp2": digits2,
        "digits-conv": digits_conv,
        "digits-pretrained2": digits_pretrained2,
        "mnist-mlp-512": mnist,
    }
)
PORT_RECIPE = Recipe(epochs=10, lr=0.02, weight_decay=1e-4)
port_resnet = PortSettings(
    task=Task("cifar100", CIFAR100_TRANSFER, size=16),
    model=networks.residual8,
    arguments={"num_classes": 10, "width": 0.125},
    recipe=PORT_RECIPE,
    subsequent=None,
    steps=10,
    schedule="uniform",
    bn_batches=5,
    pretraining=Pretraining(Task("cifar10", size=16), replace(PORT_RECIPE, epochs=3)),
)
port_vit = replace(
    port_resnet,
    model=networks.vit,
    arguments={"num_classes": 10, "size": 16, "depth": 2},
    recipe=Recipe(epochs=10, lr=1e-3, optimizer="adam"),
    bn_batches=0,
    pretraining=Pretraining(Task("cifar10", size=16), Recipe(epochs=4, lr=1e-3, optimizer="adam")),
)
PORTS = (*sweeps.ports("resnet", port_resnet), *sweeps.ports("vit", port_vit))

SCENARIOS = (
    *MAIN,
    *PEERS,
    *REGIME,
    *SCHEDULES,
    *SENSITIVITY,
    *FAILURES,
    *INHERITED,
    *ASSUMPTION,
    *THEOREM,
    *BASINS,
    *ENSEMBLES,
    *COSTS,
    *NORMALISED,
    *PORTS,
)
