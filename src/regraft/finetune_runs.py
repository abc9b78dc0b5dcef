"""Fine-tuning runs as data: a source, a target, methods; what one run does, and its row.

    row = run(scenario, method, method.rates[0], seed=0, cache=Path(".cache"), environment=environment)

A method prepares the adopted network (its head, or all of it) and then trains it in phases. FAST and every
baseline of the paper are such methods; `regraft.finetune_scenarios` lists them.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft import finetune, models, results
from regraft.clock import Clock
from regraft.data import Dataset, load
from regraft.deployment import Record, Recorder, Source
from regraft.files import write_beside
from regraft.finetune import Adoption, NoGain, adopt, check_labels, param_groups
from regraft.models import Tensors, state
from regraft.results import Cost, Environment, Row
from regraft.training import Recipe, train

Batch = tuple[Tensor, Tensor]
Rates = tuple[float | None, float | None]  # of the head, of the body
Optimiser = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]

TUNING_SEED = 1000  # rates are chosen on a seed that no reported run has


# ---------------------------------------------------------------------------------------------------
# Phases


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one optimiser.

    head_lr, body_lr: None leaves that part as it is, and costs no gradient. statistics: whether the features run in
    training mode (BatchNorm on batch statistics, updating the running ones) or as at inference. It ends after
    ``share`` of the run's steps, when ``until()`` says so of the validation accuracy after each step, or with the run.
    """

    head_lr: float | None
    body_lr: float | None
    statistics: bool = True
    share: float | None = None
    until: Callable[[], NoGain] | None = None


Plan = Callable[[float | None, float | None], tuple[Phase, ...]]


def together(alpha: float | None, beta: float | None) -> tuple[Phase, ...]:
    """Head and features from the first step on, each with its rate."""
    return (Phase(alpha, beta),)


def warm_up(alpha: float | None, beta: float | None) -> tuple[Phase, ...]:
    """The head alone until it gains no point in ten steps, the features at inference (Li and Hoiem, 2018)."""
    return (Phase(alpha, None, statistics=False, until=NoGain), Phase(alpha, beta))


def warm_up_with_statistics(alpha: float | None, beta: float | None) -> tuple[Phase, ...]:
    """The same, with BatchNorm's running statistics updated meanwhile."""
    return (Phase(alpha, None, statistics=True, until=NoGain), Phase(alpha, beta))


def probe_first(alpha: float | None, beta: float | None) -> tuple[Phase, ...]:
    """LP-FT (Kumar et al., 2022): a linear probe for a quarter of the steps, then both at the features' rate."""
    return (Phase(alpha, None, statistics=False, share=0.25), Phase(beta, beta))


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Momentum 0.9, torch's form."""
    return torch.optim.SGD(groups, momentum=0.9)


def sgd_as_in_the_paper(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Momentum 0.9, the paper's form."""
    optimiser = torch.optim.SGD(groups, momentum=0.9, dampening=0.9)
    finetune.start_momentum_at_zero_(optimiser)
    return optimiser


def nesterov(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True)


def adam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups)


def radam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.RAdam(groups)


@dataclass(frozen=True)
class Outcome:
    """How far a run came: steps made, the step at which its loss was not finite (from 1; None), ends of its phases."""

    steps: int
    diverged: int | None
    phase_ends: tuple[int, ...]


