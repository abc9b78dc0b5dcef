"""One question asked of several scenarios: when does transfer work, how much depends on each setting, and so on.

Each function makes the scenarios of one question from settings of a comparison; their names begin with the question.
Nothing is trained on after a transfer here, but where that is the question; trainings are shared through the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from regraft_bench.study import Method, Scenario, Task
from regraft_bench.transfer.assumption import FIRST_GRADIENTS, UPDATES
from regraft_bench.transfer.cost import COUNTED
from regraft_bench.transfer.ensembles import ENSEMBLES
from regraft_bench.transfer.landscape import LINES, PLANE
from regraft_bench.transfer.leads import LEADS
from regraft_bench.transfer.methods import METHODS
from regraft_bench.transfer.peers import PEERS
from regraft_bench.transfer.ports import PortSettings
from regraft_bench.transfer.ports import methods as port_methods
from regraft_bench.transfer.setting import Settings

Scenarios = tuple[Scenario, ...]
Changes = Mapping[str, Any]

HE = 6**0.5
"""Times PyTorch's default deviation: He's, 2 / fan_in instead of 1 / (3 fan_in)."""
MLP_WIDTHS = {width: {"sizes": (64, width, 10)} for width in (32, 64, 128, 2048)}
CONV_WIDTHS = {width: {"num_classes": 10, "width": width} for width in (0.25, 1)}
RATES = (0.005, 0.02, 0.1, 0.2)
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
SIDES = (2, 4, 8)
"""Of an image, in pixels."""


def _chosen(*names: str) -> tuple[Method, ...]:
    return tuple(method for method in METHODS if method.name in names)


def _varied(
    question: str, base: Settings, changes: Mapping[str, Changes], methods: tuple[Method, ...], seeds: int = 3
) -> Scenarios:
    base = replace(base, subsequent=None, looks=())
    return tuple(
        Scenario(f"{question}-{name}", methods, replace(base, **change), seeds)
        for name, change in changes.items()
    )


def regime(
    name: str, base: Settings, widths: Mapping[float, Changes], rates: tuple[float, ...] = RATES
) -> Scenarios:
    """Four ways to change |Delta| / |theta_1^0|: initial scale, learning rate, epochs, width."""
    recipe = base.recipe
    changes = {
        "base": {},
        **{f"init-{scale:.3g}": {"init_scale": scale} for scale in (0.25, 0.5, 1.5, HE, 4)},
        **{f"lr-{lr:g}": {"recipe": replace(recipe, lr=lr)} for lr in rates},
        **{
            f"epochs-{epochs}": {"recipe": replace(recipe, epochs=epochs)}
            for epochs in (3, 10, 90)
            if epochs != recipe.epochs
        },
        **{f"width-{width:g}": {"arguments": arguments} for width, arguments in widths.items()},
    }
    return _varied(f"regime-{name}", base, changes, _chosen("plain", "naive", "weights", "oracle", "fgmt"))


def peers(bases: Mapping[str, Settings], train_on: bool = True) -> Scenarios:
    """Every other thing that one could do with a finished source."""
    return tuple(
        Scenario(
            f"peers-{name}",
            (*METHODS, *PEERS),
            base if train_on else replace(base, subsequent=None),
            seeds=5 if name.startswith("digits") else 3,
        )
        for name, base in bases.items()
    )


def schedules(name: str, base: Settings) -> Scenarios:
    """Uniform and cosine spacing, and the source's own checkpoints (first version, figure 3; second, appendix E.1)."""
    changes = {schedule: {"schedule": schedule} for schedule in ("uniform", "cosine", "recorded")}
    return _varied(f"schedule-{name}", base, changes, _chosen("naive", "fgmt", "gmt"), seeds=5)


def sensitivity(name: str, base: Settings) -> Scenarios:
    """What T, batches a gradient, their size, and the start of each matching do."""
    changes = {
        "base": {},
        **{f"T-{steps}": {"steps": steps} for steps in (1, 2, 5, 20, 30)},
        **{f"batches-{count}": {"gradient_batches": count} for count in (2, 4, 8)},
        **{f"size-{size}": {"gradient_batch": size} for size in (16, 32, 512)},
        "identity": {"from_identity": True},
    }
    return _varied(f"sensitivity-{name}", base, changes, _chosen("fgmt", "gmt"))


