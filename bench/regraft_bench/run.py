"""The only runner: pytest and the command call it; an engine decides where rows are measured.

    for row in run(study, scenarios, place=place, rows=path, resume=True):
        ...

Rows are independent of one another and the same whoever runs them (`local`, or `regraft_bench.engines`). In one
process, methods of one scenario and seed share a setting, so that what they all need (data, a trained source, a traced
specification) is made once; it goes when they are done.

Several runners may add to one file at the same time. A seed of a scenario belongs to the runner that holds its lock;
another one goes on with seeds that are free, and in the end waits and takes the rows that were added since it began.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from regraft.core.files import only_writer
from regraft.data import MissingData
from regraft_bench.rows import Environment, Row, append, code, latest, now, read_rows, row_identity
from regraft_bench.study import TUNING_SEED, Measured, Method, RunPaths, Scenario, Setting, Study


def run(
    study: Study,
    scenarios: Sequence[Scenario],
    *,
    place: RunPaths,
    rows: Path,
    seeds: Sequence[int] | None = None,
    resume: bool = False,
    keep_older: bool = False,
    engine: Engine | None = None,
) -> Iterator[Row]:
    """Measure what is asked for, append each row to the file, and yield it; rows that are kept are yielded, too.

    Args:
        seeds: instead of each scenario's own.
        resume: rows of the same identity and the same code are taken as they are; keep_older: of any code.
        engine: where missing rows are measured: this process (`local`) or one of `regraft_bench.engines`.

    Raises MissingData before any work of a scenario whose data are not there. A run that fails or diverges is a
    row that says how.
    """
    code()  # read before anything that runs could change the files
    begun = place.begun or now()
    for scenario in scenarios:
        _collect(parts(rows, scenario), rows)
        _remove_locks(rows, scenario)
    earlier = _load_earlier(rows, keep_older) if resume or keep_older else {}
    how = _How(study, place, rows, begun, earlier, engine or local)
    for scenario in scenarios:
        chosen: dict[str, Method] = {}
        for method in scenario.methods:
            if method.candidates:
                tried = list(_tune(how, scenario, method))
                yield from (row for _, row in tried)
                chosen[method.name] = best(tried, method.tuned_by)
            else:
                chosen[method.name] = method
        wanted = range(scenario.seeds) if seeds is None else seeds
        yield from _run_all(how, scenario, wanted, list(chosen.values()))


@dataclass(frozen=True)
class _How:
    """What all runs of one call share."""

    study: Study
    place: RunPaths
    path: Path
    begun: str
    earlier: dict[str, Row]
    engine: Engine


def _load_earlier(path: Path, keep_older: bool) -> dict[str, Row]:
    """Rows that need not be measured again, by identity: of this code, or of any (``keep_older``).

    A run that crashed is not kept; one that diverged is, as it would diverge again.
    """
    rows = read_rows(path) if path.is_file() else []
    kept = latest([row for row in rows if keep_older or row.code.same(code())])
    return {row.identity: row for row in kept if not is_crash(row)}


def _load_others(how: _How) -> dict[str, Row]:
    """Rows of this code that were measured and added since the run began, by identity."""
    rows = read_rows(how.path) if how.path.is_file() else []
    return {row.identity: row for row in rows if row.time >= how.begun and row.code.same(code())}


def _collect(folder: Path, path: Path) -> None:
    """Add what workers left for a runner that was gone when they came; a runner that is there takes its own."""
    for file in sorted(folder.glob("*.json")):
        with suppress(FileNotFoundError, BlockingIOError):  # another runner has taken it, or will
            for row in read_rows(file):
                with only_writer(path, _lock_of(path, row.scenario, row.seed)):
                    if row not in (read_rows(path) if path.is_file() else []):  # as where a runner was killed here
                        append(path, row)
                    file.unlink(missing_ok=True)


def _remove_locks(path: Path, scenario: Scenario) -> None:
    """Remove what runners left that were killed: whoever is there holds his own."""
    for lock in path.parent.glob(f".{scenario.name}-*.lock"):
        with suppress(OSError), only_writer(path, lock):
            pass


def _lock_of(path: Path, scenario: str, seed: int) -> Path:
    """The lock of a scenario's seed, in the folder of the rows."""
    return path.with_name(f".{scenario}-{seed}.lock")


def _tune(how: _How, scenario: Scenario, method: Method) -> Iterator[tuple[Method, Row]]:
    """Every candidate on the tuning seed, each under the method's own name."""
    variants = [Method(method.name, variant.run, variant.config) for variant in method.candidates]
    yield from zip(variants, _run_all(how, scenario, [TUNING_SEED], variants), strict=True)


def best(tried: Sequence[tuple[Method, Row]], value: str) -> Method:
    """The candidate whose tuning row has the largest value; the first of several.

    Raises ValueError where no candidate has one.
    """
    scored = [(row.values.get(value), method) for method, row in tried]
    known = [(score, method) for score, method in scored if score is not None]
    if not known:
        method, row = tried[0]
        raise ValueError(f"no candidate of {method.name!r} came to a value of {value!r}: {row.failure}")
    return max(known, key=lambda pair: pair[0])[1]


