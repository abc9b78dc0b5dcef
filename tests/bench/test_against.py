"""Two codes by turns: a fault that is planted in a copy is found, the copy alone is not; what cannot run says so."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from regraft import cli
from regraft.core.clock import Cost
from regraft_bench.rows import Row, code, encode, environment
from regraft_bench.tracking.against import (
    PACKAGE_FOLDERS,
    copy_packages,
    extract_packages,
    find_meant,
    measure_by_turns,
)
from regraft_bench.tracking.compare import CHANGED, NO_EVIDENCE, WORSE, Change, Limits
from regraft_bench.tracking.regressions import FAULTS, judge_changes, plant_fault
from regraft_bench.tracking.shown import print_changes


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
        measure_by_turns(side, side, ["--scenario", "digits-mlp", "--method", "naive"], tmp_path / "rows", Limits(0.1))


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


def make_rows(study: str, accuracy: float, cost: float, method: str = "fgmt") -> list[Row]:
    return [
        Row(
            study, "digits", name, 0, {}, {"accuracy": accuracy if name == method else 0.9}, {},
            {"training": Cost(1.0, cost if name == method else 1.0)}, {}, None, environment(), code(),
        )
        for name in ("plain", method)
    ]  # fmt: skip


@pytest.fixture
def checkout(tmp_path):
    """A checkout in which git can commit."""
    git = partial(subprocess.run, check=True, cwd=tmp_path, capture_output=True, text=True)
    git(["git", "init", "-q", "-b", "main"])
    for key, value in (("user.name", "a"), ("user.email", "a@b.example")):
        git(["git", "config", key, value])

    def commit(files: dict[str, str | list[Row]]) -> str:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else b"\n".join(map(encode, content)) + b"\n")
        git(["git", "add", "-A"])
        git(["git", "commit", "-q", "-m", "more"])
        return git(["git", "rev-parse", "HEAD"]).stdout.strip()

    return tmp_path, commit


BASELINE = "results/baseline/transfer/rows.jsonl"


def test_a_renewed_baseline_excuses_what_it_says_and_nothing_else(checkout, capsys):
    root, commit = checkout
    before = commit({BASELINE: make_rows("transfer", 0.9, 2.0)})
    commit({BASELINE: make_rows("transfer", 0.8, 2.0)})
    limits = Limits()
    meant = find_meant(before, root / "results/baseline", limits)
    assert meant == {("transfer", "digits", "fgmt", "error")}
    assert find_meant("HEAD", root / "results/baseline", limits) == set()
    error, cost = (
        Change("transfer", "digits", "fgmt", quantity, 0.1, 0.2, 0.1, 0.1, 0.1, 3, WORSE)
        for quantity in ("error", "cost")
    )
    cost = replace(cost, change=0.9)
    assert print_changes([error], limits, meant=meant) == []
    assert "error +0.1 (allowed: 0.005); the renewed baseline says so, too" in capsys.readouterr().out
    assert print_changes([error, cost], limits, meant=meant) == [cost]
    assert print_changes([replace(error, study="micro")], limits, meant=meant)


def test_ci_measures_against_the_last_commit_with_other_code(checkout):
    root, commit = checkout
    script = Path(__file__).parents[2] / ".ci" / "against_parent"
    report = '#!/bin/sh\necho "regraft $@"; exit "$STATUS"\n'
    module = "bench/regraft_bench/a.py"
    commit({module: "a = 1", "src/a.py": "", "kernels/a.py": "", ".gitignore": ".venv"})
    commit({".ci/against_parent": script.read_text(), ".venv/bin/regraft": report, module: "a = 2"})
    expected = commit({"README.md": "words"})
    commit({module: "a = 3"})
    commit({"README.md": "other words"})
    commit({"results/baseline/README.md": "the baseline is renewed, and excuses nothing by that alone"})
    for path in (".ci/against_parent", ".venv/bin/regraft"):
        (root / path).chmod(0o755)

    def run(status: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "STATUS": status}
        return subprocess.run([".ci/against_parent"], cwd=root, env=env, capture_output=True, text=True)

    done = run("0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"regraft against {expected} ") == 2
    assert run("1").returncode == 1


def test_a_commit_that_there_is_not_is_a_usage_error(tmp_path, capsys):
    with pytest.raises(ValueError, match="cannot extract commit 'nothing'"):
        extract_packages("nothing", tmp_path)
    assert cli.main(["against", "nothing"]) == 2
    assert "cannot extract commit 'nothing'" in capsys.readouterr().err
    assert cli.main(["against", "HEAD", "--scenario", "sistems"]) == 2
    assert "did you mean systems" in capsys.readouterr().err
