"""Tables as functions of rows: rows -> sheets of text -> Markdown, the terminal, HTML.

    Table("main", "FGMT beside its baselines", ("digits-mlp", ...), by_method(COLUMNS))

A sheet is what a table says of one scenario: a heading, lines of cells, and notes (comparisons, where it was measured).
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from regraft.core.text import clean_markdown, clean_text
from regraft_bench.rows import Row
from regraft_bench.study import TUNING_SEED

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

Rows = Sequence[Row]


LONGEST_NAME = 30
"""Letters: a longer cell is a sentence, which may be wrapped."""


@dataclass(frozen=True)
class Sheet:
    """A table of text. The first column names the lines; the others are numbers with the units of their headings."""

    title: str
    heading: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self, level: int = 2) -> str:
        """With a heading of this level and the notes as a list."""
        import pandas as pd

        heading, *lines = (list(map(clean_markdown, line)) for line in (self.heading, *self.lines))
        frame = pd.DataFrame(lines, columns=heading)
        align = ["left", *["right"] * (len(self.heading) - 1)]
        body = frame.to_markdown(index=False, colalign=align, disable_numparse=True)
        notes = "".join(f"- {clean_markdown(note)}\n" for note in self.notes)
        return f"{'#' * level} {clean_markdown(self.title)}\n\n{body}\n" + f"\n{notes}" * bool(notes)

    def latex(self) -> str:
        """A table environment with the title as its caption, for LuaLaTeX or XeLaTeX (titles hold Greek letters)."""
        import pandas as pd

        header, *lines = (list(map(escape_latex, line)) for line in (self.heading, *self.lines))
        align, title = "l" + "r" * (len(header) - 1), escape_latex(self.title)
        frame = pd.DataFrame(lines, columns=header)  # as to_latex's header, {} in names would be filled
        return frame.to_latex(index=False, column_format=align, caption=title)

    def csv(self) -> str:
        """Lines of comma-separated cells, after a comment with the title and before comments with the notes."""
        out = io.StringIO()
        out.write(f"# {clean_text(self.title)}\n")
        csv.writer(out, lineterminator="\n").writerows([map(clean_text, line) for line in (self.heading, *self.lines)])
        out.writelines(f"# {clean_text(note)}\n" for note in self.notes)
        return out.getvalue()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A table where its words fit into the terminal, else a paragraph for each line."""
        from rich.table import Table as RichTable
        from rich.text import Text

        columns = list(zip(*(map(clean_text, line) for line in (self.heading, *self.lines)), strict=True))
        widths = [max([_longest_word(heading), *map(_unbroken, cells)]) for heading, *cells in columns]
        notes = Text("\n".join(map(clean_text, self.notes)), style="italic")
        if sum(widths) + 3 * len(widths) + 1 > options.max_width:
            yield Text(clean_text(self.title), style="bold")
            for first, *cells in zip(*(column[1:] for column in columns), strict=True):
                pairs = zip(columns[1:], cells, strict=True)
                yield Text(first, style="cyan")
                yield Text("  " + "; ".join(f"{name} {cell}" for (name, *_), cell in pairs if cell != "–"))
            yield notes
            return
        table = RichTable(title=Text(clean_text(self.title)), title_style="bold", title_justify="left", caption=notes)
        for number, ((heading, *cells), width) in enumerate(zip(columns, widths, strict=True)):
            wraps = any(len(cell) > LONGEST_NAME for cell in cells)
            side: Any = "right" if number and not wraps else "left"
            table.add_column(heading, justify=side, width=None if wraps else width)
        for line in zip(*(column[1:] for column in columns), strict=True):
            table.add_row(*line)
        yield table


def _unbroken(cell: str) -> int:
    """Letters that stay in one line: all of a number or name, the longest word of a sentence."""
    return len(cell) if len(cell) <= LONGEST_NAME else _longest_word(cell)


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)


