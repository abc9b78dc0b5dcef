"""Transfer beside plain training: one run, and one row, a scenario, seed and method.

    pytest bench --benchmark-only --scenario digits-mlp mnist-mlp-512 --seeds 3

``plain`` trains the target's own start; the other methods move the source's path to that start without
training it, keep the step that is best on validation, and are then trained on. Reported accuracies are on
the test split. Tracing the network's symmetry, once for all methods and seeds, is reported apart
(``extra.trace``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from regraft.symmetry import PermutationSpec, trace
from torch import nn

from regraft import learning_transfer, report, results
from regraft.clock import Clock
from regraft.data import Dataset, MissingData, load
from regraft.evaluation import accuracy
from regraft.models import Tensors, build, new_head, state
from regraft.results import Cost, Environment, Point, Row
from regraft.training import EpochRow, Recipe, Training, train
from regraft.trajectory import Trajectory
from scenarios import DEFAULT, SCENARIOS, Scenario, Task

__all__ = ["DEFAULT", "METHODS", "SCENARIOS"]

METHODS = ("plain", *learning_transfer.METHODS)
EVALUATION_BATCH = 500


@dataclass(frozen=True, eq=False)
class Pair:
    """Source and target of one scenario and seed; everything is made when it is first asked for, and once."""

    scenario: Scenario
    seed: int
    environment: Environment
    data_root: Path
    cache: Path | None

    @property
    def device(self) -> str:
        return self.environment.device

    def generator(self, *purpose: str) -> torch.Generator:
        """A stream of random numbers of its own for every purpose, the same in every run."""
        return torch.Generator().manual_seed(int(results.digest([self.seed, *purpose])[:15], 16))

    def load(self, task: Task) -> Dataset:
        return load(task.data, root=self.data_root, classes=task.classes, seed=self.seed)

    @cached_property
    def data(self) -> Dataset:
        return self.load(self.scenario.task)

    @cached_property
    def pretraining_data(self) -> Dataset | None:
        return self.scenario.pretraining and self.load(self.scenario.pretraining.task)

    def load_data(self) -> None:
        """Raise MissingData, which says what is missing and how to get it, before any work."""
        _ = self.data, self.pretraining_data

    def prepare_transfer(self) -> None:
        """Train and trace what every method needs, before its clock starts."""
        _ = self.plain, self.path, self.traced

    def train(
        self, purpose: str, start: Tensors, data: Dataset, recipe: Recipe, *, model: nn.Module, order: str
    ) -> Training:
        """Train with the data order that ``order`` stands for; under ``--cache`` an interrupted run goes on."""
        name = results.digest([results.setup(config(self.scenario), self.environment), self.seed, purpose])
        return train(
            model,
            start,
            data,
            recipe,
            generator=self.generator("order", order),
            device=self.device,
            test=True,
            checkpoint=self.cache and self.cache / f"{name}.safetensors",
        )

    @cached_property
    def initial(self) -> dict[str, tuple[nn.Module, Tensors]]:
        """Model and values of source and target before the training that is transferred."""
        return {role: self._initial(role) for role in ("source", "target")}

    def _initial(self, role: str) -> tuple[nn.Module, Tensors]:
        scenario = self.scenario
        model = build(lambda: scenario.model(**scenario.arguments), self.generator("values", role))
        start = {name: tensor.to(self.device) for name, tensor in state(model).items()}
        model = model.to(self.device)
        if scenario.pretraining is None:
            return model, start
        recipe = scenario.pretraining.recipe
        trained = self.train(
            f"{role} pretraining",
            start,
            self.pretraining_data,
            recipe,
            model=model,
            order=f"{role} pretraining",
        )
        return new_head(model, trained.tensors, self.data.num_classes, self.generator("head", role))

    @property
    def model(self) -> nn.Module:
        return self.initial["target"][0]

    @property
    def target_start(self) -> Tensors:
        return self.initial["target"][1]

    def learn(self, purpose: str, start: Tensors, recipe: Recipe, *, order: str) -> Training:
        """Train on the scenario's own task."""
        return self.train(purpose, start, self.data, recipe, model=self.model, order=order)

    @cached_property
    def source(self) -> Training:
        return self.learn("source", self.initial["source"][1], self.scenario.recipe, order="source")

    @cached_property
    def plain(self) -> Training:
        return self.learn("target", self.target_start, self.scenario.recipe, order="target")

    @property
    def plain_cost(self) -> Cost:
        return Cost(self.plain.seconds, self.plain.cpu_seconds)

    @cached_property
    def path(self) -> Trajectory:
        start, end = self.initial["source"][1], self.source.tensors
        return Trajectory.linear(start, end, self.scenario.steps, self.scenario.schedule)

    @cached_property
    def traced(self) -> tuple[PermutationSpec, Cost]:
        clock = Clock()
        with clock.phase("trace"):
            images, _ = next(iter(self.data.validation.batches(2)))
            spec = trace(self.model, (images,))
        return spec, Cost(clock.wall["trace"], clock.cpu["trace"])

    def transfer(self, method: str) -> learning_transfer.Transfer:
        scenario = self.scenario
        return learning_transfer.transfer(
            self.model,
            self.path,
            self.target_start,
            self.data.train.batches(
                scenario.recipe.batch_size,
                generator=self.generator("gradients"),
                device=self.device,
                drop_last=True,
            ),
            method,
            spec=self.traced[0],
            target_end=self.plain.tensors if method == "oracle" else None,
            validation=self.data.validation.batches(EVALUATION_BATCH, device=self.device),
            gradient_batches=scenario.gradient_batches,
            bn_batches=scenario.bn_batches,
            generator=self.generator("sweeps"),
        )

    def test_accuracy(self, tensors: Tensors) -> float:
        return accuracy(self.model, tensors, self.data.test.batches(EVALUATION_BATCH, device=self.device))