def fine_tune(
    model: nn.Module,
    head: nn.Linear,
    phases: Sequence[Phase],
    batches: Iterable[Batch],
    steps: int,
    *,
    optimiser: Optimiser = sgd,
    recorder: Recorder | None = None,
    validation: Iterable[Batch] | None = None,
) -> Outcome:
    """Train the adopted model in place for ``steps`` steps; the loss is cross-entropy, mean over the batch.

    batches: endless. validation: for phases that end by validation accuracy. A loss that is not finite ends the run,
    which is reported and no exception. Raises ValueError for labels that the head has no class for.
    """
    stream = iter(batches)
    device = head.weight.device
    every = 1 if device.type == "cpu" else 10  # each look at the loss waits for the device
    step, ends = 0, []
    for phase in phases:
        last = steps if phase.share is None else min(steps, step + max(1, round(phase.share * steps)))
        rule = None if phase.until is None else phase.until()
        groups = param_groups(model, phase.head_lr, phase.body_lr, head=head)
        updates = optimiser(groups)
        losses: list[Tensor] = []
        with _training_only(model, head, groups, phase.statistics):
            while step < last:
                images, labels = next(stream)
                if step == 0:
                    check_labels(labels, head.out_features)
                loss = F.cross_entropy(model(images), labels)
                updates.zero_grad()
                loss.backward()
                losses.append(loss.detach())
                if len(losses) == every or step + 1 == last:
                    finite = torch.stack(losses).isfinite()
                    if not bool(finite.all()):
                        first = step + 1 - len(losses) + int((~finite).nonzero()[0]) + 1
                        return Outcome(step, first, tuple(ends))
                    losses.clear()
                updates.step()
                step += 1
                if recorder is not None:
                    recorder.after_step()
                if rule is not None and validation is not None and rule(_accuracy(model, validation)):
                    break
        ends.append(step)
    return Outcome(step, None, tuple(ends))


@contextmanager
def _training_only(
    model: nn.Module, head: nn.Linear, groups: Sequence[Mapping[str, Any]], statistics: bool
) -> Iterator[None]:
    """Inside, only the groups' parameters take gradients, and modes are as the phase wants them."""
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(id(parameter) in trained)
        model.train(statistics)
        head.train()
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = None


def _accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    from regraft.evaluation import accuracy

    return accuracy(model, models.live_state(model), batches)


# ---------------------------------------------------------------------------------------------------
# Scenarios


@dataclass(frozen=True)
class Task:
    """A data set, or some classes of one, as :func:`regraft.data.load` takes it."""

    data: str
    classes: tuple[int | str, ...] | None = None
    size: int | None = None
    channels: int | None = None

    def load(self, root: Path | None = None) -> Dataset:
        """5 % of the training images, stratified, are held out for validation (section 6.1)."""
        return load(
            self.data,
            root=root,
            classes=self.classes,
            validation=0.05,
            image_size=self.size,
            channels=self.channels,
        ).in_memory()


@dataclass(frozen=True)
class Origin:
    """Where the pre-trained network comes from.

    network: of the number of classes. weights: a name among torchvision's weights to begin with. task, recipe: what
    it then learns; without a task the weights are all, and forgetting cannot be measured.
    """

    network: Callable[..., nn.Module]
    task: Task | None
    recipe: Recipe | None
    weights: str | None = None


@dataclass(frozen=True)
class Setting:
    """One run's surroundings, handed to its method's preparation."""

    scenario: Scenario
    seed: int
    source: Pretrained
    target: Dataset
    batches: Iterable[Batch]

    def generator(self, purpose: str) -> torch.Generator:
        """A stream of its own for every purpose, the same for all methods of a seed."""
        return _generator(self.seed, purpose)


Preparation = Callable[[nn.Module, Adoption, Setting], None]


@dataclass(frozen=True)
class Draw:
    """Preparation: the head is drawn by ``initialise``."""

    initialise: finetune.Initialiser

    def __call__(self, model: nn.Module, adopted: Adoption, setting: Setting) -> None:
        with torch.no_grad():
            self.initialise(adopted.head.weight, setting.generator("head"))


def imprint(model: nn.Module, adopted: Adoption, setting: Setting) -> None:
    """Preparation: class means of the first four batches' features as the head. No step is counted for them."""
    _imprint(model, adopted, setting, 4)


def imprint_one_batch(model: nn.Module, adopted: Adoption, setting: Setting) -> None:
    """Preparation: the same of the first batch alone, which is what the first step sees too."""
    _imprint(model, adopted, setting, 1)


