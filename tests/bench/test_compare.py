"""Planted regressions are found, unchanged code raises no alarm, and what proves nothing says so."""

from __future__ import annotations

import json
import math
import random
import subprocess
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from regraft import cli
from regraft.core.clock import Cost
from regraft_bench.rows import Row, Series, append, code, environment
from regraft_bench.studies import all_rows, find_rows
from regraft_bench.tracking.compare import (
    BETTER,
    CHANGED,
    EQUAL,
    NO_EVIDENCE,
    ROUNDS,
    VANISHED,
    WORSE,
    Limits,
    find_changes,
    relative_costs,
)
from regraft_bench.tracking.history import find_tracks, steps
from regraft_bench.tracking.shown import changes_sheet

RESULTS = Path(__file__).parents[2] / "results"
METHODS = ("plain", "naive", "weights", "fgmt", "gmt")


def measured(
    draw: random.Random,
    *,
    slower: float = 1.0,
    lost: float = 0.0,
    machine: float = 1.0,
    commit: str = "a" * 40,
    seeds: int = 2,
    turns: int = 6,
    noise: float = 0.03,
) -> list[Row]:
    """Rows as turns make them: `fgmt` alone is slower or less accurate; a machine's speed is everybody's and changes
    from turn to turn. Other work can only make a round longer."""
    found, here, own_code = [], environment(), code()
    for _ in range(turns):
        pace = machine * draw.uniform(1, 2)
        for seed, (number, method) in product(range(seeds), enumerate(METHODS)):
            own = method == "fgmt"
            base = (0.2 + 0.1 * number) * pace * (slower if own else 1.0) * draw.lognormvariate(0, noise)
            costs = [base * (1 + draw.expovariate(5)) for _ in range(9)]
            found.append(
                Row(
                    study="transfer",
                    scenario="toy",
                    method=method,
                    seed=seed,
                    config={"settings": {}, "method": {}},
                    values={"accuracy": 0.9 - 0.01 * seed - (lost if own else 0.0)},
                    series={ROUNDS: Series.over("round", range(1, 10), costs)},
                    cost={"training": Cost(1.0, 1.0)},
                    notes={},
                    failure=None,
                    environment=here,
                    code=replace(own_code, commit=commit, regraft=commit, changed=False),
                    time=f"2026-01-{1 + (commit > 'b'):02d}T00:00:{len(found):02d}+00:00",
                )
            )
    return found


def elsewhere(rows: list[Row], **changes: object) -> list[Row]:
    return [replace(row, environment=replace(row.environment, **changes)) for row in rows]


def alarms(before: list[Row], after: list[Row]) -> list[tuple[str, str]]:
    return [(c.method, c.quantity) for c in find_changes(before, after) if Limits(0.1, 0.005).is_exceeded_by(c)]


@pytest.mark.parametrize("trial", range(10))
def test_a_planted_slow_down_of_15_percent_is_found_and_nothing_else(trial):
    draw = random.Random(trial)
    assert alarms(measured(draw), measured(draw, slower=1.15)) == [("fgmt", "cost")]


@pytest.mark.parametrize("trial", range(10))
def test_a_planted_loss_of_a_point_is_found_and_nothing_else(trial):
    draw = random.Random(100 + trial)
    assert alarms(measured(draw), measured(draw, lost=0.01)) == [("fgmt", "error")]


def test_a_doubled_cost_of_matching_is_found_where_matching_is_a_small_part_of_a_method():
    def measure_again(row: Row, factor: float) -> Row:
        """The row as another run would have measured it, each phase within a tenth or so."""
        noise = {phase: draw.lognormvariate(0, 0.1) for phase in row.cost}
        for phase in noise.keys() & {"similarity", "assignment"}:
            noise[phase] *= factor
        cost = {phase: Cost(c.wall * noise[phase], c.cpu * noise[phase]) for phase, c in row.cost.items()}
        return replace(row, cost=cost)

    def tell(factor: float) -> set[tuple[str, str]]:
        changes = find_changes(rows, [measure_again(row, factor) for row in rows])
        return {(c.method, c.quantity) for c in changes if Limits(slowdown=1).is_exceeded_by(c)}

    draw, rows = random.Random(0), find_rows(str(RESULTS / "baseline"), RESULTS)
    assert tell(2.0) == {("every method", "cost of similarity"), ("every method", "cost of assignment")}
    assert tell(1.0) == set()


