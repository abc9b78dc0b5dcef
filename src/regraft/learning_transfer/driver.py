"""Learning transfer: a training run's parameter changes, permuted, added to another start.

``theta_2^t = theta_2^0 + pi (theta_1^t - theta_1^0)`` (Chijiwa, Transferring Learning Trajectories of Neural
Networks, sections 3 and 4.1). The methods differ in how they find pi:

- ``naive``: pi is the identity.
- ``weights``: pi matches the two starts' weights, as a Git Re-Basin user would do.
- ``oracle``: pi matches what a real training of theta_2 learned with ``theta_1^T - theta_1^0``: a bound, no method.
- ``gmt`` (Algorithm 1): for s = 1..T pi_s matches the gradients along both paths up to s, all computed anew.
- ``fgmt`` (Algorithm 2): the same, but only the newest pair of gradients is computed and the earlier ones are kept.

A method is a function ``method(problem, work)`` that yields (t, pi_t) for t = 1 .. T, in order, and stands in
`METHODS`; `Problem` is what it is given and `Work` what it may have done. All else (the transferred parameters,
BatchNorm statistics, evaluation, which step is the best) is `transfer`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from regraft.core.clock import EVALUATION, Clock, Cost, total_charge
from regraft.core.forward import arguments, map_inputs, portion, split
from regraft.core.tensors import Batch, Loss, Perm, Tensors, check_alike, check_finite
from regraft.learning_transfer.trajectory import Trajectory
from regraft.matching.descent import Descent, Match, clear_, descend_, match, restart_
from regraft.matching.stacks import Stacks
from regraft.symmetry import PermutationSpec, trace
from regraft.training.evaluation import NotFinite, accuracy, batch_norms, gradients, reset_batchnorm
from regraft_kernels import graft
from regraft_kernels.backend import resolve

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
            the target's start, untouched but for its BatchNorm statistics, which are estimated as at every step.
        perms: pi_t for t = 0 .. T; pi_0 is the identity (one and the same object where a method has a single one).
        objectives: of each matching, in the order in which they were made.
        gradients: batch gradients computed (2 T gradient_batches for fgmt, T (T + 1) gradient_batches for gmt).
        seconds: by phase: gradients, similarity, assignment, objective, graft, batchnorm; and evaluation, which
            includes all that is spent on step 0.
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
        """What the method took: the sum over the phases, evaluation apart."""
        return total_charge(self.seconds)


@dataclass(frozen=True)
class Problem:
    """What is to be transferred to whom.

    Attributes:
        path: theta_1^0 .. theta_1^T.
        target_start: theta_2^0.
        target_end: theta_2^T of a real training, where there is one.
        from_identity: start every matching from the identity instead of from the last pi.
        generator: draws the order in which groups are visited.
        backend: of the kernels.
    """

    model: nn.Module
    spec: PermutationSpec
    path: Trajectory
    target_start: Tensors
    target_end: Tensors | None = None
    from_identity: bool = False
    generator: torch.Generator | None = None
    backend: str = "auto"

    @property
    def device(self) -> torch.device:
        return next(iter(self.target_start.values())).device

    def placed(self, perm: Perm) -> Perm:
        """The permutation on the problem's device."""
        return {group: index.to(self.device) for group, index in perm.items()}

    def parameters(self, theta: Mapping[str, torch.Tensor]) -> Tensors:
        """The model's parameters among `theta`."""
        return {name: theta[name] for name, _ in self.model.named_parameters()}

    def learned(self, end: Tensors, start: Tensors) -> Tensors:
        """``end - start``, parameters alone."""
        return {name: tensor - start[name] for name, tensor in self.parameters(end).items()}


@dataclass
class Sample:
    """Gradients of several networks on the same batches, averaged over `size` of them; `taken` were computed."""

    model: nn.Module
    batches: Iterator[Batch]
    size: int
    loss: Loss
    taken: int = 0

    def gradients(self, *thetas: Tensors) -> list[Tensors]:
        """Of each theta, in training mode, on the next `size` batches."""
        batches = list(islice(self.batches, self.size))
        self.taken += len(thetas) * len(batches)
        return [gradients(self.model, theta, batches, self.loss) for theta in thetas]

    def traced(self) -> PermutationSpec:
        """The model's permutation groups, traced on a part of the next batch, which is still the next one."""
        first = next(self.batches)
        self.batches = chain([first], self.batches)
        device = next(self.model.parameters()).device
        example = map_inputs(lambda x: x.to(device), portion(split(first)[0], 0, 2))
        return trace(self.model, *arguments(example))


