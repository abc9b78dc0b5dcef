"""One bad thing in a process of its own: what came of it, in a word.

The processes are forked, and torch's autograd works in a forked process only where the first had no use for it: see
`__main__`.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from regraft_bench.study import Measured

CLEAR, SILENT, RAW, HANG = "clear", "silent", "raw", "hang"
OUTCOMES = (CLEAR, SILENT, RAW, HANG)
LIMIT = 30.0
"""Seconds, on a busy machine; what takes them hangs."""


@dataclass(frozen=True)
class Case:
    """Something that must be refused. run: does it in an empty folder. names: one of them has to be in the message."""

    name: str
    run: Callable[[Path], object]
    names: tuple[str, ...]


def attempt(case: Case, limit: float = LIMIT) -> tuple[str, str]:
    """(outcome, what was said).

    clear: a ValueError or an OSError that names what is wrong. silent: it was accepted, or something was executed (a
    file called "executed" says so). raw: any other end. hang: none within the limit.
    """
    folder = Path(tempfile.mkdtemp(prefix="regraft-case-"))
    try:
        said = in_a_process(lambda: _said(case, folder), limit)
        if (folder / "executed").exists():
            return SILENT, "the file was executed"
        if said is None:
            return HANG, f"nothing within {limit:g} seconds"
        outcome, _, words = said.partition(" ")
        return (outcome, words) if outcome in OUTCOMES else (RAW, "the process died")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _said(case: Case, folder: Path) -> str:
    try:
        case.run(folder)
    except (ValueError, OSError) as problem:
        named = any(name in str(problem) for name in case.names)
        return f"{CLEAR if named else RAW} {type(problem).__name__}: {problem}"
    except BaseException as problem:
        return f"{RAW} {type(problem).__name__}: {problem}"
    return f"{SILENT} accepted"


def in_a_process(
    work: Callable[[], str], limit: float, before: Callable[[], None] | None = None
) -> str | None:
    """What ``work`` returns in a forked process; "" where it died, None where the limit ended it."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(read)
            torch.set_num_threads(1)  # a forked process has no worker threads
            warnings.simplefilter("ignore")
            if before is not None:
                before()
            os.write(write, work().encode(errors="replace")[:4000])
        finally:
            os._exit(0)
    os.close(write)
    try:
        if not select.select([read], [], [], limit)[0]:
            os.kill(process, signal.SIGKILL)
            return None
        return os.read(read, 4096).decode(errors="replace")
    finally:
        os.close(read)
        os.waitpid(process, 0)


def tally(cases: Iterable[tuple[str, tuple[str, str]]]) -> Measured:
    """Counts of outcomes, and of what was not clear the first twenty by name. cases: (name, what `attempt` found)."""
    counts: Counter[str] = Counter()
    worst = []
    for name, (outcome, words) in cases:
        counts[outcome] += 1
        if outcome != CLEAR:
            worst.append(f"{name}: {outcome}, {words[:200]}")
    values = {"tried": counts.total(), **{outcome: counts[outcome] for outcome in OUTCOMES}}
    return Measured(values, notes={"not clear": worst[:20]})
