"""Ways to fine-tune: FAST, the paper's baselines, peers since, and training from scratch.

A method prepares the adopted network (its head, or all of it) and then trains it in phases. A new one is a preparation
or a plan, and an entry in a list; what does not fit that form is any function ``FastSetting -> Measured``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regraft.core.clock import Clock
from regraft.core.registry import register
from regraft.core.tensors import fill_, use_generator
from regraft.finetuning import fast
from regraft.finetuning.fast import Adoption, Initialiser, NoGain, Normal
from regraft.finetuning.phases import Groups, Optimiser, Outcome, Phase, fine_tune, sgd, sgd_as_in_the_paper
from regraft.finetuning.record import Record
from regraft.learning_transfer.driver import transfer
from regraft.learning_transfer.trajectory import Trajectory
from regraft.networks.papers import initialise
from regraft_bench.fast.setting import FastSetting
from regraft_bench.rows import plain_data
from regraft_bench.study import Measured, Method, Series, first_paragraph

Rates = tuple[float | None, float | None]
"""Of the head and of the body (the features); None: that part stays as it is."""

PhasePlan = Callable[[float | None, float | None], tuple[Phase, ...]]
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
class DrawHead:
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


ZERO, FAN_IN, FAN_OUT = DrawHead(fast.zero), DrawHead(fast.kaiming_fan_in), DrawHead(fast.kaiming_fan_out)


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
        layers = group_by_layer([p for p in model.parameters() if id(p) not in head])
        kept = layers[round(self.place * (len(layers) - 1))]
        for layer in layers:
            for parameter in layer:
                parameter.requires_grad_(layer is kept)


def group_by_layer(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """In order, in lists that each begin with a matrix or a kernel; what normalises or shifts it follows."""
    layers: list[list[Tensor]] = []
    for parameter in parameters:
        if parameter.dim() > 1 or not layers:
            layers.append([])
        layers[-1].append(parameter)
    return layers


@register
def from_scratch(model: nn.Module, adopted: Adoption, setting: FastSetting) -> None:
    """Nothing is kept of the source."""
    fill_(model, initialise(model, setting.generator("values")))


@partial(register, name="transferred")
def transfer_source(model: nn.Module, adopted: Adoption, setting: FastSetting) -> None:
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
    sweeps = setting.generator("sweeps")
    learned = transfer(source.model, path, start, batches, method="fgmt", generator=sweeps).params
    head = {f"{adopted.name}.{name}": tensor for name, tensor in adopted.head.state_dict().items()}
    fill_(model, {**learned, **head})
    fill_(adopted.source_head, {name: learned[f"{adopted.name}.{name}"] for name in adopted.head.state_dict()})


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
            layers = group_by_layer(group["params"])
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
    plan: PhasePlan = together
    prepare: Preparation = ZERO
    optimiser: Optimiser = sgd

    @property
    def about(self) -> str:
        """What it does, in the words of its parts."""
        first = self.prepare.initialise if isinstance(self.prepare, DrawHead) else self.prepare
        bias = " No bias." if isinstance(self.prepare, DrawHead) and not self.prepare.bias else ""
        head = "Classifier: " if isinstance(self.prepare, DrawHead) else ""
        return f"{head}{first_paragraph(first)}{bias} {first_paragraph(self.plan)} {first_paragraph(self.optimiser)}"

    def __call__(self, setting: FastSetting) -> Measured:
        """Values and curves of what would be deployed. A run that diverges is judged by the best state that it had,
        unless it only chooses rates: then it raises FloatingPointError, and its rates are out."""
        model, adopted = setting.adopt_source()
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
            return Measured(_run_values(record, outcome), _run_series(record), cost, self._notes(setting, outcome))
        if outcome.diverged is not None:
            raise FloatingPointError(f"the loss of step {outcome.diverged} is not finite")
        return Measured({"validation": _round(record.validation_area())}, cost=cost)

    def _notes(self, setting: FastSetting, outcome: Outcome) -> dict[str, Any]:
        """The ends of phases where there are several, and the rates that these were chosen among."""
        ends = {"phase_ends": list(outcome.phase_ends)} if len(outcome.phase_ends) > 1 else {}
        candidates = setting.scenario.method(setting.method.name).candidates if setting.method else ()
        tried = [candidate.config["rates"] for candidate in candidates]
        return {**ends, "tried": tried} if tried else ends


def _run_values(record: Record, outcome: Outcome) -> dict[str, float | None]:
    """The numbers of a run. Accuracies, areas (means over the checkpoints) and what is left of the source: 0 to 1."""
    last, sources = record.deployments[-1], [row.source.top1 for row in record.deployments if row.source]
    values = {
        "accuracy": last.scores.top1,
        "area": record.area(),
        "validation": record.validation_area(),
        "top5": last.scores.top5,
        "distance": last.distance,
        "head_norm": last.head_norm,
        "diverged [step]": outcome.diverged,
    }
    if sources:
        values |= {
            "source_start": sources[0],
            "source_end": sources[-1],
            "source_area": record.source_area(),
            "source_lowest": min(sources),
        }
    return {name: _round(value) for name, value in values.items()}


def _run_series(record: Record) -> dict[str, Series]:
    """Curves over the step, which begin at 0, before training.

    deployed, source, distance: of the state that is deployed. validated, entropy [nats], error_variance, head_norm: of
    the current one, on validation images.
    """
    rows, seen = record.deployments, record.validations
    curves = {
        "deployed": _curve(rows, lambda row: row.scores.top1),
        "distance": _curve(rows, lambda row: row.distance),
        "validated": _curve(seen, lambda row: row.scores.top1),
        "entropy": _curve(seen, lambda row: row.scores.entropy),
        "error_variance": _curve(seen, lambda row: row.scores.error_variance),
        "head_norm": _curve(seen, lambda row: row.head_norm),
    }
    if rows[0].source is not None:
        curves["source"] = _curve(rows, lambda row: row.source.top1)
    return curves


def _curve(rows: Sequence[Any], value: Callable[[Any], float]) -> Series:
    return Series.over("step", [row.step for row in rows], [_round(value(row)) for row in rows])


def _round(value: float | None) -> float | None:
    """Five significant digits: rows are read by people too."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


