"""Fine-tuning in phases: a warm-up of the classifier, a linear probe, then everything, on the one training loop.

outcome = fine_tune(model, adopted.head, [Phase(0.3, 0.01)], batches, steps=200, recorder=recorder)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regraft.core.arguments import CountOrNone, check_arguments
from regraft.core.forward import name_inputs, split
from regraft.core.labels import check_labels
from regraft.core.registry import register
from regraft.core.tensors import Batch, check_finite, live_state
from regraft.finetuning.fast import param_groups, start_momentum_at_zero_
from regraft.finetuning.recorder import Recorder
from regraft.training.evaluation import accuracy
from regraft.training.loop import Diverged, check_weights, train_steps_

Groups = list[dict[str, Any]]
Optimiser = Callable[[Groups], torch.optim.Optimizer]
"""Makes the optimiser of a phase, of parameter groups that have their learning rates."""


@register
def sgd(groups: Groups) -> torch.optim.Optimizer:
    """Momentum 0.9, torch's form."""
    return torch.optim.SGD(groups, momentum=0.9)


@register
def sgd_as_in_the_paper(groups: Groups) -> torch.optim.Optimizer:
    """Momentum 0.9, the paper's form: see `regraft.fast.start_momentum_at_zero_`."""
    optimiser = torch.optim.SGD(groups, momentum=0.9, dampening=0.9)
    start_momentum_at_zero_(optimiser)
    return optimiser


@register
def nesterov(groups: Groups) -> torch.optim.Optimizer:
    """Nesterov's momentum, 0.9."""
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True)


@register
def adam(groups: Groups) -> torch.optim.Optimizer:
    """Adam, with torch's betas."""
    return torch.optim.Adam(groups)


@register
def radam(groups: Groups) -> torch.optim.Optimizer:
    """RAdam, with torch's betas."""
    return torch.optim.RAdam(groups)


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one optimiser.

    head_lr, body_lr: None leaves that part as it is, and costs no gradient. statistics: whether the features run in
    training mode (BatchNorm on batch statistics, updating the running ones) or as at inference. It ends after
    ``share`` of the run's steps, when the rule that ``until`` makes says so of the validation accuracy after a step
    (`regraft.fast.NoGain`), or with the run.
    """

    head_lr: float | None
    body_lr: float | None
    statistics: bool = True
    share: float | None = None
    until: Callable[[], Callable[[float], bool]] | None = None


@dataclass(frozen=True)
class Outcome:
    """How far a run came: steps before it diverged, the step that did (from 1; None), ends of its phases."""

    steps: int
    diverged: int | None
    phase_ends: tuple[int, ...]


@check_arguments
def fine_tune(
    model: nn.Module,
    head: nn.Linear,
    phases: Sequence[Phase],
    batches: Iterable[Batch],
    steps: CountOrNone,
    *,
    optimiser: Optimiser = sgd,
    recorder: Recorder | None = None,
    validation: Iterable[Batch] | None = None,
) -> Outcome:
    """Train the adopted model in place for ``steps`` steps; the loss is cross-entropy, mean over the batch.

    batches: at least as many as steps. recorder: counts each step. validation: for phases that end by validation
    accuracy. A loss that is not finite, or weights at the end of a phase, end the run; this is reported, no exception.

    Raises ValueError for labels that the head has no class for, for too few batches, and for a phase that ends by
    validation accuracy where there is no validation.
    """
    if validation is None and any(phase.until is not None for phase in phases):
        raise ValueError("a phase that ends by validation accuracy needs validation batches")
    stream = _check_as_read(batches, head.out_features)
    done = 0
    ends: list[int] = []
    for phase in phases:
        last = steps if phase.share is None else min(steps, done + max(1, round(phase.share * steps)))
        rule = None if phase.until is None else phase.until()

        def after_step(step: int, rule: Callable[[float], bool] | None = rule) -> bool:
            if recorder is not None:
                recorder.after_step()
            return rule is not None and rule(accuracy(model, live_state(model), validation or ()))

        groups = param_groups(model, phase.head_lr, phase.body_lr, head=head)
        try:
            with _training_only(model, head, groups, phase.statistics):
                losses = train_steps_(model, optimiser(groups), stream, range(done, last), after_step=after_step)
                check_weights(model, done + len(losses) - 1)
        except Diverged as problem:
            return Outcome(problem.step, problem.step + 1, tuple(ends))
        done += len(losses)
        ends.append(done)
    return Outcome(done, None, tuple(ends))


def _check_as_read(batches: Iterable[Batch], num_classes: int) -> Iterator[Batch]:
    """The batches, checked; on an accelerator only the first one, since each check waits for the device."""
    for number, batch in enumerate(batches):
        inputs, labels = split(batch, number)
        if number == 0 or labels.device.type == "cpu":
            check_labels(labels, num_classes, f"batch {number}")
            check_finite(name_inputs(inputs), f"batch {number}")
        yield inputs, labels


@contextmanager
def _training_only(
    model: nn.Module, head: nn.Linear, groups: Sequence[Mapping[str, Any]], statistics: bool
) -> Iterator[None]:
    """For the body, let only the groups' parameters take gradients, and set the modes of the phase."""
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    before: dict[Tensor, bool] = {parameter: parameter.requires_grad for parameter in model.parameters()}
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
