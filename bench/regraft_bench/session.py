"""What `pytest bench` and the `regraft` command share: choosing scenarios, measuring them, the pages at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

from regraft.core.arguments import MANY, check_device
from regraft.core.extras import require_packages
from regraft.core.files import only_writer, write_text
from regraft.core.guard import make_deterministic
from regraft.data import MissingData
from regraft_bench.engines import ENGINES
from regraft_bench.report.page import page
from regraft_bench.report.render import ROWS, Figure, Table, for_papers, load_rows, summary, write_pages
from regraft_bench.rows import Row, now
from regraft_bench.run import run
from regraft_bench.studies import STUDIES, study
from regraft_bench.study import RunPaths, Scenario, Study, nearest

if TYPE_CHECKING:
    from regraft_bench.cli import Options

Item = TypeVar("Item", Table, Figure)


PAGES = ("pandas", "tabulate", "vl_convert")
"""What tables, figures and the page are made with."""


def prepare(options: Options) -> None:
    """Make torch deterministic where it is asked for.

    Raises ValueError for packages that are missing and options that no run can have, and OSError for a folder of
    results that cannot be written, or in which nothing can be locked.
    """
    require_packages("the benchmark suite", PAGES, "bench")
    if options.seeds is not None and not 1 <= options.seeds <= MANY:
        raise ValueError(f"--seeds must be from 1 to {MANY:,}, not {options.seeds}")
    check_device(options.device)
    if options.deterministic:
        make_deterministic()
    options.results.mkdir(parents=True, exist_ok=True)
    with only_writer(options.results, wait=True):  # what cannot be written or locked is said before any training
        pass


def find_other_checkout() -> Path | None:
    """The suite's folder in the working directory, where that is a checkout whose code is not this process's."""
    here = Path("bench/regraft_bench").resolve()
    return here if here.is_dir() and here != Path(__file__).resolve().parent else None


@contextmanager
def run_paths(options: Options) -> Iterator[RunPaths]:
    """Where a run with these options finds and leaves things; trainings in a temporary folder if they are not kept."""
    with TemporaryDirectory(prefix="regraft-") as folder:
        yield RunPaths(options.data, cache=options.cache or Path(folder), begun=now(), device=options.device)


def choose(
    studies: Sequence[str] = (), scenarios: Sequence[str] = (), methods: Sequence[str] = ()
) -> list[tuple[Study, Scenario]]:
    """The scenarios of these names in these studies (all studies if none is named); without names the quick ones.

    With methods, those scenarios that have any of them, and these methods alone. Raises ValueError, with the nearest
    names, for a study, a scenario or a method that there is not.
    """
    chosen = _choose_scenarios([study(name) for name in studies or STUDIES], scenarios)
    if not methods:
        return chosen
    known = {method.name for _, scenario in chosen for method in scenario.methods}
    for name in methods:
        if name not in known:
            raise ValueError(f"there is no method {name!r} here{nearest(name, sorted(known))}")
    narrowed = [(one, replace(s, methods=tuple(m for m in s.methods if m.name in methods))) for one, s in chosen]
    return [(one, scenario) for one, scenario in narrowed if scenario.methods]


def _choose_scenarios(studies: Sequence[Study], scenarios: Sequence[str]) -> list[tuple[Study, Scenario]]:
    if not scenarios:
        return [(one, scenario) for one in studies for scenario in one.select(one.quick)]
    known: dict[str, list[tuple[Study, Scenario]]] = {}
    for one in studies:
        for scenario in one.scenarios:
            known.setdefault(scenario.name, []).append((one, scenario))
    for name in scenarios:
        if name not in known:
            raise ValueError(f"there is no scenario {name!r}{nearest(name, known)}")
    return [pair for name in scenarios for pair in known[name]]  # studies may have scenarios of one name


def measure(one: Study, scenario: Scenario, options: Options, place: RunPaths) -> list[Row]:
    """Run one scenario, its rows in ``results/<study>/rows.jsonl``.

    Raises MissingData where its data are not there, ValueError for an engine that is not installed.
    """
    return list(
        run(
            one,
            [scenario],
            place=place,
            rows=options.results / one.name / ROWS,
            seeds=None if options.seeds is None else range(options.seeds),
            resume=options.resume,
            keep_older=options.keep_older,
            engine=ENGINES[options.engine],
        )
    )


def measure_unless_missing(
    one: Study, scenario: Scenario, options: Options, place: RunPaths, console: Console
) -> list[Row] | None:
    """Run one scenario with progress on the console; None, and a line that says why, where its data are missing."""
    try:
        with progress(place, console) as shown:
            return measure(one, scenario, options, shown)
    except MissingData as missing:
        console.print(f"{scenario.name} is skipped: {missing}")
        return None


@contextmanager
def progress(place: RunPaths, console: Console) -> Iterator[RunPaths]:
    """The place with a bar in the terminal for whatever runs there; as it is where the console is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if not console.is_terminal:
        yield place
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        shown = bar.add_task("", total=None)

        def report_progress(what: str, done: int, total: int) -> None:
            bar.update(shown, description=what, completed=done, total=total)

        yield replace(place, tell=report_progress)