@pytest.mark.parametrize("trial", range(10))
def test_the_same_code_again_raises_no_alarm(trial):
    draw = random.Random(200 + trial)
    assert alarms(measured(draw), measured(draw)) == []


def test_a_slower_machine_is_no_regression():
    draw = random.Random(0)
    assert alarms(measured(draw), measured(draw, machine=3.0)) == []


def test_costs_of_different_machines_are_not_compared():
    draw = random.Random(0)
    other = elsewhere(measured(draw, slower=9), machine="another")
    assert {c.quantity for c in find_changes(measured(draw), other)} == {"error"}


def test_what_improved_is_better_and_no_alarm():
    draw = random.Random(0)
    found = find_changes(measured(draw), elsewhere(measured(draw, slower=0.7, lost=-0.02), device="cpu:0"))
    assert {(c.method, c.quantity): c.verdict for c in found if c.verdict != NO_EVIDENCE} == {
        ("fgmt", "cost"): BETTER,
        ("fgmt", "error"): BETTER,
    }


def test_one_seed_and_one_round_prove_nothing_and_say_so():
    draw = random.Random(0)
    few = {"seeds": 1, "turns": 1}
    found = find_changes(measured(draw, **few), elsewhere(measured(draw, slower=2, lost=0.1, **few), device="cpu:0"))
    assert {c.verdict for c in found} == {NO_EVIDENCE}
    assert all(c.low is None for c in found)
    assert "one measurement a side, which proves nothing" in " ".join(changes_sheet(found).notes)


def test_where_equal_code_gives_equal_bits_a_rise_of_one_seed_counts():
    draw = random.Random(0)
    before, after = measured(draw), measured(draw)
    after = [replace(r, values={"accuracy": 0.87}) if (r.method, r.seed) == ("fgmt", 0) else r for r in after]
    found = {c.method: c for c in find_changes(before, after) if c.quantity == "error"}
    assert found["fgmt"].verdict == CHANGED
    assert Limits(0.1, 0.005).is_exceeded_by(found["fgmt"])
    assert {c.verdict for name, c in found.items() if name != "fgmt"} == {EQUAL}
    other = find_changes(before, elsewhere(after, machine="another"))
    assert not any(Limits(0.1, 0.005).is_exceeded_by(c) for c in other)


def test_the_rounds_of_one_process_are_one_measurement():
    draw = random.Random(0)
    lucky = find_changes(measured(draw, turns=1, noise=0.0), measured(draw, turns=1, slower=1.3, noise=0.0))
    assert all(c.n == 2 for c in lucky if c.quantity == "cost")


def test_a_control_is_the_one_that_was_measured_next_to_it():
    draw = random.Random(0)
    rows = measured(draw, turns=3, seeds=1, noise=0.0)
    shares = [cost for row, cost in zip(rows, relative_costs(rows), strict=True) if row.method == "gmt"]
    assert shares == pytest.approx([3.0] * 3, rel=0.2)
    assert all(c is None for r, c in zip(rows, relative_costs(rows), strict=True) if r.method == "plain")


def alter(rows: list[Row], **values: float | None) -> list[Row]:
    """Rows of which seed 1 of fgmt has other values."""
    return [
        replace(row, values={**row.values, **values}) if (row.method, row.seed) == ("fgmt", 1) else row for row in rows
    ]


CURVE = {
    "validation": Series.over("step", (0, 1), (0.1, 0.8)),
    "trace [CPU s]": Series.over("step", (0,), (1,)),
}


def publish(rows: list[Row]) -> list[Row]:
    """Rows with more values, and a curve."""
    more = {"final": 0.8, "objective": 95.0, "diverged [step]": None, "peak_memory [bytes]": 1e9}
    return [replace(row, values={**row.values, **more}, series={**row.series, **CURVE}) for row in rows]


@pytest.mark.parametrize("without", ["method", "seed", "configuration"])
def test_a_run_that_only_the_first_side_has_is_red_and_a_new_one_is_not(without):
    draw = random.Random(0)
    before = measured(draw)
    after = {
        "method": [row for row in before if row.method != "fgmt"],
        "seed": [row for row in before if (row.method, row.seed) != ("fgmt", 1)],
        "configuration": [replace(r, config={"a": 1}) if r.method == "fgmt" else r for r in before],
    }[without]
    lost = [(c.method, c.quantity, c.verdict) for c in find_changes(before, after) if c.change is None]
    assert lost[0] == ("fgmt", "runs", VANISHED)
    assert alarms(before, after) == [("fgmt", "runs")]
    assert alarms(after, before) == ([("fgmt", "runs")] if without == "configuration" else [])


