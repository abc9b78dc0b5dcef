"""Ways to bring a fine-tune onto a new base. Each is one function, ``method(problem, work) -> Ported``, with
`port_method` before it; `regraft.port` and the command know it by the name that is given there.

Every method of learning transfer (`regraft.learning_transfer`) is a port method, too, along the straight line from the
base to the fine-tune; and of every method NAME there is NAME+gradfix, which masks what it moves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from regraft.core.clock import Clock
from regraft.core.forward import examples, inputs_of, split
from regraft.core.tensors import Batch, Inputs, Perm, Tensors, is_finite
from regraft.learning_transfer.driver import transfer
from regraft.learning_transfer.methods import TRANSFER_METHODS
from regraft.learning_transfer.trajectory import Trajectory
from regraft.matching.descent import match_streamed
from regraft.porting.checkpoint_files import Lazy
from regraft.porting.gradfix import transport
from regraft.symmetry import PermutationSpec
from regraft.training.statistics import batch_norms, reset_batchnorm
from regraft_kernels import graft

Weights = Mapping[str, Tensor]

STATISTICS_BATCHES = 20
"""From which BatchNorm statistics are estimated anew."""

INPUTS = 1024
"""That a method without labels looks at."""

VOTING_BATCHES = 4
"""Batches of whose images GradFix asks each."""


@dataclass(frozen=True)
class PortProblem:
    """What is to be brought where: three networks of equal names and shapes, floating in one dtype, on one device.

    They may read a tensor each time one is asked for. A head that the fine-tune has and the bases have not is zero in
    these, so that it is carried over as a change from zero. ``carried``: such tensors by name, where they are known.
    The new base may be of another model (`PortWork.new_model`), under names and shapes of its own.
    """

    spec: PermutationSpec
    base: Weights
    tuned: Weights
    new_base: Weights
    carried: Collection[str] = ()


def _make_anew(name: str, make: Callable[[], Tensors]) -> Tensors:
    return make()


@dataclass(frozen=True)
class PortWork:
    """What a method may use besides the networks.

    Attributes:
        model: the network as a function of its inputs' first; None where no method that is asked for runs it.
        train: batches to take gradients on, iterated over again when they end.
        validation: batches by which the best step is chosen.
        inputs: unlabelled batches, of which methods without labels look at the first `INPUTS`; of ``train`` if None.
        new_model: the new base's network, where it is another one.
        steps: T of a path; the updates of a training.
        lr: the learning rate of a training; chosen if None.
        labelled: whether the labels are the task's own, not the fine-tune's predictions.
        keep: ``keep(name, make)`` gives what ``make()`` does, or did in a run that was interrupted.
        clock: what it took.
    """

    model: nn.Module | None = None
    train: Iterable[Batch] | None = None
    validation: Iterable[Batch] | None = None
    inputs: Iterable[Inputs] | None = None
    new_model: nn.Module | None = None
    steps: int = 30
    lr: float | None = None
    labelled: bool = True
    keep: Callable[[str, Callable[[], Tensors]], Tensors] = _make_anew
    clock: Clock = field(default_factory=Clock)

    def model_and_batches(self, method: str) -> tuple[nn.Module, Iterable[Batch]]:
        """For gradients. Raises ValueError, naming the method, where there are none."""
        if self.model is None or self.train is None:
            raise ValueError(f"{method} takes gradients: it needs a model and data")
        return self.model, self.train

    def model_and_inputs(self, method: str) -> tuple[nn.Module, list[Inputs]]:
        """For methods that look at inputs alone: the batches that hold the first `INPUTS`. Raises ValueError as
        `model_and_batches`."""
        if self.model is None or (self.train is None and self.inputs is None):
            raise ValueError(f"{method} looks at inputs of the task: it needs a model and data, labelled or not")
        batches = map(inputs_of, self.train) if self.inputs is None else iter(self.inputs)  # type: ignore[arg-type]
        seen: list[Inputs] = []
        while sum(map(examples, seen)) < INPUTS and (batch := next(batches, None)) is not None:
            seen.append(batch)
        return self.model, seen


@dataclass(frozen=True)
class Ported:
    """What a method gives.

    Attributes:
        tensors: made one by one when they are asked for.
        perm: the permutation behind them.
        keeps_statistics: whether the BatchNorm statistics among them are meant, not to be estimated anew.
        measured: what was measured on the way, by name, as JSON.
    """

    tensors: Weights
    perm: Perm
    keeps_statistics: bool = False
    measured: Mapping[str, Any] = field(default_factory=dict)


PortMethod = Callable[[PortProblem, PortWork], Ported]

PORT_METHODS: dict[str, PortMethod] = {}

STREAMED: set[str] = set()
"""The methods that read one group of tensors after the other; all others need data, and the model in memory."""


def mask_by_gradients(method: PortMethod, problem: PortProblem, work: PortWork) -> Ported:
    """What another method moves, of it the entries that point down the new base's loss:
    `regraft.porting.gradfix.transport`.

    By majority over the images of the first `VOTING_BATCHES` batches. A head that is carried over is no part of the
    task vector: it is put on the new base before.
    """
    model, train = work.model_and_batches("GradFix")
    ported = method(problem, work)
    batches = [split(batch, number) for number, batch in enumerate(islice(train, VOTING_BATCHES))]
    if not all(isinstance(inputs, Tensor) for inputs, _ in batches):
        raise ValueError("GradFix lets each image vote: it needs batches (images, labels)")
    with work.clock.phase("gradients"):
        start, change = {}, {}
        parameters = dict(model.named_parameters())
        for name, own in problem.new_base.items():
            carried = name in parameters and not bool(own.any()) and not bool(problem.base[name].any())
            start[name] = ported.tensors[name] if carried else own
            if name in parameters and not carried:
                change[name] = ported.tensors[name] - own
        return Ported(transport(model, start, change, batches), ported.perm)


ANY_MODEL: set[str] = set()
"""The methods for which the new base may be of another model."""


def port_method(
    name: str, *, streamed: bool = False, masked: bool = True, any_model: bool = False
) -> Callable[[PortMethod], PortMethod]:
    """Decorator: the method has this name. streamed: it needs neither data nor a model in memory. masked: what it moves
    is a task vector, of which GradFix may keep a part. any_model: the new base may be of another model."""

    def register(method: PortMethod) -> PortMethod:
        PORT_METHODS[name] = method
        if masked:
            PORT_METHODS["gradfix" if name == "naive" else f"{name}+gradfix"] = partial(mask_by_gradients, method)
        STREAMED.update({name} if streamed else ())
        ANY_MODEL.update({name} if any_model else ())
        return method

    return register


@port_method("naive", streamed=True)
def add_change(problem: PortProblem, work: PortWork) -> Ported:
    """``new_base + (tuned - base)``."""
    return add_permuted_change(problem, problem.spec.identity())


@port_method("weights", streamed=True)
def match_bases(problem: PortProblem, work: PortWork) -> Ported:
    """``new_base + pi (tuned - base)``, where pi matches the bases' weights (Ainsworth et al., Git Re-Basin)."""

    def find() -> Perm:
        return match_weights(problem.spec, problem.new_base, problem.base, work.clock)

    return add_permuted_change(problem, work.keep("perm", find))


