"""The paper's experiments on gradient assignment and fusion, run again with the controls that it lacks.

    regraft reproduce fusion                         # every table, ours beside the paper's
    regraft reproduce fusion --table 2 --table A14   # some of them; F1 to F4 are the figures

A :class:`Study` says where data and trained networks lie and how large everything is; the tables are
functions of it. Networks are trained once and kept in the study's cache, and a training that was
interrupted goes on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regraft import models, results
from regraft.data import CIFAR100_FUSION, CIFAR100_TRANSFER, Dataset, MissingData, Split, load
from regraft.evaluation import call, evaluating
from regraft.fusion import Tensors, batch_statistics, gradient, repair_on, reset_on
from regraft.fusion_tables import PaperTable
from regraft.grids import evaluate, harmonic_mean, lattice
from regraft.training import Recipe, train

# ---------------------------------------------------------------- what is learned


@dataclass(frozen=True)
class Task:
    """A data set by name, or some classes of it, as :func:`regraft.data.load` takes them; ``limit`` a class."""

    label: str
    data: str
    classes: tuple[str | int, ...] | None = None
    limit: int | None = None
    instead_of: str = ""


CIFAR10 = Task("CIFAR-10", "cifar10")
CIFAR100 = Task("CIFAR-100", "cifar100", CIFAR100_FUSION)
CALTECH = (
    "beer-mug", "car-tire", "hummingbird", "killer-whale", "knife",
    "mushroom", "scorpion-101", "speed-boat", "teapot", "tomato",
)  # fmt: skip
FOOD = (
    "spaghetti_bolognese", "carrot_cake", "pad_thai", "french_toast", "garlic_bread",
    "tiramisu", "creme_brulee", "samosa", "chocolate_mousse", "poutine",
)  # fmt: skip
# The order of STL-10's classes: six of them have the number that they have in CIFAR-10.
STL_ORDER = ("airplane", "bird", "automobile", "cat", "deer", "dog", "horse", "frog", "ship", "truck")

# The networks theta_1 to theta_5 of figures 2 and 4: the paper's task, and what stands in where it is missing.
TARGETS: tuple[tuple[Task, ...], ...] = (
    (CIFAR100,),
    (
        Task("Caltech-256", "caltech256", CALTECH),
        Task("CIFAR-100, ten other classes", "cifar100", CIFAR100_TRANSFER, instead_of="Caltech-256"),
    ),
    (
        Task("Food-101", "food101", FOOD),
        Task("Fashion-MNIST", "fashion-mnist", instead_of="Food-101"),
    ),
    (Task("MNIST", "mnist"),),
    (
        Task("STL-10", "stl10"),
        Task("CIFAR-10 in STL-10's order, 500 a class", "cifar10", STL_ORDER, 500, instead_of="STL-10"),
    ),
)

PER_CLASS: dict[str, int | None] = {"small": 4, "medium": 100, "large": None}


@dataclass(frozen=True)
class Study:
    """Everything that a run of the tables depends on.

    Attributes:
        data: folder of the data sets. cache: trained networks, and grids that were interrupted.
        width: width factor of the residual network. channels_last: its memory format; faster on a CPU.
        cnn, residual: recipes by scale. Those of the targets are the CNN's, with as many epochs as give
            about `target_steps` steps.
        images: at most this many for each accuracy of the residual network at the large scale (None: all).
        held_out: at most this many validation images when (alpha, beta) is chosen, and for accuracies on the
            targets' own tasks.
        note: one sentence on what is narrower than in the paper.
    """

    data: Path | None
    cache: Path
    seed: int = 0
    device: str = "cpu"
    width: float = 0.25
    channels_last: bool = True
    cnn: tuple[tuple[str, Recipe], ...] = (
        ("small", Recipe(epochs=100, lr=0.01, batch_size=8)),
        ("medium", Recipe(epochs=40, lr=0.01, batch_size=16)),
        ("large", Recipe(epochs=6, lr=0.01, batch_size=64)),
    )
    target_steps: int = 1500
    residual: tuple[tuple[str, Recipe], ...] = (
        ("small", Recipe(epochs=40, lr=0.02, batch_size=40, schedule="constant")),
        ("medium", Recipe(epochs=40, lr=0.02, batch_size=20)),
        ("large", Recipe(epochs=6, lr=0.02, batch_size=64)),
    )
    images: int | None = 500
    held_out: int = 1000
    note: str = (
        "Two cores: the residual network has a quarter of the usual width; at the large scale six epochs "
        "(thirty on CIFAR-100's ten classes), and accuracies on 500 images of each set."
    )

    def generator(self, *purpose: Any) -> torch.Generator:
        """Random numbers of their own for every purpose, the same in every run."""
        return torch.Generator().manual_seed(int(results.digest([self.seed, *map(str, purpose)])[:15], 16))


def paper_study(data: Path | None, cache: Path, device: str, seed: int = 0) -> Study:
    """Full width, all images, training as long as it takes: for a GPU."""
    return replace(
        Study(data, cache, seed=seed, device=device),
        width=1.0,
        channels_last=False,
        residual=(
            ("small", Recipe(epochs=40, lr=0.02, batch_size=40, schedule="constant")),
            ("medium", Recipe(epochs=40, lr=0.02, batch_size=20)),
            ("large", Recipe(epochs=30, lr=0.02, weight_decay=5e-4, augment=True)),
        ),
        images=None,
        held_out=5000,
        note="Full width, all images.",
    )


@cache
def dataset(study: Study, task: Task) -> Dataset:
    """A task's data set, 32x32 and in colour, in memory. Raises MissingData where it is not there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CIFAR-100 may come from its extract; the result says which was used
        data = load(task.data, root=study.data, classes=task.classes, image_size=32, channels=3).in_memory()
    if task.limit is not None:
        generator = study.generator("limit", task.label)
        data = replace(data, train=data.train.per_class(task.limit, generator))
    return data


