"""Ensembles from one finished run: the source and what is transferred from it, against members that were all trained.

The source is a member of every ensemble, and its training is in every total cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from regraft.core.clock import Clock, Cost
from regraft.core.forward import call
from regraft.core.guard import evaluating
from regraft.core.tensors import Tensors
from regraft.learning_transfer.driver import transfer_to_many
from regraft.training.loop import Training
from regraft_bench.study import Measured, Method
from regraft_bench.transfer.methods.transfers import run_transfer
from regraft_bench.transfer.setting import TransferSetting

MEMBERS = 5
BINS = 15

Member = tuple[Tensors, dict[str, Cost]]


def train_member(setting: TransferSetting) -> Member:
    """The whole recipe, from a start of its own."""
    return setting.plain.tensors, {"training": setting.plain.cost}


def train_member_briefly(setting: TransferSetting) -> Member:
    """What follows a transfer, without one: the control."""
    training = _train_on(setting, f"{setting.target}, brief", setting.target_start)
    return training.tensors, {"training": training.cost}


def transfer_member(name: str, setting: TransferSetting) -> Member:
    """Transferred, and trained on as the scenario says."""
    transfer = run_transfer(setting, name)
    after = _train_on(setting, f"{setting.target} after {name}", transfer.params)
    return after.tensors, {**transfer.seconds, "training": after.cost}


def _train_on(setting: TransferSetting, purpose: str, start: Tensors) -> Training:
    recipe = setting.settings.subsequent
    assert recipe is not None
    return setting.learn(purpose, start, recipe, f"{setting.target} after")


def make_ensemble(make: Callable[[TransferSetting], Member], count: int, setting: TransferSetting) -> Measured:
    """Of the source and ``count - 1`` others. Raises ValueError for no members."""
    if count < 1:
        raise ValueError(f"an ensemble has at least one member, not {count}")
    return measure_together(setting, [make(setting.sibling(f"member {number}")) for number in range(1, count)])


def transfer_all_at_once(count: int, setting: TransferSetting) -> Measured:
    """The same by FGMT, whose gradients of the source serve all members: `regraft.transfer_to_many`."""
    settings = setting.settings
    siblings = [setting.sibling(f"member {number}") for number in range(1, count)]
    transfers = transfer_to_many(
        setting.model,
        setting.path,
        [sibling.target_start for sibling in siblings],
        setting.stream(),
        spec=setting.spec,
        gradient_batches=settings.gradient_batches,
        bn_batches=settings.bn_batches,
        generator=setting.generator("sweeps"),
    )
    trainings = [
        _train_on(sibling, f"{sibling.target} after fgmt, at once", transfers.target(number))
        for number, sibling in enumerate(siblings)
    ]
    members = [(training.tensors, {"training": training.cost}) for training in trainings]
    return measure_together(setting, members, transfers.seconds)


def measure_together(
    setting: TransferSetting, members: Sequence[Member], shared: Mapping[str, Cost] | None = None
) -> Measured:
    """The source and the members, as one; ``shared``: what was paid for all members at once."""
    networks = [setting.source.tensors, *(tensors for tensors, _ in members)]
    clock = Clock({"source": setting.source.cost})
    for seconds in (shared or {}, *(seconds for _, seconds in members)):
        clock.add(seconds)
    probabilities, labels = _probabilities(setting, networks)
    values = evaluate_together(probabilities, labels)
    more = {"total [CPU s]": clock.cost.cpu, "members": len(networks)}
    return Measured({**values, **more}, cost=clock.seconds)


def _probabilities(setting: TransferSetting, networks: Sequence[Tensors]) -> tuple[Tensor, Tensor]:
    """[members, images, classes] on the test split, and its labels."""
    parts, labels = [], []
    with torch.inference_mode(), evaluating(setting.model):
        for images, own in setting.tests():
            parts.append(torch.stack([call(setting.model, theta, images).softmax(-1) for theta in networks]))
            labels.append(own)
    return torch.cat(parts, 1), torch.cat(labels)


def evaluate_together(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
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


def _ensemble(name: str, make: Callable[[TransferSetting], Member], about: str, count: int = MEMBERS) -> Method:
    return Method(name, partial(make_ensemble, make, count), about=about)


ENSEMBLES = (
    _ensemble("source alone", train_member, "The source, without others.", 1),
    _ensemble("all trained", train_member, "The source and others, each trained."),
    _ensemble(
        "brief",
        train_member_briefly,
        "The source and others, each trained with as many gradients as FGMT takes.",
    ),
    *(
        _ensemble(
            name,
            partial(transfer_member, name),
            f"The source and others, to whose starts {name} moved its training.",
        )
        for name in ("naive", "fgmt", "gmt")
    ),
    Method(
        "fgmt, at once",
        partial(transfer_all_at_once, MEMBERS),
        about="The same by fgmt, the source's gradients computed once for all members.",
    ),
)
