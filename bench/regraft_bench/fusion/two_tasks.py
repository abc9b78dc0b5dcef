"""Methods of tables 6 and A1 to A19: sums of two networks that were trained on two tasks from one start.

``accuracy``: the harmonic mean of both tasks' test accuracies, with coefficients that were best on validation images. A
method's charge is what it takes beyond theta_A and theta_B, which it is given: the search, the matching.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from regraft.core.clock import EVALUATION, Clock
from regraft.core.tensors import Tensors
from regraft.fusion.grids import harmonic_mean, lattice
from regraft.fusion.repair import repair_on, reset_on
from regraft.fusion.sums import Finish, fuse
from regraft.training.evaluation import reset_batchnorm
from regraft_bench.fusion.sequential import fisher
from regraft_bench.fusion.setting import (
    SEARCH,
    TRAIN,
    TWO_GRADIENTS,
    TWO_NETWORKS,
    A,
    B,
    FusionSetting,
    grid_series,
)
from regraft_bench.study import Measured, Method, Series, Task

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of theta_A, along the line from theta_B
KEPT = 0.2  # of a gradient, by TIES
TINY = 1e-12  # importance of a parameter that nothing depends on


def searched(
    setting: FusionSetting,
    sources: Sequence[Tensors],
    rows: Sequence[Sequence[float]],
    at: Mapping[str, Sequence[float]],
    clock: Clock,
    **how: Any,
) -> Measured:
    """Sums at all positions: both tasks' accuracies on the table's images; the best on validation images, on test's.

    at: positions by axis, the first one outermost, of which there is one row each.
    """
    settings, axes, positions = setting.settings, tuple(at), tuple(tuple(p) for p in at.values())

    def both(split: str, phase: str = EVALUATION, which: slice = slice(None)) -> list[Tensor]:
        return [
            setting.accuracies(
                sources, rows[which], setting.images(task, split, settings.scale), clock, phase, **how
            )
            for task in setting.tasks
        ]

    held = harmonic_mean(*both("validation", SEARCH))
    best = int(held.argmax())
    if setting.tuning:
        return Measured({"validation": float(held[best])}, {}, clock.seconds)
    table = both(settings.evaluated_on)
    test = table if settings.evaluated_on == "test" else both("test", which=slice(best, best + 1))
    values = both_tasks(*(float(t[best if len(t) > 1 else 0]) for t in test))
    chosen = torch.unravel_index(torch.tensor(best), [len(p) for p in positions])
    values |= {axis: p[int(k)] for axis, p, k in zip(axes, positions, chosen, strict=True)}
    series = {name: grid_series(axes, positions, found) for name, found in zip((A, B), table, strict=True)}
    return Measured(values, series, clock.seconds)


def both_tasks(a: float, b: float) -> dict[str, float]:
    """The harmonic mean beside what it is of."""
    return {"accuracy": 2 * a * b / (a + b) if a + b else 0.0, A: a, B: b}


def _whole_grid(setting: FusionSetting, formula: str) -> Measured:
    settings = setting.settings
    if formula == TWO_NETWORKS:
        sources, rows = (
            [setting.theta_a, setting.theta_b],
            lattice(settings.betas, settings.alphas, lambda b, a: (a, b)),
        )
    else:
        sources = [setting.start(), *setting.gradients]
        rows = lattice(settings.betas, settings.alphas, lambda b, a: (1.0, a, b))
    return searched(
        setting, sources, rows.tolist(), {"beta": settings.betas, "alpha": settings.alphas}, Clock()
    )


def fused(setting: FusionSetting) -> Measured:
    """alpha theta_A + beta theta_B."""
    return _whole_grid(setting, TWO_NETWORKS)


def assigned(setting: FusionSetting) -> Measured:
    """theta_0 + alpha g_1 + beta g_2."""
    return _whole_grid(setting, TWO_GRADIENTS)


def summed(setting: FusionSetting) -> Measured:
    """The table's own formula."""
    return _whole_grid(setting, setting.settings.formula)


# ---------------------------------------------------------------- two tasks: controls along alpha = beta


def _diagonal(
    setting: FusionSetting,
    sources: Sequence[Tensors],
    clock: Clock | None = None,
    *,
    fixed: int = 0,
    model: nn.Module | None = None,
    finish: Finish | None = None,
) -> Measured:
    """All sources but the first ``fixed`` scaled alike."""
    alphas = setting.settings.controls
    rows = [[*[1.0] * fixed, *[alpha] * (len(sources) - fixed)] for alpha in alphas]
    return searched(setting, sources, rows, {"alpha": alphas}, clock or Clock(), model=model, finish=finish)


