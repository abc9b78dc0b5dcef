"""Plain training, and the methods that move what a source learned to another start: what a scenario compares.

Source and target differ only in the seed of their initial values and of their data order. ``plain`` trains the
target's own start; every other method moves the source's path there without training, keeps the step that is best on
validation, and is then trained on. Accuracies are shares of 1, on the test split unless they say validation.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regraft import learning_transfer
from regraft.clock import Clock, Cost, charged
from regraft.data import Dataset
from regraft.heads import adopt
from regraft.learning_transfer import Transfer
from regraft.networks import build
from regraft.studies.study import Measured, Method, Series, Setting, Task
from regraft.symmetry import PermutationSpec, trace
from regraft.tensors import Batch, Tensors, fill_, seeded, state
from regraft.training import Recipe, Training
from regraft.trajectory import Trajectory

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Pretraining:
    """What both networks learn, each from its own seed, before the trajectory that is transferred begins."""

    task: Task
    recipe: Recipe


@dataclass(frozen=True)
class Settings:
    """What all methods of a scenario have in common.

    model, arguments: ``model(**arguments)`` is the network; after pre-training it gets a new head for the task.
    recipe: plain training, of the source and of the target. subsequent: the training that follows a transfer.
    steps, schedule: T of the linear path and its spacing. gradient_batches: averaged in one gradient. bn_batches:
    re-estimate BatchNorm statistics. from_identity: every matching starts there, not from the last permutation.
    """

    task: Task
    model: Callable[..., nn.Module]
    recipe: Recipe
    subsequent: Recipe
    steps: int
    schedule: Literal["uniform", "cosine"]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    gradient_batches: int = 1
    bn_batches: int = 0
    pretraining: Pretraining | None = None
    from_identity: bool = False


class TransferSetting(Setting):
    """Source and target of one scenario and seed; everything is made when it is first asked for, and once."""

    settings: Settings

    @cached_property
    def data(self) -> Dataset:
        return self.dataset(self.settings.task, self.seed)

    @cached_property
    def model(self) -> nn.Module:
        """The network, with the target's values before the training that is transferred."""
        return self._network("target")

    @cached_property
    def target_start(self) -> Tensors:
        """theta_2^0, after pre-training where there is any."""
        return state(self.model)

    @cached_property
    def source_start(self) -> Tensors:
        """theta_1^0, alike."""
        return state(self._network("source"))

    def _network(self, role: str) -> nn.Module:
        settings, data = self.settings, self.data
        model = build(lambda: settings.model(**settings.arguments), self.generator("values", role))
        model = model.to(self.device)
        if settings.pretraining is not None:
            earlier = self.dataset(settings.pretraining.task, self.seed)
            purpose = f"{role} pretraining"
            learned = self.train(purpose, model, state(model), earlier, settings.pretraining.recipe)
            fill_(model, learned.tensors)
            with seeded(self.generator("head", role), self.device):
                adopt(model, data.num_classes).head.reset_parameters()
        return model

    def learn(self, purpose: str, start: Tensors, recipe: Recipe, order: str | None = None) -> Training:
        """Train on the scenario's own task, and follow test accuracy unless the run is a tuning one."""
        return self.train(purpose, self.model, start, self.data, recipe, order=order, test=not self.tuning)

    @cached_property
    def source(self) -> Training:
        return self.learn("source", self.source_start, self.settings.recipe)

    @cached_property
    def plain(self) -> Training:
        return self.learn("target", self.target_start, self.settings.recipe)

    @cached_property
    def path(self) -> Trajectory:
        """theta_1^0 .. theta_1^T."""
        settings = self.settings
        return Trajectory.linear(self.source_start, self.source.tensors, settings.steps, settings.schedule)

    @cached_property
    def traced(self) -> tuple[PermutationSpec, Cost]:
        """The network's permutation groups, and what finding them took: once for all methods, so charged to none."""
        clock = Clock()
        images, _ = next(iter(self.validation(2)))
        with clock.phase("trace"):
            spec = trace(self.model, (images,))
        return spec, clock.cost

    def validation(self, size: int = EVALUATION_BATCH) -> Iterable[Batch]:
        """Batches of the validation split."""
        return self.data.validation.batches(size, device=self.device)

    def stream(self) -> Iterable[Batch]:
        """Batches for gradients, drawn and augmented as training's are; the same ones for every method."""
        recipe = self.settings.recipe
        return self.data.train.batches(
            recipe.batch_size,
            generator=self.generator("gradients"),
            augment=recipe.augment,
            device=self.device,
            drop_last=True,
        )

    def transfer(
        self, method: str, *, path: Trajectory | None = None, target_end: Tensors | None = None
    ) -> Transfer:
        """By a method of the library: the source's path, or another one of as many steps."""
        settings = self.settings
        forget_peak_memory(self.device)
        return learning_transfer.transfer(
            self.model,
            self.path if path is None else path,
            self.target_start,
            self.stream(),
            method,
            spec=self.traced[0],
            target_end=target_end,
            validation=self.validation(),
            gradient_batches=settings.gradient_batches,
            bn_batches=settings.bn_batches,
            from_identity=settings.from_identity,
            generator=self.generator("sweeps"),
        )


