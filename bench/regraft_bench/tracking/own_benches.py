"""Benches of one's own, as pytest-benchmark saves them (`--benchmark-json`, `--benchmark-autosave`), read as rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import Struct, field

from regraft.core.clock import Cost
from regraft.core.files import BadFile, read_json
from regraft_bench.rows import Code, Environment, Row, Series
from regraft_bench.tracking.compare import ROUNDS

STUDY = "pytest-benchmark"


class _Stats(Struct):
    min: float
    data: list[float] = field(default_factory=list)


class _Bench(Struct):
    name: str
    fullname: str
    stats: _Stats


class _Saved(Struct):
    benchmarks: list[_Bench]
    datetime: str
    machine_info: dict[str, Any] = field(default_factory=dict)
    commit_info: dict[str, Any] = field(default_factory=dict)


def read_benchmarks(path: Path) -> list[Row]:
    """A row for each bench of a file: one run, whose rounds are not independent. Costs are seconds of the shortest
    round, compared as they are, since these benches have no control.

    Raises BadFile, naming the path, for anything but pytest-benchmark's JSON.
    """
    try:
        saved = read_json(path, _Saved, "pytest-benchmark's JSON")
    except ValueError as problem:
        raise BadFile(str(problem)) from problem
    machine, commit = saved.machine_info, saved.commit_info.get("id")
    found = machine.get("cpu")
    cpu = found if isinstance(found, dict) else {}
    name = f"{cpu.get('brand_raw', machine.get('node', 'unknown'))}, {cpu.get('count', '?')} cores"
    here = Environment("cpu", name, 1, {"python": str(machine.get("python_version", "?"))}, "pytest")
    code = Code("", str(commit), "", commit, saved.commit_info.get("dirty"))
    return [_make_row(bench, here, code, saved.datetime) for bench in saved.benchmarks]


def _make_row(bench: _Bench, here: Environment, code: Code, time: str) -> Row:
    rounds = [1000 * seconds for seconds in bench.stats.data or [bench.stats.min]]
    return Row(
        study=STUDY,
        scenario=bench.fullname.removesuffix(bench.name).rstrip(":"),
        method=bench.name,
        seed=0,
        config={"method": {"beside": None}},
        values={},
        series={ROUNDS: Series.over("round", range(1, len(rounds) + 1), rounds)},
        cost={"bench": Cost(bench.stats.min, bench.stats.min)},
        notes={},
        failure=None,
        environment=here,
        code=code,
        time=time,
    )
