"""Arguments that no function may take silently: tensors, batches, numbers, names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regraft.core.tensors import Tensors
from regraft.data import Split, load
from regraft.finetuning import fast
from regraft.finetuning.phases import Phase, fine_tune
from regraft.finetuning.recorder import Recorder, scores
from regraft.fusion.grids import evaluate
from regraft.fusion.repair import repair_on, reset_on
from regraft.fusion.sums import assign_gradient, fuse, fuse_many
from regraft.learning_transfer.driver import transfer
from regraft.learning_transfer.trajectory import Trajectory
from regraft.matching.descent import match
from regraft.networks.heads import adopt
from regraft.networks.papers import build
from regraft.symmetry import apply, trace, verify
from regraft.training.evaluation import (
    accuracy,
    ensemble_accuracy,
    gradients,
    interpolate,
    loss_and_accuracy,
    plane,
    reset_batchnorm,
)
from regraft.training.loop import Recipe, train
from regraft_bench.micro.reliability import subjects as s
from regraft_bench.micro.reliability.attempt import Case
from regraft_kernels import assign

Made = Callable[[], object]
Batches = list[tuple[Tensor, Tensor]]

# ---------------------------------------------------------------- tensors by name

NAME = "4.weight"


def _filled(value: float) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors[NAME] = tensors[NAME].clone()
        tensors[NAME].view(-1)[3] = value

    return change


SHAPES: dict[str, Callable[[Tensors], object]] = {
    "a tensor is missing": lambda t: t.pop(NAME),
    "a tensor too many": lambda t: t.update({"4.weightt": t[NAME]}),
    "another shape": lambda t: t.update({NAME: t[NAME][:, :3]}),
    "another number of axes": lambda t: t.update({NAME: t[NAME][None, None]}),
}
DTYPE: dict[str, Callable[[Tensors], object]] = {
    "another dtype": lambda t: t.update({NAME: t[NAME].double()})
}
VALUES: dict[str, Callable[[Tensors], object]] = {
    "NaN": _filled(math.nan),
    "infinity": _filled(math.inf),
}
ALL = SHAPES | DTYPE | VALUES

TAKES_TENSORS: dict[str, tuple[Callable[[Tensors], object], dict[str, Callable[[Tensors], object]]]] = {
    "accuracy": (lambda t: accuracy(s.model(), t, s.batches()), SHAPES),
    "loss_and_accuracy": (lambda t: loss_and_accuracy(s.model(), t, s.batches()), SHAPES),
    "ensemble_accuracy": (lambda t: ensemble_accuracy(s.model(), [s.weights(1), t], s.batches()), SHAPES),
    "gradients": (lambda t: gradients(s.model(), t, s.batches()), SHAPES | VALUES),
    "reset_batchnorm": (lambda t: reset_batchnorm(s.model(), t, s.batches()), SHAPES),
    "interpolate": (lambda t: interpolate(s.model(), s.weights(1), t, s.batches(), 3), SHAPES),
    "plane": (lambda t: plane(s.model(), s.weights(1), s.weights(2), t, s.batches(), 3), SHAPES),
    "fuse": (lambda t: fuse([s.weights(1), t], [0.5, 0.5]), ALL),
    "fuse_many": (lambda t: fuse_many([s.weights(1), t], [[0.5, 0.5]]), SHAPES | DTYPE),
    "assign_gradient": (lambda t: assign_gradient(s.weights(1), t, 0.5), ALL),
    "evaluate (grid)": (lambda t: _grid([s.weights(1), t], [[1.0, 0.5]]), SHAPES | DTYPE),
    "transfer, start": (lambda t: transfer(s.model(), s.path(), t, s.batches(), spec=s.spec()), ALL),
    "match": (lambda t: match(s.spec(), s.weights(1), t), ALL),
    "apply": (lambda t: apply(s.spec(), s.spec().identity(), t), SHAPES),
    "train": (lambda t: train(s.model(), t, s.dataset(), s.RECIPE, generator=s.seed()), SHAPES | VALUES),
    "Trajectory.linear": (lambda t: Trajectory.linear(s.weights(1), t), ALL),
    "Trajectory.recorded": (lambda t: Trajectory.recorded([s.weights(1), t]), ALL),
}


def _grid(sources: list[Tensors], rows: Any, x: Tensor | None = None, y: Tensor | None = None) -> object:
    x, y = s.images() if x is None else x, s.labels() if y is None else y
    return evaluate(s.model(), sources, rows, x, y)


def _with(change: Callable[[Tensors], object], run: Callable[[Tensors], object], folder: Path) -> None:
    tensors = dict(s.weights(2))
    change(tensors)
    run(tensors)


def tensor_cases() -> Iterator[Case]:
    for name, (run, changes) in TAKES_TENSORS.items():
        for what, change in changes.items():
            yield Case(f"{name}: {what}", partial(_with, change, run), (NAME, "gradient of"))


# ---------------------------------------------------------------- batches


def _spoilt(at: int, image: float | None = None, label: int | None = None) -> Callable[[], Batches]:
    """Batches of which one has a bad pixel or label."""

    def make() -> Batches:
        batches = [(x.clone(), y.clone()) for x, y in s.batches()]
        if image is not None:
            batches[at][0].view(-1)[5] = image
        if label is not None:
            batches[at][1][2] = label
        return batches

    return make


IMAGES: dict[str, Callable[[], Batches]] = {
    "NaN image": _spoilt(0, image=math.nan),
    "NaN image in the second batch": _spoilt(1, image=math.nan),
    "infinite image": _spoilt(0, image=math.inf),
    "no batch": list,
}
LABELS: dict[str, Callable[[], Batches]] = {
    **{f"label {n}": _spoilt(0, label=n) for n in (-1, -100, 3, 255, 2**40)},
    "label -100 in the second batch": _spoilt(1, label=-100),
    "labels that are no integers": lambda: [(x, y.float()) for x, y in s.batches()],
    "fewer labels than images": lambda: [(x, y[:-1]) for x, y in s.batches()],
}
TAKES_BATCHES: dict[str, tuple[Callable[[Batches], object], bool]] = {
    "accuracy": (lambda b: accuracy(s.model(), s.weights(1), b), True),
    "loss_and_accuracy": (lambda b: loss_and_accuracy(s.model(), s.weights(1), b), True),
    "ensemble_accuracy": (lambda b: ensemble_accuracy(s.model(), [s.weights(1)], b), True),
    "gradients": (lambda b: gradients(s.model(), s.weights(1), b), True),
    "scores": (lambda b: scores(s.model(), [s.weights(1)], b), True),
    "Recorder": (lambda b: Recorder(s.model(), validation=b, test=b), True),
    "transfer": (
        lambda b: transfer(s.model(), s.path(), s.weights(3), b, spec=s.spec(), gradient_batches=2),
        True,
    ),
    "transfer, validation": (
        lambda b: transfer(
            s.model(), s.path(), s.weights(3), s.batches(), "naive", spec=s.spec(), validation=b
        ),
        True,
    ),
    "fine_tune": (lambda b: _fine_tuned(b), True),
    "interpolate": (lambda b: interpolate(s.model(), s.weights(1), s.weights(2), b, 3), True),
    "reset_batchnorm": (lambda b: reset_batchnorm(s.model(), s.weights(1), b), False),
    "reset_on": (lambda b: fuse([s.weights(1)], [1.0], finish=reset_on(s.model(), b)), False),
    "repair_on": (
        lambda b: fuse([s.weights(1)], [1.0], finish=repair_on(s.model(), [s.weights(1)], b)),
        False,
    ),
    "evaluate (grid)": (lambda b: _grid([s.weights(1)], [[1.0]], *_joined(b)), True),
    "train": (lambda b: _trained_on(*_joined(b)), True),
}


def _joined(batches: Batches) -> tuple[Tensor, Tensor]:
    if not batches:
        return s.images()[:0], s.labels()[:0]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return images, labels


def _trained_on(images: Tensor, labels: Tensor) -> object:
    return train(s.model(), s.weights(1), s.dataset(images, labels), s.RECIPE, generator=s.seed())


def _fine_tuned(batches: Batches) -> object:
    network = build(s.layers, s.seed())
    return fine_tune(network, network[-1], [Phase(0.1, 0.01)], batches, 2)


def _fed(make: Callable[[], Batches], run: Callable[[Batches], object], folder: Path) -> None:
    run(make())


def batch_cases() -> Iterator[Case]:
    for name, (run, labelled) in TAKES_BATCHES.items():
        for what, make in (IMAGES | (LABELS if labelled else {})).items():
            yield Case(
                f"{name}: {what}", partial(_fed, make, run), ("batch", "images", "label", "data set", "split")
            )


# ---------------------------------------------------------------- numbers and names


def _transfer(**how: Any) -> object:
    return transfer(s.model(), s.path(), s.weights(3), s.batches(), spec=s.spec(), **how)


def _recorder(**how: Any) -> object:
    return Recorder(s.model(), validation=s.batches(), test=s.batches(), **how)


def _recipe(**how: Any) -> object:
    return Recipe(**({"epochs": 1, "lr": 0.1} | how))


def _groups(**how: Any) -> object:
    return fast.param_groups(s.model(), **how)


def _two(alpha: float, beta: float) -> object:
    return fuse([s.weights(1), s.weights(2)], [alpha, beta])


def _perm(change: Callable[[dict[str, Tensor]], object]) -> object:
    perm = s.spec().identity()
    change(perm)
    return apply(s.spec(), perm, s.weights(1))


def _values(
    name: str, values: Iterable[Any], run: Callable[..., object], word: str | None = None
) -> list[Any]:
    """One argument at several bad values."""
    return [(f"{name} = {v!r}", lambda v=v: run(**{name: v}), word or name) for v in values]


def _first_group() -> str:
    return next(iter(s.spec().groups))


NUMBERS: list[tuple[str, Made, str]] = [
    *_values("gradient_batches", (0, -1), _transfer),
    *_values("bn_batches", (-1,), _transfer),
    *_values("method", ("", "fgmtt", "FGMT"), _transfer),
    *_values("backend", ("", "cuda", "numpy"), _transfer),
    *_values("hold", (0, -1), _recorder),
    *_values("checkpoints", ([], [0, 1], [2, 1], [1, 1]), _recorder),
    *_values("head", ("0", "nothing", ""), _recorder, "linear"),
    *_values("lr", (math.nan, math.inf, -1.0), _recipe, "learning rate"),
    *_values("epochs", (-1,), _recipe),
    *_values("batch_size", (0, -5), _recipe),
    *_values("warmup_epochs", (-1, 2), _recipe),
    *_values("momentum", (math.nan, -0.1, math.inf), _recipe),
    *_values("weight_decay", (math.nan, -0.1, math.inf), _recipe),
    *_values("schedule", ("", "linear"), _recipe),
    *_values("optimizer", ("", "rmsprop"), _recipe),
    *_values("head_lr", (0.0, -1.0, math.nan, math.inf), _groups),
    *_values("body_lr", (0.0, -1.0, math.nan, math.inf), _groups),
    ("a convolution as head", lambda: _groups(head=s.model()[0]), "linear"),
    ("another model's head", lambda: _groups(head=nn.Linear(8, 3)), "head"),
    ("adopt: a convolution as head", lambda: adopt(build(s.layers, s.seed()), 3, head="0"), "linear"),
    *_values("num_classes", (0, -1), lambda num_classes: adopt(build(s.layers, s.seed()), num_classes)),
    ("features_of a convolution", lambda: fast.features_of(s.model(), s.model()[0], s.images()), "linear"),
    ("features_of another head", lambda: fast.features_of(s.model(), nn.Linear(8, 3), s.images()), "head"),
    *_values("alpha", (math.nan, math.inf, -math.inf), lambda alpha: _two(alpha, 0.5), "coefficient"),
    *_values("beta", (math.nan, math.inf, -math.inf), lambda beta: _two(0.5, beta), "coefficient"),
    ("a sum that overflows", lambda: _two(1e300, 1e300), "the sum"),
    ("three coefficients for two models", lambda: fuse([s.weights(1), s.weights(2)], [1, 2, 3]), "coefficients"),
    ("no model", lambda: fuse([], []), "no model"),
    ("grid: NaN coefficient", lambda: _grid([s.weights(1)], [[math.nan]]), "coefficient"),
    ("grid: two coefficients for a model", lambda: _grid([s.weights(1)], [[1.0, 2.0]]), "coefficients"),
    *_values("steps", (0, -1), lambda steps: Trajectory.linear(s.weights(1), s.weights(2), steps), "step"),
    ("an unknown schedule", lambda: Trajectory.linear(s.weights(1), s.weights(2), 3, "square"), "schedule"),
    ("a path of one checkpoint", lambda: Trajectory.recorded([s.weights(1)]), "step"),
    ("perm: a group is missing", lambda: _perm(lambda p: p.pop(_first_group())), "group"),
    ("perm: a group too many", lambda: _perm(lambda p: p.update(more=torch.arange(3))), "group"),
    ("perm: twice the same", lambda: _perm(lambda p: p[_first_group()].zero_()), "group"),
    ("perm: out of range", lambda: _perm(lambda p: p[_first_group()].add_(1)), "group"),
    ("perm: no integers", lambda: _perm(lambda p: p.update({_first_group(): torch.rand(4)})), "group"),
    ("assign: NaN", lambda: assign(torch.full((3, 3), math.nan)), "similarity"),
    ("assign: infinite", lambda: assign(torch.full((3, 3), math.inf)), "similarity"),
    ("assign: not square", lambda: assign(torch.zeros(3, 4)), "similarity"),
    ("assign: one axis", lambda: assign(torch.zeros(3)), "similarity"),
    ("assign: integers", lambda: assign(torch.zeros(3, 3, dtype=torch.int64)), "similarity"),
    *_values("backend", ("", "hungarian"), lambda backend: assign(torch.zeros(3, 3), backend=backend)),
    *_values("backend", ("", "cuda"), lambda backend: match(s.spec(), s.weights(1), s.weights(2), backend=backend)),
    *_values(
        "assignment", ("", "hungarian"),
        lambda assignment: match(s.spec(), s.weights(1), s.weights(2), assignment=assignment), "backend",
    ),
    *_values("points", (1, 0, -1), lambda points: interpolate(
        s.model(), s.weights(1), s.weights(2), s.batches(), points), "points"),
    ("plane: three on a line", lambda: plane(
        s.model(), s.weights(1), s.weights(1), s.weights(2), s.batches()), "line"),
    ("a split of float64 images", lambda: Split(s.images().double(), s.labels()), "images"),
    ("a split of int32 labels", lambda: Split(s.images(), s.labels().int()), "labels"),
    *_values("size", (0, -1), lambda size: Split(s.images(), s.labels()).batches(size), "batch size"),
    ("augmentation without generator", lambda: Split(s.images(), s.labels()).batches(4, augment=True), "generator"),
    ("an unknown data set", lambda: load("cifar11"), "cifar11"),
    ("an unknown class", lambda: load("digits", classes=["eleven"]), "eleven"),
    ("a class twice", lambda: load("digits", classes=[1, 1]), "distinct"),
    *_values("validation", (-0.1, 1.0, 2.0, math.nan), lambda validation: load(
        "digits", validation=validation), "share"),
    ("trace: a wrong input", lambda: trace(s.model(), torch.zeros(2, 5, 6, 6)), "trace"),
    ("verify: another model", lambda: verify(s.spec(), nn.Linear(2, 2), torch.zeros(1, 2)), "tensor"),
    ("verify: a NaN in the model", lambda: verify(s.spec(), _broken(), s.images()[:2]), NAME),
    ("repair_on: all coefficients 0", lambda: fuse(
        [s.weights(1)], [0.0], finish=repair_on(s.model(), [s.weights(1)], s.batches())), "coefficients"),
]  # fmt: skip


def _broken() -> nn.Module:
    network = build(s.layers, s.seed())
    with torch.no_grad():
        network[4].weight[0, 0] = math.nan
    return network


def _called(make: Made, folder: Path) -> None:
    make()


def number_cases() -> Iterator[Case]:
    for what, make, word in NUMBERS:
        yield Case(what, partial(_called, make), (word,))
