"""A fine-tune moved onto a new base with a few labelled images: what competes for it.

Base and new base are pre-trained from different seeds, and the base is fine-tuned for another task. A method has the
three networks, and so many images of each class; it gives the new base what the fine-tune learned. All heads begin at
0, so that the fine-tune's head travels as a part of what it learned, permuted on its input side alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
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
from regraft.core.forward import call, hooks
from regraft.core.guard import evaluating
from regraft.core.tensors import Batch, Pair, Perm, Tensors, fill_, state
from regraft.data import Split, draw_per_class
from regraft.learning_transfer import driver as learning_transfer
from regraft.learning_transfer.trajectory import Trajectory
from regraft.matching.descent import match
from regraft.networks.heads import find_head
from regraft.porting import gradfix
from regraft.porting.checkpoint_files import CheckpointFile
from regraft.symmetry import apply
from regraft.training.evaluation import accuracy, loss_and_accuracy
from regraft.training.gradients import gradients
from regraft.training.loop import Training, train_steps_
from regraft.training.statistics import reset_batchnorm
from regraft_bench.study import Measured, Method, Series
from regraft_bench.transfer.methods.transfers import delta_ratio
from regraft_bench.transfer.setting import PortSettings, TransferSetting

FEW_SHOT_BATCH = 100
TEST_IMAGES_PER_CLASS = 200
"""At most."""

# ---------------------------------------------------------------- what a method is given


@dataclass(frozen=True)
class FewShotData:
    """The labelled images that a method may see."""

    split: Split
    order: torch.Generator

    @property
    def batches(self) -> list[Pair]:
        return list(self.split.batches(min(FEW_SHOT_BATCH, len(self.split))))

    def stream(self) -> Iterator[Batch]:
        """Without end, each time in another order."""
        size = min(FEW_SHOT_BATCH, len(self.split))
        return chain.from_iterable(repeat(self.split.batches(size, generator=self.order, drop_last=True)))


Port = Callable[[TransferSetting, FewShotData, Clock], Tensors]
"""What the new base becomes; the clock is charged."""


def port_settings(setting: TransferSetting) -> PortSettings:
    settings = setting.settings
    assert isinstance(settings, PortSettings)
    return settings


def few_shot_data(setting: TransferSetting, count: int) -> FewShotData:
    """``count`` images of each class, mixed; a smaller number's are among a larger one's."""
    split = setting.dataset(replace(setting.settings.task, per_class=count), setting.seed).train
    mixed = split.subset(torch.randperm(len(split), generator=setting.generator("few mixed", count)))
    return FewShotData(mixed.to(setting.device), setting.generator("few", count))


def base(setting: TransferSetting) -> Tensors:
    return _zero_head(setting.model, setting.source_start)


def new_base(setting: TransferSetting) -> Tensors:
    return _zero_head(setting.model, setting.target_start)


def fine_tune_base(setting: TransferSetting) -> Training:
    return _fine_tune(setting, "tuned", base(setting))


def _fine_tune(setting: TransferSetting, purpose: str, start: Tensors) -> Training:
    return setting.train(purpose, setting.model, start, setting.data, setting.settings.recipe)


def _zero_head(model: nn.Module, theta: Tensors) -> Tensors:
    return theta | {name: torch.zeros_like(theta[name]) for name in head_names(model)}


def head_names(model: nn.Module) -> tuple[str, str]:
    name = find_head(model)
    return f"{name}.weight", f"{name}.bias"


def estimate_statistics(setting: TransferSetting, theta: Tensors, seen: FewShotData) -> Tensors:
    """BatchNorm statistics of the few images."""
    return reset_batchnorm(setting.model, theta, seen.batches, setting.settings.bn_batches or None)


# ---------------------------------------------------------------- task vectors: how they are permuted

Find = Callable[[TransferSetting, FewShotData, Clock], Perm]


def leave_in_place(setting: TransferSetting, seen: FewShotData, clock: Clock) -> Perm:
    return setting.spec.identity()


def match_base_weights(setting: TransferSetting, seen: FewShotData, clock: Clock) -> Perm:
    """TransFusion's: bases matched by their weights, heads of attention as wholes and what is within them."""
    target, source = map(setting.parameters, (new_base(setting), base(setting)))
    result = match(setting.spec, target, source, generator=setting.generator("sweeps"))
    clock.add(result.seconds)
    return result.perm


