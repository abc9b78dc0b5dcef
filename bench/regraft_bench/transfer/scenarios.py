"""What is compared: a scenario is a question, the methods that it is asked of, and settings.

A new comparison of all methods is one entry of `bases.BASES`; what else is asked of these settings is one entry here,
and the names of its scenarios begin with the question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from regraft.data import DIGITS_HIGH, DIGITS_LOW
from regraft_bench.study import Method, Scenario, Task
from regraft_bench.transfer.bases import (
    BASES,
    PORT_BASES,
    RELATED_BASES,
    RELATED_NETWORKS,
    digits_conv_half,
    digits_recipe,
    follow,
    mnist_recipe,
)
from regraft_bench.transfer.methods.assumption import FIRST_GRADIENTS, UPDATES
from regraft_bench.transfer.methods.cost import COUNTS
from regraft_bench.transfer.methods.ensembles import ENSEMBLES
from regraft_bench.transfer.methods.label_free import FITTED, related_methods
from regraft_bench.transfer.methods.landscape import LINES, PLANE
from regraft_bench.transfer.methods.leads import LEADS
from regraft_bench.transfer.methods.peers import PEERS
from regraft_bench.transfer.methods.ports import port_methods
from regraft_bench.transfer.methods.transfers import TRANSFERS
from regraft_bench.transfer.setting import TransferSettings

Scenarios = tuple[Scenario, ...]
Named = Mapping[str, TransferSettings]
Changes = Mapping[str, Mapping[str, Any]]


def ask(
    question: str, methods: tuple[Method, ...], settings: Named, seeds: int = 3, *, subsequent: bool = False
) -> Scenarios:
    """One scenario, question-name, for each of the settings.

    subsequent: with the training that follows a transfer, where they have any.
    """
    changes: dict[str, Any] = {} if subsequent else {"subsequent": None, "eval_steps": ()}
    return tuple(
        Scenario(f"{question}-{name}", methods, replace(own, **changes), seeds) for name, own in settings.items()
    )


def bases(*names: str) -> Named:
    return {name: BASES[name] for name in names}


def vary(name: str, base: TransferSettings, changes: Changes) -> Named:
    """The base's variants, as name-variant."""
    return {f"{name}-{variant}": replace(base, **change) for variant, change in changes.items()}


def list_names(scenarios: Sequence[Scenario]) -> tuple[str, ...]:
    return tuple(scenario.name for scenario in scenarios)


def pick_methods(*names: str) -> tuple[Method, ...]:
    return tuple(method for method in TRANSFERS if method.name in names)


def pretrain(base: TransferSettings, **changes: Any) -> dict[str, Any]:
    """A change: of the base's pre-training."""
    assert base.pretraining is not None
    return {"pretraining": replace(base.pretraining, **changes)}


digits, digits2, pretrained2 = (BASES[f"digits-{name}"] for name in ("mlp", "mlp2", "pretrained2"))
conv_half, resnet = digits_conv_half, BASES["digits-resnet"]
FIVE_METHODS = pick_methods("plain", "naive", "weights", "oracle", "fgmt")
FIVE_SEEDS = ("digits-mlp", "digits-mlp2", "digits-conv", "digits-pretrained", "digits-pretrained2")

COMPARISONS = tuple(Scenario(name, TRANSFERS, base, 5 if name in FIVE_SEEDS else 3) for name, base in BASES.items())
"""The comparison of methods, table after table."""

DIGITS_BATCHNORM = Scenario(
    "digits-batchnorm",
    pick_methods("plain", "naive", "weights", "fgmt"),
    replace(
        resnet,
        arguments={"num_classes": 10, "width": 0.0625, "in_channels": 1},
        recipe=replace(resnet.recipe, epochs=2),
        subsequent=None,
        eval_steps=(),
        steps=3,
        gradient_batches=1,
        bn_batches=2,
    ),
    seeds=2,
)
"""For the quick bench: a network that computes otherwise in training mode than in evaluation mode."""

PEER_COMPARISONS = tuple(
    Scenario(f"peers-{name}", (*TRANSFERS, *PEERS), settings, seeds)
    for name, settings, seeds in (
        ("digits-mlp2", digits2, 5),
        ("digits-pretrained2", pretrained2, 5),
        ("digits-conv", replace(BASES["digits-conv"], subsequent=None), 5),
        ("mnist-mlp-512", replace(BASES["mnist-mlp-512"], subsequent=None), 3),
        ("cifar10-conv6", replace(BASES["cifar10-conv6"], subsequent=None), 3),
    )
)
"""Every other thing that one could do with a finished source."""

# ---------------------------------------------------------------- when it works, and what each setting does


