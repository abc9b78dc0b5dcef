"""Figures of the transfer study: functions of its rows and of nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

from regraft_bench.report.figures import Cells, Figure, Heatmap, Line, Panel, curves, leaders
from regraft_bench.report.tables import Rows, by_scenario, groups
from regraft_bench.study import Scenario
from regraft_bench.transfer import scenarios


def _names(found: Sequence[Scenario]) -> tuple[str, ...]:
    return tuple(scenario.name for scenario in found)


def _panels(found: Sequence[Scenario], series: str, x: str, y: str, **style: bool) -> tuple[Panel, ...]:
    """One for each scenario; those without rows are left out when the figure is drawn."""
    return tuple(Panel(name, x, y, curves(series, scenario=name), **style) for name in _names(found))


# ---------------------------------------------------------------- over a setting

KNOBS = ("init", "lr", "epochs", "width")


def _variants(rows: Rows, question: str, base: str) -> Iterator[tuple[str, Rows]]:
    """(variant, rows) of the scenarios question-base-variant."""
    for name, own in by_scenario(rows).items():
        if name.startswith(f"{question}-{base}-"):
            yield name.removeprefix(f"{question}-{base}-"), own


def _mean(rows: Rows, method: str, value: str) -> float | None:
    found = [v for r in rows if r.method == method and (v := r.values.get(value)) is not None]
    return statistics.fmean(found) if found else None


def regime(base: str, method: str) -> Callable[[Rows], list[Line]]:
    """A line for each knob: accuracy without training, of plain training's, over |Delta| / |theta_1^0|."""

    def lines(rows: Rows) -> list[Line]:
        found = []
        for knob in KNOBS:
            points = []
            for variant, own in _variants(rows, "regime", base):
                numbers = (
                    _mean(own, method, "delta_ratio"),
                    _mean(own, method, "accuracy"),
                    _mean(own, "plain", "accuracy"),
                )
                if variant.startswith((knob, "base")) and None not in numbers:
                    points.append((numbers[0], numbers[1] / numbers[2]))
            if points:
                found.append(Line(knob, *zip(*sorted(points), strict=True)))
        return found

    return lines


def over(question: str, base: str, knob: str, first: float) -> Callable[[Rows], list[Line]]:
    """A line for each method: accuracy without training over the knob's value; ``first`` is the base's."""

    def lines(rows: Rows) -> list[Line]:
        points: dict[str, list[tuple[float, float]]] = {}
        for variant, own in _variants(rows, question, base):
            if variant == "base" or variant.startswith(knob):
                at = first if variant == "base" else float(variant.removeprefix(f"{knob}-"))
                for method in groups(own):
                    points.setdefault(method, []).append((at, _mean(own, method, "accuracy")))
        return [
            Line(method, *zip(*sorted(p for p in own if p[1] is not None), strict=True))
            for method, own in points.items()
            if len(own) > 1
        ]

    return lines


def by_schedule(base: str, method: str) -> Callable[[Rows], list[Line]]:
    """A line for each schedule: validation accuracy along the path."""

    def lines(rows: Rows) -> list[Line]:
        found = []
        for schedule, own in _variants(rows, "schedule", base):
            for line in curves("validation", methods=(method,))(own):
                found.append(Line(schedule, line.x, line.y, line.low, line.high))
        return found

    return lines


def over_width(side: int) -> Callable[[Rows], list[Line]]:
    """A line for each permutation: the distance of first gradients over the width."""

    def lines(rows: Rows) -> list[Line]:
        points: dict[str, list[tuple[float, float, float]]] = {}
        for name, own in by_scenario(rows).items():
            _, sides, width = name.split("-")
            for method, group in groups(own).items():
                values = group.values("distance")
                if sides == f"{side}x{side}" and values:
                    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                    points.setdefault(method, []).append((float(width), statistics.fmean(values), deviation))
        found = []
        for method, own in points.items():
            x, y, deviation = zip(*sorted(own), strict=True)
            low, high = (tuple(v + s * d for v, d in zip(y, deviation, strict=True)) for s in (-1, 1))
            found.append(Line(method, x, y, low, high))
        return found

    return lines


def landscape(name: str, beginning: str) -> Callable[[Rows], list[Line]]:
    """The loss along the lines whose names begin so."""

    def lines(rows: Rows) -> list[Line]:
        return curves("loss", scenario=name)([row for row in rows if row.method.startswith(beginning)])

    return lines


def plane(name: str) -> Callable[[Rows], Cells | None]:
    """Accuracy on the plane of the first seed."""

    def cells(rows: Rows) -> Cells | None:
        own = [row for row in rows if row.scenario == name and row.method == "plane" and row.series]
        if not own:
            return None
        grid = own[0].series["accuracy"]
        y, x = ([f"{v:.1f}" for v in axis] for axis in grid.at)
        return Cells(tuple(reversed(y)), tuple(x), tuple(reversed(grid.values)))

    return cells


