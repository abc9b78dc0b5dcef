"""FAST: fine-tuning that learns faster and forgets slower (Varno et al.), public as ``regraft.fast``.

A zero classifier, and two learning rates: a larger one for the classifier, a smaller one for the features.

    adopted = regraft.fast.adopt(model, num_classes=10)
    groups = regraft.fast.param_groups(model, head_lr=0.3, body_lr=0.01)
    optimiser = torch.optim.SGD(groups, momentum=0.9)

The rest of the training loop stays as it is. Beside it here: the initial classifiers that FAST is compared
with, stratified batches, the paper's form of momentum, and the stop rule of a classifier warm-up. `Recorder`
(`regraft.finetuning.recorder`) measures a run as it goes: Anytime Deployment Performance, forgetting, distances.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from regraft.core.arguments import Count, Device, NotNegative, check_arguments, check_fields
from regraft.core.forward import name_inputs, run
from regraft.core.guard import preserve_state, same_streams
from regraft.core.labels import check_labels
from regraft.core.registry import register
from regraft.core.tensors import Inputs, Pair, check_finite, copies, live_state
from regraft.data import Split, normalise
from regraft.finetuning.callbacks import make_lightning_callback, make_trainer_callback
from regraft.finetuning.record import Record
from regraft.finetuning.recorder import Recorder, Source
from regraft.networks.heads import (
    Adoption,
    Initialiser,
    adopt,
    check_head,
    find_head,
    linear_of,
    zero,
)

__all__ = [
    "Adoption", "ClassMeans", "Initialiser", "NoGain", "Normal", "Record", "Recorder", "Source", "Stratified",
    "adopt", "check_labels", "class_means", "features_of", "find_head", "kaiming_fan_in", "kaiming_fan_out",
    "make_lightning_callback", "make_trainer_callback", "param_groups", "start_momentum_at_zero_", "xavier", "zero"
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------
# Two learning rates

HEAD_LR, BODY_LR = 0.3, 0.01


@check_arguments
def param_groups(
    model: nn.Module,
    head_lr: float | None = HEAD_LR,
    body_lr: float | None = BODY_LR,
    *,
    head: str | nn.Module | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups "body" and "head" for any torch optimiser, each with its learning rate.

    Args:
        model: with its (new) classifier in place; DistributedDataParallel and torch.compile may be around it.
        head_lr, body_lr: alpha and beta of the paper. None leaves that part out of training: ``body_lr=None`` is
            feature extraction, ``head_lr=None`` a frozen classifier. The defaults are for SGD with momentum 0.9 in
            torch's form; the paper's own form needs them ten times as large (see `start_momentum_at_zero_`).
        head: the classifier or its name; found by `find_head` when not given.
        options: further entries of both groups, such as weight_decay=1e-4.

    A scheduler that multiplies rates keeps their ratio; one that sets them (OneCycleLR) takes a list of two, body
    first. Parameters that take no gradient are left out, and a group without parameters too.

    Raises ValueError for a rate that is zero, negative or not finite, and as `find_head`.
    """
    for name, rate in (("head_lr", head_lr), ("body_lr", body_lr)):
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise ValueError(
                f"{name} must be positive and finite, not {rate}; to leave that part as it is, say {name}=None"
            )
    if isinstance(head, nn.Module):
        if not isinstance(head, nn.Linear):
            raise ValueError(f"the head must be a linear layer, not a {type(head).__name__}")
        classifier = head
    else:
        classifier = linear_of(model, find_head(model) if head is None else check_head(model, head))
    in_head = set(map(id, classifier.parameters()))
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = {
        "body": (body_lr, [parameter for parameter in own if id(parameter) not in in_head]),
        "head": (head_lr, [parameter for parameter in own if id(parameter) in in_head]),
    }
    if isinstance(head, nn.Module) and not any(id(parameter) in in_head for parameter in model.parameters()):
        raise ValueError("the head that was handed in is no part of the model")
    groups = [
        {"params": members, "lr": rate, "name": name, **options}
        for name, (rate, members) in parts.items()
        if rate is not None and members
    ]
    if not groups:
        raise ValueError("nothing is left to train: no part of the model has both a learning rate and a gradient")
    return groups


def start_momentum_at_zero_(optimiser: torch.optim.SGD) -> None:
    """Make torch's SGD with ``dampening = momentum`` the paper's ``V <- M V + (1 - M) step`` from its first step on.

    torch would begin with V = step. In this form a rate of lr moves as far as lr (1 - M) does without dampening.
    Raises ValueError for an optimiser that has no such momentum, or that has made a step already.
    """
    for group in optimiser.param_groups:
        if not (group.get("momentum", 0) > 0 and group.get("dampening", 0) == group["momentum"]):
            raise ValueError("the paper's momentum is torch.optim.SGD(..., momentum=M, dampening=M) with M above 0")
        for parameter in group["params"]:
            if optimiser.state[parameter]:
                raise ValueError("the optimiser has made a step already: call this before the first one")
            optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


# ---------------------------------------------------------------------------------------------------
# Initial classifiers that FAST is compared with (sections 5.1 and 6.2)