def regimes(base: TransferSettings, widths: Changes, rates: Sequence[float] = (0.005, 0.02, 0.1, 0.2)) -> Changes:
    """Four ways to change |Delta| / |theta_1^0|: initial scale, learning rate, epochs, width."""
    recipe = base.recipe
    he = 6**0.5  # times PyTorch's default deviation: He's, 2 / fan_in instead of 1 / (3 fan_in)
    epochs = [count for count in (3, 10, 90) if count != recipe.epochs]
    return {
        "base": {},
        **{f"init-{scale:.3g}": {"init_scale": scale} for scale in (0.25, 0.5, 1.5, he, 4)},
        **{f"lr-{lr:g}": {"recipe": replace(recipe, lr=lr)} for lr in rates},
        **{f"epochs-{count}": {"recipe": replace(recipe, epochs=count)} for count in epochs},
        **widths,
    }


def resize(key: str, sizes: Mapping[float, Any], **arguments: Any) -> Changes:
    return {f"width-{width:g}": {"arguments": {**arguments, key: size}} for width, size in sizes.items()}


MLP_WIDTHS = resize("sizes", {width: (64, width, 10) for width in (32, 64, 128, 2048)})
CONV_WIDTHS = resize("width", {width: width for width in (0.25, 1)}, num_classes=10)
REGIMES = ask(
    "regime",
    FIVE_METHODS,
    {
        **vary("mlp", digits, regimes(digits, MLP_WIDTHS)),
        **vary("conv", conv_half, regimes(conv_half, CONV_WIDTHS)),
        **vary("resnet", resnet, regimes(resnet, {}, (0.03, 0.2, 0.3, 0.5))),
    },
)

SPACINGS: Changes = {schedule: {"schedule": schedule} for schedule in ("uniform", "cosine", "recorded")}
"""Uniform and cosine spacing, and the source's own checkpoints (first version, figure 3; second, appendix E.1)."""
PATHS = ask(
    "schedule",
    pick_methods("naive", "fgmt", "gmt"),
    {
        **vary("mlp2", digits2, SPACINGS),
        **vary("conv", conv_half, SPACINGS),
        **vary("pretrained2", pretrained2, SPACINGS),
        **vary("cifar10", BASES["cifar10-conv6"], SPACINGS),
    },
    seeds=5,
)

ONE_SETTING: Changes = {
    "base": {},
    **{f"T-{steps}": {"steps": steps} for steps in (1, 2, 5, 20, 30)},
    **{f"batches-{count}": {"gradient_batches": count} for count in (2, 4, 8)},
    **{f"size-{size}": {"gradient_batch": size} for size in (16, 32, 512)},
    "identity": {"from_identity": True},
}
"""T, batches a gradient, their size, and the start of each matching."""
SENSITIVITY = ask(
    "sensitivity",
    pick_methods("fgmt", "gmt"),
    {**vary("mlp2", digits2, ONE_SETTING), **vary("conv", conv_half, ONE_SETTING)},
)

# ---------------------------------------------------------------- where it fails, and what is inherited

OTHER_SOURCES: Changes = {
    "base": {},
    "data-tenth": {"source_task": Task("digits", per_class=14)},
    "data-other": {"source_task": Task("mnist", size=8, per_class=140)},
    "lr-0.1x": {"source_recipe": replace(digits_recipe, lr=0.1 * digits_recipe.lr)},
    "lr-4x": {"source_recipe": replace(digits_recipe, lr=4 * digits_recipe.lr)},
}
"""The source learned from other data, or at another rate."""
OTHER_PRETRAININGS: Changes = {
    "base": {},
    "short": pretrain(pretrained2, source_recipe=replace(digits_recipe, epochs=1)),
    "classes": pretrain(pretrained2, source_task=Task("digits", (0, 1, 2, 5, 6))),
    "images": pretrain(pretrained2, source_task=Task("mnist", DIGITS_LOW, 8, per_class=140)),
}
"""The source's pre-training was shorter, or on other classes, or on other images."""
FAILURES = ask(
    "fails",
    FIVE_METHODS,
    {**vary("mlp2", digits2, OTHER_SOURCES), **vary("pretrained2", pretrained2, OTHER_PRETRAININGS)},
    seeds=5,
)

INHERITANCE = ask(
    "inherits",
    pick_methods("plain", "naive", "oracle", "fgmt", "gmt"),
    {
        "digits": replace(
            pretrained2,
            task=Task("digits", DIGITS_HIGH, per_class=30),
            **pretrain(pretrained2, source_task=Task("digits", DIGITS_LOW, per_class=7)),
        ),
        "mnist": replace(
            BASES["mnist-pretrained"],
            task=Task("mnist", DIGITS_HIGH, per_class=100),
            recipe=replace(mnist_recipe, epochs=50),
            **pretrain(BASES["mnist-pretrained"], source_task=Task("mnist", DIGITS_LOW, per_class=500)),
        ),
    },
    seeds=5,
)
"""The source was pre-trained on few images, the target on all (second version, figure 8)."""