PORTED = (
    "own base",
    "probe",
    "few-shot",
    "naive",
    "weights",
    "gradfix, mean",
    "fgmt",
    "fgmt + gradfix, mean",
    "fgmt, then few-shot",
)
NETWORKS = ("mlp", "conv", "resnet")
RATIO = "‖Δ‖ / ‖θ₁⁰‖"
SHARE = "accuracy, share of plain training's"

LEADERS = ("mnist-mlp-512", "mnist-mlp-4096", "cifar10-conv6", "digits-conv")

FIGURES = (
    Figure(
        "leaderboard",
        "Accuracy of a network that was never trained (plain: trained), and what it costs",
        LEADERS,
        tuple(
            Panel(name, "CPU seconds", "test accuracy", leaders(name), x_log=True, markers=True)
            for name in LEADERS
        ),
    ),
    Figure(
        "path",
        "Along the transferred path, no training",
        _names(scenarios.COMPARISONS),
        _panels(scenarios.COMPARISONS, "validation", "step t", "validation accuracy"),
    ),
    Figure(
        "subsequent",
        "The training that follows, and plain training",
        _names(scenarios.COMPARISONS),
        tuple(
            Panel(name, "epoch", "test accuracy", curves("subsequent", scenario=name, first=1), x_log=True)
            for name in _names(scenarios.COMPARISONS)
        ),
    ),
    Figure(
        "settling",
        "Lemma 3.2: how far step t's permutation moves the path from where the last one does",
        _names(scenarios.COMPARISONS),
        _panels(scenarios.COMPARISONS, "unsettled", "step t", "‖π_t Δ − π_T Δ‖ / ‖Δ‖"),
    ),
    Figure(
        "regime",
        "When transfer works: accuracy without training",
        _names(scenarios.REGIMES),
        (
            *(
                Panel(
                    f"{method}, digits, {base}", RATIO, SHARE, regime(base, method), x_log=True, markers=True
                )
                for base in NETWORKS
                for method in ("naive", "fgmt", "oracle")
            ),
            *(
                Panel(
                    f"initial scale, {base}",
                    "times PyTorch's default",
                    "test accuracy",
                    over("regime", base, "init", 1.0),
                    x_log=True,
                    markers=True,
                )
                for base in NETWORKS
            ),
        ),
    ),
    Figure(
        "schedules",
        "Uniform, cosine, and the source's own checkpoints",
        _names(scenarios.PATHS),
        tuple(
            Panel(f"{method}, {base}", "step t", "validation accuracy", by_schedule(base, method))
            for base in ("mlp2", "conv", "pretrained2", "cifar10")
            for method in ("fgmt", "gmt")
        ),
    ),
    Figure(
        "sensitivity",
        "T, batches a gradient, and their size",
        _names(scenarios.SENSITIVITY),
        tuple(
            Panel(
                f"{title}, {base}",
                title,
                "test accuracy",
                over("sensitivity", base, knob, first),
                True,
                markers=True,
            )
            for base in ("mlp2", "conv")
            for title, knob, first in (
                ("steps T", "T", 10),
                ("batches a gradient", "batches", 1),
                ("images a batch", "size", 128),
            )
        ),
    ),
    Figure(
        "assumption",
        "Assumption (P): distance of what two runs learn, and 1 for unrelated runs",
        _names(scenarios.ASSUMPTION),
        _panels(scenarios.ASSUMPTION, "distance", "updates", "distance", x_log=True, markers=True),
    ),
    Figure(
        "theorem",
        "Theorem A.1: distance of first gradients over the width",
        _names(scenarios.THEOREM),
        tuple(
            Panel(
                f"{side * side} inputs",
                "hidden units",
                "distance",
                over_width(side),
                x_log=True,
                markers=True,
            )
            for side in (2, 4, 8)
        ),
    ),
    Figure(
        "basins",
        "Loss from the first network to the second",
        _names(scenarios.BASINS),
        tuple(
            Panel(
                name, f"share of the second ({beginning} ...)", "test loss [nats]", landscape(name, beginning)
            )
            for name in _names(scenarios.BASINS)
            for beginning in ("source", "target")
        ),
    ),
    Figure(
        "plane",
        "Accuracy on the plane of target (origin), oracle and FGMT, seed 0",
        _names(scenarios.BASINS),
        tuple(Heatmap(name, "distance", "distance", plane(name)) for name in _names(scenarios.BASINS)),
    ),
    Figure(
        "ports",
        "A fine-tune on a new base",
        _names(scenarios.PORTS),
        tuple(
            Panel(
                name,
                "images of each class",
                "test accuracy",
                curves("accuracy by images", methods=PORTED, scenario=name),
                x_log=True,
                markers=True,
            )
            for name in _names(scenarios.PORTS)
        ),
    ),
)