# ---------------------------------------------------------------- FAST beside every baseline


def at_each(rates: Iterable[Rates], **how: Any) -> list[FineTuning]:
    """One way to fine-tune, at each of several rates (head, body)."""
    return [FineTuning(pair, **how) for pair in rates]


def best_of(name: str, runs: Iterable[FineTuning]) -> Method:
    """A method at the best of several ways to run it; at the only one, where there is one."""
    each = tuple(Method(name, run, plain_data(run), about=run.about) for run in runs)
    return each[0] if len(each) == 1 else replace(each[0], candidates=each)


def at_rates(name: str, alpha: float | None, beta: float | None, **how: Any) -> Method:
    """A method at one pair of rates."""
    return best_of(name, at_each([(alpha, beta)], **how))


# Nine trials for every method. Rates of torch's form of momentum: the paper's own moves a tenth as far.
EQUAL = [(rate, rate) for rate in (0.01, 0.02, 0.03, 0.06, 0.1, 0.2, 0.3, 0.6, 1.0)]
UNEQUAL = [
    (0.03, 0.01), (0.1, 0.01), (0.3, 0.003), (0.3, 0.01), (0.3, 0.03), (0.3, 0.1), (0.3, 0.3), (1.0, 0.03), (3.0, 0.03),
]  # fmt: skip
UNEQUAL_TENFOLD = [(10 * alpha, 10 * beta) for alpha, beta in UNEQUAL]
HEAD_ONLY = [(rate, None) for rate in (0.03, 0.06, 0.1, 0.2, 0.3, 0.6, 1.0, 2.0, 3.0)]
BODY_ONLY = [(None, rate) for rate in (0.03, 0.06, 0.1, 0.3, 0.6, 1.0, 2.0, 3.0, 10.0)]
THREE = [(0.1, 0.01), (0.3, 0.03), (1.0, 0.1)]

