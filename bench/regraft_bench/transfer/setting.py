"""What the methods of the transfer study are given: a source that was trained, and a target that was not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, repeat
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from regraft.core.clock import Clock, Cost
from regraft.core.tensors import Pair, Tensors, fill_, state, use_generator
from regraft.data import Dataset, draw_per_class
from regraft.learning_transfer.trajectory import Trajectory
from regraft.networks.heads import adopt
from regraft.networks.papers import build
from regraft.symmetry import PermutationSpec, trace
from regraft.training.gradients import gradients
from regraft.training.loop import Recipe, Training, train
from regraft_bench.study import Setting, Task
from regraft_bench.transfer.relatedness import measure_relatedness

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Stage:
    """A part of a pre-training. others: on as many images of each class that a stage of the same task does not see."""

    task: Task
    recipe: Recipe
    others: bool = False


@dataclass(frozen=True)
class Pretraining:
    """What both networks learn, each from its own seed, before the trajectory that is transferred begins.

    source_task, source_recipe: the source's, where they are others.
    """

    task: Task
    recipe: Recipe
    source_task: Task | None = None
    source_recipe: Recipe | None = None

    def name_start(self, role: str) -> str:
        """Whose initial values a role has."""
        return role

    def list_stages(self, role: str) -> list[tuple[str, Stage]]:
        """The trainings of a role, and their purposes, which name the order of the images."""
        own = Stage(self.task, self.recipe)
        if role == "source":
            own = Stage(self.source_task or self.task, self.source_recipe or self.recipe)
        return [(f"{role} pretraining", own)]


@dataclass(frozen=True)
class Branching:
    """A pre-training that the target leaves: both learn the first ``shared`` of the source's stages together.

    stages: the source's, one after the other. own: the target's after those that are shared. shared: None where not
    even the initial values are.
    """

    stages: tuple[Stage, ...]
    shared: int | None
    own: tuple[Stage, ...]

    def name_start(self, role: str) -> str:
        """Whose initial values a role has."""
        return role if self.shared is None else "source"

    def list_stages(self, role: str) -> list[tuple[str, Stage]]:
        """As `Pretraining.list_stages`; one that is shared has one purpose, and so is trained once."""
        source = [(f"source stage {number}", stage) for number, stage in enumerate(self.stages)]
        if role == "source":
            return source
        shared = self.shared or 0
        own = enumerate(self.own, shared)
        return [*source[:shared], *((f"{role} stage {n}{' on others' * stage.others}", stage) for n, stage in own)]


@dataclass(frozen=True)
class TransferSettings:
    """What all methods of a scenario have in common.

    model, arguments: ``model(**arguments)`` is the network; after pre-training it gets a new head for the task.
    recipe: plain training, of the source and of the target. subsequent: the training that follows a transfer, if any.
    steps, schedule: T of the path and its spacing, linear but for "recorded", the source's own checkpoints, as many
    updates apart as they can be. gradient_batches: averaged in one gradient; gradient_batch: images in each, where
    not as many as in training. bn_batches: re-estimate BatchNorm statistics. from_identity: every matching starts
    there, not from the last permutation. init_scale: times all initial weights, biases apart. source_task,
    source_recipe: what the source learned and how, where not as the target. eval_steps: updates after which
    trainings are evaluated too, besides their start and the ends of epochs.
    """

    task: Task
    model: Callable[..., nn.Module]
    recipe: Recipe
    subsequent: Recipe | None
    steps: int
    schedule: Literal["uniform", "cosine", "recorded"]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    gradient_batches: int = 1
    gradient_batch: int | None = None
    bn_batches: int = 0
    pretraining: Pretraining | Branching | None = None
    from_identity: bool = False
    init_scale: float = 1.0
    source_task: Task | None = None
    source_recipe: Recipe | None = None
    eval_steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class PortSettings(TransferSettings):
    """images: of each class that a method may see, one port for each number. alphas: times what is moved, of which a
    method takes the one with the lowest loss on those images. ``recipe`` is the fine-tuning's; ``bn_batches`` are
    batches of the few images, at most.
    """

    images: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)


class TransferSetting(Setting):
    """Source and target of one scenario and seed; everything is made when it is first asked for, and once."""

    target = "target"  # names the target's initial values and the order of its images

    @property
    def settings(self) -> TransferSettings:
        return self.scenario.settings

    def sibling(self, target: str) -> TransferSetting:
        """The same source, with another target."""
        other = TransferSetting(self.scenario, self.seed, self.place, self.method)
        other.target = target
        other.source, other._trace = self.source, self._trace
        return other

    # ---------------------------------------------------------------- networks

    @cached_property
    def data(self) -> Dataset:
        return self.dataset(self.settings.task, self.seed)

    @cached_property
    def model(self) -> nn.Module:
        """The network, with the target's values before the training that is transferred."""
        return self._make_network(self.target)

    @cached_property
    def target_start(self) -> Tensors:
        """theta_2^0, after pre-training where there is any."""
        return state(self.model)

    @cached_property
    def source_start(self) -> Tensors:
        """theta_1^0, alike."""
        return state(self._make_network("source"))

    def _make_network(self, role: str) -> nn.Module:
        model = self.build(role)
        if self.settings.pretraining is not None:
            fill_(model, self.pretrain(role))
            with use_generator(self.generator("head", role), self.device):
                adopt(model, self.data.num_classes).head.reset_parameters()
        return model

    def build(self, role: str) -> nn.Module:
        """The network before any training, with the head of the pre-training where there is one."""
        settings = self.settings
        start = role if settings.pretraining is None else settings.pretraining.name_start(role)
        model = build(lambda: settings.model(**settings.arguments), self.generator("values", start)).to(self.device)
        if settings.init_scale != 1.0:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(settings.init_scale if parameter.dim() > 1 else 1.0)
        return model

    def pretrain(self, role: str) -> Tensors:
        """What a role's pre-training comes to, with its head."""
        assert self.settings.pretraining is not None
        model = self.build(role)
        theta = state(model)
        for purpose, stage in self.settings.pretraining.list_stages(role):
            theta = self.train(purpose, model, theta, self.stage_data(stage), stage.recipe).tensors
        return theta

    @cached_property
    def relatedness(self) -> dict[str, float]:
        """Of the two bases: see `measure_relatedness`."""
        return measure_relatedness(self)

    def stage_data(self, stage: Stage) -> Dataset:
        """The images of a stage of pre-training."""
        task = stage.task
        if not stage.others:
            return self.dataset(task, self.seed)
        assert task.per_class is not None
        data = self.dataset(replace(task, per_class=None), self.seed)
        labels, drawn = data.train.labels, ("per class", task.data, task.classes)
        once, twice = (draw_per_class(labels, n * task.per_class, self.generator(*drawn)) for n in (1, 2))
        return replace(data, train=data.train.subset(twice[~torch.isin(twice, once)]))

    def parameters(self, theta: Mapping[str, torch.Tensor]) -> Tensors:
        """The model's parameters among ``theta``, in the model's order."""
        return {name: theta[name] for name, _ in self.model.named_parameters()}

    @cached_property
    def _trace(self) -> tuple[PermutationSpec, Cost]:
        clock = Clock()
        images, _ = next(iter(self.validation(2)))
        with clock.phase("trace"):
            spec = trace(self.model, (images,))
        return spec, clock.cost

    @property
    def spec(self) -> PermutationSpec:
        """The network's permutation groups."""
        return self._trace[0]

    @property
    def trace_cost(self) -> Cost:
        """What finding the groups took: once for all methods, so charged to none."""
        return self._trace[1]

    # ---------------------------------------------------------------- trainings

    def learn(self, purpose: str, start: Tensors, recipe: Recipe, order: str | None = None) -> Training:
        """Train on the scenario's own task, and follow test accuracy unless the run is a tuning one."""
        how = {"test": not self.tuning, "evaluate_at": self.settings.eval_steps}
        return self.train(purpose, self.model, start, self.data, recipe, order=order, **how)

    @cached_property
    def plain(self) -> Training:
        return self.learn(self.target, self.target_start, self.settings.recipe)

    @cached_property
    def source(self) -> Training:
        data, recipe = self._source_lesson
        return self.train("source", self.model, self.source_start, data, recipe, test=not self.tuning)

    @property
    def _source_lesson(self) -> tuple[Dataset, Recipe]:
        task = self.settings.source_task
        data = self.data if task is None else self.dataset(task, self.seed)
        return data, self.settings.source_recipe or self.settings.recipe

    @cached_property
    def path(self) -> Trajectory:
        """theta_1^0 .. theta_1^T."""
        steps, schedule = self.settings.steps, self.settings.schedule
        if schedule == "recorded":
            data, recipe = self._source_lesson
            end = count_updates(recipe, data)
            at = [round(end * t / steps) for t in range(steps + 1)]
            return Trajectory.recorded(self.record_training("source", self.source_start, data, recipe, at))
        return Trajectory.linear(self.source_start, self.source.tensors, steps, schedule)

    def record_training(
        self, purpose: str, start: Tensors, data: Dataset, recipe: Recipe, at: Sequence[int]
    ) -> list[Tensors]:
        """A training's values after these numbers of updates. It is not kept in the cache."""
        checkpoints: list[Tensors] = []
        train(
            self.model,
            start,
            data,
            recipe,
            generator=self.generator("order", purpose),
            device=self.device,
            record=lambda step, tensors: checkpoints.append(tensors),
            record_at=at,
        )
        return checkpoints

    @cached_property
    def two_runs(self) -> tuple[list[int], list[Tensors], list[Tensors]]:
        """Numbers of updates (0, 1, 2, 4, ..., the last), and target and source then, trained on the same batches."""
        data, recipe = self.data, self.settings.recipe
        end = count_updates(recipe, data)
        at = [0, *(2**k for k in range(20) if 2**k < end), end]
        source, target = (
            self.record_training("both", start, data, recipe, at) for start in (self.source_start, self.target_start)
        )
        return at, target, source

    # ---------------------------------------------------------------- images

    def validation(self, size: int = EVALUATION_BATCH) -> Iterable[Pair]:
        """Batches of the validation split."""
        return self.data.validation.batches(size, device=self.device)

    def tests(self, size: int = EVALUATION_BATCH) -> Iterable[Pair]:
        """Batches of the test split; a tuning run must not ask for them."""
        if self.tuning:
            raise ValueError("a tuning run must not look at test data")
        return self.data.test.batches(size, device=self.device)

    def stream(self) -> Iterable[Pair]:
        """Batches for gradients, drawn and augmented as training's are; the same ones for every method."""
        recipe = self.settings.recipe
        return self.data.train.batches(
            self.settings.gradient_batch or recipe.batch_size,
            generator=self.generator("gradients"),
            augment=recipe.augment,
            device=self.device,
            drop_last=True,
        )

    def endless_stream(self) -> Iterable[Pair]:
        """The same over and over, each time in another order."""
        return chain.from_iterable(repeat(self.stream()))

    @cached_property
    def gradient_flop(self) -> int:
        """Floating-point operations of one gradient on one of the stream's batches, as torch counts them."""
        with FlopCounterMode(display=False) as counter:
            gradients(self.model, self.target_start, [next(iter(self.stream()))])
        return counter.get_total_flops()


def count_updates(recipe: Recipe, data: Dataset) -> int:
    """Updates of a whole training: the last batch of an epoch may be smaller."""
    return recipe.epochs * -(-len(data.train) // recipe.batch_size)
