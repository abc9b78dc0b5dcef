"""Writers that are killed at every step, that share a file or a folder, or whose disk is full: old or new, whole."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors import safe_open

from campaigns import subjects as s
from campaigns.conftest import LIMIT
from regraft.core.files import write_text
from regraft.core.tensors import digest_tensors
from regraft.learning_transfer.trajectory import Trajectory
from regraft.symmetry import PermutationSpec
from regraft.training import state as checkpoints
from regraft.training.loop import train
from regraft_bench.rows import append, read_rows

fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Writer:
    """write: puts version 0 or 1 of something into a folder. look: which version is there; None: nothing.

    A `look` that raises has found a mixture.
    """

    write: Callable[[Path, int], object]
    look: Callable[[Path], int | None]


def write_path(folder: Path, version: int) -> None:
    s.path(2 * version).save(folder / "path")


def look_at_path(folder: Path) -> int | None:
    if not (folder / "path" / "index.json").exists():
        return None
    ends = [digest_tensors(anchor) for anchor in Trajectory.open(folder / "path").anchors]
    return [[digest_tensors(s.weights(n + k)) for k in (0, 1)] for n in (0, 2)].index(ends)


def write_spec(folder: Path, version: int) -> None:
    groups = dict(s.spec().groups) | ({"more": 3} if version else {})
    PermutationSpec(groups, s.spec().axes).save(folder / "spec.json")


def look_at_spec(folder: Path) -> int | None:
    file = folder / "spec.json"
    return int("more" in PermutationSpec.load(file).groups) if file.exists() else None


def write_page(folder: Path, version: int) -> None:
    write_text(folder / "page.md", f"{version}" * 5000)


def look_at_page(folder: Path) -> int | None:
    file = folder / "page.md"
    return ["0" * 5000, "1" * 5000].index(file.read_text(encoding="utf-8")) if file.exists() else None


def write_run(folder: Path, version: int) -> None:
    """A training that keeps its state after every epoch; version 0 is a run of one epoch less."""
    checkpoints.SECONDS = 0.0
    s.trained(folder / "run.safetensors", stop=None if version else lambda row: row.epoch >= 1)


def look_at_run(folder: Path) -> int | None:
    """Whatever epoch is there, the run ends where one that was never interrupted ends."""
    file = folder / "run.safetensors"
    if not file.exists():
        return None
    with safe_open(file, framework="pt") as checkpoint:
        epochs = checkpoint.metadata()["history"].count('"epoch"') - 1
    resumed, whole = (
        s.trained(file),
        train(s.MODEL, s.weights(1), s.dataset(), s.RECIPE, generator=s.seed(1)),
    )
    assert all(torch.equal(resumed[name], whole.tensors[name]) for name in resumed), "it ends elsewhere"
    return {1: 0, 2: 1}[epochs]


def write_grid(folder: Path, version: int) -> None:
    if version == 1:
        s.grid(folder / "grid.json")


def look_at_grid(folder: Path) -> int | None:
    if not (folder / "grid.json").exists():
        return None
    assert torch.equal(s.grid(folder / "grid.json"), s.grid(None)), "resumed, it gives other values"
    return 1


def write_rows(folder: Path, version: int) -> None:
    append(folder / "rows.jsonl", s.row(version))


def look_at_rows(folder: Path) -> int | None:
    file = folder / "rows.jsonl"
    if not file.exists() or not file.stat().st_size:
        return None
    return [{0}, {0, 1}].index({row.seed for row in read_rows(file)})  # one added again is no loss


WRITERS = {
    "trajectory": Writer(write_path, look_at_path),
    "specification": Writer(write_spec, look_at_spec),
    "page": Writer(write_page, look_at_page),
    "state of a training": Writer(write_run, look_at_run),
    "state of a grid": Writer(write_grid, look_at_grid),
    "rows": Writer(write_rows, look_at_rows),
}


def prepare() -> None:
    """For a fresh process. torch's autograd works in a forked process only where its parent has not used it."""
    os.fsync = lambda handle: None  # kills lose nothing that the system was given
    s.spec()  # takes seconds, and serves every process that is forked from this one


@pytest.fixture(scope="module")
def fresh():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=prepare) as executor:
        yield executor


@pytest.fixture
def run(fresh, record_property):
    """Run a campaign in the fresh process, and count its attempts, which it returns."""
    return lambda *campaign: record_property("attempts", fresh.submit(*campaign).result())


def start_forked(function: Callable[..., object], *arguments: object) -> multiprocessing.Process:
    def call() -> None:
        torch.set_num_threads(1)  # a forked process has no worker threads
        function(*arguments)

    process = fork.Process(target=call)
    process.start()
    return process


def run_forked(function: Callable[..., object], *arguments: object) -> int:
    """The exit status of a forked process that calls a function: 0 where it returned, -9 where it was killed."""
    process = start_forked(function, *arguments)
    process.join(LIMIT)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("it hangs")
    return process.exitcode


def check_after_kill(writer: Writer, folder: Path) -> None:
    """Old or new is there; then the writer works again, and leaves nothing of what was killed."""

    def check() -> None:
        writer.look(folder)
        writer.write(folder, 1)
        assert writer.look(folder) == 1
        assert not [file.name for file in folder.rglob("*.part")]

    assert run_forked(check) == 0


