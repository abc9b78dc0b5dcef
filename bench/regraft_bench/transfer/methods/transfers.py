"""Plain training, and the methods that move what a source learned to another start: what a scenario compares.

Source and target differ only in the seed of their initial values and of their data order. ``plain`` trains the
target's own start; every other method moves the source's path there without training, keeps the step that is best on
validation, and is then trained on. Accuracies are shares of 1, on the test split unless they say validation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from regraft.core.clock import Cost, total_charge
from regraft.core.tensors import Tensors, norm
from regraft.learning_transfer import driver as learning_transfer
from regraft.learning_transfer.driver import Transfer
from regraft.learning_transfer.methods import TRANSFER_METHODS, TransferMethod
from regraft.learning_transfer.trajectory import Trajectory
from regraft.symmetry import apply
from regraft.training.evaluation import accuracy
from regraft.training.loop import Training
from regraft_bench.study import Measured, Method, Series, first_paragraph
from regraft_bench.timing import peak_resident
from regraft_bench.transfer.setting import TransferSetting, count_updates


def train_plainly(setting: TransferSetting) -> Measured:
    """Train the target's own start: what a transfer is to save."""
    forget_peak_memory(setting.device)
    training = setting.plain
    end, updates = training.history[-1], count_updates(setting.settings.recipe, setting.data)
    return Measured(
        values={
            "accuracy": end.test_accuracy,
            "validation": end.validation_accuracy,
            "final": end.test_accuracy,
            "delta_ratio": delta_ratio(setting, setting.target_start, training.tensors),
            "gradients": updates,
            "gradient work [FLOP]": updates * setting.gradient_flop,
            "peak_memory [bytes]": peak_memory(setting.device),
        },
        series=training_curves(training),
        cost={"training": training.cost},
        notes={
            "parameters": sum(p.numel() for p in setting.model.parameters()),
            "images": len(setting.data.train),
        },
    )


def move_source(method: str | TransferMethod, setting: TransferSetting) -> Measured:
    """Move the source's path by a method of the library, or by one like those. The oracle knows what training the
    target would give, so that training is its price.
    """
    transfer = run_transfer(setting, method)
    return measure_transfer(setting, transfer, {"training": setting.plain.cost} if method == "oracle" else {})


TRANSFERS = (
    Method("plain", train_plainly),
    *(
        Method(name, partial(move_source, name), about=first_paragraph(steps))
        for name, steps in TRANSFER_METHODS.items()
    ),
)


def run_transfer(
    setting: TransferSetting,
    method: str | TransferMethod,
    *,
    path: Trajectory | None = None,
    evaluate: bool = True,
) -> Transfer:
    """Transfer the source's path, or another one, to the target's start.

    evaluate: every step on validation, to keep the best; otherwise the last one is kept.
    """
    settings = setting.settings
    target_end = setting.plain.tensors if method == "oracle" else None
    forget_peak_memory(setting.device)
    return learning_transfer.transfer(
        setting.model,
        setting.path if path is None else path,
        setting.target_start,
        setting.stream(),
        method,
        spec=setting.spec,
        target_end=target_end,
        validation=setting.validation() if evaluate else None,
        gradient_batches=settings.gradient_batches,
        bn_batches=settings.bn_batches,
        from_identity=settings.from_identity,
        generator=setting.generator("sweeps"),
    )


# ---------------------------------------------------------------- what a row holds