# ---------------------------------------------------------------- methods


def plain(setting: TransferSetting) -> Measured:
    """Train the target's own start: what a transfer is to save."""
    forget_peak_memory(setting.device)
    trained = setting.plain
    end = trained.history[-1]
    return Measured(
        values={
            "accuracy": end.test_accuracy,
            "validation": end.validation_accuracy,
            "final": end.test_accuracy,
            "delta_ratio": delta_ratio(setting.model, setting.target_start, trained.tensors),
            "peak_memory [bytes]": peak_memory(setting.device),
        },
        series=curve(trained),
        cost={"training": trained.cost},
        notes={
            "parameters": sum(p.numel() for p in setting.model.parameters()),
            "images": len(setting.data.train),
        },
    )


def moved(name: str, setting: TransferSetting) -> Measured:
    """Move the source's path by a method of the library."""
    return measured(setting, setting.transfer(name))


def oracle(setting: TransferSetting) -> Measured:
    """A bound, no method: it knows what training the target would give, so that training is its price."""
    found = setting.transfer("oracle", target_end=setting.plain.tensors)
    return measured(setting, found, {"training": setting.plain.cost})


METHODS = (
    Method("plain", plain),
    *(
        Method(name, oracle if name == "oracle" else partial(moved, name))
        for name in learning_transfer.METHODS
    ),
)


# ---------------------------------------------------------------- what a row holds


def measured(setting: TransferSetting, found: Transfer, before: Mapping[str, Cost] | None = None) -> Measured:
    """What a transfer came to, and the training that follows it (a tuning run has none, and sees no test data).

    before: what else the method took, by phase.
    """
    peak = peak_memory(setting.device)
    trace_cost = setting.traced[1]
    values = {
        "validation": found.best_accuracy,
        "best_step": found.best_step,
        "delta_ratio": delta_ratio(setting.model, setting.source_start, setting.source.tensors),
        "gradients": found.gradients,
        "objective": found.objectives[-1] if found.objectives else None,
        "peak_memory [bytes]": peak,
        "trace [CPU s]": trace_cost.cpu,
        "trace [wall s]": trace_cost.wall,
    }
    series = {"validation": Series.over("step", range(len(found.accuracies)), found.accuracies)}
    cost = {**found.seconds, **(before or {})}
    if not setting.tuning:
        purpose = f"after {setting.method.name}"
        after = setting.learn(purpose, found.params, setting.settings.subsequent, "subsequent")
        values |= {"accuracy": after.history[0].test_accuracy, "final": after.history[-1].test_accuracy}
        series |= curve(after, charged(cost))
    return Measured(values, series, cost)


def curve(trained: Training, before: Cost | None = None) -> dict[str, Series]:
    """A training's test accuracy by epoch, and what had been paid by then, ``before`` included."""
    at = [row.epoch for row in trained.history]
    paid = [(before or Cost()) + row.cost for row in trained.history]
    return {
        "subsequent": Series.over("epoch", at, [row.test_accuracy for row in trained.history]),
        "subsequent cost [CPU s]": Series.over("epoch", at, [cost.cpu for cost in paid]),
        "subsequent cost [wall s]": Series.over("epoch", at, [cost.wall for cost in paid]),
    }


def delta_ratio(model: nn.Module, start: Tensors, end: Tensors) -> float:
    """|end - start| / |start| over the model's parameters: whether what is moved dominates what it is added to."""
    names = [name for name, _ in model.named_parameters()]
    return norm(end[name] - start[name] for name in names) / norm(start[name] for name in names)


def norm(tensors: Iterable[Tensor]) -> float:
    """Of all of them together."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def forget_peak_memory(device: str) -> None:
    """Start a new peak on a GPU; that of a CPU is the process's own, and only rises."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: str) -> int:
    """Bytes: allocated at most on the GPU since :func:`forget_peak_memory`, or resident in this process so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
