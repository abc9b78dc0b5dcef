"""Ensembles from one finished run: the source and what is transferred from it, beside members that were all trained.

The source is a member of every ensemble, and its training is in every total cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from regraft.core.clock import Cost, total_charge
from regraft.core.forward import call
from regraft.core.tensors import Tensors
from regraft.learning_transfer.driver import transfer_to_many
from regraft.training.evaluation import evaluating
from regraft.training.loop import Training
from regraft_bench.study import Measured, Method
from regraft_bench.transfer.setting import TransferSetting

MEMBERS = 5
BINS = 15

Member = tuple[Tensors, dict[str, Cost]]


def trained(setting: TransferSetting) -> Member:
    """The whole recipe, from a start of its own."""
    return setting.plain.tensors, {"training": setting.plain.cost}


def transferred(name: str, setting: TransferSetting) -> Member:
    """Transferred, and trained on as the scenario says."""
    found = setting.transfer(name)
    after = _trained_on(setting, name, found.params)
    return after.tensors, {**found.seconds, "training": after.cost}


def _trained_on(setting: TransferSetting, name: str, start: Tensors) -> Training:
    return setting.learn(
        f"{setting.target} after {name}", start, setting.settings.subsequent, f"{setting.target} after"
    )


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
    made = [make(setting.beside(f"member {number}")) for number in range(1, members)]
    return _together(setting, made)


def at_once(members: int, setting: TransferSetting) -> Measured:
    """The same by FGMT, whose gradients of the source serve all members: `regraft.transfer_to_many`."""
    name, settings = "fgmt, at once", setting.settings
    besides = [setting.beside(f"member {number}") for number in range(1, members)]
    found = transfer_to_many(
        setting.model,
        setting.path,
        [beside.target_start for beside in besides],
        setting.stream(),
        spec=setting.traced[0],
        gradient_batches=settings.gradient_batches,
        bn_batches=settings.bn_batches,
        generator=setting.generator("sweeps"),
    )
    after = [_trained_on(beside, name, found.target(number)) for number, beside in enumerate(besides)]
    made: list[Member] = [(each.tensors, {"training": each.cost}) for each in after]
    made[0] = made[0][0], {**found.seconds, **made[0][1]}
    return _together(setting, made)


def _together(setting: TransferSetting, members: Sequence[Member]) -> Measured:
    """The source and the members, as one."""
    networks = [setting.source.tensors, *(tensors for tensors, _ in members)]
    cost = {"source": setting.source.cost}
    for _, took in members:
        for phase, seconds in took.items():
            cost[phase] = cost.get(phase, Cost()) + seconds
    probabilities, labels = _probabilities(setting, networks)
    values = judged_together(probabilities, labels)
    return Measured(values | {"total [CPU s]": total_charge(cost).cpu, "members": len(networks)}, cost=cost)


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
    Method(
        "fgmt, at once",
        partial(at_once, MEMBERS),
        about="The same by fgmt, the source's gradients computed once for all members.",
    ),
)
