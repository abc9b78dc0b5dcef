"""Methods of tables 5, 6 and A1 to A19: sums of two networks that were trained on two tasks from one start, as data.

A method names its sources, how their coefficients run, and what becomes of BatchNorm's statistics (:class:`Fusion`).
``accuracy``: the harmonic mean of both tasks' test accuracies, with coefficients that were best on validation images. A
method's charge is what it takes beyond theta_A and theta_B, which it is given: the search, the matching.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor, nn

from regraft.core.clock import EVALUATION, Clock
from regraft.core.tensors import Tensors, norm
from regraft.fusion.fisher import estimate_fisher, merge_by_importance
from regraft.fusion.grids import harmonic_mean
from regraft.fusion.merging import merge_ties, trim
from regraft.fusion.repair import repair_on, reset_on
from regraft.fusion.sums import gradient
from regraft.training.statistics import reset_batchnorm
from regraft_bench.fusion.accuracy import A, B, Sums, both_tasks, grid_series, measure_ensemble, measure_sums
from regraft_bench.fusion.setting import SEARCH, TRAIN, FusionSetting
from regraft_bench.fusion.settings import TWO_GRADIENTS, TWO_NETWORKS, TwoTasks
from regraft_bench.study import Measured, Method, Series, Task

LINE_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of theta_A, along the line from theta_B
KEPT_SHARE = 0.2  # of a gradient, by TIES

# ---------------------------------------------------------------- what is summed


def _align_b(setting: FusionSetting, clock: Clock, *, elsewhere: bool = False) -> Tensors:
    b = setting.theta_b_elsewhere if elsewhere else setting.theta_b
    return setting.align(setting.theta_a, b, b, clock)


def _elect_signs(setting: FusionSetting, clock: Clock) -> Tensors:
    with clock.phase("merge", setting.device):
        names = [name for name, _ in setting.model.named_parameters()]
        return merge_ties([trim(g, names, KEPT_SHARE) for g in setting.gradients])


def _pretrain(setting: FusionSetting, clock: Clock) -> Tensors:
    clock.add({TRAIN: setting.pretraining.cost})
    return setting.pretraining.tensors


def _train_further(number: int, setting: FusionSetting, clock: Clock) -> Tensors:
    """What training on task A (0) or B (1) changes of theta_pre."""
    task, scale, start = setting.tasks[number], setting.settings.scale, setting.pretraining.tensors
    recipe = setting.settings.regime.recipe(scale)
    run = setting.train_from(f"{task.data} after pre-training", start, task, scale, recipe)
    clock.add({TRAIN: run.cost})
    return gradient(start, run.tensors)


TWO_TASK_TERMS: dict[str, Callable[[FusionSetting, Clock], Tensors]] = {
    "theta_0": lambda setting, _: setting.start(),
    "theta_A": lambda setting, _: setting.theta_a,
    "theta_B": lambda setting, _: setting.theta_b,
    "g_1": lambda setting, _: setting.gradients[0],
    "g_2": lambda setting, _: setting.gradients[1],
    "theta_B, aligned": _align_b,
    "theta_B from elsewhere": lambda setting, _: setting.theta_b_elsewhere,
    "theta_B from elsewhere, aligned": partial(_align_b, elsewhere=True),
    "TIES(g_1, g_2)": _elect_signs,
    "theta_pre": _pretrain,
    "theta_A - theta_pre": partial(_train_further, 0),
    "theta_B - theta_pre": partial(_train_further, 1),
}
STARTS = ("theta_0", "theta_pre")  # stand in a sum as they are; everything else is scaled
FORMULAS = {TWO_NETWORKS: ("theta_A", "theta_B"), TWO_GRADIENTS: ("theta_0", "g_1", "g_2")}

# ---------------------------------------------------------------- by how much

Statistics = Literal["own", "summed", "reset", "repair"]
Axes = Mapping[str, Sequence[float]]
Points = tuple[Axes, list[list[float]]]
"""Positions by axis, the first one outermost; and for each point a coefficient of every source that is scaled."""


def grid_points(settings: TwoTasks, _scaled: int) -> Points:
    """alpha of the first, beta of the second."""
    rows = [[float(alpha), float(beta)] for beta in settings.betas for alpha in settings.alphas]
    return {"beta": settings.betas, "alpha": settings.alphas}, rows


def diagonal_points(settings: TwoTasks, scaled: int) -> Points:
    """alpha of all."""
    return {"alpha": settings.controls}, [[alpha] * scaled for alpha in settings.controls]


def line_points(_settings: TwoTasks, _scaled: int) -> Points:
    """alpha of the first, 1 - alpha of the second."""
    return {"alpha": LINE_SHARES}, [[share, 1 - share] for share in LINE_SHARES]


def middle_point(_settings: TwoTasks, _scaled: int) -> Points:
    """Half of each."""
    return {"alpha": (0.5,)}, [[0.5, 0.5]]


# ---------------------------------------------------------------- the methods


@dataclass(frozen=True)
class Fusion:
    """A method: called with a setting, it measures a sum of sources at all coefficients, and chooses among them.

    sources: names in `TERMS`; without any, those of the table's formula. statistics: of BatchNorm: each batch's
    "own", "summed" as weights are, taken anew on both tasks' training images ("reset"), or by "repair".
    """

    sources: tuple[str, ...]
    coefficients: Callable[[TwoTasks, int], Points]
    statistics: Statistics = "own"

    def __call__(self, setting: FusionSetting) -> Measured:
        clock, names = Clock(), self.sources or FORMULAS[setting.settings.formula]
        sources = [TWO_TASK_TERMS[name](setting, clock) for name in names]
        starts = [1.0 for name in names if name in STARTS]
        axes, rows = self.coefficients(setting.settings, len(names) - len(starts))
        return choose_on_validation(setting, self._sums(setting, sources, [starts + row for row in rows]), axes, clock)

    def _sums(self, setting: FusionSetting, sources: list[Tensors], rows: list[list[float]]) -> Sums:
        if self.statistics == "own":
            return Sums(sources, rows)
        if self.statistics == "summed":
            return Sums(sources, rows, setting.model)
        batches = setting.calibration(setting.tasks, setting.settings.scale)
        if self.statistics == "reset":
            return Sums(sources, rows, setting.model, reset_on(setting.model, batches))
        return Sums(sources, rows, setting.model, repair_on(setting.model, sources, batches))


def choose_on_validation(setting: FusionSetting, sums: Sums, axes: Axes, clock: Clock) -> Measured:
    """Sums at all positions: both tasks' accuracies on the table's images; the best on validation images, on test's."""
    settings = setting.settings

    def measure(split: str, phase: str = EVALUATION, which: slice = slice(None)) -> list[Tensor]:
        chosen = Sums(sums.sources, sums.rows[which], sums.model, sums.finish)
        images = [setting.images(task, split, settings.scale) for task in setting.tasks]
        return [measure_sums(setting, chosen, own, clock, phase) for own in images]

    held_out = harmonic_mean(*measure("validation", SEARCH))
    best = int(held_out.argmax())
    if setting.tuning:
        return Measured({"validation": float(held_out[best])}, {}, clock.seconds)
    table = measure(settings.evaluated_on)
    test = table if settings.evaluated_on == "test" else measure("test", which=slice(best, best + 1))
    values = both_tasks(*(float(t[best if len(t) > 1 else 0]) for t in test))
    position = torch.unravel_index(torch.tensor(best), [len(p) for p in axes.values()])
    values |= {axis: p[int(k)] for (axis, p), k in zip(axes.items(), position, strict=True)}
    series = {name: grid_series(axes, accuracies) for name, accuracies in zip((A, B), table, strict=True)}
    return Measured(values, series, clock.seconds)


