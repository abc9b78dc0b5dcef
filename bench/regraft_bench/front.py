"""What `pytest bench` and the `regraft` command share: choosing scenarios, showing progress, the summary at the end."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from regraft.core.files import write_text
from regraft.data import MissingData
from regraft_bench.engines import ENGINES
from regraft_bench.report.page import page
from regraft_bench.report.render import ROWS, Figure, Table, for_papers, load_rows, summary, write_pages
from regraft_bench.rows import Row, read_rows
from regraft_bench.run import run
from regraft_bench.studies import STUDIES, study
from regraft_bench.study import RunPaths, Scenario, Study, nearest
from regraft_bench.tracking import compare, history
from regraft_bench.tracking.against import Limits, copy_packages, extract_packages, measure_by_turns
from regraft_bench.tracking.compare import Change

Chosen = tuple[Study, Scenario]


def choose(
    studies: Sequence[str] = (), scenarios: Sequence[str] = (), methods: Sequence[str] = ()
) -> list[Chosen]:
    """The scenarios of these names in these studies (all studies if none is named); without names the quick ones.

    With methods, those scenarios that have any of them, and these methods alone. Raises ValueError, with the nearest
    names, for a study, a scenario or a method that there is not.
    """
    chosen = _choose(studies, scenarios)
    if not methods:
        return chosen
    known = {method.name for _, scenario in chosen for method in scenario.methods}
    for name in methods:
        if name not in known:
            raise ValueError(f"there is no method {name!r} here{nearest(name, sorted(known))}")
    narrowed = [
        (one, replace(s, methods=tuple(m for m in s.methods if m.name in methods))) for one, s in chosen
    ]
    return [(one, scenario) for one, scenario in narrowed if scenario.methods]


def _choose(studies: Sequence[str], scenarios: Sequence[str]) -> list[Chosen]:
    known = [study(name) for name in studies or STUDIES]
    if not scenarios:
        return [(one, scenario) for one in known for scenario in one.select(one.quick)]
    names = {scenario.name: (one, scenario) for one in known for scenario in one.scenarios}
    for name in scenarios:
        if name not in names:
            raise ValueError(f"there is no scenario {name!r}{nearest(name, names)}")
    return [names[name] for name in scenarios]


def measure(
    chosen: Chosen,
    *,
    place: RunPaths,
    results: Path,
    seeds: int | None = None,
    resume: bool = False,
    keep_older: bool = False,
    engine: str = "local",
) -> list[Row]:
    """Run one scenario, its rows in ``results/<study>/rows.jsonl``, measured by one of `ENGINES`.

    Raises MissingData where its data are not there, ValueError for an engine that is not installed.
    """
    one, scenario = chosen
    return list(
        run(
            one,
            [scenario],
            place=place,
            rows=results / one.name / ROWS,
            seeds=None if seeds is None else range(seeds),
            resume=resume,
            keep_older=keep_older,
            engine=ENGINES[engine],
        )
    )


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

        def tell(what: str, done: int, total: int) -> None:
            bar.update(shown, description=what, completed=done, total=total)

        yield replace(place, tell=tell)


def conclude(rows: Mapping[str, Sequence[Row]], results: Path, console: Console) -> None:
    """Print the summary of the rows of each study, write the pages of all that lies in the folder, and say where."""
    for name, own in rows.items():
        for sheet in summary(study(name), own):
            console.print(sheet.rich())
            console.print()
    remade(results)
    console.print(f"rows, tables and figures: {results}; the page: {results / 'index.html'}")


def remade(results: Path, documents: Sequence[Path] = (), papers: bool = False) -> list[Path]:
    """Make the pages of a results folder, and the tables that documents quote; returns what was written.

    papers: also tables in LaTeX and figures as PNG.
    """
    studies = [study(name) for name in STUDIES]
    made = write_pages(results, studies, documents)
    made += for_papers(results, studies) if papers else []
    write_text(results / "index.html", page(results, studies))
    return [*made, results / "index.html"]


def reproduced(
    name: str,
    tables: Sequence[str],
    figures: Sequence[str],
    *,
    paper: bool,
    place: RunPaths,
    results: Path,
    seeds: int | None = None,
    keep_older: bool = False,
    engine: str = "local",
) -> int:
    """Run the scenarios of a study's tables and figures, all of them if none is named, and print the tables.

    Raises ValueError for a table or figure that there is not. Returns 0, or 1 where data were missing for any.
    """
    one, console = study(name), Console(markup=False)
    wanted = pages(one, tables, figures)
    names = dict.fromkeys(scenario for item in wanted for scenario in item.scenarios)
    missing = False
    for scenario in one.select([n for n in names if n.endswith("-paper") == paper]):
        try:
            with progress(place, console) as told:
                measure(
                    (one, scenario),
                    place=told,
                    results=results,
                    seeds=seeds,
                    resume=True,
                    keep_older=keep_older,
                    engine=engine,
                )
        except MissingData as problem:
            console.print(f"{scenario.name} is skipped: {problem}")
            missing = True
    rows = load_rows(results, one)
    for item in wanted:
        for sheet in item.make_sheets(rows) if isinstance(item, Table) else ():
            console.print(sheet.rich())
    for path in remade(results):
        console.print(str(path))
    return int(missing)


def pages(one: Study, tables: Sequence[str], figures: Sequence[str]) -> list[Table | Figure]:
    """A study's tables and figures of these names; all of both where none is named."""
    found: list[Table | Figure] = []
    for names, known in ((tables, one.tables), (figures, one.figures)):
        by_name = {item.name: item for item in known}
        for name in names:
            if name not in by_name:
                raise ValueError(f"study {one.name} has no {name!r}{nearest(name, by_name)}")
        found += [by_name[name] for name in names]
    return found or [*one.tables, *one.figures]


