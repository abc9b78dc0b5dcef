"""`pytest bench --benchmark-only`: the options, and the summary at the end. What runs is in `regraft_bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from regraft.core.guard import make_deterministic
from regraft_bench import front
from regraft_bench.rows import Row
from regraft_bench.studies import STUDIES
from regraft_bench.study import RunPaths

ROOT = Path(__file__).parents[1]
ROWS = pytest.StashKey[dict[str, list[Row]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("regraft")
    many = {"nargs": "+", "action": "extend", "default": [], "metavar": "NAME"}
    group.addoption("--study", help=f"which studies: {', '.join(STUDIES)} (default: all)", **many)
    group.addoption("--scenario", help="which scenarios (default: each study's quick ones)", **many)
    group.addoption("--method", help="which of their methods (default: all)", **many)
    group.addoption(
        "--seeds", type=int, metavar="N", help="seeds 0 .. N-1 (default: the scenario's own number)"
    )
    group.addoption("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1")
    folder = {"type": Path, "metavar": "DIR"}
    group.addoption("--data", help="folder of the data sets (default: REGRAFT_DATA, else ./data)", **folder)
    group.addoption(
        "--results",
        default=ROOT / "results" / "local",
        help="where rows and pages go (results/local)",
        **folder,
    )
    group.addoption("--cache", help="keep trainings here, so that an interrupted one goes on", **folder)
    group.addoption(
        "--resume", action="store_true", help="measure only what has no row of these settings and this code"
    )
    group.addoption(
        "--deterministic",
        action="store_true",
        help="only algorithms that give the same bits in every run",
    )
    group.addoption("--keep-older", action="store_true", help="the same, and take rows of any code")


def pytest_configure(config: pytest.Config) -> None:
    seeds, device = config.getoption("seeds"), config.getoption("device")
    if seeds is not None and seeds < 1:
        raise pytest.UsageError(f"--seeds must be at least 1, not {seeds}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {device}: torch finds no CUDA device here")
    if config.getoption("deterministic"):
        make_deterministic()
    config.stash[ROWS] = {}
    if hasattr(config.option, "benchmark_quiet"):
        config.option.benchmark_quiet = True  # the summary below says more, in fewer lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    try:
        chosen = front.choose(*(config.getoption(name) for name in ("study", "scenario", "method")))
    except ValueError as problem:
        raise pytest.UsageError(str(problem)) from None
    metafunc.parametrize("chosen", chosen, ids=lambda pair: f"{pair[0].name}-{pair[1].name}")


@pytest.fixture(scope="session")
def place(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    cache = pytestconfig.getoption("cache") or tmp_path_factory.mktemp("trainings")
    return RunPaths(pytestconfig.getoption("data"), cache, pytestconfig.getoption("device"))


@pytest.fixture
def told(place: RunPaths, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]) -> Any:
    """The place, with progress on the terminal that pytest itself writes to."""
    screen = pytestconfig.get_terminal_writer()
    console = Console(file=screen._file, force_terminal=screen.hasmarkup)
    with front.progress(place, console) as shown:
        yield shown


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    screen = terminalreporter._tw
    console = Console(
        file=screen._file,
        width=max(screen.fullwidth, 100),
        force_terminal=screen.hasmarkup,
        highlight=False,
        markup=False,
    )
    terminalreporter.section("what was measured")
    front.conclude(rows, config.getoption("results"), console)
