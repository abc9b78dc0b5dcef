"""Two hundred kills at calls to the system, of native code too: nothing mixed, nothing stray, nothing of others lost.

`kill_at_call.c` is compiled and preloaded: it kills a writer at the n-th call that concerns its folder, within a write
after half of it. Then the old state or the new one is there; the next run, resumed or not, ends whole, or refuses by
name what it would mix; and the folder holds what it should, beside files of others that are as they were.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from safetensors.torch import load_file, save_file

from campaigns import subjects as s
from campaigns import test_writers as w
from regraft.core.tensors import digest_tensors
from regraft.porting import fuse_checkpoints, job, match_checkpoints, port
from regraft.symmetry import verify

KILLS = 30
"""Of each writer."""

OTHERS = {
    "thesis.txt": b"years of work",
    ".out.parts": b"a name like ours",
    ".run.safetensors.elsewhere-1-1.part": b"another machine is at it",
    ".rows.jsonl.swp": b"an editor's",
}
INPUTS = {"base": 1, "tuned0": 2, "tuned1": 3, "new": 4}


def load_shim() -> ctypes.CDLL:
    shim = ctypes.CDLL(None)
    shim.call_name.restype = ctypes.c_char_p
    shim.watch_calls.argtypes = ctypes.c_char_p, ctypes.c_long
    return shim


# ---------------------------------------------------------------- what is killed


def port_to(folder: Path, version: int, resume: bool) -> None:
    files = (folder / f"{name}.safetensors" for name in ("base", f"tuned{version}", "new"))
    port(*files, folder / "out", method="weights", spec=folder / "spec.json", resume=resume)


def match_to(folder: Path, version: int, resume: bool) -> None:
    files = folder / "new.safetensors", folder / f"tuned{version}.safetensors"
    match_checkpoints(*files, folder / "out", spec=folder / "spec.json", resume=resume)


def fuse_to(folder: Path, version: int, resume: bool) -> None:
    files = folder / "base.safetensors", folder / f"tuned{version}.safetensors"
    fuse_checkpoints(files, [0.5, 0.5], folder / "out", resume=resume)


VERBS: dict[str, Callable[[Path, int, bool], None]] = {"port": port_to, "match": match_to, "fuse": fuse_to}
FILES = {
    "rows": {"rows.jsonl"},
    "state of a training": {"run.safetensors"},
    "trajectory": {"path"},
    "state of a grid": {"grid.json"},
}


def make_folder(folder: Path, verb: bool) -> None:
    for name, content in OTHERS.items():
        (folder / name).write_bytes(content)
    if verb:
        base = s.weights(1)
        for name, seed in INPUTS.items():
            other = s.weights(seed)
            near = name.startswith("tuned")
            own = {key: base[key] + 0.1 * other[key] if near and base[key].is_floating_point() else other[key]
                   for key in base}  # fmt: skip
            save_file({key: value.contiguous() for key, value in own.items()}, folder / f"{name}.safetensors")
        s.spec().save(folder / "spec.json")


def check_folder(folder: Path, own: set[str], verb: bool) -> None:
    """Nothing is stray, and what others have is as it was."""
    inputs = {*(f"{name}.safetensors" for name in INPUTS), "spec.json"} if verb else set()
    there = {path.name for path in folder.iterdir()}
    assert there == {*OTHERS, *inputs, *own}, there ^ {*OTHERS, *inputs, *own}
    for name, content in OTHERS.items():
        assert (folder / name).read_bytes() == content, name


def read_result(out: Path) -> str | None:
    if not out.exists():
        return None
    assert not [path.name for path in out.rglob(".*")], "hidden files in a finished result"
    return digest_tensors({k: v for path in sorted(out.glob("*.safetensors")) for k, v in load_file(path).items()})


# ---------------------------------------------------------------- the campaign, in a process with the shim


def prepare() -> None:
    """Where everything is forked from: what takes seconds is done once."""
    verify(s.spec(), s.MODEL, s.IMAGES[:2])
    job.SHARD = 400  # bytes: several files of a result


def list_calls(folder: Path, write: Callable[[], object], notes: Path) -> list[str]:
    """The calls of a write that is not killed."""

    def count() -> None:
        shim = load_shim()
        shim.watch_calls(str(folder).encode(), -1)
        write()
        notes.write_text("\n".join(shim.call_name(n).decode() for n in range(shim.count_calls())))

    assert w.run_forked(count) == 0
    return notes.read_text().splitlines()


def die_at(folder: Path, write: Callable[[], object], step: int) -> None:
    def run() -> None:
        load_shim().watch_calls(str(folder).encode(), step)
        write()

    assert w.run_forked(run) == -signal.SIGKILL, f"call {step}"


def kill_verb(name: str, kills: int) -> Counter[str]:
    verb, counts = VERBS[name], Counter[str]()
    with TemporaryDirectory(prefix="regraft-calls-") as place:
        source = Path(place) / "source"
        source.mkdir()
        make_folder(source, verb=True)
        whole = []
        for version in (0, 1):
            folder = Path(place) / f"whole{version}"
            shutil.copytree(source, folder)
            calls = list_calls(folder, lambda f=folder, v=version: verb(f, v, False), Path(place) / "calls")
            whole.append(read_result(folder / "out"))
        assert len(list((folder / "out").glob("*.safetensors"))) > 2 and whole[0] != whole[1]
        for number in range(kills):
            step = number * len(calls) // kills
            folder = Path(place) / f"kill{number}"
            shutil.copytree(source, folder)
            die_at(folder, lambda f=folder: verb(f, 0, False), step)
            assert w.run_forked(check_verb, verb, folder, whole, number) == 0, f"{name}, call {step}: {calls[step]}"
            counts[calls[step]] += 1
    return counts


def check_verb(verb: Callable[[Path, int, bool], None], folder: Path, whole: list[str | None], number: int) -> None:
    out = folder / "out"
    if out.exists():  # killed after the last rename
        assert read_result(out) == whole[0]
        shutil.rmtree(out)
    version = number % 2
    try:
        verb(folder, version, True)
    except ValueError as problem:
        assert version == 1 and "was begun with another" in str(problem)
        verb(folder, version, False)
    assert read_result(out) == whole[version]
    check_folder(folder, {"out"}, verb=True)


def kill_writer(name: str, kills: int) -> Counter[str]:
    writer, counts = w.WRITERS[name], Counter[str]()
    with TemporaryDirectory(prefix="regraft-calls-") as place:
        folder = Path(place) / "whole"
        folder.mkdir()
        assert w.run_forked(writer.write, folder, 0) == 0
        calls = list_calls(folder, lambda: writer.write(folder, 1), Path(place) / "calls")
        for number in range(kills):
            step = number * len(calls) // kills
            folder = Path(place) / f"kill{number}"
            folder.mkdir()
            make_folder(folder, verb=False)
            assert w.run_forked(writer.write, folder, 0) == 0
            die_at(folder, lambda f=folder: writer.write(f, 1), step)
            assert w.run_forked(check_writer, writer, folder) == 0, f"{name}, call {step}: {calls[step]}"
            check_folder(folder, FILES[name], verb=False)
            counts[calls[step]] += 1
    return counts


def check_writer(writer: w.Writer, folder: Path) -> None:
    writer.look(folder)
    writer.write(folder, 1)
    assert writer.look(folder) == 1


def see_native_writes() -> list[str]:
    """A file that safetensors writes in Rust: its calls are seen, and it is killed within."""
    with TemporaryDirectory(prefix="regraft-calls-") as place:
        folder = Path(place) / "folder"
        folder.mkdir()
        write = lambda: save_file(dict(s.weights(1)), folder / "a.safetensors")  # noqa: E731
        calls = list_calls(folder, write, Path(place) / "calls")
        die_at(folder, write, len(calls) - 1)
        return calls


# ---------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def shimmed(tmp_path_factory):
    """A process in which the shim is loaded before the C library."""
    compiler = shutil.which("cc")
    if compiler is None or os.uname().sysname != "Linux":
        pytest.skip("no C compiler, or no Linux")
    library = tmp_path_factory.mktemp("shim") / "kill_at_call.so"
    source = Path(__file__).with_name("kill_at_call.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    before, os.environ["LD_PRELOAD"] = os.environ.get("LD_PRELOAD"), str(library)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=prepare) as executor:
        executor.submit(int).result()  # starts it
        os.environ.pop("LD_PRELOAD")
        if before is not None:
            os.environ["LD_PRELOAD"] = before
        yield executor


def count_kills(record_property, name: str, counts: Counter[str]) -> None:
    assert sum(counts.values()) == KILLS
    for call, count in counts.items():
        record_property(f"attempts: kills of {name} at {call}", count)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("verb", VERBS)
def test_kills_of_a_verb(shimmed, record_property, verb):
    count_kills(record_property, verb, shimmed.submit(kill_verb, verb, KILLS).result())


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("writer", FILES)
def test_kills_of_a_file(shimmed, record_property, writer):
    count_kills(record_property, writer, shimmed.submit(kill_writer, writer, KILLS).result())


@pytest.mark.slow
def test_the_shim_sees_what_native_code_writes(shimmed):
    assert "write" in shimmed.submit(see_native_writes).result()
