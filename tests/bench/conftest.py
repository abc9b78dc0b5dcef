"""A study without networks: what the runner, the rows and the pages promise is tested on it in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from regraft.core.clock import Cost
from regraft_bench.report.figures import Figure, Panel, curves
from regraft_bench.report.tables import COMMON, Table, by_method
from regraft_bench.rows import Series
from regraft_bench.study import Measured, Method, RunPaths, Scenario, Setting, Study


@dataclass(frozen=True)
class Toy:
    difficulty: float


def ran(setting: Setting, level: float) -> Measured:
    noise = setting.generator("noise").initial_seed() % 97 / 9700
    accuracy = level - setting.settings.difficulty + noise
    curve = Series.over("step", (0, 1, 2), (0.1, accuracy / 2, accuracy))
    return Measured(
        {"accuracy": accuracy, "validation": accuracy},
        {"validation": curve},
        {"training": Cost(2.0 * level, level), "evaluation": Cost(9.0, 9.0)},
    )


def plain(setting: Setting) -> Measured:
    return ran(setting, 0.9)


def cheap(setting: Setting) -> Measured:
    return ran(setting, 0.6)


def diverging(setting: Setting) -> Measured:
    raise FloatingPointError("the loss of step 3 is not finite")


def broken(setting: Setting) -> Measured:
    raise KeyError("no such tensor")


@pytest.fixture
def toy() -> Study:
    scenario = Scenario("toy", (Method("plain", plain), Method("cheap", cheap)), Toy(0.1), seeds=3)
    tables = (Table("main", "Toys", ("toy",), by_method(COMMON, questions=(("cheap", "plain"),))),)
    panel = Panel("toy", "step", "validation accuracy", curves("validation"))
    return Study(
        "toys",
        "Toys",
        Setting,
        (scenario,),
        ("toy",),
        tables,
        (Figure("curves", "Toys", ("toy",), (panel,)),),
    )


@pytest.fixture
def place(tmp_path) -> RunPaths:
    return RunPaths(cache=tmp_path / "cache")
