"""Methods of tables 1 to 4 and figures 1 to 4: one source added to five targets from other initial values.

``accuracy``: on the source's task, test images, mean over targets, each with the alpha that was best on validation
images. A method's charge is what it takes beyond the trained networks, which it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from regraft.core.clock import EVALUATION, Clock
from regraft.core.tensors import Tensors
from regraft.fusion.grids import harmonic_mean
from regraft.fusion.repair import repair_on
from regraft.fusion.sums import Finish, gradient
from regraft_bench.fusion.setting import GRADIENT, SEARCH, FusionSetting, Panel, Target, grid_series
from regraft_bench.study import Measured, Method, Series, Task

Targets = Mapping[str, tuple[Tensors, Target | None]]


@dataclass(frozen=True)
class Sums:
    """For one target: a sum of the sources for every alpha, and what mends it."""

    sources: Sequence[Tensors]
    rows: Sequence[Sequence[float]]
    finish: Finish | None = None


def _source(setting: FusionSetting, panel: Panel) -> tuple[Tensors, Tensors]:
    """(theta_A, g) at the panel's scale."""
    theta_a = setting.trained(setting.settings.task, panel.scale).tensors
    return theta_a, gradient(setting.start(), theta_a)


def _added(setting: FusionSetting, panel: Panel) -> Tensors:
    """What the formula adds to a target."""
    theta_a, g = _source(setting, panel)
    return g if setting.settings.formula == GRADIENT else theta_a


def _onto_targets(
    setting: FusionSetting,
    make: Callable[[Panel, Tensors], Sums],
    clock: Clock,
    *,
    alphas: Sequence[float] | None = None,
    targets: Targets | None = None,
) -> Measured:
    """A grid over alpha and target for each panel; for a table (one panel) the best alpha of each target, too."""
    settings, targets = setting.settings, setting.targets() if targets is None else targets
    at = (tuple(alphas or settings.alphas), tuple(targets))
    series, values = {}, {}
    for panel in settings.panels:
        sums = {name: make(panel, theta_n) for name, (theta_n, _) in targets.items()}
        split = "test" if panel.evaluated_on == "test" else "training"
        found = [_score(setting, s, settings.task, split, clock) for s in sums.values()]
        series[panel.name] = grid_series(("alpha", "target"), at, torch.stack(found, dim=1))
    if len(settings.panels) == 1:
        chosen, own = _choose_alphas(setting, sums, targets, at[0], clock)
        values, series = chosen, {**series, **own}
    stand_ins = {n: t.instead_of for n, (_, t) in targets.items() if t is not None and t.instead_of}
    return Measured(values, series, clock.seconds, {"stands in for": stand_ins} if stand_ins else {})


def _score(
    setting: FusionSetting, sums: Sums, task: Task, split: str, clock: Clock, phase: str = EVALUATION
) -> Tensor:
    images = setting.images(task, split, "small")
    return setting.accuracies(sums.sources, sums.rows, images, clock, phase, finish=sums.finish)


def _choose_alphas(
    setting: FusionSetting, sums: Mapping[str, Sums], targets: Targets, alphas: Sequence[float], clock: Clock
) -> tuple[dict[str, float], dict[str, Series]]:
    """Each target's alpha, chosen on validation images: for the source's task; for both where the target has one."""
    task, names = setting.settings.task, tuple(targets)
    best, kept, both, own = [], [], [], []
    for one, (_, target) in zip(sums.values(), targets.values(), strict=True):
        held = _score(setting, one, task, "validation", clock, SEARCH)
        chosen = int(held.argmax())
        best.append(alphas[chosen])
        kept.append(float(_score(setting, replace(one, rows=[one.rows[chosen]]), task, "test", clock)))
        if target is not None:
            held_own = _score(setting, one, target.task, "validation", clock, SEARCH)
            test = _score(setting, one, task, "test", clock)
            own.append(_score(setting, one, target.task, "test", clock))
            both.append(float(harmonic_mean(test, own[-1])[int(harmonic_mean(held, held_own).argmax())]))
    series = {
        "best alpha": Series.over("target", names, best),
        "accuracy at the best alpha": Series.over("target", names, kept),
    }
    values = {"accuracy": fmean(kept)}
    if own:
        series["own task"] = grid_series(("alpha", "target"), (tuple(alphas), names), torch.stack(own, dim=1))
        series["harmonic mean at the best alpha for both"] = Series.over("target", names, both)
        values["both_tasks"] = fmean(both)
    return values, series