@pytest.mark.parametrize(
    ("name", "value", "quantity"),
    [
        ("final", 0.79, "final"),
        ("final", 0.81, "final"),
        ("objective", 96.0, "objective"),
        ("accuracy", 0.95, "error"),
        ("diverged [step]", 35.0, "diverged [step]"),
    ],
)
def test_where_equal_code_gives_equal_bits_every_value_counts_in_both_directions(name, value, quantity):
    rows = publish(measured(random.Random(0)))
    after = alter(rows, **{name: value})
    assert alarms(rows, after) == [("fgmt", quantity)]
    assert alarms(rows, elsewhere(after, machine="another")) == []


def test_points_of_curves_count_and_what_a_machine_decides_does_not():
    rows = publish(measured(random.Random(0)))
    curve = {
        "validation": Series.over("step", (0, 1), (0.2, 0.8)),
        "trace [CPU s]": Series.over("step", (0,), (9,)),
    }
    after = [replace(r, series={**r.series, **curve}) if r.method == "gmt" else r for r in rows]
    assert alarms(rows, after) == [("gmt", "validation by step")]
    assert alarms(rows, alter(rows, **{"peak_memory [bytes]": 2e9})) == []


@pytest.mark.parametrize("value", [None, math.nan])
@pytest.mark.parametrize(("name", "quantity"), [("accuracy", "error"), ("objective", "objective")])
def test_a_value_that_vanished_or_is_nan_is_told_on_every_machine(name, quantity, value):
    rows = publish(measured(random.Random(0)))
    after = alter(rows, **{name: value})
    assert alarms(rows, after) == [("fgmt", quantity)]
    assert alarms(rows, elsewhere(after, machine="another")) == [("fgmt", quantity)]
    assert {c.verdict for c in find_changes(rows, after) if c.quantity == quantity} == {EQUAL, VANISHED}


def test_unknown_machines_are_not_compared_unless_both_sides_ran_on_one():
    draw = random.Random(0)
    before, after = (
        elsewhere(rows, machine="unknown aarch64, 4 cores")
        for rows in (measured(draw), measured(draw, slower=2, lost=0.02, seeds=1))
    )
    kinds = {(c.method, c.quantity) for c in find_changes(before, after) if c.verdict not in (NO_EVIDENCE, EQUAL)}
    assert kinds == {(method, "runs") for method in METHODS}
    both = find_changes(before, after, one_machine=True)
    assert {c.quantity for c in both if c.method == "fgmt" and c.verdict in (WORSE, CHANGED)} == {
        "cost",
        "error",
    }


def test_a_run_that_began_to_fail_is_worse():
    draw = random.Random(0)
    failed = [replace(r, failure="diverged: x", values={}) if r.method == "fgmt" else r for r in measured(draw)]
    found = {(c.method, c.quantity): c for c in find_changes(measured(draw), failed)}
    assert found["fgmt", "error"].verdict == WORSE


def test_sides_without_anything_in_common_are_refused():
    draw = random.Random(0)
    with pytest.raises(ValueError, match="no run of the same"):
        find_changes(measured(draw), [replace(row, scenario="other") for row in measured(draw)])


@pytest.fixture
def results(tmp_path):
    draw = random.Random(0)
    for commit, how in (("a" * 40, {}), ("b" * 40, {"slower": 1.4})):
        for row in measured(draw, commit=commit, **how):
            append(tmp_path / "transfer" / "rows.jsonl", row)
    return tmp_path


def test_the_command_exits_1_with_a_message_that_names_what_is_worse(results, capsys):
    words = ["compare", "aaaa", "last", "--results", str(results)]
    assert cli.main(words) == 1
    assert "transfer, toy, fgmt: cost +4" in capsys.readouterr().out
    assert cli.main([*words, "--max-slowdown", "0.6"]) == 0
    assert cli.main(["compare", "aaaa", "aaaa", "--results", str(results)]) == 0