def _imprint(model: nn.Module, adopted: Adoption, setting: Setting, count: int) -> None:
    model.eval()
    found = []
    for (images, labels), _ in zip(setting.batches, range(count), strict=False):
        found.append((finetune.features_of(model, adopted.head, images), labels))
    features, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    means = finetune.class_means(features, labels, adopted.head.out_features)
    with torch.no_grad():
        finetune.ClassMeans(means)(adopted.head.weight)


def from_scratch(model: nn.Module, adopted: Adoption, setting: Setting) -> None:
    """Preparation: nothing is kept of the source."""
    fresh = models.initialise(model, setting.generator("values"))
    with torch.no_grad():
        for name, tensor in models.live_state(model).items():
            tensor.copy_(fresh[name])


def transferred(model: nn.Module, adopted: Adoption, setting: Setting) -> None:
    """Preparation: in place of the source, a fresh network to which the source's training is transferred (FGMT).

    Gradients are taken on the source task, in ten steps of one batch of 128. The head that forgetting is measured
    through is the transferred one. Raises ValueError where the source's data are not known.
    """
    from regraft.learning_transfer import transfer
    from regraft.trajectory import Trajectory

    source = setting.source
    if source.data is None:
        raise ValueError("a transfer takes gradients on the source task, whose data are not known here")
    start = models.initialise(source.model, setting.generator("target start"))
    path = Trajectory.linear(source.start, source.values, steps=10, schedule="cosine")
    batches = source.data.train.batches(
        128, generator=setting.generator("transfer"), device=adopted.head.weight.device, drop_last=True
    )
    moved = transfer(source.model, path, start, batches, "fgmt", generator=setting.generator("sweeps")).params
    old = f"{adopted.name}."
    with torch.no_grad():
        for name, tensor in models.live_state(model).items():
            if not name.startswith(old):
                tensor.copy_(moved[name])
        for name, tensor in adopted.source_head.named_parameters():
            tensor.copy_(moved[old + name])


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    rates: candidates (head, body), of which the best on validation is taken where there are several. prepare: after
    adoption with a zero head.
    """

    name: str
    rates: tuple[Rates, ...]
    plan: Plan = together
    prepare: Preparation = Draw(finetune.zero)
    optimiser: Optimiser = sgd


@dataclass(frozen=True)
class Scenario:
    """One experiment: batches are stratified and of ``batch_size``; ``flip`` mirrors training images.

    figures: of the paper, that it draws. source_images, target_images: for speed, of the source's test images, and of
    the target's validation and its test images, so many evenly spaced ones.
    """

    name: str
    origin: Origin
    target: Task
    methods: tuple[Method, ...]
    steps: int
    batch_size: int = 100
    seeds: int = 5
    flip: bool = False
    source_images: int | None = None
    target_images: int | None = None
    figures: tuple[str, ...] = ()

    def method(self, name: str) -> Method:
        found = {method.name: method for method in self.methods}
        if name not in found:
            raise ValueError(f"scenario {self.name} has no method {name!r}: there are {', '.join(found)}")
        return found[name]


def config(scenario: Scenario) -> dict[str, Any]:
    """What all rows of a scenario have in common: the scenario without its methods."""
    whole = results.plain_data(scenario)
    return {key: value for key, value in whole.items() if key not in ("methods", "seeds", "figures")}


def own_config(method: Method, rates: Rates) -> dict[str, Any]:
    """What a method adds to that: itself, with the rates that were chosen in place of the candidates."""
    return {**results.plain_data(method), "rates": list(rates)}


# ---------------------------------------------------------------------------------------------------
# The source


@lru_cache(maxsize=8)
def _data(task: Task, root: Path | None) -> Dataset:
    return task.load(root)


def _generator(seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(int(results.digest([seed, purpose])[:15], 16))


@dataclass(frozen=True, eq=False)
class Pretrained:
    """The source network: a module, its values, the values it began with, its data (None where unknown)."""

    model: nn.Module
    values: Tensors
    start: Tensors
    data: Dataset | None


@lru_cache(maxsize=4)
def pretrained(origin: Origin, root: Path | None, cache: Path, device: str) -> Pretrained:
    """Make the source, or read it from ``cache``: it is trained once, from seed 0, for all runs and seeds."""
    data = None if origin.task is None else _data(origin.task, root)
    if origin.weights is not None:
        model = origin.network(weights=origin.weights)
        if data is not None:
            adopt(
                model,
                data.num_classes,
                initialise=finetune.kaiming_fan_in,
                generator=_generator(0, "source head"),
            )
    else:
        assert data is not None
        model = models.build(lambda: origin.network(data.num_classes), _generator(0, "source values"))
    model = model.to(device, memory_format=torch.channels_last)
    start = state(model)
    if data is None or origin.recipe is None:
        return Pretrained(model, start, start, data)
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"source-{results.digest(origin)}.safetensors"
    trained = train(
        model,
        start,
        data,
        origin.recipe,
        generator=_generator(0, "source order"),
        device=device,
        checkpoint=path,
    )
    return Pretrained(model, trained.tensors, start, data)


# ---------------------------------------------------------------------------------------------------
# A run


def run(
    scenario: Scenario,
    method: Method,
    rates: Rates,
    *,
    seed: int,
    cache: Path,
    environment: Environment,
    root: Path | None = None,
) -> Row:
    """Fine-tune once. The row's accuracy is the deployed one at the end; ``extra`` holds the curves."""
    record, outcome, cost = _measure(
        scenario, method, rates, seed, cache, environment.device, root, deploy=True
    )
    return Row(
        method=method.name,
        scenario=scenario.name,
        seed=seed,
        accuracy=record.deployments[-1].scores.top1,
        phases={
            "prepare": cost,
            "train": Cost(record.seconds, record.cpu_seconds),
            "evaluation": Cost(record.evaluation_seconds, record.evaluation_cpu_seconds),
        },
        environment=environment,
        config=config(scenario),
        peak_memory=results.peak_memory(environment.device),
        extra={
            "own_config": own_config(method, rates),
            **summary(record),
            "diverged": outcome.diverged,
            "phase_ends": list(outcome.phase_ends),
        },
    )


