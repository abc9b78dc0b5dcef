"""Result rows for people: a table in the terminal, Markdown for results/, one HTML page with figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pandas as pd
from rich.table import Table

from regraft import results

# Questions a reader has of every scenario, as (method, against what).
QUESTIONS = (
    ("fgmt", "naive"),
    ("gmt", "naive"),
    ("fgmt", "weights"),
    ("gmt", "weights"),
    ("fgmt", "oracle"),
    ("gmt", "oracle"),
)
COLOURS = {
    "plain": "#444444",
    "naive": "#b0651d",
    "weights": "#8a63b5",
    "oracle": "#2a7f62",
    "fgmt": "#c2273f",
    "gmt": "#1f6fb4",
}


@dataclass(frozen=True)
class Column:
    """One column of the table: its heading, and the cell's text for the rows (seeds) of one method."""

    heading: str
    cell: Callable[[pd.DataFrame], str]


def _is_plain(rows: pd.DataFrame) -> bool:
    return rows["method"].iloc[0] == "plain"


def mean(values: pd.Series, form: str) -> str:
    """The mean, or a dash where nothing was measured."""
    return form.format(values.mean()) if values.notna().any() else "–"


def spread(values: pd.Series) -> str:
    """Mean and sample standard deviation; the mean alone for a single value."""
    if values.notna().sum() < 2:
        return mean(values, "{:.3f}")
    return f"{values.mean():.3f} ± {values.std():.3f}"


def seconds(values: pd.Series) -> str:
    """The mean to three significant figures."""
    return f"{values.mean():.3g}" if values.mean() < 1000 else f"{values.mean():.0f}"


def reached(values: pd.Series, form: str) -> str:
    """The mean over the seeds that got there, and how many did where it was not all of them."""
    count = int(values.notna().sum())
    if not count:
        return "not reached"
    return mean(values, form) + ("" if count == len(values) else f" ({count} of {len(values)})")


# The transfer bench's table, from rows that went through `results.derived`.
TRANSFER = (
    Column("method", lambda rows: rows["method"].iloc[0]),
    Column("seeds", lambda rows: str(len(rows))),
    Column("accuracy, no training", lambda rows: "–" if _is_plain(rows) else spread(rows["accuracy"])),
    Column("seconds", lambda rows: seconds(rows["cost.wall"])),
    Column("CPU seconds", lambda rows: seconds(rows["cost.cpu"])),
    Column("share of plain", lambda rows: mean(rows["share"], "{:.1%}")),
    Column("accuracy, trained on", lambda rows: spread(rows["final"])),
    Column("epochs to 95 %", lambda rows: reached(rows["epochs_to_reach"], "{:.1f}")),
    Column("speed-up to 95 %", lambda rows: reached(rows["speed_up"], "{:.1f}x")),
)


def cells(rows: pd.DataFrame, columns: Sequence[Column]) -> list[list[str]]:
    """The table's body for one scenario, one line a method, in the rows' own order."""
    return [[column.cell(group) for column in columns] for _, group in rows.groupby("method", sort=False)]


def answers(rows: pd.DataFrame) -> Iterator[str]:
    """One sentence for each of the questions that one scenario's rows can answer, with n and p."""
    for method, other in QUESTIONS:
        for line in results.compare(rows, method, other).itertuples():
            p = "" if math.isnan(line.p) else f", p = {line.p:.2g}"
            yield f"{method} − {other}: {line.difference:+.3f} (n = {line.n}{p})"


def machine(rows: pd.DataFrame) -> str:
    """Where one scenario's rows were measured, in a line."""
    last = rows.iloc[-1]
    where = f"{last['environment.machine']}, {last['environment.threads']} threads"
    commit = last.get("environment.commit")
    if not isinstance(commit, str):
        return where
    return f"{where}, commit {commit[:10]}{' and changes' if last['environment.dirty'] else ''}"