def failures(name: str, base: Settings) -> Scenarios:
    """The source learned from other data, or at another rate."""
    changes = {
        "base": {},
        "data-tenth": {"source_task": replace(base.task, per_class=14)},
        "data-other": {"source_task": Task("mnist", size=8, per_class=140)},
        "lr-0.1x": {"source_recipe": replace(base.recipe, lr=0.1 * base.recipe.lr)},
        "lr-4x": {"source_recipe": replace(base.recipe, lr=4 * base.recipe.lr)},
    }
    return _varied(
        f"fails-{name}", base, changes, _chosen("plain", "naive", "weights", "oracle", "fgmt"), seeds=5
    )


def far_apart(name: str, base: Settings) -> Scenarios:
    """The source's pre-training was shorter, or on other classes, or on other images."""
    earlier = base.pretraining
    assert earlier is not None
    short = replace(earlier.recipe, epochs=1)
    changes = {
        "base": {},
        "short": {"pretraining": replace(earlier, source_recipe=short)},
        "classes": {
            "pretraining": replace(earlier, source_task=replace(earlier.task, classes=(0, 1, 2, 5, 6)))
        },
        "images": {
            "pretraining": replace(earlier, source_task=Task("mnist", earlier.task.classes, 8, per_class=140))
        },
    }
    return _varied(
        f"fails-{name}", base, changes, _chosen("plain", "naive", "weights", "oracle", "fgmt"), seeds=5
    )


def inherited(name: str, base: Settings, per_class: int) -> Scenario:
    """The source was pre-trained on few images, the target on all (second version, figure 8)."""
    earlier = base.pretraining
    assert earlier is not None
    poor = replace(earlier, source_task=replace(earlier.task, per_class=per_class))
    settings = replace(base, pretraining=poor, subsequent=None, looks=())
    return Scenario(f"inherits-{name}", _chosen("plain", "naive", "oracle", "fgmt", "gmt"), settings, 5)


def assumption(bases: Mapping[str, Settings]) -> Scenarios:
    """Assumption (P) along two trainings (second version, figure 3)."""
    return tuple(
        Scenario(f"assumption-{name}", UPDATES, replace(base, subsequent=None, looks=()))
        for name, base in bases.items()
    )


def theorem(base: Settings) -> Scenarios:
    """Theorem A.1 over the width, at several numbers of inputs (the images' pixels)."""
    return tuple(
        Scenario(
            f"theorem-{side}x{side}-{width}",
            FIRST_GRADIENTS,
            replace(
                base,
                task=replace(base.task, size=side),
                arguments={"sizes": (side * side, width, 10)},
                subsequent=None,
                looks=(),
            ),
            seeds=5,
        )
        for side in SIDES
        for width in WIDTHS
    )


def basins(bases: Mapping[str, Settings]) -> Scenarios:
    """Lines and one plane of loss (first version, figure 6; second, figure 7)."""
    return tuple(Scenario(f"basin-{name}", (*LINES, *PLANE), base) for name, base in bases.items())


def ensembles(bases: Mapping[str, tuple[Settings, int]]) -> Scenarios:
    """Members that are trained on for so many epochs only (second version, appendix E.2)."""
    return tuple(
        Scenario(
            f"ensemble-{name}",
            ENSEMBLES,
            replace(base, subsequent=replace(base.subsequent, epochs=epochs), looks=()),
        )
        for name, (base, epochs) in bases.items()
    )


def costs(bases: Mapping[str, Settings]) -> Scenarios:
    """Gradients, operations and seconds of each method."""
    return tuple(
        Scenario(f"cost-{name}", COUNTED, replace(base, subsequent=None, looks=()))
        for name, base in bases.items()
    )


def normalised(bases: Mapping[str, Settings]) -> Scenarios:
    """A lead of ours beside the two methods that it comes from."""
    return tuple(
        Scenario(
            f"normalised-{name}",
            (*_chosen("naive", "fgmt", "gmt"), *LEADS),
            replace(base, subsequent=None, looks=()),
            seeds=5 if name.startswith("mnist") else 10,
        )
        for name, base in bases.items()
    )


def ports(name: str, base: PortSettings) -> Scenarios:
    """A fine-tune moved to a new base: ten classes of CIFAR-100, digits in colour, and a base that saw half as much."""
    earlier, task = base.pretraining, base.task
    assert earlier is not None
    half = replace(earlier, source_task=replace(earlier.task, per_class=2250))
    changes: Mapping[str, Changes] = {
        "cifar100": {},
        "mnist": {"task": Task("mnist", size=task.size, channels=3, per_class=450)},
        "cifar100-half": {"pretraining": half},
    }
    rates = tuple(share * base.recipe.lr for share in (0.3, 1.0, 3.0, 10.0))
    return tuple(
        Scenario(f"port-{name}-{variant}", port_methods(rates), replace(base, **change))
        for variant, change in changes.items()
    )
