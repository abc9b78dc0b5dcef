"""What the fusion study measures: the paper's tables and figures, candidates for its recipe, two tasks of digits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from regraft.data import CIFAR100_FUSION, CIFAR100_TRANSFER
from regraft.training.loop import Recipe
from regraft_bench.fusion import continual, onto_targets, two_tasks
from regraft_bench.fusion.continual import Theory
from regraft_bench.fusion.paper import Published, published
from regraft_bench.fusion.setting import (
    GRADIENT,
    TWO_NETWORKS,
    WEIGHTS,
    OntoTargets,
    Panel,
    Regime,
    Target,
    TwoTasks,
)
from regraft_bench.study import Scenario, Task

# ---------------------------------------------------------------- tasks


def _task(data: str, classes: tuple[int | str, ...] | None = None, per_class: int | None = None) -> Task:
    """As both networks want it: 32x32, in colour."""
    return Task(data, classes, size=32, channels=3, per_class=per_class)


CIFAR10, CIFAR100 = _task("cifar10"), _task("cifar100", CIFAR100_FUSION)
CALTECH = (
    "beer-mug", "car-tire", "hummingbird", "killer-whale", "knife",
    "mushroom", "scorpion-101", "speed-boat", "teapot", "tomato",
)  # fmt: skip
FOOD = (
    "spaghetti_bolognese", "carrot_cake", "pad_thai", "french_toast", "garlic_bread",
    "tiramisu", "creme_brulee", "samosa", "chocolate_mousse", "poutine",
)  # fmt: skip
# The order of STL-10's classes: six of them have the number that they have in CIFAR-10.
STL_ORDER = ("airplane", "bird", "automobile", "cat", "deer", "dog", "horse", "frog", "ship", "truck")
OTHER_CLASSES = ("aquarium_fish", "butterfly", "cloud", "dolphin", "oak_tree", "otter", "tank", "whale")

TARGETS = (
    (Target("CIFAR-100", CIFAR100),),
    (
        Target("Caltech-256", _task("caltech256", CALTECH)),
        Target("CIFAR-100, ten other classes", _task("cifar100", CIFAR100_TRANSFER), "Caltech-256"),
    ),
    (
        Target("Food-101", _task("food101", FOOD)),
        Target("Fashion-MNIST", _task("fashion-mnist"), "Food-101"),
    ),
    (Target("MNIST", _task("mnist")),),
    (
        Target("STL-10", _task("stl10")),
        Target("CIFAR-10 in STL-10's order, 500 a class", _task("cifar10", STL_ORDER, 500), "STL-10"),
    ),
)
"""theta_1 to theta_5 of figures 2 and 4: the paper's task, and what stands in where it is missing."""

# ---------------------------------------------------------------- recipes: the paper names none

CNN = Regime(
    small=Recipe(epochs=100, lr=0.01, batch_size=8),
    medium=Recipe(epochs=40, lr=0.01, batch_size=16),
    large=Recipe(epochs=6, lr=0.01, batch_size=64),
)

RESIDUAL = Regime(
    small=Recipe(epochs=40, lr=2e-3, batch_size=40, optimizer="adam", schedule="constant"),
    medium=Recipe(epochs=40, lr=3e-4, batch_size=20, optimizer="adam"),
    large=Recipe(epochs=16, lr=1e-3, batch_size=64, optimizer="adam"),
    width=0.25,
    precision="bfloat16",
)
"""Of the networks of section 5, both tasks alike; a quarter of the usual width, for two cores."""

HALF_WIDTH = replace(RESIDUAL, large=replace(RESIDUAL.large, epochs=8), width=0.5)
"""Of the large scale's sums; table 5, which trains many more networks, keeps to the quarter."""

RESIDUAL_PAPER = replace(
    RESIDUAL,
    large=Recipe(epochs=30, lr=1e-3, batch_size=64, optimizer="adam"),
    width=1.0,
)