def _scenarios(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    if len(rows):
        yield from results.derived(rows).groupby("scenario", sort=False)


def tables(rows: pd.DataFrame, columns: Sequence[Column] = TRANSFER) -> Iterator[Table]:
    """One rich table a scenario."""
    for scenario, group in _scenarios(rows):
        table = Table(
            title=scenario, caption="\n".join([*answers(group), machine(group)]), title_style="bold"
        )
        for column in columns:
            table.add_column(column.heading, justify="left" if column.heading == "method" else "right")
        for line in cells(group, columns):
            table.add_row(*line)
        yield table


def markdown(rows: pd.DataFrame, columns: Sequence[Column] = TRANSFER) -> str:
    """The same tables as Markdown, each with its command, machine and versions."""
    parts = []
    for scenario, group in _scenarios(rows):
        last = group.iloc[-1]
        versions = ", ".join(
            f"{name.removeprefix('environment.versions.')} {value}"
            for name, value in last.items()
            if name.startswith("environment.versions.") and isinstance(value, str)
        )
        parts += [
            f"## {scenario}",
            "",
            _markdown_line(column.heading for column in columns),
            "|---" + "|---:" * (len(columns) - 1) + "|",
            *(_markdown_line(line) for line in cells(group, columns)),
            "",
            *(f"- {answer}" for answer in answers(group)),
            f"- measured on {machine(group)}; {versions}",
            f"- `{last['environment.command']}`",
            "",
        ]
    return "\n".join(parts)


def _markdown_line(texts: Sequence[str] | Iterator[str]) -> str:
    return "| " + " | ".join(texts) + " |"


# ---------------------------------------------------------------- figures


def steps_figure(rows: pd.DataFrame):  # -> plotly.graph_objects.Figure
    """Validation accuracy by transfer step, one line a method (mean of the seeds, band of one deviation)."""
    return _lines(
        rows,
        lambda row: list(enumerate(row["accuracy_by_step"])),
        x="transfer step",
        y="validation accuracy",
        title="Accuracy along the transferred path, no training",
    )


def curves_figure(rows: pd.DataFrame):  # -> plotly.graph_objects.Figure
    """Test accuracy by epoch of the training that follows, one line a method."""
    return _lines(
        rows,
        lambda row: [(point["epoch"], point["accuracy"]) for point in row["curve"]],
        x="epoch",
        y="test accuracy",
        title="Training on from the transferred parameters, and plain training",
    )


def deployed_figure(rows: pd.DataFrame):  # -> plotly.graph_objects.Figure
    """Test accuracy of the state that is deployed after each step of a fine-tuning run, one line a method."""
    steps, accuracies = "extra.deployed.step", "extra.deployed.top1"
    figure = _lines(
        rows,
        lambda row: list(zip(row[steps], row[accuracies], strict=True))[1:] if steps in row else [],
        x="step",
        y="deployed test accuracy",
        title="Anytime deployment performance",
    )
    return figure.update_xaxes(type="log")  # which has no place for step 0


FIGURES = (steps_figure, curves_figure, deployed_figure)


def _lines(
    rows: pd.DataFrame, points: Callable[[pd.Series], list[tuple[int, float]]], *, x: str, y: str, title: str
):
    from plotly import graph_objects

    figure = graph_objects.Figure()
    for method, group in rows.groupby("method", sort=False):
        values = [point for _, row in group.iterrows() for point in points(row)]
        if not values:
            continue
        line = (
            pd.DataFrame(values, columns=["at", "value"])
            .groupby("at")["value"]
            .agg(["mean", "std"])
            .fillna(0)
        )
        colour = COLOURS.get(method)
        at = list(line.index)
        low, high = list(line["mean"] - line["std"]), list(line["mean"] + line["std"])
        figure.add_scatter(
            x=at + at[::-1],
            y=high + low[::-1],
            fill="toself",
            fillcolor=colour,
            opacity=0.15,
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=method,
        )
        figure.add_scatter(
            x=at, y=list(line["mean"]), name=method, legendgroup=method, line={"color": colour}, mode="lines"
        )
    figure.update_layout(title=title, xaxis_title=x, yaxis_title=y, template="plotly_white", height=420)
    return figure


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { padding: .3rem .8rem; text-align: right; }
th { border-bottom: 2px solid #444; } th:first-child, td:first-child { text-align: left; }
tr:nth-child(even) { background: #f4f4f4; } code { font-size: .85em; color: #555; }
"""


def html(rows: pd.DataFrame, columns: Sequence[Column] = TRANSFER) -> str:
    """One page that needs nothing else (the plotting script is in it): tables, comparisons, figures."""
    from plotly.offline import get_plotlyjs

    body = []
    for scenario, group in _scenarios(rows):
        heads = "".join(f"<th>{escape(column.heading)}</th>" for column in columns)
        lines = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>"
            for line in cells(group, columns)
        )
        body += [
            f"<h2>{escape(scenario)}</h2>",
            f"<table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>",
            "<ul>" + "".join(f"<li>{escape(answer)}</li>" for answer in answers(group)) + "</ul>",
            *(
                figure.to_html(full_html=False, include_plotlyjs=False)
                for figure in (make(group) for make in FIGURES)
                if figure.data
            ),
            f"<p>{escape(machine(group))}<br><code>{escape(group.iloc[-1]['environment.command'])}</code></p>",
        ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>regraft: results</title>'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head>"
        "<body><h1>Transferred learning beside plain training</h1>" + "\n".join(body) + "</body></html>\n"
    )


def write(rows: pd.DataFrame, path: Path | str, columns: Sequence[Column] = TRANSFER) -> tuple[Path, Path]:
    """Write the page and the Markdown to ``path`` with the endings .html and .md; returns both paths."""
    page, text = Path(path).with_suffix(".html"), Path(path).with_suffix(".md")
    results.write(page, html(rows, columns))
    results.write(text, markdown(rows, columns))
    return page, text
