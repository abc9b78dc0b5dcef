"""One training, many targets: FGMT whose source gradients serve all of them, grafted by one batched graft."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from regraft.core.clock import Clock, Cost, total_charge
from regraft.core.tensors import Batch, Loss, Perm, Tensors
from regraft.learning_transfer.driver import Sample, check_tensors, sampled
from regraft.learning_transfer.trajectory import Trajectory
from regraft.matching.descent import Descent, descend_
from regraft.matching.stacks import Stacks
from regraft.symmetry import PermutationSpec
from regraft.training.evaluation import NotFinite, reset_batchnorm
from regraft_kernels import graft
from regraft_kernels.backend import resolve


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


def transfer_to_many(
    model: nn.Module,
    path: Trajectory,
    target_starts: Sequence[Tensors],
    batches: Iterable[Batch],
    *,
    spec: PermutationSpec | None = None,
    gradient_batches: int = 1,
    bn_batches: int = 20,
    loss: Loss = cross_entropy,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Transfers:
    """Transfer `path` to each of P networks, to its end, as `regraft.transfer` does by "fgmt" (Chijiwa, Algorithm 2).

    The source's gradient of a step is the same for every target: it is computed once, and (1 + P) T gradients are taken
    where P transfers take 2 P T. All paths are grafted at once. Without `generator` each permutation is that which a
    transfer to this target alone finds on the same batches.

    Args:
        model: as `regraft.transfer` takes it.
        path: theta_1^0 .. theta_1^T, of the model's parameters and buffers, on the device to compute on.
        target_starts: theta_2^0 of each target, alike; P of them. In memory are P pairs of T gradients.
        batches: (images, labels), or any form that `regraft.core.forward` knows; iterated over again when it ends. All
            networks see the same ones.
        spec: the model's permutation groups; traced on a batch when not given.
        gradient_batches: batches over which one gradient is averaged.
        bn_batches: batches from which running statistics are estimated anew for the result.
        loss: of (logits, labels), averaged over the batch.
        generator: draws the order in which groups are visited, for one target after the other.
        backend: of the kernels, "auto", "torch" or "triton".

    Raises:
        ValueError: no target, and all that `regraft.transfer` refuses; the message names the target.
    """
    resolve(backend, next(model.parameters()).device)
    _check_targets(model, path, target_starts)
    sample, statistics = sampled(model, batches, loss, gradient_batches, bn_batches)
    spec = spec or sample.traced()
    spec.validate(target_starts[0])
    targets = _Targets(model, spec, path, _stacked(target_starts), backend)
    perms = _fgmt(targets, sample, generator)
    params = targets.grafted(perms, path.steps)
    if statistics:
        with targets.clock.phase("batchnorm", targets.device):
            each = _apart(params, len(perms))
            params = _stacked([reset_batchnorm(model, theta, statistics, len(statistics)) for theta in each])
    return Transfers(params, tuple(perms), sample.taken, targets.clock.seconds)


@dataclass(frozen=True)
class _Targets:
    """P targets of one path; `bases` are their starts, name -> [P, *shape]."""

    model: nn.Module
    spec: PermutationSpec
    path: Trajectory
    bases: Tensors
    backend: str
    clock: Clock = field(default_factory=Clock)

    @property
    def device(self) -> torch.device:
        return next(iter(self.bases.values())).device

    @property
    def count(self) -> int:
        """P."""
        return len(next(iter(self.bases.values())))

    @torch.no_grad()
    def grafted(self, perms: Sequence[Perm], t: int) -> Tensors:
        """theta_2^t of each target under its own pi, name -> [P, *shape]."""
        with self.clock.phase("graft", self.device):
            anchor, scale = self.path.leg(t)
            indices = _stacked([self.spec.indices(perm) for perm in perms])
            moved = graft(
                self.bases,
                self.path.start,
                anchor,
                [scale],
                indices,
                self.spec.packing(),
                backend=self.backend,
            )
            return {name: tensor[:, 0] for name, tensor in moved.items()}

    def descents(self, generator: torch.Generator | None) -> list[Descent]:
        """An empty descent for each target, with room for a pair of gradients a step."""
        like = {name: self.bases[name][0] for name, _ in self.model.named_parameters()}
        return [
            Descent.over(
                Stacks.allocate(self.spec, like, self.path.steps), generator=generator, backend=self.backend
            )
            for _ in range(self.count)
        ]


def _fgmt(targets: _Targets, sample: Sample, generator: torch.Generator | None) -> list[Perm]:
    """pi_T of each target: Algorithm 2, whose source gradients are the same ones for all."""
    clock, descents = targets.clock, targets.descents(generator)
    thetas = targets.bases
    for t in range(targets.path.steps):
        with clock.phase("gradients", targets.device):
            try:
                source, *others = sample.gradients(targets.path[t], *_apart(thetas, targets.count))
            except NotFinite as problem:
                raise NotFinite(f"step {t} of the path: {problem}") from None
            for descent, target in zip(descents, others, strict=True):
                descent.stacks.append_(target, source)
        found = [descend_(descent) for descent in descents]
        for match in found:
            clock.add(match.seconds)
        perms = [match.perm for match in found]
        if t + 1 < targets.path.steps:
            thetas = targets.grafted(perms, t + 1)
    return perms


def _check_targets(model: nn.Module, path: Trajectory, target_starts: Sequence[Tensors]) -> None:
    if not target_starts:
        raise ValueError("there is no target")
    for number, start in enumerate(target_starts):
        try:
            check_tensors(model, path, start)
        except ValueError as problem:
            raise ValueError(f"target {number}: {problem}") from None


def _stacked(tensors: Sequence[Tensors]) -> Tensors:
    return {name: torch.stack([each[name] for each in tensors]) for name in tensors[0]}


def _apart(tensors: Tensors, count: int) -> list[Tensors]:
    return [{name: tensor[number] for name, tensor in tensors.items()} for number in range(count)]