_sgd, _adam = ({"optimizer": name} for name in ("sgd", "adam"))
CANDIDATES: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        "sgd-0.002": {"lr": 0.002, **_sgd},
        "sgd-0.005": {"lr": 0.005, **_sgd},
        "sgd-0.01": {"lr": 0.01, **_sgd},
        "sgd-0.02": {"lr": 0.02, **_sgd},
        "adam-1e-4": {"lr": 1e-4, **_adam},
        "adam-3e-4": {"lr": 3e-4, **_adam},
        "adam-3e-4-of-10": {"lr": 3e-4, "batch_size": 10, **_adam},
        "adam-1e-3": {"lr": 1e-3, **_adam},
        "adam-2e-3": {"lr": 2e-3, **_adam},
        "adam-3e-3": {"lr": 3e-3, **_adam},
    },
    "large": {
        "sgd-0.02": {"lr": 0.02, "epochs": 8, **_sgd},
        "adam-1e-4": {"lr": 1e-4, "epochs": 8, **_adam},
        "adam-3e-4": {"lr": 3e-4, "epochs": 8, **_adam},
        "adam-3e-4-of-30-epochs": {"lr": 3e-4, "epochs": 30, **_adam},
        "adam-1e-3": {"lr": 1e-3, "epochs": 8, **_adam},
        "adam-1e-3-of-16-epochs": {"lr": 1e-3, "epochs": 16, **_adam},
    },
}
"""Recipes to choose from, on the diagonals of tables A12, A13 and 6 alone: what differs from `RESIDUAL`."""

WHOLE = {
    ("gradients", "small"): ("A2", "A3"),
    ("weights", "small"): ("A12", "A13"),
    ("gradients", "large"): ("A10", "A11"),
}
"""Sums of what, at which scale, and the tables of tasks A and B that have them."""

# ---------------------------------------------------------------- the paper's tables and figures

IMAGES = 500  # for each accuracy of the residual network at the large scale; a standard error of 2.2 points at most
HELD_OUT = 100  # to choose one of the grid's positions
FINE = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 3.0, 4.0, 5.0)
ALPHAS = {
    GRADIENT: (0.01, 0.1, 0.2, 0.5, 0.8, 1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0, 30.0, 40.0),
    WEIGHTS: (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0),
}
PANELS = (
    *(
        Panel(f"{scale} scale, small training images", scale, "small")
        for scale in ("small", "medium", "large")
    ),
    Panel("large scale, test images", "large", "test"),
)
FIGURES = {
    "1": (GRADIENT, "random"),
    "2": (GRADIENT, "trained"),
    "3": (WEIGHTS, "random"),
    "4": (WEIGHTS, "trained"),
}


def _onto(formula: str, onto: str, panels: tuple[Panel, ...], alphas: tuple[float, ...]) -> OntoTargets:
    targets = TARGETS if onto == "trained" else ()
    return OntoTargets(formula, onto, panels, alphas, CIFAR10, targets, network="small_cnn", regime=CNN)


def _table(paper: Published) -> Scenario:
    """A published table as a scenario."""
    name = f"table-{paper.table}"
    if paper.targets:
        panel = Panel("accuracy", paper.scale, paper.evaluated_on.split()[0])
        settings = _onto(paper.formula, paper.targets, (panel,), paper.rows)
        return Scenario(name, (*onto_targets.SUMS, *onto_targets.CONTROLS), settings, seeds=1)
    if not paper.formula:
        settings = replace(_TWO_TASKS, alphas=FINE, betas=FINE, pretraining=_task("cifar100", OTHER_CLASSES))
        return Scenario(name, (*continual.METHODS, *continual.WITH_PRETRAINING), settings, seeds=1)
    settings = replace(
        _TWO_TASKS,
        regime=HALF_WIDTH if paper.scale == "large" else RESIDUAL,
        alphas=paper.columns,
        betas=paper.rows,
        formula=paper.formula,
        scale=paper.scale,
        evaluated_on="test" if paper.evaluated_on == "test" else "training",
    )
    own = two_tasks.OF_NETWORKS if paper.formula == TWO_NETWORKS else two_tasks.OF_GRADIENTS
    return Scenario(name, (two_tasks.SUM, *two_tasks.CONTROLS, *own), settings, seeds=1)


_TWO_TASKS = TwoTasks(
    CIFAR10, CIFAR100, (), (), network="residual8", regime=RESIDUAL, images=IMAGES, held_out=HELD_OUT
)


