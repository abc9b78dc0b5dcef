"""What a fine-tuning method may ask for: a trained source network, the target's data, and the model adopted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from regraft.core.tensors import Tensors, fill_, state
from regraft.data import Batches, Dataset, Split
from regraft.finetuning.fast import Adoption, Stratified, adopt, kaiming_fan_in
from regraft.finetuning.recorder import Recorder, Source, growing_gaps
from regraft.networks.papers import build
from regraft.training.loop import Recipe, train
from regraft_bench.study import Setting, Task, seeded_generator


@dataclass(frozen=True)
class Origin:
    """Where the source network comes from.

    network: of the number of classes. weights: a name among the weights that the network comes with. task, recipe: what
    it then learns; without a task the weights are all, and forgetting cannot be measured.
    """

    network: Callable[..., nn.Module]
    task: Task | None
    recipe: Recipe | None
    weights: str | None = None


@dataclass(frozen=True)
class FastSettings:
    """One fine-tuning problem: training batches are stratified and of ``batch_size``; ``flip`` mirrors their images.

    source_images, target_images: for speed, of the source's test images, and of the target's validation and its test
    images, so many evenly spaced ones (None: all).
    """

    origin: Origin
    target: Task
    steps: int
    batch_size: int = 100
    flip: bool = False
    source_images: int | None = None
    target_images: int | None = None


@dataclass(frozen=True, eq=False)
class Pretrained:
    """The source network: a module, its values, the values it began with, its data (None where unknown)."""

    model: nn.Module
    values: Tensors
    start: Tensors
    data: Dataset | None


class FastSetting(Setting):
    """One fine-tuning problem with one seed; the source network is the same for every seed and method."""

    @cached_property
    def target(self) -> Dataset:
        return self.dataset(self.settings.target)

    @cached_property
    def source(self) -> Pretrained:
        """Trained from seed 0, or read from the place's cache where this code has done that."""
        origin: Origin = self.settings.origin
        data = None if origin.task is None else self.dataset(origin.task)
        model = _build_untrained(origin, data).to(self.device).to(memory_format=torch.channels_last)
        start = state(model)
        if data is None or origin.recipe is None:
            return Pretrained(model, start, start, data)
        epochs = origin.recipe.epochs
        trained = train(
            model,
            start,
            data,
            origin.recipe,
            generator=seeded_generator(0, "source order"),
            device=self.device,
            checkpoint=self.cache_file("fast-source", origin, ".safetensors"),
            on_epoch=lambda row: self.place.tell("the source network", round(row.epoch), epochs),
        )
        return Pretrained(model, trained.tensors, start, data)

    def adopt_source(self) -> tuple[nn.Module, Adoption]:
        """A copy of the source network with a zero head for the target's classes."""
        model = copy.deepcopy(self.source.model)
        fill_(model, self.source.values)
        return model, adopt(model, self.target.num_classes)

    def batches(self) -> Stratified:
        """The target's training batches, without end; every call and every method of a seed has the same ones."""
        data, settings = self.target, self.settings
        return Stratified(
            data.train,
            settings.batch_size,
            data.num_classes,
            self.generator("batches"),
            settings.flip,
            self.device,
        )

    def recorder(self, model: nn.Module, adopted: Adoption) -> Recorder:
        """Of a run that is about to begin; on validation images alone where it only chooses rates."""
        settings = self.settings
        validation = self._some(self.target.validation, settings.target_images)
        test, source = validation, None
        if not self.tuning:
            test = self._some(self.target.test, settings.target_images)
            if self.source.data is not None:
                images = self._some(self.source.data.test, settings.source_images)
                source = Source(adopted.source_head, images)
        # As often as in the paper, whose numbers these stand beside.
        return Recorder(
            model, validation=validation, test=test, head=adopted.name, source=source, validate_at=growing_gaps
        )

    def _some(self, split: Split, count: int | None) -> Batches:
        """Batches of the split, or of ``count`` images of it: every k-th, the same for all."""
        if count is not None and count < len(split):
            split = split.subset(torch.linspace(0, len(split) - 1, count).long())
        return split.batches(500, device=self.device)


def _build_untrained(origin: Origin, data: Dataset | None) -> nn.Module:
    """The network that pre-training begins with; a new head for its task where it begins with weights."""
    if origin.weights is None:
        if data is None:
            raise ValueError("a source network comes from weights or from a task to learn, and has neither")
        return build(lambda: origin.network(data.num_classes), seeded_generator(0, "source values"))
    model = origin.network(weights=origin.weights)
    if data is not None:
        drawn = seeded_generator(0, "source head")
        adopt(model, data.num_classes, initialise=kaiming_fan_in, generator=drawn)
    return model
