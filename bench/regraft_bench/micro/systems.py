"""Each system against the training, or the loop over sums, that one would write by hand: small, to compare commits.

Each is timed as its users call it; the control is plain torch and does not depend on this project.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.finetuning import fast
from regraft.finetuning.recorder import Recorder
from regraft.learning_transfer.driver import transfer
from regraft.learning_transfer.trajectory import Trajectory
from regraft.networks.papers import initialise, mlp
from regraft.symmetry import trace
from regraft.training.loop import Recipe, train
from regraft_bench.contests import Contest, MicroSetting
from regraft_bench.micro.library import grid
from regraft_bench.study import Task
from regraft_bench.timing import BY_HAND, OURS, Contender

LAYERS = (64, 512, 10)
BATCH_SIZE = 128


def by_hand(start: Mapping[str, Tensor], images: Tensor, labels: Tensor, epochs: int) -> dict[str, Tensor]:
    """Plain SGD with momentum, images in their order."""
    model = mlp(LAYERS)
    model.load_state_dict(start)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for x, y in zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True):
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _digits(setting: MicroSetting) -> tuple[Tensor, Tensor]:
    found = setting.dataset(Task("digits")).train
    return next(iter(found.batches(len(found))))


def _make_transfer(setting: MicroSetting) -> dict[str, Contender]:
    """FGMT of ten steps, evaluation included; by hand is a training of as many epochs."""
    images, labels = _digits(setting)
    start, target = (initialise(mlp(LAYERS), setting.generator("start", number)) for number in range(2))
    path = Trajectory.linear(start, by_hand(start, images, labels, 10), 10)
    batches = list(zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True))
    model = mlp(LAYERS)
    spec = trace(model, (images[:2],))

    def ours() -> object:
        return transfer(model, path, target, batches, spec=spec, validation=batches[:2])

    return {BY_HAND: Contender(lambda: by_hand(target, images, labels, 10)), OURS: Contender(ours)}


def _make_training(setting: MicroSetting) -> dict[str, Contender]:
    images, labels = _digits(setting)
    data, recipe = setting.dataset(Task("digits")), Recipe(epochs=5, lr=0.05, batch_size=BATCH_SIZE)
    start = initialise(mlp(LAYERS), setting.generator("start"))

    def ours() -> object:
        return train(mlp(LAYERS), start, data, recipe, generator=setting.generator("order"))

    return {BY_HAND: Contender(lambda: by_hand(start, images, labels, 5)), OURS: Contender(ours)}


def _make_fast(setting: MicroSetting) -> dict[str, Contender]:
    """FAST with its recorder, two epochs; validated as it is by default, on a tenth of the images."""
    images, labels = _digits(setting)
    start = initialise(mlp(LAYERS), setting.generator("start"))
    held = [(images[: len(images) // 10], labels[: len(images) // 10])]

    def ours() -> object:
        model = mlp(LAYERS)
        model.load_state_dict(start)
        fast.adopt(model, num_classes=10)
        optimiser = torch.optim.SGD(fast.param_groups(model, head_lr=0.3, body_lr=0.01), momentum=0.9)
        recorder = Recorder(model, validation=held, test=held)
        for x, y in list(zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True)) * 2:
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
            recorder.after_step()
        return recorder.finish()

    return {BY_HAND: Contender(lambda: by_hand(start, images, labels, 2)), OURS: Contender(ours)}


def _contest(name: str, make: Callable[[MicroSetting], Mapping[str, Contender]]) -> Contest:
    return Contest(name, (BY_HAND, OURS), make)


SYSTEMS = (
    _contest("transfer", _make_transfer),
    _contest("training", _make_training),
    _contest("fast", _make_fast),
    Contest("fusion", (BY_HAND, OURS), grid(20).make),
)
