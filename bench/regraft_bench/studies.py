"""The studies by name, and all their rows. A study is imported when it is asked for."""

from __future__ import annotations

import subprocess
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from regraft_bench.report.render import ROWS
from regraft_bench.rows import Row, read_rows
from regraft_bench.study import Study, nearest
from regraft_bench.tracking.own_benches import read_benchmarks

if TYPE_CHECKING:
    from pandas import DataFrame

STUDIES = ("transfer", "fusion", "fast", "matching", "micro")


def study(name: str) -> Study:
    """A study by its name. Raises ValueError, with the nearest names, for an unknown one."""
    if name not in STUDIES:
        raise ValueError(f"there is no study {name!r}{nearest(name, STUDIES)}")
    return import_module(f"regraft_bench.{name}").STUDY


def all_rows(folder: Path) -> list[Row]:
    """All rows of a folder and of the folders in it, by file; of one without any, those of pytest-benchmark's files."""
    files = [folder / ROWS, *(folder / name / ROWS for name in STUDIES), *sorted(folder.glob(f"*/{ROWS}"))]
    rows = [row for path in dict.fromkeys(files) if path.is_file() for row in read_rows(path)]
    return rows or [row for path in sorted(folder.rglob("*.json")) for row in read_benchmarks(path)]


def load_results(folder: Path | str) -> DataFrame:
    """All rows of a results folder as a table: a line for each run.

    Columns: study, scenario, method, seed, each value by its name, seconds (the charge: CPU seconds on a CPU), failure,
    commit, time. Raises ValueError where the folder has no rows, ImportError without pandas.
    """
    import pandas as pd

    rows = find_rows(str(folder), Path(folder))
    lines = [
        {
            **{"study": row.study, "scenario": row.scenario, "method": row.method, "seed": row.seed},
            **row.values,
            **{"seconds": row.seconds, "failure": row.failure, "commit": row.code.commit, "time": row.time},
        }
        for row in rows
    ]
    return pd.DataFrame(lines)


def find_rows(side: str, results: Path) -> list[Row]:
    """Rows by what one would call them.

    A file of rows or of pytest-benchmark, a folder (see `all_rows`), "last" (the newest code's rows below ``results``),
    "baseline" (those below ``results/baseline``), or a commit among the rows below ``results``, by its first digits or
    by what git calls it. Raises ValueError, naming the side, where there are none.
    """
    path = Path(side)
    if path.is_file():
        return read_benchmarks(path) if path.suffix == ".json" else read_rows(path)
    folder = path if path.is_dir() else results / "baseline" if side == "baseline" else None
    rows = all_rows(folder or results)
    if side == "last" and rows:
        newest = max(rows, key=lambda row: row.time).code
        rows = [row for row in rows if row.code.same(newest)]
    elif folder is None:
        rows = _rows_of_commit(rows, side) or _rows_of_commit(rows, commit := _find_commit(side))
        side = side if rows or not commit else f"{side} ({commit[:10]})"
    if not rows:
        where = folder or results
        raise ValueError(f"no rows for {side!r}: neither a file or folder of rows, nor a commit of rows in {where}")
    return rows


def _rows_of_commit(rows: list[Row], commit: str) -> list[Row]:
    return [row for row in rows if commit and row.code.commit is not None and row.code.commit.startswith(commit)]


def _find_commit(name: str) -> str:
    """The commit that git calls by this name in the working directory's checkout; "" where there is none."""
    command = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