@dataclass(frozen=True)
class Group:
    """All seeds of one method in one scenario, and the whole scenario's rows for what is joined on reading."""

    method: str
    rows: Rows
    scenario: Rows

    def values(self, name: str) -> list[float]:
        """A value over the seeds that have it."""
        return [v for row in self.rows if (v := row.values.get(name)) is not None]

    def beside(self, method: str = "plain") -> list[tuple[Row, Row]]:
        """(own row, the other method's row) of every seed that both have."""
        other = {row.seed: row for row in self.scenario if row.method == method}
        return [(row, other[row.seed]) for row in self.rows if row.seed in other]


@dataclass(frozen=True)
class Column:
    """A heading, with the unit of what stands below it, and what it says of a line: of a group, if nothing else."""

    heading: str
    cell: Callable[[Any], str]


@dataclass(frozen=True)
class Table:
    """A table of a study: `sheets(rows)` makes it of the current rows of its scenarios.

    published: the paper's own numbers where there are any, for the pages that quote them.
    """

    name: str
    title: str
    scenarios: tuple[str, ...]
    sheets: Callable[[Rows], Iterable[Sheet]]
    published: Mapping[str, Any] = field(default_factory=dict)

    def make_sheets(self, rows: Rows) -> list[Sheet]:
        """Its sheets, of whatever rows there are."""
        return list(self.sheets(current(rows, self.scenarios)))


def escape_latex(text: str) -> str:
    """Plain text for LaTeX, in one line."""
    marks = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(marks.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in clean_text(text))


# ---------------------------------------------------------------- reading rows


def current(rows: Rows, scenarios: Sequence[str] | None = None) -> list[Row]:
    """What a page quotes: of every scenario and method the rows of its newest configuration, one a seed, the newest.

    Scenarios in the order asked for (or first measured), methods in that in which they were first measured; tuning
    runs are left out.
    """
    order = list(dict.fromkeys([row.scenario for row in rows] if scenarios is None else scenarios))
    rows = [row for row in rows if row.scenario in order and row.seed != TUNING_SEED]
    newest = {(row.scenario, row.method): row.config for row in rows}
    measured = list(newest)
    last = {
        (order.index(row.scenario), measured.index((row.scenario, row.method)), row.seed): row
        for row in rows
        if row.config == newest[row.scenario, row.method]
    }
    return [last[key] for key in sorted(last)]


def by_scenario(rows: Rows) -> dict[str, list[Row]]:
    """Rows by scenario, in their order."""
    return _split(rows, "scenario")


def groups(rows: Rows) -> dict[str, Group]:
    """One scenario's rows by method, in their order."""
    return {method: Group(method, own, rows) for method, own in _split(rows, "method").items()}


def _split(rows: Rows, name: str) -> dict[str, list[Row]]:
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(getattr(row, name), []).append(row)
    return parts


@dataclass(frozen=True)
class Comparison:
    """Paired over seeds: n pairs, the mean difference, and p of the two-sided paired t-test (NaN: not testable)."""

    n: int
    difference: float
    p: float

    def __str__(self) -> str:
        p = "" if math.isnan(self.p) else f", p = {self.p:.2g}"
        return f"{self.difference:+.3f} (n = {self.n}{p})"


def compare_methods(rows: Rows, method: str, other: str, value: str = "accuracy") -> Comparison | None:
    """Whether one method of a scenario is better than another; None where they share no seed."""
    from scipy import stats

    beside = Group(method, [row for row in rows if row.method == method], rows).beside(other)
    values = [(a.values.get(value), b.values.get(value)) for a, b in beside]
    pairs = [(a, b) for a, b in values if a is not None and b is not None]
    if not pairs:
        return None
    differences = [a - b for a, b in pairs]
    scale = max(map(abs, differences))
    testable = len(pairs) > 1 and statistics.stdev(differences) > 1e-12 * scale
    p = float(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue) if testable else math.nan
    return Comparison(len(pairs), statistics.fmean(differences), p)


# ---------------------------------------------------------------- cells