# ---------------------------------------------------------------- why it works

ASSUMPTION = ask(
    "assumption",
    UPDATES,
    {
        "mlp": digits,
        "mlp-64": replace(digits, arguments={"sizes": (64, 64, 10)}),
        "mlp-2048": replace(digits, arguments={"sizes": (64, 2048, 10)}),
        "mlp2": digits2,
        "conv": conv_half,
        "resnet": resnet,
        "vit": BASES["digits-vit"],
        "pretrained2": pretrained2,
        "mnist": BASES["mnist-mlp-512"],
        "mnist-pretrained": BASES["mnist-pretrained"],
    },
)
"""Assumption (P) along two trainings (second version, figure 3)."""

SIDES = (2, 4, 8)
"""Of an image, in pixels."""
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
THEOREM = ask(
    "theorem",
    FIRST_GRADIENTS,
    {
        f"{side}x{side}-{width}": replace(
            digits, task=Task("digits", size=side), arguments={"sizes": (side * side, width, 10)}
        )
        for side in SIDES
        for width in WIDTHS
    },
    seeds=5,
)
"""Theorem A.1 over the width, at several numbers of inputs (the images' pixels)."""

BASINS = ask(
    "basin",
    (*LINES, PLANE),
    bases(
        *("digits-mlp2", "digits-conv", "digits-resnet", "digits-pretrained2"),
        *("mnist-mlp-512", "mnist-pretrained", "cifar10-conv6"),
    ),
    subsequent=True,
)
"""Lines and one plane of loss (first version, figure 6; second, figure 7)."""

# ---------------------------------------------------------------- ensembles, costs, leads, ports

ENSEMBLE_COMPARISONS = ask(
    "ensemble",
    ENSEMBLES,
    {
        name: replace(base, subsequent=follow(base.recipe, epochs=epochs), eval_steps=())
        for name, base, epochs in (
            ("digits-mlp2", digits2, 5),
            ("digits-conv-half", conv_half, 5),
            ("mnist-mlp-512", BASES["mnist-mlp-512"], 1),
        )
    },
    subsequent=True,
)
"""Members that are trained on for so many epochs only (second version, appendix E.2)."""

COSTS = ask("cost", COUNTS, bases("digits-mlp", "digits-conv", "mnist-mlp-512", "cifar10-conv6"))
"""Gradients, operations and seconds of each method."""

LEAD_METHODS = (*pick_methods("naive", "fgmt", "gmt"), *LEADS)
DIGITS = bases("digits-mlp", "digits-mlp2", "digits-conv", "digits-pretrained2")
NORMALISED = (
    *ask("normalised", LEAD_METHODS, DIGITS, seeds=10),
    *ask("normalised", LEAD_METHODS, bases("mnist-mlp-512"), seeds=5),
)
"""A lead of ours, and the two methods that it comes from."""


def ask_ports(name: str) -> Scenarios:
    """A fine-tune moved to a new base: ten classes of CIFAR-100, digits in colour, and a base that saw half as much."""
    base = PORT_BASES[name]
    changes: Changes = {
        "cifar100": {},
        "mnist": {"task": Task("mnist", size=16, channels=3, per_class=450)},
        "cifar100-half": pretrain(base, source_task=Task("cifar10", size=16, per_class=2250)),
    }
    rates = [share * base.recipe.lr for share in (0.3, 1.0, 3.0, 10.0)]
    return ask("port", (*port_methods(rates), *FITTED), vary(name, base, changes))


PORTS = (*ask_ports("resnet"), *ask_ports("vit"))


def ask_related(network: str) -> Scenarios:
    """A fine-tune moved to a base that is related to its own, without labels."""
    settings = {name: base for name, base in RELATED_BASES.items() if name.startswith(network)}
    few_shot_rate = 3 * RELATED_NETWORKS[network].recipe.lr  # what was the best in all scenarios of `PORTS`
    return ask("related", related_methods(few_shot_rate), settings)


RELATED_PORTS = (*ask_related("resnet"), *ask_related("vit"), *ask_related("text"))

TRANSFER_SCENARIOS = (
    *COMPARISONS,
    DIGITS_BATCHNORM,
    *PEER_COMPARISONS,
    *REGIMES,
    *PATHS,
    *SENSITIVITY,
    *FAILURES,
    *INHERITANCE,
    *ASSUMPTION,
    *THEOREM,
    *BASINS,
    *ENSEMBLE_COMPARISONS,
    *COSTS,
    *NORMALISED,
    *PORTS,
    *RELATED_PORTS,
)