def test_runs_that_the_second_side_lacks_are_red_unless_that_is_allowed(results, tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    for row in find_rows("aaaa", results):
        if row.method in ("plain", "gmt"):
            append(few, row)
    words = ["compare", "aaaa", str(few), "--results", str(results)]
    assert cli.main(words) == 1
    assert "transfer, toy, fgmt: runs vanished" in capsys.readouterr().out
    assert cli.main([*words, "--allow-missing"]) == 0


def test_the_command_speaks_json(results, capsys):
    assert cli.main(["compare", "aaaa", "bbbb", "--results", str(results), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [(c["method"], c["quantity"]) for c in told["beyond"]] == [("fgmt", "cost")]


def test_what_one_can_do_is_said_with_what_is_worse(results, capsys):
    assert cli.main(["compare", "aaaa", "last", "--results", str(results)]) == 1
    told = capsys.readouterr().out
    assert "regraft against" in told
    assert "make baseline" in told


def test_the_committed_baseline_is_quiet_beside_itself_and_red_for_a_lost_point():
    rows = find_rows("baseline", RESULTS)
    assert alarms(rows, rows) == []
    worse = [
        replace(r, values={**r.values, "accuracy": r.values["accuracy"] - 0.01}) if r.method == "fgmt" else r
        for r in rows
    ]
    assert set(alarms(rows, worse)) == {("fgmt", "error")}
    assert set(alarms(rows, elsewhere(worse, machine="another"))) == {("fgmt", "error")}, "the same in every seed"
    assert {c.method for c in find_changes(rows, worse) if c.verdict == CHANGED} == {"fgmt"}


def test_two_kinds_of_machine_are_told_and_cost_no_alarm(tmp_path, capsys):
    draw = random.Random(0)
    sides = measured(draw), elsewhere(measured(draw, slower=3), machine="another, 64 cores")
    for name, rows in zip(("here", "there"), sides, strict=True):
        for row in rows:
            append(tmp_path / name / "transfer" / "rows.jsonl", row)
    assert cli.main(["compare", str(tmp_path / "here"), str(tmp_path / "there")]) == 0
    told = capsys.readouterr().out
    assert "nothing changed" in told
    assert "costs are not compared where they differ" in told
    assert "another, 64 cores" in told


def test_a_commit_without_rows_is_said(results, capsys):
    assert cli.main(["compare", "cccc", "last", "--results", str(results)]) == 2
    assert "no rows for 'cccc'" in capsys.readouterr().err


def test_history_keeps_older_code_and_marks_the_step(results, capsys):
    tracks = {(t.method, t.quantity): t for t in find_tracks(all_rows(results))}
    assert tracks["fgmt", "cost"].codes == ("a" * 10, "b" * 10)
    assert tracks["fgmt", "cost"].steps == (1,)
    assert tracks["gmt", "cost"].steps == ()
    assert tracks["fgmt", "error"].steps == ()
    assert cli.main(["history", "--results", str(results)]) == 1, "the last step is for the worse"
    assert "at bbbbbbbbbb" in capsys.readouterr().out
    assert cli.main(["history", "--results", str(results), "--max-slowdown", "0.6"]) == 0
    assert cli.main(["history", str(results / "transfer" / "rows.jsonl")]) == 1


def test_history_reports_no_step_of_costs_for_which_compare_has_no_evidence():
    draw = random.Random(0)
    rows = measured(draw, seeds=1, turns=1) + measured(draw, seeds=1, turns=1, commit="b" * 40, slower=1.5)
    assert {c.verdict for c in find_changes(rows[:5], rows[5:]) if c.is_cost} == {NO_EVIDENCE}
    assert all(track.steps == () for track in find_tracks(rows) if track.quantity == "cost")


def test_history_does_not_join_rows_of_other_packages():
    draw = random.Random(0)
    before = measured(draw)
    after = elsewhere(measured(draw, commit="b" * 40, slower=2), versions={"lapx": "0.11"})
    assert find_tracks(before + after) == []


@pytest.mark.parametrize("at", [3, 6])
def test_steps_are_where_the_level_changes_and_noise_is_none(at):
    draw = random.Random(at)
    level = [0.5 * (1.0 if number < at else 1.3) * draw.lognormvariate(0, 0.02) for number in range(9)]
    assert steps(level, "cost") == (at,)
    assert steps([0.5 * draw.lognormvariate(0, 0.02) for _ in range(9)], "cost") == ()


def test_costs_with_other_packages_are_named_and_not_compared(tmp_path, capsys):
    """As a baseline with lapx, and rows without it."""
    draw = random.Random(0)
    with_lapx = elsewhere(measured(draw), versions={"torch": "2.11", "lapx": "0.11"})
    without = elsewhere(measured(draw, slower=2), versions={"torch": "2.11"})
    assert "cost" not in {c.quantity for c in find_changes(with_lapx, without)}
    for name, rows in (("with", with_lapx), ("without", without)):
        for row in rows:
            append(tmp_path / name / "transfer" / "rows.jsonl", row)
    assert cli.main(["compare", str(tmp_path / "with"), str(tmp_path / "without")]) == 0
    assert "lapx 0.11 and none" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["renamed", "deleted"])
def test_one_scenario_that_is_renamed_or_deleted_does_not_pass(how, tmp_path, capsys):
    draw = random.Random(0)
    toy = measured(draw)
    other = [replace(row, scenario="other") for row in toy]
    after = {"renamed": toy + [replace(row, scenario="new name") for row in toy], "deleted": toy}[how]
    for name, rows in (("before", toy + other), ("after", after)):
        for row in rows:
            append(tmp_path / f"{name}.jsonl", row)
    assert cli.main(["compare", str(tmp_path / "before.jsonl"), str(tmp_path / "after.jsonl")]) == 1
    assert "transfer, other, fgmt: runs vanished" in capsys.readouterr().out


def test_a_commit_is_found_by_what_git_calls_it(tmp_path, monkeypatch, capsys):
    def git(*words: str) -> str:
        own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
        return subprocess.run(
            ["git", *own, *words], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    git("init", "-q")
    commits = []
    for number in range(3):
        git("commit", "-q", "--allow-empty", "-m", str(number))
        commits.append(git("rev-parse", "HEAD"))
    draw = random.Random(0)
    for commit, slower in ((commits[0], 1.0), (commits[2], 1.4)):
        for row in measured(draw, commit=commit, slower=slower):
            append(tmp_path / "rows" / "transfer" / "rows.jsonl", row)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "HEAD~2", "main", "--results", "rows"]) == 1
    assert f"regraft against {commits[0]} --scenario toy" in capsys.readouterr().out
    assert cli.main(["compare", "HEAD~1", "main", "--results", "rows"]) == 2
    assert commits[1][:10] in capsys.readouterr().err


def save_benches(path: Path, draw: random.Random, slower: float = 1.0, commit: str = "a" * 40) -> None:
    """A file as pytest-benchmark writes it."""
    rounds = {name: [draw.lognormvariate(-7, 0.02) * factor for _ in range(5)] for name, factor in
              (("test_sort", slower), ("test_sum[3]", 1.0))}  # fmt: skip
    benches = [
        {"name": name, "fullname": f"benches/test_own.py::{name}", "group": None, "params": None,
         "stats": {"min": min(times), "mean": sum(times) / 5, "rounds": 5, "data": times}}
        for name, times in rounds.items()
    ]  # fmt: skip
    saved = {
        "machine_info": {"node": "here", "python_version": "3.11.2", "cpu": {"brand_raw": "A CPU", "count": 2}},
        "commit_info": {"id": commit, "dirty": False, "time": "2026-01-01T00:00:00+00:00"},
        "benchmarks": benches, "datetime": f"2026-01-{1 + (commit > 'b'):02d}T00:00:00+00:00", "version": "5.1.0",
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved))