def config(scenario: Scenario) -> Mapping[str, Any]:
    return results.plain_data(scenario)


def curve(history: Sequence[EpochRow], before: Cost) -> list[Point]:
    """A training's test accuracy by epoch, after ``before`` was paid."""
    return [Point(e.epoch, before + Cost(e.seconds, e.cpu_seconds), e.test_accuracy) for e in history]


def measure_plain(pair: Pair, benchmark: Any) -> Row:
    """Train the target's own start."""
    start, data = pair.target_start, pair.data
    results.forget_peak_memory(pair.device)
    trained = benchmark.pedantic(lambda: pair.plain, rounds=1)
    return row_of(
        pair,
        "plain",
        accuracy=trained.history[-1].test_accuracy,
        phases={"training": pair.plain_cost},
        curve=curve(trained.history, Cost(0.0, 0.0)),
        peak_memory=results.peak_memory(pair.device),
        extra={"parameters": sum(t.numel() for t in start.values()), "images": len(data.train)},
    )


def measure_transfer(pair: Pair, method: str, benchmark: Any) -> Row:
    """Transfer by one method, then train on."""
    pair.prepare_transfer()
    results.forget_peak_memory(pair.device)
    moved = benchmark.pedantic(pair.transfer, args=(method,), rounds=1)
    peak = results.peak_memory(pair.device)
    phases = Cost.by_phase(moved.seconds, moved.cpu_seconds)
    if method == "oracle":  # it knows the answer: the training that the others are to save is its price
        phases["training"] = pair.plain_cost
    row = row_of(
        pair,
        method,
        accuracy=pair.test_accuracy(moved.params),
        phases=phases,
        best_step=moved.best_step,
        accuracy_by_step=moved.accuracies,
        peak_memory=peak,
        extra={"trace": pair.traced[1], "gradients": moved.gradients, "objectives": moved.objectives},
    )
    after = pair.learn(f"after {method}", moved.params, pair.scenario.subsequent, order="subsequent")
    return replace(row, curve=curve(after.history, row.cost))


def row_of(pair: Pair, method: str, **measured: Any) -> Row:
    return Row(
        method=method,
        scenario=pair.scenario.name,
        seed=pair.seed,
        environment=pair.environment,
        config=config(pair.scenario),
        plain=pair.plain_cost,
        plain_accuracy=pair.plain.history[-1].test_accuracy,
        **measured,
    )


@pytest.fixture(scope="module")
def book(open_book):
    return open_book("transfer", report.TRANSFER)


@pytest.fixture(scope="module")
def pair_of(environment, data_root, cache) -> Callable[[str, int], Pair]:
    """The pair in work, kept while one method of its scenario and seed follows the other."""

    @lru_cache(maxsize=1)
    def pair(name: str, seed: int) -> Pair:
        return Pair(SCENARIOS[name], seed, environment, data_root, cache)

    return pair


def test_transfer(benchmark, book, pair_of, environment, scenario, seed, method):
    book.skip_finished(method, scenario.name, seed, config(scenario), environment)
    pair = pair_of(scenario.name, seed)
    try:
        pair.load_data()
    except MissingData as missing:
        pytest.skip(str(missing))
    benchmark.group = scenario.name
    row = measure_plain(pair, benchmark) if method == "plain" else measure_transfer(pair, method, benchmark)
    benchmark.extra_info.update(accuracy=row.accuracy, cpu_seconds=row.cost.cpu, wall_seconds=row.cost.wall)
    book.add(row)
