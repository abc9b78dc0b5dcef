"""Plain training: the baseline that transfer is measured against, and the training that follows it.

    recipe = Recipe(epochs=10, lr=0.05, weight_decay=1e-4)
    trained = train(model, start, data, recipe, generator=generator)
    trained.tensors, trained.history[-1].validation_accuracy, trained.seconds

Given the same generator, tensors, data and machine, a run gives the same values; interrupted and resumed
from its checkpoint it gives the same values too.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.clock import Clock
from regraft.data import AnySplit, Dataset
from regraft.evaluation import accuracy, complete
from regraft.files import write_beside
from regraft.models import Tensors, live_state, seeded


@dataclass(frozen=True)
class Recipe:
    """How to train. Loss: cross-entropy, mean over the batch.

    epochs: passes over the training split. lr: the highest learning rate. momentum, nesterov: of SGD;
    weight_decay: of every parameter, as torch's optimisers add it (Adam: to the gradient).
    schedule: "cosine" falls from lr to 0, step by step; "constant" stays. warmup_epochs: before that, lr
    rises linearly, step by step. augment: flips and crops (`regraft.data.flip_and_crop`).
    """

    epochs: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 128
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = 0
    augment: bool = False
    nesterov: bool = False
    optimizer: Literal["sgd", "adam"] = "sgd"

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1 or not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(f"epochs, batch_size and warmup_epochs do not make sense together: {self}")
        if not (math.isfinite(self.lr) and self.lr >= 0):
            raise ValueError(f"the learning rate must be finite and not negative, not {self.lr}")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule is 'cosine' or 'constant', not {self.schedule!r}")
        if self.optimizer not in ("sgd", "adam"):
            raise ValueError(f"optimizer is 'sgd' or 'adam', not {self.optimizer!r}")

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of step 0, 1, ..., steps_per_epoch * epochs - 1."""
        warmup = round(self.warmup_epochs * steps_per_epoch)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.schedule == "constant":
            return self.lr
        share = (step - warmup) / (self.epochs * steps_per_epoch - warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class EpochRow:
    """The state of a run after an epoch (epoch 0: before training).

    seconds, cpu_seconds: spent on training so far, wall clock and CPU time of all threads; evaluation,
    recording and checkpoints are not in them. train_loss: mean over the epoch's batches. Accuracies are
    shares (0 to 1). None: not measured.
    """

    epoch: int
    seconds: float
    cpu_seconds: float
    validation_accuracy: float | None
    train_loss: float | None
    test_accuracy: float | None


@dataclass(frozen=True)
class Training:
    """The end of a run: values (on the device it ran on), one row per epoch, and the time it took."""

    tensors: Tensors
    history: tuple[EpochRow, ...]

    @property
    def seconds(self) -> float:
        return self.history[-1].seconds

    @property
    def cpu_seconds(self) -> float:
        return self.history[-1].cpu_seconds


class Diverged(FloatingPointError):
    """The training loss is not finite. ``step`` is the first such step, counted from 0."""

    def __init__(self, step: int, epoch: int, recipe: Recipe) -> None:
        super().__init__(
            f"training diverged: the loss of step {step} (epoch {epoch}) is not finite. "
            f"A smaller learning rate than {recipe.lr:g}, or more warm-up, usually helps."
        )
        self.step = step
        self.epoch = epoch


def train(
    model: nn.Module,
    start: Mapping[str, Tensor],
    data: Dataset,
    recipe: Recipe,
    *,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[EpochRow], None] | None = None,
    record: Callable[[int, Tensors], None] | None = None,
    record_at: Container[int] | None = None,
    stop: Callable[[EpochRow], bool] | None = None,
    test: bool = False,
    checkpoint: str | Path | None = None,
) -> Training:
    """Train from ``start`` on ``data.train``. Neither model nor start is changed.

    generator: a CPU generator; it gives the order of the images, augmentation and dropout masks.
    on_epoch: is told each row as it comes (`progress` makes one that draws a bar).
    record: is handed (step, values) at the steps in ``record_at``, where step 0 is the start and step s is
        after s updates; by default at the start and after each epoch. The values are copies, its own to keep.
    stop: the run ends after the first row for which this is true.
    test: measure test accuracy after each epoch, too.
    checkpoint: a file. After every epoch the whole state is written there, in one step; if it is
        there at the beginning, the run goes on from it, and ends as if it had not been interrupted (what
        was told to ``on_epoch`` and ``record`` before is not told again). It is refused with a
        ValueError where it is damaged or belongs to another run (recipe, data, start, generator).

    Raises ValueError for tensors that do not fit the model, `Diverged` for a loss that is not finite.
    """
    device = torch.device(device)
    path = None if checkpoint is None else Path(checkpoint)
    identity = {} if path is None else _identity(start, data, recipe, generator)
    # channels_last: convolutions run 1.2 to 1.8 times faster with it on a CPU (measured), and nothing slower.
    network = copy.deepcopy(model).to(device, memory_format=torch.channels_last)
    _fill_(network, complete(model, start))
    network.train()
    optimiser = _optimiser(network, recipe)
    history: list[EpochRow] = []
    clock = Clock()
    if path is not None and path.exists():
        history = _restore_(path, identity, network, optimiser, generator)
        clock.wall["train"], clock.cpu["train"] = history[-1].seconds, history[-1].cpu_seconds

    batches = data.train.batches(
        recipe.batch_size, generator=generator, augment=recipe.augment, device=device
    )
    steps = len(batches)
    wanted = range(0, steps * recipe.epochs + 1, steps) if record_at is None else record_at
    validation = data.validation.batches(500, device=device) if len(data.validation) else None
    tests = data.test.batches(500, device=device) if test else None

    def finish_epoch(epoch: int, train_loss: float | None) -> None:
        values = live_state(network)
        row = EpochRow(
            epoch=epoch,
            seconds=clock.wall["train"],
            cpu_seconds=clock.cpu["train"],
            validation_accuracy=None if validation is None else accuracy(network, values, validation),
            train_loss=train_loss,
            test_accuracy=None if tests is None else accuracy(network, values, tests),
        )
        history.append(row)
        if path is not None:
            _save(path, identity, history, network, optimiser, generator)
        if on_epoch is not None:
            on_epoch(row)

    _warm_up(network, data.train, recipe.batch_size, device)
    if not history:
        if record is not None and 0 in wanted:
            record(0, _values(network))
        finish_epoch(0, None)
    for epoch in range(history[-1].epoch + 1, recipe.epochs + 1):
        if stop is not None and stop(history[-1]):
            break
        first = (epoch - 1) * steps
        losses = torch.zeros(steps, device=device)
        with seeded(generator, device):  # dropout draws from the global state
            stream = iter(batches)
            for stretch in _stretches(range(first, first + steps), () if record is None else wanted):
                with clock.phase("train", device):
                    for step in stretch:
                        rate = recipe.learning_rate(step, steps)
                        losses[step - first] = _step_(network, optimiser, next(stream), rate)
                        if step % 50 == 49:
                            _check(losses, first, epoch, recipe)
                    _check(losses, first, epoch, recipe)
                if record is not None and stretch.stop in wanted:
                    record(stretch.stop, _values(network))
        finish_epoch(epoch, float(losses.mean()))
    return Training(_values(network), tuple(history))


