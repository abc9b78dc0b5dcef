"""The driver of learning transfer: it follows a method's permutations and keeps the best step, for P targets.

`transfer` moves a path to one target, `transfer_to_many` to several. The methods are in
`regraft.learning_transfer.methods`, and what they compute with in `regraft.learning_transfer.work`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from regraft.core.arguments import Count, CountOrNone, check_arguments
from regraft.core.clock import EVALUATION, Cost, total_charge
from regraft.core.tensors import Batch, Loss, Perm, Tensors, check_alike, check_finite
from regraft.learning_transfer.methods import TRANSFER_METHODS, TransferMethod
from regraft.learning_transfer.trajectory import Trajectory
from regraft.learning_transfer.work import Problem, Work, open_sample, stack_tensors
from regraft.symmetry import PermutationSpec
from regraft.training.evaluation import accuracy
from regraft.training.statistics import reset_batchnorm

OnStep = Callable[[int, float | None], None]


@dataclass(frozen=True)
class Transfer:
    """A transferred path and what it cost.

    Attributes:
        method: its name.
        params: theta_2 at `best_step`, parameters and buffers by name.
        perm: the permutation pi at `best_step`.
        best_step: the step t >= 1 with the best validation accuracy, the earliest of equals; T without validation.
        best_accuracy: ``accuracies[best_step]``; None without validation.
        accuracies: validation accuracy of theta_2^t (under pi_t) for t = 0 .. T; empty without validation. Step 0 is
            the target's start with BatchNorm statistics that are estimated as at every step.
        perms: pi_t for t = 0 .. T; pi_0 is the identity (one and the same object where a method has a single one).
        objectives: of each matching, in order.
        gradients: batch gradients computed (2 T gradient_batches for fgmt, T (T + 1) gradient_batches for gmt).
        seconds: by phase: gradients, similarity, assignment, objective, graft, batchnorm; and evaluation, to which
            all of step 0 is charged.
    """

    method: str
    params: Tensors
    perm: Perm
    best_step: int
    best_accuracy: float | None
    accuracies: tuple[float, ...]
    perms: tuple[Perm, ...]
    objectives: tuple[float, ...]
    gradients: int
    seconds: dict[str, Cost]

    @property
    def cost(self) -> Cost:
        """The method's cost: the sum over the phases without evaluation."""
        return total_charge(self.seconds)


@dataclass(frozen=True)
class Transfers:
    """One path, transferred to P targets.

    Attributes:
        params: the ends of the transferred paths, name -> [P, *shape], parameters and buffers: what `torch.vmap` takes.
        perms: pi of each target.
        gradients: batch gradients computed: (1 + P) T gradient_batches.
        seconds: by phase.
    """

    params: Tensors
    perms: tuple[Perm, ...]
    gradients: int
    seconds: dict[str, Cost]

    @property
    def cost(self) -> Cost:
        """The sum over the phases."""
        return total_charge(self.seconds)

    def target(self, number: int) -> Tensors:
        """The parameters and buffers of one target; views."""
        return {name: tensor[number] for name, tensor in self.params.items()}


@check_arguments
def transfer(
    model: nn.Module,
    path: Trajectory,
    target_start: Tensors,
    batches: Iterable[Batch],
    method: str | TransferMethod = "fgmt",
    *,
    spec: PermutationSpec | None = None,
    target_end: Tensors | None = None,
    validation: Iterable[Batch] | None = None,
    gradient_batches: Count = 1,
    bn_batches: CountOrNone = 20,
    loss: Loss = cross_entropy,
    from_identity: bool = False,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    on_step: OnStep | None = None,
) -> Transfer:
    """Transfer `path` to the network that starts at `target_start`, without training it.

    Args:
        model: any classifier, whose output is the logits or has them (see `regraft.core.forward`); its own
            parameters are neither used nor changed.
        path: theta_1^0 .. theta_1^T, of the model's parameters and buffers, on the device to compute on.
        target_start: theta_2^0, alike.
        batches: (images, labels), or any form that `regraft.core.forward` knows: the sample for gradients and
            for BatchNorm statistics; iterated over again when it ends. Both networks see the same ones.
        method: a name of `TRANSFER_METHODS`: "naive", "weights", "oracle", "fgmt" or "gmt"; or a function like those.
        spec: the model's permutation groups; traced on a batch when not given.
        target_end: theta_2^T of a real training; only "oracle" needs it.
        validation: batches on which every theta_2^t is evaluated; the best one is kept ("early stopping", section 4.1).
        gradient_batches: batches over which one gradient is averaged.
        bn_batches: batches from which running statistics are estimated anew before an evaluation, and for the result;
            only models with BatchNorm take any, and 0 grafts the source's statistics like weights. Gradients are
            taken in training mode, which does not look at running statistics.
        loss: of (logits, labels), averaged over the batch.
        from_identity: start every matching from the identity instead of from the last pi.
        generator: draws the order in which groups are visited; without one it is the spec's.
        backend: of the kernels, "auto", "torch" or "triton".
        on_step: called for each step t = 0 .. T with t and its validation accuracy (None without validation).

    Raises:
        ValueError: an unknown method; tensors that differ in name, shape, dtype or device between model, path, start
            and spec; a value that is not finite in the path (its step is named), the start or a gradient; no batch;
            "oracle" without `target_end`. The message names the tensor.
    """
    if not callable(method) and method not in TRANSFER_METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(TRANSFER_METHODS)}")
    name, steps = (method, TRANSFER_METHODS[method]) if isinstance(method, str) else (method.__name__, method)
    check_tensors(model, path, target_start, target_end)
    sample, statistics = open_sample(model, batches, loss, gradient_batches, bn_batches)
    ends = [] if target_end is None else [target_end]
    spec = spec or sample.trace_model()
    work = Work(Problem(model, spec, path, [target_start], ends, from_identity, generator, backend), sample)
    (course,) = _drive(steps, work, statistics, validation, on_step)
    return Transfer(
        name,
        course.params,
        course.perms[course.best_step],
        course.best_step,
        course.accuracies[course.best_step] if course.accuracies else None,
        tuple(course.accuracies),
        tuple(course.perms),
        tuple(work.objectives),
        sample.taken,
        work.clock.seconds,
    )


