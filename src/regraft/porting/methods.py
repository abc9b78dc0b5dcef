"""Ways to bring a fine-tune onto a new base: each a function of the three networks, all in `METHODS`.

``method(spec, base, tuned, new_base, work) -> Ported``. The networks are mappings name -> tensor, of equal names and
shapes, floating in float32, on one device; they may read a tensor each time one is asked for. A head that the fine-tune
has and the bases have not is zero in these, so that it is carried over as a change from zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn

from regraft.core.clock import Clock
from regraft.core.forward import split
from regraft.core.tensors import Batch, Perm, Tensors
from regraft.learning_transfer.driver import transfer
from regraft.learning_transfer.trajectory import Trajectory
from regraft.matching.descent import match_streamed
from regraft.porting.checkpoint_files import Lazy
from regraft.porting.gradfix import transport
from regraft.symmetry import PermutationSpec
from regraft_kernels import graft

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Ported:
    """What a method gives: the tensors, made one by one when they are asked for, and the permutation behind them."""

    tensors: Weights
    perm: Perm


def _nothing_kept(name: str, make: Callable[[], Tensors]) -> Tensors:
    return make()


@dataclass(frozen=True)
class Work:
    """What a method may use besides the networks.

    Attributes:
        model: the network as a function of its inputs' first; None where no method that is asked for runs it.
        train: batches to take gradients on, iterated over again when they end.
        validation: batches by which the best step is chosen.
        steps: T of a path.
        keep: ``keep(name, make)`` gives what ``make()`` does, or did in a run that was interrupted.
        clock: what it took.
    """

    model: nn.Module | None = None
    train: Iterable[Batch] | None = None
    validation: Iterable[Batch] | None = None
    steps: int = 30
    keep: Callable[[str, Callable[[], Tensors]], Tensors] = _nothing_kept
    clock: Clock = field(default_factory=Clock)

    def gradients(self, method: str) -> tuple[nn.Module, Iterable[Batch]]:
        """The network and batches for gradients. Raises ValueError, naming the method, where there are none."""
        if self.model is None or self.train is None:
            raise ValueError(f"{method} takes gradients: it needs a model and data")
        return self.model, self.train


Method = Callable[[PermutationSpec, Weights, Weights, Weights, Work], Ported]


def naive(spec: PermutationSpec, base: Weights, tuned: Weights, new_base: Weights, work: Work) -> Ported:
    """``new_base + (tuned - base)``."""
    return moved(spec, base, tuned, new_base, spec.identity())


def weights(spec: PermutationSpec, base: Weights, tuned: Weights, new_base: Weights, work: Work) -> Ported:
    """``new_base + pi (tuned - base)``, where pi matches the bases' weights (Ainsworth et al., Git Re-Basin)."""

    def find() -> Perm:
        found = match_streamed(spec, learned(spec, new_base), learned(spec, base))
        work.clock.add(found.seconds)
        return found.perm

    return moved(spec, base, tuned, new_base, work.keep("perm", find))


def fgmt(spec: PermutationSpec, base: Weights, tuned: Weights, new_base: Weights, work: Work) -> Ported:
    """``new_base + l_t pi (tuned - base)``, pi and l_t of `regraft.transfer` along the straight line to the fine-tune.

    Gradients need the model in memory.
    """
    model, train = work.gradients("method 'fgmt'")

    def find() -> Tensors:
        path = Trajectory.linear(dict(base.items()), dict(tuned.items()), steps=work.steps)
        start = dict(new_base.items())
        found = transfer(model, path, start, train, "fgmt", spec=spec, validation=work.validation)
        work.clock.add(found.seconds)
        return {f"perm/{g}": index for g, index in found.perm.items()} | {
            "scale": torch.tensor(path.leg(found.best_step)[1], dtype=torch.float64)
        }

    found = work.keep("transfer", find)
    perm = {name.removeprefix("perm/"): index for name, index in found.items() if name != "scale"}
    return moved(spec, base, tuned, new_base, perm, float(found["scale"]))


def masked(method: Method) -> Method:
    """What another method moves, of it the entries that point down the new base's loss:
    `regraft.porting.gradfix.transport`.

    By majority over the images of the first `FEW` batches. A head that is carried over is no part of the task vector:
    it is put on the new base before.
    """

    def gradfix(
        spec: PermutationSpec, base: Weights, tuned: Weights, new_base: Weights, work: Work
    ) -> Ported:
        model, train = work.gradients("GradFix")
        ported = method(spec, base, tuned, new_base, work)
        few = [split(batch, number) for number, batch in enumerate(islice(train, FEW))]
        if not all(isinstance(inputs, Tensor) for inputs, _ in few):
            raise ValueError("GradFix lets each image vote: it needs batches (images, labels)")
        with work.clock.phase("gradients"):
            start, change = {}, {}
            parameters = dict(model.named_parameters())
            for name, own in new_base.items():
                carried = name in parameters and not bool(own.any()) and not bool(base[name].any())
                start[name] = ported.tensors[name] if carried else own
                if name in parameters and not carried:
                    change[name] = ported.tensors[name] - own
            return Ported(transport(model, start, change, few), ported.perm)

    return gradfix


METHODS: dict[str, Method] = {
    "fgmt": fgmt,
    "weights": weights,
    "naive": naive,
    "gradfix": masked(naive),
    "weights+gradfix": masked(weights),
    "fgmt+gradfix": masked(fgmt),
}

IN_MEMORY = frozenset(METHODS.keys() - {"weights", "naive"})
"""Those that need data, and the model in memory; the others read one group of tensors after the other."""

FEW = 4
"""Batches of whose images GradFix asks each."""


def moved(
    spec: PermutationSpec, base: Weights, tuned: Weights, new_base: Weights, perm: Perm, scale: float = 1.0
) -> Ported:
    """``new_base + scale pi (tuned - base)``, tensor by tensor; integers are the new base's, variances at least 0."""
    device = next(iter(new_base.values())).device
    indices = spec.indices({group: index.to(device) for group, index in perm.items()})

    def read(name: str) -> Tensor:
        own = new_base[name]
        if not own.is_floating_point():
            return own
        start, end = {name: base[name]}, {name: tuned[name]}
        result = graft({name: own}, start, end, [scale], indices, spec.packing())[name][0]
        return result.clamp_(min=0) if name.endswith("running_var") else result

    return Ported(Lazy(tuple(new_base), read), perm)


def learned(spec: PermutationSpec, tensors: Weights) -> Weights:
    """The parameters among the tensors, of which there are no second names: what weights are matched by."""
    return Lazy(tuple(name for name in tensors if name not in spec.optional), tensors.__getitem__)
