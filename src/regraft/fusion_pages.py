"""The fusion paper's tables and figures as pages: run, compared with the published cells, written."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from regraft import results
from regraft.fusion_forgetting import table_of_methods
from regraft.fusion_study import ALPHAS, FIGURES, TABLED, Study, ask, table_of_pairs, table_of_targets
from regraft.fusion_tables import (
    Panel,
    PaperTable,
    compare,
    curves,
    heatmaps,
    markdown,
    paper_table,
    paper_tables,
    side_by_side,
)


def reproduce(study: Study, names: Sequence[str] = (), out: Path | None = None) -> None:
    """Run tables ("2", "A14") and figures ("F1"); all of them by default. Print, and write to `out`.

    Raises ValueError for a name that is neither, before anything runs.
    """
    from rich.console import Console
    from rich.markdown import Markdown

    known = [*FIGURES, *paper_tables()]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no table or figure {unknown[0]!r}: choose from {', '.join(known)}")
    console = Console()
    for name in names or known:
        document, record, figure = (
            figure_document(study, name) if name in FIGURES else table_document(study, name)
        )
        console.print(Markdown(document))
        if out is not None:
            base = f"figure_{name[1:]}" if name in FIGURES else paper_table(name).file_name
            results.write(out / f"{base}.md", document)
            results.write(out / f"{base}.json", json.dumps(record, indent=1) + "\n")
            if figure is not None:
                results.write(out / f"{base}.html", figure.to_html(include_plotlyjs="cdn", full_html=True))


def table_document(study: Study, number: str) -> tuple[str, dict[str, Any], Any]:
    """(Markdown, plain data, figure or None) of one table."""
    paper = paper_table(number)
    began, cpu = time.perf_counter(), time.process_time()
    if number == "5":
        found = table_of_methods(study, paper)
    elif number in TABLED:
        found = table_of_targets(study, paper)
    else:
        found = table_of_pairs(study, paper)
    comparison = compare(paper, found["ours"])
    record = {
        "table": number,
        "title": paper.title,
        "rows": list(paper.rows),
        "paper": [list(row) for row in paper.values],
        **found,
        "median_absolute_difference": comparison.median,
        "largest_absolute_difference": comparison.largest,
        "trend": comparison.trend,
        "study": results.plain_data(replace(study, data=None, cache=Path())),
        "environment": _environment(study, number),
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
    }
    figure = heatmaps(paper, found["ours"], f"Table {number}") if paper.column_name == "alpha" else None
    return document(paper, record), record, figure


def _environment(study: Study, name: str) -> dict[str, Any]:
    """Machine, versions and commit, with the command that makes this table, whoever called."""
    found = results.plain_data(results.environment(study.device))
    return {**found, "command": f"regraft reproduce fusion --table {name}"}


def document(paper: PaperTable, record: dict[str, Any]) -> str:
    """A table as Markdown: ours, the paper's and the difference, then the controls."""
    trend = (
        "" if record["trend"] is None else f", rank correlation along {paper.row_name} {record['trend']:.2f}"
    )
    parts = [
        f"# Table {paper.table}",
        f"{paper.title}",
        "In each cell: ours / the paper's (difference), percent.",
        side_by_side(paper, record["ours"], record["columns"]),
        f"Median absolute difference {100 * record['median_absolute_difference']:.1f} points, largest "
        f"{100 * record['largest_absolute_difference']:.1f}{trend}.",
        *record["notes"],
        "## Controls",
        *(control(name, value, paper, record["columns"]) for name, value in record["controls"].items()),
        f"Commit {record['environment']['commit'][:12] if record['environment']['commit'] else 'unknown'}"
        f"{' with changes' if record['environment']['dirty'] else ''}, "
        + ", ".join(f"{k} {v}" for k, v in record["environment"]["versions"].items())
        + f", {record['environment']['machine']}; made by `regraft reproduce fusion --table {paper.table}`.",
    ]
    return "\n\n".join(parts) + "\n"


def control(name: str, value: Any, paper: PaperTable, names: Sequence[str]) -> str:
    """One control as Markdown: a number, a line, a table over the paper's rows, or a dictionary."""
    if isinstance(value, float):
        return f"**{name}**: {100 * value:.1f}"
    if isinstance(value, dict):
        nested = any(isinstance(v, dict) for v in value.values())
        if nested:
            return f"**{name}**\n\n" + "\n".join(f"- {k}: {_phrase(v)}" for k, v in value.items())
        return f"**{name}**: {_phrase(value)}"
    if all(isinstance(v, dict) for v in value):
        return f"**{name}**\n\n" + "\n".join(
            f"- {k}: {_phrase(v)}" for k, v in zip(names, value, strict=True)
        )
    if all(isinstance(v, float) for v in value):
        heads = names if len(value) == len(names) else [str(r) for r in paper.rows]
        return f"**{name}**\n\n" + markdown(heads, [[f"{100 * v:.1f}" for v in value]])
    lines = [[str(r), *(f"{100 * v:.1f}" for v in row)] for r, row in zip(paper.rows, value, strict=True)]
    return f"**{name}**\n\n" + markdown([paper.row_name, *names], lines)


NOT_ACCURACIES = ("alpha", "beta", "strength", "cosine", "difference", "predicted", "relative error")


def _phrase(value: Any, name: str = "") -> str:
    """Accuracies in percent; coefficients and seconds as they are."""
    if isinstance(value, dict):
        return "; ".join(f"{k} {_phrase(v, k)}" for k, v in value.items())
    if name in NOT_ACCURACIES or "seconds" in name:
        return f"{value:.4g}"
    return f"{100 * value:.1f} %"


def figure_document(study: Study, name: str) -> tuple[str, dict[str, Any], Any]:
    """(Markdown, plain data, figure) of one of figures 1 to 4."""
    panels, lines = [], {}
    for letter, question in zip("abcd", FIGURES[name], strict=True):
        alphas = ALPHAS[question.formula]
        lines[letter] = ask(study, question, alphas)
        tabled = next((t for t, where in TABLED.items() if where == (name, "abcd".index(letter))), None)
        title = f"({letter}) {question.scale} scale, on the {question.evaluated_on}" + (
            " set" if question.evaluated_on == "test" else ""
        )
        panels.append(Panel(title, alphas, lines[letter], paper_table(tabled) if tabled else None))
    record = {
        "figure": name,
        "questions": {k: asdict(q) for k, q in zip("abcd", FIGURES[name], strict=True)},
        "alphas": list(panels[0].alphas),
        "lines": lines,
        "environment": _environment(study, name),
    }
    title = f"Figure {name[1:]}: {panels and FIGURES[name][0].formula}, {FIGURES[name][0].targets} targets"
    parts = [f"# {title}", "Accuracy on CIFAR-10, percent."]
    for panel in panels:
        table = markdown(
            ["alpha", *panel.lines],
            [
                [f"{alpha:g}", *(f"{100 * values[k]:.1f}" for values in panel.lines.values())]
                for k, alpha in enumerate(panel.alphas)
            ],
        )
        parts += [f"## {panel.title}", table]
    return "\n\n".join(parts) + "\n", record, curves(panels, title)
