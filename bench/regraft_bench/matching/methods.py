"""Ways to match two trained networks, and what the networks' middle is worth under each; and the scenarios."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from regraft.core.clock import EVALUATION, Clock
from regraft.core.tensors import Perm
from regraft.fusion.repair import repair_on
from regraft.fusion.sums import fuse
from regraft.matching.descent import match
from regraft.reference import matching as literal
from regraft.symmetry import apply
from regraft.training.evaluation import accuracy
from regraft.training.landscape import interpolate
from regraft.training.loop import Recipe
from regraft_bench.baselines import GIT_REBASIN, match_like_git_rebasin
from regraft_bench.matching.scaling import normalise_scales
from regraft_bench.matching.setting import MatchingSetting, TrainedPair
from regraft_bench.study import Measured, Method, Scenario, Task, first_paragraph

POINTS = 11
"""Along the line between two networks; the middle is one of them."""

Finder = Callable[[MatchingSetting], Perm]


def keep_units(setting: MatchingSetting) -> Perm:
    """No unit permuted."""
    return setting.spec.identity()


def match_by_default(setting: MatchingSetting) -> Perm:
    """`regraft.match` as it is called without options."""
    return match(setting.spec, *setting.weights).perm


def match_with_restarts(setting: MatchingSetting) -> Perm:
    """`regraft.match` with restarts=5."""
    return match(setting.spec, *setting.weights, restarts=5, generator=setting.order()).perm


def match_from_joint_start(setting: MatchingSetting) -> Perm:
    """`regraft.match` with start="joint"."""
    return match(setting.spec, *setting.weights, start="joint").perm


def match_from_joint_start_with_restarts(setting: MatchingSetting) -> Perm:
    """`regraft.match` with start="joint" and restarts=5."""
    return match(setting.spec, *setting.weights, start="joint", restarts=5, generator=setting.order()).perm


def match_from_random_starts(setting: MatchingSetting) -> Perm:
    """The best of five descents, each from a random permutation."""
    generator = setting.order()
    starts = [setting.spec.random(generator) for _ in range(5)]
    found = [match(setting.spec, *setting.weights, start=start) for start in starts]
    return max(found, key=lambda result: result.objective).perm


def match_in_random_orders(setting: MatchingSetting) -> Perm:
    """The public algorithm, groups in random orders from the identity; nested groups (heads) stay as they are."""
    return match_like_git_rebasin(setting.spec, *setting.weights, setting.order())


def match_by_frank_wolfe(setting: MatchingSetting) -> Perm:
    """Frank-Wolfe to its end over doubly stochastic matrices in float64 (C2M3), without a descent behind it."""
    target, source = setting.weights
    return literal.frank_wolfe(setting.spec, [target], [source], steps=100, gain=1e-6)


def match_by_activations(setting: MatchingSetting) -> Perm:
    """`regraft.match` by the correlation of units on 1,000 training images."""
    return match(setting.spec, *setting.pair, model=setting.model, batches=setting.calibration).perm


def match_at_unit_norms(setting: MatchingSetting) -> Perm:
    """`regraft.match` of both networks in ReLU's normal form: inputs of norm 1 for every unit whose scale is free."""
    images = setting.calibration[0][0]
    first, second = (normalise_scales(setting.spec, setting.model, network, images) for network in setting.pair)
    names = setting.weights[0]
    return match(setting.spec, {n: first[n] for n in names}, {n: second[n] for n in names}).perm


def measure_middle(find: Finder, setting: MatchingSetting) -> Measured:
    """Match the second network to the first, and go along the line between them."""
    model, (first, second) = setting.model, setting.pair
    find(setting)  # what is loaded and made once is not charged
    clock = Clock()
    with clock.phase("match", setting.device):
        perm = find(setting)
    with clock.phase(EVALUATION, setting.device):
        moved = apply(setting.spec, perm, second)
        line = interpolate(model, first, moved, setting.test, POINTS, statistics=setting.calibration)
        repaired = repair_on(model, [first, moved], setting.calibration)(
            fuse([first, moved], [0.5, 0.5]), torch.tensor([0.5, 0.5])
        )
        values = {
            "objective": literal.objective(setting.spec, [setting.weights[0]], [setting.weights[1]], perm),
            "accuracy": float(line.accuracy[POINTS // 2]),
            "accuracy after REPAIR": accuracy(model, repaired, setting.test),
            "accuracy of the ends": float(line.accuracy[[0, -1]].mean()),
            "barrier": line.barrier,
        }
    return Measured(values, cost=clock.seconds)


MATCHERS: dict[str, Finder] = {
    "none": keep_units,
    "regraft": match_by_default,
    "regraft, 5 restarts": match_with_restarts,
    "regraft, joint start": match_from_joint_start,
    "regraft, joint start, 5 restarts": match_from_joint_start_with_restarts,
    "regraft, best of 5 random starts": match_from_random_starts,
    GIT_REBASIN: match_in_random_orders,
    "Frank-Wolfe": match_by_frank_wolfe,
    "activations": match_by_activations,
    "regraft, unit norms": match_at_unit_norms,
}
MATCHING_METHODS = tuple(
    Method(name, partial(measure_middle, find), about=first_paragraph(find)) for name, find in MATCHERS.items()
)

DIGIT_IMAGES = Task("digits")
RECIPES = {
    "mlp": Recipe(epochs=20, lr=0.1, batch_size=64),
    "cnn": Recipe(epochs=10, lr=0.1, batch_size=64, weight_decay=1e-4),
    "resnet": Recipe(epochs=8, lr=0.1, batch_size=64, weight_decay=1e-4),
    "vit": Recipe(epochs=20, lr=2e-3, batch_size=64, optimizer="adam", warmup_epochs=2),
}
MATCHING_SCENARIOS = tuple(
    Scenario(f"digits-{name}", MATCHING_METHODS, TrainedPair(name, recipe, DIGIT_IMAGES), seeds=5)
    for name, recipe in RECIPES.items()
)
QUICK_PAIRS = MATCHING_SCENARIOS[0]
