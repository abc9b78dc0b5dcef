"""Figures in Vega-Lite: as SVG files, and for the page, where one can point at them.

Panels whose axes have one title share its range. Up to six lines are named at their ends, more in a legend.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from regraft.core.text import clean_text
from regraft_bench.report.figures import Cells, Figure, Heatmap, Line, Panel
from regraft_bench.report.styles import Style, choose_styles
from regraft_bench.report.tables import Rows

VEGA_LITE = "6.4"
WIDTH, HEIGHT = 330, 210
NAMED_AT_ENDS = 6
MOST_MARKS = 12
"""On one line; of longer ones every so-many-th point has a mark."""
LABEL_HEIGHT = 12

Range = tuple[float, float]
Spec = dict[str, Any]


def vega_lite_spec(figure: Figure, rows: Rows) -> Spec | None:
    """The figure in Vega-Lite, for the page and for files; None where no row has anything to draw."""
    panels = figure.collect_panels(rows)
    if not panels:
        return None
    plots = [(panel, data) for panel, data in panels if isinstance(panel, Panel)]
    styles = choose_styles(line.name for _, lines in plots for line in lines)
    if all(len({line.name for line in lines}) <= NAMED_AT_ENDS for _, lines in plots):
        legend = None
    else:
        legend = {"title": None, "symbolOpacity": 1, "symbolSize": 60, "columns": 1}
    ranges = _find_ranges(plots)
    drawn = [
        _draw_lines(panel, data, styles, ranges, legend) if isinstance(panel, Panel) else _draw_cells(panel, data)
        for panel, data in panels
    ]
    if legend is not None:  # a click on it picks lines of all panels
        picked = {"name": "picked", "select": {"type": "point", "fields": ["n"]}, "bind": "legend"}
        next(part for part in drawn if "layer" in part)["layer"][-1]["params"] = [picked]
    columns = min(len(panels), figure.columns or (2 if plots else 3))
    has_deviations = any(line.low for _, lines in plots for line in lines)
    words = [figure.caption, "Bands and bars: one standard deviation over seeds." if has_deviations else ""]
    title = {
        "text": figure.title,
        "subtitle": textwrap.wrap(" ".join(filter(None, words)), 60 * columns),
        "anchor": "start",
        "fontSize": 15,
        "subtitleFontSize": 12,
        "subtitlePadding": 6,
        "offset": 14,
    }
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "title": title,
        "concat": drawn,
        "columns": columns,
        "spacing": 30,
        "resolve": {"scale": dict.fromkeys(("color", "shape"), "shared" if plots else "independent")},
        "config": {
            "view": {"continuousWidth": WIDTH, "continuousHeight": HEIGHT, "discreteHeight": HEIGHT},
            "legend": {"labelLimit": 0, "labelFontSize": 11},
            "axis": {"labelFontSize": 11, "titleFontSize": 11, "labelOverlap": "greedy", "titleFontWeight": "normal"},
        },
    }
    return _clean_strings(spec)


def svg(figure: Figure, rows: Rows) -> str | None:
    """The figure as SVG text, the same for the same rows; None where no row has anything to draw."""
    import vl_convert

    spec = vega_lite_spec(figure, rows)
    if spec is None:
        return None
    drawing = vl_convert.vegalite_to_svg({**spec, "background": "white"}, vl_version=VEGA_LITE)
    return _renumber_gradients(drawing) + "\n"


def _clean_strings(part: Any) -> Any:
    """The same with every text in one line: control codes abort the engine."""
    if isinstance(part, str):
        return clean_text(part)
    if isinstance(part, dict):
        return {name: _clean_strings(value) for name, value in part.items()}
    return list(map(_clean_strings, part)) if isinstance(part, list | tuple) else part


def _renumber_gradients(drawing: str) -> str:
    """From 0: the engine counts them on from one drawing to the next."""
    numbers: dict[str, int] = {}
    return re.sub(r"\bgradient_\d+", lambda match: f"gradient_{numbers.setdefault(match[0], len(numbers))}", drawing)


# ---------------------------------------------------------------- axes


def _find_ranges(plots: Sequence[tuple[Panel, Sequence[Line]]]) -> dict[tuple[str, str], Range]:
    """Of each axis ("x" or "y", title) the range of all panels that have it, with room to both sides."""
    numbers: dict[tuple[str, str], list[float]] = {}
    logs: dict[tuple[str, str], bool] = {}
    for panel, lines in plots:
        for key, log in ((("x", panel.x), panel.x_log), (("y", panel.y), panel.y_log)):
            shown = (v for line in lines for v in ([*line.y, *line.low, *line.high] if key[0] == "y" else line.x))
            numeric = (v for v in shown if not isinstance(v, str) and math.isfinite(v) and (v > 0 or not log))
            numbers.setdefault(key, []).extend(numeric)
            logs[key] = log
    return {key: _widen(min(own), max(own), logs[key]) for key, own in numbers.items() if own}


def _widen(low: float, high: float, log: bool, share: float = 0.04) -> Range:
    if log:
        room = (high / low) ** share if high > low else 2.0
        return low / room, high * room
    room = share * (high - low) or 0.5
    return low - room, high + room


def _axis_of(field: str, title: str, log: bool, domain: Range) -> Spec:
    """A quantitative axis; a logarithmic one has ticks at 1, 10, 100, or between them where it is short."""
    axis: Spec = {"tickCount": 5}
    if log and len(ticks := log_ticks(*domain)) > 1:
        axis = {"values": ticks, "format": "~g"}
    scale: Spec = {"type": "log" if log else "linear", "domain": [_short(v) for v in domain], "nice": False}
    if not log:
        scale["zero"] = False
    return {"field": field, "type": "quantitative", "title": title, "scale": scale, "axis": axis}


def log_ticks(low: float, high: float) -> list[float]:
    """At most seven numbers within a range, which one reads at once."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = math.log10(high / low)
    digits = (1,) if decades >= 2 else (1, 2, 5) if decades >= 1 else (1, 2, 3, 5, 7)
    step = math.ceil((last - first) / 6)
    ticks = [float(f"{d}e{power}") for power in range(first, last + 1, step) for d in digits]
    return [tick for tick in ticks if low <= tick <= high]


