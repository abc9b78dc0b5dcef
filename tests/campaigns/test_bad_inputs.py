"""Arguments that no function may take silently: tensors, batches, numbers, names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from campaigns import subjects as s
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
from regraft.training.evaluation import accuracy, ensemble_accuracy, loss_and_accuracy
from regraft.training.gradients import gradients
from regraft.training.landscape import interpolate, plane
from regraft.training.loop import Recipe, train
from regraft.training.statistics import reset_batchnorm
from regraft_kernels import assign

pytestmark = pytest.mark.filterwarnings("ignore")
Change = Callable[[Tensors], object]
Batches = list[tuple[Tensor, Tensor]]

# ---------------------------------------------------------------- tensors by name

NAME = "4.weight"


SHAPES: dict[str, Change] = {
    "a tensor is missing": lambda t: t.pop(NAME),
    "a tensor too many": lambda t: t.update({"4.weightt": t[NAME]}),
    "another shape": lambda t: t.update({NAME: t[NAME][:, :3]}),
    "another number of axes": lambda t: t.update({NAME: t[NAME][None, None]}),
}
DTYPE: dict[str, Change] = {"another dtype": lambda t: t.update({NAME: t[NAME].double()})}
VALUES: dict[str, Change] = {
    "NaN": lambda t: t.update({NAME: t[NAME].where(t[NAME] < t[NAME].max(), math.nan)}),
    "infinity": lambda t: t.update({NAME: t[NAME].where(t[NAME] < t[NAME].max(), math.inf)}),
}
ALL = SHAPES | DTYPE | VALUES

TAKES_TENSORS: dict[str, tuple[Change, dict[str, Change]]] = {
    "accuracy": (lambda t: accuracy(s.MODEL, t, s.BATCHES), SHAPES),
    "loss_and_accuracy": (lambda t: loss_and_accuracy(s.MODEL, t, s.BATCHES), SHAPES),
    "ensemble_accuracy": (lambda t: ensemble_accuracy(s.MODEL, [s.weights(1), t], s.BATCHES), SHAPES),
    "gradients": (lambda t: gradients(s.MODEL, t, s.BATCHES), SHAPES | VALUES),
    "reset_batchnorm": (lambda t: reset_batchnorm(s.MODEL, t, s.BATCHES), SHAPES),
    "interpolate": (
        lambda t: interpolate(s.MODEL, s.weights(1), t, s.BATCHES, 3),
        SHAPES,
    ),
    "plane": (
        lambda t: plane(s.MODEL, s.weights(1), s.weights(2), t, s.BATCHES, 3),
        SHAPES,
    ),
    "fuse": (lambda t: fuse([s.weights(1), t], [0.5, 0.5]), ALL),
    "fuse_many": (lambda t: fuse_many([s.weights(1), t], [[0.5, 0.5]]), SHAPES | DTYPE),
    "assign_gradient": (lambda t: assign_gradient(s.weights(1), t, 0.5), ALL),
    "evaluate (grid)": (lambda t: grid([s.weights(1), t], [[1.0, 0.5]]), SHAPES | DTYPE),
    "transfer, start": (lambda t: transfer(s.MODEL, s.path(), t, s.BATCHES, spec=s.spec()), ALL),
    "match": (lambda t: match(s.spec(), s.weights(1), t), ALL),
    "apply": (lambda t: apply(s.spec(), s.spec().identity(), t), SHAPES),
    "train": (lambda t: train(s.MODEL, t, s.dataset(), s.RECIPE, generator=s.seed()), SHAPES | VALUES),
    "Trajectory.linear": (lambda t: Trajectory.linear(s.weights(1), t), ALL),
    "Trajectory.recorded": (lambda t: Trajectory.recorded([s.weights(1), t]), ALL),
}


def grid(sources: list[Tensors], rows: Any, x: Tensor = s.IMAGES, y: Tensor = s.LABELS) -> object:
    return evaluate(s.MODEL, sources, rows, x, y)


@pytest.mark.parametrize("function", TAKES_TENSORS)
def test_tensors(refuse, function):
    run, changes = TAKES_TENSORS[function]
    for what, change in changes.items():
        tensors = dict(s.weights(2))
        change(tensors)
        refuse(f"{function}: {what}", lambda tensors=tensors: run(tensors), (NAME, "gradient of"))


# ---------------------------------------------------------------- batches


def bad_batches(at: int, image: float | None = None, label: int | None = None) -> Batches:
    """Batches of which one has a bad pixel or label."""
    batches = [(x.clone(), y.clone()) for x, y in s.BATCHES]
    if image is not None:
        batches[at][0].view(-1)[5] = image
    if label is not None:
        batches[at][1][2] = label
    return batches


IMAGES: dict[str, Batches] = {
    "NaN image": bad_batches(0, image=math.nan),
    "NaN image in the second batch": bad_batches(1, image=math.nan),
    "infinite image": bad_batches(0, image=math.inf),
    "no batch": [],
}
LABELS: dict[str, Batches] = {
    **{f"label {n}": bad_batches(0, label=n) for n in (-1, -100, 3, 255, 2**40)},
    "label -100 in the second batch": bad_batches(1, label=-100),
    "labels that are no integers": [(x, y.float()) for x, y in s.BATCHES],
    "fewer labels than images": [(x, y[:-1]) for x, y in s.BATCHES],
}
ABOUT_BATCHES = ("batch", "images", "label", "data set", "split")
TAKES_BATCHES: dict[str, Callable[[Batches], object]] = {
    "accuracy": lambda b: accuracy(s.MODEL, s.weights(1), b),
    "loss_and_accuracy": lambda b: loss_and_accuracy(s.MODEL, s.weights(1), b),
    "ensemble_accuracy": lambda b: ensemble_accuracy(s.MODEL, [s.weights(1)], b),
    "gradients": lambda b: gradients(s.MODEL, s.weights(1), b),
    "scores": lambda b: scores(s.MODEL, [s.weights(1)], b),
    "Recorder": lambda b: Recorder(s.MODEL, validation=b, test=b),
    "transfer": lambda b: transfer_small(batches=b, gradient_batches=2),
    "transfer, validation": lambda b: transfer_small("naive", validation=b),
    "fine_tune": lambda b: fine_tune_small(b),
    "interpolate": lambda b: interpolate(s.MODEL, s.weights(1), s.weights(2), b, 3),
    "evaluate (grid)": lambda b: grid([s.weights(1)], [[1.0]], *concat(b)),
    "train": lambda b: train(s.MODEL, s.weights(1), s.dataset(*concat(b)), s.RECIPE, generator=s.seed()),
}
TAKES_IMAGES: dict[str, Callable[[Batches], object]] = {
    "reset_batchnorm": lambda b: reset_batchnorm(s.MODEL, s.weights(1), b),
    "reset_on": lambda b: fuse([s.weights(1)], [1.0], finish=reset_on(s.MODEL, b)),
    "repair_on": lambda b: fuse([s.weights(1)], [1.0], finish=repair_on(s.MODEL, [s.weights(1)], b)),
}


def concat(batches: Batches) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True) if batches else ([s.IMAGES[:0]], [s.LABELS[:0]])
    return torch.cat(images), torch.cat(labels)


def fine_tune_small(batches: Batches) -> object:
    network = build(s.layers, s.seed())
    return fine_tune(network, network[-1], [Phase(0.1, 0.01)], batches, 2)


@pytest.mark.parametrize("function", TAKES_BATCHES | TAKES_IMAGES)
def test_batches(refuse, function):
    run = (TAKES_BATCHES | TAKES_IMAGES)[function]
    for what, batches in (IMAGES | (LABELS if function in TAKES_BATCHES else {})).items():
        refuse(f"{function}: {what}", lambda batches=batches: run(batches), ABOUT_BATCHES)


# ---------------------------------------------------------------- numbers and names


def transfer_small(*method: str, batches: Batches = s.BATCHES, **options: Any) -> object:
    return transfer(s.MODEL, s.path(), s.weights(3), batches, *method, spec=s.spec(), **options)


def make_recipe(epochs: int = 1, lr: float = 0.1, **options: Any) -> object:
    return Recipe(epochs, lr, **options)


def fuse_two(alpha: float, beta: float) -> object:
    return fuse([s.weights(1), s.weights(2)], [alpha, beta])


def apply_perm(change: Callable[[dict[str, Tensor]], object]) -> object:
    perm = s.spec().identity()
    change(perm)
    return apply(s.spec(), perm, s.weights(1))


def at_values(name: str, values: Iterable[Any], run: Callable[..., object], word: str | None = None) -> list[Any]:
    """One argument at several bad values."""
    return [(f"{name} = {v!r}", lambda v=v: run(**{name: v}), word or name) for v in values]


recorder = partial(Recorder, s.MODEL, validation=s.BATCHES, test=s.BATCHES)
groups = partial(fast.param_groups, s.MODEL)
NUMBERS: list[tuple[str, Callable[[], object], str]] = [
    *at_values("gradient_batches", (0, -1), transfer_small),
    *at_values("bn_batches", (-1,), transfer_small),
    *at_values("method", ("", "fgmtt", "FGMT"), transfer_small),
    *at_values("backend", ("", "cuda", "numpy"), transfer_small),
    *at_values("hold", (0, -1), recorder),
    *at_values("checkpoints", ([], [0, 1], [2, 1], [1, 1]), recorder),
    *at_values("head", ("0", "nothing", ""), recorder, "linear"),
    *at_values("lr", (math.nan, math.inf, -1.0), make_recipe, "lr"),
    *at_values("epochs", (-1,), make_recipe),
    *at_values("batch_size", (0, -5), make_recipe),
    *at_values("warmup_epochs", (-1, 2), make_recipe),
    *at_values("momentum", (math.nan, -0.1, math.inf), make_recipe),
    *at_values("weight_decay", (math.nan, -0.1, math.inf), make_recipe),
    *at_values("schedule", ("", "linear"), make_recipe),
    *at_values("optimizer", ("", "rmsprop"), make_recipe),
    *at_values("head_lr", (0.0, -1.0, math.nan, math.inf), groups),
    *at_values("body_lr", (0.0, -1.0, math.nan, math.inf), groups),
    ("a convolution as head", lambda: groups(head=s.MODEL[0]), "linear"),
    ("another model's head", lambda: groups(head=nn.Linear(8, 3)), "head"),
    ("adopt: a convolution as head", lambda: adopt(build(s.layers, s.seed()), 3, head="0"), "linear"),
    *at_values("num_classes", (0, -1), lambda num_classes: adopt(build(s.layers, s.seed()), num_classes)),
    ("features_of a convolution", lambda: fast.features_of(s.MODEL, s.MODEL[0], s.IMAGES), "linear"),
    ("features_of another head", lambda: fast.features_of(s.MODEL, nn.Linear(8, 3), s.IMAGES), "head"),
    *at_values("alpha", (math.nan, math.inf, -math.inf), lambda alpha: fuse_two(alpha, 0.5), "coefficient"),
    *at_values("beta", (math.nan, math.inf, -math.inf), lambda beta: fuse_two(0.5, beta), "coefficient"),
    ("a sum that overflows", lambda: fuse_two(1e300, 1e300), "the sum"),
    ("three coefficients for two models", lambda: fuse([s.weights(1), s.weights(2)], [1, 2, 3]), "coefficients"),
    ("no model", lambda: fuse([], []), "no model"),
    ("grid: NaN coefficient", lambda: grid([s.weights(1)], [[math.nan]]), "coefficient"),
    ("grid: two coefficients for a model", lambda: grid([s.weights(1)], [[1.0, 2.0]]), "coefficients"),
    *at_values("steps", (0, -1), lambda steps: Trajectory.linear(s.weights(1), s.weights(2), steps), "step"),
    ("an unknown schedule", lambda: Trajectory.linear(s.weights(1), s.weights(2), 3, "square"), "schedule"),
    ("a path of one checkpoint", lambda: Trajectory.recorded([s.weights(1)]), "step"),
    ("perm: a group is missing", lambda: apply_perm(lambda p: p.pop("4")), "group"),
    ("perm: a group too many", lambda: apply_perm(lambda p: p.update(more=torch.arange(3))), "group"),
    ("perm: twice the same", lambda: apply_perm(lambda p: p["4"].zero_()), "group"),
    ("perm: out of range", lambda: apply_perm(lambda p: p["4"].add_(1)), "group"),
    ("perm: no integers", lambda: apply_perm(lambda p: p.update({"4": torch.rand(4)})), "group"),
    ("assign: NaN", lambda: assign(torch.full((3, 3), math.nan)), "similarity"),
    ("assign: infinite", lambda: assign(torch.full((3, 3), math.inf)), "similarity"),
    ("assign: not square", lambda: assign(torch.zeros(3, 4)), "similarity"),
    ("assign: one axis", lambda: assign(torch.zeros(3)), "similarity"),
    ("assign: integers", lambda: assign(torch.zeros(3, 3, dtype=torch.int64)), "similarity"),
    *at_values("backend", ("", "hungarian"), lambda backend: assign(torch.zeros(3, 3), backend=backend)),
    *at_values("backend", ("", "cuda"), lambda backend: match(s.spec(), s.weights(1), s.weights(2), backend=backend)),
    *at_values(
        "assignment", ("", "hungarian"),
        lambda assignment: match(s.spec(), s.weights(1), s.weights(2), assignment=assignment), "backend",
    ),
    *at_values("points", (1, 0, -1), lambda points: interpolate(
        s.MODEL, s.weights(1), s.weights(2), s.BATCHES, points), "points"),
    ("plane: three on a line", lambda: plane(
        s.MODEL, s.weights(1), s.weights(1), s.weights(2), s.BATCHES), "line"),
    ("a split of float64 images", lambda: Split(s.IMAGES.double(), s.LABELS), "images"),
    ("a split of int32 labels", lambda: Split(s.IMAGES, s.LABELS.int()), "labels"),
    *at_values("size", (0, -1), lambda size: Split(s.IMAGES, s.LABELS).batches(size), "batch size"),
    ("augmentation without generator", lambda: Split(s.IMAGES, s.LABELS).batches(4, augment=True), "generator"),
    ("an unknown data set", lambda: load("cifar11"), "cifar11"),
    ("an unknown class", lambda: load("digits", classes=["eleven"]), "eleven"),
    ("a class twice", lambda: load("digits", classes=[1, 1]), "distinct"),
    *at_values("validation", (-0.1, 1.0, 2.0, math.nan), lambda validation: load(
        "digits", validation=validation), "share"),
    ("trace: a wrong input", lambda: trace(s.MODEL, torch.zeros(2, 5, 6, 6)), "trace"),
    ("verify: another model", lambda: verify(s.spec(), nn.Linear(2, 2), torch.zeros(1, 2)), "tensor"),
    ("verify: a NaN in the model", lambda: verify(s.spec(), model_with_nan(), s.IMAGES[:2]), NAME),
    ("repair_on: all coefficients 0", lambda: fuse(
        [s.weights(1)], [0.0], finish=repair_on(s.MODEL, [s.weights(1)], s.BATCHES)), "coefficients"),
]  # fmt: skip


def model_with_nan() -> nn.Module:
    network = build(s.layers, s.seed())
    with torch.no_grad():
        network[4].weight[0, 0] = math.nan
    return network


@pytest.mark.parametrize(("call", "word"), [pytest.param(call, word, id=what) for what, call, word in NUMBERS])
def test_numbers_and_names(refuse, call, word):
    refuse(word, call, (word,))