def match_gradients(setting: TransferSetting, seen: FewShotData, clock: Clock) -> Perm:
    """FGMT along the line from the base to the fine-tune, gradients on the few images."""
    end, steps = fine_tune_base(setting).tensors, setting.settings.steps
    result = learning_transfer.transfer(
        setting.model,
        Trajectory.linear(base(setting), end, steps, "uniform"),
        new_base(setting),
        seen.stream(),
        "fgmt",
        spec=setting.spec,
        bn_batches=0,
        generator=setting.generator("sweeps"),
    )
    clock.add(result.seconds)
    return result.perm


# ---------------------------------------------------------------- task vectors: what is kept of them

Keep = Callable[[TransferSetting, Tensors, Tensors, FewShotData], Tensors]
"""(setting, start, permuted task vector, images) -> what is added to the start."""


def full_task_vector(setting: TransferSetting, start: Tensors, tau: Tensors, seen: FewShotData) -> Tensors:
    return tau


def head_only(setting: TransferSetting, start: Tensors, tau: Tensors, seen: FewShotData) -> Tensors:
    """A control: the new base with the fine-tune's head."""
    return {name: torch.zeros_like(tensor) for name, tensor in tau.items()}


def mask_ascent(
    direction: gradfix.Direction, setting: TransferSetting, start: Tensors, tau: Tensors, seen: FewShotData
) -> Tensors:
    return gradfix.mask(tau, direction(setting.model, start, seen.batches, cross_entropy))


keep_by_majority = partial(mask_ascent, gradfix.majority)
keep_by_mean = partial(mask_ascent, gradients)


def add_task_vector(find: Find, keep: Keep, setting: TransferSetting, seen: FewShotData, clock: Clock) -> Tensors:
    """theta_B with the fine-tune's head, plus alpha times what is kept of its other layers' change."""
    model, before, after = setting.model, base(setting), fine_tune_base(setting).tensors
    tau = {name: tensor - before[name] for name, tensor in setting.parameters(after).items()}
    perm = find(setting, seen, clock)
    with clock.phase("graft"):
        tau = apply(setting.spec, perm, tau)
        start = new_base(setting) | {name: tau.pop(name) for name in head_names(model)}
    with clock.phase("batchnorm"):
        start = estimate_statistics(setting, start, seen)
    with clock.phase("mask"):
        kept = keep(setting, start, tau, seen)
    lowest, best = float("inf"), start
    with clock.phase("choice"):
        for alpha in port_settings(setting).alphas:
            theta = start | {name: start[name] + alpha * tensor for name, tensor in kept.items()}
            theta = estimate_statistics(setting, theta, seen)
            loss, _ = loss_and_accuracy(model, theta, seen.batches)
            if loss < lowest:
                lowest, best = loss, theta
    return best


# ---------------------------------------------------------------- other ports


def port_by_command(setting: TransferSetting, seen: FewShotData, clock: Clock) -> Tensors:
    """`regraft.port`, from files to a file; the bases have no heads there, and the step is chosen on the few images."""
    tuned = fine_tune_base(setting).tensors
    theta = {"base": base(setting), "tuned": tuned, "new_base": new_base(setting)}
    head = head_names(setting.model)
    with TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name}.safetensors") for name in theta}
        for name, file in files.items():
            write_tensors(file, {n: x for n, x in theta[name].items() if name == "tuned" or n not in head})
        result = regraft.port(
            files["base"],
            files["tuned"],
            files["new_base"],
            Path(folder, "port"),
            model=setting.model,
            inputs=seen.batches[0][0][:2],
            spec=setting.spec,
            data={"train": seen.batches, "validation": seen.batches},
            method="fgmt",
            steps=setting.settings.steps,
        )
        clock.add(result.seconds)
        return dict(CheckpointFile.open(result.out))


