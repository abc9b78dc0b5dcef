"""What the fusion study measures: the paper's tables and figures, candidates for its recipe, two tasks of digits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from regraft.data import CIFAR100_FUSION, CIFAR100_TRANSFER
from regraft.training.loop import Recipe
from regraft_bench.fusion import two_tasks
from regraft_bench.fusion.continual import CONTINUAL
from regraft_bench.fusion.onto_targets import TARGET_CONTROLS, TARGET_SUMS
from regraft_bench.fusion.paper import Published, load_published
from regraft_bench.fusion.settings import (
    GRADIENT,
    TWO_NETWORKS,
    WEIGHTS,
    OntoTargets,
    PanelSettings,
    Regime,
    Target,
    Theory,
    TwoTasks,
)
from regraft_bench.fusion.theory import THEORY_METHODS
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

TARGET_TASKS = (
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

WHOLE_TABLES = {
    ("gradients", "small"): ("A2", "A3"),
    ("weights", "small"): ("A12", "A13"),
    ("gradients", "large"): ("A10", "A11"),
}
"""Sums of what, at which scale, and the tables of tasks A and B that have them."""

# ---------------------------------------------------------------- the paper's tables and figures

TEST_IMAGES = 500  # for each accuracy of the residual network at the large scale: a standard error up to 2.2 points
HELD_OUT_IMAGES = 100  # to choose one of the grid's positions
FINE = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 3.0, 4.0, 5.0)
ALPHAS = {
    GRADIENT: (0.01, 0.1, 0.2, 0.5, 0.8, 1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0, 30.0, 40.0),
    WEIGHTS: (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0),
}
PANELS = (
    *(PanelSettings(f"{scale} scale, small training images", scale, "small") for scale in ("small", "medium", "large")),
    PanelSettings("large scale, test images", "large", "test"),
)
FIGURE_FORMULAS = {
    "1": (GRADIENT, "random"),
    "2": (GRADIENT, "trained"),
    "3": (WEIGHTS, "random"),
    "4": (WEIGHTS, "trained"),
}


def _make_onto(formula: str, onto: str, panels: tuple[PanelSettings, ...], alphas: tuple[float, ...]) -> OntoTargets:
    targets = TARGET_TASKS if onto == "trained" else ()
    return OntoTargets(formula, onto, panels, alphas, CIFAR10, targets, network="small_cnn", regime=CNN)


def _make_table(paper: Published) -> Scenario:
    """A published table as a scenario."""
    name = f"table-{paper.table}"
    if paper.targets:
        panel = PanelSettings("accuracy", paper.scale, paper.evaluated_on.split()[0])
        onto = _make_onto(paper.formula, paper.targets, (panel,), paper.rows)
        return Scenario(name, (*TARGET_SUMS, *TARGET_CONTROLS), onto, seeds=1)
    if not paper.formula:
        settings = replace(_TWO_TASKS, alphas=FINE, betas=FINE, pretraining=_task("cifar100", OTHER_CLASSES))
        return Scenario(name, (*CONTINUAL, two_tasks.ARITHMETIC), settings, seeds=1)
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
    return Scenario(name, (two_tasks.SUM, *two_tasks.TWO_TASK_CONTROLS, *own), settings, seeds=1)


_TWO_TASKS = TwoTasks(CIFAR10, CIFAR100, (), (), "residual8", RESIDUAL, images=TEST_IMAGES, held_out=HELD_OUT_IMAGES)


def _make_figures() -> Iterator[Scenario]:
    for number, (formula, onto) in FIGURE_FORMULAS.items():
        settings = _make_onto(formula, onto, PANELS, ALPHAS[formula])
        yield Scenario(f"figure-{number}", TARGET_SUMS, settings, seeds=1)


def _at_paper_size(scenario: Scenario) -> Scenario:
    """Full width, all images, training as long as it takes: for a GPU."""
    settings = scenario.settings
    if isinstance(settings, TwoTasks):
        settings = replace(settings, regime=RESIDUAL_PAPER, images=None, held_out=5000)
    else:
        settings = replace(settings, held_out=5000)
    return replace(scenario, name=f"{scenario.name}-paper", settings=settings)


def _make_candidate(scale: str, name: str) -> TwoTasks:
    """Two tasks under one of the recipes to choose from."""
    recipe: dict[str, Any] = {scale: replace(RESIDUAL.recipe(scale), **CANDIDATES[scale][name])}
    evaluated_on = "training" if scale == "small" else "test"
    return replace(_TWO_TASKS, regime=replace(RESIDUAL, **recipe), scale=scale, evaluated_on=evaluated_on)


def _make_whole_tables() -> Iterator[Scenario]:
    """Whole tables under every candidate, by which none was chosen: what another recipe would have changed."""
    for (kind, scale), (first, _) in WHOLE_TABLES.items():
        paper = load_published()[first]
        for name in CANDIDATES[scale]:
            settings = replace(
                _make_candidate(scale, name), alphas=paper.columns, betas=paper.rows, formula=paper.formula
            )
            yield Scenario(f"{kind}-{scale}-{name}", (two_tasks.SUM,), settings, seeds=1)


def _make_recipes() -> Iterator[Scenario]:
    """The diagonals of tables A12 and A13 (small scale) and 6 (large scale) under each candidate."""
    for scale, candidates in CANDIDATES.items():
        for name in candidates:
            yield Scenario(f"recipe-{scale}-{name}", two_tasks.DIAGONAL, _make_candidate(scale, name), seeds=1)
    half = replace(_TWO_TASKS, regime=HALF_WIDTH)
    yield Scenario("recipe-large-adam-1e-3-of-half-width", two_tasks.DIAGONAL, half, seeds=1)
    # no candidates: whether theta_B is too near the start after as many epochs as theta_A
    for epochs in (64, 160):
        settings = replace(_TWO_TASKS, b_epochs=epochs)
        yield Scenario(f"recipe-large-b-of-{epochs}-epochs", two_tasks.DIAGONAL, settings, seeds=1)


def _make_widths() -> Iterator[Scenario]:
    """Table 6's sum of networks from one start and from two, by the share of the usual width."""
    for width in (0.125, 0.25, 0.5):
        settings = replace(_TWO_TASKS, regime=replace(HALF_WIDTH, width=width))
        yield Scenario(f"starts-width-{width}", (*two_tasks.DIAGONAL, *two_tasks.OF_TWO_STARTS), settings, seeds=3)


