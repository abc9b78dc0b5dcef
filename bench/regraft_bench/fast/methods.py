"""Ways to fine-tune: FAST, the paper's baselines, peers since, and training from scratch.

A method prepares the adopted network (its head, or all of it) and then trains it in phases. A new one is a preparation
or a plan, and an entry in a list; what does not fit that form is any function ``FastSetting -> Measured``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from regraft.core.clock import Clock
from regraft.core.registry import register
from regraft.core.tensors import fill_, use_generator
from regraft.finetuning import fast
from regraft.finetuning.fast import Adoption, Initialiser, NoGain, Normal
from regraft.finetuning.phases import Groups, Optimiser, Outcome, Phase, fine_tune, sgd, sgd_as_in_the_paper
from regraft.finetuning.recorder import Record
from regraft.learning_transfer.driver import transfer
from regraft.learning_transfer.trajectory import Trajectory
from regraft.networks.papers import initialise
from regraft_bench.fast.setting import FastSetting
from regraft_bench.rows import plain_data
from regraft_bench.study import Measured, Method, Series, first_paragraph

Rates = tuple[float | None, float | None]
"""Of the head and of the body (the features); None: that part stays as it is."""

Plan = Callable[[float | None, float | None], tuple[Phase, ...]]
"""(head's rate, body's rate) -> the phases of a run."""

Preparation = Callable[[nn.Module, Adoption, FastSetting], None]
"""Changes the adopted network, whose head is zero, before its first step."""


# ---------------------------------------------------------------- plans


@register
def together(alpha: float | None, beta: float | None) -> tuple[Phase, ...]:
    """Head and features from the first step on, each with its rate."""
    return (Phase(alpha, beta),)


@register
def warm_up(alpha: float | None, beta: float | None) -> tuple[Phase, ...]:
    """The head alone until it gains no point in ten steps, the features at inference (Li and Hoiem, 2018)."""
    return (Phase(alpha, None, statistics=False, until=NoGain), Phase(alpha, beta))


@register
def warm_up_with_statistics(alpha: float | None, beta: float | None) -> tuple[Phase, ...]:
    """The head alone until it gains no point in ten steps, BatchNorm's running statistics updated meanwhile."""
    return (Phase(alpha, None, statistics=True, until=NoGain), Phase(alpha, beta))


@register
def probe_first(alpha: float | None, beta: float | None) -> tuple[Phase, ...]:
    """LP-FT (Kumar et al., 2022): a linear probe for a quarter of the steps, then both at the features' rate."""
    return (Phase(alpha, None, statistics=False, share=0.25), Phase(beta, beta))


# ---------------------------------------------------------------- preparations


@dataclass(frozen=True)
class Draw:
    """The head's weight is drawn by ``initialise``. bias: whether there is a (zero) bias; the paper's head has none."""

    initialise: Initialiser
    bias: bool = True

    def __call__(self, model: nn.Module, adopted: Adoption, setting: FastSetting) -> None:
        drawn = torch.zeros(adopted.head.weight.shape)  # on the CPU: the same values whatever the device
        self.initialise(drawn, setting.generator("head"))
        with torch.no_grad():
            adopted.head.weight.copy_(drawn)
        if not self.bias:
            adopted.head.register_parameter("bias", None)


ZERO, FAN_IN, FAN_OUT = Draw(fast.zero), Draw(fast.kaiming_fan_in), Draw(fast.kaiming_fan_out)


@dataclass(frozen=True)
class Imprint:
    """Class means of the first batches' features as the head. They are the batches that the first steps see too."""

    batches: int

    def __call__(self, model: nn.Module, adopted: Adoption, setting: FastSetting) -> None:
        model.eval()
        features, labels = [], []
        for (images, own), _ in zip(setting.batches(), range(self.batches), strict=False):
            features.append(fast.features_of(model, adopted.head, images))
            labels.append(own)
        means = fast.class_means(torch.cat(features), torch.cat(labels), adopted.head.out_features)
        with torch.no_grad():
            fast.ClassMeans(means)(adopted.head.weight)


@dataclass(frozen=True)
class OneBlock:
    """Surgical fine-tuning (Lee et al., 2023): beside the head one layer learns, with what normalises it.

    place: 0, the first layer of the features, to 1, the last one.
    """

    place: float

    def __call__(self, model: nn.Module, adopted: Adoption, setting: FastSetting) -> None:
        head = {id(parameter) for parameter in adopted.head.parameters()}
        layers = by_layer([p for p in model.parameters() if id(p) not in head])
        kept = layers[round(self.place * (len(layers) - 1))]
        for layer in layers:
            for parameter in layer:
                parameter.requires_grad_(layer is kept)


