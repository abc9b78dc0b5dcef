"""What a method of learning transfer works with: the problem, and the steps of the paper's algorithms.

`Problem` says what is transferred to whom. `Work` computes: transferred parameters, pairs of gradients, permutations.
Everything is done for P targets at once, with one list entry a target; `regraft.transfer` is the case P = 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice

import torch
from torch import nn

from regraft.core.clock import Clock
from regraft.core.forward import arguments, map_inputs, portion
from regraft.core.tensors import Batch, Loss, Perm, Tensors
from regraft.learning_transfer.trajectory import Trajectory
from regraft.matching.descent import Descent, Match, match
from regraft.matching.stacks import Stacks
from regraft.symmetry import PermutationSpec, trace
from regraft.training.evaluation import NotFinite, check_batches
from regraft.training.gradients import gradients
from regraft.training.statistics import batch_norms
from regraft_kernels import graft
from regraft_kernels.backend import resolve


@dataclass(frozen=True)
class Problem:
    """A path, and the P targets that it is transferred to.

    Attributes:
        path: theta_1^0 .. theta_1^T.
        starts: theta_2^0 of each target.
        ends: theta_2^T of a real training of each target; empty where there is none.
        from_identity: start every matching from the identity instead of from the last pi.
        generator: draws the order in which groups are visited.
        backend: of the kernels.
    """

    model: nn.Module
    spec: PermutationSpec
    path: Trajectory
    starts: Sequence[Tensors]
    ends: Sequence[Tensors] = ()
    from_identity: bool = False
    generator: torch.Generator | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        resolve(self.backend, next(self.model.parameters()).device)
        self.spec.validate(self.starts[0])

    @property
    def device(self) -> torch.device:
        return next(iter(self.starts[0].values())).device

    @cached_property
    def stacked_starts(self) -> Tensors:
        """name -> [P, *shape]; a view for one target."""
        if len(self.starts) == 1:
            return {name: tensor[None] for name, tensor in self.starts[0].items()}
        return stack_tensors(self.starts)

    def identity(self) -> Perm:
        """The permutation that moves nothing, on the problem's device."""
        return self.place(self.spec.identity())

    def place(self, perm: Perm) -> Perm:
        """The permutation on the problem's device."""
        return {group: index.to(self.device) for group, index in perm.items()}

    def parameters(self, theta: Mapping[str, torch.Tensor]) -> Tensors:
        """The model's parameters among `theta`."""
        return {name: theta[name] for name, _ in self.model.named_parameters()}

    def change(self, end: Tensors, start: Tensors) -> Tensors:
        """``end - start``, parameters alone."""
        return {name: tensor - start[name] for name, tensor in self.parameters(end).items()}


@dataclass
class Sample:
    """Gradients of several networks on the same batches, averaged over `size` of them; `taken` were computed, on
    `drawn` batches."""

    model: nn.Module
    batches: Iterator[Batch]
    size: int
    loss: Loss
    taken: int = 0
    drawn: int = 0

    def gradients(self, *thetas: Tensors) -> list[Tensors]:
        """Of each theta, in training mode, on the next `size` batches."""
        batches = list(islice(self.batches, self.size))
        first, self.drawn = self.drawn, self.drawn + len(batches)
        self.taken += len(thetas) * len(batches)
        return [gradients(self.model, theta, batches, self.loss, first=first) for theta in thetas]

    def trace_model(self) -> PermutationSpec:
        """The model's permutation groups, traced on a part of the next batch, which is still the next one."""
        first = next(self.batches)
        self.batches = chain([first], self.batches)
        device = next(self.model.parameters()).device
        ((inputs, _),) = check_batches([first])
        example = map_inputs(lambda x: x.to(device), portion(inputs, 0, 2))
        return trace(self.model, *arguments(example))


