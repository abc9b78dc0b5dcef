"""`pytest bench --benchmark-only`: the flags, and the summary at the end. What runs is in `regraft_bench`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from rich.console import Console

from regraft.core.text import describe_error
from regraft_bench import session
from regraft_bench.cli import Options, Selection
from regraft_bench.rows import Row, now
from regraft_bench.study import RunPaths, Scenario, Study

RESULTS = Path(__file__).parents[1] / "results" / "local"
CHOSEN = pytest.StashKey[list[tuple[Study, Scenario]]]()
MEASURED = pytest.StashKey[dict[str, list[Row]]]()
ARGUMENTS: dict[Any, dict[str, Any]] = {
    bool: {"action": "store_true"},
    tuple[str, ...]: {"nargs": "+", "action": "extend", "metavar": "NAME"},
    int | None: {"type": int, "metavar": "N"},
    Path: {"type": Path, "metavar": "DIR"},
    Path | None: {"type": Path, "metavar": "DIR"},
    str: {"metavar": "NAME"},
}
"""How pytest reads a flag of each type; other types are choices."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The flags of `regraft bench`, with their help from the docstrings of `Selection` and `Options`."""
    group = parser.getgroup("regraft")
    for flags in (Selection, Options):
        types, helps = get_type_hints(flags), dict(re.findall(r"^ {8}(\w+): (.*)", str(flags.__doc__), re.M))
        for field in fields(flags):
            default = {"results": RESULTS, **dict.fromkeys(helps, field.default)}[field.name]
            kind = types[field.name]
            arguments = ARGUMENTS.get(kind) or {"choices": get_args(kind)}
            group.addoption(
                f"--{field.name.replace('_', '-')}",
                default=list(default) if default == () else default,
                help=helps[field.name],
                **arguments,
            )


def read_options(config: pytest.Config) -> Options:
    return Options(**{field.name: config.getoption(field.name) for field in fields(Options)})


def pytest_configure(config: pytest.Config) -> None:
    try:
        session.prepare(read_options(config))
        config.stash[CHOSEN] = session.choose(*(config.getoption(field.name) for field in fields(Selection)))
    except (ValueError, OSError) as problem:
        raise pytest.UsageError(describe_error(problem)) from None
    config.stash[MEASURED] = {}
    if hasattr(config.option, "benchmark_quiet"):
        config.option.benchmark_quiet = True  # the summary below says more, in fewer lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("chosen", metafunc.config.stash[CHOSEN], ids=lambda pair: f"{pair[0].name}-{pair[1].name}")


@pytest.fixture(scope="session")
def options(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Options:
    found = read_options(pytestconfig)
    return found if found.cache else replace(found, cache=tmp_path_factory.mktemp("trainings"))


@pytest.fixture(scope="session")
def begun() -> str:
    """When the whole bench began: another that began with it may be a scenario ahead."""
    return now()


@pytest.fixture
def place(
    options: Options, begun: str, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> Iterator[RunPaths]:
    """With progress on the terminal that pytest itself writes to."""
    screen = pytestconfig.get_terminal_writer()
    console = Console(file=screen._file, force_terminal=screen.hasmarkup)
    with session.run_paths(options) as paths, session.progress(paths, console) as shown:
        yield replace(shown, begun=begun)


def pytest_keyboard_interrupt() -> None:
    print("\ninterrupted; finished rows are kept, continue with --resume")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[MEASURED]
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
    session.conclude(rows, config.getoption("results"), console)
