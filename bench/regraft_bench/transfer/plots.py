"""Figures of the transfer study: functions of its rows and of nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from regraft_bench.report.figures import Cells, Figure, Heatmap, Line, Panel, curves, leaders
from regraft_bench.report.tables import Rows, by_scenario, groups
from regraft_bench.study import Scenario
from regraft_bench.transfer import scenarios

# ---------------------------------------------------------------- lines of rows


def variants(rows: Rows, question: str, base: str) -> Iterator[tuple[str, Rows]]:
    """(variant, rows) of the scenarios question-base-variant."""
    for name, own in by_scenario(rows).items():
        if name.startswith(f"{question}-{base}-"):
            yield name.removeprefix(f"{question}-{base}-"), own


def mean_value(rows: Rows, method: str, name: str) -> float | None:
    """Over one scenario's seeds."""
    values = [v for r in rows if r.method == method and (v := r.values.get(name)) is not None]
    return statistics.fmean(values) if values else None


def draw_regime(base: str, method: str, rows: Rows) -> Iterator[Line]:
    """A line for each knob: accuracy without training, of plain training's, over |Delta| / |theta_1^0|."""
    for knob in ("init", "lr", "epochs", "width"):
        points = []
        for variant, own in variants(rows, "regime", base):
            ratio, accuracy = (mean_value(own, method, name) for name in ("delta_ratio", "accuracy"))
            plain = mean_value(own, "plain", "accuracy")
            if variant.startswith((knob, "base")) and ratio is not None and accuracy is not None and plain:
                points.append((ratio, accuracy / plain))
        if points:
            x, y = zip(*sorted(points), strict=True)
            yield Line(knob, x, y)


def draw_knob(question: str, base: str, knob: str, first: float, rows: Rows) -> Iterator[Line]:
    """A line for each method: accuracy without training over the knob's value; ``first`` is the base's."""
    points: dict[str, list[tuple[float, float | None]]] = {}
    for variant, own in variants(rows, question, base):
        if variant == "base" or variant.startswith(knob):
            at = first if variant == "base" else float(variant.removeprefix(f"{knob}-"))
            for method in groups(own):
                points.setdefault(method, []).append((at, mean_value(own, method, "accuracy")))
    for method, line in points.items():
        if len(line) > 1:
            x, y = zip(*sorted((at, mean) for at, mean in line if mean is not None), strict=True)
            yield Line(method, x, y)


def draw_schedules(base: str, method: str, rows: Rows) -> Iterator[Line]:
    """A line for each schedule: validation accuracy along the path."""
    for schedule, own in variants(rows, "schedule", base):
        for line in curves("validation", methods=(method,))(own):
            yield replace(line, name=schedule)


def draw_widths(side: int, rows: Rows) -> Iterator[Line]:
    """A line for each permutation: the distance of first gradients over the width."""
    distances: dict[str, dict[float, list[float]]] = {}
    for name, own in by_scenario(rows).items():
        _, sides, width = name.split("-")
        for method, group in groups(own).items():
            if sides == f"{side}x{side}" and (values := group.values("distance")):
                distances.setdefault(method, {})[float(width)] = values
    for method, line in distances.items():
        x, seeds = zip(*sorted(line.items()), strict=True)
        y = tuple(map(statistics.fmean, seeds))
        deviations = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in seeds]
        low, high = (tuple(v + s * d for v, d in zip(y, deviations, strict=True)) for s in (-1, 1))
        yield Line(method, x, y, low, high)


def draw_lines(scenario: str, beginning: str, rows: Rows) -> list[Line]:
    """The loss along the lines whose names begin so."""
    return curves("loss", scenario=scenario)([row for row in rows if row.method.startswith(beginning)])


def draw_plane(scenario: str, rows: Rows) -> Cells | None:
    """Accuracy on the plane of the first seed."""
    own = [row for row in rows if row.scenario == scenario and row.method == "plane" and row.series]
    if not own:
        return None
    grid = own[0].series["accuracy"]
    y, x = ([f"{v:.1f}" for v in axis] for axis in grid.at)
    return Cells(tuple(reversed(y)), tuple(x), tuple(reversed(grid.values)))


# ---------------------------------------------------------------- figures

log_panel = partial(Panel, x_log=True)
REGIME_BASES = ("mlp", "conv", "resnet")
LEADERBOARD = [
    scenario
    for name in ("mnist-mlp-512", "mnist-mlp-4096", "cifar10-conv6", "digits-conv")
    for scenario in scenarios.COMPARISONS
    if scenario.name == name
]
PORT_LINES = (
    *("own base", "probe", "few-shot", "naive", "weights"),
    *("gradfix, mean", "fgmt", "fgmt + gradfix, mean", "fgmt, then few-shot"),
)


def _figure(
    name: str, title: str, asked: Sequence[Scenario], make_panel: Callable[[str], Panel | Heatmap], caption: str
) -> Figure:
    """A panel for each scenario; those without rows are left out when the figure is drawn."""
    names = scenarios.list_names(asked)
    return Figure(name, title, names, tuple(map(make_panel, names)), caption)