def _measure(
    scenario: Scenario,
    method: Method,
    rates: Rates,
    seed: int,
    cache: Path,
    device: str,
    root: Path | None,
    *,
    deploy: bool,
) -> tuple[Record, Outcome, Cost]:
    source = pretrained(scenario.origin, root, cache, device)
    target = _data(scenario.target, root)
    model = copy.deepcopy(source.model)
    with torch.no_grad():
        for name, tensor in models.live_state(model).items():
            tensor.copy_(source.values[name])
    adopted = adopt(model, target.num_classes)
    batches = finetune.Stratified(
        target.train,
        scenario.batch_size,
        target.num_classes,
        _generator(seed, "batches"),
        scenario.flip,
        device,
    )
    setting = Setting(scenario, seed, source, target, batches)
    clock = Clock()
    with clock.phase("prepare", device), models.seeded(_generator(seed, "dropout"), device):
        method.prepare(model, adopted, setting)
    # The same batches for every method, whatever its preparation took of them.
    batches.generator.manual_seed(_generator(seed, "batches").initial_seed())
    validation, test = (
        _first(split, scenario.target_images).batches(500, device=device)
        for split in (target.validation, target.test)
    )
    if not deploy:
        test = validation
    forgetting = None
    if deploy and source.data is not None:
        images = _first(source.data.test, scenario.source_images)
        forgetting = Source(adopted.source_head, images.batches(500, device=device))
    recorder = Recorder(
        model,
        validation=validation,
        test=test,
        head=adopted.name,
        source=forgetting,
    )
    with models.seeded(_generator(seed, "dropout"), device):
        outcome = fine_tune(
            model,
            adopted.head,
            method.plan(*rates),
            batches,
            scenario.steps,
            optimiser=method.optimiser,
            recorder=recorder,
            validation=validation,
        )
    record = recorder.finish(until=scenario.steps)
    return record, outcome, Cost(clock.wall["prepare"], clock.cpu["prepare"])