@cache
def targets(study: Study) -> tuple[Task, ...]:
    """The five tasks of figures 2 and 4: the paper's own where they are, else their stand-ins."""

    def present(task: Task) -> bool:
        try:
            dataset(study, task)
        except MissingData:
            return False
        return True

    return tuple(next(task for task in choices if present(task)) for choices in TARGETS)


@cache
def at_scale(study: Study, task: Task, scale: str) -> Dataset:
    """The data set with the scale's training images: those of a smaller scale are among a larger one's."""
    data = dataset(study, task)
    per_class = PER_CLASS[scale]
    if per_class is None:
        return data
    drawn = data.train.per_class(per_class, study.generator("scale", task.label))
    return replace(data, train=drawn, validation=data.validation.subset(torch.arange(0)))


def images_of(study: Study, split: Split, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """(normalised images, labels), loaded and normalised once; `limit` evenly spaced ones of a longer split."""
    if limit is not None and limit < len(split):
        split = split.subset(torch.linspace(0, len(split) - 1, limit).round().long())
    batches = list(split.batches(1000, device=study.device))
    images, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    return images, labels


# ---------------------------------------------------------------- networks


class _ChannelsLast(models.Residual8):
    """The residual network on images whose channels lie side by side: on a CPU up to three times as fast."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.contiguous(memory_format=torch.channels_last))


@cache
def network(study: Study, name: str) -> nn.Module:
    """The architecture `small_cnn` or `residual8`, on the study's device."""
    if name == "small_cnn":
        return models.small_cnn().to(study.device).eval()
    if study.channels_last:
        return _ChannelsLast(10, 3, study.width).to(study.device).eval()
    return models.residual8(width=study.width).to(study.device).eval()


@cache
def start(study: Study, name: str, number: int = 0) -> Tensors:
    """Initial values: number 0 is theta_0, 1 to 5 the random targets."""
    return models.initialise(network(study, name), study.generator("start", name, number))


def recipe_for(study: Study, name: str, task: Task, scale: str) -> Recipe:
    """The scale's recipe; small data sets get as many epochs as the large one has steps."""
    recipe = dict(study.cnn if name == "small_cnn" else study.residual)[scale]
    if scale != "large" or task == CIFAR10:
        return recipe
    steps = -(-len(dataset(study, task).train) // recipe.batch_size)
    wanted = study.target_steps if name == "small_cnn" else 5 * recipe.epochs * steps
    return replace(recipe, epochs=max(1, round(wanted / steps)))


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network and what it cost."""

    tensors: Tensors
    seconds: float
    cpu_seconds: float


@cache
def trained(study: Study, name: str, task: Task, scale: str = "large", number: int = 0) -> Trained:
    """theta_0 (or another start) trained on a task at a scale; kept in the cache."""
    return train_from(study, name, at_scale(study, task, scale), start(study, name, number),
                      recipe_for(study, name, task, scale), (task.label, scale, number))  # fmt: skip


def train_from(
    study: Study, name: str, data: Dataset, begin: Tensors, recipe: Recipe, purpose: tuple[Any, ...]
) -> Trained:
    """Train, or read from the cache what was trained before with the same start, data and recipe."""
    key = results.digest([name, study.width, study.seed, [str(p) for p in purpose], asdict(recipe)])
    run = train(
        network(study, name), begin, data, recipe,
        generator=study.generator("order", *purpose),
        device=study.device,
        # A checkpoint costs a write to disk an epoch: short epochs are not worth it.
        checkpoint=study.cache / f"{name}-{key}.safetensors" if recipe.epochs < 40 else None,
    )  # fmt: skip
    return Trained(run.tensors, run.seconds, run.cpu_seconds)


# ---------------------------------------------------------------- tables of targets: 1 to 4, figures 1 to 4


GRADIENT, WEIGHTS = "theta_n + alpha g", "theta_n + alpha theta_A"
ALPHAS = {
    GRADIENT: (0.01, 0.1, 0.2, 0.5, 0.8, 1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0, 30.0, 40.0),
    WEIGHTS: (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0),
}
SMALL_IMAGES = "small training images"


@dataclass(frozen=True)
class Question:
    """One panel of figures 1 to 4: which sum, onto which targets, learned and evaluated on what."""

    formula: str
    targets: str
    scale: str
    evaluated_on: str


FIGURES: dict[str, tuple[Question, ...]] = {
    figure: (
        *(Question(formula, kind, scale, SMALL_IMAGES) for scale in ("small", "medium", "large")),
        Question(formula, kind, "large", "test"),
    )
    for figure, formula, kind in (
        ("F1", GRADIENT, "random"),
        ("F2", GRADIENT, "trained"),
        ("F3", WEIGHTS, "random"),
        ("F4", WEIGHTS, "trained"),
    )
}
TABLED = {"1": ("F1", 0), "2": ("F2", 3), "3": ("F3", 0), "4": ("F4", 3)}


def target_networks(study: Study, kind: str) -> dict[str, Tensors]:
    """theta_1 to theta_5 of the CNN by name, each from initial values of its own."""
    if kind == "random":
        return {f"theta_{number}": start(study, "small_cnn", number) for number in range(1, 6)}
    return {
        task.label: trained(study, "small_cnn", task, number=number).tensors
        for number, task in enumerate(targets(study), start=1)
    }


def moved(study: Study, question: Question) -> tuple[Tensors, Tensors]:
    """(theta_A, g) at the question's scale."""
    theta_a = trained(study, "small_cnn", CIFAR10, question.scale).tensors
    return theta_a, gradient(start(study, "small_cnn"), theta_a)


def evaluation_images(study: Study, task: Task, evaluated_on: str) -> tuple[Tensor, Tensor]:
    """The images that a table is on, by the words that its data file uses."""
    if evaluated_on == "test":
        return images_of(study, dataset(study, task).test)
    return images_of(study, at_scale(study, task, evaluated_on.split()[0]).train)


def ask(study: Study, question: Question, alphas: Sequence[float]) -> dict[str, tuple[float, ...]]:
    """Accuracy over alpha for each target, and for g and theta_A alone, which is a zero target."""
    theta_a, g = moved(study, question)
    onto = target_networks(study, question.targets)
    delta = len(onto) + (0 if question.formula == GRADIENT else 1)
    sources = [*onto.values(), g, theta_a]
    rows = [_row(len(sources), {number: 1.0, delta: a}) for number in range(len(onto)) for a in alphas]
    rows += [_row(len(sources), {len(onto): a}) for a in alphas]
    rows += [_row(len(sources), {len(onto) + 1: a}) for a in alphas]
    images, labels = evaluation_images(study, CIFAR10, question.evaluated_on)
    grid = evaluate(network(study, "small_cnn"), sources, rows, images, labels)
    found = grid.accuracy.reshape(-1, len(alphas))
    names = [*onto, "alpha g alone", "alpha theta_A alone"]
    return {name: tuple(line.tolist()) for name, line in zip(names, found, strict=True)}


def _row(length: int, entries: dict[int, float]) -> list[float]:
    return [entries.get(i, 0.0) for i in range(length)]


def table_of_targets(study: Study, paper: PaperTable) -> dict[str, Any]:
    """Tables 1 to 4 with their controls."""
    figure, panel = TABLED[paper.table]
    question = FIGURES[figure][panel]
    lines = ask(study, question, paper.rows)
    names = list(lines)[:5]
    ours = [list(row) for row in zip(*(lines[name] for name in names), strict=True)]
    theta_a, g = moved(study, question)
    onto = target_networks(study, question.targets)
    delta = g if question.formula == GRADIENT else theta_a
    model = network(study, "small_cnn")
    images, labels = evaluation_images(study, CIFAR10, question.evaluated_on)
    score = partial(evaluate, model, images=images, labels=labels)
    alone = score([theta_a, g], [[1.0, 0.0], [0.0, 1.0]]).accuracy.tolist()
    controls: dict[str, Any] = {
        "theta_A": alone[0],
        "g": alone[1],
        "alpha g alone (zero target)": lines["alpha g alone"],
        "alpha theta_A alone (zero target)": lines["alpha theta_A alone"],
        "plain average (theta_n + theta_A) / 2": [
            float(score([theta_n, theta_a], [[0.5, 0.5]]).accuracy) for theta_n in onto.values()
        ],
        "ensemble (mean of the logits)": [
            ensemble(model, [theta_n, theta_a], images, labels) for theta_n in onto.values()
        ],
        "after alignment": columns(
            score([theta_n, delta_n], [[1.0, a] for a in paper.rows]).accuracy.tolist()
            for theta_n, delta_n in ((t, aligned(study, t, theta_a, delta)) for t in onto.values())
        ),
    }
    calibration = list(at_scale(study, CIFAR10, question.scale).train.batches(
        250, device=study.device, generator=study.generator("calibration")))[:2]  # fmt: skip
    controls["repaired (REPAIR)"] = columns(
        score(
            [theta_n, theta_a, delta],
            [[1.0, 0.0, a] for a in paper.rows],
            finish=_repair_like_networks(model, theta_n, theta_a, calibration),
        ).accuracy.tolist()
        for theta_n in onto.values()
    )
    if question.targets == "trained":
        controls |= both_tasks(study, paper, onto, theta_a, delta, columns(ours))
    else:
        controls["best alpha for CIFAR-10, chosen on validation"] = best_on_validation(
            study, paper, onto, delta
        )
    notes = [
        f"{task.label} stands in for {task.instead_of}, which is not here"
        for task in targets(study)
        if task.instead_of and question.targets == "trained"
    ]
    return {"columns": names, "ours": ours, "controls": controls, "notes": notes}


def _repair_like_networks(
    model: nn.Module, theta_n: Tensors, theta_a: Tensors, batches: Sequence[tuple[Tensor, Tensor]]
) -> Callable[[Tensors, Tensor], Tensors]:
    """REPAIR towards theta_n and theta_A in the proportion 1 : alpha, whether alpha scales theta_A or g."""
    finish = repair_on(model, [theta_n, theta_a], batches)
    return lambda tensors, row: finish(tensors, torch.stack([row[0], row[1] + row[2]]))


def columns(lines: Any) -> list[list[float]]:
    """One list a target -> one list a row of the table."""
    return [list(row) for row in zip(*lines, strict=True)]


def best_on_validation(
    study: Study, paper: PaperTable, onto: dict[str, Tensors], delta: Tensors
) -> list[dict[str, float]]:
    """For each random target, the best of the table's alphas by validation, and what it reaches on test."""
    model, rows = network(study, "small_cnn"), [[1.0, a] for a in paper.rows]
    data, found = dataset(study, CIFAR10), []
    held, test = images_of(study, data.validation, study.held_out), images_of(study, data.test)
    for theta_n in onto.values():
        k = evaluate(model, [theta_n, delta], rows, *held).best()
        reached = evaluate(model, [theta_n, delta], [rows[k]], *test).accuracy
        found.append({"alpha": paper.rows[k], "CIFAR-10 test": float(reached)})
    return found


def both_tasks(
    study: Study,
    paper: PaperTable,
    onto: dict[str, Tensors],
    theta_a: Tensors,
    delta: Tensors,
    test: Sequence[Sequence[float]],
) -> dict[str, Any]:
    """The targets' own tasks beside CIFAR-10, and the best alpha by validation, reported on test.

    `test` has CIFAR-10's test accuracies, a line for each target.
    """
    model = network(study, "small_cnn")
    rows = [[1.0, a] for a in paper.rows]
    on_a = images_of(study, dataset(study, CIFAR10).validation, study.held_out)
    before, ensembles, own, means, best = [], [], [], [], {}
    for task, theta_n, line in zip(targets(study), onto.values(), test, strict=True):
        test_n = images_of(study, dataset(study, task).test, study.held_out)
        sources = [theta_n, delta]
        before.append(float(evaluate(model, [theta_n], [[1.0]], *test_n).accuracy))
        ensembles.append(ensemble(model, [theta_n, theta_a], *test_n))
        own_line = evaluate(model, sources, rows, *test_n).accuracy
        own.append(own_line.tolist())
        means.append(harmonic_mean(torch.tensor(line, dtype=torch.float64), own_line).tolist())
        on_n = images_of(study, dataset(study, task).validation, study.held_out)
        chosen = [evaluate(model, sources, rows, *where).accuracy for where in (on_a, on_n)]
        for name, values in (("CIFAR-10", chosen[0]), ("both", harmonic_mean(*chosen))):
            k = int(values.argmax())
            best.setdefault(f"best alpha for {name}, chosen on validation", []).append(
                {"alpha": paper.rows[k], "CIFAR-10 test": line[k], "own test": float(own_line[k])}
            )
    return {
        "own task before": before,
        "own task of the ensemble": ensembles,
        "own task": columns(own),
        "harmonic mean of both tasks": columns(means),
        **best,
    }


def ensemble(model: nn.Module, networks: Sequence[Tensors], images: Tensor, labels: Tensor) -> float:
    """Accuracy of the mean of the networks' logits."""
    right = 0
    with torch.inference_mode(), evaluating(model):
        for x, y in zip(images.split(500), labels.split(500), strict=True):
            logits = sum(call(model, tensors, x) for tensors in networks)
            right += int((logits.argmax(1) == y).sum())
    return right / len(labels)


@cache
def _spec(study: Study, name: str) -> Any:
    from regraft.symmetry import trace

    model = network(study, name)
    return trace(model, torch.zeros(2, 3, 32, 32, device=study.device))


def aligned(
    study: Study, target: Tensors, source: Tensors, delta: Tensors, name: str = "small_cnn"
) -> Tensors:
    """`delta`, permuted as moves `source`'s units closest to `target`'s (weight matching)."""
    from regraft.matching import match
    from regraft.symmetry import apply

    spec = _spec(study, name)
    weights = [name for name, _ in network(study, name).named_parameters()]
    found = match(spec, {w: target[w] for w in weights}, {w: source[w] for w in weights})
    return apply(spec, found.perm, delta)


# ---------------------------------------------------------------- tables of alpha and beta: 6, A1 to A19


TWO_GRADIENTS, TWO_NETWORKS = "theta_0 + alpha g_1 + beta g_2", "alpha theta_A + beta theta_B"
FINE = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 3.0, 4.0, 5.0)  # the tables on which (alpha, beta) is chosen
BATCH = 250  # images that share one mean and variance


@dataclass(frozen=True, eq=False)
class Pair:
    """theta_0, trained on CIFAR-10 (theta_A) and on ten classes of CIFAR-100 (theta_B), at one scale."""

    theta_0: Tensors
    theta_a: Tensors
    theta_b: Tensors

    def sources(self, formula: str) -> list[Tensors]:
        """What the formula sums; the coefficients are those of :func:`point`."""
        if formula == TWO_NETWORKS:
            return [self.theta_a, self.theta_b]
        return [self.theta_0, gradient(self.theta_0, self.theta_a), gradient(self.theta_0, self.theta_b)]


def point(formula: str, alpha: float, beta: float) -> list[float]:
    """Coefficients of the formula's sources."""
    return [alpha, beta] if formula == TWO_NETWORKS else [1.0, alpha, beta]


@cache
def pair(study: Study, scale: str) -> Pair:
    """The two networks of section 5, from one theta_0."""
    theta_a, theta_b = (trained(study, "residual8", task, scale).tensors for task in (CIFAR10, CIFAR100))
    return Pair(start(study, "residual8"), theta_a, theta_b)


@cache
def pair_images(study: Study, task: Task, split: str, scale: str) -> tuple[Tensor, Tensor]:
    """Images of the residual network's tables, shuffled: they are normalised batch by batch."""
    if split == "validation":
        images, labels = images_of(study, dataset(study, task).validation, study.images or study.held_out)
    elif split == "test":
        images, labels = images_of(study, dataset(study, task).test, study.images)
    else:
        limit = study.images if scale == "large" else None
        images, labels = images_of(study, at_scale(study, task, scale).train, limit)
    order = torch.randperm(len(labels), generator=study.generator("shuffle", task.label))
    return images[order], labels[order]


@cache
def pair_grid(
    study: Study,
    formula: str,
    scale: str,
    task: Task,
    split: str,
    alphas: tuple[float, ...],
    betas: tuple[float, ...],
) -> Tensor:
    """Accuracies [len(betas), len(alphas)] with batch statistics; kept in the cache while it runs, and after."""
    rows = lattice(betas, alphas, lambda beta, alpha: point(formula, alpha, beta))
    key = results.digest([formula, scale, task.label, split, alphas, betas, study.width, study.seed])
    grid = evaluate(
        batch_statistics(network(study, "residual8")),
        pair(study, scale).sources(formula),
        rows,
        *pair_images(study, task, split, scale),
        batch_size=BATCH,
        resume=study.cache / f"grid-{key}.json",
    )
    return grid.accuracy.reshape(len(betas), len(alphas))


def pair_points(
    study: Study,
    sources: Sequence[Tensors],
    rows: Sequence[Sequence[float]],
    split: str,
    scale: str,
    **how: Any,
) -> dict[str, list[float]]:
    """Accuracy on both tasks at a few points, by task."""
    model = batch_statistics(network(study, "residual8")) if "model" not in how else how.pop("model")
    return {
        task.label: evaluate(
            model, sources, rows, *pair_images(study, task, split, scale), batch_size=BATCH, **how
        ).accuracy.tolist()
        for task in (CIFAR10, CIFAR100)
    }


def table_of_pairs(study: Study, paper: PaperTable) -> dict[str, Any]:
    """Tables 6 and A1 to A19 with their controls."""
    split = "test" if paper.evaluated_on == "test" else "training"
    task = CIFAR10 if paper.task == "CIFAR-10" else CIFAR100
    alphas, betas = paper.columns, paper.rows
    both = [
        pair_grid(study, paper.formula, paper.scale, t, split, alphas, betas) for t in (CIFAR10, CIFAR100)
    ]
    ours = both[0 if task == CIFAR10 else 1]
    controls = pair_controls(study, paper.formula, paper.scale, split)
    controls |= chosen_on_validation(study, paper.formula, paper.scale, alphas, betas)
    means = harmonic_mean(*both)
    k = int(means.argmax())
    controls["harmonic mean of both tasks"] = means.tolist()
    controls["best harmonic mean in this table (not chosen on held-out data)"] = {
        "alpha": alphas[k % len(alphas)], "beta": betas[k // len(alphas)],
        "CIFAR-10": float(both[0].flatten()[k]), "CIFAR-100": float(both[1].flatten()[k]),
    }  # fmt: skip
    return {
        "columns": [str(a) for a in alphas], "ours": ours.tolist(), "controls": controls,
        "notes": [study.note] if study.note else [],
    }  # fmt: skip


DIAGONAL = (0.1, 0.5, 1.0, 5.0)
MIXED = ((0.5, 0.5), (1.0, 1.0), (5.0, 5.0), (1.0, 0.5))


@cache
def pair_controls(study: Study, formula: str, scale: str, split: str) -> dict[str, Any]:
    """What a sum of two networks has to be measured against; each with the accuracy on both tasks."""
    p = pair(study, scale)
    g1, g2 = gradient(p.theta_0, p.theta_a), gradient(p.theta_0, p.theta_b)
    ask = partial(pair_points, study, split=split, scale=scale)
    lines = [[a, 0.0] for a in DIAGONAL] + [[0.0, a] for a in DIAGONAL]
    names = [f"alpha = {a}" for a in DIAGONAL] + [f"beta = {a}" for a in DIAGONAL]
    own = batch_statistics(network(study, "residual8"))
    found: dict[str, Any] = {
        "theta_A or theta_B alone, scaled": dict(zip(names, _pairs(ask([p.theta_a, p.theta_b], lines)), strict=True)),
        "g_1 or g_2 alone, scaled": dict(zip(names, _pairs(ask([g1, g2], lines)), strict=True)),
        "plain average": _pairs(ask([p.theta_a, p.theta_b], [[0.5, 0.5]]))[0],
        "ensemble (mean of the logits)": {
            task.label: ensemble(own, [p.theta_a, p.theta_b], *pair_images(study, task, split, scale))
            for task in (CIFAR10, CIFAR100)
        },
    }  # fmt: skip
    diagonal = [[a, a] for a in DIAGONAL]
    if formula == TWO_GRADIENTS:
        found["zero target: alpha g_1 + beta g_2 on the diagonal"] = dict(
            zip(map(str, DIAGONAL), _pairs(ask([g1, g2], diagonal)), strict=True)
        )
    rows = [point(formula, a, b) for a, b in MIXED]
    sources = p.sources(formula)
    plain = network(study, "residual8")
    batches = calibration(study, scale)
    choices: dict[str, dict[str, Any]] = {
        "of each batch": {},
        "fused like weights": {"model": plain},
        "reset on data": {"model": plain, "finish": reset_on(plain, batches)},
    }
    if formula == TWO_NETWORKS:
        choices["REPAIR"] = {"model": plain, "finish": repair_on(plain, sources, batches)}
    found["BatchNorm statistics"] = {
        name: dict(zip(map(str, MIXED), _pairs(ask(sources, rows, **how)), strict=True))
        for name, how in choices.items()
    }
    if formula == TWO_NETWORKS:
        permuted = aligned(study, p.theta_a, p.theta_b, p.theta_b, "residual8")
        found["after alignment, same initial values"] = _on_diagonal(ask, p.theta_a, permuted)
        other = trained(study, "residual8", CIFAR100, scale, number=1).tensors
        permuted = aligned(study, p.theta_a, other, other, "residual8")
        found["other initial values, not aligned"] = _on_diagonal(ask, p.theta_a, other)
        found["other initial values, after alignment"] = _on_diagonal(ask, p.theta_a, permuted)
    return found


def _pairs(by_task: dict[str, list[float]]) -> list[dict[str, float]]:
    """Lists by task -> one dictionary a point."""
    return [dict(zip(by_task, values, strict=True)) for values in zip(*by_task.values(), strict=True)]


def _on_diagonal(ask: Callable[..., dict[str, list[float]]], a: Tensors, b: Tensors) -> dict[str, Any]:
    return dict(zip(map(str, DIAGONAL), _pairs(ask([a, b], [[x, x] for x in DIAGONAL])), strict=True))


def calibration(study: Study, scale: str) -> list[tuple[Tensor, Tensor]]:
    """A few batches of both tasks' training images, for BatchNorm statistics and REPAIR."""
    found = []
    for task in (CIFAR10, CIFAR100):
        split = at_scale(study, task, scale).train
        generator = study.generator("calibration", task.label)
        found += list(split.batches(BATCH, device=study.device, generator=generator))[:2]
    return found


def chosen_on_validation(
    study: Study, formula: str, scale: str, alphas: tuple[float, ...], betas: tuple[float, ...]
) -> dict[str, Any]:
    """The (alpha, beta) of the best harmonic mean on validation images, and what it reaches on test."""
    held, test = (
        [pair_grid(study, formula, scale, task, split, alphas, betas) for task in (CIFAR10, CIFAR100)]
        for split in ("validation", "test")
    )
    k = int(harmonic_mean(*held).argmax())
    return {
        "best (alpha, beta), chosen on validation, on test": {
            "alpha": alphas[k % len(alphas)], "beta": betas[k // len(alphas)],
            "CIFAR-10": float(test[0].flatten()[k]), "CIFAR-100": float(test[1].flatten()[k]),
        }
    }  # fmt: skip