TRANSFER_FIGURES = (
    _figure(
        "leaderboard",
        "Accuracy of a network that was never trained (plain: trained), and what it costs",
        LEADERBOARD,
        lambda name: log_panel(name, "CPU seconds", "test accuracy", leaders(name)),
        "Only plain and oracle train the target; the others add another network's training. Best: high, left.",
    ),
    _figure(
        "path",
        "Along the transferred path, no training",
        scenarios.COMPARISONS,
        lambda name: Panel(name, "step t", "validation accuracy", curves("validation", scenario=name)),
        "Accuracy while the source's training is added to the target step by step; nothing is trained.",
    ),
    _figure(
        "subsequent",
        "The training that follows, and plain training",
        scenarios.COMPARISONS,
        lambda name: Panel(name, "epoch", "test accuracy", curves("subsequent", scenario=name, first=1), x_log=True),
        "What a transferred start saves: its curve begins where plain training arrives later.",
    ),
    _figure(
        "settling",
        "Lemma 3.2: how far step t's permutation moves the path from where the last one does",
        scenarios.COMPARISONS,
        lambda name: Panel(name, "step t", "‖π_t Δ − π_T Δ‖ / ‖Δ‖", curves("unsettled", scenario=name)),
        "A line that falls early says that early steps find the last permutation already.",
    ),
    Figure(
        "regime",
        "When transfer works: accuracy without training",
        scenarios.list_names(scenarios.REGIMES),
        (
            *(
                log_panel(
                    f"{method}, digits, {base}",
                    "‖Δ‖ / ‖θ₁⁰‖",
                    "accuracy, share of plain training's",
                    partial(draw_regime, base, method),
                )
                for base in REGIME_BASES
                for method in ("naive", "fgmt", "oracle")
            ),
            *(
                log_panel(
                    f"initial scale, {base}",
                    "times PyTorch's default",
                    "test accuracy",
                    partial(draw_knob, "regime", base, "init", 1.0),
                )
                for base in REGIME_BASES
            ),
        ),
        "1 means as accurate as plain training. To the right the source's training moved its weights farther.",
    ),
    Figure(
        "schedules",
        "Uniform, cosine, and the source's own checkpoints",
        scenarios.list_names(scenarios.PATHS),
        tuple(
            Panel(f"{method}, {base}", "step t", "validation accuracy", partial(draw_schedules, base, method))
            for base in ("mlp2", "conv", "pretrained2", "cifar10")
            for method in ("fgmt", "gmt")
        ),
        "The straight line from start to end, in even or cosine steps, and the checkpoints that the training passed.",
    ),
    Figure(
        "sensitivity",
        "T, batches a gradient, and their size",
        scenarios.list_names(scenarios.SENSITIVITY),
        tuple(
            log_panel(
                f"{title}, {base}",
                title,
                "test accuracy",
                partial(draw_knob, "sensitivity", base, knob, first),
            )
            for base in ("mlp2", "conv")
            for title, knob, first in (
                ("steps T", "T", 10),
                ("batches a gradient", "batches", 1),
                ("images a batch", "size", 128),
            )
        ),
        "What the three settings of FGMT and GMT change: a flat line is a setting that one need not search.",
    ),
    _figure(
        "assumption",
        "Assumption (P): distance of what two runs learn, and 1 for unrelated runs",
        scenarios.ASSUMPTION,
        lambda name: log_panel(name, "updates", "distance", curves("distance", scenario=name)),
        "The method assumes that a permutation brings the distance near 0; near 1 two runs have nothing in common.",
    ),
    Figure(
        "theorem",
        "Theorem A.1: distance of first gradients over the width",
        scenarios.list_names(scenarios.THEOREM),
        tuple(
            log_panel(f"{side * side} inputs", "hidden units", "distance", partial(draw_widths, side))
            for side in scenarios.SIDES
        ),
        "By the theorem the distance under the right permutation falls with the width.",
    ),
    Figure(
        "basins",
        "Loss from the first network to the second",
        scenarios.list_names(scenarios.BASINS),
        tuple(
            Panel(
                name,
                f"share of the second ({beginning} ...)",
                "test loss [nats]",
                partial(draw_lines, name, beginning),
            )
            for name in scenarios.list_names(scenarios.BASINS)
            for beginning in ("source", "target")
        ),
        "A bump between two networks says that they lie in different basins.",
    ),
    _figure(
        "plane",
        "Accuracy on the plane of target (origin), oracle and FGMT, seed 0",
        scenarios.BASINS,
        lambda name: Heatmap(name, "distance", "distance", partial(draw_plane, name)),
        "Networks between the corners keep their accuracy only where the plane is flat.",
    ),
    _figure(
        "ports",
        "A fine-tune on a new base",
        scenarios.PORTS,
        lambda name: log_panel(
            name,
            "images of each class",
            "test accuracy",
            curves("accuracy by images", methods=PORT_LINES, scenario=name),
        ),
        "own base: the fine-tune where it was made. A port pays where it is above few-shot training.",
    ),
)
