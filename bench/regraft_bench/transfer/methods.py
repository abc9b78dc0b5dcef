"""Plain training, and the methods that move what a source learned to another start: what a scenario compares.

Source and target differ only in the seed of their initial values and of their data order. ``plain`` trains the
target's own start; every other method moves the source's path there without training, keeps the step that is best on
validation, and is then trained on. Accuracies are shares of 1, on the test split unless they say validation.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regraft.core.clock import Cost, total_charge
from regraft.core.tensors import Tensors
from regraft.learning_transfer.driver import Transfer
from regraft.learning_transfer.methods import TRANSFER_METHODS, TransferMethod
from regraft.symmetry import apply
from regraft.training.evaluation import accuracy
from regraft.training.loop import Training
from regraft_bench.study import Measured, Method, Series, first_paragraph
from regraft_bench.transfer.setting import TransferSetting, forget_peak_memory

# ---------------------------------------------------------------- methods


def plain(setting: TransferSetting) -> Measured:
    """Train the target's own start: what a transfer is to save."""
    forget_peak_memory(setting.device)
    trained, recipe = setting.plain, setting.settings.recipe
    end, images = trained.history[-1], len(setting.data.train)
    updates = recipe.epochs * math.ceil(images / recipe.batch_size)
    return Measured(
        values={
            "accuracy": end.test_accuracy,
            "validation": end.validation_accuracy,
            "final": end.test_accuracy,
            "delta_ratio": delta_ratio(setting.model, setting.target_start, trained.tensors),
            "gradients": updates,
            "gradient work [FLOP]": updates * setting.gradient_flop,
            "peak_memory [bytes]": peak_memory(setting.device),
        },
        series=curve(trained),
        cost={"training": trained.cost},
        notes={
            "parameters": sum(p.numel() for p in setting.model.parameters()),
            "images": images,
        },
    )


def moved(method: str | TransferMethod, setting: TransferSetting) -> Measured:
    """Move the source's path by a method of the library, or by one like those."""
    return measured(setting, setting.transfer(method))


def oracle(setting: TransferSetting) -> Measured:
    """A bound, no method: it knows what training the target would give, so that training is its price."""
    found = setting.transfer("oracle", target_end=setting.plain.tensors)
    return measured(setting, found, {"training": setting.plain.cost})


METHODS = (
    Method("plain", plain),
    *(
        Method(name, oracle if name == "oracle" else partial(moved, name), about=first_paragraph(steps))
        for name, steps in TRANSFER_METHODS.items()
    ),
)


# ---------------------------------------------------------------- what a row holds


def measured(setting: TransferSetting, found: Transfer, before: Mapping[str, Cost] | None = None) -> Measured:
    """What a transfer came to, and the training that follows it.

    before: what else the method took, by phase.
    """
    trace_cost = setting.traced[1]
    values = {
        "validation": found.best_accuracy,
        "best_step": found.best_step,
        "gradients": found.gradients,
        "gradient work [FLOP]": found.gradients * setting.gradient_flop,
        "objective": found.objectives[-1] if found.objectives else None,
        "trace [CPU s]": trace_cost.cpu,
        "trace [wall s]": trace_cost.wall,
    }
    series = {"validation": Series.over("step", range(len(found.accuracies)), found.accuracies)}
    if len({id(perm) for perm in found.perms[1:]}) > 1:
        series["unsettled"] = unsettled(setting, found)
    images, chance = len(setting.data.validation), chance_level(setting)
    margin = 3 * math.sqrt(chance * (1 - chance) / images)
    notes = {"at chance": max(found.accuracies[1:]) <= chance + margin}
    return judged(setting, found.params, {**found.seconds, **(before or {})}, values, series, notes)


def judged(
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
    values = {
        "delta_ratio": delta_ratio(setting.model, setting.source_start, setting.source.tensors),
        "source": setting.source.history[-1].test_accuracy,
        "peak_memory [bytes]": peak_memory(setting.device),
        **values,
    }
    series = dict(series or {})
    if setting.tuning:
        pass
    elif setting.settings.subsequent is None:
        values["accuracy"] = accuracy(setting.model, params, setting.tests())
    else:
        purpose = f"after {setting.method.name}"
        after = setting.learn(purpose, params, setting.settings.subsequent, "subsequent")
        values |= {"accuracy": after.history[0].test_accuracy, "final": after.history[-1].test_accuracy}
        series |= curve(after, total_charge(cost))
    return Measured(values, series, cost, notes or {})


def chance_level(setting: TransferSetting) -> float:
    """Validation accuracy of naming the most frequent class."""
    labels = setting.data.validation.labels
    return float(labels.bincount().max()) / len(labels)


def unsettled(setting: TransferSetting, found: Transfer) -> Series:
    """|pi_t Delta - pi_T Delta| / |Delta| over t = 1 .. T: lemma 3.2 wants it to become small."""
    delta = {
        name: setting.source.tensors[name] - setting.source_start[name]
        for name, _ in setting.model.named_parameters()
    }
    spec = setting.traced[0]
    last = apply(spec, found.perms[-1], delta)
    apart = [
        norm(tensor - last[name] for name, tensor in apply(spec, perm, delta).items())
        for perm in found.perms[1:]
    ]
    return Series.over("step", range(1, len(found.perms)), [value / norm(delta.values()) for value in apart])


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


def peak_memory(device: str) -> int:
    """Bytes: allocated at most on the GPU since :func:`forget_peak_memory`, or resident in this process so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