def spread(values: Sequence[float | None], form: str = "{:.3f}") -> str:
    """Mean ± standard deviation over seeds; the deviation only where there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = form.format(statistics.fmean(known))
    return mean if len(known) == 1 else f"{mean} ± {form.format(statistics.stdev(known))}"


def mean(values: Sequence[float | None], form: str = "{:.3f}") -> str:
    """The mean over seeds."""
    known = [value for value in values if value is not None]
    return form.format(statistics.fmean(known)) if known else "–"


def value(name: str, form: str = "{:.3f}") -> Callable[[Group], str]:
    """A cell: mean ± standard deviation of a value."""
    return lambda group: spread(group.values(name), form)


def percent(name: str) -> Callable[[Group], str]:
    """A cell: mean ± standard deviation of an accuracy, in percent."""
    return lambda group: spread([100 * found for found in group.values(name)], "{:.1f}")


def seconds(group: Group) -> str:
    """A cell: the method's charge, evaluation apart, CPU seconds on a CPU."""
    return mean([row.seconds for row in group.rows if row.cost and not row.failure], "{:.3g}")


def share_of_plain(group: Group) -> str:
    """A cell: the method's charge over that of plain training of the same seed."""
    shares = [own.seconds / plain.seconds for own, plain in group.beside() if plain.seconds and not own.failure]
    return mean(shares, "{:.1%}")


def seeds(group: Group) -> str:
    """A cell: how many seeds, and how many of them failed."""
    failed = sum(row.failure is not None for row in group.rows)
    return f"{len(group.rows)} ({failed} failed)" if failed else str(len(group.rows))


COMMON = (
    Column("seeds", seeds),
    Column("accuracy", value("accuracy")),
    Column("CPU s", seconds),
    Column("share of plain training", share_of_plain),
)
"""What every method of every study can say: accuracy is a share of 1, on the test split."""


# ---------------------------------------------------------------- sheets


def make_sheet(
    title: str, first: str, columns: Sequence[Column], lines: Mapping[str, Any], notes: Iterable[str] = ()
) -> Sheet:
    """A line for each entry: its name, under the heading ``first``, and what every column says of it."""
    cells = tuple((name, *(column.cell(entry) for column in columns)) for name, entry in lines.items())
    return Sheet(title, (first, *(column.heading for column in columns)), cells, tuple(notes))


def by_method(
    columns: Sequence[Column] = COMMON, questions: Sequence[tuple[str, str]] = (), value: str = "accuracy"
) -> Callable[[Rows], Iterator[Sheet]]:
    """One sheet a scenario, one line a method; each question (method, other) is answered with n and p below."""

    def sheets(rows: Rows) -> Iterator[Sheet]:
        for scenario, own in by_scenario(rows).items():
            differences = [(*pair, compare_methods(own, *pair, value)) for pair in questions]
            answers = [f"{one} − {other}: {found}" for one, other, found in differences if found is not None]
            failures = [f"{r.method}, seed {r.seed}: {r.failure}" for r in own if r.failure]
            notes = (*answers, *failures, *provenance(own))
            yield make_sheet(scenario, "method", columns, groups(own), notes)

    return sheets


def provenance(rows: Rows) -> list[str]:
    """Where rows were measured, by which code and command; several codes are counted."""
    machines = Counter(f"{r.environment.machine}, {r.environment.threads} thread(s)" for r in rows)
    codes = Counter(f"{(r.code.commit or 'no commit')[:10]}{' with changes' if r.code.changed else ''}" for r in rows)
    last = rows[-1].environment
    versions = ", ".join(f"{name} {text}" for name, text in last.versions.items())
    told = ", ".join(f"{name} ({count} rows)" if len(codes) > 1 else name for name, count in codes.items())
    commands = list(dict.fromkeys(row.environment.command for row in rows))
    return [
        f"measured on {'; '.join(machines)}; {versions}",
        f"{'commit' if len(codes) == 1 else 'rows of several commits:'} {told}; `{commands[-1]}`",
    ]