def find_importance(setting: FusionSetting, task: Task, tensors: Tensors, clock: Clock) -> Tensors:
    """The diagonal of the Fisher information on the task's training images, by parameter."""
    scale = setting.settings.scale
    with clock.phase("fisher", setting.device):
        # It is taken image by image, so BatchNorm must not look at a batch.
        fixed = reset_batchnorm(setting.model, tensors, setting.calibration([task], scale))
        batches = zip(*(t.split(50) for t in setting.images(task, "training", scale)), strict=True)
        generator = setting.generator("fisher", task.data, task.classes)
        return estimate_fisher(setting.model, fixed, batches, generator=generator)


def merge_with_fisher(setting: FusionSetting) -> Measured:
    """Parameters averaged by their importance (Matena and Raffel, 2022): alpha F_A and (1 - alpha) F_B are the weights.

    A parameter that neither network needs is averaged by alpha alone; buffers are.
    """
    clock, pair = Clock(), (setting.theta_a, setting.theta_b)
    importances = [find_importance(setting, t, own, clock) for t, own in zip(setting.tasks, pair, strict=True)]
    merged = [merge_by_importance(pair, importances, (share, 1 - share)) for share in LINE_SHARES]
    sums = Sums(merged, torch.eye(len(merged)).tolist())
    return choose_on_validation(setting, sums, {"alpha": LINE_SHARES}, clock)


def average_logits(setting: FusionSetting) -> Measured:
    """The mean of both networks' logits: twice the inference."""
    settings, clock, members = setting.settings, Clock(), (setting.theta_a, setting.theta_b)

    def measure(split: str) -> list[float]:
        images = [setting.images(task, split, settings.scale) for task in setting.tasks]
        return [measure_ensemble(setting, members, own, clock) for own in images]

    table = zip((A, B), measure(settings.evaluated_on), strict=True)
    series = {name: Series.over("alpha", (0.5,), (value,)) for name, value in table}
    return Measured(both_tasks(*measure("test")), series, clock.seconds)


