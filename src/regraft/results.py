"""One row a run: make, append, read, summarise, compare.

Rows are JSON lines, one object a line, in one file per bench. Appending rewrites the file beside its
place, flushes it to disk and renames it: after a kill at any moment the file holds every finished row
and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

from regraft.files import write_beside

PACKAGES = ("torch", "torchvision", "triton", "numpy", "scipy", "lapx", "lapjv", "regraft")
EVALUATION = "evaluation"  # the one phase that is not charged to a method


@dataclass(frozen=True)
class Cost:
    """Seconds of one thing, twice: by the wall clock, and of CPU time summed over threads.

    On a machine that others use too, CPU seconds are the steadier; on a GPU only the wall clock means
    anything.
    """

    wall: float
    cpu: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu)

    @classmethod
    def by_phase(cls, wall: Mapping[str, float], cpu: Mapping[str, float]) -> dict[str, Cost]:
        """The two sides of a :class:`regraft.clock.Clock`, put together phase by phase."""
        return {phase: cls(wall[phase], cpu[phase]) for phase in wall}


@dataclass(frozen=True)
class Point:
    """A training curve at the end of one epoch; epoch 0 is the state before any training.

    ``cost`` is what was paid up to here: the method's own cost plus the training.
    """

    epoch: int
    cost: Cost
    accuracy: float


@dataclass(frozen=True)
class Environment:
    """What a run ran on and which code it ran; ``commit`` and ``dirty`` are absent outside a git checkout."""

    device: str
    machine: str
    threads: int
    versions: Mapping[str, str]
    code: str
    commit: str | None
    dirty: bool | None
    command: str


@dataclass(frozen=True)
class Row:
    """One run of one method on one scenario with one seed.

    ``accuracy`` is on the test split, with no training of the target after the method's own work;
    ``phases`` is the method's cost by phase, of which evaluation is shown and not charged.
    ``accuracy_by_step`` is on the validation split, from step 0 (the untouched start) to T; ``best_step``
    is the one kept. ``plain`` is the cost of training the same start in the same run, ``plain_accuracy``
    what that reaches. ``curve`` is the training that follows (for plain training: its own curve).
    ``peak_memory`` is in bytes. ``extra`` holds what only one bench measures.
    """

    method: str
    scenario: str
    seed: int
    accuracy: float
    phases: Mapping[str, Cost]
    environment: Environment
    config: Mapping[str, Any]
    plain: Cost | None = None
    plain_accuracy: float | None = None
    best_step: int | None = None
    accuracy_by_step: Sequence[float] = ()
    curve: Sequence[Point] = ()
    peak_memory: int | None = None
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cost(self) -> Cost:
        """What the method is charged: every phase but evaluation."""
        return sum((c for phase, c in self.phases.items() if phase != EVALUATION), Cost(0.0, 0.0))

    def record(self) -> dict[str, Any]:
        """The row as plain JSON data, with what is derived from it: error, cost, setup, identity."""
        return {
            **{f.name: plain_data(getattr(self, f.name)) for f in fields(self)},
            "error": 1.0 - self.accuracy,
            "cost": asdict(self.cost),
            "setup": setup(self.config, self.environment),
            "identity": identity(self.method, self.scenario, self.seed, self.config, self.environment),
        }


def plain_data(value: Any) -> Any:
    """``value`` as JSON data: dataclasses become objects, callables their import path."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain_data(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain_data(v) for k, v in value.items()}
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    if isinstance(value, Sequence | set | frozenset):
        return [plain_data(v) for v in value]
    if callable(value):
        return f"{value.__module__}:{value.__qualname__}"
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a result row cannot hold a {type(value).__name__}")


def digest(value: Any) -> str:
    """A short name for plain data: the same data has the same digest, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(plain_data(value), sort_keys=True).encode()).hexdigest()[:16]


def setup(config: Mapping[str, Any], environment: Environment) -> str:
    """What rows that may be compared have in common: configuration, code, commit and device."""
    return digest([config, environment.code, environment.commit, environment.device])


def identity(
    method: str, scenario: str, seed: int, config: Mapping[str, Any], environment: Environment
) -> str:
    """What makes two runs the same run: method, scenario, seed, and their :func:`setup`."""
    return digest([method, scenario, seed, setup(config, environment)])


# ---------------------------------------------------------------- measuring


def forget_peak_memory(device: str = "cpu") -> None:
    """Start a new peak on a GPU. The CPU's is the process's own, and only rises."""
    if str(device).startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: str = "cpu") -> int:
    """Bytes: allocated at most on the GPU since :func:`forget_peak_memory`, or resident in this process so
    far.
    """
    if str(device).startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def environment(device: str = "cpu") -> Environment:
    """Describe this process: call it once, before anything is written into the checkout."""
    import torch

    commit, dirty = _checkout(Path.cwd())
    gpu = str(device).startswith("cuda")
    return Environment(
        device=str(device),
        machine=torch.cuda.get_device_name(device) if gpu else _processor(),
        threads=torch.get_num_threads(),
        versions={"python": platform.python_version(), **_versions()},
        code=_code(),
        commit=commit,
        dirty=dirty,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _checkout(folder: Path) -> tuple[str | None, bool | None]:
    """(commit, dirty) of the git checkout that holds ``folder``; results being written do not make it
    dirty.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        top = git("rev-parse", "--show-toplevel")
        return git("rev-parse", "HEAD"), bool(
            git("status", "--porcelain", "--", top, f":(exclude){top}/results")
        )
    except (OSError, subprocess.CalledProcessError):
        return None, None