# ---------------------------------------------------------------- lines


def _draw_lines(
    panel: Panel,
    lines: Sequence[Line],
    styles: dict[str, Style],
    ranges: dict[tuple[str, str], Range],
    legend: Spec | None,
) -> Spec:
    """Bands, lines, marks, and without a legend their names at the ends; pointing at a mark tells its values."""
    x: Spec = {"field": "x", "type": "ordinal", "title": panel.x, "sort": None, "axis": {"labelAngle": 0}}
    if not any(isinstance(position, str) for line in lines for position in line.x):
        x = _axis_of("x", panel.x, panel.x_log, ranges["x", panel.x])
    y = _axis_of("y", panel.y, panel.y_log, ranges["y", panel.y])
    by_name: Spec = {"field": "n", "type": "nominal", "sort": list(styles), "legend": legend}
    colours, shapes = zip(*styles.values(), strict=True)
    colour = {**by_name, "scale": {"domain": list(styles), "range": colours}}
    shape = {**by_name, "scale": {"domain": list(styles), "range": shapes}}
    base: Spec = {"x": x, "y": y, "color": colour, "detail": [{"field": "d"}, {"field": "s"}]}
    faded = {"opacity": {"condition": {"param": "picked", "value": 1}, "value": 0.15}} if legend else {}
    dashes = {"condition": {"test": "datum.d", "value": [4, 3]}, "value": [1, 0]}
    pointed = {**base, **faded, "tooltip": _tooltip(n="method", x=panel.x, y=panel.y, l="- deviation", h="+ deviation")}
    single = all(len(line.x) == 1 for line in lines)
    curve: Spec = {"mark": {"type": "line", "strokeWidth": 1.8}, "encoding": {**pointed, "strokeDash": dashes}}
    marks: Spec = {
        "transform": [{"filter": "datum.m"}],
        "mark": {"type": "point", "filled": True, "size": 90 if single else 45, "opacity": 1},
        "encoding": {**pointed, "shape": shape},
    }
    layers = [curve, marks] if panel.joined else [marks]
    if any(line.low for line in lines):
        mark = {"type": "rule", "opacity": 0.6} if single or panel.bars else {"type": "area", "opacity": 0.15}
        encoding = {**base, "y": {**y, "field": "l"}, "y2": {"field": "h"}}
        layers.insert(0, {"transform": [{"filter": "isValid(datum.l)"}], "mark": mark, "encoding": encoding})
    if legend is None:
        layers.append(_name_lines(lines, styles, x, y, single))
    values = [point for number, line in enumerate(lines) for point in _points(line, _count_earlier(lines, number))]
    return {"title": panel.title, "data": {"values": values}, "layer": layers}