def sampled(
    model: nn.Module, batches: Iterable[Batch], loss: Loss, gradient_batches: int, bn_batches: int
) -> tuple[Sample, list[Batch]]:
    """What gradients are taken on, and what BatchNorm statistics are estimated from: nothing without BatchNorm.

    Raises ValueError where there is no batch, or for fewer batches than 1 and 0.
    """
    if gradient_batches < 1:
        raise ValueError(f"gradient_batches must be at least 1, got {gradient_batches}")
    if bn_batches < 0:
        raise ValueError(f"bn_batches must not be negative, got {bn_batches}")
    endless = _cycle(batches)
    first = next(endless)
    statistics = list(islice(_cycle(batches), bn_batches)) if bn_batches and batch_norms(model) else []
    return Sample(model, chain([first], endless), gradient_batches, loss), statistics


@dataclass
class Work:
    """What a method works with: every call charges its time to a phase of the clock."""

    problem: Problem
    sample: Sample
    clock: Clock = field(default_factory=Clock)
    objectives: list[float] = field(default_factory=list)
    _last: tuple[int, Perm, Tensors] | None = None

    @torch.no_grad()
    def graft(self, perm: Perm, t: int) -> Tensors:
        """theta_2^t = theta_2^0 + pi (theta_1^t - theta_1^0). The last one is kept, for FGMT's next gradient."""
        problem = self.problem
        if t == 0:
            return problem.target_start
        if self._last is None or self._last[0] != t or self._last[1] is not perm:
            with self.clock.phase("graft", problem.device):
                anchor, scale = problem.path.leg(t)
                grafted = graft(
                    problem.target_start,
                    problem.path.start,
                    anchor,
                    [scale],
                    problem.spec.indices(problem.placed(perm)),
                    problem.spec.packing(),
                    backend=problem.backend,
                )
                self._last = t, perm, {name: tensor[0] for name, tensor in grafted.items()}
        return self._last[2]

    def descent(self) -> Descent:
        """An empty descent, from the identity, with room for a pair of gradients a step."""
        problem = self.problem
        like = problem.parameters(problem.target_start)
        stacks = Stacks.allocate(problem.spec, like, problem.path.steps)
        return Descent.over(stacks, generator=problem.generator, backend=problem.backend)

    def append_(self, descent: Descent, perm: Perm, t: int) -> None:
        """Lines 3 to 5 of Algorithm 1: the gradients at theta_1^t and theta_2^t (under pi) on one sample."""
        theta = self.graft(perm, t)
        with self.clock.phase("gradients", self.problem.device):
            try:
                source, target = self.sample.gradients(self.problem.path[t], theta)
            except NotFinite as problem:
                raise NotFinite(f"step {t} of the path: {problem}") from None
            descent.stacks.append_(target, source)

    def descend_(self, descent: Descent) -> Perm:
        """Line 7 of Algorithm 1: pi of all pairs in the descent."""
        if self.problem.from_identity:
            restart_(descent, self.problem.spec.identity())
        return self._noted(descend_(descent))

    def match(self, target: Tensors, source: Tensors) -> Perm:
        """The permutation that brings `source` closest to `target`, parameters by name."""
        problem = self.problem
        return self._noted(
            match(problem.spec, target, source, generator=problem.generator, backend=problem.backend)
        )

    def _noted(self, found: Match) -> Perm:
        self.objectives.append(found.objective)
        self.clock.add(found.seconds)
        return found.perm


Steps = Iterator[tuple[int, Perm]]

Method = Callable[[Problem, Work], Steps]


def naive(problem: Problem, work: Work) -> Steps:
    """The source's path as it is, no unit permuted."""
    return _everywhere(problem, problem.placed(problem.spec.identity()))


def weights(problem: Problem, work: Work) -> Steps:
    """One permutation: that which matches the two starts' weights (Git Re-Basin, Ainsworth et al., 2023)."""
    start = problem.parameters(problem.target_start)
    return _everywhere(problem, work.match(start, problem.parameters(problem.path.start)))


def oracle(problem: Problem, work: Work) -> Steps:
    """A bound, no method: the target is trained after all, and one permutation matches what both have learned."""
    if problem.target_end is None:
        raise ValueError("method 'oracle' needs target_end, the end of a real training from target_start")
    learned = problem.learned(problem.target_end, problem.target_start)
    source = problem.learned(problem.path.end, problem.path.start)
    return _everywhere(problem, work.match(learned, source))


def gmt(problem: Problem, work: Work) -> Steps:
    """Gradient matching along the transferred path, all gradients anew at every step (Algorithm 1)."""
    descent, perm = work.descent(), problem.spec.identity()
    for s in range(1, problem.path.steps + 1):
        clear_(descent)
        for t in range(s):
            work.append_(descent, perm, t)
        perm = work.descend_(descent)
        yield s, perm