@check_arguments
def transfer_to_many(
    model: nn.Module,
    path: Trajectory,
    target_starts: Sequence[Tensors],
    batches: Iterable[Batch],
    *,
    spec: PermutationSpec | None = None,
    gradient_batches: Count = 1,
    bn_batches: CountOrNone = 20,
    loss: Loss = cross_entropy,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Transfers:
    """Transfer `path` to each of P networks, to its end, as `regraft.transfer` does by "fgmt" (Chijiwa, Algorithm 2).

    The source's gradient of a step is the same for every target: it is computed once, and (1 + P) T gradients are taken
    where P transfers take 2 P T. All targets are grafted in one launch. Without `generator` each permutation equals
    that of a transfer to this target alone on the same batches.

    Args:
        model, path, batches, spec, gradient_batches, bn_batches, loss, backend: as in `regraft.transfer`. All networks
            see the same batches.
        target_starts: theta_2^0 of each target, alike; P of them. P pairs of T gradients are held in memory.
        generator: draws the order in which groups are visited, for one target after the other.

    Raises:
        ValueError: no target, and all that `regraft.transfer` refuses; the message names the target.
    """
    if not target_starts:
        raise ValueError("there is no target")
    for number, start in enumerate(target_starts):
        try:
            check_tensors(model, path, start)
        except ValueError as error:
            raise ValueError(f"target {number}: {error}") from None
    sample, statistics = open_sample(model, batches, loss, gradient_batches, bn_batches)
    spec = spec or sample.trace_model()
    work = Work(Problem(model, spec, path, target_starts, generator=generator, backend=backend), sample)
    courses = _drive(TRANSFER_METHODS["fgmt"], work, statistics)
    params = stack_tensors([course.params for course in courses])
    return Transfers(params, tuple(course.perms[-1] for course in courses), sample.taken, work.clock.seconds)


@dataclass
class _Course:
    """One target's results, as in `Transfer`."""

    params: Tensors
    best_step: int = 0
    perms: list[Perm] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)


def _drive(
    method: TransferMethod,
    work: Work,
    statistics: list[Batch],
    validation: Iterable[Batch] | None = None,
    on_step: OnStep | None = None,
) -> list[_Course]:
    """Follow the method's permutations: graft, estimate BatchNorm statistics, evaluate, keep the best step.

    Without `validation` that is the last step. `on_step` gets the first target's accuracy.
    """
    problem, clock = work.problem, work.clock
    courses = [_Course(start) for start in problem.starts]

    def transferred_networks(perms: Sequence[Perm], t: int) -> list[Tensors]:
        thetas = work.graft(perms, t)
        if not statistics:
            return thetas
        with clock.phase("batchnorm" if t else EVALUATION, problem.device):
            return [reset_batchnorm(problem.model, theta, statistics, len(statistics)) for theta in thetas]

    for t, yielded in chain([(0, problem.identity())], method(problem, work)):
        perms = [yielded] * len(courses) if isinstance(yielded, dict) else yielded
        for course, perm in zip(courses, perms, strict=True):
            course.perms.append(perm)
        if validation is not None:
            for course, theta in zip(courses, transferred_networks(perms, t), strict=True):
                with clock.phase(EVALUATION, problem.device):
                    course.accuracies.append(accuracy(problem.model, theta, validation))
                if t <= 1 or course.accuracies[t] > course.accuracies[course.best_step]:
                    course.best_step, course.params = t, theta  # step 1 takes the start's place in any case
        if on_step is not None:
            on_step(t, courses[0].accuracies[t] if validation is not None else None)
    if validation is None:
        for course, theta in zip(courses, transferred_networks(perms, t), strict=True):
            course.best_step, course.params = t, theta
    return courses


def check_tensors(model: nn.Module, path: Trajectory, target_start: Tensors, target_end: Tensors | None = None) -> None:
    """Raises ValueError, naming tensor and step, where tensors do not fit together or are not finite."""
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ValueError(f"the model {type(model).__name__} has no parameters: there is nothing to transfer")
    for name, parameter in parameters.items():
        if name not in target_start:
            raise ValueError(f"the target's start has no tensor {name!r}, which the model has")
        if target_start[name].shape != parameter.shape:
            raise ValueError(
                f"tensor {name!r}: shape {tuple(target_start[name].shape)} in the target's start, "
                f"{tuple(parameter.shape)} in the model"
            )
    check_finite(target_start, "the target's start")
    others = {"the target's end": target_end} if target_end is not None else {}
    for where, theta in chain(_anchors(path), others.items()):
        check_alike(target_start, theta, "the target's start", where)
        check_finite(theta, where)


def _anchors(path: Trajectory) -> Iterator[tuple[str, Tensors]]:
    """Every anchor of the path once, with the last step that uses it."""
    steps = {0: 0} | {anchor: t for t, (anchor, _) in enumerate(path.legs)}
    for anchor, t in steps.items():
        yield f"step {t} of the path", path.start if anchor == 0 else path.anchors[anchor]
