"""results/baseline is what `make baseline` would ask for today: otherwise CI compares nothing. Nothing is trained."""

from pathlib import Path

import pytest

from regraft_bench.rows import read_rows
from regraft_bench.studies import study
from regraft_bench.study import TUNING_SEED

BASELINE = Path(__file__).parents[2] / "results" / "baseline"
STUDIES = ("transfer", "fusion", "fast")
NOT_MEASURED: tuple[str, ...] = ()
"""Quick scenarios without rows: take a name out when `make baseline` has measured it."""
RENEW = "run `make baseline` on a quiet machine and commit results/baseline"


@pytest.mark.parametrize("name", STUDIES)
def test_the_configurations_of_the_baseline_are_todays(name):
    one = study(name)
    rows = [row for row in read_rows(BASELINE / name / "rows.jsonl") if row.seed != TUNING_SEED]
    kept = {(row.scenario, row.method, row.seed): row.config for row in rows}
    today = {
        (scenario.name, method.name, seed): [scenario.config(m) for m in method.candidates or (method,)]
        for scenario in one.select(one.quick)
        for method in scenario.methods
        for seed in range(scenario.seeds)
    }
    stale = sorted(key for key, config in kept.items() if config not in today.get(key, ()))
    assert not stale, f"of another configuration, or measured no more: {RENEW}"
    missing = sorted(key for key in today.keys() - kept.keys() if key[0] not in NOT_MEASURED)
    assert not missing, f"not measured yet: {RENEW}"
    assert not {key[0] for key in kept}.intersection(NOT_MEASURED), "measured now: take it out of NOT_MEASURED"
