"""Ensembles from one finished run: the source and what is transferred from it, beside members that were all trained.

The source is a member of every ensemble, and its training is in every total cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from regraft.clock import Cost, charged
from regraft.evaluation import evaluating
from regraft.forward import call
from regraft.studies.study import Measured, Method
from regraft.studies.transfer.setting import TransferSetting
from regraft.tensors import Tensors

MEMBERS = 5
BINS = 15

Member = tuple[Tensors, dict[str, Cost]]


def trained(setting: TransferSetting) -> Member:
    """The whole recipe, from a start of its own."""
    return setting.plain.tensors, {"training": setting.plain.cost}


def transferred(name: str, setting: TransferSetting) -> Member:
    """Transferred, and trained on as the scenario says."""
    found = setting.transfer(name)
    after = setting.learn(
        f"{setting.target} after {name}", found.params, setting.settings.subsequent, f"{setting.target} after"
    )
    return after.tensors, {**found.seconds, "training": after.cost}


def briefly_trained(setting: TransferSetting) -> Member:
    """What follows a transfer, without one: the control."""
    after = setting.learn(
        f"{setting.target}, brief",
        setting.target_start,
        setting.settings.subsequent,
        f"{setting.target} after",
    )
    return after.tensors, {"training": after.cost}


def ensemble(make: Callable[[TransferSetting], Member], members: int, setting: TransferSetting) -> Measured:
    """Of the source and ``members - 1`` others. Raises ValueError for no members."""
    if members < 1:
        raise ValueError(f"an ensemble has at least one member, not {members}")
    networks, cost = [setting.source.tensors], {"source": setting.source.cost}
    for number in range(1, members):
        tensors, took = make(setting.beside(f"member {number}"))
        networks.append(tensors)
        for phase, seconds in took.items():
            cost[phase] = cost.get(phase, Cost()) + seconds
    probabilities, labels = _probabilities(setting, networks)
    values = judged_together(probabilities, labels)
    return Measured(values | {"total [CPU s]": charged(cost).cpu, "members": members}, cost=cost)


def _probabilities(setting: TransferSetting, networks: Sequence[Tensors]) -> tuple[Tensor, Tensor]:
    """[members, images, classes] on the test split, and its labels."""
    parts, labels = [], []
    with torch.inference_mode(), evaluating(setting.model):
        for images, own in setting.tests():
            parts.append(torch.stack([call(setting.model, theta, images).softmax(-1) for theta in networks]))
            labels.append(own)
    return torch.cat(parts, 1), torch.cat(labels)


def judged_together(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Of the mean of the members' probabilities, [members, images, classes].

    nll: mean negative log-likelihood in nats. calibration error: expected, in 15 bins of equal width (Guo et al.,
    2017). disagreement: share of images of which two members say different things, over pairs; 0 for one member.
    """
    mean = probabilities.double().mean(0)
    confidence, answer = mean.max(-1)
    right = (answer == labels).double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, confidence - right)
    answers = probabilities.argmax(-1)
    own = (answers == labels).double().mean(1)
    count = len(answers)
    pairs = [(answers[i] != answers[j]).double().mean() for i in range(count) for j in range(i)]
    return {
        "accuracy": float(right.mean()),
        "nll [nats]": float(-mean.gather(1, labels[:, None]).clamp_min(1e-12).log().mean()),
        "calibration error": float(gaps.abs().sum() / len(labels)),
        "mean of members": float(own.mean()),
        "worst member": float(own.min()),
        "disagreement": float(sum(pairs) / len(pairs)) if pairs else 0.0,
    }


ENSEMBLES = (
    Method("source alone", partial(ensemble, trained, 1), about="The source, without others."),
    Method("all trained", partial(ensemble, trained, MEMBERS), about="The source and others, each trained."),
    Method(
        "brief",
        partial(ensemble, briefly_trained, MEMBERS),
        about="The source and others, each trained with as many gradients as FGMT takes.",
    ),
    *(
        Method(
            name,
            partial(ensemble, partial(transferred, name), MEMBERS),
            about=f"The source and others, to whose starts {name} moved its training.",
        )
        for name in ("naive", "fgmt", "gmt")
    ),
)
