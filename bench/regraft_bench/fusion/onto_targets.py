"""Methods of tables 1 to 4 and figures 1 to 4: one source added to five targets from other initial values, as data.

A method names what is added, to what, and what mends the sum (:class:`TargetSum`). ``accuracy``: on the source's task,
test images, mean over targets, each with the alpha that was best on validation images. A method's charge is what it
takes beyond the trained networks, which it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

from regraft.core.clock import EVALUATION, Clock
from regraft.core.tensors import Tensors
from regraft.fusion.grids import harmonic_mean
from regraft.fusion.repair import repair_on
from regraft.fusion.sums import gradient
from regraft_bench.fusion.accuracy import Sums, grid_series, measure_ensemble, measure_sums
from regraft_bench.fusion.setting import SEARCH, FusionSetting
from regraft_bench.fusion.settings import GRADIENT, WEIGHTS, PanelSettings, Target
from regraft_bench.study import Measured, Method, Series, Task


@dataclass(frozen=True)
class TargetSum:
    """A method: called with a setting, it adds a source to every target, for every alpha.

    source: "theta_A" or "g"; "": what the formula adds. onto: whether there is a target (else: alpha times the source).
    average: of the two, at alpha = 1, in place of their sum. mend: "align" permutes theta_A's units to match the
    target's, "repair" repairs the sum's activations.
    """

    source: Literal["", "theta_A", "g"] = ""
    onto: bool = True
    average: bool = False
    mend: Literal["", "align", "repair"] = ""

    def __call__(self, setting: FusionSetting) -> Measured:
        """A grid over alpha and target for each panel; for a table (one panel) the best alpha of each target, too."""
        settings, clock, series = setting.settings, Clock(), {}
        targets: dict[str, tuple[Tensors, Target | None]] = (
            setting.targets() if self.onto else {"zero target": ({}, None)}
        )
        alphas = (1.0,) if self.average else settings.alphas
        for panel in settings.panels:
            sums = {name: self._sums(setting, panel, tensors, clock) for name, (tensors, _) in targets.items()}
            measure = partial(_measure, setting, settings.task, _images_of(panel), clock)
            accuracies = torch.stack([measure(own) for own in sums.values()], dim=1)
            series[panel.name] = grid_series({"alpha": alphas, "target": tuple(targets)}, accuracies)
        values: dict[str, float] = {}
        if len(settings.panels) == 1:
            own_tasks = {name: t.task for name, (_, t) in targets.items() if t is not None}
            values, chosen = _choose_alphas(setting, sums, own_tasks, alphas, clock)
            series |= chosen
        stand_ins = {n: t.instead_of for n, (_, t) in targets.items() if t is not None and t.instead_of}
        return Measured(values, series, clock.seconds, {"stands in for": stand_ins} if stand_ins else {})

    def _sums(self, setting: FusionSetting, panel: PanelSettings, theta_n: Tensors, clock: Clock) -> Sums:
        settings = setting.settings
        theta_a = setting.train_start(settings.task, panel.scale).tensors
        by_formula = "g" if settings.formula == GRADIENT else "theta_A"
        source = gradient(setting.start(), theta_a) if (self.source or by_formula) == "g" else theta_a
        if self.mend == "align":
            source = setting.align(theta_n, theta_a, source, clock)
        if not self.onto:
            return Sums([source], [[alpha] for alpha in settings.alphas])
        rows = [[0.5, 0.5]] if self.average else [[1.0, alpha] for alpha in settings.alphas]
        if self.mend != "repair":
            return Sums([theta_n, source], rows)
        batches = setting.calibration([settings.task], panel.scale)
        finish = repair_on(setting.model, [theta_n, theta_a], batches)
        return Sums([theta_n, source], rows, finish=finish)


def _images_of(panel: PanelSettings) -> str:
    return "test" if panel.evaluated_on == "test" else "training"


def _measure(
    setting: FusionSetting, task: Task, split: str, clock: Clock, sums: Sums, phase: str = EVALUATION
) -> Tensor:
    return measure_sums(setting, sums, setting.images(task, split, "small"), clock, phase)


def _choose_alphas(
    setting: FusionSetting,
    sums: Mapping[str, Sums],
    own_tasks: Mapping[str, Task],
    alphas: tuple[float, ...],
    clock: Clock,
) -> tuple[dict[str, float], dict[str, Series]]:
    """Each target's alpha, chosen on validation images: for the source's task; for both where the target has one."""
    names = tuple(sums)
    best, accuracy, both, own_task = [], [], [], []
    for name, own in sums.items():
        on_validation = partial(_measure, setting, split="validation", clock=clock, sums=own, phase=SEARCH)
        on_test = partial(_measure, setting, split="test", clock=clock)
        held_out = on_validation(task=setting.settings.task)
        chosen = int(held_out.argmax())
        best.append(alphas[chosen])
        one = replace(own, rows=[own.rows[chosen]])
        accuracy.append(float(on_test(task=setting.settings.task, sums=one)))
        if name in own_tasks:
            task = own_tasks[name]
            held_out_both = harmonic_mean(held_out, on_validation(task=task))
            test = on_test(task=setting.settings.task, sums=own)
            own_task.append(on_test(task=task, sums=own))
            both.append(float(harmonic_mean(test, own_task[-1])[int(held_out_both.argmax())]))
    series = {
        "best alpha": Series.over("target", names, best),
        "accuracy at the best alpha": Series.over("target", names, accuracy),
    }
    values = {"accuracy": fmean(accuracy)}
    if own_task:
        series["own task"] = grid_series({"alpha": alphas, "target": names}, torch.stack(own_task, dim=1))
        series["harmonic mean at the best alpha for both"] = Series.over("target", names, both)
        values["both_tasks"] = fmean(both)
    return values, series


def average_logits_with_target(setting: FusionSetting) -> Measured:
    """The mean of the logits of theta_n and theta_A: two networks, twice the inference."""
    settings, targets, clock = setting.settings, setting.targets(), Clock()
    (panel,) = settings.panels
    theta_a = setting.train_start(settings.task, panel.scale).tensors

    def measure(theta_n: Tensors, task: Task, split: str) -> float:
        return measure_ensemble(setting, [theta_n, theta_a], setting.images(task, split, "small"), clock)

    table = [measure(theta_n, settings.task, _images_of(panel)) for theta_n, _ in targets.values()]
    test = [measure(theta_n, settings.task, "test") for theta_n, _ in targets.values()]
    own_task = [measure(theta_n, t.task, "test") for theta_n, t in targets.values() if t is not None]
    values = {"accuracy": fmean(test)}
    if own_task:
        values["both_tasks"] = float(harmonic_mean(torch.tensor(test), torch.tensor(own_task)).mean())
    series = {panel.name: grid_series({"alpha": (1.0,), "target": tuple(targets)}, torch.tensor(table))}
    return Measured(values, series, clock.seconds)


TARGET_SUMS = (
    Method("sum", TargetSum(), about=f"{GRADIENT} (equation 6) or {WEIGHTS} (equation 7)."),
    Method(
        "theta_A alone",
        TargetSum("theta_A", onto=False),
        about="alpha theta_A without any target: what scaling alone does. The same for every target.",
    ),
    Method("g alone", TargetSum("g", onto=False), about="alpha g without any target."),
)
"""What figures show: the sum, and what scaling alone does (a zero target)."""

TARGET_CONTROLS = (
    Method(
        "average",
        TargetSum("theta_A", average=True),
        about="(theta_n + theta_A) / 2, at alpha = 1: theta_n + theta_A, rescaled.",
    ),
    Method("ensemble", average_logits_with_target),
    Method(
        "aligned",
        TargetSum(mend="align"),
        about="The sum, after theta_A's units were permuted to match the target's.",
    ),
    Method(
        "REPAIR",
        TargetSum(mend="repair"),
        about="The sum, after REPAIR towards theta_n and theta_A in the proportion 1 : alpha, whether it adds theta_A "
        "or g.",
    ),
)
