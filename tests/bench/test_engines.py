"""Rows that other processes measure are those of this one, whatever becomes of the processes."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from regraft.data import MissingData
from regraft_bench import engines
from regraft_bench.rows import encode, read_rows
from regraft_bench.run import Job, local, parts, run
from regraft_bench.study import Measured, Method, RunPaths, Scenario, Setting, Study, Task

MANY = 33  # seeds of three methods, and one row that always takes its worker along: 100 rows
KILLS = 20


@dataclass(frozen=True)
class Traced:
    """folder: where every run writes what it begins and ends."""

    folder: str
    seconds: float = 0.0


def noted(setting: Setting, what: str) -> None:
    path = Path(setting.settings.folder) / f"{setting.method.name}-{setting.seed}.{what}"
    with path.open("a") as lines:
        lines.write(f"{os.getpid()}\n")


def numbers(setting: Setting, width: int) -> Measured:
    noted(setting, "begun")
    time.sleep(setting.settings.seconds)
    a = torch.randn(width, 4 * width, generator=setting.generator("numbers"))
    found = float(torch.linalg.norm(a @ a.T))
    noted(setting, "ended")
    return Measured({"norm": found, "threads": torch.get_num_threads()})


def fatal(setting: Setting) -> Measured:
    noted(setting, "begun")
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("dead")


def wants_data(setting: Setting) -> Measured:
    setting.dataset(Task("cars"))
    return Measured({})


METHODS = tuple(Method(f"width-{n}", partial(numbers, width=n)) for n in (8, 16, 24))


def study_of(folder: Path, methods=METHODS, seeds: int = 2, seconds: float = 0.0) -> Study:
    folder.mkdir()
    return Study("toys", "Toys", Setting, (Scenario("toy", methods, Traced(str(folder), seconds), seeds),), ("toy",))


def rows_of(study, path, engine, begun=None, **how):
    place = RunPaths(cache=path.parent / "cache", data=path.parent, begun=begun)
    return list(run(study, study.scenarios, place=place, rows=path, engine=engine, **how))


def plain(row):
    """What must be equal: all but when, and by what the time was spent."""
    found = json.loads(encode(row))
    return {name: value for name, value in found.items() if name not in ("time", "cost")}


def count(folder: Path, what: str) -> dict[str, int]:
    return {path.stem: len(path.read_text().split()) for path in folder.glob(f"*.{what}")}


@pytest.fixture(autouse=True)
def found_by_workers(monkeypatch):
    """This file's functions, which travel by name."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]))


# ---------------------------------------------------------------- SLURM's jobs, by submitit


@pytest.fixture
def slurm():
    pytest.importorskip("submitit", reason="submitit is not installed")
    return lambda cluster: partial(engines.on_slurm, cluster=cluster, look_every=0.05)


def test_submitted_rows_are_those_of_this_process(slurm, tmp_path):
    study = study_of(tmp_path / "traces")
    expected = rows_of(study, tmp_path / "local" / "rows.jsonl", local)
    found = rows_of(study, tmp_path / "slurm" / "rows.jsonl", slurm("debug"))
    assert list(map(plain, found)) == list(map(plain, expected))
    assert sorted(map(plain, read_rows(tmp_path / "slurm" / "rows.jsonl")), key=str) == sorted(
        map(plain, expected), key=str
    )
    again = rows_of(study, tmp_path / "slurm" / "rows.jsonl", slurm("debug"), resume=True)
    assert again == found
    assert set(count(tmp_path / "traces", "ended").values()) == {2}, "once here, once there"


def test_a_job_that_dies_is_a_failure_with_a_name_and_the_others_are_whole(slurm, tmp_path):
    study = study_of(tmp_path / "traces", (METHODS[0], Method("fatal", fatal)), seeds=1)
    path = tmp_path / "rows.jsonl"
    found = rows_of(study, path, slurm("local"))
    assert found[0].failure is None
    assert found[1].method == "fatal" and "no worker came back with this row" in found[1].failure
    assert not list(parts(path, study.scenarios[0]).glob("*.json"))


def test_missing_data_are_told_and_no_row(slurm, tmp_path):
    study = study_of(tmp_path / "traces", (Method("asks", wants_data),), seeds=1)
    with pytest.raises(MissingData, match="cars is missing"):
        rows_of(study, tmp_path / "rows.jsonl", slurm("debug"))
    assert not (tmp_path / "rows.jsonl").exists()