# ---------------------------------------------------------------- small ones

DIGITS_FUSION_RECIPE = Recipe(epochs=10, lr=0.05, batch_size=32)
TWO_DIGIT_TASKS = Scenario(
    "digits-two-tasks",
    CONTINUAL,
    TwoTasks(
        a=Task("digits", (0, 1, 2, 3, 4), validation=0.2),
        b=Task("digits", (5, 6, 7, 8, 9), validation=0.2),
        alphas=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
        betas=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
        network="mlp",
        regime=Regime(DIGITS_FUSION_RECIPE, DIGITS_FUSION_RECIPE, DIGITS_FUSION_RECIPE),
    ),
)

THEORY_SCENARIO = Scenario("appendix-b2", THEORY_METHODS, Theory(CIFAR10, CIFAR100, "small_cnn", CNN), seeds=1)

TABLE_SCENARIOS = tuple(_make_table(paper) for paper in load_published().values())
FIGURE_SCENARIOS = tuple(_make_figures())
RECIPE_SCENARIOS, WIDTH_SCENARIOS = tuple(_make_recipes()), tuple(_make_widths())
WHOLE_TABLE_SCENARIOS = tuple(_make_whole_tables())
QUICK_DROPOUT = replace(
    TWO_DIGIT_TASKS,
    name="digits-dropout",
    methods=tuple(m for m in CONTINUAL if m.name in ("plain", "sum", "average", "ensemble")),
    settings=replace(TWO_DIGIT_TASKS.settings, network="mlp with dropout"),
    seeds=2,
)
"""For the quick bench: a network that computes otherwise in training mode than in evaluation mode."""
FUSION_SCENARIOS = (
    TWO_DIGIT_TASKS,
    QUICK_DROPOUT,
    *TABLE_SCENARIOS,
    *FIGURE_SCENARIOS,
    THEORY_SCENARIO,
    *RECIPE_SCENARIOS,
    *WIDTH_SCENARIOS,
    *WHOLE_TABLE_SCENARIOS,
    *(_at_paper_size(scenario) for scenario in (*TABLE_SCENARIOS, *FIGURE_SCENARIOS)),
)