TRIALS: dict[str, list[FineTuning]] = {
    "plain": at_each(EQUAL, prepare=from_scratch),
    "fast": at_each(UNEQUAL),
    "fast, default rates": at_each([(fast.HEAD_LR, fast.BODY_LR)]),
    "fast, no bias": at_each(UNEQUAL, prepare=DrawHead(fast.zero, bias=False)),
    "fast, the paper's momentum": at_each(UNEQUAL_TENFOLD, optimiser=sgd_as_in_the_paper),
    "fan-in": at_each(EQUAL, prepare=FAN_IN),
    "fan-out": at_each(EQUAL, prepare=FAN_OUT),
    "xavier": at_each(EQUAL, prepare=DrawHead(fast.xavier)),
    "xavier, fan-in": at_each(EQUAL, prepare=DrawHead(xavier_fan_in)),
    "xavier, fan-out": at_each(EQUAL, prepare=DrawHead(xavier_fan_out)),
    "N(0, 0.01²)": at_each(EQUAL, prepare=DrawHead(Normal(0.01))),
    "class means": at_each(EQUAL, prepare=Imprint(4)),
    "zero, equal rates": at_each(EQUAL),
    "warm-up": at_each(EQUAL, plan=warm_up, prepare=FAN_IN),
    "warm-up, statistics": at_each(EQUAL, plan=warm_up_with_statistics, prepare=FAN_IN),
    "lp-ft": at_each(UNEQUAL, plan=probe_first),
    "feature extraction": at_each(HEAD_ONLY),
    "one block": [FineTuning(r, prepare=OneBlock(place)) for r in THREE for place in (0.0, 0.5, 1.0)],
    "layer-wise decay": [FineTuning(r, optimiser=LayerDecay(d)) for r in THREE for d in (0.3, 0.5, 0.8)],
    "l2-sp": [FineTuning(r, optimiser=TowardsStart(s)) for r in THREE for s in (0.001, 0.01, 0.1)],
    "frozen head": at_each(BODY_ONLY, prepare=DrawHead(Normal(0.01))),
    "class means, two rates": at_each(UNEQUAL, prepare=Imprint(4)),
    "class means of one batch": at_each(EQUAL, prepare=Imprint(1)),
    "fast, transferred start": at_each(UNEQUAL, prepare=transfer_source),
}
"""Each method's trials, by its name."""

COMPARISON_METHODS = tuple(best_of(name, runs) for name, runs in TRIALS.items())


def _at_a_tenth(run: FineTuning) -> FineTuning:
    """The same with both rates a tenth as large."""
    alpha, beta = (rate and float(f"{rate / 10:.4g}") for rate in run.rates)
    return replace(run, rates=(alpha, beta))


PRETRAINED = tuple(
    best_of(name, runs if len(runs) == 1 else map(_at_a_tenth, runs))
    for name, runs in TRIALS.items()
    if name
    in {
        "fast", "fast, default rates", "fan-in", "class means", "zero, equal rates", "warm-up", "lp-ft",
        "feature extraction", "class means, two rates",
    }
)  # fmt: skip
"""Of a network of 1,280 features, whose runs take a minute each."""

FIXED_RATES: dict[str, Rates] = {
    "plain": (0.1, 0.1),  # 0.3 was best, and diverges on some seeds
    "fast": (0.3, 0.1),
    "fast, default rates": (fast.HEAD_LR, fast.BODY_LR),
    "fan-in": (0.06, 0.06),
    "xavier": (0.1, 0.1),
    "zero, equal rates": (0.1, 0.1),
    "warm-up": (0.1, 0.1),
    "lp-ft": (0.3, 0.01),
    "feature extraction": (0.3, None),
    "class means": (0.1, 0.1),
    "class means, two rates": (0.3, 0.1),
    "fast, transferred start": (1.0, 0.03),
}
"""For the quick bench: the rates that were best on digits; finding them takes longest."""

FIXED = tuple(best_of(name, [replace(TRIALS[name][0], rates=rates)]) for name, rates in FIXED_RATES.items())
