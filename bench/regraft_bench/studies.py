"""The studies by name, and all their rows. A study is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from regraft_bench.report.render import ROWS
from regraft_bench.rows import Row, read_rows
from regraft_bench.study import Study, nearest

if TYPE_CHECKING:
    from pandas import DataFrame

STUDIES = ("transfer", "fusion", "fast", "micro")


def study(name: str) -> Study:
    """A study by its name. Raises ValueError, with the nearest names, for an unknown one."""
    if name not in STUDIES:
        raise ValueError(f"there is no study {name!r}{nearest(name, STUDIES)}")
    return import_module(f"regraft_bench.{name}").STUDY


def all_rows(folder: Path) -> list[Row]:
    """All rows of a folder and of the studies in it, by file."""
    files = [folder / ROWS, *(folder / name / ROWS for name in STUDIES)]
    return [row for path in files if path.is_file() for row in read_rows(path)]


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

    A file of rows, a folder (its own rows.jsonl and those of its studies), "last" (the newest code's rows below
    ``results``), "baseline" (those below ``results/baseline``), or a commit, by its first digits, among the rows below
    ``results``. Raises ValueError, naming the side, where there are none.
    """
    path = Path(side)
    if path.is_file():
        return read_rows(path)
    folder = path if path.is_dir() else results / "baseline" if side == "baseline" else None
    rows = all_rows(folder or results)
    if side == "last" and rows:
        newest = max(rows, key=lambda row: row.time).code
        rows = [row for row in rows if row.code.same(newest)]
    elif folder is None:
        rows = [row for row in rows if row.code.commit is not None and row.code.commit.startswith(side)]
    if not rows:
        where = folder or results
        raise ValueError(f"no rows for {side!r}: neither a file or folder of rows, nor a commit of rows in {where}")
    return rows
