"""The ``regraft`` command. Every verb is a typed function; what it needs is imported when it runs, not before."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

Names = UseAppendAction[tuple[str, ...]]
Text = Annotated[str | None, arg(metavar="STR")]
File = Annotated[Path | None, arg(metavar="PATH")]
Number = Annotated[int | None, arg(metavar="INT")]
Shape = Annotated[tuple[int, ...] | None, arg(metavar="INT ...")]
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

    from regraft import front
    from regraft.data import MissingData
    from regraft.studies.run import crashed
    from regraft.studies.study import Place

    console = Console(markup=False)
    if deterministic:
        front.deterministic()
    place = Place(data, device=device) if cache is None else Place(data, cache, device)
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
    failures = [row for own in rows.values() for row in own if crashed(row)]
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
    from regraft import front
    from regraft.studies.study import Place

    if deterministic:
        front.deterministic()
    return front.reproduced(
        study,
        table,
        figure,
        paper=paper,
        place=Place(data, cache, device),
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

    from regraft import front

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
    from regraft import front
    from regraft.studies.turns import Limits

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
    from regraft import front
    from regraft.studies.turns import Limits

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
    from regraft import front

    return front.over_time(front.every(results), as_json=json)


def symmetry(model: Positional[str], /, *, shape: Shape = None, save: File = None) -> int:
    """Print a model's permutation groups, and prove them by random permutations.

    Args:
        model: a classification model of torchvision, timm/NAME, hf/FOLDER (with a config.json of transformers), or
            module:factory, something importable without arguments.
        shape: of one input, batch first; the model's usual one if not given.
        save: a file for the proven groups, which `port`, `match` and `fuse` take as --spec.
    """
    from regraft.symmetry.describe import describe

    spec = describe(model, shape)
    if save is not None:
        spec.save(save)
    return 0


@dataclass(frozen=True)
class Reading:
    """How checkpoints are read and written.

    Attributes:
        model: as `regraft symmetry` takes it.
        shape: of one input, batch first; the model's usual one if not given.
        spec: proven groups (`regraft symmetry MODEL --save FILE`), in place of the model where files are streamed.
        data: a folder {train,test or val}/CLASS/IMAGE, or module:function that gives batches.
        max_memory: such as 8GB; what the machine has if not given.
        device: where to compute, such as cpu or cuda.
        deterministic: only algorithms that give the same bits in every run.
        resume: go on from what an interrupted run has finished.
        json: print the result as JSON, for machines.
    """

    model: Text = None
    shape: Shape = None
    spec: File = None
    data: Text = None
    max_memory: Text = None
    device: str = "cpu"
    deterministic: bool = False
    resume: bool = False
    json: bool = False

    def asked(self) -> dict[str, Any]:
        """What the functions of `regraft.porting` take; and torch is told what it must not do."""
        from regraft import front

        if self.deterministic:
            front.deterministic()
        asked: dict[str, Any] = {
            "model": self.model,
            "inputs": self.shape,
            "spec": self.spec,
            "data": self.data,
        }
        return asked | {"max_memory": self.max_memory, "device": self.device}


READING = Reading()


def port(
    base: Positional[Path],
    tuned: Positional[Path],
    new_base: Positional[Path],
    /,
    *,
    out: Path = Path("ported"),
    method: str = "fgmt",
    steps: int = 30,
    dry_run: bool = False,
    reading: OmitArgPrefixes[Reading] = READING,
) -> int:
    """Bring a fine-tune onto a new base: BASE, what was fine-tuned from it, NEW_BASE -> a new checkpoint.

    Args:
        base: a checkpoint: safetensors (a file, an index, a folder), or a PyTorch file that holds tensors alone.
        tuned: the fine-tune of BASE.
        new_base: what it is to follow.
        out: a folder that is not there yet, for shards, index and README.md.
        method: weights, naive; or fgmt, gradfix, fgmt+gradfix, weights+gradfix, which need data and memory.
        steps: of the path of fgmt.
        dry_run: check everything, and print what would be done.
    """
    from regraft import front

    asked = reading.asked() | {"method": method, "steps": steps}
    files = (base, tuned, new_base)
    if dry_run:
        return front.planned(files, out, asked, as_json=reading.json)
    return front.ported(files, out, asked, resume=reading.resume, as_json=reading.json)


def match(
    a: Positional[Path],
    b: Positional[Path],
    /,
    *,
    out: Path = Path("aligned"),
    reading: OmitArgPrefixes[Reading] = READING,
) -> int:
    """Write B with its units in the order of A's: the same function; with data, the loss barrier between the two.

    Args:
        a: a checkpoint, as `port` takes it.
        b: another of the same architecture.
        out: a folder that is not there yet, for shards, index and README.md.
    """
    from regraft import front

    return front.aligned(a, b, out, reading.asked(), resume=reading.resume, as_json=reading.json)


def fuse(
    networks: Positional[tuple[Path, ...]],
    /,
    *,
    weights: tuple[float, ...],
    out: Path = Path("fused"),
    align: bool = False,
    reading: OmitArgPrefixes[Reading] = READING,
) -> int:
    """Write a weighted sum of networks; with --align each is first brought onto the first.

    Args:
        networks: checkpoints of one architecture, as `port` takes them.
        weights: one number a network.
        out: a folder that is not there yet, for shards, index and README.md.
        align: match the units of each network with the first's; needs a model, or a proven specification.
    """
    from regraft import front

    how = {"align": align, "resume": reading.resume, "as_json": reading.json}
    return front.fused(networks, weights, out, reading.asked(), **how)


VERBS: dict[str, Callable[..., int]] = {
    "bench": bench,
    "reproduce": reproduce,
    "report": report,
    "compare": compare,
    "against": against,
    "history": history,
    "symmetry": symmetry,
    "port": port,
    "match": match,
    "fuse": fuse,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. What was asked for wrongly is one line on stderr and exit status 2; a missing or bad file 1.

    An interruption ends with status 130 and says how to go on. Errors of the program itself are not hidden.
    """
    from regraft import __version__
    from regraft.files import BadFile

    words = sys.argv[1:] if arguments is None else list(arguments)
    if words == ["--version"]:
        print(f"regraft {__version__}")
        return 0
    try:
        return tyro.extras.subcommand_cli_from_dict(
            dict(VERBS),
            prog="regraft",
            description="Move learning from one neural network into another without training it again.",
            args=words,
        )
    except KeyboardInterrupt:
        print("regraft: interrupted; what is finished is kept, and --resume goes on from it", file=sys.stderr)
        return 130
    except BadFile as problem:
        print(f"regraft: {problem}", file=sys.stderr)
        return 1
    except ValueError as problem:
        print(f"regraft: {problem}", file=sys.stderr)
        return 2
    except OSError as problem:
        print(f"regraft: {problem}", file=sys.stderr)
        return 1