def follow_path(method: str, problem: PortProblem, work: PortWork) -> Ported:
    """``new_base + l_t pi (tuned - base)``, pi and l_t of `regraft.transfer` along the straight line to the fine-tune.

    method: of learning transfer. Gradients need the model in memory.
    """
    model, train = work.model_and_batches(f"method {method!r}")
    own = dict(model.named_parameters())

    def find() -> Tensors:
        base, tuned, start = (
            {name: tensor for name, tensor in network.items() if name in own or is_finite(tensor)}
            for network in (problem.base, problem.tuned, problem.new_base)
        )
        path = Trajectory.linear(base, tuned, steps=work.steps)
        result = transfer(model, path, start, train, method, spec=problem.spec, validation=work.validation)
        work.clock.add(result.seconds)
        scale = torch.tensor(path.leg(result.best_step)[1], dtype=torch.float64)
        return {"scale": scale, **{f"perm/{group}": index for group, index in result.perm.items()}}

    kept = work.keep("transfer", find)
    perm = {name.removeprefix("perm/"): index for name, index in kept.items() if name != "scale"}
    return add_permuted_change(problem, perm, float(kept["scale"]))


for _name in TRANSFER_METHODS:
    if _name not in PORT_METHODS and _name != "oracle":  # which needs the new base trained on the task
        port_method(_name)(partial(follow_path, _name))


def match_weights(spec: PermutationSpec, target: Weights, source: Weights, clock: Clock) -> Perm:
    """pi that brings the units of ``source`` onto those of ``target`` by their weights, read tensor by tensor."""

    def parameters(tensors: Weights) -> Weights:
        """Those of which there are no second names."""
        return Lazy(tuple(name for name in tensors if name not in spec.optional), tensors.__getitem__)

    match = match_streamed(spec, parameters(target), parameters(source))
    clock.add(match.seconds)
    return match.perm


def add_permuted_change(problem: PortProblem, perm: Perm, scale: float = 1.0) -> Ported:
    """``new_base + scale pi (tuned - base)``, tensor by tensor; integers are the new base's, variances at least 0."""
    spec, new_base = problem.spec, problem.new_base
    device = next(iter(new_base.values())).device
    indices = spec.indices({group: index.to(device) for group, index in perm.items()})

    def read(name: str) -> Tensor:
        own = new_base[name]
        if not own.is_floating_point():
            return own
        start, end = {name: problem.base[name]}, {name: problem.tuned[name]}
        if not is_finite(own):  # a mask of infinities, which all three have, does not change
            start, end = ({name: torch.where(t[name].isinf(), 0, t[name])} for t in (start, end))
        result = graft({name: own}, start, end, [scale], indices, spec.packing())[name][0]
        return result.clamp_(min=0) if name.endswith("running_var") else result

    return Ported(Lazy(tuple(new_base), read), perm)


def with_statistics(tensors: Weights, work: PortWork) -> Weights:
    """With BatchNorm statistics of the data; the same tensors for a model without BatchNorm."""
    model, train = work.model_and_batches("an estimate of statistics")
    model = model if work.new_model is None else work.new_model
    norms = batch_norms(model)
    if not norms:
        return tensors

    def estimate() -> Tensors:
        with work.clock.phase("batchnorm"):
            whole = reset_batchnorm(model, dict(tensors.items()), train, STATISTICS_BATCHES)
        kinds = ("running_mean", "running_var", "num_batches_tracked")
        names = [f"{norm}.{kind}" for norm in norms for kind in kinds]
        return {name: whole[name] for name in names if name in tensors}

    statistics = work.keep("statistics", estimate)

    def read(name: str) -> Tensor:
        return statistics[name] if name in statistics else tensors[name]

    return Lazy(tuple(tensors), read)
