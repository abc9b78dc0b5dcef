"""The only row: one run of one method on one scenario with one seed, one appended line of JSON.

A row's identity says what was asked: study, scenario, method, seed, configuration, kind of device. Its code says what
answered: the version and the git trees of both packages. Writers append under a lock, so that several lose nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import msgspec

from regraft.core.clock import EVALUATION, Cost, total_charge
from regraft.core.files import lock_file, tree_hash
from regraft.core.registry import registered_name
from regraft.core.text import clean_text

SCHEMA = 1
Name = Annotated[str, msgspec.Meta(max_length=200)]
"""No page could show a longer one."""

PACKAGES = ("torch", "torchvision", "triton", "numpy", "scipy", "lapx", "lapjv")


@dataclass(frozen=True)
class Series:
    """Numbers along one or more axes.

    Attributes:
        axes: their names: ("step",), ("epoch",), ("beta", "alpha"), ...; "step" begins at 0, the start.
        at: the positions along each axis.
        values: one number a position; lists within lists for several axes, the first axis outermost. None: not finite.
    """

    axes: tuple[str, ...]
    at: tuple[tuple[float | str, ...], ...]
    values: tuple[Any, ...]

    @classmethod
    def over(cls, axis: str, at: Sequence[float | str], values: Sequence[float | None]) -> Series:
        """A curve. Raises ValueError where positions and values differ in number."""
        if len(at) != len(values):
            raise ValueError(f"{len(values)} values at {len(at)} positions of {axis!r}")
        return cls((axis,), (tuple(at),), tuple(values))

    def points(self) -> list[tuple[Any, Any]]:
        """(position, value) of a curve, without what is not finite."""
        return [(at, value) for at, value in zip(self.at[0], self.values, strict=True) if value is not None]


@dataclass(frozen=True)
class Environment:
    """What a run ran on. device: "cpu", "cuda:0"; threads: torch's; versions: of python and packages.

    deterministic: whether torch took only algorithms that give the same bits in every run.
    """

    device: str
    machine: str
    threads: int
    versions: dict[str, str]
    command: str
    deterministic: bool = False

    @property
    def kind(self) -> str:
        """The kind of device, whichever of several it is."""
        return self.device.partition(":")[0]

    @property
    def is_known(self) -> bool:
        """Whether ``machine`` names a kind of machine: two unknown ones may differ."""
        return not self.machine.startswith(UNKNOWN)

    @property
    def arithmetic(self) -> tuple[object, ...]:
        """What the same code has to have in common to give the same bits."""
        return self.device, self.machine, self.threads, tuple(sorted(self.versions.items()))


@dataclass(frozen=True)
class Code:
    """What a run executed: git's tree hashes of the three packages (of their files, with or without git).

    commit: of the checkout that the package lies in; changed: whether the trees differ from that commit's (None: no
    checkout). bench: "" in rows of a time when the suite was part of regraft's tree.
    """

    version: str
    regraft: str
    kernels: str
    commit: str | None
    changed: bool | None
    bench: str = ""

    @property
    def trees(self) -> tuple[str, str, str]:
        """What makes two codes the same code, whatever commit they are in."""
        return self.regraft, self.kernels, self.bench

    def same(self, other: Code) -> bool:
        """Whether all trees are the same, whatever commit they are in."""
        return self.trees == other.trees


def now() -> str:
    """The time of a row."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


@dataclass(frozen=True)
class Row:
    """One run. values, series, cost, notes: see :class:`regraft_bench.study.Measured`.

    failure: None, or in one sentence how the run ended instead ("diverged at step 12", "ValueError: ...").
    """

    study: Name
    scenario: Name
    method: Name
    seed: int
    config: dict[str, Any]
    values: dict[str, float | None]
    series: dict[str, Series]
    cost: dict[str, Cost]
    notes: dict[str, Any]
    failure: str | None
    environment: Environment
    code: Code
    time: str = field(default_factory=now)

    @property
    def identity(self) -> str:
        """What makes two runs the same run."""
        return row_identity(self.study, self.scenario, self.method, self.seed, self.config, self.environment.kind)

    @property
    def total(self) -> Cost:
        """What the method is charged: every phase but evaluation."""
        return total_charge(self.cost)

    @property
    def seconds(self) -> float:
        """The charge on the clock that counts on its device: CPU seconds on a CPU, the wall clock elsewhere."""
        return self._on_its_clock(self.total)

    @property
    def phases(self) -> dict[str, float]:
        """Of each phase that is charged, the seconds on that clock."""
        return {phase: self._on_its_clock(cost) for phase, cost in self.cost.items() if phase != EVALUATION}

    def _on_its_clock(self, cost: Cost) -> float:
        return cost.cpu if self.environment.kind == "cpu" else cost.wall


def row_identity(study: str, scenario: str, method: str, seed: int, config: Mapping[str, Any], device_kind: str) -> str:
    """A digest of what a run is asked to do."""
    return digest([study, scenario, method, seed, config, device_kind])