def measure_diagonal(setting: FusionSetting) -> Measured:
    """theta_A + theta_B on the table's images, what either is worth there, and how far training moved them."""
    settings, clock, pair = setting.settings, Clock(), (setting.theta_a, setting.theta_b)
    sums = Sums(pair, [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    images = [setting.images(task, settings.evaluated_on, settings.scale) for task in setting.tasks]
    on_a, on_b = (measure_sums(setting, sums, own, clock).tolist() for own in images)
    start = _parameter_norm(setting.model, setting.start())
    ratios = [_parameter_norm(setting.model, g) / start for g in setting.gradients]
    values = both_tasks(on_a[2], on_b[2])
    values |= {"own_a": on_a[0], "own_b": on_b[1]}
    values |= {"other_a": on_a[1], "other_b": on_b[0]}  # of the network that never saw the task
    values |= {"delta_ratio_a": ratios[0], "delta_ratio_b": ratios[1], "delta_ratio": fmean(ratios)}
    cost = setting.training_a.cost + setting.training_b.cost
    return Measured(values, {}, {TRAIN: cost, **clock.seconds})


def _parameter_norm(model: nn.Module, tensors: Tensors) -> float:
    """Of all parameters, BatchNorm's statistics left out."""
    return norm(tensors[name] for name, _ in model.named_parameters())


def _method(
    name: str,
    about: str,
    *sources: str,
    coefficients: Callable[[TwoTasks, int], Points] = diagonal_points,
    statistics: Statistics = "own",
) -> Method:
    return Method(name, Fusion(sources, coefficients, statistics), about=about)


SUM = _method("sum", "The table's own formula.", coefficients=grid_points)
SUM_OF_NETWORKS = _method("sum", f"{TWO_NETWORKS}.", *FORMULAS[TWO_NETWORKS], coefficients=grid_points)
SUM_OF_GRADIENTS = _method("assignment", f"{TWO_GRADIENTS}.", *FORMULAS[TWO_GRADIENTS], coefficients=grid_points)
ARITHMETIC = _method(
    "task arithmetic",
    "theta_pre + alpha (theta_A - theta_pre) + beta (theta_B - theta_pre), both trained from theta_pre.",
    "theta_pre", "theta_A - theta_pre", "theta_B - theta_pre", coefficients=grid_points,
)  # fmt: skip

AVERAGES = (
    _method("average", "(theta_A + theta_B) / 2.", "theta_A", "theta_B", coefficients=middle_point),
    Method("ensemble", average_logits),
)
ALONE = (
    _method("theta_A alone", "alpha theta_A.", "theta_A"),
    _method("theta_B alone", "alpha theta_B.", "theta_B"),
)
TWO_TASK_CONTROLS = (
    *ALONE,
    _method("g_1 alone", "alpha g_1.", "g_1"),
    _method("g_2 alone", "alpha g_2.", "g_2"),
    *AVERAGES,
    _method("fused statistics", "BatchNorm's running statistics summed as weights are.", statistics="summed"),
    _method(
        "reset statistics",
        "BatchNorm's running statistics taken anew on training images of both tasks.",
        statistics="reset",
    ),
)
MERGING_PEERS = (
    _method("line", "alpha theta_A + (1 - alpha) theta_B.", "theta_A", "theta_B", coefficients=line_points),
    Method("Fisher merging", merge_with_fisher),
    _method(
        "TIES",
        "theta_0 + alpha TIES(g_1, g_2) (Yadav et al., 2023): of each gradient the largest fifth, signs elected.",
        "theta_0", "TIES(g_1, g_2)",
    ),
)  # fmt: skip
OF_TWO_STARTS = (
    _method(
        "other start", "theta_A + theta_B, which started elsewhere.", "theta_A", "theta_B from elsewhere"
    ),
    _method(
        "other start, aligned",
        "theta_A + theta_B, which started elsewhere and was permuted to match theta_A.",
        "theta_A", "theta_B from elsewhere, aligned",
    ),
)  # fmt: skip
OF_NETWORKS = (
    *MERGING_PEERS,
    _method("REPAIR", "REPAIR towards theta_A and theta_B.", "theta_A", "theta_B", statistics="repair"),
    _method(
        "aligned",
        "theta_A + theta_B after theta_B's units were permuted to match theta_A's.",
        "theta_A", "theta_B, aligned",
    ),
    *OF_TWO_STARTS,
)  # fmt: skip
OF_GRADIENTS = (_method("zero target", "alpha g_1 + alpha g_2, without theta_0.", "g_1", "g_2"),)
DIAGONAL = (Method("diagonal", measure_diagonal),)
