"""Two codes measured by turns, each turn a process of its own: the form of a comparison of speed that can be trusted.

    with tempfile.TemporaryDirectory() as folder:
        before, after = extract_packages("main", folder / "before"), copy_packages(folder / "after")
        changes = measure_by_turns(before, after, ["--scenario", "systems"], folder / "rows")

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
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import PIPE
from typing import IO

from regraft_bench.rows import Row, environment, read_rows, tree_hash
from regraft_bench.tracking.compare import Change, Limits, Quantity, find_changes

SOURCES = ("src", "kernels", "bench")
PACKAGE_FOLDERS = ("src/regraft", "kernels/regraft_kernels", "bench/regraft_bench")


def copy_packages(folder: Path) -> Path:
    """The packages of this process, into ``folder``; returns it."""
    import regraft
    import regraft_bench
    import regraft_kernels

    for package, place in zip((regraft, regraft_kernels, regraft_bench), PACKAGE_FOLDERS, strict=True):
        source = Path(str(package.__file__)).parent
        shutil.copytree(source, folder / place, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def extract_packages(commit: str, folder: Path) -> Path:
    """The packages as they are in a commit of the checkout that this process's package lies in, into ``folder``.

    Raises ValueError where there is no checkout, or no such commit with these packages in it.
    """
    import regraft

    _extract(commit, Path(regraft.__file__).resolve().parents[2], PACKAGE_FOLDERS, folder)
    return folder


def _extract(commit: str, root: Path, paths: Sequence[str], folder: Path) -> None:
    """Paths below ``root``, of the checkout that it lies in, as they are in a commit."""
    command = ["git", "-C", str(root), "archive", "--format=tar", commit, "--", *paths]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise ValueError(f"cannot extract commit {commit!r}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")


def find_meant(commit: str, baseline: Path, limits: Limits) -> set[Quantity]:
    """What a folder of rows that is renewed since a commit says too: the quantities that its rows moved by more than
    is allowed, and runs that came or went. Nothing where the commit has no such folder.
    """
    with tempfile.TemporaryDirectory(prefix="regraft-baseline-") as place:
        try:
            _extract(commit, baseline, ["."], Path(place))
        except ValueError:
            return set()
        old, new = _rows_below(Path(place)), _rows_below(baseline)
    # measured at two times, perhaps on two machines: what is asked is only whether they say something else
    here = environment()
    changes = find_changes(*([replace(row, environment=here) for row in side] for side in (old, new)))
    moved = [c for c in changes if c.change is None or abs(c.change) > limits.allowance(c)]
    return {c.name for c in moved}


def measure_against(commit: str, argv: Sequence[str], limits: Limits, tell: Callable[[int, int], None]) -> list[Change]:
    """What ``regraft bench`` with these arguments measures with a commit's code, and with the present one."""
    with tempfile.TemporaryDirectory(prefix="regraft-against-") as place:
        folder = Path(place)
        sides = extract_packages(commit, folder / "then"), copy_packages(folder / "now")
        return measure_by_turns(*sides, argv, folder / "rows", limits, tell)


def measure_by_turns(
    before: Path,
    after: Path,
    argv: Sequence[str],
    results: Path,
    limits: Limits | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[Change]:
    """Run ``regraft bench`` with these arguments by turns with the code in two folders, and compare what it measured.

    results: the rows of each side are left in its ``before`` and ``after``. tell: is told turns, done and at most.
    Raises ChildProcessError, with the last line that was said, where a side cannot be run.
    """
    limits = limits or Limits()
    changes: list[Change] = []
    with ExitStack() as stack:
        sides = [
            stack.enter_context(_Side.start(name, code, argv, results / name))
            for name, code in (("before", before), ("after", after))
        ]
        for turn in range(limits.most):
            tell(turn, limits.most)
            for side in sides[:: 1 if turn % 2 == 0 else -1]:
                side.take()
            changes = find_changes(*(side.rows() for side in sides), one_machine=True)
            if turn + 1 >= limits.least and not any(map(limits.is_undecided, changes)):
                break
    return changes


SERVER = """
import os, sys
from regraft import cli
import regraft_bench.engines, regraft_bench.report.page, regraft_bench.tracking.history
import sklearn.datasets, torch._dynamo  # what is imported late; nothing is computed before the fork
for _ in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        os._exit(cli.main(sys.argv[1:]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Forks for every turn, so that a turn has its own memory and pays no import."""


@dataclass
class _Side:
    """A server with one side's code, and where its rows and its last words go."""

    name: str
    code: Path
    results: Path
    server: subprocess.Popen[str]
    stderr: IO[str]

    @classmethod
    @contextmanager
    def start(cls, name: str, code: Path, argv: Sequence[str], results: Path) -> Iterator[_Side]:
        path = os.pathsep.join(str((code / place).resolve()) for place in SOURCES)
        env = {**os.environ, "PYTHONPATH": path}
        command = [
            sys.executable,
            "-P",
            "-c",
            SERVER,
            "bench",
            *argv,
            "--results",
            str(results),
            "--rows-only",
        ]
        with (
            tempfile.TemporaryFile("w+") as stderr,
            subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=stderr, text=True, env=env) as server,
        ):
            try:
                yield cls(name, code, results, server, stderr)
            finally:
                server.kill()

    def take(self) -> None:
        """One turn. Raises ChildProcessError where it cannot be run, or where it ran other code than it should."""
        assert self.server.stdin is not None and self.server.stdout is not None
        with suppress(BrokenPipeError):  # where it has ended, its status and its last words follow
            print(file=self.server.stdin, flush=True)
        status, rows = self.server.stdout.readline().strip(), self.rows()
        if status not in ("0", "1") or not rows:
            self.stderr.seek(0)
            last = self.stderr.read().strip().rpartition("\n")[2]
            raise ChildProcessError(f"the side {self.name!r} could not be measured: {last or f'status {status}'}")
        if rows[-1].code.trees != tuple(tree_hash(self.code / package) for package in PACKAGE_FOLDERS):
            raise ChildProcessError(f"the side {self.name!r} ran other code than that in {self.code}")

    def rows(self) -> list[Row]:
        return _rows_below(self.results)


def _rows_below(folder: Path) -> list[Row]:
    return [row for path in sorted(folder.glob("*/rows.jsonl")) for row in read_rows(path)]
