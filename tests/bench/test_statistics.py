"""The statistics of tables, claims and comparisons, computed by hand: no committed number is needed to check them.

For three seeds Student's t has two degrees of freedom, where p = 1 - t / sqrt(t^2 + 2).
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from regraft.core.clock import Cost
from regraft.finetuning.recorder import Recorder
from regraft.training.loop import Epoch, Training
from regraft_bench.fusion import two_tasks
from regraft_bench.report.claims import (
    CONSISTENT,
    INCONCLUSIVE,
    NO_WORSE,
    NOT_SUPPORTED,
    SUPPORTED,
    PairedTest,
)
from regraft_bench.report.tables import Comparison, compare_methods, groups, mean, share_of_plain, spread
from regraft_bench.rows import Row, code, environment
from regraft_bench.run import best
from regraft_bench.study import Method
from regraft_bench.tracking.compare import BETTER, NO_EVIDENCE, WORSE, find_changes
from regraft_bench.tracking.history import find_tracks
from regraft_bench.transfer.methods.ensembles import evaluate_together
from regraft_bench.transfer.methods.transfers import measure_start


def row(method: str, seed: int, *, seconds: float = 1.0, **values: float) -> Row:
    config = {"settings": {}, "method": {}}
    cost = {"training": Cost(seconds, seconds), "evaluation": Cost(99.0, 99.0)}
    return Row(
        "study", "scenario", method, seed, config, values, {}, cost, {}, None, environment(), code(),
        time="2026-01-01T00:00:00+00:00",
    )  # fmt: skip


def accuracies(method: str, by_seed: dict[int, float]) -> list[Row]:
    return [row(method, seed, accuracy=value) for seed, value in by_seed.items()]


# ---------------------------------------------------------------- tables and claims


def test_a_paired_t_test_of_three_seeds():
    """Differences 0.01, 0.02, 0.03: mean 0.02, deviation 0.01, t = 0.02 / (0.01 / sqrt(3)) = sqrt(12)."""
    rows = accuracies("a", {0: 0.51, 1: 0.62, 2: 0.73}) + accuracies("b", {0: 0.5, 1: 0.6, 2: 0.7})
    comparison = compare_methods(rows, "a", "b")
    assert comparison.n == 3 and comparison.difference == pytest.approx(0.02)
    assert comparison.p == pytest.approx(1 - math.sqrt(12 / 14))
    opposite = compare_methods(rows, "b", "a")
    assert opposite.difference == pytest.approx(-0.02) and opposite.p == pytest.approx(comparison.p)


def test_seeds_are_paired_whatever_their_order_and_others_are_left_out():
    rows = accuracies("a", {3: 0.9, 0: 0.51, 1: 0.62, 2: 0.73})
    rows += accuracies("b", {2: 0.7, 0: 0.5, 4: 0.1, 1: 0.6})
    comparison = compare_methods(rows, "a", "b")
    assert comparison.n == 3 and comparison.difference == pytest.approx(0.02)
    assert comparison.p == pytest.approx(1 - math.sqrt(12 / 14))


@pytest.mark.parametrize(
    ("difference", "p", "verdict", "no_worse"),
    [
        (0.1, 0.049, SUPPORTED, SUPPORTED),
        (-0.1, 0.049, NOT_SUPPORTED, NOT_SUPPORTED),
        (0.1, 0.05, INCONCLUSIVE, CONSISTENT),
        (-0.1, 0.05, INCONCLUSIVE, CONSISTENT),
        (0.1, math.nan, INCONCLUSIVE, INCONCLUSIVE),
    ],
)
def test_a_claim_is_judged_at_five_percent(difference, p, verdict, no_worse):
    comparison = Comparison(3, difference, p)
    assert (PairedTest().verdict(comparison), NO_WORSE.verdict(comparison)) == (verdict, no_worse)


def test_a_mean_of_three_seeds_and_its_deviation():
    assert mean([0.1, 0.2, 0.6]) == "0.300"
    assert spread([0.1, 0.2, 0.6]) == "0.300 ± 0.265"  # sqrt((0.04 + 0.01 + 0.09) / 2)


def test_shares_of_plain_training_are_paired_by_seed_and_leave_evaluation_out():
    """1/2 and 8/4: their mean is 1.25, where the ratio of the means is 1.5."""
    rows = [
        row("a", 0, seconds=1),
        row("a", 1, seconds=8),
        row("plain", 1, seconds=4),
        row("plain", 0, seconds=2),
    ]
    assert share_of_plain(groups(rows)["a"]) == "125.0%"


def test_of_equal_candidates_the_first_is_taken():
    tried = [(Method(name, print), row(name, 0, score=s)) for name, s in zip("abcd", (0.1, 0.7, 0.7, 0.3), strict=True)]
    assert best(tried, "score").name == "b"


# ---------------------------------------------------------------- comparisons over time


def costs(ratios: dict[str, tuple[float, ...]]) -> list[Row]:
    """Rows whose costs are these multiples of plain training's, seed by seed."""
    plain = [row("plain", seed, seconds=2.0) for seed in range(3)]
    own = [row(name, seed, seconds=2 * r) for name, own in ratios.items() for seed, r in enumerate(own)]
    return plain + own


