"""One training loop: for plain training, for the phases of fine-tuning and for training with a penalty.

    recipe = Recipe(epochs=10, lr=0.05, weight_decay=1e-4)
    trained = train(model, start, data, recipe, generator=generator)
    trained.tensors, trained.history[-1].validation_accuracy, trained.cost

Given the same generator, tensors, data and machine, a run gives the same values; interrupted and resumed
from its checkpoint it gives the same values too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.core.arguments import Count, CountOrNone, Device, NotNegative, check_arguments, check_fields
from regraft.core.clock import Clock, Cost
from regraft.core.files import parse_json
from regraft.core.forward import answer, loss_of
from regraft.core.guard import same_settings, same_streams
from regraft.core.labels import check_labels
from regraft.core.tensors import (
    Batch,
    Tensors,
    check_finite,
    complete,
    digest_tensors,
    fill_,
    live_state,
    state,
    tensor_digest,
    use_generator,
)
from regraft.data import Batches, Dataset, Split
from regraft.training.evaluation import accuracy
from regraft.training.state import TrainingState


@dataclass(frozen=True)
class Recipe:
    """How to train. Loss: cross-entropy, mean over the batch.

    epochs: passes over the training split. lr: the highest learning rate. momentum, nesterov: of SGD;
    weight_decay: of every parameter, as torch's optimisers add it (Adam: to the gradient).
    schedule: "cosine" falls from lr to 0, step by step; "constant" stays. warmup_epochs: before that, lr
    rises linearly, step by step. augment: flips and crops (`regraft.data.flip_and_crop`).
    """

    epochs: CountOrNone
    lr: NotNegative
    momentum: NotNegative = 0.9
    weight_decay: NotNegative = 0.0
    batch_size: Count = 128
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: NotNegative = 0
    augment: bool = False
    nesterov: bool = False
    optimizer: Literal["sgd", "adam"] = "sgd"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs}, more than the {self.epochs} epochs of the recipe")

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of step 0, 1, ..., steps_per_epoch * epochs - 1."""
        warmup = round(self.warmup_epochs * steps_per_epoch)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.schedule == "constant":
            return self.lr
        share = (step - warmup) / (self.epochs * steps_per_epoch - warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * share))

    def optimiser(self, network: nn.Module) -> torch.optim.Optimizer:
        """Of all parameters; fused: one pass over them instead of one for each operation."""
        own = list(network.parameters())
        shared: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay, "fused": True}
        if self.optimizer == "adam":
            return torch.optim.Adam(own, **shared)
        return torch.optim.SGD(own, **shared, momentum=self.momentum, nesterov=self.nesterov)


@dataclass(frozen=True)
class Epoch:
    """The state of a run after ``epoch`` epochs (0: before training; 2.5: in the middle of the third).

    cost: of training so far; evaluation, recording and checkpoints are not in it. train_loss: mean over the
    epoch's batches so far. Accuracies are shares (0 to 1). None: not measured.
    """

    epoch: float
    cost: Cost
    validation_accuracy: float | None
    train_loss: float | None
    test_accuracy: float | None


@dataclass(frozen=True)
class Training:
    """The end of a run: values (on the device it ran on), and a row for the start and for each epoch."""

    tensors: Tensors
    history: tuple[Epoch, ...]

    @property
    def cost(self) -> Cost:
        """Of the updates, evaluation apart."""
        return self.history[-1].cost


class Diverged(FloatingPointError):
    """Training left the finite numbers.

    step: the first whose loss is not finite, counted from 0; where it is the weights that are not, the last one made.
    epoch: its epoch, from 1. what: "the loss", or the tensor.
    """

    def __init__(self, step: int, epoch: int | None = None, what: str = "the loss") -> None:
        where = f"step {step}" if epoch is None else f"step {step} (epoch {epoch})"
        super().__init__(
            f"training diverged: {what} of {where} is not finite. "
            "A smaller learning rate, or more warm-up, usually helps."
        )
        self.step, self.epoch, self.what = step, epoch, what


