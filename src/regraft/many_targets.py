"""One training, many targets: FGMT whose source gradients serve all of them, grafted by one batched graft."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from regraft.clock import Clock, Cost, charged
from regraft.evaluation import NotFinite, reset_batchnorm
from regraft.learning_transfer import check_tensors, sampled
from regraft.matching import Descent, descend_
from regraft.stacks import Stacks
from regraft.symmetry import PermutationSpec
from regraft.tensors import Batch, Loss, Perm, Tensors
from regraft.trajectory import Trajectory
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
        return charged(self.seconds)

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
        target_starts: theta_2^0 of each target, alike; P of them. In memory are P pairs of T gradients.
        others: as `regraft.transfer` takes them.

    Raises ValueError as `regraft.transfer` does, naming the target, and for no target.
    """
    if not target_starts:
        raise ValueError("there is no target")
    resolve(backend, next(model.parameters()).device)
    for number, start in enumerate(target_starts):
        try:
            check_tensors(model, path, start)
        except ValueError as problem:
            raise ValueError(f"target {number}: {problem}") from None
    sample, statistics = sampled(model, batches, loss, gradient_batches, bn_batches)
    spec = spec or sample.traced()
    spec.validate(target_starts[0])
    clock, bases = Clock(), _stacked(target_starts)
    like = {name: target_starts[0][name] for name, _ in model.named_parameters()}
    device = next(iter(like.values())).device
    descents = [
        Descent.over(Stacks.allocate(spec, like, path.steps), generator=generator, backend=backend)
        for _ in target_starts
    ]
    perms: list[Perm] = [{g: i.to(device) for g, i in spec.identity().items()} for _ in target_starts]

    @torch.no_grad()
    def grafted(t: int) -> Tensors:
        if t == 0:
            return bases
        with clock.phase("graft", device):
            anchor, scale = path.leg(t)
            indices = _stacked([spec.indices(perm) for perm in perms])
            moved = graft(bases, path.start, anchor, [scale], indices, spec.packing(), backend=backend)
            return {name: tensor[:, 0] for name, tensor in moved.items()}

    for t in range(path.steps):
        thetas = _apart(grafted(t), len(target_starts))
        with clock.phase("gradients", device):
            try:
                source, *targets = sample.gradients(path[t], *thetas)
            except NotFinite as problem:
                raise NotFinite(f"step {t} of the path: {problem}") from None
            for descent, target in zip(descents, targets, strict=True):
                descent.stacks.append_(target, source)
        found = [descend_(descent) for descent in descents]
        for match in found:
            clock.add(match.seconds)
        perms = [match.perm for match in found]
    params = grafted(path.steps)
    if statistics:
        with clock.phase("batchnorm", device):
            params = _stacked(
                [
                    reset_batchnorm(model, theta, statistics, len(statistics))
                    for theta in _apart(params, len(perms))
                ]
            )
    return Transfers(params, tuple(perms), sample.taken, clock.seconds)


def _stacked(tensors: Sequence[Tensors]) -> Tensors:
    return {name: torch.stack([each[name] for each in tensors]) for name in tensors[0]}


def _apart(tensors: Tensors, count: int) -> list[Tensors]:
    return [{name: tensor[number] for name, tensor in tensors.items()} for number in range(count)]
