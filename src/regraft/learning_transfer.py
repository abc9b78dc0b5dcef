"""Learning transfer: a training run's parameter changes, permuted, added to another start.

``theta_2^t = theta_2^0 + pi (theta_1^t - theta_1^0)`` (Chijiwa, Transferring Learning Trajectories of Neural
Networks, sections 3 and 4.1). The methods differ in how they find pi:

- ``naive``: pi is the identity.
- ``weights``: pi matches the two starts' weights, as a Git Re-Basin user would do.
- ``oracle``: pi matches what a real training of theta_2 learned with ``theta_1^T - theta_1^0``: a bound, no method.
- ``gmt`` (Algorithm 1): for s = 1..T pi_s matches the gradients along both paths up to s, all computed anew.
- ``fgmt`` (Algorithm 2): the same, but only the newest pair of gradients is computed and the earlier ones are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from regraft.clock import Clock
from regraft.evaluation import accuracy, batch_norms, gradients, reset_batchnorm
from regraft.matching import Descent, Match, append_, clear_, descend_, match, restart_
from regraft.symmetry import PermutationSpec, trace
from regraft.trajectory import Trajectory, check_alike, check_finite
from regraft_kernels import graft

Tensors = dict[str, Tensor]
Perm = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

METHODS = ("naive", "weights", "oracle", "fgmt", "gmt")


@dataclass(frozen=True)
class Transfer:
    """A transferred path and what it cost.

    Attributes:
        params: theta_2 at `best_step`, parameters and buffers by name.
        perm: the permutation pi at `best_step`.
        best_step: the step t with the best validation accuracy; T when there was no validation.
        accuracies: validation accuracy of theta_2^t (under pi_t) for t = 1 .. T; empty without validation.
        perms: pi_t for t = 1 .. T (one and the same object where a method has a single one).
        objectives: of each matching, in the order in which they were made.
        gradients: batch gradients computed (2 T gradient_batches for fgmt, T (T + 1) gradient_batches for gmt).
        seconds, cpu_seconds: by phase, wall clock and CPU: gradients, similarity, assignment, objective, graft,
            batchnorm are the method's cost; evaluation is apart.
    """

    method: str
    params: Tensors
    perm: Perm
    best_step: int
    accuracies: tuple[float, ...]
    perms: tuple[Perm, ...]
    objectives: tuple[float, ...]
    gradients: int
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]

    @property
    def cost(self) -> float:
        """Seconds of wall clock that the method took, evaluation apart."""
        return sum(seconds for phase, seconds in self.seconds.items() if phase != "evaluation")

    @property
    def cpu_cost(self) -> float:
        """Seconds of CPU that the method took, evaluation apart."""
        return sum(seconds for phase, seconds in self.cpu_seconds.items() if phase != "evaluation")


@dataclass
class _Run:
    """What every method shares: the model, the path, and the books that it keeps."""

    model: nn.Module
    spec: PermutationSpec
    path: Trajectory
    target_start: Tensors
    batches: Iterator[Batch]
    validation: Iterable[Batch] | None
    gradient_batches: int
    bn_batches: Sequence[Batch]
    loss: Loss
    from_identity: bool
    generator: torch.Generator | None
    backend: str
    on_step: Callable[[int, float | None], None] | None
    clock: Clock = field(default_factory=Clock)
    perms: list[Perm] = field(default_factory=list)
    objectives: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    gradients: int = 0

    @property
    def device(self) -> torch.device:
        return next(iter(self.target_start.values())).device


def transfer(
    model: nn.Module,
    path: Trajectory,
    target_start: Tensors,
    batches: Iterable[Batch],
    method: str = "fgmt",
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
    on_step: Callable[[int, float | None], None] | None = None,
) -> Transfer:
    """Transfer `path` to the network that starts at `target_start`, without training it.

    Args:
        model: any classifier; its own parameters are neither used nor changed.
        path: theta_1^0 .. theta_1^T, of the model's parameters and buffers, on the device to compute on.
        target_start: theta_2^0, alike.
        batches: (images, labels) pairs, the sample for gradients and for BatchNorm statistics; iterated over again
            when it ends. Both networks see the same ones.
        method: "naive", "weights", "oracle", "fgmt" or "gmt".
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
        on_step: called after each step t with t and its validation accuracy (None without validation).

    Raises:
        ValueError: an unknown method; tensors that differ in name, shape, dtype or device between model, path, start
            and spec; a value that is not finite in the start or in a gradient; no batch; "oracle" without
            `target_end`. The message names the tensor.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    if gradient_batches < 1:
        raise ValueError(f"gradient_batches must be at least 1, got {gradient_batches}")
    _check_inputs(model, path, target_start, target_end, method)
    endless = _cycle(batches)
    first = next(endless)
    if spec is None:
        spec = trace(model, (first[0][:2].to(next(model.parameters()).device),))
    spec.validate(target_start)
    needs_bn = bn_batches > 0 and bool(batch_norms(model))
    run = _Run(
        model,
        spec,
        path,
        target_start,
        _chain(first, endless),
        validation,
        gradient_batches,
        _take(_cycle(batches), bn_batches) if needs_bn else (),
        loss,
        from_identity,
        generator,
        backend,
        on_step,
    )
    theta, best_step = _METHODS[method](run, target_end)
    return Transfer(
        method,
        theta,
        run.perms[best_step - 1],
        best_step,
        tuple(run.accuracies),
        tuple(run.perms),
        tuple(run.objectives),
        run.gradients,
        dict(run.clock.wall),
        dict(run.clock.cpu),
    )


