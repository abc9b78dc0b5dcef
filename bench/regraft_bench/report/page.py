"""The one HTML page: everything that rows say, in a file that needs no network.

Figures are Vega-Lite, drawn when they come into sight; the tables are text that can be filtered, so that the page says
the same with scripts off.
"""

from __future__ import annotations

import base64
import gzip
import json
import statistics
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from regraft.core.text import clean_html as escape
from regraft_bench.report.drawing import VEGA_LITE, vega_lite_spec
from regraft_bench.report.render import glossary, load_rows
from regraft_bench.report.styles import choose_styles
from regraft_bench.report.tables import Group, Sheet, by_scenario, current, groups
from regraft_bench.rows import Row
from regraft_bench.study import Study
from regraft_bench.tracking import history

LIBRARY = "window.embed = vegaEmbed;"
PAGE_PARTS = ("html", "css", "js")


def page(folder: Path, studies: Sequence[Study]) -> str:
    """The page of a results folder: a leaderboard, and every table and figure of every study that has rows there."""
    import vl_convert

    figures: dict[str, Any] = {}
    leaders: list[dict[str, Any]] = []
    body, measured, tracks = "", [], []
    for study in studies:  # of all studies' rows no two need be in memory at once
        if rows := load_rows(folder, study):
            measured.append(study.name)
            body += _section(study, rows, figures)
            leaders += _leaders(study, rows)
            tracks += history.find_tracks(rows)
    if tracks:
        body += f'<h2 id="history">History</h2>{_table(history.tracks_sheet(tracks), "history", True)}'
    names = ["leaderboard"] * bool(leaders) + measured + ["history"] * bool(tracks)
    clock = "CPU seconds (wall clock on a GPU), evaluation apart"
    data = {"figures": figures, "leaders": leaders, "clock": clock}
    packed = gzip.compress(json.dumps(data, allow_nan=False).encode(), mtime=0)
    library = vl_convert.javascript_bundle(LIBRARY, vl_version=VEGA_LITE) if measured else ""
    parts = {kind: (files("regraft_bench.report") / f"page.{kind}").read_text("utf-8") for kind in PAGE_PARTS}
    return Template(parts["html"]).substitute(
        style=parts["css"],
        links="".join(f'<a href="#{name}">{name}</a>' for name in names),
        main=_board(leaders) + body,
        data=base64.b64encode(packed).decode(),
        library=library.replace("</script", "<\\/script"),
        script=parts["js"],
    )


def _section(study: Study, rows: Sequence[Row], figures: dict[str, Any]) -> str:
    """A study's figures and tables; the figures' specifications go into `figures`."""
    parts = [f'<h2 id="{study.name}">{escape(study.title)}</h2>']
    for figure in study.figures:
        if (drawing := vega_lite_spec(figure, rows)) is not None:
            name = f"{study.name}/{figure.name}"
            figures[name] = drawing
            words = escape(f"{study.name} {figure.title}".lower())
            parts.append(
                f'<figure class="card" data-words="{words}"><div class="plot" data-figure="{name}"></div></figure>'
            )
    for table in study.tables:
        sheets = table.make_sheets(rows)
        parts += [f"<h3>{escape(table.title)}</h3>"] * bool(sheets)
        for sheet in sheets:
            parts.append(_table(sheet, f"{study.name} {table.title} {sheet.title}", len(sheets) > 4))
    return "".join([*parts, _glossary(study, rows)])


def _glossary(study: Study, rows: Sequence[Row]) -> str:
    lines = "".join(
        f"<li><b>{escape(names)}</b>: {escape(about)}</li>" for about, names in glossary(study, rows).items()
    )
    return f'<details class="card" id="{study.name}-methods"><summary>The methods</summary><ul>{lines}</ul></details>'


def _table(sheet: Sheet, words: str, folded: bool) -> str:
    heads = "".join(f"<th>{escape(text)}</th>" for text in sheet.heading)
    lines = "".join("<tr>" + "".join(f"<td>{escape(t)}</td>" for t in line) + "</tr>" for line in sheet.lines)
    notes = "".join(f"<li>{escape(note)}</li>" for note in sheet.notes)
    return (
        f'<div class="card" data-words="{escape(words.lower())}"><details{"" if folded else " open"}>'
        f"<summary>{escape(sheet.title)}</summary>"
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
        f"{f'<ul>{notes}</ul>' if notes else ''}</details></div>"
    )


def _board(leaders: Sequence[dict[str, Any]]) -> str:
    names = dict.fromkeys(point["scenario"] for point in leaders)
    if not names:
        return ""
    options = "".join(f"<option>{escape(name)}</option>" for name in names)
    return (
        '<h2 id="leaderboard">Accuracy against cost</h2><p>Every method of one scenario: mean and standard deviation '
        "over seeds, against what it costs. The dashed line is plain training; the steps join the methods that no "
        "other one beats at their cost.</p>"
        f'<label>Scenario <select id="scenario">{options}</select></label>'
        '<figure class="card"><div class="plot" id="leaders"></div></figure>'
    )


def _leaders(study: Study, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """A point for each method of each scenario that has an accuracy and a cost."""
    about = {(s.name, method.name): method.about for s in study.scenarios for method in s.methods}
    for scenario, own in by_scenario(current(rows)).items():
        every = (_point(group, about.get((scenario, name), "")) for name, group in groups(own).items())
        points = [point for point in every if point is not None]
        best = 0.0
        for point in sorted(points, key=lambda p: (p["seconds"], -p["accuracy"])):
            point["best"] = point["accuracy"] > best
            best = max(best, point["accuracy"])
        styles = choose_styles(point["method"] for point in points)
        for point in points if len(points) > 1 else ():
            colour, shape = styles[point["method"]]
            yield {"scenario": f"{study.name}: {scenario}", **point, "colour": colour, "shape": shape}


def _point(group: Group, about: str) -> dict[str, Any] | None:
    accuracies = group.values("accuracy")
    seconds = [row.seconds for row in group.rows if not row.failure and row.seconds > 0]
    if not accuracies or not seconds:
        return None
    middle, cost = statistics.fmean(accuracies), statistics.fmean(seconds)
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    shares = [own.seconds / plain.seconds for own, plain in group.beside() if plain.seconds]
    row = group.rows[-1]
    return {
        "method": group.method,
        "about": about,
        "accuracy": round(middle, 4),
        "deviation": round(deviation, 4),
        "low": round(middle - deviation, 4),
        "high": round(middle + deviation, 4),
        "seconds": float(f"{cost:.4g}"),
        "share": f"{statistics.fmean(shares):.1%} of plain training" if shares else "",
        "seeds": len(group.rows),
        "commit": (row.code.commit or "none")[:10] + (" with changes" if row.code.changed else ""),
        "configuration": json.dumps(row.config, separators=(", ", ": "))[:240],
    }
