"""What every bench shares: its options, where its rows go, and the table at the end.

A bench module states ``SCENARIOS`` (by name), ``DEFAULT`` (the names to run unless told otherwise) and
``METHODS``; its tests take ``scenario``, ``seed`` and ``method``, run one method under ``benchmark``, and
add a row to the module's book:

    @pytest.fixture(scope="module")
    def book(open_book):
        return open_book("transfer", report.TRANSFER)
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from regraft import report, results
from regraft.data import default_root
from regraft.files import write_beside
from regraft.report import Column
from regraft.results import Environment, Row

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("regraft")
    group.addoption(
        "--scenario", nargs="+", action="extend", default=[], metavar="NAME", help="which scenarios to run"
    )
    group.addoption("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1")
    group.addoption(
        "--seeds", type=int, metavar="N", help="seeds 0 .. N-1 (default: the scenario's own number)"
    )
    group.addoption(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of the data sets (default: REGRAFT_DATA, else ./data)",
    )
    group.addoption(
        "--results",
        type=Path,
        metavar="DIR",
        default=ROOT / "results" / "local",
        help="where rows and tables go",
    )
    group.addoption(
        "--cache", type=Path, metavar="DIR", help="keep trainings here, so that an interrupted one goes on"
    )
    group.addoption(
        "--resume", action="store_true", help="measure only what has no row of these settings and this code"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kernels: kernels and solvers alone; run with -m kernels or by path")
    seeds = config.getoption("seeds")
    if seeds is not None and seeds < 1:
        raise pytest.UsageError(f"--seeds must be at least 1, not {seeds}")
    if config.getoption("benchmark_json", None) is None:
        # pytest-benchmark writes into the open file; it is renamed into place once it is whole
        config.option.benchmark_json = str(_benchmark_part(config))
    if config.getoption("benchmark_columns", None) is None:
        config.option.benchmark_columns = ["median", "rounds"]  # the tables of this project say the rest
    _benchmark_part(config).parent.mkdir(parents=True, exist_ok=True)


def _benchmark_part(config: pytest.Config) -> Path:
    return config.getoption("results") / ".benchmark.json.new"


def pytest_unconfigure(config: pytest.Config) -> None:
    part = _benchmark_part(config)
    if part.is_file():
        write_beside(part.with_name("benchmark.json"), part.replace)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One torch thread: for benches that compare CPU seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- what runs


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every scenario and seed of the module; those that were not asked for are deselected below."""
    if {"scenario", "seed"} <= set(metafunc.fixturenames):
        asked = metafunc.config.getoption("seeds")
        pairs = [
            pytest.param(scenario, seed, id=f"{name}-seed{seed}")
            for name, scenario in metafunc.module.SCENARIOS.items()
            for seed in range(scenario.seeds if asked is None else asked)
        ]
        metafunc.parametrize(("scenario", "seed"), pairs)
    if "method" in metafunc.fixturenames:
        metafunc.parametrize("method", metafunc.module.METHODS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = set(config.getoption("scenario"))
    known = {name for item in items for name in getattr(item.module, "SCENARIOS", ())}
    if asked - known:
        raise pytest.UsageError(
            f"unknown scenario {', '.join(sorted(asked - known))}; there are {', '.join(sorted(known))}"
        )
    named = {Path(argument.split("::")[0]).resolve() for argument in config.args}
    selecting = config.getoption("keyword") or config.getoption("markexpr")

    def wanted(item: pytest.Item) -> bool:
        if item.get_closest_marker("kernels"):
            return bool(selecting) or item.path in named
        scenario = item.callspec.params.get("scenario") if hasattr(item, "callspec") else None
        if scenario is None:  # a bench without scenarios runs unless some were asked for
            return not asked or bool(selecting) or item.path in named
        return scenario.name in (asked or item.module.DEFAULT)

    dropped = [item for item in items if not wanted(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if wanted(item)]


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    import torch

    name = pytestconfig.getoption("device")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {name}: torch finds no CUDA device here")
    return name


@pytest.fixture(scope="session")
def data_root(pytestconfig: pytest.Config) -> Path:
    return pytestconfig.getoption("data") or default_root()


@pytest.fixture(scope="session")
def cache(pytestconfig: pytest.Config) -> Path | None:
    return pytestconfig.getoption("cache")


@pytest.fixture(scope="session")
def environment(device: str) -> Environment:
    return results.environment(device)


# ---------------------------------------------------------------- rows and tables


@dataclass
class Book:
    """The rows of one bench: those in its file, and those that this session stands for."""

    path: Path
    columns: Sequence[Column]
    earlier: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def skip_finished(
        self, method: str, scenario: str, seed: int, config: Any, environment: Environment
    ) -> None:
        """Skip a run whose row is in the file already (``--resume``), and count that row to this session."""
        found = self.earlier.get(results.identity(method, scenario, seed, config, environment))
        if found is not None:
            self.rows.append(found)
            pytest.skip(f"measured {found['time']}: its row is in {self.path}")

    def add(self, row: Row) -> None:
        results.append(self.path, row)
        self.rows.append(row.record())


BOOKS = pytest.StashKey[list[Book]]()


@pytest.fixture(scope="session")
def open_book(pytestconfig: pytest.Config) -> Callable[[str, Sequence[Column]], Book]:
    """Open the rows file of a bench by its name, to be shown at the end with these columns."""

    def opener(name: str, columns: Sequence[Column]) -> Book:
        path = pytestconfig.getoption("results") / f"{name}.jsonl"
        records = results.records(path) if pytestconfig.getoption("resume") else []
        book = Book(path, columns, {record["identity"]: record for record in records})
        pytestconfig.stash.setdefault(BOOKS, []).append(book)
        return book

    return opener


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's own table
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for book in config.stash.get(BOOKS, []):
        if not book.rows:
            continue
        terminalreporter.section(book.path.stem)
        for line in _rendered(book, terminalreporter):
            terminalreporter.write_line(line)
        pages = report.write(results.read(book.path), book.path, book.columns)
        terminalreporter.write_line(f"rows: {book.path}; pages: {', '.join(map(str, pages))}")


def _rendered(book: Book, terminalreporter: Any) -> Iterator[str]:
    screen = terminalreporter._tw
    console = Console(
        file=io.StringIO(), width=max(screen.fullwidth, 100), force_terminal=screen.hasmarkup, highlight=False
    )
    for table in report.tables(results.frame(book.rows), book.columns):
        console.print(table)
        console.print()
    yield from console.file.getvalue().splitlines()