def transferred(run: _Run, perm: Perm, t: int) -> Tensors:
    """theta_2^t = theta_2^0 + pi (theta_1^t - theta_1^0), in one graft."""
    with run.clock.phase("graft", run.device):
        anchor, scale = run.path.leg(t)
        if scale == 0.0:
            return run.target_start
        grafted = graft(
            run.target_start,
            run.path.start,
            anchor,
            [scale],
            run.spec.indices(perm),
            run.spec.packing(),
            backend=run.backend,
        )
        return {name: tensor[0] for name, tensor in grafted.items()}


def _naive(run: _Run, target_end: Tensors | None) -> tuple[Tensors, int]:
    return _along(run, {g: index.to(run.device) for g, index in run.spec.identity().items()})


def _weights(run: _Run, target_end: Tensors | None) -> tuple[Tensors, int]:
    return _along(run, _matched(run, _parameters(run, run.target_start), _parameters(run, run.path.start)))


def _oracle(run: _Run, target_end: Tensors | None) -> tuple[Tensors, int]:
    assert target_end is not None
    learned = _difference(_parameters(run, target_end), run.target_start)
    source = _difference(_parameters(run, run.path.end), run.path.start)
    return _along(run, _matched(run, learned, source))


def _gmt(run: _Run, target_end: Tensors | None) -> tuple[Tensors, int]:
    descent = _descent(run)
    best: tuple[Tensors, int] | None = None
    for s in range(1, run.path.steps + 1):
        clear_(descent)
        perm = dict(descent.perm)
        for t in range(1, s + 1):
            _append_gradients_(run, descent, run.path[t - 1], transferred(run, perm, t - 1))
        _descend_(run, descent)
        best = _better(run, best, s)
    assert best is not None
    return best


def _fgmt(run: _Run, target_end: Tensors | None) -> tuple[Tensors, int]:
    descent = _descent(run)
    best: tuple[Tensors, int] | None = None
    theta = run.target_start
    for s in range(1, run.path.steps + 1):
        _append_gradients_(run, descent, run.path[s - 1], theta)
        _descend_(run, descent)
        theta = transferred(run, run.perms[-1], s)
        best = _better(run, best, s, theta)
    assert best is not None
    return best


_METHODS: dict[str, Callable[[_Run, Tensors | None], tuple[Tensors, int]]] = {
    "naive": _naive,
    "weights": _weights,
    "oracle": _oracle,
    "fgmt": _fgmt,
    "gmt": _gmt,
}


def _along(run: _Run, perm: Perm) -> tuple[Tensors, int]:
    """All steps by one permutation; only those that are evaluated are made."""
    steps = range(1, run.path.steps + 1)
    run.perms.extend(perm for _ in steps)
    best: tuple[Tensors, int] | None = None
    for t in steps if run.validation is not None else (run.path.steps,):
        best = _better(run, best, t)
    assert best is not None
    return best


