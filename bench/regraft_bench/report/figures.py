"""Figures as functions of rows: rows -> lines and grids (`regraft_bench.report.drawing` draws them).

Figure("curves", "Along the path", ("digits-mlp",), (Panel("digits", "step", "accuracy", curves("accuracy")),))
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from regraft_bench.report.tables import Rows, current, groups


@dataclass(frozen=True)
class Line:
    """A curve, or one point: mean, and mean - and + one standard deviation over seeds where there are several.

    dashed: the paper's own, or a reference.
    """

    name: str
    x: tuple[float | str, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines over one axis; axis titles name their units.

    joined: the points of a line belong to one series. bars: deviations are drawn as bars, not as a band.
    """

    title: str
    x: str
    y: str
    lines: Callable[[Rows], Iterable[Line]]
    x_log: bool = False
    y_log: bool = False
    joined: bool = True
    bars: bool = False


@dataclass(frozen=True)
class Cells:
    """A grid of numbers, rows from top to bottom."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Heatmap:
    """A grid in colours; low and high are the ends of the scale, diverging ones are centred at 0."""

    title: str
    x: str
    y: str
    cells: Callable[[Rows], Cells | None]
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Figure:
    """A figure of a study, made of the current rows of its scenarios.

    caption: what to see in it, in a sentence. columns: of panels; two, or three of grids.
    """

    name: str
    title: str
    scenarios: tuple[str, ...]
    panels: tuple[Panel | Heatmap, ...]
    caption: str = ""
    columns: int | None = None

    def collect_panels(self, rows: Rows) -> list[tuple[Panel | Heatmap, Any]]:
        """Every panel with its lines or cells; those without any are left out."""
        own = current(rows, self.scenarios)
        panels = [(p, list(p.lines(own)) if isinstance(p, Panel) else p.cells(own)) for p in self.panels]
        return [(panel, data) for panel, data in panels if data]


# ---------------------------------------------------------------- lines of rows


def curves(
    series: str, *, scenario: str | None = None, methods: Sequence[str] | None = None, first: int = 0
) -> Callable[[Rows], list[Line]]:
    """One line a method: mean of a series over seeds, with a band; positions before the ``first`` are left out.

    Only positions that every seed has, with values that are finite.
    """

    def lines(rows: Rows) -> list[Line]:
        own = groups([row for row in rows if scenario is None or row.scenario == scenario])
        drawn = []
        for name, group in own.items():
            tables = [dict(row.series[series].points()) for row in group.rows if series in row.series]
            if tables and (methods is None or name in methods):
                drawn.append(band(name, tables, first))
        return [line for line in drawn if line.x]

    return lines


def leaders(scenario: str) -> Callable[[Rows], list[Line]]:
    """A point for every method of a scenario: mean cost, mean accuracy and its deviation."""

    def lines(rows: Rows) -> list[Line]:
        own = [row for row in rows if row.scenario == scenario and not row.failure and row.seconds > 0]
        points = []
        for name, group in groups(own).items():
            if accuracies := group.values("accuracy"):
                cost = float(f"{statistics.fmean(row.seconds for row in group.rows):.4g}")
                points.append(band(name, [{cost: accuracy} for accuracy in accuracies]))
        return points

    return lines


def band(name: str, tables: Sequence[dict[Any, float]], first: int = 0) -> Line:
    """The mean of several curves (position -> value), and one standard deviation to each side."""
    at = [x for x in tables[0] if all(x in table for table in tables)][first:]
    columns = [[table[x] for table in tables] for x in at]
    means = [statistics.fmean(column) for column in columns]
    if len(tables) == 1:
        return Line(name, tuple(at), tuple(means))
    deviations = [statistics.stdev(column) for column in columns]
    low, high = (tuple(m + s * d for m, d in zip(means, deviations, strict=True)) for s in (-1, 1))
    return Line(name, tuple(at), tuple(means), low, high)
