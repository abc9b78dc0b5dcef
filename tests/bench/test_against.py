"""Two codes by turns: a fault that is planted in a copy is found, the copy alone is not; what cannot run says so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from regraft import cli
from regraft_bench.tracking.against import (
    PACKAGE_FOLDERS,
    copy_packages,
    extract_packages,
    measure_by_turns,
)
from regraft_bench.tracking.compare import CHANGED, NO_EVIDENCE, WORSE, Change, Limits
from regraft_bench.tracking.regressions import FAULTS, judge_changes, plant_fault


def change(quantity: str, size: float, verdict: str = NO_EVIDENCE, method: str = "fgmt") -> Change:
    return Change("s", "t", method, quantity, 1.0, 1.0 + size, size, None, None, 4, verdict)


def test_a_fault_in_a_copy_is_found_and_nothing_else(tmp_path):
    fault = replace(
        FAULTS["less accurate by a point"],
        argv=("--scenario", "digits-mlp", "--method", "plain", "--seeds", "1"),
    )
    sides = copy_packages(tmp_path / "a"), plant_fault(fault, 0, tmp_path / "b")
    changes = measure_by_turns(*sides, fault.argv, tmp_path / "rows", fault.limits)
    found = judge_changes(fault, changes, 0.0)
    assert (found.values["found"], found.values["false alarms"]) == (1.0, 0.0)
    assert {c.quantity for c in changes if c.verdict in (CHANGED, WORSE)} >= {"error", "final"}


def test_a_side_that_cannot_run_says_why(tmp_path):
    side = copy_packages(tmp_path / "a")
    (side / PACKAGE_FOLDERS[0] / "cli.py").write_text("raise ImportError('no such thing')\n")
    with pytest.raises(ChildProcessError, match="'before' could not be measured: ImportError: no such thing"):
        measure_by_turns(
            side, side, ["--scenario", "digits-mlp", "--method", "naive"], tmp_path / "rows", Limits(0.1)
        )


def test_turns_go_on_while_something_looks_slower_without_evidence():
    limits = Limits(slowdown=0.1)
    assert limits.is_undecided(change("cost", 0.08))
    assert not limits.is_undecided(change("cost", 0.04))
    assert not limits.is_undecided(change("cost", 0.15, WORSE))
    assert not limits.is_undecided(change("error", 0.5))
    with pytest.raises(ValueError, match="4 to 3"):
        Limits(most=3)


def test_what_is_told_beside_the_fault_is_a_false_alarm():
    fault = FAULTS["slower by 15 %"]
    planted_one = change("cost", 0.15, WORSE, "training: regraft")
    other = change("cost", 0.2, WORSE, "fast: regraft")
    found = judge_changes(fault, [planted_one, other], 1.0)
    assert (found.values["found"], found.values["false alarms"]) == (1.0, 1.0)
    assert judge_changes(fault, [change("cost", 0.15)], 1.0).values["found"] == 0.0
    assert judge_changes(FAULTS["the same code, speed"], [planted_one], 1.0).values["false alarms"] == 1.0


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_module_is_the_module_and_the_fault(name, tmp_path):
    fault = FAULTS[name]
    module = plant_fault(fault, 7, tmp_path) / PACKAGE_FOLDERS[0] / fault.module
    compile(module.read_text(), str(module), "exec")
    assert "TRIAL" not in module.read_text()
    assert bool(fault.text) == (
        module.read_text() != (copy_packages(tmp_path / "x") / PACKAGE_FOLDERS[0] / fault.module).read_text()
    )


def test_a_commit_that_there_is_not_is_a_usage_error(tmp_path, capsys):
    with pytest.raises(ValueError, match="cannot extract commit 'nothing'"):
        extract_packages("nothing", tmp_path)
    assert cli.main(["against", "nothing"]) == 2
    assert "cannot extract commit 'nothing'" in capsys.readouterr().err
    assert cli.main(["against", "HEAD", "--scenario", "sistems"]) == 2
    assert "did you mean systems" in capsys.readouterr().err