class Penalty(Protocol):
    """A further term of the loss, given by its gradient.

    Called with the network after each backward pass, it adds to the parameters' ``grad``. ``identity``: equal for
    equal penalties; a checkpoint is refused where it differs.
    """

    @property
    def identity(self) -> str: ...

    def __call__(self, network: nn.Module) -> None: ...


@same_settings()
@same_streams()
@check_arguments
def train(
    model: nn.Module,
    start: Mapping[str, Tensor],
    data: Dataset,
    recipe: Recipe,
    *,
    generator: torch.Generator,
    device: Device = "cpu",
    on_epoch: Callable[[Epoch], None] | None = None,
    evaluate_at: Container[int] = (),
    record: Callable[[int, Tensors], None] | None = None,
    record_at: Container[int] | None = None,
    stop: Callable[[Epoch], bool] | None = None,
    test: bool = False,
    checkpoint: str | Path | None = None,
    penalty: Penalty | None = None,
) -> Training:
    """Train from ``start`` on ``data.train``. Neither model nor start is changed.

    generator: on the CPU; it gives the order of the images, augmentation and dropout masks.
    on_epoch: called with each row of the history. evaluate_at: steps that have a row, beside the start and the ends of
        epochs (step s: after s updates). test: measure test accuracy too.
    record: called with (step, copies of the values) at the steps ``record_at``; by default at the ends of epochs.
    stop: the run ends after the first whole epoch whose row makes this true.
    checkpoint: a file for the whole state, written now and then and at the end. A run that finds one resumes there
        and ends as if it had not been interrupted; it does not repeat calls that were made before.

    Raises ValueError for tensors that do not fit the model or are not finite, for images that are not finite, for
    labels that the model has no output for, and for a checkpoint that is damaged or another run's; `Diverged` for a
    loss that is not finite, or weights at the end of an epoch.
    """
    network = _network(model, start, torch.device(device))
    batches = data.train.batches(recipe.batch_size, generator=generator, augment=recipe.augment, device=device)
    _try_one_step(network, data, batches)
    rate = partial(recipe.learning_rate, steps_per_epoch=len(batches))
    loop = Loop(network, recipe.optimiser(network), batches, rate, penalty)
    ends = range(0, len(batches) * recipe.epochs + 1, len(batches))
    rows_at = {*ends, *_steps_in(evaluate_at, ends[-1])}
    recorded = _steps_in(ends if record_at is None else record_at, ends[-1]) if record is not None else set()
    score = _scorer(network, data, batches.device, test)
    history: list[Epoch] = []
    saved = None
    if checkpoint is not None:
        identity = _identity(start, data, recipe, generator, penalty) | {"rows": [sorted(rows_at), test]}
        saved = TrainingState(Path(checkpoint), identity, network, loop.optimiser, generator)
        history += saved.resume_(partial(_history, recipe=recipe, path=Path(checkpoint)))
    loop.clock.add({"train": history[-1].cost if history else Cost()})

    def pause(step: int, train_loss: float | None) -> None:
        if record is not None and step in recorded:
            record(step, state(network))
        if step in rows_at:
            history.append(Epoch(step / len(batches), loop.clock.cost, train_loss=train_loss, **score()))
            if on_epoch is not None:
                on_epoch(history[-1])

    if not history:
        pause(0, None)
    for epoch in range(round(history[-1].epoch) + 1, recipe.epochs + 1):
        if stop is not None and stop(history[-1]):
            break
        for step, losses in train_one_epoch(loop, epoch, rows_at | recorded):
            check_weights(network, step - 1, epoch)
            pause(step, float(losses.mean()))
        if saved is not None:
            saved.save(history)
    if saved is not None:
        saved.save(history, last=True)
    return Training(state(network), tuple(history))