def test_benches_of_ones_own_are_compared_and_have_a_history(tmp_path, capsys):
    """Files of pytest-benchmark: one proves nothing, several runs do; a folder of them is a side."""
    draw = random.Random(0)
    for number in range(6):
        save_benches(tmp_path / "before" / f"{number}.json", draw)
        save_benches(tmp_path / "after" / f"{number}.json", draw, slower=1.3, commit="b" * 40)
    one = [str(tmp_path / side / "0.json") for side in ("before", "after")]
    assert cli.main(["compare", *one]) == 0
    assert "one measurement a side" in capsys.readouterr().out
    both = [str(tmp_path / side) for side in ("before", "after")]
    assert cli.main(["compare", *both]) == 1
    said = capsys.readouterr().out
    assert "pytest-benchmark, benches/test_own.py, test_sort: cost +" in said and "test_sum[3]: cost" not in said
    assert "make baseline" not in said
    assert cli.main(["history", *both]) == 1
    assert "at bbbbbbbbbb" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", '{"benchmarks": 3, "datetime": ""}'])
def test_another_json_file_is_refused_by_name(text, tmp_path, capsys):
    (tmp_path / "other.json").write_text(text)
    assert cli.main(["compare", str(tmp_path / "other.json"), "baseline"]) == 1
    assert "other.json: not pytest-benchmark's JSON" in capsys.readouterr().err