@cache
def _code() -> str:
    """A digest of the sources of both packages, so that a dirty tree or a copy without git is told apart
    too.
    """
    import regraft
    import regraft_kernels

    sources = (
        path
        for package in (regraft, regraft_kernels)
        for path in sorted(Path(package.__file__).parent.rglob("*.py"))
    )
    return digest([[path.name, path.read_text(encoding="utf-8")] for path in sources])


# ---------------------------------------------------------------- files


def write(path: Path | str, text: str) -> None:
    """Write ``text`` to ``path``, making its folder: the old file or the new one, never a mixture."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, lambda part: part.write_text(text, encoding="utf-8"))


def append(path: Path | str, row: Row) -> None:
    """Add one row to a JSON-lines file. Raises ValueError where the row or the file holds what JSON cannot
    say.
    """
    path = Path(path)
    line = json.dumps(row.record(), sort_keys=True, allow_nan=False)
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if before and not before.endswith("\n"):
        raise ValueError(f"{path}: the last line is cut off; mend the file before rows are added to it")
    write(path, before + line + "\n")


def records(path: Path | str) -> list[dict[str, Any]]:
    """Every row of the file as plain data, oldest first; [] where there is no file yet.

    Raises ValueError, with the line's number, where a line is not a row.
    """
    path = Path(path)
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as problem:
            raise ValueError(f"{path}, line {number}: not JSON ({problem})") from None
        if not isinstance(record, dict) or not {"method", "scenario", "seed", "accuracy"} <= record.keys():
            raise ValueError(f"{path}, line {number}: not a result row")
        found.append(record)
    return found


def read(path: Path | str) -> pd.DataFrame:
    """The rows of a file as a frame, one a line, nested values as dotted columns (``cost.cpu``,
    ``config.epochs``).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no result rows at {path}")
    return frame(records(path))


def frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Records as a frame with dotted columns; see :func:`read`."""
    return pd.json_normalize([dict(row) for row in rows])


# ---------------------------------------------------------------- reading them


def newest(rows: pd.DataFrame) -> pd.DataFrame:
    """The last row of every scenario, method and seed, in the order in which those were first measured.

    Rows of another setup (other settings, other code) than the scenario's last row are left out: they are no
    measurement of the same thing.
    """
    current = rows.groupby("scenario", sort=False)["setup"].transform("last")
    return rows[rows["setup"] == current].drop_duplicates(["scenario", "method", "seed"], keep="last")


def reach(curve: Sequence[Mapping[str, Any]], accuracy: float) -> Mapping[str, Any] | None:
    """The first point of a training curve that is at least that accurate, or None."""
    return next((point for point in curve if point["accuracy"] >= accuracy), None)


def derived(rows: pd.DataFrame, share: float = 0.95) -> pd.DataFrame:
    """The rows with what follows from them, one new column each.

    ``seconds``: the method's cost on the clock that counts on its device (CPU seconds on a CPU, the wall
    clock on a GPU). ``share``: of plain training's, on the same clock. ``final``: accuracy at the end of
    the training that follows. ``epochs_to_reach``, ``seconds_to_reach``: until ``share`` of plain
    training's final accuracy, the method's own cost included; ``speed_up``: plain training's seconds to get
    there over the method's (NaN where either never does).
    """
    rows = newest(rows).copy()
    on = ["wall" if str(device).startswith("cuda") else "cpu" for device in rows["environment.device"]]
    plain_curves = {(row.scenario, row.seed): row.curve for row in rows.itertuples() if row.method == "plain"}
    columns: dict[str, list[float]] = {
        name: [] for name in ("seconds", "share", "final", "epochs_to_reach", "seconds_to_reach", "speed_up")
    }
    for (_, row), side in zip(rows.iterrows(), on, strict=True):
        plain_seconds = row.get(f"plain.{side}", math.nan)
        goal = share * (row.get("plain_accuracy") or math.nan)
        own = reach(row["curve"], goal)
        plain = reach(plain_curves.get((row["scenario"], row["seed"]), ()), goal)
        own_seconds = own["cost"][side] if own else math.nan
        columns["seconds"].append(row[f"cost.{side}"])
        columns["share"].append(row[f"cost.{side}"] / plain_seconds if plain_seconds else math.nan)
        columns["final"].append(row["curve"][-1]["accuracy"] if len(row["curve"]) else math.nan)
        columns["epochs_to_reach"].append(own["epoch"] if own else math.nan)
        columns["seconds_to_reach"].append(own_seconds)
        columns["speed_up"].append(plain["cost"][side] / own_seconds if own and plain else math.nan)
    return rows.assign(**columns)


def compare(
    rows: pd.DataFrame, method: str, other: str, *, value: str = "accuracy", by: str = "scenario"
) -> pd.DataFrame:
    """Is ``method`` better than ``other``? Paired over seeds, one line per scenario.

    Columns: scenario, n (pairs), difference (mean of method - other), deviation (of the differences), p
    (two-sided paired t-test; NaN where n < 2 or where all differences are equal, as no test is possible
    then).
    """
    from scipy import stats

    lines = []
    for name, group in newest(rows).groupby(by, sort=False):
        pairs = group.pivot_table(index=["scenario", "seed"], columns="method", values=value, sort=False)
        if not {method, other} <= set(pairs.columns):
            continue
        pairs = pairs[[method, other]].dropna()
        differences = pairs[method] - pairs[other]
        n = len(differences)
        testable = n > 1 and differences.std() > 1e-12 * differences.abs().max()
        lines.append(
            {
                by: name,
                "n": n,
                "difference": differences.mean(),
                "deviation": differences.std(),
                "p": float(stats.ttest_rel(pairs[method], pairs[other]).pvalue) if testable else math.nan,
            }
        )
    return pd.DataFrame(lines, columns=[by, "n", "difference", "deviation", "p"])