# ---------------------------------------------------------------- kills

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.chmod", "os.listdir", "os.scandir", "os.truncate")


def write_and_die(writer: Writer, folder: Path, step: int) -> None:
    """Write version 1, killed at the n-th call to the system that concerns files of the folder."""
    count = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event == "fcntl.flock" or (event in EVENTS and str(folder) in str(arguments[0])):
            count += 1
            if count > step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    os.fsync = lambda handle: watch("open", (folder,))  # the one step that Python does not announce
    writer.write(folder, 1)


def kill_at_steps(name: str, every: int) -> int:
    """Kill the writer of version 1 over version 0 at each of its steps (one in so many). Returns how often."""
    writer = WRITERS[name]
    for kills, step in enumerate(range(0, 1000, every)):
        with TemporaryDirectory(prefix="regraft-kill-") as folder:
            assert run_forked(writer.write, Path(folder), 0) == 0
            status = run_forked(write_and_die, writer, Path(folder), step)
            if status == 0:
                return kills
            assert status == -signal.SIGKILL, f"step {step}"
            check_after_kill(writer, Path(folder))
    raise AssertionError("a thousand steps, and no end")


def kill_after_times(name: str, count: int, seconds: float = 0.05) -> int:
    """Kill the writer after a time, whatever it is doing."""
    writer = WRITERS[name]

    def write_by_turns(folder: Path) -> None:
        for turn in range(1000):
            writer.write(folder, turn % 2)

    for number in range(count):
        with TemporaryDirectory(prefix="regraft-kill-") as folder:
            assert run_forked(writer.write, Path(folder), 0) == 0
            process = start_forked(write_by_turns, Path(folder))
            time.sleep(seconds * (1 + number % 7) / 7)
            process.kill()
            process.join()
            check_after_kill(writer, Path(folder))
    return count


@pytest.mark.parametrize("every", [pytest.param(23, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("writer", WRITERS)
def test_kills_at_a_step(run, writer, every):
    run(kill_at_steps, writer, every)


@pytest.mark.parametrize("count", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("writer", WRITERS)
def test_kills_after_a_time(run, writer, count):
    run(kill_after_times, writer, count)


# ---------------------------------------------------------------- two writers


def append_rows(file: Path, seeds: range) -> None:
    for seed in seeds:
        append(file, s.row(seed))


def append_by_two(files: int, each: int) -> int:
    """Two processes add rows to one file at the same time, and none is lost."""
    for _ in range(files):
        with TemporaryDirectory(prefix="regraft-rows-") as folder:
            file = Path(folder) / "rows.jsonl"
            pair = [start_forked(append_rows, file, range(k * each, k * each + each)) for k in (0, 1)]
            for process in pair:
                process.join()
            assert sorted(row.seed for row in read_rows(file)) == list(range(2 * each))
    return files


def save_by_two(pairs: int) -> int:
    """Two processes save a trajectory each into one folder at the same time: one wins whole, or both by turns."""

    def save(folder: Path, version: int) -> None:
        start.wait()
        try:
            write_path(folder, version)
        except OSError as problem:
            messages.put(str(problem))
        else:
            messages.put("")

    for _ in range(pairs):
        with TemporaryDirectory(prefix="regraft-path-") as name:
            folder, messages, start = Path(name), fork.SimpleQueue(), fork.Barrier(2)
            pair = [start_forked(save, folder, version) for version in (0, 1)]
            refusals = [text for text in (messages.get() for _ in pair) if text]
            for process in pair:
                process.join()
            assert len(refusals) < 2 and all("is being written by somebody else" in text for text in refusals)
            assert look_at_path(folder) in (0, 1) and len(list((folder / "path").iterdir())) == 3
    return pairs


@pytest.mark.parametrize("files", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_two_writers_of_rows(run, files):
    run(append_by_two, files, 25)


@pytest.mark.parametrize("pairs", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_two_writers_of_a_trajectory(run, pairs):
    run(save_by_two, pairs)


# ---------------------------------------------------------------- a full disk


def fill_disk(name: str, limits: tuple[int, ...]) -> int:
    """The system refuses what is beyond so many bytes of a file; the error says so, and the old version stays."""
    writer = WRITERS[name]

    def read_all(folder: Path) -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    def write(folder: Path, limit: int) -> None:
        writer.write(folder, 0)
        before = read_all(folder)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        with pytest.raises(OSError, match=" bytes could not be "):
            writer.write(folder, 1)
        assert read_all(folder) == before

    for limit in limits:
        with TemporaryDirectory(prefix="regraft-disk-") as folder:
            assert run_forked(write, Path(folder), limit) == 0, f"{limit} bytes"
    return len(limits)


@pytest.mark.parametrize("limits", [(0, 100), pytest.param((0, 1, 20, 100, 200), marks=pytest.mark.slow)])
@pytest.mark.parametrize("writer", WRITERS)
def test_full_disk(run, writer, limits):
    run(fill_disk, writer, limits)
