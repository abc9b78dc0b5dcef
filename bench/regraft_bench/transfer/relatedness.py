"""How related two bases are: the cosine of their weights, and the barrier on the line between them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regraft.matching.descent import match
from regraft.networks.heads import find_head
from regraft.symmetry import apply
from regraft.training.landscape import interpolate
from regraft.training.statistics import batch_norms

if TYPE_CHECKING:
    from regraft_bench.transfer.setting import TransferSetting

IMAGES, POINTS, STATISTICS_BATCHES = 1000, 7, 5
COSINE, BARRIER = "cosine of the bases", "barrier between the bases [nats]"
MATCHED = ", matched"
"""Added to the names of what is measured after the old base's units are matched to the new one's, by their weights."""


def measure_relatedness(setting: TransferSetting) -> dict[str, float]:
    """Of the two bases, with the heads of their pre-training: cosine and barrier as they are, and after matching.

    The barrier is of the loss on validation images of the old base's pre-training, BatchNorm statistics estimated
    anew at every point. The cosine is over all matrices and filters but the head's. The pre-training must have as many
    classes as the task.
    """
    pretraining = setting.settings.pretraining
    assert pretraining is not None
    (_, first), *_ = pretraining.list_stages("source")
    data, model = setting.stage_data(first), setting.build("source")
    old, new = setting.pretrain("source"), setting.pretrain("target")
    generator = setting.generator("relatedness")
    images = list(islice(data.validation.batches(IMAGES, generator=generator), 1))
    statistics = list(islice(data.train.batches(128, generator=generator), STATISTICS_BATCHES))
    head = find_head(model)
    parameters = [name for name, _ in model.named_parameters()]
    perm = match(setting.spec, {n: new[n] for n in parameters}, {n: old[n] for n in parameters}).perm
    values = {}
    for suffix, moved in (("", old), (MATCHED, apply(setting.spec, perm, old))):
        values[COSINE + suffix] = measure_cosine(moved, new, [n for n in parameters if not n.startswith(f"{head}.")])
        line = interpolate(model, moved, new, images, POINTS, statistics=statistics if batch_norms(model) else None)
        values[BARRIER + suffix] = line.barrier
    return values


def measure_cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: list[str]) -> float:
    """Of the matrices and filters of these names, laid end to end."""
    flat = [torch.cat([theta[n].double().flatten() for n in names if theta[n].ndim > 1]) for theta in (one, other)]
    return float(flat[0] @ flat[1] / (flat[0].norm() * flat[1].norm()))