def measure_transfer(setting: TransferSetting, transfer: Transfer, before: Mapping[str, Cost]) -> Measured:
    """What a transfer came to, and the training that follows it.

    before: what else the method took, by phase.
    """
    values = {
        "validation": transfer.best_accuracy,
        "best_step": transfer.best_step,
        "gradients": transfer.gradients,
        "gradient work [FLOP]": transfer.gradients * setting.gradient_flop,
        "objective": transfer.objectives[-1] if transfer.objectives else None,
        "trace [CPU s]": setting.trace_cost.cpu,
        "trace [wall s]": setting.trace_cost.wall,
    }
    series = {"validation": Series.over("step", range(len(transfer.accuracies)), transfer.accuracies)}
    if len({id(perm) for perm in transfer.perms[1:]}) > 1:
        series["unsettled"] = distances_to_last(setting, transfer)
    images, chance = len(setting.data.validation), chance_level(setting)
    margin = 3 * math.sqrt(chance * (1 - chance) / images)
    notes = {"at chance": max(transfer.accuracies[1:]) <= chance + margin}
    return measure_start(setting, transfer.params, {**transfer.seconds, **before}, values, series, notes)


def measure_start(
    setting: TransferSetting,
    params: Tensors,
    cost: Mapping[str, Cost],
    values: Mapping[str, float | None],
    series: Mapping[str, Series] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Measured:
    """What a start is worth: test accuracy as it is, and the training that follows, where the scenario has one.

    A tuning run has none, and sees no test data.
    """
    measured: dict[str, float | None] = {
        "delta_ratio": delta_ratio(setting, setting.source_start, setting.source.tensors),
        "source": setting.source.history[-1].test_accuracy,
        "peak_memory [bytes]": peak_memory(setting.device),
        **values,
    }
    curves = dict(series or {})
    if setting.tuning:
        pass
    elif setting.settings.subsequent is None:
        measured["accuracy"] = accuracy(setting.model, params, setting.tests())
    else:
        assert setting.method is not None
        purpose = f"after {setting.method.name}"
        after = setting.learn(purpose, params, setting.settings.subsequent, "subsequent")
        measured |= {"accuracy": after.history[0].test_accuracy, "final": after.history[-1].test_accuracy}
        curves |= training_curves(after, total_charge(cost))
    return Measured(measured, curves, cost, notes or {})


def chance_level(setting: TransferSetting) -> float:
    """Validation accuracy of naming the most frequent class."""
    labels = setting.data.validation.labels
    return float(labels.bincount().max()) / len(labels)


def distances_to_last(setting: TransferSetting, transfer: Transfer) -> Series:
    """|pi_t Delta - pi_T Delta| / |Delta| over t = 1 .. T: lemma 3.2 wants it to become small."""
    start, end = setting.source_start, setting.parameters(setting.source.tensors)
    delta = {name: end[name] - start[name] for name in end}
    last = apply(setting.spec, transfer.perms[-1], delta)
    distances = [
        norm(tensor - last[name] for name, tensor in apply(setting.spec, perm, delta).items())
        for perm in transfer.perms[1:]
    ]
    scale = norm(delta.values())
    return Series.over("step", range(1, len(transfer.perms)), [distance / scale for distance in distances])


def training_curves(training: Training, before: Cost | None = None) -> dict[str, Series]:
    """A training's test accuracy by epoch, and what had been paid by then, ``before`` included."""
    at = [row.epoch for row in training.history]
    paid = [(before or Cost()) + row.cost for row in training.history]
    return {
        "subsequent": Series.over("epoch", at, [row.test_accuracy for row in training.history]),
        "subsequent cost [CPU s]": Series.over("epoch", at, [cost.cpu for cost in paid]),
        "subsequent cost [wall s]": Series.over("epoch", at, [cost.wall for cost in paid]),
    }


def delta_ratio(setting: TransferSetting, start: Tensors, end: Tensors) -> float:
    """|end - start| / |start| over the model's parameters: whether what is moved dominates what it is added to."""
    before = setting.parameters(start)
    return norm(end[name] - before[name] for name in before) / norm(before.values())


def forget_peak_memory(device: str) -> None:
    """Start a new peak on a GPU; that of a CPU is the process's own, and only rises."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: str) -> int | None:
    """Bytes: allocated at most on the GPU since :func:`forget_peak_memory`, or resident in this process so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return peak_resident()
