"""What a method of the fusion study may ask for: networks trained on its tasks, and images to measure them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import nn

from regraft.core.clock import Clock
from regraft.core.tensors import Pair, Tensors
from regraft.data import Dataset, MissingData
from regraft.fusion.repair import batch_statistics
from regraft.fusion.sums import gradient
from regraft.matching.descent import match
from regraft.networks.papers import initialise, mlp, residual8, small_cnn
from regraft.symmetry import PermutationSpec, apply, trace
from regraft.training.loop import Recipe, Training
from regraft_bench.fusion.settings import Target, TwoTasks
from regraft_bench.study import Setting, Task

PER_CLASS: dict[str, int | None] = {"small": 4, "medium": 100, "large": None}
"""Training images of each class; those of a smaller scale are among a larger one's."""

ARCHITECTURES: dict[str, Callable[[float], nn.Module]] = {
    "small_cnn": lambda _width: small_cnn(),
    "residual8": lambda width: residual8(width=width),
    "mlp": lambda width: mlp([64, round(64 * width), 5]),
    "mlp with dropout": lambda width: nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, round(64 * width)),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(round(64 * width), 5),
    ),
}

SEARCH, TRAIN = "search", "train"  # phases: choosing coefficients on validation images, training
T = TypeVar("T")


class FusionSetting(Setting):
    """Networks, images and accuracies of one scenario and seed, each made once."""

    def once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What `make` gives, kept under `key` for as long as the setting lives."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    @cached_property
    def _memo(self) -> dict[tuple[Any, ...], Any]:
        return {}

    # networks

    @property
    def tasks(self) -> tuple[Task, Task]:
        """Tasks A and B."""
        return self.settings.a, self.settings.b

    @cached_property
    def model(self) -> nn.Module:
        """The architecture, in evaluation mode; its own values mean nothing."""
        model = ARCHITECTURES[self.settings.network](self.settings.regime.width).eval()
        # Channels last: the same accuracies in 0.7 of the CPU time.
        return model.to(self.device).to(memory_format=torch.channels_last)

    @cached_property
    def own_statistics_model(self) -> nn.Module:
        """The same, every batch normalised with its own statistics."""
        return batch_statistics(self.model)

    @cached_property
    def spec(self) -> PermutationSpec:
        task = self.settings.a if isinstance(self.settings, TwoTasks) else self.settings.task
        return trace(self.model, self.images(task, "test")[0][:2])

    def start(self, number: int = 0) -> Tensors:
        """Initial values: number 0 is theta_0, others are those of targets."""
        return initialise(self.model, self.generator("start", self.settings.network, number))

    def train_start(self, task: Task, scale: str, number: int = 0, recipe: Recipe | None = None) -> Training:
        """A start, trained on a task at a scale, by default with the regime's recipe."""
        recipe = recipe or self.settings.regime.recipe(scale)
        return self.once(
            ("trained", task, scale, number, recipe),
            lambda: self.train_from(f"{task.data} from {number}", self.start(number), task, scale, recipe),
        )

    def train_from(self, purpose: str, start: Tensors, task: Task, scale: str, recipe: Recipe, **how: Any) -> Training:
        """Train on a task at a scale from any values."""
        return self.train(purpose, self.model, start, self.at_scale(task, scale), recipe, **how)

    def train(self, purpose: str, *what: Any, **how: Any) -> Training:
        """As every study's, in the regime's precision."""
        precision = self.settings.regime.precision
        if precision == "float32":
            return super().train(purpose, *what, **how)
        kind = torch.device(self.device).type
        # Without its cache: autocast would keep the first step's rounded weights until the training ends.
        with torch.autocast(kind, getattr(torch, precision), cache_enabled=False):
            return super().train(f"{purpose}, {precision}", *what, **how)

    @cached_property
    def training_a(self) -> Training:
        return self.train_start(self.settings.a, self.settings.scale)

    @cached_property
    def training_b(self) -> Training:
        settings = self.settings
        recipe = settings.regime.recipe(settings.scale)
        longer = replace(recipe, epochs=settings.b_epochs or recipe.epochs)
        return self.train_start(settings.b, settings.scale, recipe=longer)

    @cached_property
    def pretraining(self) -> Training:
        """theta_pre, which task arithmetic starts from, trained on everything there is."""
        recipe = self.settings.regime.recipe(self.settings.scale)
        return self.train_start(self.settings.pretraining, "large", recipe=recipe)

    @property
    def theta_a(self) -> Tensors:
        return self.training_a.tensors

    @property
    def theta_b(self) -> Tensors:
        return self.training_b.tensors

    @cached_property
    def theta_b_elsewhere(self) -> Tensors:
        """theta_B, trained from initial values of its own."""
        return self.train_start(self.settings.b, self.settings.scale, number=1).tensors

    @cached_property
    def gradients(self) -> tuple[Tensors, Tensors]:
        """(g_1, g_2) = (theta_A, theta_B) - theta_0."""
        return gradient(self.start(), self.theta_a), gradient(self.start(), self.theta_b)

    def align(self, target: Tensors, source: Tensors, tensors: Tensors, clock: Clock) -> Tensors:
        """`tensors`, permuted as brings `source`'s units closest to `target`'s (weight matching)."""
        weights = [name for name, _ in self.model.named_parameters()]
        with clock.phase("match", self.device):
            best = match(self.spec, {w: target[w] for w in weights}, {w: source[w] for w in weights})
            return apply(self.spec, best.perm, tensors)

    def targets(self) -> dict[str, tuple[Tensors, Target | None]]:
        """theta_1 to theta_5 by name, each from initial values of its own, with what it was trained on."""
        if self.settings.onto == "random":
            return {f"theta_{number}": (self.start(number), None) for number in range(1, 6)}
        trained: dict[str, tuple[Tensors, Target | None]] = {}
        for number, choices in enumerate(self.settings.targets, start=1):
            target = next((t for t in choices if self._has_data(t.task)), choices[-1])
            recipe = self._target_recipe(target.task)
            trained[target.label] = (self.train_start(target.task, "large", number, recipe).tensors, target)
        return trained

    def _has_data(self, task: Task) -> bool:
        try:
            self.dataset(task)
        except MissingData:
            return False
        return True

    def _target_recipe(self, task: Task) -> Recipe:
        recipe = self.settings.regime.large
        steps = -(-len(self.dataset(task).train) // recipe.batch_size)
        return replace(recipe, epochs=max(1, round(self.settings.target_steps / steps)))

    # images

    def at_scale(self, task: Task, scale: str) -> Dataset:
        """A task with the scale's training images; nothing is validated while it is trained on."""
        data = self.dataset(replace(task, per_class=PER_CLASS[scale] or task.per_class))
        return replace(data, validation=data.validation.subset(torch.arange(0)))

    def images(self, task: Task, split: str, scale: str = "large") -> Pair:
        """(normalised images, labels) of the "training", "validation" or "test" split, in a drawn order.

        Of a longer split as many evenly spaced ones as the settings say; of a smaller scale's training images all.
        """
        scale = scale if split == "training" else "large"
        return self.once(("images", task, split, scale), lambda: self._images(task, split, scale))

    def _images(self, task: Task, split: str, scale: str) -> Pair:
        data = self.at_scale(task, scale) if split == "training" else self.dataset(task)
        images = {"training": data.train, "validation": data.validation, "test": data.test}[split]
        limit = self.settings.held_out if split == "validation" else self.settings.images
        if limit is not None and limit < len(images) and (split != "training" or scale == "large"):
            images = images.subset(torch.linspace(0, len(images) - 1, limit).round().long())
        order = torch.randperm(len(images), generator=self.generator("shuffle", task.data, task.classes))
        batches = list(images.subset(order).batches(1000, device=self.device))
        stacked = torch.cat([x for x, _ in batches]).contiguous(memory_format=torch.channels_last)
        return stacked, torch.cat([y for _, y in batches])

    def calibration(self, tasks: Sequence[Task], scale: str) -> list[Pair]:
        """Two batches of each task's training images, for BatchNorm statistics and REPAIR."""
        chosen: list[Pair] = []
        for task in tasks:
            generator = self.generator("calibration", task.data, task.classes)
            batches = self.at_scale(task, scale).train.batches(250, device=self.device, generator=generator)
            chosen += islice(batches, 2)
        return chosen