def digest(value: Any) -> str:
    """A short name for plain data: the same data has the same digest, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(plain_data(value), sort_keys=True).encode()).hexdigest()[:16]


def plain_data(value: Any) -> Any:
    """``value`` as JSON data: dataclasses become objects, registered functions their names.

    Raises TypeError for what has no such form.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain_data(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain_data(v) for k, v in value.items()}
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    if isinstance(value, Sequence | set | frozenset):
        return [plain_data(v) for v in value]
    if callable(value) and hasattr(value, "__name__"):
        return registered_name(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a row cannot hold a {type(value).__name__}")


# ---------------------------------------------------------------- files


def encode(row: Row) -> bytes:
    """The line of a row."""
    return msgspec.json.encode({"schema": SCHEMA, **{f.name: getattr(row, f.name) for f in fields(row)}})


def append(path: Path | str, row: Row) -> None:
    """Add one line, whole or not at all, whoever else is adding. Raises OSError where it cannot be written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = encode(row)
    with path.open("a+b", buffering=0) as file:
        lock_file(file.fileno(), path)
        end = file.seek(0, os.SEEK_END)
        torn = end > 0 and file.seek(end - 1) >= 0 and file.read(1) != b"\n"
        _write_all(file.fileno(), b"\n" * torn + line + b"\n", path, end)
        os.fsync(file.fileno())


def _write_all(handle: int, data: bytes, path: Path, end: int) -> None:
    """Write everything, or take back what was written (a full disk) and say so."""
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(handle, rest) :]
    except OSError as problem:
        os.ftruncate(handle, end)
        message = f"{path}: a row of {len(data)} bytes could not be added ({problem})"
        raise OSError(problem.errno, message) from None


def read_rows(path: Path | str) -> list[Row]:
    """Every row of a file, oldest first. Equal rows are one: a runner that was killed, or two, may add one twice.

    A line that a killed writer left unfinished, or that is damaged, is named in a warning and skipped. Raises
    FileNotFoundError where there is no file, ValueError, with the line's number, where a line is no row of this
    project, or of a newer schema.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no rows at {path}")
    rows: dict[bytes, Row] = {}
    seen: dict[str, Any] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip() and (row := _parse(line, f"{path}, line {number}")) is not None:
                rows.setdefault(hashlib.sha256(encode(row)).digest(), _share_common_parts(row, seen))
    return list(rows.values())


def _share_common_parts(row: Row, seen: dict[str, Any]) -> Row:
    """The row, with what it has in common with earlier ones held once: most of the memory of many rows."""
    same = {name: getattr(row, name) for name in ("config", "environment", "code")}
    return replace(row, **{name: seen.setdefault(repr(value), value) for name, value in same.items()})


_HEAD = f'{{"schema":{SCHEMA},"study":'.encode()


def _parse(line: bytes, where: str) -> Row | None:
    try:
        record = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as problem:
        text = line.strip(b"\0\r\n")  # a lost page of a file is zeros
        if _HEAD in text or _HEAD.startswith(text):
            kind = "a damaged row" if text.endswith(b"}") else "an unfinished row of a writer that was killed"
            warnings.warn(clean_text(f"{where}: {kind} is skipped"), stacklevel=3)
            return None
        raise ValueError(f"{where}: not a row ({problem})") from None
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{where}: not a row of schema {SCHEMA} but of {schema!r}; a newer regraft may read it")
    try:
        return msgspec.convert(record, Row)
    except msgspec.ValidationError as problem:
        raise ValueError(f"{where}: not a row ({problem})") from None


def latest(rows: Sequence[Row]) -> list[Row]:
    """The last row of every identity, in the order in which those were first measured."""
    return list({row.identity: row for row in rows}.values())


# ---------------------------------------------------------------- what ran, and on what


def environment(device: str = "cpu") -> Environment:
    """Describe this process."""
    import torch

    gpu = device.startswith("cuda")
    return Environment(
        device=device,
        machine=torch.cuda.get_device_name(device) if gpu else _processor(),
        threads=torch.get_num_threads(),
        versions={"python": platform.python_version(), **_versions()},
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


UNKNOWN = "unknown"


def _processor() -> str:
    """The processor's name, or its architecture where the system gives no name, and how many cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = f"{UNKNOWN} {platform.processor() or platform.machine()}"
    return f"{name}, {os.cpu_count()} cores"


@cache
def code() -> Code:
    """The code of this process's packages. Call it before anything could change the files."""
    import regraft
    import regraft_bench
    import regraft_kernels

    packages = [Path(str(package.__file__)).resolve().parent for package in (regraft, regraft_kernels, regraft_bench)]
    trees = library, kernels, bench = [tree_hash(folder) for folder in packages]
    commit = _git(packages[0], "rev-parse", "HEAD")
    committed = [_git(folder, "rev-parse", "HEAD:./") for folder in packages]
    changed = None if commit is None else committed != trees
    return Code(regraft.__version__, library, kernels, commit, changed, bench)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
