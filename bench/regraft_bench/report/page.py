"""The one HTML page: everything that rows say, in a file that needs no network.

Figures are Vega-Lite, drawn when they come into sight; the tables are text that can be filtered, so that the page says
the same with scripts off.
"""

from __future__ import annotations

import base64
import gzip
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from regraft.core.text import clean_html as escape
from regraft_bench.report.drawing import VEGA_LITE, vega_lite_spec
from regraft_bench.report.render import glossary, load_rows
from regraft_bench.report.styles import choose_styles
from regraft_bench.report.tables import Group, Sheet, by_scenario, current, groups
from regraft_bench.report.terms import TERMS
from regraft_bench.rows import Row
from regraft_bench.study import Study
from regraft_bench.tracking import history

LIBRARY = "window.embed = vegaEmbed;"
PAGE_PARTS = ("html", "css", "js")


def page(folder: Path, studies: Sequence[Study]) -> str:
    """The page of a results folder: what each study shows first, a leaderboard, then every table and figure, folded."""
    import vl_convert

    figures: dict[str, Any] = {}
    leaders: list[dict[str, Any]] = []
    first, body, names, tracks = "", "", [], []
    hints = dict(TERMS)
    for study in studies:  # of all studies' rows no two need be in memory at once
        if rows := load_rows(folder, study):
            names.append(study.name)
            drawn = {
                figure.name: spec for figure in study.figures if (spec := vega_lite_spec(figure, rows)) is not None
            }
            figures |= {f"{study.name}/{name}": spec for name, spec in drawn.items()}
            first += "".join(_figure(study, figure) for figure in study.headlines if figure in drawn)
            body += _section(study, rows, drawn)
            leaders += _leaders(study, rows)
            tracks += history.find_tracks(rows)
            hints |= {name: about for about, own in glossary(study, rows).items() for name in own.split("; ")}
    if tracks:
        body += f'<section><h2 id="history">History</h2>{_table(history.tracks_sheet(tracks), "history", ())}</section>'
    links = ["leaderboard"] * bool(leaders) + names + ["history"] * bool(tracks)
    clock = "CPU seconds (wall clock on a GPU), evaluation apart"
    data = {"figures": figures, "leaders": leaders, "clock": clock, "hints": hints}
    packed = gzip.compress(json.dumps(data, allow_nan=False).encode(), mtime=0)
    library = vl_convert.javascript_bundle(LIBRARY, vl_version=VEGA_LITE) if names else ""
    parts = {kind: (files("regraft_bench.report") / f"page.{kind}").read_text("utf-8") for kind in PAGE_PARTS}
    empty = '<p id="none" hidden>Nothing is left.</p>'
    return Template(parts["html"]).substitute(
        style=parts["css"],
        links="".join(f'<a href="#{name}">{name}</a>' for name in links),
        main=f'<section class="figures">{first}</section>{_board(leaders)}{body}{empty}',
        data=base64.b64encode(packed).decode(),
        library=library.replace("</script", "<\\/script"),
        script=parts["js"],
    )


def _section(study: Study, rows: Sequence[Row], drawn: Mapping[str, Any]) -> str:
    """A study's other figures and its tables, folded; what its methods do."""
    others = "".join(_figure(study, name) for name in drawn if name not in study.headlines)
    parts = [f'<h2 id="{study.name}">{escape(study.title)}</h2>']
    if others:
        parts.append(
            f'<details class="card"><summary>More figures</summary><div class="figures">{others}</div></details>'
        )
    for table in study.tables:
        sheets = table.make_sheets(rows)
        inner = "".join(_table(sheet, f"{study.name}-{table.name}", (table.title,)) for sheet in sheets)
        parts.append(_fold(f"{study.name}-{table.name}", table.title, inner) if len(sheets) > 1 else inner)
    return f"<section>{''.join([*parts, _glossary(study, rows)])}</section>"


def _fold(name: str, title: str, inner: str) -> str:
    return f'<details class="card" id="{name}"><summary>{escape(title)}</summary>{inner}</details>'


def _figure(study: Study, name: str) -> str:
    figure = next(figure for figure in study.figures if figure.name == name)
    said = escape(f"{figure.title}. {figure.caption}")
    return (
        f'<figure class="card" id="{study.name}-{name}" data-words="{escape(f"{study.name} {figure.title}".lower())}">'
        f'<div class="plot" data-figure="{study.name}/{name}" role="img" aria-label="{said}"></div></figure>'
    )


def _glossary(study: Study, rows: Sequence[Row]) -> str:
    lines = "".join(
        f"<li><b>{escape(names)}</b>: {escape(about)}</li>" for about, names in glossary(study, rows).items()
    )
    return f'<details class="card" id="{study.name}-methods"><summary>The methods</summary><ul>{lines}</ul></details>'


def _table(sheet: Sheet, name: str, words: Sequence[str]) -> str:
    """A folded table, with an address of its own. words: what a filter finds it by, beside its title."""
    heads = "".join(f'<th aria-sort="none"><button>{escape(text)}</button></th>' for text in sheet.heading)
    lines = "".join("<tr>" + "".join(f"<td>{escape(t)}</td>" for t in line) + "</tr>" for line in sheet.lines)
    notes = "".join(f"<li>{escape(note)}</li>" for note in sheet.notes)
    found_by = escape(" ".join([name, *words, sheet.title]).lower())
    return (
        f'<details class="card" id="{escape(f"{name}-{sheet.title}".replace(" ", "-"))}" data-words="{found_by}">'
        f"<summary>{escape(sheet.title)}</summary>"
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
        f"{f'<ul>{notes}</ul>' if notes else ''}</details>"
    )


def _board(leaders: Sequence[dict[str, Any]]) -> str:
    names = dict.fromkeys(point["scenario"] for point in leaders)
    if not names:
        return ""
    options = "".join(f"<option>{escape(name)}</option>" for name in names)
    return (
        '<section><h2 id="leaderboard">Accuracy against cost</h2><p>Every method of one scenario: mean and standard '
        "deviation over seeds, against what it costs. The dashed line is plain training; the steps join the methods "
        "that no other one beats at their cost.</p>"
        f'<label>Scenario <select id="scenario">{options}</select></label>'
        '<figure class="card"><div class="plot" id="leaders" role="img" aria-label="Accuracy against cost"></div>'
        "</figure></section>"
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
