"""Two codes measured by turns, each in fresh processes: the form of a comparison of speed that can be trusted.

    with tempfile.TemporaryDirectory() as folder:
        before, after = extract("main", folder / "before"), copy(folder / "after")
        changes = by_turns(before, after, ["--scenario", "systems"], folder / "rows")

What else the machine does happens to both sides, turn after turn, and a pair of turns is one measurement. It goes on
while something looks slower and the interval does not say yet whether it is.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from regraft.studies.compare import NO_EVIDENCE, Change, compare
from regraft.studies.rows import Row, read, tree_hash

SOURCES = ("src", "kernels")
PACKAGES = ("src/regraft", "kernels/regraft_kernels")


@dataclass(frozen=True)
class Limits:
    """What is allowed, and how many turns are taken to find out.

    slowdown: share of a cost; error_rise: in shares of 1; least, most: turns.
    """

    slowdown: float = 0.1
    error_rise: float = 0.005
    least: int = 4
    most: int = 12

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"turns must be at least 1, and at most no fewer: {self.least} to {self.most}")

    def exceeded(self, change: Change) -> bool:
        return change.beyond(self.slowdown, self.error_rise)

    def open(self, change: Change) -> bool:
        """Whether it looks slower by half of what is allowed, without evidence."""
        looks_slower = change.quantity == "cost" and (change.change or 0.0) > self.slowdown / 2
        return looks_slower and change.verdict == NO_EVIDENCE


def copy(folder: Path) -> Path:
    """The packages of this process, into ``folder``; returns it."""
    import regraft
    import regraft_kernels

    for package, place in zip((regraft, regraft_kernels), PACKAGES, strict=True):
        source = Path(package.__file__).parent
        shutil.copytree(source, folder / place, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def extract(commit: str, folder: Path) -> Path:
    """The packages as they are in a commit of the checkout that this process's package lies in, into ``folder``.

    Raises ValueError where there is no checkout, or no such commit with these packages in it.
    """
    import regraft

    root = Path(regraft.__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "archive", "--format=tar", commit, "--", *PACKAGES]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise ValueError(f"the code of {commit!r} cannot be had: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def by_turns(
    before: Path,
    after: Path,
    words: Sequence[str],
    results: Path,
    limits: Limits | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[Change]:
    """Run ``regraft bench`` with these words by turns with the code in two folders, and compare what it measured.

    results: the rows of each side are left in its ``before`` and ``after``. tell: is told turns, done and at most.
    Raises RuntimeError, with the last line that was said, where a side cannot be run.
    """
    limits = limits or Limits()
    sides = {"before": before, "after": after}
    changes: list[Change] = []
    for turn in range(limits.most):
        tell(turn, limits.most)
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            _measure(name, sides[name], words, results / name)
        changes = compare(*(_rows(results / name) for name in sides))
        if turn + 1 >= limits.least and not any(map(limits.open, changes)):
            break
    return changes


def _measure(name: str, code: Path, words: Sequence[str], results: Path) -> None:
    command = [
        sys.executable,
        "-P",
        "-m",
        "regraft",
        "bench",
        *words,
        "--results",
        str(results),
        "--rows-only",
    ]
    path = os.pathsep.join(str((code / place).resolve()) for place in SOURCES)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    found = _rows(results)
    if done.returncode not in (0, 1) or not found:
        said = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
        raise RuntimeError(f"the side {name!r} could not be measured: {said or f'status {done.returncode}'}")
    if found[-1].code.regraft != tree_hash(code / PACKAGES[0]):
        raise RuntimeError(f"the side {name!r} ran other code than that in {code}")


def _rows(results: Path) -> list[Row]:
    return [row for path in sorted(results.glob("*/rows.jsonl")) for row in read(path)]