def test_an_interval_of_three_seeds_widened_by_the_number_of_comparisons():
    """Two methods: 97.5 % each (Bonferroni), where t is q sqrt(2 / (1 - q^2)) for q = 0.975.

    Logarithms of a's costs rise by 0.1, 0.2, 0.3: mean 0.2, deviation 0.1.
    """
    after = costs({"a": tuple(math.exp(0.1 * (seed + 1)) for seed in range(3)), "b": (0.5, 0.5, 0.5)})
    found = {c.method: c for c in find_changes(costs({"a": (1, 1, 1), "b": (1, 1, 1)}), after) if c.quantity == "cost"}
    half = 0.975 * math.sqrt(2 / (1 - 0.975**2)) * 0.1 / math.sqrt(3)
    a, b = found["a"], found["b"]
    assert (a.n, a.change, a.low, a.high) == pytest.approx((3, *map(math.expm1, (0.2, 0.2 - half, 0.2 + half))))
    assert (a.before, a.after) == pytest.approx((1, math.exp(0.2)))
    assert a.verdict == NO_EVIDENCE and b.verdict == BETTER and b.change == pytest.approx(-0.5)


@pytest.mark.parametrize(("deviation", "verdict"), [(0.07, WORSE), (0.09, NO_EVIDENCE)])
def test_a_verdict_needs_the_whole_interval_on_one_side(deviation, verdict):
    """For 95 % and three seeds t is 4.303: half of the interval is 2.48 deviations; the mean is 0.2."""
    after = costs({"a": tuple(math.exp(0.2 + k * deviation) for k in (-1, 0, 1))})
    (change,) = (c for c in find_changes(costs({"a": (1, 1, 1)}), after) if c.quantity == "cost")
    assert change.verdict == verdict


def test_history_has_the_median_of_costs_and_the_mean_of_errors():
    rows = []
    for number, ratios in enumerate([(1.0, 2.0, 9.0), (1.0, 1.5, 9.0)]):
        for one in costs({"a": ratios}):
            values = {"accuracy": {0: 0.9, 1: 0.8, 2: 0.4}[one.seed]}
            own = replace(one.code, commit=str(number) * 40, regraft=str(number), changed=False)
            rows.append(replace(one, values=values, code=own, time=f"2026-01-0{number + 1}T00:00:00+00:00"))
    tracks = {(t.method, t.quantity): t.values for t in find_tracks(rows)}
    assert tracks["a", "cost"] == pytest.approx((2.0, 1.5))
    assert tracks["a", "error"] == pytest.approx((0.3, 0.3))


# ---------------------------------------------------------------- what a row's numbers are


def test_step_0_is_not_deployed_once_a_step_was_made():
    """The start answers everything right, and the first step spoils it."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    batch = [(torch.eye(2), torch.arange(2))]
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        recorder = Recorder(model, validation=batch, test=batch)
        model[0].weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    recorder.after_step()
    start, last = recorder.finish().deployments
    assert (start.scores.top1, last.state_step, last.scores.top1) == (1.0, 1, 0.0)


def test_a_start_is_measured_by_the_first_and_the_last_epoch_and_delta_over_the_start(tmp_path):
    def training(*accuracies: float) -> Training:
        rows = (Epoch(epoch, Cost(epoch, epoch), 0.0, None, a) for epoch, a in enumerate(accuracies))
        return Training({"w": torch.tensor([3.0, 14.0])}, tuple(rows))

    setting = SimpleNamespace(
        tuning=False, settings=SimpleNamespace(subsequent="recipe"), device="cpu", method=Method("m", print),
        source_start={"w": torch.tensor([3.0, 4.0]), "buffer": torch.tensor(100.0)},
        source=training(0.1, 0.2, 0.7), parameters=lambda theta: {"w": theta["w"]},
        learn=lambda purpose, start, recipe, order: training(0.3, 0.8, 0.5),
    )  # fmt: skip
    measured = measure_start(setting, {}, {"gradients": Cost(7.0, 5.0), "evaluation": Cost(99.0, 99.0)}, {})
    assert measured.values["delta_ratio"] == pytest.approx(10 / 5)
    assert (measured.values["source"], measured.values["accuracy"], measured.values["final"]) == (
        0.7,
        0.3,
        0.5,
    )
    assert measured.series["subsequent"].values == (0.3, 0.8, 0.5)
    assert measured.series["subsequent cost [CPU s]"].values == (5.0, 6.0, 7.0)


def test_how_far_two_trainings_moved_is_over_their_start(monkeypatch):
    model = nn.Linear(1, 2, bias=False)
    monkeypatch.setattr(two_tasks, "measure_sums", lambda *_: torch.tensor([0.5, 0.2, 0.4]))
    setting = SimpleNamespace(
        settings=SimpleNamespace(evaluated_on="test", scale="large"), theta_a={}, theta_b={}, tasks=("A", "B"),
        images=lambda *_: None, model=model, start=lambda: {"weight": torch.tensor([[3.0], [4.0]])},
        gradients=({"weight": torch.tensor([[6.0], [8.0]])}, {"weight": torch.tensor([[0.0], [20.0]])}),
        training_a=SimpleNamespace(cost=Cost()), training_b=SimpleNamespace(cost=Cost()),
    )  # fmt: skip
    values = two_tasks.measure_diagonal(setting).values
    assert (values["delta_ratio_a"], values["delta_ratio_b"], values["delta_ratio"]) == (2, 4, 3)
    assert values["accuracy"] == pytest.approx(0.4)
    assert [values[name] for name in ("own_a", "other_a", "own_b", "other_b")] == pytest.approx([0.5, 0.2, 0.2, 0.5])


def test_gaps_of_calibration_do_not_cancel():
    """Sure by 0.9 and wrong, by 0.6 and right: (0.9 + 0.4) / 2."""
    probabilities = torch.tensor([[[0.9, 0.1], [0.6, 0.4]]], dtype=torch.float64)
    values = evaluate_together(probabilities, torch.tensor([1, 0]))
    assert values["calibration error"] == pytest.approx(0.65)
    assert values["nll [nats]"] == pytest.approx(-(math.log(0.1) + math.log(0.6)) / 2)
