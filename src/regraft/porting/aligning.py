"""Checkpoints of one architecture: one aligned to another, and several summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from regraft.core.clock import EVALUATION, Clock, Cost
from regraft.core.files import BadFile
from regraft.core.tensors import Perm, check_finite
from regraft.matching.descent import match_streamed
from regraft.porting.card import told_seconds, write_card
from regraft.porting.checkpoint_files import (
    CheckpointFile,
    Lazy,
    beside,
    check_free,
    keep_tensors,
    write_shards,
)
from regraft.porting.methods import Weights, learned
from regraft.porting.plans import FLOAT, PROOF, PROVING, Plan, check_disk, check_memory, layout_like, streamed
from regraft.porting.subject import Example, Model, Spec, lazy, numel, subject
from regraft.symmetry import PermutationSpec
from regraft.training.evaluation import accuracy, batch_norms, interpolate
from regraft_kernels import permute

POINTS = 11
"""Along the line between two networks."""


class Known(TypedDict, total=False):
    """What may be said about the networks; see `regraft.porting.ports.Asked`."""

    model: Model | None
    inputs: Example
    spec: Spec | None
    data: object
    max_memory: int | None
    device: str


@dataclass(frozen=True)
class Aligned:
    """What an alignment, or a sum, was.

    Attributes:
        out: the folder: shards, their index, README.md.
        plan: what was planned.
        perms: of each network but the first, where they were aligned: pi, which brings it onto the first.
        found: what was measured, by name.
        seconds: by phase.
    """

    out: Path
    plan: Plan
    perms: tuple[Perm, ...]
    found: dict[str, Any]
    seconds: dict[str, Cost]

    def told(self) -> dict[str, Any]:
        """As JSON data."""
        return {"out": str(self.out), **self.plan.told(), **self.found, "seconds": told_seconds(self.seconds)}


def match_checkpoints(
    a: Path | str, b: Path | str, out: Path | str, *, resume: bool = False, **known: Unpack[Known]
) -> Aligned:
    """Write pi(b), where pi brings the units of ``b`` onto those of ``a`` (Git Re-Basin): the same function.

    Found besides: the relative distance of the two before and after; with data, loss barriers and accuracies of the
    middle along the line between them, before and after. Arguments and errors are those of `regraft.port`.
    """
    out, clock = Path(out), Clock()
    with clock.phase("checks"):
        made = _planned("match", {"a": a, "b": b}, out, "b", known, wants_model=True)
        hashes = {role: checkpoint.sha256() for role, checkpoint in made.checkpoints.items()}
    assert made.subject is not None
    with beside(out, _identity(made, hashes), resume=resume) as part:
        sides = _sides(made)
        perm = _aligned(made, sides, "b", part, clock)
        tensors = permuted(made.subject.spec, perm, sides["b"])
        found: dict[str, Any] = {
            "distance": {"before": _distance(sides["a"], sides["b"]), "after": _distance(sides["a"], tensors)}
        }
        if made.subject.model is not None:
            found["function_error"] = made.subject.check_function(dict(sides["b"].items()), perm)
        if made.data is not None:
            with clock.phase(EVALUATION):
                found |= _lines(made, sides["a"], {"before": sides["b"], "after": tensors})
        _write(part, made, tensors, hashes, found, clock)
    return Aligned(out, made, (perm,), found, clock.seconds)


def fuse_checkpoints(
    networks: Sequence[Path | str],
    weights: Sequence[float],
    out: Path | str,
    *,
    align: bool = False,
    resume: bool = False,
    **known: Unpack[Known],
) -> Aligned:
    """Write ``sum_i weights[i] networks[i]``, tensor by tensor; with ``align`` each is first brought onto the first.

    Integers and dtypes are the first's. A model (or a proven specification) is needed to align, and to measure
    accuracies on data. BatchNorm statistics are summed as weights are. Arguments and errors: see `regraft.port`.
    """
    if len(networks) < 1 or len(networks) != len(weights):
        raise ValueError(f"{len(networks)} networks need as many weights, not {len(weights)}")
    if not all(torch.isfinite(torch.tensor(weights, dtype=torch.float64))):
        raise ValueError(f"weights must be finite, not {list(weights)}")
    out, clock = Path(out), Clock()
    roles = {f"network {number}": path for number, path in enumerate(networks)}
    first, *others = roles
    with clock.phase("checks"):
        made = _planned("fuse", roles, out, first, known, wants_model=align)
        hashes = {role: checkpoint.sha256() for role, checkpoint in made.checkpoints.items()}
    identity = _identity(made, hashes) | {"weights": [float(w) for w in weights], "align": align}
    with beside(out, identity, resume=resume) as part:
        sides: dict[str, Weights] = dict(_sides(made))
        perms = []
        for role in others if align else ():
            assert made.subject is not None
            perms.append(_aligned(made, sides, role, part, clock))
            sides[role] = permuted(made.subject.spec, perms[-1], sides[role])
        tensors = summed(list(sides.values()), weights)
        found: dict[str, Any] = {"weights": identity["weights"], "align": align}
        if made.data is not None:
            with clock.phase(EVALUATION):
                found |= _accuracies(made, {**sides, "sum": tensors})
        _write(part, made, tensors, hashes, found, clock)
    return Aligned(out, made, tuple(perms), found, clock.seconds)


def permuted(spec: PermutationSpec, perm: Perm, tensors: Weights) -> Lazy:
    """pi(theta), each tensor when it is asked for."""
    indices = None

    def read(name: str) -> Tensor:
        nonlocal indices
        tensor = tensors[name]
        if indices is None:
            indices = spec.indices({group: index.to(tensor.device) for group, index in perm.items()})
        return permute({name: tensor}, indices, spec.packing())[name]

    return Lazy(tuple(tensors), read)


def summed(networks: Sequence[Weights], weights: Sequence[float]) -> Lazy:
    """The weighted sum, each tensor when it is asked for; integers are the first's, variances at least 0."""

    def read(name: str) -> Tensor:
        total = networks[0][name]
        if not total.is_floating_point():
            return total
        total = total * weights[0]
        for network, weight in zip(networks[1:], weights[1:], strict=True):
            total.add_(network[name], alpha=weight)
        return total.clamp_(min=0) if name.endswith("running_var") else total

    return Lazy(tuple(networks[0]), read)