def _run_all(how: _How, scenario: Scenario, seeds: Sequence[int], methods: Sequence[Method]) -> Iterator[Row]:
    """All methods of each seed, in this order, in whatever order the engine brings them."""
    folder = parts(how.path, scenario)
    jobs = [Job(how.study, scenario, method, seed, how.place, folder) for seed in seeds for method in methods]
    rows = dict(how.earlier)
    come = _measure(how, scenario, [job for job in jobs if job.identity not in rows])
    for job in jobs:
        while job.identity not in rows:
            row = next(come)
            rows[row.identity] = row
        yield rows[job.identity]
    next(come, None)  # the engine tidies up


def _measure(how: _How, scenario: Scenario, jobs: Sequence[Job]) -> Iterator[Row]:
    """The row of every job, measured here or by another runner, and added to the file.

    This process takes one seed after the other, so that another may take the next; an engine takes all that are free.
    """
    waiting = list(dict.fromkeys(job.seed for job in jobs))
    while waiting:
        with ExitStack() as held:
            mine = _claim(how, scenario, waiting, held)
            others = _load_others(how)
            own = [job for job in jobs if job.seed in mine]
            yield from (others[job.identity] for job in own if job.identity in others)
            for row in how.engine([job for job in own if job.identity not in others]):
                append(how.path, row)
                yield row
        waiting = [seed for seed in waiting if seed not in mine]


def _claim(how: _How, scenario: Scenario, seeds: Sequence[int], held: ExitStack) -> list[int]:
    """Lock seeds that no other runner has; one at least, for which it may wait."""
    how.path.parent.mkdir(parents=True, exist_ok=True)
    mine: list[int] = []
    for seed in seeds:
        with suppress(BlockingIOError):
            held.enter_context(only_writer(how.path, _lock_of(how.path, scenario.name, seed)))
            mine.append(seed)
        if mine and how.engine is local:
            return mine
    if not mine:
        how.place.tell(f"{scenario.name}, seed {seeds[0]}: another runner is at it", 0, 1)
        held.enter_context(only_writer(how.path, _lock_of(how.path, scenario.name, seeds[0]), wait=True))
        mine.append(seeds[0])
    return mine


# ---------------------------------------------------------------------------------------------------
# One row, and who makes it


@dataclass(frozen=True)
class Job:
    """One row that is to be measured. parts: the folder for rows that other processes measure, a file each."""

    study: Study
    scenario: Scenario
    method: Method
    seed: int
    place: RunPaths
    parts: Path

    @property
    def identity(self) -> str:
        """Of its row."""
        config, kind = self.scenario.config(self.method), self.place.device.partition(":")[0]
        return row_identity(self.study.name, self.scenario.name, self.method.name, self.seed, config, kind)

    def setting(self) -> Setting:
        """What the job's method is handed; those of the same scenario and seed may share one."""
        return self.study.setting(self.scenario, self.seed, self.place)


Engine = Callable[[Sequence[Job]], Iterator[Row]]
"""Brings the rows of jobs, each as soon as it is there, in any order; the runner has appended it when it asks for
the next one. MissingData and interruptions are raised."""


def local(jobs: Sequence[Job]) -> Iterator[Row]:
    """In this process, one after the other."""
    for seed, same in groupby(jobs, key=lambda job: job.seed):
        own = list(same)
        setting = own[0].setting()
        for number, job in enumerate(own):
            job.place.tell(f"{job.scenario.name}, seed {seed}: {job.method.name}", number, len(own))
            yield execute(job, setting)


def parts(path: Path, scenario: Scenario) -> Path:
    """Where other processes leave the rows of a scenario for the runner, which adds them to the file ``path``."""
    return path.parent / "parts" / scenario.name


def execute(job: Job, setting: Setting) -> Row:
    """Run one method and make its row. MissingData and interruptions are raised; other failures are in the row."""
    setting.method, failure = job.method, None
    try:
        measured = job.method.run(setting)
    except MissingData:
        raise
    except FloatingPointError as problem:
        measured, failure = Measured({}), f"diverged: {problem}"
    except Exception as problem:  # whatever it is, it is what the run came to, and is told with its row
        measured, failure = Measured({}), f"{type(problem).__name__}: {problem}"
    return row_of(job, setting.environment(), measured, failure)


def row_of(job: Job, environment: Environment, measured: Measured, failure: str | None = None) -> Row:
    """The row of a job that came to this."""
    return Row(
        study=job.study.name,
        scenario=job.scenario.name,
        method=job.method.name,
        seed=job.seed,
        config=job.scenario.config(job.method),
        values=dict(measured.values),
        series=dict(measured.series),
        cost=dict(measured.cost),
        notes=dict(measured.notes),
        failure=failure,
        environment=environment,
        code=code(),
    )


def is_crash(row: Row) -> bool:
    """Whether the run ended by an error of code or input, not by diverging."""
    return row.failure is not None and not row.failure.startswith("diverged")
