"""Gradient assignment and fusion: every table and figure of the paper, and grids against a loop over points.

    pytest bench/bench_fusion.py --benchmark-only --scenario table-2 table-A14
    pytest bench/bench_fusion.py --benchmark-only -k grid

A table's row has the mean of its cells as accuracy, and in ``extra`` the median absolute difference to the
paper's cells and the controls. ``--cache`` keeps the trained networks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from regraft import results
from regraft.data import MissingData
from regraft.fusion import fuse_many
from regraft.fusion_pages import figure_document, table_document
from regraft.fusion_study import FIGURES, Study, paper_study
from regraft.fusion_tables import paper_tables
from regraft.grids import STRATEGIES, evaluate, lattice
from regraft.models import initialise, small_cnn
from regraft.report import Column
from regraft.results import Cost, Environment, Row


@dataclass(frozen=True)
class Scenario:
    """One table ("2", "A14") or figure ("F1") of the paper."""

    name: str
    table: str
    seeds: int = 1


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        *(Scenario(f"table-{number}", number) for number in paper_tables()),
        *(Scenario(f"figure-{number[1:]}", number) for number in FIGURES),
    )
}
DEFAULT = ("table-2",)
COLUMNS = (
    Column("method", lambda rows: rows["method"].iloc[0]),
    Column("mean of the cells", lambda rows: f"{rows['accuracy'].mean():.3f}"),
    Column("median difference", lambda rows: f"{rows['extra.median_absolute_difference'].mean():.3f}"),
    Column("CPU seconds", lambda rows: f"{rows['cost.cpu'].mean():.0f}"),
)


@pytest.fixture(scope="module")
def book(open_book):
    return open_book("fusion", COLUMNS)


@pytest.fixture(scope="session")
def study(data_root: Path, cache: Path | None, device: str, tmp_path_factory) -> Callable[[int], Study]:
    folder = cache or tmp_path_factory.mktemp("fusion")

    def made(seed: int) -> Study:
        if device != "cpu":
            return paper_study(data_root, folder, device, seed)
        return Study(data_root, folder, seed=seed)

    return made


def test_table(scenario, seed, benchmark, study, book, environment: Environment):
    config = results.plain_data({"table": scenario.table, "study": study(seed)})
    del config["study"]["data"], config["study"]["cache"]
    book.skip_finished("sum", scenario.name, seed, config, environment)
    make = figure_document if scenario.table in FIGURES else table_document
    began, cpu = time.perf_counter(), time.process_time()
    try:
        _, record, _ = benchmark.pedantic(make, args=(study(seed), scenario.table), rounds=1)
    except MissingData as problem:
        pytest.skip(str(problem))
    cost = Cost(time.perf_counter() - began, time.process_time() - cpu)
    cells = record["ours"] if "ours" in record else [v for p in record["lines"].values() for v in p.values()]
    book.add(
        Row(
            method="sum",
            scenario=scenario.name,
            seed=seed,
            accuracy=fmean(value for line in cells for value in line),
            phases={"all": cost},
            environment=environment,
            config=config,
            extra={
                key: record.get(key) for key in ("median_absolute_difference", "trend", "controls", "lines")
            },
        )
    )


# ---------------------------------------------------------------- a grid against a loop


def loop(model, sources, rows: Tensor, images: Tensor, labels: Tensor, batch_size: int) -> list[int]:
    """What one would write: the data in memory, one parameter set and one pass at a time."""
    stack, found = fuse_many(sources, rows), []
    with torch.inference_mode():
        for k in range(len(rows)):
            point, right = {name: tensor[k] for name, tensor in stack.items()}, 0
            for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
                right += int((functional_call(model, point, (x,)).argmax(1) == y).sum())
            found.append(right)
    return found


@pytest.mark.kernels
@pytest.mark.parametrize("strategies", [STRATEGIES, *((s,) for s in STRATEGIES)], ids=lambda s: "-or-".join(
    strategy.__name__ for strategy in s))  # fmt: skip
def test_grid(benchmark, device, strategies):
    """121 points of the CNN on 10,000 images: CPU seconds of the grid over those of a loop.

    The two alternate, and the loop has the batch size that is best for it of three.
    """
    generator = torch.Generator().manual_seed(0)
    model = small_cnn().to(device).eval()
    sources = [{n: t.to(device) for n, t in initialise(model, generator).items()} for _ in range(2)]
    images = torch.randn(10_000, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(0, 10, (10_000,), generator=generator).to(device)
    values = [0.0, 0.01, 0.1, 0.5, 1.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0]
    rows = lattice(values, values, lambda beta, alpha: (alpha, beta))
    clock = time.process_time if device == "cpu" else time.perf_counter

    def spent(run: Callable[[], Any]) -> tuple[float, Any]:
        began = clock()
        found = run()
        return clock() - began, found

    few = rows[:8]
    size = min(
        (250, 1000, 2500), key=lambda n: spent(lambda: loop(model, sources, few, images, labels, n))[0]
    )
    pairs = []

    def both() -> None:
        before = results.peak_memory(device)
        fast, grid = spent(lambda: evaluate(model, sources, rows, images, labels, strategies=strategies))
        memory = results.peak_memory(device) - before
        slow, right = spent(lambda: loop(model, sources, rows, images, labels, size))
        pairs.append((fast, slow, memory))
        assert sum(abs(a - b) for a, b in zip(grid.correct.tolist(), right, strict=True)) <= len(rows)

    benchmark.pedantic(both, rounds=2, iterations=1)
    ratios = [fast / slow for fast, slow, _ in pairs]
    benchmark.extra_info |= {
        "grid over loop": ratios, "seconds of the grid": [p[0] for p in pairs], "loop's batch size": size,
        "more memory than before (bytes)": [p[2] for p in pairs],
    }  # fmt: skip
    print(f"\ngrid over loop: {', '.join(f'{r:.2f}' for r in ratios)} (loop's batch size {size})")