def conclude(rows: Mapping[str, Sequence[Row]], results: Path, console: Console) -> None:
    """Print the summary of the rows of each study, write the pages of all that lies in the folder, and say where."""
    for name, own in rows.items():
        for sheet in summary(study(name), own):
            console.print(sheet)
            console.print()
    regenerate(results)
    console.print(f"rows, tables and figures: {results}; the page: {results / 'index.html'}")


def regenerate(results: Path, documents: Sequence[Path] = (), papers: bool = False) -> list[Path]:
    """Make the pages of a results folder, and the tables that documents quote; returns what was written.

    papers: also tables in LaTeX and figures as PNG.
    """
    studies = [study(name) for name in STUDIES]
    written = write_pages(results, studies, documents)
    written += for_papers(results, studies) if papers else []
    write_text(results / "index.html", page(results, studies))
    return [*written, results / "index.html"]


def reproduce_study(name: str, tables: Sequence[str], figures: Sequence[str], *, paper: bool, options: Options) -> int:
    """Run the scenarios of a study's tables and figures, all of them if none is named, and print the tables.

    Raises ValueError for a table or figure that there is not. Returns 0, or 1 where data were missing for any.
    """
    prepare(options)
    one, console = study(name), Console(markup=False)
    pages = select_pages(one, tables, figures)
    names = dict.fromkeys(scenario for item in pages for scenario in item.scenarios)
    scenarios = one.select([name for name in names if name.endswith("-paper") == paper])
    with run_paths(options) as place:
        measured = [measure_unless_missing(one, scenario, options, place, console) for scenario in scenarios]
    rows = load_rows(options.results, one)
    for item in pages:
        for sheet in item.make_sheets(rows) if isinstance(item, Table) else ():
            console.print(sheet)
    for path in regenerate(options.results):
        console.print(str(path))
    return int(None in measured)


def select_pages(one: Study, tables: Sequence[str], figures: Sequence[str]) -> list[Table | Figure]:
    """A study's tables and figures of these names; all of both where none is named."""
    if not tables and not figures:
        return [*one.tables, *one.figures]
    return [*select_items(one, tables, one.tables), *select_items(one, figures, one.figures)]


def select_items(one: Study, names: Sequence[str], items: Sequence[Item]) -> list[Item]:
    """The tables or figures of these names. Raises ValueError, with the nearest ones, for an unknown name."""
    by_name = {item.name: item for item in items}
    for name in names:
        if name not in by_name:
            raise ValueError(f"study {one.name} has no {name!r}{nearest(name, list(by_name))}")
    return [by_name[name] for name in names]


def load_known_rows(results: Path, one: Study) -> list[Row]:
    """A study's rows in a results folder. Raises ValueError, naming the file, where there are none."""
    if not (rows := load_rows(results, one)):
        raise ValueError(f"there are no rows in {results / one.name / ROWS}: give another --results")
    return rows
