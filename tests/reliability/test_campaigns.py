"""The campaigns of `regraft_bench.micro.reliability`, short: nothing silent, nothing raw, nothing that hangs."""

from __future__ import annotations

import pytest

from regraft_bench.micro.reliability import CAMPAIGNS, OUTCOMES, Campaign, campaigns, held, subjects
from regraft_bench.micro.reliability.assignments import judged
from regraft_bench.micro.reliability.attempt import CLEAR, HANG, RAW, SILENT, Case, attempt, tally

SHORT = Campaign(every=23, kills=1, row_files=1, rows=25, folders=2, assignments=400, disks=(0, 100))


@pytest.fixture(scope="module")
def found():
    """All campaigns in one fresh process."""
    return held(list(campaigns(0)), SHORT)


@pytest.mark.parametrize("name", campaigns(0))
def test_everything_is_refused_clearly_and_nothing_is_lost(found, name):
    values = found[name].values
    assert found[name].notes["not clear"] == []
    assert values["tried"] == values[CLEAR] > 0


def refusing(problem):
    def run(folder):
        raise problem

    return run


def test_the_outcomes_are_what_they_say(tmp_path):
    """The judge of the campaigns, on cases whose outcome is known."""
    import time

    def executed(folder):
        (folder / "executed").touch()
        raise ValueError("refused, but too late: name")

    cases = {
        CLEAR: [refusing(ValueError("the name is wrong")), refusing(FileNotFoundError("no name here"))],
        RAW: [refusing(ValueError("something")), refusing(KeyError("name")), refusing(SystemExit("name"))],
        SILENT: [lambda folder: None, executed],
        HANG: [lambda folder: time.sleep(60)],
    }
    for outcome, runs in cases.items():
        for run in runs:
            assert attempt(Case("case", run, ("name",)), limit=5.0)[0] == outcome
    counted = tally([("a", (CLEAR, "")), ("b", (RAW, "oh")), ("c", (CLEAR, ""))])
    assert counted.values == {"tried": 3, CLEAR: 2, SILENT: 0, RAW: 1, HANG: 0}
    assert counted.notes["not clear"] == ["b: raw, oh"] and set(OUTCOMES) < counted.values.keys()


def test_the_judge_of_assignments_knows_a_wrong_one():
    import numpy as np

    import regraft_kernels as rk

    matrix = np.random.default_rng(0).standard_normal((5, 5))
    assert judged(matrix, lambda: rk.assign(matrix))[0] == CLEAR
    assert judged(matrix, lambda: rk.assign(-matrix))[0] == SILENT


def test_every_whole_file_is_accepted(tmp_path):
    """What is refused is refused for what is wrong with it: each format's own file is read."""
    for format in subjects.FORMATS.values():
        folder = tmp_path / format.name
        folder.mkdir()
        format.read(format.write(folder))
    assert len(subjects.FORMATS) == 6 and len(CAMPAIGNS) == 16