def open_sample(
    model: nn.Module, batches: Iterable[Batch], loss: Loss, gradient_batches: int, bn_batches: int
) -> tuple[Sample, list[Batch]]:
    """The sample for gradients, and the batches for BatchNorm statistics (none without BatchNorm).

    Raises ValueError where there is no batch.
    """
    endless = _cycle(batches)
    first = next(endless)
    statistics = list(islice(_cycle(batches), bn_batches)) if bn_batches and batch_norms(model) else []
    return Sample(model, chain([first], endless), gradient_batches, loss), statistics


@dataclass
class Work:
    """What a method may do; every call charges its time to a phase of the clock."""

    problem: Problem
    sample: Sample
    clock: Clock = field(default_factory=Clock)
    objectives: list[float] = field(default_factory=list)
    _last: tuple[int, Sequence[Perm], list[Tensors]] | None = None

    @torch.no_grad()
    def graft(self, perms: Sequence[Perm], t: int) -> list[Tensors]:
        """theta_2^t = theta_2^0 + pi (theta_1^t - theta_1^0) of each target under its own pi, all in one launch.

        The last result is kept: FGMT takes its next gradient there.
        """
        problem = self.problem
        if t == 0:
            return list(problem.starts)
        if self._last and self._last[0] == t and all(map(_same, self._last[1], perms)):
            return self._last[2]
        with self.clock.phase("graft", problem.device):
            anchor, scale = problem.path.leg(t)
            stacked = graft(
                problem.stacked_starts,
                problem.path.start,
                anchor,
                [scale],
                stack_tensors([problem.spec.indices(problem.place(perm)) for perm in perms]),
                problem.spec.packing(),
                backend=problem.backend,
            )
            thetas = [{name: x[p, 0] for name, x in stacked.items()} for p in range(len(perms))]
        self._last = t, perms, thetas
        return thetas

    def descents(self, pairs: int | None = None) -> list[Descent]:
        """An empty descent for each target, with room for `pairs` pairs of gradients (one a step if not given)."""
        problem = self.problem
        like, room = problem.parameters(problem.starts[0]), pairs or problem.path.steps
        return [
            Descent.over(
                Stacks.allocate(problem.spec, like, room),
                generator=problem.generator,
                backend=problem.backend,
            )
            for _ in problem.starts
        ]

    def append_(self, descents: Sequence[Descent], perms: Sequence[Perm], t: int) -> None:
        """Lines 3 to 5 of Algorithm 1: the gradients at theta_1^t and at each theta_2^t on one sample."""
        thetas = self.graft(perms, t)
        with self.clock.phase("gradients", self.problem.device):
            try:
                source, *targets = self.sample.gradients(self.problem.path[t], *thetas)
            except NotFinite as error:
                raise NotFinite(f"step {t} of the path: {error}") from None
            for descent, target in zip(descents, targets, strict=True):
                descent.stacks.append_(target, source)

    def descend_(self, descents: Sequence[Descent]) -> list[Perm]:
        """Line 7 of Algorithm 1: each target's pi, of all pairs in its descent."""
        if self.problem.from_identity:
            for descent in descents:
                descent.restart_(self.problem.spec.identity())
        return [self._note(descent.descend_()) for descent in descents]

    def match(self, target: Tensors, source: Tensors) -> Perm:
        """The permutation that brings `source` closest to `target`, parameters by name."""
        problem = self.problem
        return self._note(match(problem.spec, target, source, generator=problem.generator, backend=problem.backend))

    def _note(self, result: Match) -> Perm:
        self.objectives.append(result.objective)
        self.clock.add(result.seconds)
        return result.perm


def stack_tensors(tensors: Sequence[Tensors]) -> Tensors:
    """name -> [P, *shape] of P dictionaries of the same names."""
    return {name: torch.stack([each[name] for each in tensors]) for name in tensors[0]}


def _same(a: Perm, b: Perm) -> bool:
    return a is b


def _cycle(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches over and over; a ValueError where there is none (or no more, of an iterator that cannot restart)."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("there is no batch to compute gradients on: the loader is empty, or an exhausted iterator")