def a_alone(setting: FusionSetting) -> Measured:
    """alpha theta_A."""
    return _diagonal(setting, [setting.theta_a])


def b_alone(setting: FusionSetting) -> Measured:
    """alpha theta_B."""
    return _diagonal(setting, [setting.theta_b])


def g_1_alone(setting: FusionSetting) -> Measured:
    """alpha g_1."""
    return _diagonal(setting, [setting.gradients[0]])


def g_2_alone(setting: FusionSetting) -> Measured:
    """alpha g_2."""
    return _diagonal(setting, [setting.gradients[1]])


def zero_target(setting: FusionSetting) -> Measured:
    """alpha g_1 + alpha g_2, without theta_0."""
    return _diagonal(setting, setting.gradients)


def average(setting: FusionSetting) -> Measured:
    """(theta_A + theta_B) / 2."""
    sources = [setting.theta_a, setting.theta_b]
    return searched(setting, sources, [[0.5, 0.5]], {"alpha": (0.5,)}, Clock())


def along_the_line(setting: FusionSetting) -> Measured:
    """alpha theta_A + (1 - alpha) theta_B."""
    rows = [[share, 1 - share] for share in SHARES]
    return searched(setting, [setting.theta_a, setting.theta_b], rows, {"alpha": SHARES}, Clock())


def importance(setting: FusionSetting, task: Task, tensors: Tensors, clock: Clock) -> Tensors:
    """The diagonal of the Fisher information on the task's training images, by parameter."""
    scale = setting.settings.scale
    with clock.phase("fisher", setting.device):
        # It is taken image by image, so BatchNorm must not look at a batch.
        settled = reset_batchnorm(setting.model, tensors, setting.calibration([task], scale))
        images, _ = setting.images(task, "training", scale)
        drawn = setting.generator("fisher", task.data, task.classes)
        return fisher(setting.model, settled, images, generator=drawn, batch_size=50)


def fisher_merged(setting: FusionSetting) -> Measured:
    """Parameters averaged by their importance (Matena and Raffel, 2022): alpha F_A and (1 - alpha) F_B are the weights.

    A parameter that neither network needs is averaged by alpha alone; buffers are.
    """
    clock, pair = Clock(), (setting.theta_a, setting.theta_b)
    weights = [importance(setting, t, own, clock) for t, own in zip(setting.tasks, pair, strict=True)]

    def merged(share: float) -> Tensors:
        found = fuse(pair, (share, 1 - share))
        for name in weights[0]:
            a, b = share * (weights[0][name] + TINY), (1 - share) * (weights[1][name] + TINY)
            found[name] = (a * pair[0][name] + b * pair[1][name]) / (a + b)
        return found

    sources = [merged(share) for share in SHARES]
    return searched(setting, sources, torch.eye(len(SHARES)).tolist(), {"alpha": SHARES}, clock)


def ties(setting: FusionSetting) -> Measured:
    """theta_0 + alpha TIES(g_1, g_2) (Yadav et al., 2023): of each gradient the largest fifth, signs elected."""
    clock = Clock()
    with clock.phase("merge", setting.device):
        names = [name for name, _ in setting.model.named_parameters()]
        together = ties_merged([trimmed(g, names, KEPT) for g in setting.gradients])
    alphas = setting.settings.controls
    rows = [[1.0, alpha] for alpha in alphas]
    return searched(setting, [setting.start(), together], rows, {"alpha": alphas}, clock)


def trimmed(g: Tensors, names: Sequence[str], kept: float) -> Tensors:
    """`g`, with zeros but for the share `kept` of the named tensors' values that are largest by magnitude."""
    sizes = torch.cat([g[name].abs().flatten() for name in names])
    least = sizes.sort().values[-max(1, round(kept * len(sizes)))]
    return g | {name: torch.where(g[name].abs() >= least, g[name], 0) for name in names}


def ties_merged(parts: Sequence[Tensors]) -> Tensors:
    """Value by value the mean of those parts that are not zero and have the sign of the parts' sum."""
    found = {}
    for name, first in parts[0].items():
        stack = torch.stack([part[name] for part in parts])
        agree = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
        total = torch.where(agree, stack, 0).sum(0)
        found[name] = (total / agree.sum(0).clamp_min(1)).to(first.dtype)
    return found


def ensemble(setting: FusionSetting) -> Measured:
    """The mean of both networks' logits: twice the inference."""
    settings, clock = setting.settings, Clock()

    def both(split: str) -> list[float]:
        members = [setting.theta_a, setting.theta_b]
        return [
            setting.ensemble(members, setting.images(t, split, settings.scale), clock) for t in setting.tasks
        ]

    table = dict(zip((A, B), both(settings.evaluated_on), strict=True))
    series = {name: Series.over("alpha", (0.5,), (value,)) for name, value in table.items()}
    return Measured(both_tasks(*both("test")), series, clock.seconds)


