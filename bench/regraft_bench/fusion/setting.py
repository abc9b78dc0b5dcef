"""What the scenarios of fusion depend on, as frozen data, and what their methods may ask for.

Two kinds of settings: :class:`OntoTargets` (theta_n + alpha g, theta_n + alpha theta_A: tables 1 to 4 and the figures)
and :class:`TwoTasks` (theta_A and theta_B from one theta_0: tables 5, 6 and A1 to A19).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from regraft.core.clock import EVALUATION, Clock, Cost
from regraft.core.files import write_text
from regraft.core.tensors import Batch, Tensors, tensor_digest
from regraft.core.tensors import digest_tensors as tensors_digest
from regraft.data import Dataset, MissingData
from regraft.fusion.grids import evaluate
from regraft.fusion.repair import batch_statistics
from regraft.fusion.sums import Finish, gradient
from regraft.matching.descent import match
from regraft.networks import papers as networks
from regraft.symmetry import PermutationSpec, apply, trace
from regraft.training.evaluation import ensemble_accuracy
from regraft.training.loop import Recipe, Training
from regraft_bench.rows import code, digest
from regraft_bench.study import Series, Setting, Task

GRADIENT, WEIGHTS = "theta_n + alpha g", "theta_n + alpha theta_A"
TWO_GRADIENTS, TWO_NETWORKS = "theta_0 + alpha g_1 + beta g_2", "alpha theta_A + beta theta_B"

PER_CLASS: dict[str, int | None] = {"small": 4, "medium": 100, "large": None}
"""Training images of each class; those of a smaller scale are among a larger one's."""

NETWORKS: dict[str, Callable[[float], nn.Module]] = {
    "small_cnn": lambda _width: networks.small_cnn(),
    "residual8": lambda width: networks.residual8(width=width),
    "mlp": lambda width: networks.mlp([64, round(64 * width), 5]),
}

SEARCH, TRAIN = "search", "train"  # phases: choosing coefficients on validation images, training
A, B = "accuracy_a", "accuracy_b"
Made = TypeVar("Made")


# ---------------------------------------------------------------- what rows depend on


@dataclass(frozen=True)
class Regime:
    """How a scenario's networks are trained, the same for every task: all that a search for the recipe may vary.

    small, medium, large: the recipe of each scale. width: factor of the channels. precision: of a training step's
    activations; "bfloat16" takes half the CPU time where the processor knows it. Values and evaluation are float32.
    """

    small: Recipe
    medium: Recipe
    large: Recipe
    width: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"

    def recipe(self, scale: str) -> Recipe:
        return {"small": self.small, "medium": self.medium, "large": self.large}[scale]


@dataclass(frozen=True)
class Target:
    """A task that a target theta_n was trained on; ``instead_of``: the paper's own, where that is missing."""

    label: str
    task: Task
    instead_of: str = ""


@dataclass(frozen=True)
class Panel:
    """One question of a figure: theta_A learned at which scale, evaluated on "test" or the "small" training images."""

    name: str
    scale: str
    evaluated_on: str


@dataclass(frozen=True)
class OntoTargets:
    """Tables 1 to 4 and figures 1 to 4: one source, added to five targets from other initial values.

    onto: "random" or "trained" targets. targets: for each, the paper's task and what stands in where it is missing.
    target_steps: small data sets get as many epochs as give so many steps, so that targets are well trained.
    images: at most so many images for each accuracy (None: all); held_out: of the validation images.
    """

    formula: str
    onto: str
    panels: tuple[Panel, ...]
    alphas: tuple[float, ...]
    task: Task
    targets: tuple[tuple[Target, ...], ...]
    network: str
    regime: Regime
    target_steps: int = 1500
    images: int | None = None
    held_out: int = 1000
    batch: int = 250