def _figures() -> Iterator[Scenario]:
    for number, (formula, onto) in FIGURES.items():
        settings = _onto(formula, onto, PANELS, ALPHAS[formula])
        yield Scenario(f"figure-{number}", onto_targets.SUMS, settings, seeds=1)


def _paper_size(scenario: Scenario) -> Scenario:
    """Full width, all images, training as long as it takes: for a GPU."""
    settings = scenario.settings
    if isinstance(settings, TwoTasks):
        settings = replace(settings, regime=RESIDUAL_PAPER, images=None, held_out=5000)
    else:
        settings = replace(settings, held_out=5000)
    return replace(scenario, name=f"{scenario.name}-paper", settings=settings)


def _candidate(scale: str, name: str) -> TwoTasks:
    """Two tasks under one of the recipes to choose from."""
    recipe = replace(RESIDUAL.recipe(scale), **CANDIDATES[scale][name])
    return replace(
        _TWO_TASKS,
        regime=replace(RESIDUAL, **{scale: recipe}),
        scale=scale,
        evaluated_on="training" if scale == "small" else "test",
    )


def _whole() -> Iterator[Scenario]:
    """Whole tables under every candidate, by which none was chosen: what another recipe would have changed."""
    for (kind, scale), (first, _) in WHOLE.items():
        paper = published()[first]
        for name in CANDIDATES[scale]:
            settings = replace(
                _candidate(scale, name), alphas=paper.columns, betas=paper.rows, formula=paper.formula
            )
            yield Scenario(f"{kind}-{scale}-{name}", (two_tasks.SUM,), settings, seeds=1)


def _recipes() -> Iterator[Scenario]:
    """The diagonals of tables A12 and A13 (small scale) and 6 (large scale) under each candidate."""
    for scale, candidates in CANDIDATES.items():
        for name in candidates:
            yield Scenario(f"recipe-{scale}-{name}", two_tasks.DIAGONAL, _candidate(scale, name), seeds=1)
    half = replace(_TWO_TASKS, regime=HALF_WIDTH)
    yield Scenario("recipe-large-adam-1e-3-of-half-width", two_tasks.DIAGONAL, half, seeds=1)
    # no candidates: whether theta_B is too near the start after as many epochs as theta_A
    for epochs in (64, 160):
        settings = replace(_TWO_TASKS, b_epochs=epochs)
        yield Scenario(f"recipe-large-b-of-{epochs}-epochs", two_tasks.DIAGONAL, settings, seeds=1)


def _widths() -> Iterator[Scenario]:
    """Table 6's sum of networks from one start and from two, by the share of the usual width."""
    for width in (0.125, 0.25, 0.5):
        settings = replace(_TWO_TASKS, regime=replace(HALF_WIDTH, width=width))
        yield Scenario(
            f"starts-width-{width}", (*two_tasks.DIAGONAL, *two_tasks.OF_TWO_STARTS), settings, seeds=3
        )


# ---------------------------------------------------------------- small ones

DIGITS = Scenario(
    "digits-two-tasks",
    continual.METHODS,
    TwoTasks(
        a=Task("digits", (0, 1, 2, 3, 4), validation=0.2),
        b=Task("digits", (5, 6, 7, 8, 9), validation=0.2),
        alphas=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
        betas=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
        network="mlp",
        regime=Regime(*[Recipe(epochs=10, lr=0.05, batch_size=32)] * 3),
    ),
)

THEORY = Scenario("appendix-b2", continual.THEORY, Theory(CIFAR10, CIFAR100, "small_cnn", CNN), seeds=1)

TABLES = tuple(_table(paper) for paper in published().values())
FIGURE_SCENARIOS = tuple(_figures())
RECIPES, WIDTHS, WHOLE_TABLES = tuple(_recipes()), tuple(_widths()), tuple(_whole())
SCENARIOS = (
    DIGITS,
    *TABLES,
    *FIGURE_SCENARIOS,
    THEORY,
    *RECIPES,
    *WIDTHS,
    *WHOLE_TABLES,
    *(_paper_size(scenario) for scenario in (*TABLES, *FIGURE_SCENARIOS)),
)
