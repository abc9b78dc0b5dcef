"""Methods of table 5: two tasks in one network by further training, beside the sums that need none; and the theory.

Values as in :mod:`.two_tasks`; beside test accuracies those of training images. Charged is what a method takes beyond
theta_A and theta_B; joint training needs neither, and pays for all of itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from regraft.core.clock import EVALUATION, Clock, Cost
from regraft.core.tensors import Tensors
from regraft.fusion.grids import lattice
from regraft.fusion.sums import gradient
from regraft_bench.fusion.sequential import Consolidation, cancellation, together
from regraft_bench.fusion.setting import SEARCH, TRAIN, FusionSetting, Regime
from regraft_bench.fusion.two_tasks import (
    ALONE,
    PEERS,
    assigned,
    average,
    both_tasks,
    ensemble,
    fused,
    importance,
    searched,
)
from regraft_bench.study import Measured, Method, Series, Task

STRENGTHS = (10.0, 100.0, 1000.0, 10000.0)
GENTLY = 0.2  # the share of the learning rate at which the penalty's strengths are stable


def _network(setting: FusionSetting, tensors: Tensors, cost: Mapping[str, Cost]) -> Measured:
    """One network's accuracies on both tasks, on test and training images; only on validation images when tuning."""
    clock = Clock(dict(cost))

    def on(split: str, phase: str = EVALUATION) -> list[float]:
        images = [setting.images(task, split, setting.settings.scale) for task in setting.tasks]
        return [float(setting.accuracies([tensors], [[1.0]], i, clock, phase)) for i in images]

    if setting.tuning:
        return Measured({"validation": both_tasks(*on("validation", SEARCH))["accuracy"]}, {}, clock.seconds)
    training = dict(zip(("training_a", "training_b"), on("training"), strict=True))
    return Measured({**both_tasks(*on("test")), **training}, {}, clock.seconds)


def joint(setting: FusionSetting) -> Measured:
    """Both tasks at once from theta_0: the upper bound. The smaller task's images stand as often as balances them."""
    settings = setting.settings
    first, second = (setting.at_scale(task, settings.scale) for task in setting.tasks)
    repeat = max(1, round(len(first.train) / len(second.train) / 2))
    data, recipe = together(first, second, repeat=repeat), settings.regime.recipe(settings.scale)
    run = setting.train("both tasks", setting.model, setting.start(), data, recipe)
    return _network(setting, run.tensors, {TRAIN: run.cost})


def _then(setting: FusionSetting, start: Tensors, task: Task) -> Measured:
    scale = setting.settings.scale
    run = setting.continued(
        f"{task.data} afterwards", start, task, scale, setting.settings.regime.recipe(scale)
    )
    return _network(setting, run.tensors, {TRAIN: run.cost})


def a_then_b(setting: FusionSetting) -> Measured:
    """Task B from theta_A."""
    return _then(setting, setting.theta_a, setting.settings.b)


def b_then_a(setting: FusionSetting) -> Measured:
    """Task A from theta_B."""
    return _then(setting, setting.theta_b, setting.settings.a)


def consolidated(setting: FusionSetting) -> Measured:
    """Task B from theta_A under elastic weight consolidation, of a strength that the method's config names."""
    settings, clock, strength = setting.settings, Clock(), setting.method.config["strength"]
    needed = importance(setting, settings.a, setting.theta_a, clock)
    recipe = settings.regime.recipe(settings.scale)
    run = setting.continued(
        f"{settings.b.data} consolidated",
        setting.theta_a,
        settings.b,
        settings.scale,
        replace(recipe, lr=GENTLY * recipe.lr),
        penalty=Consolidation(setting.theta_a, needed, strength),
    )
    clock.add({TRAIN: run.cost})
    return _network(setting, run.tensors, clock.seconds)


def arithmetic(setting: FusionSetting) -> Measured:
    """theta_pre + alpha (theta_A - theta_pre) + beta (theta_B - theta_pre), both trained from theta_pre."""
    settings = setting.settings
    recipe = settings.regime.recipe(settings.scale)
    before = setting.trained(settings.pretraining, "large", recipe=recipe)
    runs = [
        setting.continued(f"{task.data} after pre-training", before.tensors, task, settings.scale, recipe)
        for task in setting.tasks
    ]
    sources = [before.tensors, *(gradient(before.tensors, run.tensors) for run in runs)]
    rows = lattice(settings.betas, settings.alphas, lambda b, a: (1.0, a, b)).tolist()
    clock = Clock()
    for run in (before, *runs):
        clock.add({TRAIN: run.cost})
    return searched(setting, sources, rows, {"beta": settings.betas, "alpha": settings.alphas}, clock)


METHODS = (
    Method("plain", joint),
    *ALONE,
    Method("A then B", a_then_b),
    Method("B then A", b_then_a),
    Method("sum", fused),
    Method("assignment", assigned),
    Method("average", average),
    Method("ensemble", ensemble),
    *PEERS,
    Method(
        "EWC", consolidated, candidates=tuple(Method("EWC", consolidated, {"strength": s}) for s in STRENGTHS)
    ),
)

WITH_PRETRAINING = (Method("task arithmetic", arithmetic),)


# ---------------------------------------------------------------- appendix B.2


@dataclass(frozen=True)
class Theory:
    """Full-batch steps on both tasks at some learning rates: how much of sequential training's difference from
    assignment is the Hessian term.

    images: training images a class of each task.
    """

    a: Task
    b: Task
    network: str
    regime: Regime
    steps: tuple[int, ...] = (1, 5)
    rates: tuple[float, ...] = (0.1, 0.01, 1e-3, 1e-4, 1e-5)
    images: int = 10


def hessian_term(setting: FusionSetting) -> Measured:
    """theta_BA - theta'_BA beside its Hessian term (appendix B.2), in float64.

    ReLU and max-pooling have kinks, where the gradient jumps: the Hessian does not see them, and the term explains the
    difference only at rates so small that no unit of any image crosses one.
    """
    settings = setting.settings
    double = {name: tensor.double() for name, tensor in setting.start().items()}
    batches = []
    for task in setting.tasks:
        split = setting.dataset(replace(task, per_class=settings.images)).train
        images, labels = next(iter(split.batches(len(split), device=setting.device)))
        batches.append([(images.double(), labels)])
    clock = Clock()
    with clock.phase(TRAIN, setting.device):
        found = [
            [cancellation(setting.model, double, *batches, rate, steps=steps) for rate in settings.rates]
            for steps in settings.steps
        ]
    names = ("difference", "predicted", "relative_error", "cosine")
    series = {
        name: Series(
            ("steps", "rate"),
            (settings.steps, settings.rates),
            tuple(tuple(getattr(one, name) for one in line) for line in found),
        )
        for name in names
    }
    return Measured({}, series, clock.seconds)


THEORY = (Method("Hessian term", hessian_term),)
