"""Data, network, recipes and transfer settings by name, as frozen data: what scenarios are made of.

Those whose names end in ``-paper`` have the settings of "Transferring Learning Trajectories of Neural Networks"
(appendix B.3) on full-sized data and want a GPU, as ``mnist-mlp-4096`` does without one; the others are made for two
cores. Recipes are SGD with momentum 0.9 and batches of 128 unless a field says otherwise; initial values are PyTorch's
defaults.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from regraft.data import CIFAR100_TRANSFER, DIGITS_HIGH, DIGITS_LOW
from regraft.networks import papers as networks
from regraft.training.loop import Recipe
from regraft_bench.study import Task
from regraft_bench.text import STANDARD_LIBRARY, text_transformer
from regraft_bench.transfer.setting import Branching, PortSettings, Pretraining, Stage, TransferSettings


def follow(recipe: Recipe, **changes: Any) -> Recipe:
    """The training that follows a transfer: as the source's, at "slightly small" initial rates (second version,
    appendix D.3.5, whose numbers we do not have: these are six tenths).
    """
    return replace(recipe, **{"lr": 0.6 * recipe.lr, **changes})


# ---------------------------------------------------------------- two cores

digits_recipe = Recipe(epochs=30, lr=0.05, schedule="cosine")
digits_mlp = TransferSettings(
    task=Task("digits"),
    model=networks.mlp,
    arguments={"sizes": (64, 512, 10)},
    recipe=digits_recipe,
    subsequent=follow(digits_recipe),
    steps=10,
    schedule="uniform",
    eval_steps=(1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233),
)
digits_pretrained = replace(
    digits_mlp,
    task=Task("digits", DIGITS_HIGH),
    arguments={"sizes": (64, 512, 5)},
    pretraining=Pretraining(Task("digits", DIGITS_LOW), digits_recipe),
)
digits_resnet = replace(
    digits_mlp,
    model=networks.cifar_resnet18,
    arguments={"num_classes": 10, "width": 0.125, "in_channels": 1},
    recipe=Recipe(epochs=10, lr=0.1, weight_decay=1e-4, schedule="cosine"),
    subsequent=Recipe(epochs=10, lr=0.06, weight_decay=1e-4, schedule="cosine"),
    gradient_batches=2,
    bn_batches=10,
)
vit_recipe = Recipe(epochs=30, lr=1e-3, schedule="cosine", optimizer="adam")
digits_vit = replace(
    digits_mlp,
    model=networks.vit,
    arguments={"num_classes": 10, "size": 8, "patch": 2, "width": 32, "depth": 2, "in_channels": 1},
    recipe=vit_recipe,
    subsequent=follow(vit_recipe),
)
mnist_recipe = Recipe(epochs=10, lr=0.01, schedule="constant")
mnist_mlp = replace(
    digits_mlp,
    task=Task("mnist"),
    arguments={"sizes": (784, 512, 10)},
    recipe=mnist_recipe,
    subsequent=follow(mnist_recipe, epochs=3),  # the rate is constant: ten epochs begin with these
)
mnist_pretrained = replace(
    mnist_mlp,
    task=Task("mnist", DIGITS_HIGH),
    arguments={"sizes": (784, 512, 5)},
    pretraining=Pretraining(Task("mnist", DIGITS_LOW), replace(mnist_recipe, epochs=5)),
    steps=30,
)
# The papers do not speak of augmentation; on colour photographs these recipes are used with it.
conv6_recipe = Recipe(epochs=12, lr=0.1, schedule="cosine", augment=True)
resnet_recipe = Recipe(epochs=6, lr=0.1, weight_decay=1e-4, schedule="cosine", augment=True)
conv8_recipe = Recipe(epochs=60, lr=0.05, weight_decay=1e-4, schedule="cosine", augment=True)
cifar10_conv6 = TransferSettings(
    task=Task("cifar10", size=16),
    model=networks.conv6,
    arguments={"num_classes": 10, "width": 0.5},
    recipe=conv6_recipe,
    subsequent=follow(conv6_recipe, epochs=4),
    steps=30,
    schedule="uniform",
    eval_steps=(20, 50, 100, 200),
)
cifar10_resnet = replace(
    cifar10_conv6,
    model=networks.cifar_resnet18,
    arguments={"num_classes": 10, "width": 0.25},
    recipe=resnet_recipe,
    subsequent=follow(resnet_recipe, epochs=2),
    gradient_batches=2,
    bn_batches=20,
)
cifar10_conv8 = TransferSettings(
    task=Task("cifar10"),
    model=networks.conv8,
    arguments={"num_classes": 10, "width": 0.25},
    recipe=replace(conv8_recipe, epochs=10),
    subsequent=follow(conv8_recipe, epochs=2),
    steps=30,
    schedule="uniform",
    gradient_batches=2,
)
cifar100_conv6 = replace(
    cifar10_conv6,
    task=Task("cifar100", CIFAR100_TRANSFER, size=16),
    recipe=replace(conv6_recipe, epochs=20),
    subsequent=follow(conv6_recipe, epochs=20),
    pretraining=Pretraining(cifar10_conv6.task, conv6_recipe),
)
cifar100_conv8 = replace(
    cifar10_conv8,
    task=Task("cifar100", CIFAR100_TRANSFER),
    recipe=replace(conv8_recipe, epochs=30),
    subsequent=follow(conv8_recipe, epochs=30),
    gradient_batches=1,
    pretraining=Pretraining(cifar10_conv8.task, cifar10_conv8.recipe),
)

# ---------------------------------------------------------------- the paper's own

imagenet_recipe = Recipe(epochs=100, lr=0.1, weight_decay=1e-4, schedule="cosine", warmup_epochs=5, augment=True)
imagenet_paper = TransferSettings(
    task=Task("imagenet"),
    model=networks.Torchvision("resnet18"),
    arguments={"num_classes": 1000},
    recipe=imagenet_recipe,
    # the first version's, for ImageNet alone: the second has no figure of it
    subsequent=Recipe(epochs=10, lr=1e-6, schedule="constant", optimizer="adam", augment=True),
    steps=30,
    schedule="uniform",
    gradient_batches=100,
    bn_batches=20,
)
cars_recipe = replace(imagenet_recipe, epochs=30, warmup_epochs=0)
cars_paper = replace(
    imagenet_paper,
    task=Task("cars"),
    recipe=cars_recipe,
    subsequent=follow(cars_recipe),
    gradient_batches=10,
    bn_batches=2,
    pretraining=Pretraining(imagenet_paper.task, imagenet_recipe),
)

# ---------------------------------------------------------------- all of them

BASES = {
    "digits-mlp": digits_mlp,
    "digits-mlp2": replace(digits_mlp, arguments={"sizes": (64, 256, 256, 10)}),
    "digits-conv": replace(digits_mlp, model=networks.digits_conv, arguments={"num_classes": 10}),
    "digits-resnet": digits_resnet,
    "digits-resnet-lr-0.3": replace(
        digits_resnet,
        recipe=replace(digits_resnet.recipe, lr=0.3),
        subsequent=replace(digits_resnet.recipe, lr=0.18),
    ),
    "digits-vit": digits_vit,
    "digits-pretrained": digits_pretrained,
    "digits-pretrained2": replace(digits_pretrained, arguments={"sizes": (64, 256, 256, 5)}),
    "mnist-mlp-512": mnist_mlp,
    "mnist-pretrained": mnist_pretrained,
    "mnist-mlp-4096": replace(
        mnist_mlp, arguments={"sizes": (784, 4096, 10)}, subsequent=follow(mnist_recipe, epochs=2)
    ),
    "cifar10-conv6": cifar10_conv6,
    "cifar100-conv6-pretrained": cifar100_conv6,
    "cifar10-resnet": cifar10_resnet,
    "cifar10-conv8": cifar10_conv8,
    "cifar100-conv8-pretrained": cifar100_conv8,
    "cifar10-conv8-paper": replace(
        cifar10_conv8, arguments={"num_classes": 10}, recipe=conv8_recipe, subsequent=follow(conv8_recipe)
    ),
    "cifar100-conv8-pretrained-paper": replace(
        cifar100_conv8,
        arguments={"num_classes": 10},
        pretraining=Pretraining(cifar10_conv8.task, conv8_recipe),
    ),
    "imagenet-resnet18-paper": imagenet_paper,
    "cars-resnet18-paper": cars_paper,
    "cub200-resnet18-paper": replace(cars_paper, task=Task("cub200")),
}
"""What all methods are compared on, a scenario each."""

digits_conv_half = replace(BASES["digits-conv"], arguments={"num_classes": 10, "width": 0.5})
"""A smaller one, for questions that want many trainings."""

# ---------------------------------------------------------------- ports

port_recipe = Recipe(epochs=10, lr=0.02, weight_decay=1e-4)
port_resnet = PortSettings(
    task=Task("cifar100", CIFAR100_TRANSFER, size=16),
    model=networks.residual8,
    arguments={"num_classes": 10, "width": 0.125},
    recipe=port_recipe,
    subsequent=None,
    steps=10,
    schedule="uniform",
    bn_batches=5,
    pretraining=Pretraining(Task("cifar10", size=16), replace(port_recipe, epochs=3)),
)
port_vit = replace(
    port_resnet,
    model=networks.vit,
    arguments={"num_classes": 10, "size": 16, "depth": 2},
    recipe=Recipe(epochs=10, lr=1e-3, optimizer="adam"),
    bn_batches=0,
    pretraining=Pretraining(Task("cifar10", size=16), Recipe(epochs=4, lr=1e-3, optimizer="adam")),
)
PORT_BASES = {"resnet": port_resnet, "vit": port_vit}

# ---------------------------------------------------------------- ports between related bases


def schedule_stages(task: Task, recipe: Recipe) -> tuple[Stage, ...]:
    """A pre-training of ten epochs in five stages, which end after 10, 30, 60, 90 and 100 % of it."""
    parts = ((1, 1.0), (2, 1.0), (3, 1.0), (3, 0.5), (1, 0.1))
    return tuple(
        Stage(task, replace(recipe, epochs=epochs, lr=share * recipe.lr, schedule="constant"))
        for epochs, share in parts
    )


def relate(half: Task, recipe: Recipe) -> dict[str, Branching]:
    """The ladder from a base of its own seed to one that left the old one late, and old bases trained further.

    half: the task of the pre-training, with half as many images of each class as there are.
    """
    assert half.per_class is not None
    stages, again = schedule_stages(half, recipe), Stage(half, replace(recipe, epochs=10))
    few = replace(half, classes=(half.classes or tuple(range(10)))[:5], per_class=2 * half.per_class)
    on_few = tuple(replace(stage, task=few) for stage in stages)
    augmented = replace(again, recipe=replace(again.recipe, augment=True))
    return {
        "independent": Branching(stages, None, stages),
        **{f"{share}%": Branching(stages, n, stages[n:]) for n, share in enumerate((0, 10, 30, 60, 90))},
        "twice": Branching(stages, len(stages), (again,)),
        "other-images": Branching(stages, len(stages), (replace(again, others=True),)),
        "augmented": Branching(stages, len(stages), (augmented,)),
        "four-times": Branching(stages, len(stages), (again,) * 3),
        "more-classes": Branching(on_few, len(stages), (again,)),
    }


TEXT_PRETRAINING = (
    *("_pydecimal", "turtle", "inspect", "typing", "pydoc"),
    *("tarfile", "doctest", "argparse", "_pyio", "pickletools"),
)
TEXT_FINE_TUNING = (
    *("zipfile", "datetime", "subprocess", "difflib", "enum"),
    *("mailbox", "ipaddress", "pickle", "pdb", "ast"),
)
FEW_TO_MANY = (1, 5, 50, 200)
text_recipe = Recipe(epochs=10, lr=2e-3, optimizer="adam")
RELATED_NETWORKS = {
    "resnet": replace(port_resnet, images=FEW_TO_MANY),
    "vit": replace(port_vit, images=FEW_TO_MANY),
    "text": replace(
        port_vit,
        images=FEW_TO_MANY,
        task=Task(STANDARD_LIBRARY, TEXT_FINE_TUNING),
        model=text_transformer,
        arguments={"num_classes": 10},
        recipe=replace(text_recipe, epochs=6, lr=1e-3),
    ),
}
CIFAR10_PART = Task("cifar10", size=16, per_class=900)
LADDER = ("independent", "0%", "10%", "30%", "60%", "90%")
TRAINED_FURTHER = ("twice", "other-images", "four-times", "more-classes", "augmented")
RELATED_BASES = {
    f"{name}-{relation}": replace(RELATED_NETWORKS[name], pretraining=branching)
    for name, half, recipe, left_out in (
        ("resnet", CIFAR10_PART, port_recipe, ()),
        ("vit", CIFAR10_PART, port_vit.recipe, ("10%", "60%", "four-times", "more-classes", "augmented")),
        ("text", Task(STANDARD_LIBRARY, TEXT_PRETRAINING, per_class=320), text_recipe, ("four-times", "augmented")),
    )
    for relation, branching in relate(half, recipe).items()
    if relation not in left_out
}
"""A fine-tune's base and the new base, by how the two are related: network-relation. The transformers have fewer."""
