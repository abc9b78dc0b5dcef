"""A fine-tune moved onto a new base with a few labelled images: what competes for it.

Base and new base are pre-trained from different seeds, and the base is fine-tuned for another task. A method has the
three networks, and so many images of each class; it gives the new base what the fine-tune learned. All heads begin at
0, so that the fine-tune's head travels as a part of what it learned, permuted on its input side alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import regraft
from regraft.core.clock import Clock, Cost
from regraft.core.files import write_tensors
from regraft.core.forward import call
from regraft.core.tensors import Batch, Perm, Tensors, fill_, state
from regraft.data import Split, draw_per_class
from regraft.fusion.repair import hooks
from regraft.learning_transfer import driver as learning_transfer
from regraft.learning_transfer.trajectory import Trajectory
from regraft.matching.descent import match
from regraft.networks.heads import find_head
from regraft.porting import gradfix
from regraft.porting.checkpoint_files import CheckpointFile
from regraft.symmetry import apply
from regraft.training.evaluation import accuracy, evaluating, gradients, loss_and_accuracy, reset_batchnorm
from regraft.training.loop import Training, train_steps_
from regraft_bench.study import Measured, Method, Series
from regraft_bench.transfer.methods import delta_ratio
from regraft_bench.transfer.setting import Settings, TransferSetting

BATCH = 100
JUDGES = 200
"""Test images of each class, at most."""


@dataclass(frozen=True)
class PortSettings(Settings):
    """images: of each class that a method may see, one port for each number. alphas: times what is moved, of which a
    method takes the one with the lowest loss on those images. ``recipe`` is the fine-tuning's; ``bn_batches`` are
    batches of the few images, at most.
    """

    images: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)


# ---------------------------------------------------------------- what a method is given


@dataclass(frozen=True)
class Few:
    """The labelled images that a method may see."""

    split: Split
    order: torch.Generator

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(self.split.batches(min(BATCH, len(self.split))))

    def stream(self) -> Iterator[Batch]:
        """Without end, each time in another order."""
        again = self.split.batches(min(BATCH, len(self.split)), generator=self.order, drop_last=True)
        return chain.from_iterable(repeat(again))


def asked(setting: TransferSetting) -> PortSettings:
    settings = setting.settings
    assert isinstance(settings, PortSettings)
    return settings


def few(setting: TransferSetting, count: int) -> Few:
    """``count`` images of each class; a smaller number's are among a larger one's."""
    drawn = setting.dataset(replace(setting.settings.task, per_class=count), setting.seed).train
    return Few(drawn.to(setting.device), setting.generator("few", count))


def base(setting: TransferSetting) -> Tensors:
    return _headless(setting.model, setting.source_start)


def new_base(setting: TransferSetting) -> Tensors:
    return _headless(setting.model, setting.target_start)


def tuned(setting: TransferSetting) -> Training:
    return _fine_tuned(setting, "tuned", base(setting))


def _fine_tuned(setting: TransferSetting, purpose: str, start: Tensors) -> Training:
    return setting.train(purpose, setting.model, start, setting.data, setting.settings.recipe)


def _headless(model: nn.Module, theta: Tensors) -> Tensors:
    return theta | {name: torch.zeros_like(theta[name]) for name in _head(model)}


def _head(model: nn.Module) -> tuple[str, str]:
    name = find_head(model)
    return f"{name}.weight", f"{name}.bias"


def finished(setting: TransferSetting, theta: Tensors, seen: Few) -> Tensors:
    """BatchNorm statistics of the few images."""
    return reset_batchnorm(setting.model, theta, seen.batches, setting.settings.bn_batches or None)


# ---------------------------------------------------------------- task vectors

Find = Callable[[TransferSetting, Few, Clock], Perm]
Keep = Callable[[TransferSetting, Tensors, Tensors, Few], Tensors]


def identity(setting: TransferSetting, seen: Few, clock: Clock) -> Perm:
    return setting.traced[0].identity()


def by_weights(setting: TransferSetting, seen: Few, clock: Clock) -> Perm:
    """TransFusion's: bases matched by their weights, heads of attention as wholes and what is within them."""
    names = [name for name, _ in setting.model.named_parameters()]
    target, source = ({n: theta[n] for n in names} for theta in (new_base(setting), base(setting)))
    found = match(setting.traced[0], target, source, generator=setting.generator("sweeps"))
    clock.add(found.seconds)
    return found.perm


def by_fgmt(setting: TransferSetting, seen: Few, clock: Clock) -> Perm:
    """Along the line from the base to the fine-tune, gradients on the few images."""
    path = Trajectory.linear(base(setting), tuned(setting).tensors, setting.settings.steps, "uniform")
    found = learning_transfer.transfer(
        setting.model,
        path,
        new_base(setting),
        seen.stream(),
        "fgmt",
        spec=setting.traced[0],
        bn_batches=0,
        generator=setting.generator("sweeps"),
    )
    clock.add(found.seconds)
    return found.perm


