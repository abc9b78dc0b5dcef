"""The paper's tables on gradient assignment and fusion as data, and ours beside them.

The paper: "Rethinking the Dependence Between Gradients and the Initial Point in Deep Learning". Its tables
lie in ``paper/fusion`` as JSON, one file each: "1" to "6" of the main text, "A1" to "A19" of the appendix.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

FOLDER = files("regraft") / "paper" / "fusion"


@dataclass(frozen=True)
class PaperTable:
    """One table as published.

    Attributes:
        table: "1" to "6", or "A1" to "A19".
        values: accuracies from 0 to 1, row by row.
        rows, columns: what a row and a column stand for (alpha, beta, or the names of the targets).
        row_name, column_name: "alpha", "beta", "theta_n", "order" or "accuracy".
        task: the data set that accuracies are on ("" where there are two).
        scale: "small" (4 training images a class), "medium" (100) or "large" (all).
        evaluated_on: "test", or whose training images.
        alone: accuracies that the caption gives, of theta_A and g by themselves.
        step: the last digit that the table prints, as an accuracy.
    """

    table: str
    title: str
    network: str
    task: str
    formula: str
    scale: str
    evaluated_on: str
    row_name: str
    rows: tuple[Any, ...]
    column_name: str
    columns: tuple[Any, ...]
    values: tuple[tuple[float, ...], ...]
    targets: str = ""
    figure: str = ""
    alone: dict[str, float] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        appendix = self.table.startswith("A")
        return f"appendix_{int(self.table[1:]):02d}" if appendix else f"main_{int(self.table):02d}"

    def cell(self, row: Any, column: Any) -> float:
        """Raises ValueError where the table has no such row or column."""
        return self.values[self.rows.index(row)][self.columns.index(column)]


@cache
def paper_tables() -> dict[str, PaperTable]:
    """Every table by its number, those of the main text first."""
    found = [_read(json.loads(file.read_text(encoding="utf-8"))) for file in FOLDER.iterdir()]
    return {t.table: t for t in sorted(found, key=lambda t: (len(t.file_name), t.file_name), reverse=False)}


def paper_table(number: str) -> PaperTable:
    """Raises ValueError, with the numbers that there are, for an unknown one."""
    if number not in paper_tables():
        raise ValueError(f"the paper has no table {number!r}: choose from {', '.join(paper_tables())}")
    return paper_tables()[number]


def _read(raw: dict[str, Any]) -> PaperTable:
    unit = {"percent": 100.0, "fraction": 1.0}[raw["unit"]]
    return PaperTable(
        table=raw["table"],
        title=raw["title"],
        network=raw["network"],
        task=raw.get("task", ""),
        formula=raw.get("formula", ""),
        scale=raw["scale"],
        evaluated_on=raw.get("evaluated_on", ""),
        row_name=raw["rows"]["name"],
        rows=tuple(raw["rows"]["values"]),
        column_name=raw["columns"]["name"],
        columns=tuple(raw["columns"]["values"]),
        values=tuple(tuple(value / unit for value in row) for row in raw["values"]),
        targets=raw.get("targets", ""),
        figure=raw.get("figure", ""),
        alone=raw.get("alone", {}),
    )


# ---------------------------------------------------------------- ours beside the paper's


@dataclass(frozen=True)
class Comparison:
    """Ours against the paper's, cell by cell.

    ``median`` and ``largest`` are of the absolute differences; ``trend`` is the mean, over columns, of the
    rank correlation of ours with the paper's along the rows (1: the same order), None where neither varies.
    """

    differences: tuple[tuple[float, ...], ...]
    median: float
    largest: float
    trend: float | None


def compare(paper: PaperTable, ours: Sequence[Sequence[float]]) -> Comparison:
    """Raises ValueError where ours has another shape."""
    if [len(row) for row in ours] != [len(row) for row in paper.values]:
        raise ValueError(f"table {paper.table} is {len(paper.rows)} by {len(paper.columns)}, ours is not")
    differences = tuple(
        tuple(o - p for o, p in zip(mine, theirs, strict=True))
        for mine, theirs in zip(ours, paper.values, strict=True)
    )
    sizes = [abs(d) for row in differences for d in row]
    correlations = [
        c
        for mine, theirs in zip(zip(*ours, strict=True), zip(*paper.values, strict=True), strict=True)
        if (c := _rank_correlation(mine, theirs)) is not None
    ]
    trend = statistics.fmean(correlations) if correlations else None
    return Comparison(differences, statistics.median(sizes), max(sizes), trend)


def _rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's, with mean ranks for ties; None where one of the two does not vary."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)


def markdown(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = ["---"] * len(heading)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heading, rule, *lines])


def side_by_side(paper: PaperTable, ours: Sequence[Sequence[float]], columns: Sequence[str] = ()) -> str:
    """Markdown: in every cell ours, the paper's and the difference, in percent."""
    names = columns or [str(c) for c in paper.columns]
    lines = [
        [
            str(row),
            *(
                f"{100 * o:.1f} / {100 * p:.1f} ({100 * (o - p):+.1f})"
                for o, p in zip(mine, theirs, strict=True)
            ),
        ]
        for row, mine, theirs in zip(paper.rows, ours, paper.values, strict=True)
    ]
    return markdown([f"{paper.row_name} \\ {paper.column_name}", *names], lines)


