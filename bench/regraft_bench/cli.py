"""The suite's verbs of the ``regraft`` command, and the flags that they share with ``pytest bench``.

The command finds the verbs by the entry points ``regraft.verbs``. A verb imports what it needs when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

if TYPE_CHECKING:
    from regraft_bench.tracking.compare import Change, Limits

Names = UseAppendAction[tuple[str, ...]]
Folder = Annotated[Path | None, arg(metavar="PATH")]
Results = Path("results/local")


@dataclass(frozen=True)
class Selection:
    """What is measured.

    Attributes:
        study: transfer, fusion, fast or micro; may be given several times. All by default.
        scenario: may be given several times. By default those that take seconds.
        method: only methods of this name; may be given several times.
    """

    study: Names = ()
    scenario: Names = ()
    method: Names = ()


@dataclass(frozen=True)
class Options:
    """How it is measured. `pytest bench` has the same flags.

    Attributes:
        seeds: seeds 0 .. N-1, instead of each scenario's own number.
        device: where to compute, such as cpu or cuda.
        data: folder of the data sets (default: REGRAFT_DATA, else ./data).
        results: folder for rows, tables, figures and the page.
        cache: folder in which trainings are kept, so that an interrupted one goes on; other code trains anew.
        resume: measure only what has no row of the same settings and the same code.
        keep_older: measure only what has no row of the same settings, whatever its code.
        deterministic: only algorithms that give the same bits in every run.
        engine: where rows are measured: this process, the workers of a Ray cluster, or jobs of SLURM.
    """

    seeds: Annotated[int | None, arg(metavar="INT")] = None
    device: str = "cpu"
    data: Folder = None
    results: Path = Results
    cache: Folder = None
    resume: bool = False
    keep_older: bool = False
    deterministic: bool = False
    engine: Literal["local", "ray", "slurm"] = "local"


@dataclass(frozen=True)
class Allowed:
    """What may become worse, and how it is shown.

    Attributes:
        max_slowdown: what a cost may rise by, as a share (0.1: ten percent), relative to the control of the same run.
        max_error_rise: what an error may rise by, in shares of 1; other values may move by this share of them.
        allow_missing: runs that only the first side has are shown and do not count.
        everything: show what did not change, too.
        json: print the comparisons as JSON, for machines.
    """

    max_slowdown: float = 0.1
    max_error_rise: float = 0.005
    allow_missing: bool = False
    everything: bool = False
    json: bool = False

    def limits(self, turns: int = 12) -> Limits:
        """For at most this many pairs of turns."""
        from regraft_bench.tracking.compare import Limits

        return Limits(self.max_slowdown, self.max_error_rise, min(4, turns), turns)

    @property
    def display(self) -> dict[str, Any]:
        """Arguments of `print_changes`."""
        return {
            "allow_missing": self.allow_missing,
            "everything": self.everything,
            "as_json": self.json,
        }


BENCH, REPRODUCE = Options(), Options(cache=Path(".cache/regraft"), resume=True)
EVERYTHING, ALLOWED = Selection(), Allowed()


def bench(
    *,
    selection: OmitArgPrefixes[Selection] = EVERYTHING,
    measuring: OmitArgPrefixes[Options] = BENCH,
    rows_only: bool = False,
) -> int:
    """Measure every method against plain training, and the kernels against straightforward PyTorch.

    Args:
        rows_only: no summary, no page.
    """
    from rich.console import Console

    from regraft.core.text import clean_text
    from regraft_bench import session
    from regraft_bench.run import is_crash

    session.prepare(measuring)
    console = Console(markup=False)
    if (checkout := session.find_other_checkout()) is not None:
        console.print(clean_text(f"{checkout} is not what is measured, which is installed: pip install -e '.[bench]'"))
    rows: dict[str, list] = {}
    with session.run_paths(measuring) as place:
        for study, scenario in session.choose(selection.study, selection.scenario, selection.method):
            own = session.measure_unless_missing(study, scenario, measuring, place, console)
            if own is not None:
                rows.setdefault(study.name, []).extend(own)
    if not rows_only:
        session.conclude(rows, measuring.results, console)
    failures = [row for own in rows.values() for row in own if is_crash(row)]
    for row in failures:
        console.print(clean_text(f"{row.scenario}, {row.method}, seed {row.seed}: {row.failure}"))
    return 1 if failures or not rows else 0


def reproduce(
    study: Positional[str],
    /,
    *,
    table: Names = (),
    figure: Names = (),
    paper: bool = False,
    measuring: OmitArgPrefixes[Options] = REPRODUCE,
) -> int:
    """Run a paper's tables and figures again, ours beside the paper's; what has its rows already is not run again.

    Args:
        study: transfer, fusion, fast or micro.
        table: one of the study's tables; may be given several times.
        figure: one of its figures; may be given several times. All tables and figures if none is named.
        paper: with the paper's settings (scenarios named ...-paper); wants a GPU and the data.
    """
    from regraft_bench import session

    return session.reproduce_study(study, table, figure, paper=paper, options=measuring)


def report(documents: Positional[tuple[Path, ...]] = (), /, *, results: Path = Results, papers: bool = False) -> int:
    """Make every table, figure and the page anew from the rows in a results folder.

    Args:
        documents: Markdown files whose quoted tables are filled, such as README.md.
        results: the folder; with results/local what you measured yourself.
        papers: also tables.tex and PNG files beside the SVG files.
    """
    from rich.console import Console

    from regraft.core.extras import require_packages
    from regraft_bench import session

    if not results.is_dir():
        raise FileNotFoundError(f"{results}: there is no such folder of results")
    require_packages("a report", session.PAGES, "bench")
    with Console(stderr=True).status("tables, figures and the page"):
        written = session.regenerate(results, documents, papers)
    for path in written:
        print(path)
    return 0


def list_all(
    study: Annotated[str | None, Positional, arg(metavar="STUDY")] = None,
    /,
    *,
    results: Path = Path("results"),
    data: Folder = None,
) -> int:
    """Show what there is to measure: studies and data sets; of one study its scenarios, methods, tables and figures.

    Args:
        study: transfer, fusion, fast or micro.
        results: the folder whose rows say how long a scenario takes.
        data: folder of the data sets (default: REGRAFT_DATA, else ./data).
    """
    from rich.console import Console

    from regraft_bench import catalogue, studies

    console = Console(markup=False)
    if study is None:
        sheets = catalogue.list_studies(results, data)
    else:
        sheets = catalogue.list_study(studies.study(study), results)
    for sheet in sheets:
        console.print(sheet)
        console.print()
    return 0


def tables(
    study: Positional[str],
    /,
    *,
    table: Names = (),
    format: Literal["markdown", "latex", "csv"] = "markdown",
    results: Path = Path("results"),
) -> int:
    """Print a study's tables for a paper or a program, made of the rows in a results folder.

    Args:
        study: transfer, fusion, fast or micro.
        table: one of its tables (`regraft list STUDY`); may be given several times. All if none is named.
        format: markdown, latex (LuaLaTeX, XeLaTeX) or csv.
        results: the folder of the rows.
    """
    from regraft_bench import session, studies
    from regraft_bench.report.render import format_tables

    one = studies.study(study)
    chosen = session.select_items(one, table, one.tables) or one.tables
    print(format_tables(chosen, session.load_known_rows(results, one), format))
    return 0


def figures(
    study: Positional[str],
    /,
    *,
    figure: Names = (),
    format: Literal["svg", "png", "pdf"] = "svg",
    results: Path = Path("results"),
    out: Path = Path("figures"),
) -> int:
    """Write a study's figures, made of the rows in a results folder.

    Args:
        study: transfer, fusion, fast or micro.
        figure: one of its figures (`regraft list STUDY`); may be given several times. All if none is named.
        format: svg, png (twice the size) or pdf.
        results: the folder of the rows.
        out: the folder to write to; files of the same names are replaced.
    """
    from regraft_bench import session, studies
    from regraft_bench.report.render import write_figures

    one = studies.study(study)
    chosen = session.select_items(one, figure, one.figures) or one.figures
    for path in write_figures(chosen, session.load_known_rows(results, one), out, format):
        print(path)
    return 0


def compare(
    before: Positional[str],
    after: Positional[str],
    /,
    *,
    results: Path = Results,
    allowed: OmitArgPrefixes[Allowed] = ALLOWED,
) -> int:
    """Say what became slower or less accurate between two sets of rows; exit status 1 where it is more than allowed.

    Args:
        before: a file or folder of rows or of pytest-benchmark's JSON, a commit as git calls it, "last" (the newest
            code's) or "baseline" (RESULTS/baseline).
        after: the same.
        results: the folder in which commits, "last" and "baseline" are looked for.
    """
    from regraft.core.text import clean_text
    from regraft_bench.studies import find_rows
    from regraft_bench.tracking.compare import explain_uncompared, find_changes
    from regraft_bench.tracking.shown import print_changes

    sides = [find_rows(side, results) for side in (before, after)]
    beyond = print_changes(find_changes(*sides), allowed.limits(), **allowed.display)
    if not allowed.json:
        for said in explain_uncompared(*sides):
            print(clean_text(said))
        _print_advice(beyond, max(sides[0], key=lambda row: row.time).code.commit)
    return int(bool(beyond))


def against(
    commit: Positional[str],
    /,
    *,
    selection: OmitArgPrefixes[Selection] = EVERYTHING,
    data: Folder = None,
    baseline: Folder = None,
    turns: int = 12,
    allowed: OmitArgPrefixes[Allowed] = ALLOWED,
) -> int:
    """Measure a commit and the present code by turns on this machine; exit status 1 where it became worse than allowed.

    Without --study and --scenario it measures the scenario systems, which is made for this.

    Args:
        commit: what to compare with, such as main or HEAD~1.
        data: folder of the data sets (default: REGRAFT_DATA, else ./data).
        baseline: folder of rows in this checkout; what its rows, renewed since the commit, say too is meant.
        turns: maximum number of A/B pairs; stops after four unless a slowdown is suspected.
    """
    from rich.console import Console

    from regraft_bench import session
    from regraft_bench.study import RunPaths
    from regraft_bench.tracking.against import find_meant, measure_against
    from regraft_bench.tracking.shown import print_changes

    scenarios = selection.scenario or (() if selection.study else ("systems",))
    session.choose(selection.study, scenarios, selection.method)  # a wrong name is said before any work
    flags: dict[str, Sequence[str]] = {"--study": selection.study, "--scenario": scenarios}
    flags |= {"--method": selection.method, "--data": () if data is None else (str(data.resolve()),)}
    argv = [word for flag, values in flags.items() for value in values for word in (flag, value)]
    limits = allowed.limits(turns)
    with session.progress(RunPaths(cache=Path()), Console(stderr=True)) as place:
        changes = measure_against(commit, argv, limits, lambda done, most: place.tell("turns", done, most))
    meant = () if baseline is None else find_meant(commit, baseline, limits)
    beyond = print_changes(changes, limits, meant=meant, **allowed.display)
    if not allowed.json:
        _print_advice(beyond, commit)
    return int(bool(beyond))


def _print_advice(beyond: list[Change], commit: str | None) -> None:
    from regraft_bench.studies import STUDIES
    from regraft_bench.tracking.shown import advise

    if beyond and all(change.study in STUDIES for change in beyond):
        print(advise(beyond, commit))


def history(
    rows: Positional[tuple[str, ...]] = (),
    /,
    *,
    results: Path = Results,
    max_slowdown: float = 0.1,
    max_error_rise: float = 0.005,
    json: bool = False,
) -> int:
    """Error and cost of every method over the codes that it was measured with, and where they made a step.

    Exit status 1 where the last step of any was for the worse.

    Args:
        rows: files or folders of rows or of pytest-benchmark's JSON, instead of the results.
        results: the folder of the rows.
        max_slowdown: what a cost may rise by, as a share; smaller steps are not shown.
        max_error_rise: what an error may rise by, in shares of 1; smaller steps are not shown.
        json: print it as JSON, for machines.
    """
    from regraft.core.extras import require_packages
    from regraft_bench.studies import all_rows, find_rows
    from regraft_bench.tracking.compare import Limits
    from regraft_bench.tracking.history import find_tracks, print_history

    require_packages("the history", ("ruptures",), "bench")
    own = [row for side in rows for row in find_rows(side, results)] if rows else all_rows(results)
    return print_history(find_tracks(own, Limits(max_slowdown, max_error_rise)), as_json=json)