@register
def kaiming_fan_in(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """N(0, 2 / features) (He et al., 2015)."""
    nn.init.kaiming_normal_(weight, mode="fan_in", nonlinearity="relu", generator=generator)


@register
def kaiming_fan_out(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """N(0, 2 / classes) (He et al., 2015)."""
    nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu", generator=generator)


@register
def xavier(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """Uniform with variance 2 / (features + classes) (Glorot and Bengio, 2010)."""
    nn.init.xavier_uniform_(weight, generator=generator)


@dataclass(frozen=True)
class Normal:
    """N(0, std^2): the paper draws it with std from 1 down to 1e-8."""

    std: NotNegative

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, weight: Tensor, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(weight, std=self.std, generator=generator)


@dataclass(frozen=True, eq=False)
class ClassMeans:
    """Each class's row is the mean of its features, at unit length (imprinting; Qi et al., 2018).

    means: [classes, features], as `class_means` finds them.
    """

    means: Tensor

    def __call__(self, weight: Tensor, generator: torch.Generator | None = None) -> None:
        if self.means.shape != weight.shape:
            raise ValueError(f"class means {list(self.means.shape)} for a weight {list(weight.shape)}")
        weight.copy_(nn.functional.normalize(self.means, dim=1))


@check_arguments
def class_means(features: Tensor, labels: Tensor, num_classes: Count) -> Tensor:
    """The mean feature vector of each class, [classes, features]; features: [M, D], labels: int64 [M].

    Raises ValueError where a class has no example or a label is out of range.
    """
    check_labels(labels, num_classes)
    counts = torch.bincount(labels, minlength=num_classes)
    if int(counts.min()) == 0:
        raise ValueError(f"class {int(counts.argmin())} has no example to take the mean of")
    total = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    return total / counts[:, None]


@check_arguments
def features_of(model: nn.Module, head: nn.Linear, inputs: Inputs) -> Tensor:
    """What flows into the head, [M, D], in the mode in which the model is, without gradient.

    Raises ValueError for a head that is no linear layer of the model, and for inputs that are not finite.
    """
    if not isinstance(head, nn.Linear) or all(module is not head for module in model.modules()):
        raise ValueError(f"the head must be a linear layer of the model, not this {type(head).__name__}")
    check_finite(name_inputs(inputs), "the batch")
    kept: list[Tensor] = []
    with preserve_state(model), same_streams(head.weight.device), torch.no_grad():
        head.register_forward_pre_hook(lambda _module, given: kept.append(given[0].detach().clone()))
        run(model, copies(model, live_state(model)), inputs)
    if len(kept) != 1:
        raise ValueError(f"the head ran {len(kept)} times in one forward pass, not once")
    return kept[0]


# ---------------------------------------------------------------------------------------------------
# Batches


@dataclass(frozen=True, eq=False)
class Stratified:
    """Endless batches, each with the same number of images of every class (the paper's training batches).

    split: a training split of `regraft.data`. size: a multiple of the number of classes (the paper also takes one
    image a class). Every class is read in a random order, then in a new one; images left over at the end of a pass
    go into the next batch. flip: mirror images at random.

    Raises ValueError for a size that is no such multiple, and where a class of 0 .. num_classes - 1 has no image.
    """

    split: Split
    size: int
    num_classes: Count
    generator: torch.Generator
    flip: bool = False
    device: Device = "cpu"
    _members: list[Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)
        check_labels(self.split.labels, self.num_classes)
        if self.size < 1 or self.size % self.num_classes:
            raise ValueError(
                f"a stratified batch has equally many images of each of {self.num_classes} classes: "
                f"its size must be a multiple of {self.num_classes}, not {self.size}"
            )
        members = [(self.split.labels == label).nonzero().flatten() for label in range(self.num_classes)]
        empty = [label for label, images in enumerate(members) if len(images) == 0]
        if empty:
            raise ValueError(
                f"stratified batches need images of every class, and the training data have none of {empty}"
            )
        object.__setattr__(self, "_members", members)

    def __iter__(self) -> Iterator[Pair]:
        split = self.split.to(self.device)
        order = self._order()
        while True:
            # A pass at a time: image files are decoded ahead, which must end somewhere.
            a_pass = list(islice(order, max(1, len(split) // self.size)))
            for images, labels in split.fetch(a_pass, torch.device(self.device)):
                if self.flip:
                    chosen = (torch.rand(len(images), generator=self.generator) < 0.5).to(images.device)
                    images = torch.where(chosen[:, None, None, None], images.flip(3), images)
                yield normalise(images, split.mean, split.std), labels

    def _order(self) -> Iterator[Tensor]:
        """Endless index vectors [size]: classes side by side."""
        each = self.size // self.num_classes
        left = [members[:0] for members in self._members]
        while True:
            drawn = []
            for label, members in enumerate(self._members):
                while len(left[label]) < each:
                    order = torch.randperm(len(members), generator=self.generator)
                    left[label] = torch.cat([left[label], members[order]])
                drawn.append(left[label][:each])
                left[label] = left[label][each:]
            yield torch.cat(drawn)


# ---------------------------------------------------------------------------------------------------
# Classifier warm-up (Li and Hoiem, 2018; section 6.4)


@dataclass
class NoGain:
    """The end of a warm-up: validation accuracy has not gained ``least`` (a share) for ``patience`` steps.

    A gain is counted from the accuracy at the last gain, so that many small steps upwards count too.
    """

    least: float = 0.01
    patience: int = 10
    best: float = -math.inf
    waited: int = 0

    def __call__(self, accuracy: float) -> bool:
        """True when the warm-up is over; call it with the accuracy after each step."""
        if accuracy >= self.best + self.least:
            self.best, self.waited = accuracy, 0
        else:
            self.waited += 1
        return self.waited >= self.patience
