"""Methods of table 5: two tasks in one network by further training, beside the sums that need none.

Values as in :mod:`.two_tasks`; beside test accuracies those of training images. Charged is what a method takes beyond
theta_A and theta_B; joint training needs neither, and pays for all of itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from regraft.core.clock import EVALUATION, Clock, Cost
from regraft.core.tensors import Tensors, check_alike, digest_tensors
from regraft.data import Dataset, Split, normalise
from regraft_bench.fusion.accuracy import Sums, both_tasks, measure_sums
from regraft_bench.fusion.setting import SEARCH, TRAIN, FusionSetting
from regraft_bench.fusion.two_tasks import (
    ALONE,
    AVERAGES,
    MERGING_PEERS,
    SUM_OF_GRADIENTS,
    SUM_OF_NETWORKS,
    find_importance,
)
from regraft_bench.study import Measured, Method

STRENGTHS = (10.0, 100.0, 1000.0, 10000.0)
GENTLY = 0.2  # the share of the learning rate at which the penalty's strengths are stable


def join_datasets(first: Dataset, second: Dataset, *, repeat: int = 1) -> Dataset:
    """Both data sets as one, with the labels that they have: class k of either is output k.

    Each keeps its own normalisation. The second's training images stand `repeat` times.
    """

    def join(a: Split, b: Split, times: int) -> Split:
        images = [normalise(torch.as_tensor(s.images), s.mean, s.std) for s in (a, *[b] * times)]
        return Split(torch.cat(images), torch.cat([a.labels, *[b.labels] * times]))

    return replace(
        first,
        name=f"{first.name}+{second.name}",
        train=join(first.train, second.train, repeat),
        validation=join(first.validation, second.validation, 1),
        test=join(first.test, second.test, 1),
        mean=(0.0,) * len(first.mean),
        std=(1.0,) * len(first.std),
    )


@dataclass(frozen=True, eq=False)
class Consolidation:
    """Elastic weight consolidation, a penalty for :func:`regraft.training.loop.train` from ``anchor`` on.

    The loss is cross-entropy + strength / 2 * sum_i importance_i (theta_i - anchor_i)^2 (equation 3 of Kirkpatrick et
    al., 2017). anchor: the values after the first task. importance: by parameter
    (:func:`regraft.fusion.fisher.estimate_fisher`).
    Raises ValueError for a negative strength and for an importance that does not fit the anchor.
    """

    anchor: Tensors
    importance: Tensors
    strength: float

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise ValueError(f"the strength must be at least 0, not {self.strength}")
        check_alike(
            self.importance,
            {name: self.anchor[name] for name in self.importance if name in self.anchor},
            "the importance",
            "the anchor",
        )

    @property
    def identity(self) -> str:
        return f"{self.strength} {digest_tensors(self.anchor)} {digest_tensors(self.importance)}"

    def __call__(self, network: nn.Module) -> None:
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                assert parameter.grad is not None, "the penalty is added to the loss's gradient"
                distance = parameter - self.anchor[name]
                parameter.grad.addcmul_(self.importance[name], distance, value=self.strength)


def _measure_network(setting: FusionSetting, tensors: Tensors, cost: Mapping[str, Cost]) -> Measured:
    """One network's accuracies on both tasks, on test and training images; only on validation images when tuning."""
    clock = Clock(dict(cost))

    def measure(split: str, phase: str = EVALUATION) -> list[float]:
        images = [setting.images(task, split, setting.settings.scale) for task in setting.tasks]
        return [float(measure_sums(setting, Sums([tensors], [[1.0]]), i, clock, phase)) for i in images]

    if setting.tuning:
        accuracies = both_tasks(*measure("validation", SEARCH))
        return Measured({"validation": accuracies["accuracy"]}, {}, clock.seconds)
    training = dict(zip(("training_a", "training_b"), measure("training"), strict=True))
    return Measured({**both_tasks(*measure("test")), **training}, {}, clock.seconds)


def train_jointly(setting: FusionSetting) -> Measured:
    """Both tasks at once from theta_0: the upper bound. The smaller task's images stand as often as balances them."""
    settings = setting.settings
    first, second = (setting.at_scale(task, settings.scale) for task in setting.tasks)
    repeat = max(1, round(len(first.train) / len(second.train) / 2))
    data, recipe = join_datasets(first, second, repeat=repeat), settings.regime.recipe(settings.scale)
    run = setting.train("both tasks", setting.model, setting.start(), data, recipe)
    return _measure_network(setting, run.tensors, {TRAIN: run.cost})


def train_in_turn(last: int, setting: FusionSetting) -> Measured:
    """From the network of one task, train on the other: the `last` of the two (0: A, 1: B)."""
    start, task, scale = (setting.theta_b, setting.theta_a)[last], setting.tasks[last], setting.settings.scale
    recipe = setting.settings.regime.recipe(scale)
    run = setting.train_from(f"{task.data} afterwards", start, task, scale, recipe)
    return _measure_network(setting, run.tensors, {TRAIN: run.cost})


def consolidate(strength: float, setting: FusionSetting) -> Measured:
    """Task B from theta_A under elastic weight consolidation, of a strength that the method's config names."""
    settings, clock = setting.settings, Clock()
    importance = find_importance(setting, settings.a, setting.theta_a, clock)
    recipe = settings.regime.recipe(settings.scale)
    run = setting.train_from(
        f"{settings.b.data} consolidated",
        setting.theta_a,
        settings.b,
        settings.scale,
        replace(recipe, lr=GENTLY * recipe.lr),
        penalty=Consolidation(setting.theta_a, importance, strength),
    )
    clock.add({TRAIN: run.cost})
    return _measure_network(setting, run.tensors, clock.seconds)


_EWC = tuple(Method("EWC", partial(consolidate, strength), {"strength": strength}) for strength in STRENGTHS)

CONTINUAL = (
    Method("plain", train_jointly),
    *ALONE,
    Method("A then B", partial(train_in_turn, 1), about="Task B from theta_A."),
    Method("B then A", partial(train_in_turn, 0), about="Task A from theta_B."),
    SUM_OF_NETWORKS,
    SUM_OF_GRADIENTS,
    *AVERAGES,
    *MERGING_PEERS,
    Method("EWC", partial(consolidate, STRENGTHS[0]), candidates=_EWC),
)
