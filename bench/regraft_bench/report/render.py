"""The only page maker: rows -> Markdown, SVG, and the terminal's summary (`regraft_bench.report.page`: the HTML page).

    write_pages(Path("results"), studies)     # every table and figure of every study, from results/<study>/rows.jsonl

Pages are functions of rows and of nothing else. Documents written by hand quote tables between two marks,

    <!-- table transfer/main digits-mlp -->
    <!-- end -->

whose inside is made anew with the pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from regraft.core.files import write_bytes, write_text
from regraft_bench.report.drawing import svg
from regraft_bench.report.figures import Figure
from regraft_bench.report.tables import COMMON, Column, Sheet, Table, by_method, current
from regraft_bench.rows import Row, read_rows
from regraft_bench.study import Study

__all__ = ["Column", "Figure", "Sheet", "Table", "for_papers", "load_rows", "summary", "write_pages"]

ROWS = "rows.jsonl"
MARK = re.compile(r"(<!-- table (\S+)/(\S+)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def load_rows(folder: Path, study: Study) -> list[Row]:
    """The rows of a study below a results folder; none where it has not been run."""
    path = folder / study.name / ROWS
    return read_rows(path) if path.is_file() else []


def write_pages(folder: Path, studies: Sequence[Study], documents: Sequence[Path] = ()) -> list[Path]:
    """Write every study's tables (``<study>/tables.md``) and figures (``<study>/<figure>.svg``), and fill the marks of
    the documents. Returns what was written.
    """
    texts = {}
    for study in studies:
        if rows := load_rows(folder, study):
            texts[folder / study.name / "tables.md"] = markdown(study, rows)
            drawings = {figure.name: svg(figure, rows) for figure in study.figures}
            texts |= {folder / study.name / f"{name}.svg": text for name, text in drawings.items() if text}
    for path in documents:
        texts[path] = fill_tables(path.read_text(encoding="utf-8"), folder, studies)
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def for_papers(folder: Path, studies: Sequence[Study]) -> list[Path]:
    """Write every study's tables in LaTeX (``tables.tex``) and its figures as pixels (``<figure>.png``), beside those
    of `write_pages`. Returns what was written.
    """
    written = []
    for study in studies:
        if rows := load_rows(folder, study):
            place = folder / study.name
            write_text(place / "tables.tex", format_tables(study.tables, rows, "latex"))
            written += [place / "tables.tex", *write_figures(study.figures, rows, place, "png")]
    return written


def format_tables(tables: Sequence[Table], rows: Sequence[Row], form: str) -> str:
    """Tables as text. form: "markdown", "latex" or "csv" (with a line for each title and note)."""
    sheets = [sheet for table in tables for sheet in table.make_sheets(rows)]
    return "\n".join({"markdown": Sheet.markdown, "latex": Sheet.latex, "csv": Sheet.csv}[form](s) for s in sheets)


def write_figures(figures: Sequence[Figure], rows: Sequence[Row], folder: Path, form: str) -> list[Path]:
    """Write those figures that have rows to ``folder/<figure>.<form>``; returns the files.

    form: "svg", "png" (two pixels a unit) or "pdf".
    """
    import vl_convert

    written = []
    for figure in figures:
        if (drawing := svg(figure, rows)) is not None:
            path = folder / f"{figure.name}.{form}"
            if form == "svg":
                write_text(path, drawing)
            else:
                pixels = vl_convert.svg_to_png(drawing, scale=2) if form == "png" else vl_convert.svg_to_pdf(drawing)
                write_bytes(path, pixels)
            written.append(path)
    return written


def markdown(study: Study, rows: Sequence[Row]) -> str:
    """All tables of a study."""
    source = "Mean ± standard deviation over seeds. Made of rows.jsonl by `regraft report`."
    parts = [f"# {study.title}", "", source, ""]
    for table in study.tables:
        if sheets := table.make_sheets(rows):
            parts += [f"## {table.title}", "", *(sheet.markdown(3) for sheet in sheets)]
    methods = (f"- **{names}**: {about}" for about, names in glossary(study, rows).items())
    return "\n".join([*parts, "## The methods", "", *methods]).rstrip() + "\n"


def glossary(study: Study, rows: Sequence[Row] | None = None) -> dict[str, str]:
    """What a study's methods do (with rows: those that have any): a sentence, and the names of which it is true."""
    measured = None if rows is None else {(row.scenario, row.method) for row in rows}
    names: dict[str, dict[str, None]] = {}
    for scenario in study.scenarios:
        for method in scenario.methods:
            if measured is None or (scenario.name, method.name) in measured:
                name = method.name.removeprefix(f"{method.config.get('contest')}: ")
                names.setdefault(method.about, {})[name] = None
    return {about: _shorten(list(own)) for about, own in names.items()}


def _shorten(names: Sequence[str]) -> str:
    more = f"; and {len(names) - 5} more" if len(names) > 6 else ""
    return "; ".join(names[:5] if more else names) + more


def fill_tables(document: str, folder: Path, studies: Sequence[Study]) -> str:
    """The document with the inside of its marks made anew.

    Raises ValueError for a mark whose study, table or scenario there is not.
    """
    known = {study.name: study for study in studies}

    def fill(mark: re.Match[str]) -> str:
        head, study, name, scenario, end = mark.groups()
        tables = {table.name: table for table in known[study].tables} if study in known else {}
        if name not in tables:
            raise ValueError(f"a document quotes table {study}/{name}, which there is not")
        sheets = tables[name].make_sheets(load_rows(folder, known[study]))
        sheets = [sheet for sheet in sheets if scenario is None or sheet.title == scenario]
        if not sheets:
            raise ValueError(f"a document quotes {study}/{name} {scenario or ''}, of which there are no rows")
        body = "\n".join(sheet.markdown().split("\n", 2)[2].partition("\n\n")[0] + "\n" for sheet in sheets)
        return f"{head}{body}{end}"

    return MARK.sub(fill, document)


def summary(study: Study, rows: Iterable[Row]) -> Iterator[Sheet]:
    """What the bench says of a study at its end: each scenario's methods in the study's own few columns."""
    for sheet in by_method(study.summary or COMMON)(current(list(rows))):
        yield Sheet(f"{study.title}: {sheet.title}", sheet.heading, sheet.lines)
