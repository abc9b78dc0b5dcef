"""FAST beside every fine-tuning baseline and beside plain training: one row a scenario, method and seed.

    pytest bench/bench_finetune.py --benchmark-only
    pytest bench/bench_finetune.py --benchmark-only --scenario fashion-mnist --seeds 3

``plain`` trains a fresh network on the target task. A row's accuracy is the deployed one at the end of the run; area is
that of the ADP curve; source accuracies are what is left of the task that the network came from. Scenarios are those of
`regraft.finetune_scenarios`; `regraft reproduce fast` draws the paper's figures from the same runs. The last bench here
is what the recorder adds to a training step, evaluation apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from regraft import finetune, finetune_runs, models, results
from regraft.clock import Clock
from regraft.data import MissingData
from regraft.deployment import Recorder
from regraft.finetune_runs import Method
from regraft.finetune_scenarios import DEFAULT, SCENARIOS, conv3
from regraft.report import Column, mean, seconds, spread
from regraft.results import Row

__all__ = ["DEFAULT", "SCENARIOS"]

ROOT = Path(__file__).parents[1]


def _rates(rows) -> str:
    return ", ".join("–" if rate is None else f"{rate:g}" for rate in rows["extra.own_config.rates"].iloc[0])


COLUMNS = (
    Column("method", lambda rows: rows["method"].iloc[0]),
    Column("rates (head, body)", _rates),
    Column("seeds", lambda rows: str(len(rows))),
    Column("area (ADP)", lambda rows: spread(rows["extra.area"])),
    Column("accuracy at the end", lambda rows: spread(rows["accuracy"])),
    Column("source before", lambda rows: mean(rows["extra.source_start"], "{:.3f}")),
    Column("source at the end", lambda rows: spread(rows["extra.source_end"])),
    Column("distance", lambda rows: mean(rows["extra.distance"], "{:.2f}")),
    Column("CPU seconds", lambda rows: seconds(rows["cost.cpu"])),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every scenario has methods of its own, so that they are parametrised together."""
    if "tuned" in metafunc.fixturenames:
        asked = metafunc.config.getoption("seeds")
        cases = [
            pytest.param(scenario, method, number, id=f"{name}-seed{number}-{method.name}")
            for name, scenario in SCENARIOS.items()
            for method in scenario.methods
            for number in range(scenario.seeds if asked is None else asked)
        ]
        metafunc.parametrize(("scenario", "tuned", "number"), cases)


@pytest.fixture(scope="module")
def book(open_book):
    return open_book("finetune", COLUMNS)


@pytest.fixture(scope="module")
def plain() -> dict[tuple[str, int], Row]:
    """Rows of plain training by scenario and seed: every other row says what that cost and reached."""
    return {}


@pytest.fixture(scope="module")
def folder(cache) -> Path:
    """Source networks and tuned rates are kept: they are the same for all methods and seeds."""
    return (cache or ROOT / ".cache") / "finetune"


def test_fine_tuning(benchmark, book, plain, folder, environment, data_root, scenario, tuned, number):
    book.skip_finished(tuned.name, scenario.name, number, finetune_runs.config(scenario), environment)

    def run(method: Method) -> Row:
        places = {"cache": folder, "root": data_root}
        rates = finetune_runs.choose_rates(scenario, method, device=environment.device, **places)
        finetune_runs.pretrained(scenario.origin, data_root, folder, environment.device)
        results.forget_peak_memory(environment.device)
        runner = benchmark.pedantic if method is tuned else _call
        return runner(
            finetune_runs.run,
            args=(scenario, method, rates),
            kwargs={"seed": number, "environment": environment, **places},
        )

    benchmark.group = scenario.name
    key = scenario.name, number
    try:
        if tuned.name == "plain":
            plain[key] = run(tuned)
        elif key not in plain and "plain" in {method.name for method in scenario.methods}:
            plain[key] = run(scenario.method("plain"))
        row = plain[key] if tuned.name == "plain" else run(tuned)
    except MissingData as missing:
        pytest.skip(str(missing))
    if key in plain:
        row = replace(row, plain=plain[key].cost, plain_accuracy=plain[key].accuracy)
    benchmark.extra_info.update(area=row.extra["area"], accuracy=row.accuracy, cpu_seconds=row.cost.cpu)
    book.add(row)


def _call(work: Callable[..., Row], args: tuple, kwargs: dict) -> Row:
    return work(*args, **kwargs)


def test_recorder(benchmark, device):
    """What `after_step` adds to a training step, evaluation apart.

    Validations are some 0.2 of the steps of a run of 200; at worst each keeps a copy of the state.
    """
    torch.manual_seed(0)
    model = conv3(10).to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(finetune.param_groups(model), momentum=0.9)
    images, labels = torch.randn(100, 3, 32, 32, device=device), torch.arange(10, device=device).repeat(10)
    few = [(images[:10], labels[:10])]
    recorder = Recorder(model, validation=few, test=few, checkpoints=(1,), validate_at=lambda: iter((1,)))
    recorder.after_step()  # nothing is due from here on

    def step() -> None:
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()

    step_seconds = _each(step, 10, device)
    copy_seconds = _each(lambda: models.state(model), 100, device)
    benchmark.pedantic(recorder.after_step, rounds=20, iterations=1000)
    call_seconds = (
        benchmark.stats.stats.median if benchmark.enabled else _each(recorder.after_step, 1000, device)
    )
    added = (call_seconds + 0.2 * copy_seconds) / step_seconds
    benchmark.extra_info.update(step=step_seconds, call=call_seconds, copy=copy_seconds, added=added)
    assert added < 0.05


def _each(work: Callable[[], object], count: int, device: str) -> float:
    """Seconds of one call, the shortest of three tries."""
    tries = []
    for _ in range(3):
        clock = Clock()
        with clock.phase("work", device):
            for _ in range(count):
                work()
        tries.append(clock.wall["work"] / count)
    return min(tries)