def by_layer(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """In order, in lists that each begin with a matrix or a kernel; what normalises or shifts it follows."""
    found: list[list[Tensor]] = []
    for parameter in parameters:
        if parameter.dim() > 1 or not found:
            found.append([])
        found[-1].append(parameter)
    return found


@register
def from_scratch(model: nn.Module, adopted: Adoption, setting: FastSetting) -> None:
    """Nothing is kept of the source."""
    fill_(model, initialise(model, setting.generator("values")))


@register
def transferred(model: nn.Module, adopted: Adoption, setting: FastSetting) -> None:
    """In place of the source, a fresh network to which the source's training is transferred (FGMT).

    Gradients are taken on the source task, in ten steps of one batch of 128. The head that forgetting is measured
    through is the transferred one. Raises ValueError where the source's data are not known.
    """
    source = setting.source
    if source.data is None:
        raise ValueError("a transfer takes gradients on the source task, whose data are not known here")
    start = initialise(source.model, setting.generator("target start"))
    path = Trajectory.linear(source.start, source.values, steps=10, schedule="cosine")
    batches = source.data.train.batches(
        128, generator=setting.generator("transfer"), device=setting.device, drop_last=True
    )
    moved = transfer(
        source.model, path, start, batches, method="fgmt", generator=setting.generator("sweeps")
    ).params
    head = {f"{adopted.name}.{name}": tensor for name, tensor in adopted.head.state_dict().items()}
    fill_(model, {**moved, **head})
    fill_(adopted.source_head, {name: moved[f"{adopted.name}.{name}"] for name in adopted.head.state_dict()})


@register
def xavier_fan_in(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """Uniform with variance 1 / (6 features), as the paper prints it (section 5.1)."""
    _uniform_(weight, weight.shape[1], generator)


@register
def xavier_fan_out(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """Uniform with variance 1 / (6 classes), as the paper prints it (section 5.1)."""
    _uniform_(weight, weight.shape[0], generator)


def _uniform_(weight: Tensor, fan: int, generator: torch.Generator | None) -> None:
    bound = 1 / math.sqrt(2 * fan)
    nn.init.uniform_(weight, -bound, bound, generator=generator)


# ---------------------------------------------------------------- optimisers of peers


@dataclass(frozen=True)
class LayerDecay:
    """Momentum 0.9; each layer between it and the head multiplies a rate by ``decay`` (Howard and Ruder, 2018)."""

    decay: float

    def __call__(self, groups: Groups) -> torch.optim.Optimizer:
        split = [group for group in groups if group["name"] != "body"]
        for group in (group for group in groups if group["name"] == "body"):
            layers = by_layer(group["params"])
            rates = [group["lr"] * self.decay ** (len(layers) - 1 - k) for k in range(len(layers))]
            split += [{**group, "params": own, "lr": rate} for own, rate in zip(layers, rates, strict=True)]
        return sgd(split)


@dataclass(frozen=True)
class TowardsStart:
    """Momentum 0.9, and ``strength / 2 * ||features - source's features||^2`` in the loss (L2-SP, Li et al., 2018)."""

    strength: float

    def __call__(self, groups: Groups) -> torch.optim.Optimizer:
        optimiser = sgd(groups)
        body = [p for group in groups if group["name"] == "body" for p in group["params"]]
        anchors = [parameter.detach().clone() for parameter in body]

        def pull(_optimiser: Any, _args: Any, _kwargs: Any) -> None:
            for parameter, anchor in zip(body, anchors, strict=True):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - anchor, alpha=self.strength)

        optimiser.register_step_pre_hook(pull)
        return optimiser


# ---------------------------------------------------------------- a run


@dataclass(frozen=True)
class FineTuning:
    """A method with its rates; called with a setting it fine-tunes once. All of it is in a row's config."""

    rates: Rates
    plan: Plan = together
    prepare: Preparation = ZERO
    optimiser: Optimiser = sgd

    @property
    def about(self) -> str:
        """What it does, in the words of its parts."""
        first = self.prepare.initialise if isinstance(self.prepare, Draw) else self.prepare
        bias = " No bias." if isinstance(self.prepare, Draw) and not self.prepare.bias else ""
        head = "Classifier: " if isinstance(self.prepare, Draw) else ""
        return f"{head}{first_paragraph(first)}{bias} {first_paragraph(self.plan)} {first_paragraph(self.optimiser)}"

    def __call__(self, setting: FastSetting) -> Measured:
        """Values and curves of what would be deployed. A run that diverges is judged by the best state that it had,
        unless it only chooses rates: then it raises FloatingPointError, and its rates are out."""
        model, adopted = setting.adopted()
        clock = Clock()
        with (
            clock.phase("prepare", setting.device),
            use_generator(setting.generator("preparation"), setting.device),
        ):
            self.prepare(model, adopted, setting)
        recorder = setting.recorder(model, adopted)
        with use_generator(setting.generator("dropout"), setting.device):
            outcome = fine_tune(
                model,
                adopted.head,
                self.plan(*self.rates),
                setting.batches(),
                setting.settings.steps,
                optimiser=self.optimiser,
                recorder=recorder,
                validation=recorder.validation,
            )
        record = recorder.finish(until=setting.settings.steps)
        cost = {**clock.seconds, **record.seconds}
        if not setting.tuning:
            return Measured(values(record, outcome), series(record), cost, self._notes(setting, outcome))
        if outcome.diverged is not None:
            raise FloatingPointError(f"the loss of step {outcome.diverged} is not finite")
        return Measured({"validation": _short(record.validation_area())}, cost=cost)

    def _notes(self, setting: FastSetting, outcome: Outcome) -> dict[str, Any]:
        """The ends of phases where there are several, and the rates that these were chosen among."""
        ends = {"phase_ends": list(outcome.phase_ends)} if len(outcome.phase_ends) > 1 else {}
        candidates = setting.scenario.method(setting.method.name).candidates if setting.method else ()
        tried = [list(candidate.run.rates) for candidate in candidates]
        return {**ends, "tried": tried} if tried else ends


def values(record: Record, outcome: Outcome) -> dict[str, float | None]:
    """The numbers of a run. Accuracies, areas (means over the checkpoints) and what is left of the source: 0 to 1."""
    last, sources = record.deployments[-1], [row.source.top1 for row in record.deployments if row.source]
    found = {
        "accuracy": last.scores.top1,
        "area": record.area(),
        "validation": record.validation_area(),
        "top5": last.scores.top5,
        "distance": last.distance,
        "head_norm": last.head_norm,
        "diverged [step]": outcome.diverged,
    }
    if sources:
        found |= {
            "source_start": sources[0],
            "source_end": sources[-1],
            "source_area": record.source_area(),
            "source_lowest": min(sources),
        }
    return {name: _short(value) for name, value in found.items()}


def series(record: Record) -> dict[str, Series]:
    """Curves over the step, which begin at 0, before training.

    deployed, source, distance: of the state that is deployed. validated, entropy [nats], error_variance, head_norm: of
    the current one, on validation images.
    """
    rows, seen = record.deployments, record.validations
    found = {
        "deployed": _curve(rows, lambda row: row.scores.top1),
        "distance": _curve(rows, lambda row: row.distance),
        "validated": _curve(seen, lambda row: row.scores.top1),
        "entropy": _curve(seen, lambda row: row.scores.entropy),
        "error_variance": _curve(seen, lambda row: row.scores.error_variance),
        "head_norm": _curve(seen, lambda row: row.head_norm),
    }
    if rows[0].source is not None:
        found["source"] = _curve(rows, lambda row: row.source.top1)
    return found


def _curve(rows: Sequence[Any], value: Callable[[Any], float]) -> Series:
    return Series.over("step", [row.step for row in rows], [_short(value(row)) for row in rows])


def _short(value: float | None) -> float | None:
    """Five significant digits: rows are read by people too."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


# ---------------------------------------------------------------- FAST beside every baseline


def tuned(name: str, rates: Iterable[Rates], **how: Any) -> Method:
    """A method at the best of several rates (head, body); at the only ones, where there is one pair."""
    return best_of(name, [FineTuning(pair, **how) for pair in rates])


def best_of(name: str, runs: Iterable[FineTuning]) -> Method:
    """A method at the best of several ways to run it."""
    each = tuple(Method(name, run, plain_data(run), about=run.about) for run in runs)
    return each[0] if len(each) == 1 else replace(each[0], candidates=each)


def at(name: str, alpha: float | None, beta: float | None, **how: Any) -> Method:
    """A method at one pair of rates."""
    return tuned(name, [(alpha, beta)], **how)


def equal(*rates: float) -> tuple[Rates, ...]:
    return tuple((rate, rate) for rate in rates)


# Nine trials for every method.
EQUAL = equal(0.01, 0.02, 0.03, 0.06, 0.1, 0.2, 0.3, 0.6, 1.0)
UNEQUAL: tuple[Rates, ...] = (
    (0.03, 0.01), (0.1, 0.01), (0.3, 0.003), (0.3, 0.01), (0.3, 0.03), (0.3, 0.1), (0.3, 0.3), (1.0, 0.03), (3.0, 0.03),
)  # fmt: skip
UNEQUAL_TENFOLD = tuple((10 * alpha, 10 * beta) for alpha, beta in UNEQUAL)
HEAD_ONLY = tuple((rate, None) for rate in (0.03, 0.06, 0.1, 0.2, 0.3, 0.6, 1.0, 2.0, 3.0))
THREE: tuple[Rates, ...] = ((0.1, 0.01), (0.3, 0.03), (1.0, 0.1))
BODY_ONLY = tuple((None, rate) for rate in (0.03, 0.06, 0.1, 0.3, 0.6, 1.0, 2.0, 3.0, 10.0))

# Rates of torch's form of momentum; the paper's own, ``(1 - M) step``, moves a tenth as far at the same rate.
MAIN = (
    tuned("plain", EQUAL, prepare=from_scratch),
    tuned("fast", UNEQUAL),
    at("fast, default rates", fast.HEAD_LR, fast.BODY_LR),
    tuned("fast, no bias", UNEQUAL, prepare=Draw(fast.zero, bias=False)),
    tuned("fast, the paper's momentum", UNEQUAL_TENFOLD, optimiser=sgd_as_in_the_paper),
    tuned("fan-in", EQUAL, prepare=FAN_IN),
    tuned("fan-out", EQUAL, prepare=FAN_OUT),
    tuned("xavier", EQUAL, prepare=Draw(fast.xavier)),
    tuned("xavier, fan-in", EQUAL, prepare=Draw(xavier_fan_in)),
    tuned("xavier, fan-out", EQUAL, prepare=Draw(xavier_fan_out)),
    tuned("N(0, 0.01²)", EQUAL, prepare=Draw(Normal(0.01))),
    tuned("class means", EQUAL, prepare=Imprint(4)),
    tuned("zero, equal rates", EQUAL),
    tuned("warm-up", EQUAL, plan=warm_up, prepare=FAN_IN),
    tuned("warm-up, statistics", EQUAL, plan=warm_up_with_statistics, prepare=FAN_IN),
    tuned("lp-ft", UNEQUAL, plan=probe_first),
    tuned("feature extraction", HEAD_ONLY),
    best_of("one block", [FineTuning(r, prepare=OneBlock(p)) for r in THREE for p in (0.0, 0.5, 1.0)]),
    best_of(
        "layer-wise decay", [FineTuning(r, optimiser=LayerDecay(d)) for r in THREE for d in (0.3, 0.5, 0.8)]
    ),
    best_of("l2-sp", [FineTuning(r, optimiser=TowardsStart(s)) for r in THREE for s in (0.001, 0.01, 0.1)]),
    tuned("frozen head", BODY_ONLY, prepare=Draw(Normal(0.01))),
    tuned("class means, two rates", UNEQUAL, prepare=Imprint(4)),
    tuned("class means of one batch", EQUAL, prepare=Imprint(1)),
    tuned("fast, transferred start", UNEQUAL, prepare=transferred),
)


def at_a_tenth(method: Method) -> Method:
    """The same method with every rate a tenth as large; one with a single pair of rates stays as it is."""
    runs = [candidate.run for candidate in method.candidates]
    tenth = [
        replace(run, rates=tuple(rate and float(f"{rate / 10:.4g}") for rate in run.rates)) for run in runs
    ]
    return best_of(method.name, tenth) if tenth else method


# Of a network of 1,280 features, whose runs take a minute each.
PRETRAINED = tuple(
    at_a_tenth(method)
    for method in MAIN
    if method.name
    in {
        "fast", "fast, default rates", "fan-in", "class means", "zero, equal rates", "warm-up", "lp-ft",
        "feature extraction", "class means, two rates",
    }
)  # fmt: skip


def fixed(name: str, alpha: float | None, beta: float | None) -> Method:
    """One of the methods of the comparison, at these rates."""
    method = next(method for method in MAIN if method.name == name)
    return at(name, alpha, beta, **{k: getattr(method.run, k) for k in ("plan", "prepare", "optimiser")})


# For the quick bench: the rates that were best on digits; finding them takes longest.
FIXED = (
    fixed("plain", 0.1, 0.1),  # 0.3 was best, and diverges on some seeds
    fixed("fast", 0.3, 0.1),
    fixed("fast, default rates", fast.HEAD_LR, fast.BODY_LR),
    fixed("fan-in", 0.06, 0.06),
    fixed("xavier", 0.1, 0.1),
    fixed("zero, equal rates", 0.1, 0.1),
    fixed("warm-up", 0.1, 0.1),
    fixed("lp-ft", 0.3, 0.01),
    fixed("feature extraction", 0.3, None),
    fixed("class means", 0.1, 0.1),
    fixed("class means, two rates", 0.3, 0.1),
    fixed("fast, transferred start", 1.0, 0.03),
)