def sum_onto_targets(setting: FusionSetting) -> Measured:
    """theta_n + alpha g (equation 6) or theta_n + alpha theta_A (equation 7)."""
    rows = [[1.0, alpha] for alpha in setting.settings.alphas]
    return _onto_targets(setting, lambda panel, t: Sums([t, _added(setting, panel)], rows), Clock())


def theta_a_alone(setting: FusionSetting) -> Measured:
    """alpha theta_A without any target: what scaling alone does. The same for every target."""
    return _alone(setting, 0)


def g_alone(setting: FusionSetting) -> Measured:
    """alpha g without any target."""
    return _alone(setting, 1)


def _alone(setting: FusionSetting, which: int) -> Measured:
    rows = [[alpha] for alpha in setting.settings.alphas]
    return _onto_targets(
        setting,
        lambda panel, _: Sums([_source(setting, panel)[which]], rows),
        Clock(),
        targets={"zero target": ({}, None)},
    )


def average_with_target(setting: FusionSetting) -> Measured:
    """(theta_n + theta_A) / 2, at alpha = 1: theta_n + theta_A, rescaled."""
    return _onto_targets(
        setting, lambda panel, t: Sums([t, _source(setting, panel)[0]], [[0.5, 0.5]]), Clock(), alphas=(1.0,)
    )


def aligned_onto_targets(setting: FusionSetting) -> Measured:
    """The sum, after theta_A's units were permuted to match the target's."""
    clock, rows = Clock(), [[1.0, alpha] for alpha in setting.settings.alphas]

    def make(panel: Panel, theta_n: Tensors) -> Sums:
        theta_a, _ = _source(setting, panel)
        return Sums([theta_n, setting.aligned(theta_n, theta_a, _added(setting, panel), clock)], rows)

    return _onto_targets(setting, make, clock)


def repaired_onto_targets(setting: FusionSetting) -> Measured:
    """The sum, after REPAIR towards theta_n and theta_A in the proportion 1 : alpha, whether it adds theta_A or g."""

    def make(panel: Panel, theta_n: Tensors) -> Sums:
        theta_a, _ = _source(setting, panel)
        batches = setting.calibration([setting.settings.task], panel.scale)
        mend = repair_on(setting.model, [theta_n, theta_a], batches)
        rows = [[1.0, alpha] for alpha in setting.settings.alphas]
        return Sums([theta_n, _added(setting, panel)], rows, mend)

    return _onto_targets(setting, make, Clock())


def ensemble_with_target(setting: FusionSetting) -> Measured:
    """The mean of the logits of theta_n and theta_A: two networks, twice the inference."""
    settings, targets, clock = setting.settings, setting.targets(), Clock()
    (panel,) = settings.panels
    theta_a, _ = _source(setting, panel)

    def measure(theta_n: Tensors, task: Task, split: str) -> float:
        return setting.ensemble([theta_n, theta_a], setting.images(task, split, "small"), clock)

    split = "test" if panel.evaluated_on == "test" else "training"
    table = [measure(theta_n, settings.task, split) for theta_n, _ in targets.values()]
    test = [measure(theta_n, settings.task, "test") for theta_n, _ in targets.values()]
    own = [measure(theta_n, t.task, "test") for theta_n, t in targets.values() if t is not None]
    values = {"accuracy": fmean(test)}
    if own:
        values["both_tasks"] = float(harmonic_mean(torch.tensor(test), torch.tensor(own)).mean())
    series = {panel.name: grid_series(("alpha", "target"), ((1.0,), tuple(targets)), torch.tensor(table))}
    return Measured(values, series, clock.seconds)


SUMS = (
    Method("sum", sum_onto_targets),
    Method("theta_A alone", theta_a_alone),
    Method("g alone", g_alone),
)
"""What figures show: the sum, and what scaling alone does (a zero target)."""

CONTROLS = (
    Method("average", average_with_target),
    Method("ensemble", ensemble_with_target),
    Method("aligned", aligned_onto_targets),
    Method("REPAIR", repaired_onto_targets),
)
