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

from regraft.core.text import clean_text
from regraft_bench.report.tables import Rows, current, groups

VEGA_LITE = "6.4"

COLOURS = (
    "#1f6fb4", "#c2273f", "#2a7f62", "#b0651d", "#8a63b5", "#6b7280", "#17a2b8", "#d4a017", "#9c7a5b", "#e377c2",
)  # fmt: skip


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
    """Lines over one axis; axis titles name their units. bars: deviations are drawn as bars, not as a band."""

    title: str
    x: str
    y: str
    lines: Callable[[Rows], Iterable[Line]]
    x_log: bool = False
    y_log: bool = False
    markers: bool = False
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
    """A figure of a study, made of the current rows of its scenarios. columns: of panels; two, or three of grids."""

    name: str
    title: str
    scenarios: tuple[str, ...]
    panels: tuple[Panel | Heatmap, ...]
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
    """A point for every method of a scenario: mean cost, mean accuracy."""

    def lines(rows: Rows) -> list[Line]:
        own = [row for row in rows if row.scenario == scenario and not row.failure and row.seconds > 0]
        points = []
        for name, group in groups(own).items():
            if accuracies := group.values("accuracy"):
                cost = statistics.fmean(row.seconds for row in group.rows)
                points.append(Line(name, (float(f"{cost:.4g}"),), (statistics.fmean(accuracies),)))
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


# ---------------------------------------------------------------- drawing


def vega_lite_spec(figure: Figure, rows: Rows) -> dict[str, Any] | None:
    """The figure in Vega-Lite, for the page and for files; None where no row has anything to draw."""
    panels = figure.collect_panels(rows)
    if not panels:
        return None
    # by the whole study's methods: one has the same colour in every figure
    methods = dict.fromkeys(row.method for row in rows)
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(methods)}
    drawn = [
        _draw_lines(panel, data, colours, number) if isinstance(panel, Panel) else _draw_cells(panel, data)
        for number, (panel, data) in enumerate(panels)
    ]
    columns = figure.columns or (3 if any(isinstance(panel, Heatmap) for panel, _ in panels) else 2)
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "title": {"text": figure.title, "anchor": "start", "fontSize": 14},
        "concat": drawn,
        "columns": min(len(panels), columns),
        "resolve": {"scale": {"color": "independent"}},
        "config": {"view": {"continuousWidth": 330, "continuousHeight": 210}, "legend": {"labelLimit": 220}},
    }
    return _clean_strings(spec)


def _clean_strings(part: Any) -> Any:
    """The same with every text in one line: control codes abort the engine."""
    if isinstance(part, str):
        return clean_text(part)
    if isinstance(part, dict):
        return {name: _clean_strings(value) for name, value in part.items()}
    return list(map(_clean_strings, part)) if isinstance(part, list | tuple) else part


def svg(figure: Figure, rows: Rows) -> str | None:
    """The figure as SVG text, the same for the same rows; None where no row has anything to draw."""
    import vl_convert

    spec = vega_lite_spec(figure, rows)
    if spec is None:
        return None
    drawing = vl_convert.vegalite_to_svg({**spec, "background": "white"}, vl_version=VEGA_LITE)
    return _renumber_gradients(drawing) + "\n"


def _renumber_gradients(drawing: str) -> str:
    """From 0: the engine counts them on from one drawing to the next."""
    numbers: dict[str, int] = {}
    return re.sub(r"\bgradient_\d+", lambda match: f"gradient_{numbers.setdefault(match[0], len(numbers))}", drawing)