# ---------------------------------------------------------------- parts of both


def _planned(
    method: str, paths: Mapping[str, Path | str], out: Path, result: str, known: Known, *, wants_model: bool
) -> Plan:
    """Checked: the checkpoints are alike and finite, and there is room. result: the role whose dtypes are written."""
    check_free(out)
    opened = {role: CheckpointFile.open(path) for role, path in paths.items()}
    first, allowed, device = next(iter(opened)), known.get("max_memory"), known.get("device", "cpu")
    whole, found = FLOAT * numel(opened[first]), None
    if wants_model or known.get("model") is not None or known.get("data") is not None:
        if known.get("spec") is None:
            check_memory(PROOF * whole, PROVING, allowed)
        found, opened[first] = subject(
            opened[first], known.get("model"), known.get("inputs"), known.get("spec"), device
        )
        opened = {r: c if r == first else found.fitted(c) for r, c in opened.items()}
    _check_alike(opened)
    data = None if found is None else found.data(known.get("data"), device)
    layout = layout_like(opened[result], opened[result], allowed)
    needed = 8 * whole if data is not None else streamed(None if found is None else found.spec, layout)
    memory = check_memory(needed, "evaluation" if data is not None else "streaming", allowed)
    check_disk(out, layout.bytes)
    for checkpoint in opened.values():
        for name in checkpoint:
            try:
                check_finite({name: checkpoint[name]}, str(checkpoint.path))
            except ValueError as problem:
                raise BadFile(str(problem)) from problem
    config = {"model": known["model"]} if isinstance(known.get("model"), str) else {}
    return Plan(method, opened, found, layout, data, config, None, memory, data is not None)


def _check_alike(checkpoints: Mapping[str, CheckpointFile]) -> None:
    (_, first), *others = checkpoints.items()
    for _, other in others:
        for one, two in ((first, other), (other, first)):
            if missing := [name for name in one if name not in two]:
                raise BadFile(
                    f"{two.path} has no tensor {missing[0]!r}, which {one.path} has: is it of another architecture?"
                )
        for name, entry in first.entries.items():
            if entry.shape != other.entries[name].shape:
                raise BadFile(
                    f"tensor {name!r}: shape {entry.shape} in {first.path}, {other.entries[name].shape} in {other.path}"
                )


def _sides(made: Plan) -> dict[str, Lazy]:
    model = None if made.subject is None else made.subject.model
    device = "cpu" if model is None else str(next(model.parameters()).device)
    first = next(iter(made.checkpoints.values()))
    return {role: lazy(checkpoint, first, device) for role, checkpoint in made.checkpoints.items()}


def _aligned(made: Plan, sides: Mapping[str, Weights], role: str, part: Path, clock: Clock) -> Perm:
    """The permutation that brings a network onto the first."""
    assert made.subject is not None
    spec, (first, *_) = made.subject.spec, sides.values()

    def find() -> Perm:
        found = match_streamed(spec, learned(spec, first), learned(spec, sides[role]))
        clock.add(found.seconds)
        return found.perm

    return partial(keep_tensors, part)(f"perm-{role}".replace(" ", "-"), find)


def _identity(made: Plan, hashes: Mapping[str, str]) -> dict[str, Any]:
    return {"method": made.method, "inputs": dict(hashes), "files": len(made.layout.shards), **made.config}


def _write(
    part: Path,
    made: Plan,
    tensors: Weights,
    hashes: Mapping[str, str],
    found: Mapping[str, Any],
    clock: Clock,
) -> None:
    with clock.phase("writing"):
        write_shards(part, made.layout, tensors)
    write_card(part, made, hashes, found, clock.seconds)


def _distance(a: Weights, b: Weights) -> float:
    """Relative, of all floating tensors: see `Distances`."""
    difference = both = 0.0
    for name in a:
        x, y = a[name], b[name]
        if x.is_floating_point():
            difference += float((x - y).square().sum(dtype=torch.float64))
            both += float(x.square().sum(dtype=torch.float64) + y.square().sum(dtype=torch.float64))
    return (difference / both) ** 0.5 if both else 0.0


def _lines(made: Plan, a: Weights, others: Mapping[str, Weights]) -> dict[str, Any]:
    """Barriers of the loss, and accuracies in the middle, of the lines from a to the others."""
    assert made.data is not None and made.subject is not None
    model, (where, batches) = made.subject.classifier(), made.data.measured_on
    statistics = made.data.train if batch_norms(model) else None
    lines = {
        name: interpolate(model, dict(a.items()), dict(other.items()), batches, POINTS, statistics=statistics)
        for name, other in others.items()
    }
    middle = POINTS // 2
    return {
        "barrier": {name: line.barrier for name, line in lines.items()},
        "accuracy": {f"middle, {name}": float(line.accuracy[middle]) for name, line in lines.items()},
        "measured_on": where,
    }


def _accuracies(made: Plan, networks: Mapping[str, Weights]) -> dict[str, Any]:
    assert made.data is not None and made.subject is not None
    model, (where, batches) = made.subject.classifier(), made.data.measured_on
    return {
        "accuracy": {name: accuracy(model, dict(theta.items()), batches) for name, theta in networks.items()},
        "measured_on": where,
    }