def _steps_in(steps: Container[int], last: int) -> set[int]:
    return {step for step in range(last + 1) if step in steps}


# ---------------------------------------------------------------------------------------------------
# The loop


@dataclass(frozen=True, eq=False)
class Loop:
    """What the updates of a run need: the network (in training mode, changed in place) and what changes it.

    learning_rate: of step 0, 1, ... clock: charged with the updates, as "train".
    """

    network: nn.Module
    optimiser: torch.optim.Optimizer
    batches: Batches
    learning_rate: Callable[[int], float]
    penalty: Penalty | None = None
    clock: Clock = field(default_factory=Clock)


def train_one_epoch(loop: Loop, epoch: int, pauses: Container[int] = ()) -> Iterator[tuple[int, Tensor]]:
    """The updates of one epoch (1, 2, ...); an iterator, since it pauses on the way.

    Yields (updates so far in the run, losses so far in the epoch) at the steps in ``pauses``, and at the end.
    Dropout masks are drawn from the generator of the batches. Raises as `train_steps_`.
    """
    batches, device = loop.batches, loop.batches.device
    steps = range((epoch - 1) * len(batches), epoch * len(batches))
    stream, losses = iter(batches), torch.empty(0, device=device)
    if batches.generator is None:
        raise ValueError("training draws dropout masks: its batches need a generator")
    with use_generator(batches.generator, device):  # dropout draws from the global state
        for stretch in _stretches(steps, pauses):
            with loop.clock.phase("train", device), _name_epoch(epoch):
                made = train_steps_(
                    loop.network,
                    loop.optimiser,
                    stream,
                    stretch,
                    learning_rate=loop.learning_rate,
                    penalty=loop.penalty,
                )
            losses = torch.cat([losses, made])
            if stretch.stop != steps.stop:
                yield stretch.stop, losses
    yield steps.stop, losses


def train_steps_(
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    batches: Iterator[Batch],
    steps: range,
    *,
    learning_rate: Callable[[int], float] | None = None,
    penalty: Penalty | None = None,
    after_step: Callable[[int], bool] | None = None,
) -> Tensor:
    """The loop of all training: an update of the network, in its mode, for each of ``steps`` (counted from 0).

    The loss is cross-entropy, mean over the batch. learning_rate: of a step, for all parameters; without it the
    optimiser's groups keep their own. after_step: called with the number of updates (step + 1); ends the
    loop by returning True.

    Returns the loss before each update, float [updates made]. Raises `Diverged` for one that is not finite (on a CPU
    before the update is made) and ValueError where the batches end too early.
    """
    every = 1 if next(network.parameters()).device.type == "cpu" else 10  # each look waits for the device
    losses: list[Tensor] = []
    for step in steps:
        batch = next(batches, None)
        if batch is None:
            raise ValueError(f"there is no batch for step {step}; {steps.stop} steps were wanted")
        if learning_rate is not None:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step)
        optimiser.zero_grad(set_to_none=True)
        loss = loss_of(F.cross_entropy, *answer(network, batch))
        loss.backward()
        losses.append(loss.detach())
        if len(losses) % every == 0:
            _check_finite(losses[-every:], step)
        if penalty is not None:
            penalty(network)
        optimiser.step()
        if after_step is not None and after_step(step + 1):
            break
    if not losses:
        return torch.empty(0)
    _check_finite(losses[-every:], step)
    return torch.stack(losses)


@contextmanager
def _name_epoch(epoch: int) -> Iterator[None]:
    """Add the epoch to a `Diverged` that the body raises."""
    try:
        yield
    except Diverged as problem:
        raise Diverged(problem.step, epoch) from None


def _check_finite(losses: Sequence[Tensor], last: int) -> None:
    """losses: of the steps up to ``last``."""
    finite = torch.stack(tuple(losses)).isfinite()
    if not bool(finite.all()):
        raise Diverged(last + 1 - len(losses) + int((~finite).nonzero()[0]))