def aligned(setting: FusionSetting) -> Measured:
    """theta_A + theta_B after theta_B's units were permuted to match theta_A's."""
    clock = Clock()
    moved = setting.aligned(setting.theta_a, setting.theta_b, setting.theta_b, clock)
    return _diagonal(setting, [setting.theta_a, moved], clock)


def _other(setting: FusionSetting) -> Tensors:
    """theta_B, trained from initial values of its own."""
    return setting.trained(setting.settings.b, setting.settings.scale, number=1).tensors


def other_start(setting: FusionSetting) -> Measured:
    """theta_A + theta_B, which started elsewhere."""
    return _diagonal(setting, [setting.theta_a, _other(setting)])


def other_start_aligned(setting: FusionSetting) -> Measured:
    """theta_A + theta_B, which started elsewhere and was permuted to match theta_A."""
    clock, other = Clock(), _other(setting)
    return _diagonal(setting, [setting.theta_a, setting.aligned(setting.theta_a, other, other, clock)], clock)


def _sources(setting: FusionSetting) -> tuple[list[Tensors], int]:
    """What the table's formula sums, and how many of its first terms are not scaled."""
    if setting.settings.formula == TWO_NETWORKS:
        return [setting.theta_a, setting.theta_b], 0
    return [setting.start(), *setting.gradients], 1


def fused_statistics(setting: FusionSetting) -> Measured:
    """BatchNorm's running statistics summed as weights are."""
    sources, fixed = _sources(setting)
    return _diagonal(setting, sources, fixed=fixed, model=setting.model)


def reset_statistics(setting: FusionSetting) -> Measured:
    """BatchNorm's running statistics taken anew on training images of both tasks."""
    sources, fixed = _sources(setting)
    finish = reset_on(setting.model, setting.calibration(setting.tasks, setting.settings.scale))
    return _diagonal(setting, sources, fixed=fixed, model=setting.model, finish=finish)


def repaired(setting: FusionSetting) -> Measured:
    """REPAIR towards theta_A and theta_B."""
    sources = [setting.theta_a, setting.theta_b]
    batches = setting.calibration(setting.tasks, setting.settings.scale)
    return _diagonal(setting, sources, model=setting.model, finish=repair_on(setting.model, sources, batches))


def diagonal(setting: FusionSetting) -> Measured:
    """theta_A + theta_B on the table's images, what either is worth there, and how far training moved them."""
    settings, clock = setting.settings, Clock()
    rows = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    on_a, on_b = (
        setting.accuracies(
            [setting.theta_a, setting.theta_b],
            rows,
            setting.images(task, settings.evaluated_on, settings.scale),
            clock,
        )
        for task in setting.tasks
    )
    start, g = setting.start(), setting.gradients
    ratios = [_norm(setting.model, moved) / _norm(setting.model, start) for moved in g]
    values = both_tasks(float(on_a[2]), float(on_b[2]))
    values |= {"own_a": float(on_a[0]), "own_b": float(on_b[1])}
    values |= {"other_a": float(on_a[1]), "other_b": float(on_b[0])}  # of the network that never saw the task
    values |= {"delta_ratio_a": ratios[0], "delta_ratio_b": ratios[1], "delta_ratio": fmean(ratios)}
    cost = setting.training_a.cost + setting.training_b.cost
    return Measured(values, {}, {TRAIN: cost, **clock.seconds})


def _norm(model: nn.Module, tensors: Tensors) -> float:
    """Of all parameters, BatchNorm's statistics left out."""
    return math.sqrt(
        sum(float(tensors[name].double().square().sum()) for name, _ in model.named_parameters())
    )


SUM = Method("sum", summed)

ALONE = (Method("theta_A alone", a_alone), Method("theta_B alone", b_alone))

CONTROLS = (
    *ALONE,
    Method("g_1 alone", g_1_alone),
    Method("g_2 alone", g_2_alone),
    Method("average", average),
    Method("ensemble", ensemble),
    Method("fused statistics", fused_statistics),
    Method("reset statistics", reset_statistics),
)

PEERS = (
    Method("line", along_the_line),
    Method("Fisher merging", fisher_merged),
    Method("TIES", ties),
)

OF_TWO_STARTS = (Method("other start", other_start), Method("other start, aligned", other_start_aligned))

OF_NETWORKS = (
    *PEERS,
    Method("REPAIR", repaired),
    Method("aligned", aligned),
    *OF_TWO_STARTS,
)

OF_GRADIENTS = (Method("zero target", zero_target),)

DIAGONAL = (Method("diagonal", diagonal),)
