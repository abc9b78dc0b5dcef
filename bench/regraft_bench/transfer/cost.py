"""What each method costs in gradients, in floating-point operations and in seconds, without evaluation."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from regraft.learning_transfer.methods import TRANSFER_METHODS
from regraft_bench.study import Measured, Method, first_paragraph
from regraft_bench.transfer import methods
from regraft_bench.transfer.setting import TransferSetting


def _product(total: Any, left: Any, right: Any, **_: Any) -> int:
    """Operations of total += left @ right, from the shapes; with a batch, of the sum over it."""
    *batch, rows, inner = left
    return 2 * math.prod(batch) * rows * inner * right[-1]


def _similarities(targets: Any, sources: Any, axes: Any, *_: Any, **__: Any) -> int:
    """Operations of the products of all terms: two for each entry of a target and each unit of the source."""
    return sum(2 * math.prod(shape) * shape[1 + axis] for shape, axis in zip(targets, axes, strict=True))


UNKNOWN = {
    torch.ops.aten.addmm_: _product,
    torch.ops.aten.addbmm_: _product,
    torch.ops.regraft.similarity: _similarities,
}
"""What similarities are made with, and torch's own table lacks."""


def counted(name: str, setting: TransferSetting) -> Measured:
    """A transfer twice: timed, and with torch's counter of operations (products and convolutions; an assignment's
    comparisons are none). The oracle pays for the training that it needs.
    """
    end = setting.plain.tensors if name == "oracle" else None
    found = setting.transfer(name, target_end=end, evaluate=False)
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
        setting.transfer(name, target_end=end, evaluate=False)
    flop, gradients, cost = counter.get_total_flops(), found.gradients, dict(found.seconds)
    if name == "oracle":
        trained = plain(setting)
        flop, gradients = flop + trained.values["work [FLOP]"], trained.values["gradients"]
        cost |= trained.cost
    return Measured({"gradients": gradients, "work [FLOP]": flop}, cost=cost)


def plain(setting: TransferSetting) -> Measured:
    """Plain training's updates; those of the optimiser itself are elementwise and not counted."""
    trained = methods.plain(setting)
    values = {
        "gradients": trained.values["gradients"],
        "work [FLOP]": trained.values["gradient work [FLOP]"],
    }
    return Measured(values, cost=trained.cost)


COUNTED = (
    Method("plain", plain),
    *(
        Method(name, partial(counted, name), about=f"{first_paragraph(steps)} Its operations are counted.")
        for name, steps in TRANSFER_METHODS.items()
    ),
)