def _draw_lines(panel: Panel, lines: Sequence[Line], colours: dict[str, str], number: int) -> dict[str, Any]:
    """A band and a line for each; pointing at a line tells its values, a click on the legend picks it out."""
    names = list(dict.fromkeys(line.name for line in lines))
    for name in names:
        colours.setdefault(name, COLOURS[len(colours) % len(COLOURS)])
    if any(isinstance(x, str) for line in lines for x in line.x):
        axis = _channel("x", "ordinal", panel.x, sort=None)
    else:
        axis = _channel("x", "quantitative", panel.x, scale={**_scale(panel.x_log), "nice": False})
    scale = {"domain": names, "range": [colours[name] for name in names]}
    colour = _channel("n", "nominal", None, sort=names, legend={"symbolOpacity": 1}, scale=scale)
    base: dict[str, Any] = {"x": axis, "color": colour, "detail": [{"field": "d"}, {"field": "s"}]}
    height = {"type": "quantitative", "title": panel.y, "scale": _scale(panel.y_log)}
    band = {
        "transform": [{"filter": "isValid(datum.l)"}],
        "mark": {"type": "rule", "opacity": 0.5} if panel.bars else {"type": "area", "opacity": 0.15},
        "encoding": {**base, "y": {**height, "field": "l"}, "y2": {"field": "h"}},
    }
    picked, size = f"picked_{number}", 18 if any(len(line.x) > 1 for line in lines) else 90
    point = {"size": size, "opacity": float(panel.markers)}
    curve = {
        "params": [{"name": picked, "select": {"type": "point", "fields": ["n"]}, "bind": "legend"}],
        "mark": {"type": "line", "strokeWidth": 1.6, "point": point},
        "encoding": {
            **base,
            "y": {**height, "field": "y"},
            "strokeDash": {"condition": {"test": "datum.d", "value": [4, 3]}, "value": [1, 0]},
            "opacity": {"condition": {"param": picked, "value": 1}, "value": 0.12},
            "tooltip": _tooltip(n="method", x=panel.x, y=panel.y, l="- deviation", h="+ deviation"),
        },
    }
    layers = [band, curve] if any(line.low for line in lines) else [curve]
    values = [point for number, line in enumerate(lines) for point in _points(line, _count_earlier(lines, number))]
    return {"title": panel.title, "data": {"values": values}, "layer": layers}


def _channel(field: str, kind: str, title: str | None, **more: Any) -> dict[str, Any]:
    return {"field": field, "type": kind, "title": title, **more}


def _tooltip(**titles: str) -> list[dict[str, Any]]:
    return [_channel(field, "nominal", title) for field, title in titles.items()]


def _scale(log: bool) -> dict[str, Any]:
    return {"type": "log"} if log else {"type": "linear", "zero": False}


def _count_earlier(lines: Sequence[Line], number: int) -> int:
    """Lines before this one that would be joined to it."""
    own = lines[number]
    return sum((line.name, line.dashed) == (own.name, own.dashed) for line in lines[:number])


def _points(line: Line, earlier: int) -> list[dict[str, Any]]:
    """Name, x, y, and only where there are any low (l), high (h), that it is dashed (d) and how many lines of its name
    come before it (s): a page has many.
    """
    same = {"n": line.name, **({"d": 1} if line.dashed else {}), **({"s": earlier} if earlier else {})}
    points = [{**same, "x": x, "y": _short(y)} for x, y in zip(line.x, line.y, strict=True)]
    if line.low:
        for point, low, high in zip(points, line.low, line.high, strict=True):
            point.update(l=_short(low), h=_short(high))
    return points


def _short(number: float | None) -> float | None:
    """Four digits: a figure shows no more, and a page is read by machines of all sizes."""
    return None if number is None or not math.isfinite(number) else float(f"{number:.4g}")


def _draw_cells(panel: Heatmap, cells: Cells) -> dict[str, Any]:
    values = [
        {"r": row, "c": column, "v": _short(value)}
        for row, line in zip(cells.rows, cells.values, strict=True)
        for column, value in zip(cells.columns, line, strict=True)
    ]
    scale = {"domain": [panel.low, panel.high], "scheme": "redblue" if panel.low < 0 else "viridis"}
    encoding = {
        "x": _channel("c", "ordinal", panel.x, sort=None),
        "y": _channel("r", "ordinal", panel.y, sort=None),
        "color": _channel("v", "quantitative", None, scale=scale),
        "tooltip": _tooltip(r=panel.y, c=panel.x, v="value"),
    }
    size = {"width": 230, "height": 190}
    return {"title": panel.title, "data": {"values": values}, "mark": "rect", **size, "encoding": encoding}