def _first(split: Any, count: int | None) -> Any:
    """Some images of the split, the same for all: every k-th."""
    if count is None or count >= len(split):
        return split
    return split.subset(torch.linspace(0, len(split) - 1, count).long())


def summary(record: Record) -> dict[str, Any]:
    """The numbers and curves of a record that a row keeps, rounded: rows are read by people too."""

    def short(values: Iterable[float | None]) -> list[float | None]:
        return [None if v is None or not math.isfinite(v) else float(f"{v:.5g}") for v in values]

    rows, seen = record.deployments, record.validations
    known = rows[0].source is not None
    last = rows[-1]
    return {
        "area": record.area(),
        "source_area": record.source_area() if known else None,
        "source_start": rows[0].source.top1 if known else None,
        "source_end": last.source.top1 if known else None,
        "source_lowest": min(row.source.top1 for row in rows) if known else None,
        "top5": last.scores.top5,
        **dict(zip(("distance", "head_norm"), short([last.distance, last.head_norm]), strict=True)),
        "deployed": {
            "step": [row.step for row in rows],
            "state": [row.state_step for row in rows],
            "seconds": short(row.seconds for row in rows),
            "top1": short(row.scores.top1 for row in rows),
            "source": short(row.source.top1 if row.source else None for row in rows),
            "distance": short(row.distance for row in rows),
        },
        "validated": {
            "step": [row.step for row in seen],
            "top1": short(row.scores.top1 for row in seen),
            "entropy": short(row.scores.entropy for row in seen),
            "error_variance": short(row.scores.error_variance for row in seen),
            "head_norm": short(row.head_norm for row in seen),
            "distance": short(row.distance for row in seen),
        },
    }


# ---------------------------------------------------------------------------------------------------
# Choosing rates, and many runs


def choose_rates(
    scenario: Scenario, method: Method, *, cache: Path, device: str, root: Path | None = None
) -> Rates:
    """The candidate with the largest area under the validation curve, on one seed of its own.

    Every candidate is a whole run; what they reached is kept in ``cache`` and is not run again.
    """
    if len(method.rates) == 1:
        return method.rates[0]
    areas = tuning(scenario, method, cache=cache, device=device, root=root)
    return max(method.rates, key=lambda rates: areas[rates])


def tuning(
    scenario: Scenario, method: Method, *, cache: Path, device: str, root: Path | None = None
) -> dict[Rates, float]:
    """The area under the validation curve of every candidate; -1 for one that diverged."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / "tuning.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = {}
    for rates in method.rates:
        key = results.digest([config(scenario), own_config(method, rates)])
        if key not in known:
            record, outcome, _ = _measure(
                scenario, method, rates, TUNING_SEED, cache, device, root, deploy=False
            )
            known[key] = record.validation_area() if outcome.diverged is None else -1.0
            write_beside(path, lambda part: part.write_text(json.dumps(known, indent=1), encoding="utf-8"))
        found[rates] = known[key]
    return found


def measure(
    scenario: Scenario,
    rows: Path,
    *,
    cache: Path,
    environment: Environment,
    root: Path | None = None,
    seeds: int | None = None,
    methods: Sequence[str] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Run what of the scenario has no row yet in ``rows``, appending each as it is done."""
    done = {
        (
            row["scenario"],
            row["method"],
            row["seed"],
            results.digest([row["config"], row["extra"]["own_config"]]),
        )
        for row in results.records(rows)
    }
    for method in scenario.methods if methods is None else map(scenario.method, methods):
        rates = choose_rates(scenario, method, cache=cache, device=environment.device, root=root)
        setup = results.digest([config(scenario), own_config(method, rates)])
        for seed in range(scenario.seeds if seeds is None else seeds):
            if (scenario.name, method.name, seed, setup) in done:
                continue
            row = run(scenario, method, rates, seed=seed, cache=cache, environment=environment, root=root)
            results.append(rows, row)
            tell(
                f"{scenario.name} | {method.name} {rates} seed {seed}: area {row.extra['area']:.3f}, "
                f"source {row.extra['source_end'] or math.nan:.3f}, {row.cost.cpu:.1f} s"
            )