def _stretches(steps: range, pauses: Container[int]) -> Iterator[range]:
    """``steps`` in pieces that each run without a break, to a pause or to the last step."""
    begin = steps.start
    for end in range(steps.start + 1, steps.stop + 1):
        if end == steps.stop or end in pauses:
            yield range(begin, end)
            begin = end


# ---------------------------------------------------------------------------------------------------
# Before and between the updates


def _network(model: nn.Module, start: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """A copy of the model with the values ``start``, in training mode."""
    # channels_last: convolutions run 1.2 to 1.8 times faster with it on a CPU (measured), and nothing slower.
    check_finite(start, "the start")
    network = copy.deepcopy(model).to(device).to(memory_format=torch.channels_last)
    fill_(network, complete(model, start))
    return network.train()


def _try_one_step(network: nn.Module, data: Dataset, batches: Batches) -> None:
    """One step on a copy, thrown away, before anything is timed or changed.

    The first step of a process loads libraries and chooses algorithms (it was seen to take seconds on a
    freshly installed machine). Training is not charged for it.
    """
    few = data.train.subset(torch.arange(min(batches.size, len(data.train))))
    throwaway = copy.deepcopy(network)
    with use_generator(torch.Generator()):
        logits, labels = answer(throwaway, next(iter(few.batches(batches.size, device=batches.device))))
        for name in ("train", "validation", "test"):
            split: Split = getattr(data, name)
            check_labels(split.labels, logits.shape[-1], f"the {name} split")
            if isinstance(split.images, Tensor):
                check_finite({"images": split.images}, f"the {name} split")
        loss_of(F.cross_entropy, logits, labels).backward()


def check_weights(network: nn.Module, step: int, epoch: int | None = None) -> None:
    """Raise `Diverged`, naming the tensor, where a parameter or a buffer is not finite after ``step``."""
    for name, tensor in live_state(network).items():
        try:
            check_finite({name: tensor}, "")
        except ValueError:
            raise Diverged(step, epoch, f"tensor {name!r}") from None


def _history(text: str, recipe: Recipe, path: Path) -> list[Epoch]:
    """A checkpoint's history. Raises ValueError unless it is one of this recipe's run."""
    rows = parse_json(text, list[Epoch], f"{path}: history")
    epochs = [row.epoch for row in rows]
    if not epochs or epochs[0] != 0 or epochs != sorted(epochs) or epochs[-1] not in range(recipe.epochs + 1):
        raise ValueError(f"{path}: its history is of epochs {epochs}, the run's are 0 to {recipe.epochs}")
    return rows


def _scorer(
    network: nn.Module, data: Dataset, device: torch.device, test: bool
) -> Callable[[], dict[str, float | None]]:
    """What measures the accuracies of an `Epoch`, in evaluation mode."""
    validation = data.validation.batches(500, device=device) if len(data.validation) else None
    tests = data.test.batches(500, device=device) if test else None

    def score() -> dict[str, float | None]:
        values = live_state(network)
        return {
            "validation_accuracy": None if validation is None else accuracy(network, values, validation),
            "test_accuracy": None if tests is None else accuracy(network, values, tests),
        }

    return score


def _identity(
    start: Mapping[str, Tensor],
    data: Dataset,
    recipe: Recipe,
    generator: torch.Generator,
    penalty: Penalty | None,
) -> dict[str, Any]:
    """What must be equal for a checkpoint to belong to this run, as JSON knows it."""
    return {
        "recipe": asdict(recipe),
        "data": {
            "name": data.name,
            "classes": list(data.classes),
            "images": [len(data.train), len(data.validation), len(data.test), *data.train.shape],
            "mean": list(data.mean),
            "labels": tensor_digest(data.train.labels),
        },
        "start": digest_tensors(start),
        "generator": tensor_digest(generator.get_state()),
        "penalty": None if penalty is None else penalty.identity,
    }
