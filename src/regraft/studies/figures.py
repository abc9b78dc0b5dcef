"""Figures as functions of rows: rows -> lines and grids -> SVG (matplotlib) and the HTML page (plotly).

Figure("curves", "Along the path", ("digits-mlp",), (Panel("digits", "step", "accuracy", curves("accuracy")),))
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from regraft.studies.tables import Rows, current, groups

COLOURS = (
    "#1f6fb4",
    "#c2273f",
    "#2a7f62",
    "#b0651d",
    "#8a63b5",
    "#444444",
    "#17a2b8",
    "#d4a017",
    "#999999",
    "#e377c2",
)


@dataclass(frozen=True)
class Line:
    """A curve: mean, and mean - and + one standard deviation over seeds where there are several.

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
    """Lines over one axis; axis titles name their units."""

    title: str
    x: str
    y: str
    lines: Callable[[Rows], Iterable[Line]]
    x_log: bool = False
    y_log: bool = False
    markers: bool = False


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
    """A figure of a study, made of the current rows of its scenarios."""

    name: str
    title: str
    scenarios: tuple[str, ...]
    panels: tuple[Panel | Heatmap, ...]

    def drawn(self, rows: Rows) -> list[tuple[Panel | Heatmap, Any]]:
        """Every panel with its lines or cells; those without any are left out."""
        own = current(rows, self.scenarios)
        found = [(p, list(p.lines(own)) if isinstance(p, Panel) else p.cells(own)) for p in self.panels]
        return [(panel, data) for panel, data in found if data]


# ---------------------------------------------------------------- lines of rows


def curves(
    series: str, *, scenario: str | None = None, methods: Sequence[str] | None = None, first: int = 0
) -> Callable[[Rows], list[Line]]:
    """One line a method: mean of a series over seeds, with a band; positions before the ``first`` are left out.

    Only positions that every seed has, with values that are finite.
    """

    def lines(rows: Rows) -> list[Line]:
        own = [row for row in rows if scenario is None or row.scenario == scenario]
        found = []
        for name, group in groups(own).items():
            tables = [dict(row.series[series].points()) for row in group.rows if series in row.series]
            if tables and (methods is None or name in methods):
                found.append(band(name, tables, first))
        return [line for line in found if line.x]

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


# ---------------------------------------------------------------- SVG


def svg(figure: Figure, rows: Rows) -> str | None:
    """The figure as SVG text, the same for the same rows; None where no row has anything to draw."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    drawn = figure.drawn(rows)
    if not drawn:
        return None
    columns = min(len(drawn), 3 if any(isinstance(p, Heatmap) for p, _ in drawn) else 2)
    lines = math.ceil(len(drawn) / columns)
    # fixed names and no date: a figure changes only when its rows do
    with matplotlib.rc_context({"svg.hashsalt": figure.name, "svg.fonttype": "none", "font.size": 9}):
        canvas = Canvas(figsize=(5.2 * columns, 3.4 * lines + 0.5), layout="constrained")
        canvas.suptitle(figure.title)
        axes = canvas.subplots(lines, columns, squeeze=False).flatten()
        # by the whole study's methods: one has the same colour in every figure
        methods = dict.fromkeys(row.method for row in rows)
        colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(methods)}
        for place, (panel, data) in zip(axes, drawn, strict=False):
            (_draw_lines if isinstance(panel, Panel) else _draw_cells)(place, panel, data, colours)
        for place in axes[len(drawn) :]:
            place.set_axis_off()
        out = io.StringIO()
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _draw_lines(place: Any, panel: Panel, lines: Sequence[Line], colours: dict[str, str]) -> None:
    named: set[str] = set()
    for line in lines:
        colour = colours.setdefault(line.name, COLOURS[len(colours) % len(COLOURS)])
        label = (
            f"_{line.name}" if line.name in named else line.name
        )  # the legend leaves out what starts with _
        named.add(line.name)
        style = {
            "linestyle": "--" if line.dashed else "-",
            "marker": "o" if panel.markers else None,
            "markersize": 3,
        }
        place.plot(line.x, line.y, color=colour, label=label, linewidth=1.4, **style)
        if line.low:
            place.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
    place.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    if panel.x_log:
        place.set_xscale("log")
    if panel.y_log:
        place.set_yscale("log")
    place.grid(alpha=0.3)
    place.legend(fontsize=7, framealpha=0.7)


def _draw_cells(place: Any, panel: Heatmap, cells: Cells, colours: dict[str, str]) -> None:
    values = [[math.nan if v is None else v for v in line] for line in cells.values]
    style = {
        "cmap": "RdBu" if panel.low < 0 else "viridis",
        "vmin": panel.low,
        "vmax": panel.high,
        "aspect": "auto",
    }
    image = place.imshow(values, **style)
    place.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    place.set_xticks(range(len(cells.columns)), cells.columns, rotation=60, fontsize=7)
    place.set_yticks(range(len(cells.rows)), cells.rows, fontsize=7)
    place.figure.colorbar(image, ax=place)