def _better(
    run: _Run, best: tuple[Tensors, int] | None, t: int, theta: Tensors | None = None
) -> tuple[Tensors, int]:
    """The better of `best` and step t on validation; step t where there is none."""
    if run.validation is None:
        if run.on_step is not None:
            run.on_step(t, None)
        # without validation only the last step counts, and it alone is made
        if t < run.path.steps:
            return run.target_start, t
        return _with_statistics(run, theta or transferred(run, run.perms[t - 1], t)), t
    theta = _with_statistics(run, theta or transferred(run, run.perms[t - 1], t))
    with run.clock.phase("evaluation", run.device):
        run.accuracies.append(accuracy(run.model, theta, run.validation))
    if run.on_step is not None:
        run.on_step(t, run.accuracies[-1])
    return (theta, t) if best is None or run.accuracies[-1] > run.accuracies[best[1] - 1] else best


def _with_statistics(run: _Run, theta: Tensors) -> Tensors:
    """Running statistics estimated anew (Jordan et al., 2023) where there are batches for it."""
    if not run.bn_batches:
        return theta
    with run.clock.phase("batchnorm", run.device):
        return reset_batchnorm(run.model, theta, run.bn_batches, len(run.bn_batches))


def _descent(run: _Run) -> Descent:
    like = _parameters(run, run.target_start)
    return Descent.allocate(run.spec, like, run.path.steps, generator=run.generator)


def _append_gradients_(run: _Run, descent: Descent, source: Tensors, target: Tensors) -> None:
    """Lines 3 to 5 of Algorithm 1: both gradients on one sample."""
    batches = _take(run.batches, run.gradient_batches)
    with run.clock.phase("gradients", run.device):
        g1 = gradients(run.model, source, batches, run.loss)
        g2 = gradients(run.model, target, batches, run.loss)
        append_(descent, g2, g1)
    run.gradients += 2 * len(batches)


def _descend_(run: _Run, descent: Descent) -> None:
    if run.from_identity:
        restart_(descent, run.spec.identity())
    _keep(run, descend_(descent, backend=run.backend))


def _matched(run: _Run, target: Tensors, source: Tensors) -> Perm:
    found = match(run.spec, target, source, generator=run.generator, backend=run.backend)
    _keep(run, found)
    return run.perms.pop()


def _keep(run: _Run, found: Match) -> None:
    run.perms.append(found.perm)
    run.objectives.append(found.objective)
    run.clock.add(found.seconds, found.cpu_seconds)


def _parameters(run: _Run, theta: Tensors) -> Tensors:
    return {name: theta[name] for name, _ in run.model.named_parameters()}


def _difference(end: Tensors, start: Tensors) -> Tensors:
    return {name: tensor - start[name] for name, tensor in end.items()}


def _check_inputs(
    model: nn.Module, path: Trajectory, target_start: Tensors, target_end: Tensors | None, method: str
) -> None:
    own = dict(model.named_parameters())
    for name, parameter in own.items():
        if name not in target_start:
            raise ValueError(f"the target's start has no tensor {name!r}, which the model has")
        if target_start[name].shape != parameter.shape:
            raise ValueError(
                f"tensor {name!r}: shape {tuple(target_start[name].shape)} in the target's start, "
                f"{tuple(parameter.shape)} in the model"
            )
    check_alike(path.start, target_start, "the path", "the target's start")
    check_finite(path.start, "the path's start")
    check_finite(path.end, "the path's end")
    check_finite(target_start, "the target's start")
    if method == "oracle":
        if target_end is None:
            raise ValueError("method 'oracle' needs target_end, the end of a real training from target_start")
        check_alike(target_start, target_end, "the target's start", "the target's end")
        check_finite(target_end, "the target's end")


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


def _chain(first: Batch, rest: Iterator[Batch]) -> Iterator[Batch]:
    yield first
    yield from rest


def _take(batches: Iterator[Batch], count: int) -> list[Batch]:
    return [next(batches) for _ in range(count)]