def epochs_to_reach(history: Sequence[EpochRow], validation_accuracy: float) -> int | None:
    """The first epoch after which validation accuracy is at least this; None if it never was."""
    return next((row.epoch for row in _reached(history, validation_accuracy)), None)


def seconds_to_reach(history: Sequence[EpochRow], validation_accuracy: float) -> float | None:
    """Training seconds until validation accuracy is at least this; None if it never was."""
    return next((row.seconds for row in _reached(history, validation_accuracy)), None)


def _reached(history: Sequence[EpochRow], wanted: float) -> Iterator[EpochRow]:
    return (r for r in history if r.validation_accuracy is not None and r.validation_accuracy >= wanted)


@contextmanager
def progress(recipe: Recipe, label: str = "training") -> Iterator[Callable[[EpochRow], None]]:
    """A progress bar in the terminal; yields what to hand to `train` as ``on_epoch``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[accuracy]}"),
    )  # fmt: skip
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(label, total=recipe.epochs, accuracy="")

        def show(row: EpochRow) -> None:
            found = row.validation_accuracy
            bar.update(task, completed=row.epoch, accuracy="" if found is None else f"{found:.1%}")

        yield show


# ---------------------------------------------------------------------------------------------------
# Steps


def _optimiser(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Fused: one pass over the parameters instead of one per operation."""
    parameters = list(network.parameters())
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        fused=True,
    )