def fgmt(problem: Problem, work: Work) -> Steps:
    """Gradient matching along the transferred path, earlier gradients kept (Algorithm 2): two gradients a step."""
    descent, perm = work.descent(), problem.spec.identity()
    for s in range(1, problem.path.steps + 1):
        work.append_(descent, perm, s - 1)
        perm = work.descend_(descent)
        yield s, perm


METHODS: dict[str, Method] = {
    "naive": naive,
    "weights": weights,
    "oracle": oracle,
    "fgmt": fgmt,
    "gmt": gmt,
}


def _everywhere(problem: Problem, perm: Perm) -> Steps:
    """All steps by one permutation."""
    return ((t, perm) for t in range(1, problem.path.steps + 1))


def transfer(
    model: nn.Module,
    path: Trajectory,
    target_start: Tensors,
    batches: Iterable[Batch],
    method: str | Method = "fgmt",
    *,
    spec: PermutationSpec | None = None,
    target_end: Tensors | None = None,
    validation: Iterable[Batch] | None = None,
    gradient_batches: int = 1,
    bn_batches: int = 20,
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
        method: a name of `METHODS`: "naive", "weights", "oracle", "fgmt" or "gmt"; or a function like those.
        spec: the model's permutation groups; traced on a batch when not given.
        target_end: theta_2^T of a real training, which "oracle" alone wants.
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
    if not callable(method) and method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    resolve(backend, next(model.parameters()).device)
    check_tensors(model, path, target_start, target_end)
    sample, statistics = sampled(model, batches, loss, gradient_batches, bn_batches)
    spec = spec or sample.traced()
    spec.validate(target_start)
    work = Work(
        Problem(model, spec, path, target_start, target_end, from_identity, generator, backend), sample
    )
    name, steps = (method, METHODS[method]) if isinstance(method, str) else (method.__name__, method)
    return _drive(name, steps, work, statistics, validation, on_step or (lambda t, value: None))


def _drive(
    name: str,
    steps: Method,
    work: Work,
    statistics: list[Batch],
    validation: Iterable[Batch] | None,
    on_step: OnStep,
) -> Transfer:
    """Follow the method's permutations: graft, estimate BatchNorm statistics, evaluate, keep the best."""
    model, device, clock = work.problem.model, work.problem.device, work.clock

    def made(perm: Perm, t: int) -> Tensors:
        theta = work.graft(perm, t)
        if not statistics:
            return theta
        with clock.phase("batchnorm" if t else EVALUATION, device):
            return reset_batchnorm(model, theta, statistics, len(statistics))

    perms: list[Perm] = []
    accuracies: list[float] = []
    best_step, params = 0, work.problem.target_start
    start = 0, work.problem.placed(work.problem.spec.identity())
    for t, perm in chain([start], steps(work.problem, work)):
        perms.append(perm)
        if validation is not None:
            theta = made(perm, t)
            with clock.phase(EVALUATION, device):
                accuracies.append(accuracy(model, theta, validation))
            if t <= 1 or accuracies[t] > accuracies[best_step]:  # step 1 takes the start's place in any case
                best_step, params = t, theta
        on_step(t, accuracies[t] if accuracies else None)
    if validation is None:
        best_step, params = t, made(perm, t)
    return Transfer(
        name,
        params,
        perms[best_step],
        best_step,
        accuracies[best_step] if accuracies else None,
        tuple(accuracies),
        tuple(perms),
        tuple(work.objectives),
        work.sample.taken,
        clock.seconds,
    )


def check_tensors(
    model: nn.Module, path: Trajectory, target_start: Tensors, target_end: Tensors | None = None
) -> None:
    """Raises ValueError, naming tensor and step, where they do not fit together or are not finite."""
    for name, parameter in model.named_parameters():
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
    """Every tensor that the path is made of, once, with the (last) step that leans on it."""
    for t, (_, scale) in enumerate(path.legs):
        if not math.isfinite(scale):
            raise ValueError(f"step {t} of the path has scale {scale}")
    steps = {0: 0} | {anchor: t for t, (anchor, _) in enumerate(path.legs)}
    for anchor, t in steps.items():
        yield f"step {t} of the path", path.start if anchor == 0 else path.anchors[anchor]


def _cycle(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches over and over; a ValueError where there is none (or no more, of an iterator that cannot restart)."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError(
                "there is no batch to compute gradients on: the loader is empty, or an exhausted iterator"
            )
