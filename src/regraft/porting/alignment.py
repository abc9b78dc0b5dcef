"""Checkpoints of one architecture: one aligned to another."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor

from regraft.core.arguments import check_arguments
from regraft.core.clock import EVALUATION, Clock
from regraft.core.files import BadFile
from regraft.core.tensors import Perm
from regraft.matching.descent import match
from regraft.porting.checkpoint_files import CheckpointFile, Lazy
from regraft.porting.fitting import Distance
from regraft.porting.job import Job, open_job, read_checkpoints
from regraft.porting.methods import Weights, match_weights
from regraft.porting.model_spec import Settings
from regraft.porting.output_folder import check_output, keep_tensors
from regraft.porting.result import Made, Result, run_job
from regraft.symmetry import PermutationSpec
from regraft.training.evaluation import accuracy
from regraft.training.landscape import interpolate
from regraft.training.statistics import batch_norms
from regraft_kernels import permute

POINTS = 11
"""Along the line between two networks."""

IN_MEMORY_COPIES = 8
"""Of the model in float32, at the peak of an evaluation."""


@check_arguments
def match_checkpoints(
    a: Path | str,
    b: Path | str,
    out: Path | str,
    *,
    activations: bool = False,
    resume: bool = False,
    **settings: Unpack[Settings],
) -> Result:
    """Write pi(b), where pi brings the units of ``b`` onto those of ``a`` (Git Re-Basin): the same function.

    activations: match units by the correlation of their activations on the data's training batches (see
    `regraft.match`), which needs a model and holds both networks in memory; by weights, tensor by tensor, if not.

    Measured: the relative distance of the two before and after; with data, loss barriers and accuracies of the middle
    along the line between them, before and after. Settings: see `Settings`; errors are those of `regraft.port`.
    """
    clock = Clock()
    with clock.phase("checks"):
        if activations and settings.get("data") is None:
            raise ValueError("matching by activations needs data: --data on the command line, data= in Python")
        method = "match by activations" if activations else "match"
        job = open_alike(method, [("a", a), ("b", b)], "b", out, settings, resume=resume)
    return run_job(job, out, partial(_match, job, activations), clock, resume=resume)


def _match(job: Job, activations: bool, part: Path, clock: Clock) -> Made:
    assert job.model_spec is not None
    networks = job.networks(job.model_spec.device)
    if activations:
        perm = keep_tensors(part, "perm-b", partial(_match_activations, job, networks, clock))
    else:
        perm = align(job.spec, networks, "b", part, clock)
    aligned = permute_lazily(job.spec, perm, networks["b"])
    pairs = {"before": networks["b"], "after": aligned}
    measured: dict[str, Any] = {
        "distance": {when: _distance(networks["a"], other, job.layout.infinite) for when, other in pairs.items()}
    }
    if job.model_spec.model is not None:
        measured["function_error"] = job.model_spec.check_function(dict(networks["b"].items()), perm)
    if job.data is not None:
        with clock.phase(EVALUATION):
            measured |= _measure_lines(job, networks["a"], pairs)
    return Made(aligned, (perm,), measured)


def _match_activations(job: Job, networks: Mapping[str, Weights], clock: Clock) -> Perm:
    assert job.data is not None and job.model_spec is not None
    target, source = (
        {name: tensor for name, tensor in networks[role].items() if name not in job.layout.infinite} for role in "ab"
    )
    model, batches = job.model_spec.require_model().model, job.data.train
    result = match(job.spec, target, source, model=model, batches=batches)
    clock.add(result.seconds)
    return result.perm


def permute_lazily(spec: PermutationSpec, perm: Perm, tensors: Weights) -> Lazy:
    """pi(theta), each tensor when it is asked for."""
    device = next(iter(tensors.values())).device
    indices = spec.indices({group: index.to(device) for group, index in perm.items()})
    packing = spec.packing()
    return Lazy(tuple(tensors), lambda name: permute({name: tensors[name]}, indices, packing)[name])


def measure_accuracies(job: Job, networks: Mapping[str, Weights]) -> dict[str, Any]:
    """By network, on the job's data."""
    assert job.data is not None and job.model_spec is not None
    model, (where, batches) = job.model_spec.require_model().model, job.data.measured_on
    accuracies = {name: accuracy(model, dict(theta.items()), batches) for name, theta in networks.items()}
    return {"accuracy": accuracies, "measured_on": where}


# ---------------------------------------------------------------- parts of it, and of fusing


def open_alike(
    method: str,
    paths: Sequence[tuple[str, Path | str]],
    like: str,
    out: Path | str,
    settings: Settings,
    config: Mapping[str, Any] | None = None,
    *,
    resume: bool,
) -> Job:
    """Checked: the checkpoints are alike and finite, and there is room. A job without config permutes and adds none."""
    check_output(Path(out))
    matches = config is None or config["align"]
    checkpoints = read_checkpoints(paths, like if config else paths[0][0], settings, needs_spec=matches)
    names = {name: None for checkpoint in checkpoints[1].values() for name in checkpoint}
    by_role = {role: checkpoint.with_counters(names) for role, checkpoint in checkpoints[1].items()}
    _check_alike(list(by_role.values()))
    job = open_job(method, (checkpoints[0], by_role), like, like, settings, config or {})
    if job.data is not None and job.data.unlabelled:
        raise ValueError(f"{method} measures accuracies: it needs data with labels, which only port can do without")
    job = job.check_room(out, settings.get("max_memory"), copies=IN_MEMORY_COPIES, matches=matches, resume=resume)
    check = job.value_check(summed=0 if config is None else len(paths))
    for name in job.checkpoints[job.like]:
        check(name, [checkpoint[name] for checkpoint in job.checkpoints.values()])
    return replace(job, layout=replace(job.layout, infinite=frozenset(check.infinite)))


def _check_alike(checkpoints: Sequence[CheckpointFile]) -> None:
    """Raises BadFile, naming tensor and files, unless all have the same names and shapes."""
    for first, other in pairwise(checkpoints):
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


def align(spec: PermutationSpec, networks: Mapping[str, Weights], role: str, part: Path, clock: Clock) -> Perm:
    """The permutation that brings a network onto the first."""
    first = next(iter(networks.values()))
    name = f"perm-{role}".replace(" ", "-")
    return keep_tensors(part, name, lambda: match_weights(spec, first, networks[role], clock))


def _distance(a: Weights, b: Weights, infinite: Collection[str]) -> float:
    """Relative, of all floating tensors that are finite."""
    distance = Distance()
    for name in a:
        x: Tensor = a[name]
        if x.is_floating_point() and name not in infinite:
            distance.add(x, b[name])
    return distance.value


def _measure_lines(job: Job, a: Weights, others: Mapping[str, Weights]) -> dict[str, Any]:
    """Barriers of the loss, and accuracies in the middle, of the lines from a to the others."""
    assert job.data is not None and job.model_spec is not None
    model, (where, batches) = job.model_spec.require_model().model, job.data.measured_on
    statistics = job.data.train if batch_norms(model) else None
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