def _name_lines(lines: Sequence[Line], styles: dict[str, Style], x: Spec, y: Spec, single: bool) -> Spec:
    """Names where the lines end, beside the last of their ends, moved apart where they would overlap; beside the
    points, of single ones.
    """
    ends = {line.name: line for line in reversed(lines) if line.x}  # of a line and a dashed one the first
    low, high = y["scale"]["domain"]
    log = y["scale"]["type"] == "log"
    places = spread_labels(
        [_share(line.y[-1], low, high, log) * HEIGHT for line in ends.values()], LABEL_HEIGHT, HEIGHT
    )
    last = max((line.x[-1] for line in ends.values() if not isinstance(line.x[-1], str)), default=lines[0].x[-1])
    labels = [
        {
            "n": name,
            "x": line.x[-1] if single else last,
            "y": float(f"{_value(place / HEIGHT, low, high, log):.6g}"),
            "c": styles[name].colour,
        }
        for (name, line), place in zip(ends.items(), places, strict=True)
    ]
    colour = {"field": "c", "type": "nominal", "scale": None, "legend": None}
    return {
        "data": {"values": labels},
        "mark": {"type": "text", "align": "left", "dx": 8, "fontSize": 11},
        "encoding": {"x": x, "y": y, "text": {"field": "n"}, "color": colour},
    }


def _share(value: float, low: float, high: float, log: bool) -> float:
    return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)


def _value(share: float, low: float, high: float, log: bool) -> float:
    return low * (high / low) ** share if log else low + share * (high - low)


def spread_labels(places: Sequence[float], gap: float, room: float) -> list[float]:
    """Places moved as little as it takes, one after the other, to be a gap apart and within the room."""
    order = sorted(range(len(places)), key=lambda number: places[number])
    moved = list(places)
    for below, number in pairwise(order):
        moved[number] = max(moved[number], moved[below] + gap)
    ceiling = room
    for number in reversed(order):
        moved[number] = min(moved[number], ceiling)
        ceiling = moved[number] - gap
    return moved


def _count_earlier(lines: Sequence[Line], number: int) -> int:
    """Lines before this one that would be joined to it."""
    own = lines[number]
    return sum((line.name, line.dashed) == (own.name, own.dashed) for line in lines[:number])


def _points(line: Line, earlier: int) -> list[Spec]:
    """Name, x, y, and only where there are any low (l), high (h), a mark (m), that it is dashed (d) and how many lines
    of its name come before it (s): a page has many.
    """
    same: Spec = {"n": line.name, **({"d": 1} if line.dashed else {}), **({"s": earlier} if earlier else {})}
    points = [{**same, "x": x, "y": _short(y)} for x, y in zip(line.x, line.y, strict=True)]
    for point in points[:: -1 if line.dashed else -max(1, math.ceil(len(points) / MOST_MARKS))]:
        if not line.dashed:
            point["m"] = 1
    if line.low:
        for point, low, high in zip(points, line.low, line.high, strict=True):
            point.update(l=_short(low), h=_short(high))
    return points


def _tooltip(**titles: str) -> list[Spec]:
    return [{"field": field, "type": "nominal", "title": title} for field, title in titles.items()]


def _short(number: float | None) -> float | None:
    """Four digits: a figure shows no more, and a page is read by machines of all sizes."""
    return None if number is None or not math.isfinite(number) else float(f"{number:.4g}")


# ---------------------------------------------------------------- grids


def _draw_cells(panel: Heatmap, cells: Cells) -> Spec:
    values = [
        {"r": row, "c": column, "v": _short(value)}
        for row, line in zip(cells.rows, cells.values, strict=True)
        for column, value in zip(cells.columns, line, strict=True)
    ]
    scale = {"domain": [panel.low, panel.high], "scheme": "redblue" if panel.low < 0 else "viridis"}
    encoding = {
        "x": {"field": "c", "type": "ordinal", "title": panel.x, "sort": None},
        "y": {"field": "r", "type": "ordinal", "title": panel.y, "sort": None},
        "color": {"field": "v", "type": "quantitative", "title": None, "scale": scale},
        "tooltip": _tooltip(r=panel.y, c=panel.x, v="value"),
    }
    size = {"width": 230, "height": 190}
    return {"title": panel.title, "data": {"values": values}, "mark": "rect", **size, "encoding": encoding}