def found(side: str, results: Path) -> list[Row]:
    """Rows by what one would call them.

    A file of rows, a folder (its own rows.jsonl and those of its studies), "last" (the newest code's rows below
    ``results``), "baseline" (those below ``results/baseline``), or a commit, by its first digits, among the rows below
    ``results``. Raises ValueError, naming the side, where there are none.
    """
    path = Path(side)
    if path.is_file():
        return read_rows(path)
    folder = path if path.is_dir() else results / "baseline" if side == "baseline" else None
    rows = every(folder or results)
    if side == "last" and rows:
        newest = max(rows, key=lambda row: row.time).code
        rows = [row for row in rows if row.code.same(newest)]
    elif folder is None:
        rows = [row for row in rows if row.code.commit is not None and row.code.commit.startswith(side)]
    if not rows:
        where = folder or results
        raise ValueError(
            f"no rows for {side!r}: neither a file or folder of rows, nor a commit of rows in {where}"
        )
    return rows


def every(folder: Path) -> list[Row]:
    """All rows of a folder and of the studies in it, by file."""
    files = [folder / ROWS, *(folder / name / ROWS for name in STUDIES)]
    return [row for path in files if path.is_file() for row in read_rows(path)]


def compared(
    before: Sequence[Row],
    after: Sequence[Row],
    limits: Limits,
    *,
    everything: bool = False,
    as_json: bool = False,
) -> int:
    """Print what changed between two sets of rows; 1 where anything is worse by more than is allowed, else 0."""
    status = told(compare.find_changes(before, after), limits, everything=everything, as_json=as_json)
    apart = [" and ".join(sorted(compare.machines(side))) for side in (before, after)]
    if apart[0] != apart[1] and not as_json:
        print(f"other machines, so that costs are not compared where they differ: {apart[0]}; {apart[1]}")
    return status


def against(
    commit: str, words: Sequence[str], limits: Limits, *, everything: bool = False, as_json: bool = False
) -> int:
    """Measure a commit and the present code by turns, and print what changed; 1 where it is worse than is allowed."""
    console = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory(prefix="regraft-against-") as place,
        progress(RunPaths(), console) as shown,
    ):
        folder = Path(place)
        sides = extract_packages(commit, folder / "then"), copy_packages(folder / "now")
        changes = measure_by_turns(
            *sides, words, folder / "rows", limits, lambda done, most: shown.tell("turns", done, most)
        )
    return told(changes, limits, everything=everything, as_json=as_json)


WHAT_NOW = """Measure it alone: regraft against COMMIT --scenario NAME --method NAME (its control among the methods).
If it is meant, renew results/baseline in the same commit (make baseline) and say why; else it is to be mended."""


def told(
    changes: Sequence[Change], limits: Limits, *, everything: bool = False, as_json: bool = False
) -> int:
    """Print changes; 1 where any is worse by more than is allowed, else 0."""
    beyond = [change for change in changes if limits.is_exceeded_by(change)]
    if as_json:
        print(
            json.dumps({"changes": list(map(asdict, changes)), "beyond": list(map(asdict, beyond))}, indent=1)
        )
        return int(bool(beyond))
    console = Console(markup=False)
    sheet = compare.changes_sheet(changes, everything)
    console.print(sheet.rich() if sheet.lines else "; ".join(("nothing changed", *sheet.notes)))
    for change in beyond:
        allowed = f"{limits.slowdown:.0%}" if change.quantity == "cost" else f"{limits.error_rise:g}"
        size = f"{change.change:+.1%}" if change.quantity == "cost" else f"{change.change:+.4f}"
        name = f"{change.study}, {change.scenario}, {change.method}"
        print(f"{name}: {change.quantity} {size} (allowed: {allowed})")
    if beyond:
        print(WHAT_NOW)
    return int(bool(beyond))


def over_time(rows: Sequence[Row], *, as_json: bool = False) -> int:
    """Print every method's history."""
    tracks = history.find_tracks(rows)
    if as_json:
        print(json.dumps([asdict(track) for track in tracks], indent=1))
    else:
        Console(markup=False).print(history.tracks_sheet(tracks).rich())
    return 0