@dataclass(frozen=True)
class TwoTasks:
    """Tables 5, 6 and A1 to A19: theta_A and theta_B, trained on two tasks from one theta_0, share their outputs.

    formula: what is summed over the grid of alphas and betas. evaluated_on: "test" or "training" images of the scale.
    controls: values of alpha = beta at which other ways of summing are measured. pretraining: what task arithmetic
    starts from, where it is asked for.
    images: at most so many images for each accuracy (None: all); held_out: of the validation images. batch: images
    that are normalised together. b_epochs: of theta_B's training, where it is not as many as theta_A's.
    """

    a: Task
    b: Task
    alphas: tuple[float, ...]
    betas: tuple[float, ...]
    network: str
    regime: Regime
    formula: str = TWO_NETWORKS
    scale: str = "large"
    evaluated_on: str = "test"
    controls: tuple[float, ...] = (0.1, 0.5, 1.0, 5.0)
    pretraining: Task | None = None
    images: int | None = None
    held_out: int = 1000
    batch: int = 250
    b_epochs: int | None = None


# ---------------------------------------------------------------- what methods ask for


class FusionSetting(Setting):
    """Networks, images and accuracies of one scenario and seed, each made once."""

    def once(self, key: tuple[Any, ...], make: Callable[[], Made]) -> Made:
        """What `make` gives, kept under `key` for as long as the setting lives."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    @cached_property
    def _kept(self) -> dict[tuple[Any, ...], Any]:
        return {}

    # networks

    @property
    def tasks(self) -> tuple[Task, Task]:
        """Tasks A and B."""
        return self.settings.a, self.settings.b

    @cached_property
    def model(self) -> nn.Module:
        """The architecture, in evaluation mode; its own values mean nothing."""
        made = NETWORKS[self.settings.network](self.settings.regime.width).eval()
        # Channels last: the same accuracies in 0.7 of the CPU time.
        return made.to(self.device, memory_format=torch.channels_last)

    @cached_property
    def normalised(self) -> nn.Module:
        """The same, every batch normalised with its own statistics."""
        return batch_statistics(self.model)

    @cached_property
    def spec(self) -> PermutationSpec:
        task = self.settings.a if isinstance(self.settings, TwoTasks) else self.settings.task
        return trace(self.model, self.images(task, "test")[0][:2])

    def start(self, number: int = 0) -> Tensors:
        """Initial values: number 0 is theta_0, others are those of targets."""
        return networks.initialise(self.model, self.generator("start", self.settings.network, number))

    def trained(self, task: Task, scale: str, number: int = 0, recipe: Recipe | None = None) -> Training:
        """A start, trained on a task at a scale, by default with the regime's recipe."""
        recipe = recipe or self.settings.regime.recipe(scale)
        return self.once(
            ("trained", task, scale, number, recipe),
            lambda: self.continued(f"{task.data} from {number}", self.start(number), task, scale, recipe),
        )

    def continued(
        self, purpose: str, start: Tensors, task: Task, scale: str, recipe: Recipe, **how: Any
    ) -> Training:
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
        return self.trained(self.settings.a, self.settings.scale)

    @cached_property
    def training_b(self) -> Training:
        settings = self.settings
        recipe = settings.regime.recipe(settings.scale)
        longer = replace(recipe, epochs=settings.b_epochs or recipe.epochs)
        return self.trained(settings.b, settings.scale, recipe=longer)

    @property
    def theta_a(self) -> Tensors:
        return self.training_a.tensors

    @property
    def theta_b(self) -> Tensors:
        return self.training_b.tensors

    @cached_property
    def gradients(self) -> tuple[Tensors, Tensors]:
        """(g_1, g_2) = (theta_A, theta_B) - theta_0."""
        return gradient(self.start(), self.theta_a), gradient(self.start(), self.theta_b)

    def aligned(self, target: Tensors, source: Tensors, moved: Tensors, clock: Clock) -> Tensors:
        """`moved`, permuted as brings `source`'s units closest to `target`'s (weight matching)."""
        weights = [name for name, _ in self.model.named_parameters()]
        with clock.phase("match", self.device):
            found = match(self.spec, {w: target[w] for w in weights}, {w: source[w] for w in weights})
            return apply(self.spec, found.perm, moved)

    def targets(self) -> dict[str, tuple[Tensors, Target | None]]:
        """theta_1 to theta_5 by name, each from initial values of its own, with what it was trained on."""
        if self.settings.onto == "random":
            return {f"theta_{number}": (self.start(number), None) for number in range(1, 6)}
        found = {}
        for number, choices in enumerate(self.settings.targets, start=1):
            target = next((t for t in choices if self._present(t.task)), choices[-1])
            recipe = self._target_recipe(target.task)
            found[target.label] = (self.trained(target.task, "large", number, recipe).tensors, target)
        return found

    def _present(self, task: Task) -> bool:
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

    def images(self, task: Task, split: str, scale: str = "large") -> Batch:
        """(normalised images, labels) of the "training", "validation" or "test" split, in a drawn order.

        Of a longer split as many evenly spaced ones as the settings say; of a smaller scale's training images all.
        """
        scale = scale if split == "training" else "large"
        return self.once(("images", task, split, scale), lambda: self._images(task, split, scale))

    def _images(self, task: Task, split: str, scale: str) -> Batch:
        data = self.at_scale(task, scale) if split == "training" else self.dataset(task)
        images = {"training": data.train, "validation": data.validation, "test": data.test}[split]
        limit = self.settings.held_out if split == "validation" else self.settings.images
        if limit is not None and limit < len(images) and (split != "training" or scale == "large"):
            images = images.subset(torch.linspace(0, len(images) - 1, limit).round().long())
        order = torch.randperm(len(images), generator=self.generator("shuffle", task.data, task.classes))
        batches = list(images.subset(order).batches(1000, device=self.device))
        stacked = torch.cat([x for x, _ in batches]).contiguous(memory_format=torch.channels_last)
        return stacked, torch.cat([y for _, y in batches])

    def calibration(self, tasks: Sequence[Task], scale: str) -> list[Batch]:
        """Two batches of each task's training images, for BatchNorm statistics and REPAIR."""
        found = []
        for task in tasks:
            generator = self.generator("calibration", task.data, task.classes)
            batches = self.at_scale(task, scale).train.batches(250, device=self.device, generator=generator)
            found += [batch for _, batch in zip(range(2), batches, strict=False)]
        return found

    # accuracies

    def accuracies(
        self,
        sources: Sequence[Tensors],
        rows: Sequence[Sequence[float]],
        images: Batch,
        clock: Clock,
        phase: str = EVALUATION,
        *,
        model: nn.Module | None = None,
        finish: Finish | None = None,
    ) -> Tensor:
        """Accuracy, float64 [K], of every sum of the sources; by default normalised batch by batch.

        Tables share grids: without `finish`, what was found is kept in the cache, with what it cost.
        """
        model = model or self.normalised

        def measure() -> tuple[Tensor, Cost]:
            own = Clock()
            with own.phase(phase, self.device):
                grid = evaluate(model, sources, rows, *images, batch_size=self.settings.batch, finish=finish)
            return grid.accuracy, own.seconds[phase]

        if finish is not None:
            found, cost = measure()
        else:
            found, cost = self._cached(_described(model, sources, rows, images), measure)
        clock.add({phase: cost})
        return found

    def _cached(self, name: str, measure: Callable[[], tuple[Tensor, Cost]]) -> tuple[Tensor, Cost]:
        path = self.place.cache / f"grid-{digest([name, self.settings.batch])}.json"
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            return torch.tensor(kept["accuracy"], dtype=torch.float64), Cost(**kept["cost"])
        found, cost = measure()
        write_text(path, json.dumps({"accuracy": found.tolist(), "cost": asdict(cost)}))
        return found, cost

    def ensemble(self, members: Sequence[Tensors], images: Batch, clock: Clock) -> float:
        """Accuracy of the mean of the networks' logits."""
        with clock.phase(EVALUATION, self.device):
            parts = zip(*(t.split(self.settings.batch) for t in images), strict=True)
            return ensemble_accuracy(self.normalised, members, parts)


def _described(
    model: nn.Module, sources: Sequence[Tensors], rows: Sequence[Sequence[float]], images: Batch
) -> str:
    """A name for a grid: all that its accuracies depend on, the code included."""
    networks_ = [tensors_digest(source) for source in sources]
    seen = [tensor_digest(tensor) for tensor in images]
    return digest([*code().trees, repr(model), networks_, [list(r) for r in rows], seen])


def grid_series(axes: tuple[str, ...], at: tuple[tuple[Any, ...], ...], found: Tensor) -> Series:
    """Numbers in any shape as a series over the axes."""
    return Series(axes, at, _tuples(found.reshape([len(positions) for positions in at]).tolist()))


def _tuples(values: Any) -> Any:
    return tuple(map(_tuples, values)) if isinstance(values, list) else values
