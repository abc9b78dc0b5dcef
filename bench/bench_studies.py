"""Every study by the one runner: an item a scenario, which measures all of its methods and seeds.

pytest bench --benchmark-only
pytest bench --benchmark-only --study transfer --scenario mnist-mlp-512 cifar10-conv6 --seeds 3 --resume
"""

from __future__ import annotations

import pytest

from conftest import MEASURED
from regraft.data import MissingData
from regraft_bench import session
from regraft_bench.run import is_crash


def test_scenario(benchmark, chosen, options, place, pytestconfig):
    study, scenario = chosen
    try:
        rows = benchmark.pedantic(session.measure, (study, scenario, options, place), rounds=1, iterations=1)
    except MissingData as missing:
        pytest.skip(str(missing))
    pytestconfig.stash[MEASURED].setdefault(study.name, []).extend(rows)
    failures = [f"{row.method}, seed {row.seed}: {row.failure}" for row in rows if is_crash(row)]
    assert not failures, "; ".join(failures)
