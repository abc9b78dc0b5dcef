"""Rows that other processes measure are those of this one, whatever becomes of the processes."""

from __future__ import annotations

import contextlib
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
from regraft.studies import engines
from regraft.studies.rows import encoded, read
from regraft.studies.run import Job, local, parts, run
from regraft.studies.study import Measured, Method, Place, Scenario, Setting, Study, Task

MANY = 33  # seeds of three methods, and one row that always takes its worker along: 100 rows
KILLS = 20
WORKERS = ("ray::IDLE", "ray::work")  # titles of Ray's workers, those of its own agents apart


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
    return Study(
        "toys", "Toys", Setting, (Scenario("toy", methods, Traced(str(folder), seconds), seeds),), ("toy",)
    )


def rows_of(study, path, engine, **how):
    place = Place(cache=path.parent / "cache", data=path.parent)
    return list(run(study, study.scenarios, place=place, rows=path, engine=engine, **how))


def plain(row):
    """What must be equal: all but when, and by what the time was spent."""
    found = json.loads(encoded(row))
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
    assert sorted(map(plain, read(tmp_path / "slurm" / "rows.jsonl")), key=str) == sorted(
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
    place = Place(cache=path.parent / "cache", data=path.parent)
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
    with pytest.raises(ValueError, match=r"pip install 'regraft\[ray\]'"):
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


def children() -> dict[int, str]:
    """The processes that this one started, directly or not, by their titles."""
    parent, title = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
            parent[int(folder.name)] = int(after_name[1])
            title[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ").strip()
        except (OSError, ValueError):  # it is gone
            continue
    own, grew = {os.getpid()}, True
    while grew:
        more = {pid for pid, above in parent.items() if above in own} - own
        own, grew = own | more, bool(more)
    return {pid: title[pid] for pid in own - {os.getpid()} if pid in title}


def killer(folder: Path, kills: int, stop: threading.Event, killed: list[int]) -> None:
    """Kill workers at random: every other one in the middle of a row, the rest wherever they are, but for the moment
    in which a row that has ended is not yet in its file: it is not finished, and may be measured again."""
    draw = random.Random(0)
    while len(killed) < kills and not stop.is_set():
        time.sleep(draw.uniform(0, 0.2))
        pool = sorted(pid for pid, title in children().items() if title.startswith(WORKERS))
        victim = draw.choice(pool) if pool else None
        if victim is None or victim in killed:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGSTOP)  # so that what is looked at stays as it is
            own = [path for path in folder.glob("*.begun") if path.read_text().split()[-1:] == [str(victim)]]
            busy = any(not path.with_suffix(".ended").exists() for path in own)
            if busy or (not own and len(killed) % 2 == 0):
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)
            else:
                os.kill(victim, signal.SIGCONT)


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
    assert len(read(tmp_path / "ray" / "rows.jsonl")) == len(found) == 100
    failed = [row for row in found if row.failure]
    assert [row.method for row in failed] == ["fatal"] and "WorkerCrashedError" in failed[0].failure
    assert set(count(tmp_path / "traces", "ended").values()) == {1}, "no finished row ran again"
    begun = count(tmp_path / "traces", "begun")
    assert begun["fatal-0"] == 1 + engines.RETRIES
    assert sum(begun.values()) >= 99 + KILLS // 2 + 1 + engines.RETRIES, "half of the kills were amid a row"
    expected = rows_of(replace(study, scenarios=(scenario,)), tmp_path / "local" / "rows.jsonl", local)
    assert list(map(plain, found[:-1])) == list(map(plain, expected))
