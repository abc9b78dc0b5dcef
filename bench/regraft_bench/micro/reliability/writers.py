"""Writers that are killed at every step, that share a file or a folder, or whose disk is full."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from regraft.core import tensors
from regraft.core.files import write_text
from regraft.learning_transfer.trajectory import Trajectory
from regraft.symmetry import PermutationSpec
from regraft.training import state as checkpoints
from regraft_bench.micro.reliability import subjects as s
from regraft_bench.micro.reliability.attempt import (
    CLEAR,
    HANG,
    LIMIT,
    RAW,
    SILENT,
    Case,
    attempt,
    in_a_process,
)
from regraft_bench.rows import append, read_rows

Found = tuple[str, tuple[str, str]]


@dataclass(frozen=True)
class Writer:
    """write: puts version 0 or 1 of something into a folder. look: which version is there; None: nothing.

    A `look` that raises, or says anything else, has found a mixture.
    """

    name: str
    write: Callable[[Path, int], object]
    look: Callable[[Path], int | None]


def _trajectory(folder: Path) -> int | None:
    if not (folder / "path" / "index.json").exists():
        return None
    ends = [tensors.digest_tensors(anchor) for anchor in Trajectory.open(folder / "path").anchors]
    known = [
        [tensors.digest_tensors(s.weights(2 * n)), tensors.digest_tensors(s.weights(2 * n + 1))]
        for n in (0, 1)
    ]
    return known.index(ends)


def _spec(folder: Path, version: int) -> None:
    found = s.spec()
    written = found if version == 0 else PermutationSpec({**found.groups, "more": 3}, found.axes)
    written.save(folder / "spec.json")


def _spec_version(folder: Path) -> int | None:
    file = folder / "spec.json"
    return int("more" in PermutationSpec.load(file).groups) if file.exists() else None


def _text_version(folder: Path) -> int | None:
    file = folder / "page.md"
    return ["0" * 5000, "1" * 5000].index(file.read_text(encoding="utf-8")) if file.exists() else None


def _run(folder: Path, version: int) -> None:
    """A training that keeps its state after every epoch; version 0 is a run of one epoch less."""
    checkpoints.SECONDS = 0.0
    stop = (lambda row: row.epoch >= 1) if version == 0 else None
    s.train(
        s.model(), s.weights(1), s.dataset(), s.RECIPE, generator=s.seed(1),
        checkpoint=folder / "run.safetensors", stop=stop,
    )  # fmt: skip


def _run_version(folder: Path) -> int | None:
    """Whatever epoch is there, the run ends where one that was never interrupted ends."""
    file = folder / "run.safetensors"
    if not file.exists():
        return None
    from safetensors import safe_open

    with safe_open(file, framework="pt") as held:
        epochs = held.metadata()["history"].count('"epoch"') - 1
    ended, whole = (
        s.trained(file),
        s.train(s.model(), s.weights(1), s.dataset(), s.RECIPE, generator=s.seed(1)),
    )
    if not all(torch.equal(ended[name], whole.tensors[name]) for name in ended):
        raise ValueError("resumed, the run ends elsewhere")
    return {1: 0, 2: 1}[epochs]


def _grid(folder: Path, version: int) -> None:
    if version == 1:
        s.grid(folder / "grid.json")


def _grid_version(folder: Path) -> int | None:
    if not (folder / "grid.json").exists():
        return None
    with TemporaryDirectory() as other:
        if not torch.equal(s.grid(folder / "grid.json"), s.grid(Path(other) / "grid.json")):
            raise ValueError("resumed, the grid says something else")
    return 1


def _rows(folder: Path, version: int) -> None:
    append(folder / "rows.jsonl", s.row(version))


def _rows_version(folder: Path) -> int | None:
    file = folder / "rows.jsonl"
    if not file.exists() or not file.stat().st_size:
        return None
    return [{0}, {0, 1}].index({row.seed for row in read_rows(file)})  # one added again is no loss


WRITERS = (
    Writer("trajectory", lambda folder, n: s.path(2 * n).save(folder / "path"), _trajectory),
    Writer("specification", _spec, _spec_version),
    Writer("page", lambda folder, n: write_text(folder / "page.md", f"{n}" * 5000), _text_version),
    Writer("state of a training", _run, _run_version),
    Writer("state of a grid", _grid, _grid_version),
    Writer("rows", _rows, _rows_version),
)

# ---------------------------------------------------------------- kills

EVENTS = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.chmod",
    "os.listdir",
    "os.scandir",
    "os.truncate",
    "fcntl.flock",
)


def _die_at(step: int, folder: Path) -> Callable[[], None]:
    """Kills this process at the so-many-th call to the system that concerns files of the folder."""

    def install() -> None:
        count = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event in EVENTS and (event == "fcntl.flock" or str(folder) in str(arguments[0])):
                count += 1
                if count > step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        # the one step that Python does not announce
        flush = os.fsync

        def fsync(handle: Any) -> None:
            watch("open", (str(folder),))
            flush(handle)

        os.fsync = fsync

    return install


def _in_place(
    writer: Writer, folder: Path, version: int, before: Callable[[], None] | None = None
) -> str | None:
    """Write in a process of its own; "whole" where it came to its end."""

    def work() -> str:
        writer.write(folder, version)
        return "whole"

    return in_a_process(work, LIMIT, before)


def kills(writer: Writer, every: int = 1) -> Iterator[Found]:
    """Kill the writer of version 1 over version 0 at each of its steps (one in so many).

    Old or new must be there, and nothing else.
    """
    for step in range(0, 1000, every):
        with TemporaryDirectory(prefix="regraft-kill-") as name:
            folder = Path(name)
            _in_place(writer, folder, 0)
            said = _in_place(writer, folder, 1, _die_at(step, folder))
            if said == "whole":
                return
            yield f"{writer.name}, step {step}", _after_a_kill(writer, folder, said)


def _after_a_kill(writer: Writer, folder: Path, said: str | None) -> tuple[str, str]:
    """Old or new; then the writer works again, and leaves nothing of what was killed."""
    if said is None:
        return HANG, "the writer hangs"

    def check() -> str:
        try:
            writer.look(folder)
            writer.write(folder, 1)
            found = writer.look(folder)
        except BaseException as problem:
            return f"{SILENT} {type(problem).__name__}: {problem}"
        left = [file.name for file in folder.rglob("*") if file.name.endswith(".part")]
        if found != 1 or left:
            return f"{SILENT} version {found} after another try, {left} left"
        return f"{CLEAR} old or new"

    outcome, _, words = (in_a_process(check, LIMIT) or f"{HANG} afterwards").partition(" ")
    return outcome, words


# ---------------------------------------------------------------- two writers


def two_on_rows(files: int, each: int) -> Iterator[Found]:
    """Two processes add rows to one file at the same time, so many times."""
    context = multiprocessing.get_context("fork")
    for number in range(files):
        with TemporaryDirectory(prefix="regraft-rows-") as folder:
            file = Path(folder) / "rows.jsonl"
            pair = [
                context.Process(target=_add, args=(file, range(k * each, (k + 1) * each))) for k in (0, 1)
            ]
            for process in pair:
                process.start()
            for process in pair:
                process.join()
            found = sorted(row.seed for row in read_rows(file))
            whole = found == list(range(2 * each))
            yield f"rows, file {number}", (CLEAR if whole else SILENT, f"{len(found)} of {2 * each} rows")


def _add(file: Path, seeds: range) -> None:
    for seed in seeds:
        append(file, s.row(seed))


def two_on_a_folder(pairs: int) -> Iterator[Found]:
    """Two processes save a trajectory each into one folder at the same time: one wins whole, or one after the other."""
    context = multiprocessing.get_context("fork")
    for number in range(pairs):
        with TemporaryDirectory(prefix="regraft-path-") as name:
            folder, told, start = Path(name), context.SimpleQueue(), context.Barrier(2)
            pair = [context.Process(target=_save, args=(folder, n, start, told)) for n in (0, 1)]
            for process in pair:
                process.start()
            said = [told.get() for _ in pair]
            for process in pair:
                process.join()
            try:
                whole = _trajectory(folder) in (0, 1) and len(list((folder / "path").iterdir())) == 3
            except (ValueError, OSError) as problem:
                whole, said = False, [*said, str(problem)]
            lost = [words for words in said if words and "is being written by somebody else" not in words]
            outcome = RAW if lost else CLEAR if whole and "" in said else SILENT
            yield f"trajectories, folder {number}", (outcome, "; ".join(map(str, said)))


def _save(folder: Path, number: int, start: Any, told: Any) -> None:
    start.wait()
    try:
        s.path(2 * number).save(folder / "path")
    except OSError as problem:
        told.put(str(problem))
    else:
        told.put("")


# ---------------------------------------------------------------- a full disk


def full_disks(writer: Writer, limits: tuple[int, ...]) -> Iterator[Found]:
    """The system refuses what is beyond so many bytes of a file; the error names it, and the old version is there."""
    for limit in limits:

        def run(folder: Path, limit: int = limit) -> None:
            writer.write(folder, 0)
            before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            try:
                writer.write(folder, 1)
            finally:
                after = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
                if after != before:
                    changed = sorted(file.name for file in after.keys() ^ before.keys())
                    raise AssertionError(f"the folder is not as it was: {changed}")

        yield f"{writer.name}, {limit} bytes", attempt(Case(writer.name, run, (" bytes could not be ",)))


def timed_kills(writer: Writer, count: int, seconds: float = 0.05) -> Iterator[Found]:
    """Kill the writer after a time, whatever it is doing."""
    for number in range(count):
        with TemporaryDirectory(prefix="regraft-kill-") as name:
            folder = Path(name)
            _in_place(writer, folder, 0)
            process = os.fork()
            if process == 0:
                torch.set_num_threads(1)
                try:
                    for turn in range(1000):
                        writer.write(folder, turn % 2)
                finally:
                    os._exit(0)
            time.sleep(seconds * (1 + number % 7) / 7)
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            yield f"{writer.name}, kill {number}", _after_a_kill(writer, folder, "")
