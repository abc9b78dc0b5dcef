"""The suite's verbs of the ``regraft`` command: it finds them by the entry points ``regraft.verbs``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

Names = UseAppendAction[tuple[str, ...]]
File = Annotated[Path | None, arg(metavar="PATH")]
Number = Annotated[int | None, arg(metavar="INT")]
Engine = Literal["local", "ray", "slurm"]


def bench(
    *,
    study: Names = (),
    scenario: Names = (),
    method: Names = (),
    seeds: Number = None,
    device: str = "cpu",
    data: File = None,
    results: Path = Path("results/local"),
    cache: File = None,
    resume: bool = False,
    keep_older: bool = False,
    deterministic: bool = False,
    rows_only: bool = False,
    engine: Engine = "local",
) -> int:
    """Measure every method beside plain training, and the kernels beside what one would write by hand.

    Args:
        study: transfer, fusion, fast or micro; may be given several times. All by default.
        scenario: may be given several times. By default those that take seconds.
        method: only methods of this name; may be given several times.
        seeds: how many, instead of each scenario's own number.
        device: where to compute, such as cpu or cuda.
        data: folder of the data sets (default: REGRAFT_DATA, else ./data).
        results: folder for rows, tables, figures and the page.
        cache: folder in which trainings are kept, so that an interrupted one goes on.
        resume: measure only what has no row of the same settings and the same code.
        keep_older: the same, and take rows of any code.
        deterministic: only algorithms that give the same bits in every run.
        rows_only: no summary, no page.
        engine: who measures the rows: this process, the workers of a Ray cluster, or jobs of SLURM.
    """
    from rich.console import Console

    from regraft.data import MissingData
    from regraft_bench import front
    from regraft_bench.run import is_crash
    from regraft_bench.study import RunPaths

    console = Console(markup=False)
    if deterministic:
        from regraft.core.guard import make_deterministic

        make_deterministic()
    place = RunPaths(data, device=device) if cache is None else RunPaths(data, cache, device)
    measure = partial(front.measure, results=results, seeds=seeds, resume=resume, keep_older=keep_older)
    rows: dict[str, list] = {}
    for chosen in front.choose(study, scenario, method):
        try:
            with front.progress(place, console) as told:
                own = measure(chosen, place=told, engine=engine)
        except MissingData as missing:
            console.print(f"{chosen[1].name} is skipped: {missing}")
            continue
        rows.setdefault(chosen[0].name, []).extend(own)
    if not rows_only:
        front.conclude(rows, results, console)
    failures = [row for own in rows.values() for row in own if is_crash(row)]
    for row in failures:
        console.print(f"{row.scenario}, {row.method}, seed {row.seed}: {row.failure}")
    return 1 if failures or not rows else 0


def reproduce(
    study: Positional[str],
    /,
    *,
    table: Names = (),
    figure: Names = (),
    paper: bool = False,
    seeds: Number = None,
    device: str = "cpu",
    data: File = None,
    results: Path = Path("results/local"),
    cache: Path = Path(".cache/regraft"),
    keep_older: bool = False,
    deterministic: bool = False,
    engine: Engine = "local",
) -> int:
    """Run a paper's tables and figures again, ours beside the paper's; what has its rows already is not run again.

    Args:
        study: transfer, fusion, fast or micro.
        table: one of the study's tables; may be given several times.
        figure: one of its figures; may be given several times. All tables and figures if none is named.
        paper: with the paper's settings (scenarios named ...-paper); wants a GPU and the data.
        seeds: how many, instead of each scenario's own number.
        device: where to compute, such as cpu or cuda.
        data: folder of the data sets (default: REGRAFT_DATA, else ./data).
        results: folder for rows, tables and figures.
        cache: folder in which trainings are kept, so that an interrupted one goes on.
        keep_older: take rows of any code, not of this one alone.
        deterministic: only algorithms that give the same bits in every run.
        engine: who measures the rows: this process, the workers of a Ray cluster, or jobs of SLURM.
    """
    from regraft_bench import front
    from regraft_bench.study import RunPaths

    if deterministic:
        from regraft.core.guard import make_deterministic

        make_deterministic()
    return front.reproduced(
        study,
        table,
        figure,
        paper=paper,
        place=RunPaths(data, cache, device),
        results=results,
        seeds=seeds,
        keep_older=keep_older,
        engine=engine,
    )


def report(
    documents: Positional[tuple[Path, ...]] = (),
    /,
    *,
    results: Path = Path("results/local"),
    papers: bool = False,
) -> int:
    """Make every table, figure and the page anew from the rows in a results folder.

    Args:
        documents: Markdown files whose quoted tables are filled, such as README.md.
        results: the folder; with results/local what you measured yourself.
        papers: also tables.tex and PNG files beside the SVG files.
    """
    from rich.console import Console

    from regraft_bench import front

    with Console(stderr=True).status("tables, figures and the page"):
        made = front.remade(results, documents, papers)
    for path in made:
        print(path)
    return 0


def compare(
    before: Positional[str],
    after: Positional[str],
    /,
    *,
    results: Path = Path("results/local"),
    max_slowdown: float = 0.1,
    max_error_rise: float = 0.005,
    everything: bool = False,
    json: bool = False,
) -> int:
    """Say what became slower or less accurate between two sets of rows; exit status 1 where it is more than allowed.

    Args:
        before: a file or folder of rows, a commit, "last" (the newest code's) or "baseline" (RESULTS/baseline).
        after: the same.
        results: the folder in which commits, "last" and "baseline" are looked for.
        max_slowdown: what a cost may rise by, as a share (0.1: ten percent), relative to the control of the same run.
        max_error_rise: what an error may rise by, in shares of 1.
        everything: show what did not change, too.
        json: print the comparisons as JSON, for machines.
    """
    from regraft_bench import front
    from regraft_bench.tracking.against import Limits

    old, new = (front.found(side, results) for side in (before, after))
    limits = Limits(max_slowdown, max_error_rise)
    return front.compared(old, new, limits, everything=everything, as_json=json)


def against(
    commit: Positional[str],
    /,
    *,
    study: Names = (),
    scenario: Names = (),
    method: Names = (),
    data: File = None,
    turns: int = 12,
    max_slowdown: float = 0.1,
    max_error_rise: float = 0.005,
    everything: bool = False,
    json: bool = False,
) -> int:
    """Measure a commit and the present code by turns on this machine; exit status 1 where it became worse than allowed.

    Args:
        commit: what to compare with, such as main or HEAD~1.
        study: the quick scenarios of this study; may be given several times.
        scenario: may be given several times. Without study and scenario: systems, which is made for this.
        method: only methods of this name (and their control's); may be given several times.
        data: folder of the data sets (default: REGRAFT_DATA, else ./data).
        turns: at most; four prove that nothing is slower, and more are taken where something looks it.
        max_slowdown: what a cost may rise by, as a share (0.1: ten percent), relative to the control of the same run.
        max_error_rise: what an error may rise by, in shares of 1.
        everything: show what did not change, too.
        json: print the comparisons as JSON, for machines.
    """
    from regraft_bench import front
    from regraft_bench.tracking.against import Limits

    chosen = {"study": study, "scenario": scenario or (() if study else ("systems",)), "method": method}
    words = [word for name, values in chosen.items() for value in values for word in (f"--{name}", value)]
    front.choose(*chosen.values())  # a wrong name is said before any work
    words += [] if data is None else ["--data", str(data.resolve())]
    limits = Limits(max_slowdown, max_error_rise, min(4, turns), turns)
    return front.against(commit, words, limits, everything=everything, as_json=json)


def history(*, results: Path = Path("results/local"), json: bool = False) -> int:
    """Error and cost of every method over the codes that it was measured with, and where they made a step.

    Args:
        results: the folder of the rows.
        json: print it as JSON, for machines.
    """
    from regraft_bench import front

    return front.over_time(front.every(results), as_json=json)
