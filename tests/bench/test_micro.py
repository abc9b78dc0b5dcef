"""The microbenches: one timer, contests whose contenders agree, scenarios that are well formed, rows, pages."""

from __future__ import annotations

import math
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from regraft.core.clock import Cost
from regraft.data import MissingData
from regraft.symmetry import trace
from regraft_bench import timing
from regraft_bench.contests import TIME, Contest, Timed, timed_methods
from regraft_bench.kernels import assignment
from regraft_bench.micro import STUDY, library, matching
from regraft_bench.micro.gpu import gpu_methods
from regraft_bench.micro.pages import SUMMARY
from regraft_bench.report.render import markdown, summary
from regraft_bench.report.tables import Table, by_method
from regraft_bench.run import run
from regraft_bench.study import RunPaths, Scenario
from regraft_bench.symmetry import proofs, zoo
from regraft_bench.symmetry.proofs import loaded_error
from regraft_bench.timing import BY_HAND, OURS, Contender, alternate

RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture(autouse=True)
def same_number_of_threads():
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


# ---------------------------------------------------------------- the timer


def test_contenders_take_turns():
    seen = []

    def taking(name):
        return Contender(lambda: (seen.append(name), time.sleep(2e-3)))

    found = alternate({"a": taking("a"), "b": taking("b")}, rounds=3, clock="wall")
    assert seen == ["a", "b"] * 4  # one to warm up
    assert all(len(timing.rounds) == 3 and timing.seconds >= 2e-3 for timing in found.values())


def test_short_calls_are_repeated_and_long_ones_end_early(monkeypatch):
    calls, now = {"short": 0, "long": 0}, [0.0]
    clock = SimpleNamespace(**dict.fromkeys(("perf_counter", "thread_time", "process_time"), lambda: now[0]))
    monkeypatch.setattr(timing, "time", clock)

    def take(name, seconds):
        calls[name] += 1
        now[0] += seconds

    contenders = {
        "short": Contender(lambda: take("short", 1e-5)),
        "long": Contender(lambda: take("long", 0.05)),
    }
    found = alternate(contenders, rounds=5, budget=0.01, clock="wall")
    assert calls["long"] == 1
    assert len(found["long"].rounds) == 1
    assert calls["short"] == 1 + 5 * 100
    assert found["short"].seconds == pytest.approx(1e-5)


def test_cpu_time_is_that_of_the_work_and_a_result_may_know_better():
    contenders = {
        "sleeps": Contender(lambda: time.sleep(0.01)),
        "says": Contender(lambda: 7.0, lambda result: {"answer": result}, lambda result: Cost(1.0, result)),
    }
    found = alternate(contenders, rounds=2)
    assert found["sleeps"].seconds < 5e-3 < found["sleeps"].median.wall
    assert found["says"].seconds == 7.0
    assert found["says"].values == {"answer": 7.0}


# ---------------------------------------------------------------- contests


def held(contest: Contest, place: RunPaths, tmp_path: Path, how: Timed | None = None):
    """One short round of a contest through the runner: rows by contender."""
    scenario = Scenario("tiny", timed_methods([contest]), how or Timed(rounds=1, budget=0.1), seeds=1)
    rows = list(run(STUDY, [scenario], place=place, rows=tmp_path / "rows.jsonl"))
    assert not [row.failure for row in rows if row.failure]
    assert [row.method for row in rows] == list(contest.contenders)
    assert all(row.values[TIME] > 0 and row.environment.threads == 1 for row in rows)
    return {row.method: row for row in rows}


@pytest.mark.parametrize("kind", assignment.MATRIX_KINDS)
def test_solvers_find_the_same_optimum(kind, place, tmp_path):
    rows = held(assignment.contest(kind, 24), place, tmp_path)
    errors = [row.values["relative error"] for name, row in rows.items() if name != BY_HAND]
    assert max(map(abs, errors)) < 1e-5


def test_matching_is_not_bought_with_the_objective(place, tmp_path):
    rows = held(matching.mlp_contest(24), place, tmp_path)
    ours = rows[OURS].values["objective"]
    assert all(ours >= row.values["objective"] * (1 - 1e-6) for row in rows.values())


def test_a_grid_gives_the_loop_s_answers(place, tmp_path):
    rows = held(library.grid(16), place, tmp_path)
    difference = rows[OURS].values["right answers"] - rows[BY_HAND].values["right answers"]
    assert abs(difference) <= 2  # of 121 points; ties in float32


def test_the_recorder_adds_little_to_a_step(place, tmp_path):
    rows = held(library.RECORDER, place, tmp_path)
    assert set(rows) == set(library.RECORDER.contenders)


