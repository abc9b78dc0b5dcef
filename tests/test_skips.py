"""With --listed-skips a skipped test is an error unless tests/conftest.py lists its reason."""

import shutil
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]


@pytest.mark.parametrize(
    ("reason", "status"), [("no chromium with its chromedriver here", 0), ("numpy is not installed", 1)]
)
def test_a_skip_that_is_not_listed_fails(pytester, reason, status):
    shutil.copy(Path(__file__).with_name("conftest.py"), pytester.path)
    pytester.makepyfile(f"import pytest\ndef test_a():\n    pytest.skip({reason!r})\ndef test_b():\n    pass\n")
    done = pytester.runpytest_subprocess("--listed-skips", "-n", "1")
    assert done.ret == status
    assert ("does not list" in done.stdout.str()) == bool(status)