def keep_new_base(setting: TransferSetting, seen: FewShotData, clock: Clock) -> Tensors:
    return new_base(setting)


def few_shot_finetune(
    start: Port, lr: float, times: int, setting: TransferSetting, seen: FewShotData, clock: Clock
) -> Tensors:
    """Fine-tune on the few images: ``times`` as many gradients as FGMT takes, the rate falling to 0."""
    updates, network = times * 2 * setting.settings.steps, copy.deepcopy(setting.model)
    fill_(network, start(setting, seen, clock))
    optimiser = replace(setting.settings.recipe, lr=lr).optimiser(network.train())

    def rate(step: int) -> float:
        return lr * (1 - step / updates)

    with clock.phase("training"):
        train_steps_(network, optimiser, seen.stream(), range(updates), learning_rate=rate)
    with clock.phase("batchnorm"):
        return estimate_statistics(setting, state(network), seen)


def fit_probe(setting: TransferSetting, seen: FewShotData, clock: Clock) -> Tensors:
    """Logistic regression on the new base's features."""
    from sklearn.linear_model import LogisticRegression

    model, head = setting.model, find_head(setting.model)
    features: list[Tensor] = []

    def see(_name: str, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        features.append(inputs[0])

    with clock.phase("batchnorm"):
        theta = estimate_statistics(setting, new_base(setting), seen)
    with clock.phase("training"):
        with (
            torch.no_grad(),
            evaluating(model),
            hooks({head: model.get_submodule(head)}, see),
        ):
            for images, _ in seen.batches:
                call(model, theta, images)
        labels = torch.cat([labels for _, labels in seen.batches])
        fit = LogisticRegression(max_iter=1000).fit(torch.cat(features).cpu(), labels.cpu())
    values = map(torch.as_tensor, (fit.coef_, fit.intercept_))
    return theta | {name: value.to(theta[name]) for name, value in zip(head_names(model), values, strict=True)}


# ---------------------------------------------------------------- what a row holds


def measure_port(port: Port, setting: TransferSetting) -> Measured:
    """One port for each number of images; the cost is that of all of them, and by number in a series."""
    accuracies, costs, clock = [], [], Clock()
    for count in port_settings(setting).images:
        own = Clock()
        theta = port(setting, few_shot_data(setting, count), own)
        accuracies.append(accuracy(setting.model, theta, eval_batches(setting)))
        costs.append(own.cost)
        clock.add(own.seconds)
    return _measure(setting, accuracies, costs, clock.seconds)


def finetune_on_all(purpose: str, start: Callable[[TransferSetting], Tensors], setting: TransferSetting) -> Measured:
    """A fine-tuning on all images: no port, but what one would like to have."""
    training, count = _fine_tune(setting, purpose, start(setting)), len(port_settings(setting).images)
    own = accuracy(setting.model, training.tensors, eval_batches(setting))
    measured = _measure(setting, [own] * count, [training.cost] * count, {"training": training.cost})
    ratio = delta_ratio(setting, start(setting), training.tensors)
    return replace(measured, values={**measured.values, "delta_ratio": ratio})


def _measure(
    setting: TransferSetting, accuracies: Sequence[float], costs: Sequence[Cost], seconds: dict[str, Cost]
) -> Measured:
    counts = port_settings(setting).images
    mean = sum(accuracies) / len(accuracies)
    if setting.tuning:
        return Measured({"validation": mean}, cost=seconds)
    return Measured(
        values={
            "accuracy": mean,
            **dict(zip(map(metric_name, counts), accuracies, strict=True)),
            **setting.relatedness,
        },
        series={
            "accuracy by images": Series.over("images a class", counts, accuracies),
            "cost by images [CPU s]": Series.over("images a class", counts, [cost.cpu for cost in costs]),
        },
        cost=seconds,
        notes={"test images": sum(len(labels) for _, labels in eval_batches(setting))},
    )


def metric_name(count: int) -> str:
    """The name of a value: test accuracy with so many images of each class."""
    return f"accuracy, {count} a class"


def eval_batches(setting: TransferSetting) -> list[Pair]:
    """Test images, as many of each class; a tuning run's are validation images."""
    split = setting.data.validation if setting.tuning else setting.data.test
    count = min(TEST_IMAGES_PER_CLASS, int(split.labels.bincount().min()))
    drawn = draw_per_class(split.labels, count, setting.generator("judges"))
    return list(split.subset(drawn).batches(500, device=setting.device))


# ---------------------------------------------------------------- all of them


def make_method(name: str, port: Port, about: str) -> Method:
    return Method(name, partial(measure_port, port), about=about)


def _vectors(find: Find, *rows: tuple[str, Keep, str]) -> tuple[Method, ...]:
    return tuple(make_method(name, partial(add_task_vector, find, keep), about) for name, keep, about in rows)


def make_few_shot(name: str, start: Port, rates: Sequence[float], about: str, times: int = 1) -> Method:
    """At its best rate."""
    candidates = tuple(
        replace(make_method(name, partial(few_shot_finetune, start, lr, times), about), config={"lr": lr})
        for lr in rates
    )
    return replace(candidates[0], config={}, candidates=candidates)


def port_methods(rates: Sequence[float]) -> tuple[Method, ...]:
    """All of them; ``rates``: of training on the few images."""
    own_base, all_images = (
        partial(finetune_on_all, "tuned", base),
        partial(finetune_on_all, "plain", new_base),
    )
    fgmt = partial(add_task_vector, match_gradients, full_task_vector)
    return (
        Method("own base", own_base, about="The fine-tune on the base where it was made."),
        Method("all images", all_images, about="The new base fine-tuned on everything."),
        make_method("probe", fit_probe, "Logistic regression on the new base's features of the few images."),
        make_few_shot("few-shot", keep_new_base, rates, "The new base trained on the few images: 2 T updates."),
        *_vectors(
            leave_in_place,
            ("head alone", head_only, "The new base with the fine-tune's head as it is."),
            ("naive", full_task_vector, "The task vector added as it is."),
            ("gradfix", keep_by_majority, "What of the task vector descends, by majority of images."),
            ("gradfix, mean", keep_by_mean, "What of the task vector descends, by the mean gradient."),
        ),
        *_vectors(
            match_base_weights,
            ("weights, head alone", head_only, "The fine-tune's head, permuted as by weights."),
            ("weights", full_task_vector, "Permuted by matching the bases' weights (TransFusion)."),
            ("weights + gradfix", keep_by_majority, "Permuted by weights, then masked by majority."),
        ),
        *_vectors(
            match_gradients,
            ("fgmt, head alone", head_only, "The fine-tune's head, permuted as by fgmt."),
            ("fgmt", full_task_vector, "Permuted by gradients along the line from base to fine-tune."),
        ),
        make_method("fgmt, by the command", port_by_command, "`regraft port` as it is: from files to a file."),
        *_vectors(
            match_gradients,
            ("fgmt + gradfix", keep_by_majority, "Permuted by fgmt, then masked by majority."),
            ("fgmt + gradfix, mean", keep_by_mean, "Permuted by fgmt, then masked by the mean gradient."),
        ),
        make_few_shot("fgmt, then few-shot", fgmt, rates, "Moved by fgmt, then trained on the few images."),
        make_few_shot("few-shot, twice as long", keep_new_base, rates, "The new base trained for 4 T updates.", 2),
    )
