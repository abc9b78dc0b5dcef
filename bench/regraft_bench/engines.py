"""Where rows are measured other than in this process: by Ray's workers, or by jobs of SLURM.

    run(study, scenarios, place=place, rows=path, engine=ENGINES["ray"])

A worker measures one row and leaves it in a file of its own (`regraft_bench.run.parts`), which the runner adds to the
rows and removes. A worker that dies is replaced; one that died after its row was whole does not measure it again, and
rows that come when the runner is gone are added by the next one. Workers want the folders of results, cache and data at
the same paths: on several machines, a shared file system. Scheduling, retries and queues are Ray's and SLURM's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from regraft.core.extras import describe_install
from regraft.core.files import write_text
from regraft.core.guard import make_deterministic
from regraft.data import MissingData
from regraft.data.load import default_root
from regraft_bench.rows import Row, encode, environment, read_rows
from regraft_bench.run import Engine, Job, execute, local, row_of
from regraft_bench.study import Measured

RETRIES = 3
"""So often a worker that died is replaced for one row. What then has no row failed, and its row says so."""

LONGEST = 7 * 24 * 60
"""Minutes that a job of SLURM may ask for, where SBATCH_TIMELIMIT does not say."""


# ---------------------------------------------------------------------------------------------------
# In the worker


@dataclass(frozen=True)
class Process:
    """What of the asking process decides a row's bits, and the command that its rows name."""

    threads: int
    deterministic: bool
    command: str

    @classmethod
    def here(cls) -> Process:
        return cls(torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), environment().command)

    def enter(self) -> None:
        torch.set_num_threads(self.threads)
        if self.deterministic:
            make_deterministic()


def work(job: Job, asking: Process) -> Row | MissingData:
    """Measure one row and leave it in its file; or find it there, where an earlier worker died on its way back."""
    file = _file(job)
    if file.is_file():
        return read_rows(file)[0]
    asking.enter()
    try:
        row = execute(job, job.setting())
    except MissingData as missing:
        return missing
    row = replace(row, environment=replace(row.environment, command=asking.command))
    write_text(file, encode(row).decode() + "\n")
    return row


def _file(job: Job) -> Path:
    return job.parts / f"{job.identity}.json"


# ---------------------------------------------------------------------------------------------------
# In the asking process


def on_ray(jobs: Sequence[Job]) -> Iterator[Row]:
    """By workers of the Ray cluster that RAY_ADDRESS names, or of one that is started on this machine.

    A row takes as many CPUs as this process has threads, and one GPU where it computes on one.
    """
    if not jobs:
        return
    ray = _require("ray", "ray")
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
        # Whoever reaches a Ray runs code there: one of our own listens on this machine alone.
        own = {} if os.environ.get("RAY_ADDRESS") else {"_node_ip_address": "127.0.0.1"}
        ray.init(log_to_driver=False, logging_level="WARNING", **own)
    asking = Process.here()
    gpus = {"num_gpus": 1} if jobs[0].place.device.startswith("cuda") else {}
    remote = ray.remote(num_cpus=asking.threads, max_retries=RETRIES, **gpus)(work)
    waiting = {remote.remote(_portable(job), asking): job for job in jobs}

    def collect_results() -> Iterator[tuple[Any, Callable[[], Any]]]:
        while waiting:
            (done, *_), _ = ray.wait(list(waiting))
            yield done, partial(ray.get, done)

    yield from _receive_rows(waiting, collect_results(), partial(ray.cancel, force=True))


def on_slurm(jobs: Sequence[Job], cluster: str = "slurm", look_every: float = 10) -> Iterator[Row]:
    """By an array of SLURM jobs, which submitit sends; partition, account and limits are sbatch's own variables
    (SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, ...).

    cluster: submitit's name of an executor. look_every: seconds. Raises ValueError where there is no such cluster.
    """
    if not jobs:
        return
    submitit = _require("submitit", "slurm")
    asking, logs = Process.here(), jobs[0].parts / "logs"
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
    except RuntimeError as problem:
        raise ValueError(f"engine {cluster}: {problem}") from None
    on_gpu = jobs[0].place.device.startswith("cuda")
    executor.update_parameters(
        name="regraft", timeout_min=LONGEST, cpus_per_task=asking.threads, gpus_per_node=int(on_gpu)
    )
    sent = executor.map_array(partial(work, asking=asking), [_portable(job) for job in jobs])
    finished = submitit.helpers.as_completed(sent, poll_frequency=look_every)
    results = ((job, job.result) for job in finished)
    yield from _receive_rows(dict(zip(sent, jobs, strict=True)), results, lambda late: late.cancel(check=False))


ENGINES: dict[str, Engine] = {"local": local, "ray": on_ray, "slurm": on_slurm}


def _portable(job: Job) -> Job:
    """With paths that hold in any working directory, and without the way to this terminal."""
    data = (job.place.data or default_root()).resolve()
    place = replace(job.place, data=data, cache=job.place.cache.resolve(), tell=_silent)
    return replace(job, place=place, parts=job.parts.resolve())


def _silent(what: str, done: int, total: int) -> None:
    """Workers have no terminal."""


def _receive_rows(
    waiting: dict[Any, Job],
    finished: Iterator[tuple[Any, Callable[[], Any]]],
    cancel: Callable[[Any], None],
) -> Iterator[Row]:
    """The row of every job that a worker waits for, as it finishes; the others are cancelled at an interruption."""
    jobs = list(waiting.values())
    try:
        for worker, result in finished:
            job = waiting.pop(worker)
            yield _row_or_failure(job, result)
            _file(job).unlink(missing_ok=True)
            job.place.tell(f"{job.scenario.name}: rows", len(jobs) - len(waiting), len(jobs))
    finally:
        for late in waiting:
            cancel(late)
    with contextlib.suppress(OSError):  # no worker is left that could want the folder: it goes, unless logs are in it
        jobs[0].parts.rmdir()


def _row_or_failure(job: Job, result: Callable[[], Any]) -> Row:
    """The job's row, whatever became of its worker. Raises MissingData."""
    try:
        row = result()
    except Exception as problem:  # of any kind that Ray or submitit have for a worker that did not come back
        if _file(job).is_file():
            return read_rows(_file(job))[0]
        last = (str(problem).strip().splitlines() or [""])[-1]
        failure = f"{type(problem).__name__}: no worker came back with this row ({last})"
        return row_of(job, environment(job.place.device), Measured({}), failure)
    if isinstance(row, MissingData):
        raise row
    return row


def _require(package: str, extra: str) -> ModuleType:
    try:
        return import_module(package)
    except ModuleNotFoundError:
        raise ValueError(f"engine {extra} needs the package {package}: {describe_install(extra)}") from None