def all_of_it(setting: TransferSetting, start: Tensors, tau: Tensors, seen: Few) -> Tensors:
    return tau


def nothing(setting: TransferSetting, start: Tensors, tau: Tensors, seen: Few) -> Tensors:
    """A control: the new base with the fine-tune's head."""
    return {name: torch.zeros_like(tensor) for name, tensor in tau.items()}


def agreeing(
    direction: gradfix.Direction, setting: TransferSetting, start: Tensors, tau: Tensors, seen: Few
) -> Tensors:
    return gradfix.mask(tau, direction(setting.model, start, seen.batches, cross_entropy))


def task_vector(find: Find, keep: Keep, setting: TransferSetting, seen: Few, clock: Clock) -> Tensors:
    """theta_B with the fine-tune's head, plus alpha times what is kept of its other layers' change."""
    model, before, after = setting.model, base(setting), tuned(setting).tensors
    tau = {name: after[name] - before[name] for name, _ in model.named_parameters()}
    perm = find(setting, seen, clock)
    with clock.phase("graft"):
        tau = apply(setting.traced[0], perm, tau)
        start = new_base(setting) | {name: tau.pop(name) for name in _head(model)}
    with clock.phase("batchnorm"):
        start = finished(setting, start, seen)
    with clock.phase("mask"):
        kept = keep(setting, start, tau, seen)
    best, chosen = float("inf"), start
    with clock.phase("choice"):
        for alpha in asked(setting).alphas:
            moved = start | {name: start[name] + alpha * kept[name] for name in kept}
            moved = finished(setting, moved, seen)
            loss, _ = loss_and_accuracy(model, moved, seen.batches)
            if loss < best:
                best, chosen = loss, moved
    return chosen


# ---------------------------------------------------------------- as the command does it


def by_command(setting: TransferSetting, seen: Few, clock: Clock) -> Tensors:
    """`regraft.port`, from files to a file; the bases have no heads there, and the step is chosen on the few images."""
    theta = {"base": base(setting), "tuned": tuned(setting).tensors, "new_base": new_base(setting)}
    head = _head(setting.model)
    with TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name}.safetensors") for name in theta}
        for name, file in files.items():
            write_tensors(file, {n: x for n, x in theta[name].items() if name == "tuned" or n not in head})
        made = regraft.port(
            *files.values(),
            Path(folder, "port"),
            model=setting.model,
            inputs=seen.batches[0][0][:2],
            spec=setting.traced[0],
            data={"train": seen.batches, "validation": seen.batches},
            method="fgmt",
            steps=setting.settings.steps,
        )
        clock.add(made.seconds)
        return dict(CheckpointFile.open(made.out))


# ---------------------------------------------------------------- training on the few images

Port = Callable[[TransferSetting, Few, Clock], Tensors]
"""What the new base becomes; the clock is charged."""


def untouched(setting: TransferSetting, seen: Few, clock: Clock) -> Tensors:
    return new_base(setting)


def few_shot(
    start: Port, lr: float, times: int, setting: TransferSetting, seen: Few, clock: Clock
) -> Tensors:
    """Fine-tune on the few images: ``times`` as many gradients as FGMT takes, the rate falling to 0."""
    updates, network = times * 2 * setting.settings.steps, copy.deepcopy(setting.model)
    fill_(network, start(setting, seen, clock))
    optimiser = replace(setting.settings.recipe, lr=lr).optimiser(network.train())
    with clock.phase("training"):
        train_steps_(
            network,
            optimiser,
            seen.stream(),
            range(updates),
            learning_rate=lambda step: lr * (1 - step / updates),
        )
    with clock.phase("batchnorm"):
        return finished(setting, state(network), seen)


