"""Two runners that add rows to one file at the same time measure each row once, whatever becomes of one of them."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

from regraft.core.files import only_writer
from regraft_bench import engines
from regraft_bench.rows import now, read_rows
from regraft_bench.run import local, parts

from .test_engines import METHODS, count, job_of, rows_of, study_of

fork = multiprocessing.get_context("fork")


def start(function: Callable[..., object], *arguments: object) -> multiprocessing.Process:
    def call() -> None:
        torch.set_num_threads(1)  # a forked process has no worker threads
        function(*arguments)

    process = fork.Process(target=call)
    process.start()
    return process


@pytest.mark.parametrize("engine", [local, partial(engines.on_slurm, cluster="debug")], ids=["local", "slurm"])
def test_a_row_is_measured_once_and_both_have_it(engine, tmp_path):
    study, path, both = study_of(tmp_path / "traces", seconds=0.05), tmp_path / "rows.jsonl", fork.SimpleQueue()

    def run_bench() -> None:
        both.put([(row.method, row.seed, row.time) for row in rows_of(study, path, engine)])

    processes = [start(run_bench) for _ in range(2)]
    first, second = both.get(), both.get()
    for process in processes:
        process.join()
    assert first == second and len(read_rows(path)) == len(first) == 6
    assert set(count(tmp_path / "traces", "begun").values()) == {1}
    assert not [file.name for file in tmp_path.iterdir() if file.suffix == ".lock"]


def test_who_comes_second_takes_up_what_the_first_has_not_begun(tmp_path):
    study, path = study_of(tmp_path / "traces", METHODS[:1]), tmp_path / "rows.jsonl"
    with only_writer(path, tmp_path / ".toy-0.lock"):
        other = start(rows_of, study, path, local)
        deadline = time.monotonic() + 20
        while count(tmp_path / "traces", "ended") != {"width-8-1": 1} and time.monotonic() < deadline:
            time.sleep(0.01)
        assert other.is_alive(), "it waits for seed 0"
    other.join(20)
    assert count(tmp_path / "traces", "ended") == {"width-8-0": 1, "width-8-1": 1}


def test_what_a_killed_runner_had_begun_is_measured_by_who_waits_for_it(tmp_path):
    slow = study_of(tmp_path / "traces", METHODS[:1], seeds=1, seconds=1.0)
    path = tmp_path / "rows.jsonl"
    first = start(rows_of, slow, path, local)
    while not count(tmp_path / "traces", "begun"):
        time.sleep(0.01)
    second = start(rows_of, slow, path, local)
    first.kill()
    second.join(20)
    assert len(read_rows(path)) == 1 and count(tmp_path / "traces", "begun") == {"width-8-0": 2}


def test_the_lock_of_a_runner_that_was_killed_after_its_last_row_goes(tmp_path):
    study, path = study_of(tmp_path / "traces", METHODS[:1], seeds=1), tmp_path / "rows.jsonl"
    rows_of(study, path, local)
    left, others = tmp_path / ".toy-0.lock", tmp_path / ".toy-notes.lock"
    left.touch()
    others.write_text("somebody else's")
    rows_of(study, path, local, resume=True)
    assert not left.exists() and others.read_text()


def test_rows_that_another_session_added_before_this_one_began_are_measured_again(tmp_path):
    study, path = study_of(tmp_path / "traces", METHODS[:1], seeds=1), tmp_path / "rows.jsonl"
    before = now()
    rows_of(study, path, local)
    rows_of(study, path, local)
    rows_of(study, path, local, begun=before)
    assert count(tmp_path / "traces", "begun") == {"width-8-0": 2}


def test_what_a_worker_left_stays_for_its_runner_while_that_is_there(tmp_path):
    study, path = study_of(tmp_path / "traces"), tmp_path / "rows.jsonl"
    engines.work(job_of(study, path), engines.Process.here())
    with only_writer(path, tmp_path / ".toy-0.lock"):
        rows_of(study, path, local, seeds=[1])
        assert list(parts(path, study.scenarios[0]).glob("*.json"))
    rows_of(study, path, local, seeds=[1], resume=True)
    assert not list(parts(path, study.scenarios[0]).glob("*.json")) and len(read_rows(path)) == 4
