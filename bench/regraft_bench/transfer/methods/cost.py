"""What each method costs in gradients, in floating-point operations and in seconds, without evaluation."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from regraft.learning_transfer.methods import TRANSFER_METHODS
from regraft_bench.study import Measured, Method, first_paragraph
from regraft_bench.transfer.methods.transfers import run_transfer
from regraft_bench.transfer.setting import TransferSetting, count_updates


def product_flop(total: Any, left: Any, right: Any, **_: Any) -> int:
    """Operations of total += left @ right, from the shapes; with a batch, of the sum over it."""
    *batch, rows, inner = left
    return 2 * math.prod(batch) * rows * inner * right[-1]


def similarity_flop(targets: Any, sources: Any, axes: Any, *_: Any, **__: Any) -> int:
    """Operations of the products of all terms: two for each entry of a target and each unit of the source."""
    return sum(2 * math.prod(shape) * shape[1 + axis] for shape, axis in zip(targets, axes, strict=True))


SIMILARITY_FLOP = {
    torch.ops.aten.addmm_: product_flop,
    torch.ops.aten.addbmm_: product_flop,
    torch.ops.regraft.similarity: similarity_flop,
}
"""What similarities are made with, and torch's own table lacks."""


def count_training(setting: TransferSetting) -> Measured:
    """Plain training's updates; those of the optimiser itself are elementwise and not counted."""
    updates = count_updates(setting.settings.recipe, setting.data)
    values = {"gradients": updates, "work [FLOP]": updates * setting.gradient_flop}
    return Measured(values, cost={"training": setting.plain.cost})


def count_transfer(name: str, setting: TransferSetting) -> Measured:
    """A transfer twice: timed, and with torch's counter of operations (products and convolutions; an assignment's
    comparisons are none). The oracle pays for the training that it needs.
    """
    transfer = run_transfer(setting, name, evaluate=False)
    with FlopCounterMode(display=False, custom_mapping=SIMILARITY_FLOP) as counter:
        run_transfer(setting, name, evaluate=False)
    values, cost = (
        {"gradients": transfer.gradients, "work [FLOP]": counter.get_total_flops()},
        transfer.seconds,
    )
    if name == "oracle":
        training = count_training(setting)
        values = {key: count + training.values[key] for key, count in values.items()}
        cost = {**cost, **training.cost}
    return Measured(values, cost=cost)


COUNTS = (
    Method("plain", count_training),
    *(
        Method(name, partial(count_transfer, name), about=f"{first_paragraph(steps)} Its operations are counted.")
        for name, steps in TRANSFER_METHODS.items()
    ),
)
