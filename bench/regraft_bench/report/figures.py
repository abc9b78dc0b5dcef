"""Figures as functions of rows: rows -> lines and grids -> Vega-Lite -> SVG files, and the page that one can point at.

Figure("curves", "Along the path", ("digits-mlp",), (Panel("digits", "step", "accuracy", curves("accuracy")),))
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from regraft_bench.report.tables import Rows, current, groups

VEGA_LITE = "6.4"

COLOURS = (
    "#1f6fb4",
    "#c2273f",
    "#2a7f62",
    "#b0651d",
    "#8a63b5",
    "#6b7280",
    "#17a2b8",
    "#d4a017",
    "#9c7a5b",
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

    def collect_panels(self, rows: Rows) -> list[tuple[Panel | Heatmap, Any]]:
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


def leaders(scenario: str) -> Callable[[Rows], list[Line]]:
    """A point for every method of a scenario: mean cost, mean accuracy."""

    def lines(rows: Rows) -> list[Line]:
        own = groups(
            [row for row in rows if row.scenario == scenario and not row.failure and row.seconds > 0]
        )
        return [
            Line(
                name,
                (float(f"{statistics.fmean(row.seconds for row in group.rows):.4g}"),),
                (statistics.fmean(accuracies),),
            )
            for name, group in own.items()
            if (accuracies := group.values("accuracy"))
        ]

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


# ---------------------------------------------------------------- drawing


def vega_lite_spec(figure: Figure, rows: Rows) -> dict[str, Any] | None:
    """The figure in Vega-Lite, for the page and for files; None where no row has anything to draw."""
    drawn = figure.collect_panels(rows)
    if not drawn:
        return None
    # by the whole study's methods: one has the same colour in every figure
    methods = dict.fromkeys(row.method for row in rows)
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(methods)}
    panels = [
        _lines(panel, data, colours, number) if isinstance(panel, Panel) else _cells(panel, data)
        for number, (panel, data) in enumerate(drawn)
    ]
    columns = 3 if any(isinstance(panel, Heatmap) for panel, _ in drawn) else 2
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "title": {"text": figure.title, "anchor": "start", "fontSize": 14},
        "concat": panels,
        "columns": min(len(panels), columns),
        "resolve": {"scale": {"color": "independent"}},
        "config": {"view": {"continuousWidth": 330, "continuousHeight": 210}, "legend": {"labelLimit": 220}},
    }


def svg(figure: Figure, rows: Rows) -> str | None:
    """The figure as SVG text, the same for the same rows; None where no row has anything to draw."""
    import vl_convert

    found = vega_lite_spec(figure, rows)
    if found is None:
        return None
    drawn = vl_convert.vegalite_to_svg({**found, "background": "white"}, vl_version=VEGA_LITE)
    return _numbered_anew(drawn) + "\n"


def _numbered_anew(drawing: str) -> str:
    """Gradients numbered from 0: the engine counts them on from one drawing to the next."""
    numbers: dict[str, int] = {}
    return re.sub(
        r"\bgradient_\d+", lambda found: f"gradient_{numbers.setdefault(found[0], len(numbers))}", drawing
    )


def _lines(panel: Panel, lines: Sequence[Line], colours: dict[str, str], number: int) -> dict[str, Any]:
    """A band and a line for each; pointing at a line tells its values, a click on the legend picks it out."""
    names = list(dict.fromkeys(line.name for line in lines))
    for name in names:
        colours.setdefault(name, COLOURS[len(colours) % len(COLOURS)])
    values = [point for line in lines for point in _points(line)]
    words = any(isinstance(point["x"], str) for point in values)
    axis = {"field": "x", "title": panel.x, "type": "ordinal" if words else "quantitative"}
    axis |= {"sort": None} if words else {"scale": {**_scale(panel.x_log), "nice": False}}
    height = {"type": "quantitative", "title": panel.y, "scale": _scale(panel.y_log)}
    colour = {
        "field": "n",
        "type": "nominal",
        "title": None,
        "sort": names,
        "legend": {"symbolOpacity": 1},
    }
    colour["scale"] = {"domain": names, "range": [colours[name] for name in names]}
    picked = f"picked_{number}"
    dash = {"condition": {"test": "datum.d", "value": [4, 3]}, "value": [1, 0]}
    base = {"x": axis, "color": colour, "detail": {"field": "d"}}
    fields = {"n": "method", "x": panel.x, "y": panel.y, "l": "- deviation", "h": "+ deviation"}
    told = [{"field": field, "title": title, "type": "nominal"} for field, title in fields.items()]
    band = {
        "transform": [{"filter": "isValid(datum.l)"}],
        "mark": {"type": "area", "opacity": 0.15},
        "encoding": {**base, "y": {**height, "field": "l"}, "y2": {"field": "h"}},
    }
    curved = any(len(line.x) > 1 for line in lines)
    bands = [band] if any(line.low for line in lines) else []
    return {
        "title": panel.title,
        "data": {"values": values},
        "layer": [
            *bands,
            {
                "params": [{"name": picked, "select": {"type": "point", "fields": ["n"]}, "bind": "legend"}],
                "mark": {
                    "type": "line",
                    "strokeWidth": 1.6,
                    "point": {"size": 18 if curved else 90, "opacity": float(panel.markers)},
                },
                "encoding": {
                    **base,
                    "y": {**height, "field": "y"},
                    "strokeDash": dash,
                    "opacity": {"condition": {"param": picked, "value": 1}, "value": 0.12},
                    "tooltip": told,
                },
            },
        ],
    }


def _scale(log: bool) -> dict[str, Any]:
    return {"type": "log"} if log else {"type": "linear", "zero": False}


def _points(line: Line) -> list[dict[str, Any]]:
    """Name, x, y, and only where there are any low (l), high (h) and that it is dashed (d): a page has many."""
    bands = zip(line.low, line.high, strict=True) if line.low else [None] * len(line.x)
    same = {"n": line.name, **({"d": 1} if line.dashed else {})}
    return [
        {**same, "x": x, "y": _short(y), **({"l": _short(band[0]), "h": _short(band[1])} if band else {})}
        for x, y, band in zip(line.x, line.y, bands, strict=True)
    ]


def _short(number: float | None) -> float | None:
    """Four digits: a figure shows no more, and a page is read by machines of all sizes."""
    return None if number is None or not math.isfinite(number) else float(f"{number:.4g}")


def _cells(panel: Heatmap, cells: Cells) -> dict[str, Any]:
    values = [
        {"r": row, "c": column, "v": _short(value)}
        for row, line in zip(cells.rows, cells.values, strict=True)
        for column, value in zip(cells.columns, line, strict=True)
    ]
    scale = {"domain": [panel.low, panel.high], "scheme": "redblue" if panel.low < 0 else "viridis"}
    return {
        "title": panel.title,
        "data": {"values": values},
        "mark": "rect",
        "width": 230,
        "height": 190,
        "encoding": {
            "x": {"field": "c", "type": "ordinal", "sort": None, "title": panel.x},
            "y": {"field": "r", "type": "ordinal", "sort": None, "title": panel.y},
            "color": {"field": "v", "type": "quantitative", "title": None, "scale": scale},
            "tooltip": [
                {"field": field, "title": title, "type": "nominal"}
                for field, title in (("r", panel.y), ("c", panel.x), ("v", "value"))
            ],
        },
    }