# ---------------------------------------------------------------- figures


def heatmaps(paper: PaperTable, ours: Sequence[Sequence[float]], title: str) -> Any:
    """A plotly figure of a grid: ours, the paper's, and the difference, on the same axes."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=1, cols=3, subplot_titles=["ours", "paper", "ours - paper"], shared_yaxes=True
    )
    x, y = [str(c) for c in paper.columns], [str(r) for r in paper.rows]
    differences = compare(paper, ours).differences
    for column, (values, style) in enumerate(
        [
            (ours, {"colorscale": "Viridis", "zmin": 0, "zmax": 1, "showscale": False}),
            (paper.values, {"colorscale": "Viridis", "zmin": 0, "zmax": 1, "colorbar": {"x": 1.02}}),
            (differences, {"colorscale": "RdBu", "zmin": -1, "zmax": 1, "colorbar": {"x": 1.1}}),
        ],
        start=1,
    ):
        figure.add_heatmap(z=[list(row) for row in values], x=x, y=y, row=1, col=column, **style)
        figure.update_xaxes(title_text="alpha", type="category", row=1, col=column)
    figure.update_yaxes(title_text="beta", type="category", autorange="reversed", row=1, col=1)
    figure.update_layout(title=title, height=420, width=1250)
    return figure


@dataclass(frozen=True)
class Panel:
    """One of the four curves' panels of figures 1 to 4: lines of accuracy over alpha, a dash for the paper."""

    title: str
    alphas: tuple[float, ...]
    lines: dict[str, tuple[float, ...]]
    paper: PaperTable | None = None


def curves(panels: Sequence[Panel], title: str) -> Any:
    """A plotly figure of panels side by side, alpha on a logarithmic axis; dotted lines are the paper's."""
    from plotly.subplots import make_subplots

    colours = ["#1f6fb4", "#b0651d", "#2a7f62", "#c2273f", "#8a63b5", "#444444", "#999999"]
    figure = make_subplots(
        rows=2, cols=2, subplot_titles=[panel.title for panel in panels], vertical_spacing=0.14
    )
    for number, panel in enumerate(panels):
        row, column = number // 2 + 1, number % 2 + 1
        for colour, (name, values) in zip(colours, panel.lines.items(), strict=False):
            style = {"line": {"color": colour}, "legendgroup": name, "row": row, "col": column}
            figure.add_scatter(x=panel.alphas, y=values, name=name, showlegend=number == 0, **style)
            if panel.paper is not None and number_of(panel, name) < len(panel.paper.columns):
                theirs = [line[number_of(panel, name)] for line in panel.paper.values]
                style["line"] = {"color": colour, "dash": "dot"}
                figure.add_scatter(
                    x=panel.paper.rows, y=theirs, name=f"paper: {name}", showlegend=False, **style
                )
        figure.update_xaxes(title_text="alpha", type="log", row=row, col=column)
        figure.update_yaxes(title_text="accuracy", range=[0, 1.02], row=row, col=column)
    figure.update_layout(title=title, height=800, width=1100)
    return figure


def number_of(panel: Panel, name: str) -> int:
    """The place of a line among the panel's; the first five are the paper's columns."""
    return list(panel.lines).index(name)