def test_contenders_of_one_contest_share_a_run_and_are_compared_with_by_hand(place, tmp_path):
    made = []

    def make(setting):
        made.append(setting.seed)
        return {BY_HAND: Contender(lambda: sum(range(40_000))), OURS: Contender(lambda: sum(range(10_000)))}

    rows = held(Contest("sums", (BY_HAND, OURS), make, bytes=10**6), place, tmp_path, Timed(rounds=3))
    assert made == [0]
    (sheet,) = summary(STUDY, rows.values())
    cells = {line[0]: dict(zip(sheet.heading, line, strict=True)) for line in sheet.lines}
    assert cells[BY_HAND]["ratio to by hand"] == "1"
    share = rows[OURS].values[TIME] / rows[BY_HAND].values[TIME]
    assert float(cells[OURS]["ratio to by hand"]) == pytest.approx(share, rel=1e-2)
    assert rows[OURS].values["rate [GB/s]"] == pytest.approx(1 / rows[OURS].values[TIME], rel=1e-6)
    assert len(rows[OURS].series["time by round [ms]"].points()) == 3


# ---------------------------------------------------------------- what is no contest


def test_the_gpu_scenario_needs_a_gpu(place, tmp_path):
    for method in gpu_methods():
        scenario = Scenario("gpu", (method,), None, seeds=1)
        with pytest.raises(MissingData, match="CUDA"):
            list(run(STUDY, [scenario], place=place, rows=tmp_path / "rows.jsonl"))


def test_models_are_proved_in_processes_of_their_own(place, tmp_path):
    (scenario,) = STUDY.select(["symmetry-torchvision"])
    one = replace(scenario, methods=(scenario.method("squeezenet1_1"),))
    (row,) = run(STUDY, [one], place=place, rows=tmp_path / "rows.jsonl")
    assert row.failure is None
    assert row.values["error"] < 1e-9
    assert row.values["moved"] > 0.9
    assert 0.5 < row.values["weights moved on both axes"] < 1
    assert row.values["error with one axis left out"] > 1e-6
    assert set(row.cost) == {"trace", "verify", "check"}
    late = replace(one, settings=replace(one.settings, limit=0.01))
    (row,) = run(STUDY, [late], place=place, rows=tmp_path / "rows.jsonl")
    assert row.failure.startswith("TimeoutError: torchvision/squeezenet1_1")


# ---------------------------------------------------------------- the study


def test_the_names_of_torchvisions_models_are_all_of_them():
    from torchvision import models

    assert list(zoo.TORCHVISION) == models.list_models(module=models)


def test_the_proof_loads_a_model_that_wants_its_versions():
    model, inputs = zoo.make_model("torchvision/mnasnet0_5")
    error, control = loaded_error(trace(model, inputs), lambda: zoo.make_model("torchvision/mnasnet0_5")[0], inputs)
    assert error < 1e-9 < control


def test_a_proof_that_was_killed_says_so(monkeypatch):
    ended = subprocess.CompletedProcess([], -9, "", "a warning")
    monkeypatch.setattr(proofs.subprocess, "run", lambda *args, **how: ended)
    with pytest.raises(RuntimeError, match="toy: the process was ended by signal 9"):
        proofs._measure("toy", SimpleNamespace(settings=proofs.Proof()))


def test_scenarios_are_well_formed():
    names = [scenario.name for scenario in STUDY.scenarios]
    assert len(set(names)) == len(names)
    assert set(STUDY.quick) <= set(names)
    for scenario in STUDY.scenarios:
        methods = {method.name: scenario.config(method) for method in scenario.methods}
        assert len(methods) == len(scenario.methods), scenario.name
        for config in methods.values():
            assert config["method"].get("beside", next(iter(methods))) in methods, scenario.name
    listed = {name for table in STUDY.tables for name in table.scenarios}
    assert set(names) <= listed


def test_pages_are_made_of_the_committed_rows():
    from regraft_bench.report.render import load_rows

    rows = load_rows(RESULTS, STUDY)
    text = markdown(STUDY, rows)
    for scenario in {row.scenario for row in rows}:
        assert f"### {scenario}\n" in text
    proved = [row for row in rows if row.scenario == "symmetry-torchvision"]
    assert proved
    assert all(row.values["error"] < 1e-9 for row in proved if not row.failure)
    assert not any(math.isnan(value) for row in rows for value in row.values.values() if value is not None)


def test_a_row_without_by_hand_is_compared_with_nothing(place, tmp_path):
    contest = Contest("alone", (OURS,), lambda setting: {OURS: Contender(lambda: None)})
    rows = held(contest, place, tmp_path)
    (sheet,) = Table("t", "t", ("tiny",), by_method(SUMMARY)).make_sheets(list(rows.values()))
    assert sheet.lines[0][-1] == "–"
