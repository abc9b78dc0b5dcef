"""What the campaigns share: the check that something is refused, and the counts of attempts."""

import os
import signal
from collections import Counter
from collections.abc import Callable

import pytest

LIMIT = 30
"""Seconds that a refusal may take on a busy machine."""


class Hang(BaseException):
    """Nothing caught it, so that it ends a call that does not return."""


@pytest.fixture
def refuse(record_property, monkeypatch):
    """Check that a call raises a ValueError or an OSError that contains one of some words, and count the attempt.

    Any other exception, or none within the limit, fails the test with the attempt's name.
    """

    def stop(*_):
        raise Hang(f"no answer within {LIMIT} seconds")

    def check(name: str, call: Callable[[], object], words: tuple[str, ...]) -> None:
        record_property("attempts", 1)
        signal.alarm(LIMIT)
        try:
            call()
        except (ValueError, OSError) as problem:
            assert any(word in str(problem) for word in words), f"{name}: {problem!r} names none of {words}"
        except BaseException as problem:
            problem.add_note(name)
            raise
        else:
            pytest.fail(f"{name}: accepted")
        finally:
            signal.alarm(0)

    monkeypatch.setattr(os, "fsync", lambda handle: None)  # what is read back at once needs no disk
    before = signal.signal(signal.SIGALRM, stop)
    yield check
    signal.signal(signal.SIGALRM, before)


def pytest_terminal_summary(terminalreporter, config):
    if config.option.markexpr == "not slow":
        return
    counts: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        kind = report.nodeid.partition("::test_")[2].partition("[")[0].replace("_", " ")
        for name, value in report.user_properties:
            if name.startswith("attempts"):  # "attempts: KIND" where a test has several kinds
                counts[name.removeprefix("attempts").removeprefix(": ") or kind] += value
    terminalreporter.section("attempts that ended as they must, by kind")
    for kind, count in counts.items():
        if count:
            terminalreporter.line(f"{count:7,}  {kind}")