def test_where_there_is_no_cluster_it_is_said(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    study = study_of(tmp_path / "traces")
    with pytest.raises(ValueError, match="engine slurm: "):
        rows_of(study, tmp_path / "rows.jsonl", engines.on_slurm)


# ---------------------------------------------------------------- what workers leave


def job_of(study, path, method=METHODS[0], seed=0):
    (scenario,) = study.scenarios
    place = RunPaths(cache=path.parent / "cache", data=path.parent)
    return Job(study, scenario, method, seed, place, parts(path, scenario))


def test_what_a_worker_left_for_a_runner_that_was_gone_is_taken_by_the_next(tmp_path):
    study, path = study_of(tmp_path / "traces", seeds=1), tmp_path / "rows.jsonl"
    left = engines.work(job_of(study, path), engines.Process.here())
    found = rows_of(study, path, local, resume=True)
    assert found[0] == left
    assert count(tmp_path / "traces", "ended") == {"width-8-0": 1, "width-16-0": 1, "width-24-0": 1}
    assert not list(parts(path, study.scenarios[0]).glob("*.json"))


def test_a_row_that_is_whole_is_not_measured_again(tmp_path):
    study = study_of(tmp_path / "traces")
    job = job_of(study, tmp_path / "rows.jsonl")
    first, second = (engines.work(job, engines.Process.here()) for _ in range(2))
    assert first == second
    assert count(tmp_path / "traces", "ended") == {"width-8-0": 1}


def test_a_worker_has_the_threads_and_the_command_of_who_asks(tmp_path):
    before = torch.get_num_threads()
    try:
        asking = replace(engines.Process.here(), threads=3, command="regraft bench --engine ray")
        row = engines.work(job_of(study_of(tmp_path / "traces"), tmp_path / "rows.jsonl"), asking)
    finally:
        torch.set_num_threads(before)
    assert row.values["threads"] == row.environment.threads == 3
    assert row.environment.command == "regraft bench --engine ray"


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[ray\]'"):
        rows_of(study_of(tmp_path / "traces"), tmp_path / "rows.jsonl", engines.on_ray)


# ---------------------------------------------------------------- Ray


@pytest.fixture
def ray(monkeypatch):
    ray = pytest.importorskip("ray", minversion="2.52", reason="ray is not installed")
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}.items():
        monkeypatch.setenv(name, value)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


def killer(folder: Path, kills: int, stop: threading.Event, killed: list[int]) -> None:
    """Kill workers at random, each in the middle of a row, and no row twice. Not in the moment in which a row has ended
    and is not in its file yet: it is not finished, and would rightly be measured again."""
    draw = random.Random(0)
    while len(killed) < kills and not stop.is_set():
        time.sleep(draw.uniform(0, 0.05))
        begun = {path: path.read_text().split() for path in folder.glob("width-*.begun")}
        rows = {path: int(pids[0]) for path, pids in begun.items() if len(pids) == 1}
        busy = sorted(path for path in rows if not path.with_suffix(".ended").exists())
        pids = {rows[path]: path for path in busy if rows[path] not in killed}
        if pids:
            victim = draw.choice(sorted(pids))
            os.kill(victim, signal.SIGSTOP)  # so that what is looked at stays as it is
            ended = pids[victim].with_suffix(".ended").exists()
            os.kill(victim, signal.SIGCONT if ended else signal.SIGKILL)
            killed += [] if ended else [victim]


@pytest.mark.slow
def test_of_a_hundred_rows_ninety_nine_survive_twenty_kills_and_one_has_its_failure(ray, tmp_path):
    study = study_of(tmp_path / "traces", seeds=MANY, seconds=0.05)
    (scenario,) = study.scenarios
    lethal = replace(scenario, name="lethal", methods=(Method("fatal", fatal),), seeds=1)
    study = replace(study, scenarios=(scenario, lethal))
    killed: list[int] = []
    stop = threading.Event()
    thread = threading.Thread(target=killer, args=(tmp_path / "traces", KILLS, stop, killed))
    thread.start()
    try:
        found = rows_of(study, tmp_path / "ray" / "rows.jsonl", engines.on_ray)
    finally:
        stop.set()
        thread.join()
    assert len(killed) == KILLS
    assert len(read_rows(tmp_path / "ray" / "rows.jsonl")) == len(found) == 100
    failures = {(row.method, row.seed): row.failure for row in found if row.failure}
    assert failures.keys() == {("fatal", 0)}, failures
    assert "WorkerCrashedError" in failures["fatal", 0]
    assert not parts(tmp_path / "ray" / "rows.jsonl", scenario).exists()
    assert set(count(tmp_path / "traces", "ended").values()) == {1}, "no finished row ran again"
    begun = count(tmp_path / "traces", "begun")
    assert begun["fatal-0"] == 1 + engines.RETRIES
    assert sorted(begun.values())[-1 - KILLS : -1] == [2] * KILLS, "what died in a worker ran once more"
    expected = rows_of(replace(study, scenarios=(scenario,)), tmp_path / "local" / "rows.jsonl", local)
    assert list(map(plain, found[:-1])) == list(map(plain, expected))