def probe(setting: TransferSetting, seen: Few, clock: Clock) -> Tensors:
    """Logistic regression on the new base's features."""
    from sklearn.linear_model import LogisticRegression

    model, features = setting.model, []
    with clock.phase("batchnorm"):
        theta = finished(setting, new_base(setting), seen)
    with clock.phase("training"):
        head = find_head(model)

        def see(_name: str, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            features.append(inputs[0])

        with torch.no_grad(), evaluating(model), hooks({head: model.get_submodule(head)}, see):
            for images, _ in seen.batches:
                call(model, theta, images)
        labels = torch.cat([labels for _, labels in seen.batches])
        found = LogisticRegression(max_iter=1000).fit(torch.cat(features).cpu(), labels.cpu())
    values = (torch.as_tensor(value) for value in (found.coef_, found.intercept_))
    return theta | {name: value.to(theta[name]) for name, value in zip(_head(model), values, strict=True)}


# ---------------------------------------------------------------- what a row holds


def over_images(port: Port, setting: TransferSetting) -> Measured:
    """One port for each number of images; the cost is that of all of them, and by number in a series."""
    counts, found, paid, clock = asked(setting).images, [], [], Clock()
    for count in counts:
        own = Clock()
        theta = port(setting, few(setting, count), own)
        found.append(accuracy(setting.model, theta, judges(setting)))
        paid.append(own.cost)
        clock.add(own.seconds)
    return _measured(setting, found, paid, clock.seconds)


def whole(purpose: str, start: Callable[[TransferSetting], Tensors], setting: TransferSetting) -> Measured:
    """A fine-tuning on all images: no port, but what one would like to have."""
    trained, counts = _fine_tuned(setting, purpose, start(setting)), asked(setting).images
    own = accuracy(setting.model, trained.tensors, judges(setting))
    paid = [trained.cost] * len(counts)
    found = _measured(setting, [own] * len(counts), paid, {"training": trained.cost})
    ratio = delta_ratio(setting.model, start(setting), trained.tensors)
    return replace(found, values={**found.values, "delta_ratio": ratio})


def _measured(
    setting: TransferSetting, found: list[float], paid: list[Cost], seconds: dict[str, Cost]
) -> Measured:
    counts = asked(setting).images
    mean = sum(found) / len(found)
    if setting.tuning:
        return Measured({"validation": mean}, cost=seconds)
    return Measured(
        values={"accuracy": mean, **{at(count): own for count, own in zip(counts, found, strict=True)}},
        series={
            "accuracy by images": Series.over("images a class", counts, found),
            "cost by images [CPU s]": Series.over("images a class", counts, [cost.cpu for cost in paid]),
        },
        cost=seconds,
        notes={"test images": sum(len(labels) for _, labels in judges(setting))},
    )


def at(count: int) -> str:
    """The name of a value: test accuracy with so many images of each class."""
    return f"accuracy, {count} a class"


def judges(setting: TransferSetting) -> list[Batch]:
    """Test images, as many of each class; a tuning run's are validation images."""
    split = setting.data.validation if setting.tuning else setting.data.test
    count = min(JUDGES, int(split.labels.bincount().min()))
    drawn = draw_per_class(split.labels, count, setting.generator("judges"))
    return list(split.subset(drawn).batches(500, device=setting.device))


def _port(name: str, port: Port, about: str) -> Method:
    return Method(name, partial(over_images, port), about=about)


def _vector(name: str, find: Find, keep: Keep, about: str) -> Method:
    return _port(name, partial(task_vector, find, keep), about)


MAJORITY, MEAN = partial(agreeing, gradfix.majority), partial(agreeing, gradients)
FGMT = partial(task_vector, by_fgmt, all_of_it)


def _trained(name: str, start: Port, rates: tuple[float, ...], about: str, times: int = 1) -> Method:
    """At its best rate."""
    tried = tuple(
        Method(name, partial(over_images, partial(few_shot, start, lr, times)), {"lr": lr}, about=about)
        for lr in rates
    )
    return replace(tried[0], config={}, candidates=tried)


def methods(rates: tuple[float, ...]) -> tuple[Method, ...]:
    """All of them; ``rates``: of training on the few images."""
    return (
        Method(
            "own base", partial(whole, "tuned", base), about="The fine-tune on the base where it was made."
        ),
        Method(
            "all images", partial(whole, "plain", new_base), about="The new base fine-tuned on everything."
        ),
        _port("probe", probe, "Logistic regression on the new base's features of the few images."),
        _trained("few-shot", untouched, rates, "The new base trained on the few images: 2 T updates."),
        _vector("head alone", identity, nothing, "The new base with the fine-tune's head as it is."),
        _vector("naive", identity, all_of_it, "The task vector added as it is."),
        _vector("gradfix", identity, MAJORITY, "What of the task vector descends, by majority of images."),
        _vector("gradfix, mean", identity, MEAN, "What of the task vector descends, by the mean gradient."),
        _vector("weights, head alone", by_weights, nothing, "The fine-tune's head, permuted as by weights."),
        _vector("weights", by_weights, all_of_it, "Permuted by matching the bases' weights (TransFusion)."),
        _vector("weights + gradfix", by_weights, MAJORITY, "Permuted by weights, then masked by majority."),
        _vector("fgmt, head alone", by_fgmt, nothing, "The fine-tune's head, permuted as by fgmt."),
        _vector("fgmt", by_fgmt, all_of_it, "Permuted by gradients along the line from base to fine-tune."),
        _port("fgmt, by the command", by_command, "`regraft port` as it is: from files to a file."),
        _vector("fgmt + gradfix", by_fgmt, MAJORITY, "Permuted by fgmt, then masked by majority."),
        _vector("fgmt + gradfix, mean", by_fgmt, MEAN, "Permuted by fgmt, then masked by the mean gradient."),
        _trained("fgmt, then few-shot", FGMT, rates, "Moved by fgmt, then trained on the few images."),
        _trained("few-shot, twice as long", untouched, rates, "The new base trained for 4 T updates.", 2),
    )