def _fill_(network: nn.Module, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in live_state(network).items():
            tensor.copy_(values[name])


def _stretches(steps: range, ends: Container[int]) -> Iterator[range]:
    """``steps`` in pieces that each run without a break, to one of ``ends`` or to the last step."""
    begin = steps.start
    for end in range(steps.start + 1, steps.stop + 1):
        if end in ends or end == steps.stop:
            yield range(begin, end)
            begin = end


def _step_(
    network: nn.Module, optimiser: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], rate: float
) -> Tensor:
    """One update, with this learning rate; gives the loss before it."""
    images, labels = batch
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    loss = F.cross_entropy(network(images), labels)
    loss.backward()
    optimiser.step()
    return loss.detach()


def _values(network: nn.Module) -> Tensors:
    """Copies, contiguous whatever the network's memory format."""
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in live_state(network).items()
    }


def _warm_up(network: nn.Module, split: AnySplit, batch_size: int, device: torch.device) -> None:
    """One step that is thrown away.

    The first step of a process loads libraries and chooses algorithms (it was seen to take seconds on a
    freshly installed machine). That is no part of training's price.
    """
    images, labels = next(iter(split.subset(torch.arange(min(batch_size, len(split)))).batches(batch_size)))
    throwaway = copy.deepcopy(network)
    with seeded(torch.Generator()):
        F.cross_entropy(throwaway(images.to(device)), labels.to(device)).backward()


def _check(losses: Tensor, first: int, epoch: int, recipe: Recipe) -> None:
    """Raise where a loss is not finite. Called now and then: each call waits for the device."""
    if not bool(losses.isfinite().all()):
        raise Diverged(first + int((~losses.isfinite()).nonzero()[0]), epoch, recipe)


# ---------------------------------------------------------------------------------------------------
# Checkpoints: one safetensors file, whose metadata hold the run's identity, its history and hashes


def _digest(tensor: Tensor) -> str:
    array = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(array).hexdigest()


def _identity(
    start: Mapping[str, Tensor], data: Dataset, recipe: Recipe, generator: torch.Generator
) -> dict[str, Any]:
    """What must be equal for a checkpoint to belong to this run, as JSON knows it."""
    return {
        "recipe": asdict(recipe),
        "data": {
            "name": data.name,
            "classes": list(data.classes),
            "images": [len(data.train), len(data.validation), len(data.test)],
            "labels": _digest(data.train.labels),
        },
        "start": {name: [list(tensor.shape), _digest(tensor)] for name, tensor in sorted(start.items())},
        "generator": _digest(generator.get_state()),
    }


def _save(
    path: Path,
    identity: Mapping[str, Any],
    history: Sequence[EpochRow],
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
) -> None:
    from safetensors.torch import save_file

    tensors = {f"model/{name}": tensor for name, tensor in _values(network).items()}
    for index, slots in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser/{index}/{key}": value for key, value in slots.items() if value is not None}
    tensors["generator"] = generator.get_state()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "identity": json.dumps(identity),
        "history": json.dumps([asdict(row) for row in history]),
        "sha256": json.dumps({name: _digest(tensor) for name, tensor in tensors.items()}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, lambda part: save_file(tensors, part, metadata))


def _restore_(
    path: Path,
    identity: Mapping[str, Any],
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
) -> list[EpochRow]:
    """Put a checkpoint's state into network, optimiser and generator; gives its history."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        saved, rows, hashes = (json.loads(metadata[key]) for key in ("identity", "history", "sha256"))
    except (SafetensorError, KeyError, ValueError) as cause:
        raise ValueError(f"{path} is no training checkpoint, or a damaged one: {cause!r}") from cause
    different = [key for key in identity if saved.get(key) != identity[key]]
    if different:
        raise ValueError(
            f"{path} belongs to another run, whose {' and '.join(different)} differ"
            + (f": {_differences(saved['recipe'], identity['recipe'])}" if "recipe" in different else "")
            + "; choose another file or delete it"
        )
    for name, tensor in tensors.items():
        if hashes.get(name) != _digest(tensor):
            raise ValueError(f"{path} is damaged: {name} is not what was written")
    prefix = "model/"
    _fill_(network, {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser/"):
            _, index, key = name.split("/")
            slots.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict({**optimiser.state_dict(), "state": slots})
    generator.set_state(tensors["generator"])
    return [EpochRow(**row) for row in rows]


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    keys = [key for key in wanted if saved.get(key) != wanted[key]]
    return ", ".join(f"{key} is {saved.get(key)!r} there and {wanted[key]!r} here" for key in keys)
