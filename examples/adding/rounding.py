"""Study: what rounding a trained network's weights costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import nn

from regraft.core.clock import Clock
from regraft.core.tensors import state
from regraft.data import Dataset
from regraft.networks.papers import build, mlp
from regraft.training.evaluation import accuracy
from regraft.training.loop import Recipe, Training
from regraft_bench.report.figures import Figure, Panel, leaders
from regraft_bench.report.tables import COMMON, Table, by_method
from regraft_bench.study import Measured, Method, Scenario, Setting, Study, Task


@dataclass(frozen=True)
class Rounding:
    """What a scenario fixes: part of every row's identity."""

    task: Task
    recipe: Recipe


class RoundingSetting(Setting):
    """What the methods of one scenario and seed share: made on first use."""

    @cached_property
    def data(self) -> Dataset:
        return self.dataset(self.settings.task)

    @cached_property
    def model(self) -> nn.Module:
        return build(partial(mlp, [64, 128, 10]), self.generator("values")).to(self.device)

    @cached_property
    def training(self) -> Training:
        return self.train("network", self.model, state(self.model), self.data, self.settings.recipe)


def measure_rounded(dtype: torch.dtype, setting: RoundingSetting) -> Measured:
    """The trained network with its weights rounded."""
    training, clock = setting.training, Clock()
    clock.add({"training": training.cost})
    with clock.phase("rounding", setting.device):
        rounded = {name: tensor.to(dtype).to(tensor) for name, tensor in training.tensors.items()}
    with clock.phase("evaluation", setting.device):  # shown, not charged
        test = accuracy(setting.model, rounded, setting.data.test.batches(500, device=setting.device))
    return Measured({"accuracy": test}, cost=clock.seconds)


DIGITS = Scenario(
    "rounding-digits",
    (
        Method("plain", partial(measure_rounded, torch.float32), about="The trained network as it is."),
        Method("bfloat16", partial(measure_rounded, torch.bfloat16)),
    ),
    Rounding(Task("digits"), Recipe(epochs=5, lr=0.1)),
    seeds=2,
)
NAMES = (DIGITS.name,)
POINTS = Panel("digits", "CPU seconds", "test accuracy", leaders(DIGITS.name), x_log=True)
STUDY = Study(
    name="rounding",
    title="Rounding weights",
    setting=RoundingSetting,
    scenarios=(DIGITS,),
    quick=NAMES,
    tables=(Table("main", "Rounded or not", NAMES, by_method(COMMON, (("bfloat16", "plain"),))),),
    figures=(Figure("cost", "Accuracy against cost", NAMES, (POINTS,)),),
)
