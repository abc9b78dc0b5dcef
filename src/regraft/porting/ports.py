"""A fine-tune onto a new base: checked, made, checked again, measured, and written whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from regraft.core.arguments import check_arguments
from regraft.core.clock import EVALUATION, Clock
from regraft.core.forward import split
from regraft.core.tensors import Tensors
from regraft.porting.alignment import IN_MEMORY_COPIES, measure_accuracies
from regraft.porting.between_models import JobBetweenModels, make_between_models, plan_between_models
from regraft.porting.checkpoint_files import CheckpointFile, Lazy
from regraft.porting.fitting import measure_distances
from regraft.porting.function_ports import FITTED
from regraft.porting.job import Job, open_job, read_checkpoints
from regraft.porting.methods import (
    PORT_METHODS,
    Ported,
    PortProblem,
    PortWork,
    Weights,
    with_statistics,
)
from regraft.porting.output_folder import check_output
from regraft.porting.port_settings import (
    BASE,
    NEW_BASE,
    ROLES,
    TUNED,
    PortSettings,
    check_settings,
    count_activation_bytes,
    prepare_work,
    settle,
)
from regraft.porting.result import Made, Result, run_job
from regraft.porting.spectral import with_singular_vectors

TRAIN_IT = ": train it instead"


def port(
    base: Path | str,
    tuned: Path | str,
    new_base: Path | str,
    out: Path | str,
    *,
    resume: bool = False,
    **settings: Unpack[PortSettings],
) -> Result:
    """Bring what a fine-tuning changed in ``base`` onto ``new_base``, and write the result as a checkpoint.

    ``result = new_base + scale pi (tuned - base)``: the methods differ in pi, and are functions of three dictionaries
    in `regraft.porting.PORT_METHODS`. Floating tensors are computed in float32 and written in the dtype of the new
    base, integers are the new base's. A head of other classes than the bases' is carried over, permuted on its input
    side.

    Args:
        base, tuned, new_base: checkpoints as `regraft.porting.checkpoint_files.CheckpointFile.open` reads them.
        out: a folder that is not there yet; it is made beside and renamed when it is complete.
        resume: go on from what an interrupted run with the same inputs and settings has finished.
        settings: see `PortSettings`.

    Raises BadFile (a ValueError) for files that are damaged, of another architecture, of another base, or not finite;
    OSError for missing files, too little memory or disk, or something at ``out``; ValueError for bad settings. All are
    raised before any work, and the message names the tensor or path.
    """
    clock = Clock()
    with clock.phase("checks"):
        job = plan(base, tuned, new_base, out, resume=resume, **settings)
    make = partial(make_between_models, job) if isinstance(job, JobBetweenModels) else partial(_make, job)
    return run_job(job, out, make, clock, resume=resume)


@check_arguments
def plan(
    base: Path | str,
    tuned: Path | str,
    new_base: Path | str,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    **settings: Unpack[PortSettings],
) -> Job:
    """Everything that is checked before a port, and what it would do. Raises as `port` does."""
    method, steps = settings.get("method"), settings.get("steps")
    check_settings(method, settings)
    if out is not None:
        check_output(Path(out))
    if settings.get("new_model") is not None:
        return plan_between_models((base, tuned, new_base), out, settings, resume)
    paths = list(zip(ROLES, (base, tuned, new_base), strict=True))
    model_spec, checkpoints = read_checkpoints(paths, TUNED, settings)
    job = open_job(method or "fgmt", (model_spec, _drop_uncommon(checkpoints)), TUNED, NEW_BASE, settings, {})
    job = settle(job, method, settings)
    steps = job.config.get("steps", 1)
    # FGMT stacks a pair of gradients a step.
    copies = IN_MEMORY_COPIES + 2 * steps * ("gmt" in job.method)
    job = job.check_room(
        out,
        settings.get("max_memory"),
        copies=copies,
        matches=job.method != "naive",
        resume=resume,
        activations=count_activation_bytes(job),
    )
    networks, check = job.networks(), job.value_check(summed=2)
    distances = measure_distances([networks[role] for role in ROLES], check)
    return replace(job, distances=distances, layout=replace(job.layout, infinite=frozenset(check.infinite)))


def _drop_uncommon(checkpoints: Mapping[str, CheckpointFile]) -> dict[str, CheckpointFile]:
    """With the head tensors that only some have taken out of all but the fine-tune, and no counter that one lacks."""
    tuned = checkpoints[TUNED]
    lacking = {name for name in tuned for role in (BASE, NEW_BASE) if name not in checkpoints[role]}
    counters = {name for name in lacking if not tuned.entries[name].dtype.is_floating_point}
    tuned = tuned.without(counters, "a base has no such counter")
    common = tuned.entries.keys() - lacking
    why = "another base has it for other classes, or not at all"
    return {
        role: tuned if role == TUNED else checkpoint.without(checkpoint.entries.keys() - common, why)
        for role, checkpoint in checkpoints.items()
    }


def _make(job: Job, part: Path, clock: Clock) -> Made:
    """The result, its statistics and what was measured of it."""
    model_spec = job.model_spec
    assert model_spec is not None
    networks = job.networks(model_spec.device)
    kind = "accuracy" if job.data is None else job.data.judged_by
    job, work, measured = prepare_work(job, networks[TUNED], part, clock)
    base, tuned, new_base = (networks[role] for role in ROLES)
    problem = PortProblem(job.spec, base, tuned, new_base, job.head)
    ported = PORT_METHODS[job.method](problem, work)
    ported = replace(ported, tensors=with_singular_vectors(ported.tensors))
    measured |= ported.measured
    if model_spec.model is not None:
        with clock.phase("checks"):
            # With the fine-tune's head where the base has none: zeros would compute the same in any order.
            whole: Tensors = {n: networks[TUNED if n in job.head else BASE][n] for n in networks[TUNED]}
            measured["function_error"] = model_spec.check_function(whole, ported.perm)
    if job.data is not None:
        if not ported.keeps_statistics:
            ported = replace(ported, tensors=with_statistics(ported.tensors, work))
        with clock.phase(EVALUATION):
            measured |= _compare(job, problem, ported, work, kind)
    return Made(ported.tensors, (ported.perm,), measured)


def _compare(job: Job, problem: PortProblem, ported: Ported, work: PortWork, kind: str) -> dict[str, Any]:
    """Accuracies (or agreements with the fine-tune: ``kind``) of the result and of what it is to be compared with, on
    the first of test, validation, train."""
    result, head = ported.tensors, job.head
    naive = result
    if job.method != "naive":
        plain = PORT_METHODS["naive"](problem, PortWork())
        naive = with_statistics(plain.tensors, replace(work, keep=PortWork().keep, clock=Clock()))
    with_head = Lazy(tuple(problem.tuned), lambda name: (result if name in head else problem.new_base)[name])
    networks: dict[str, Weights] = {
        "fine-tune on its own base": problem.tuned,
        "new base": with_head,
        "naive sum": naive,
        "result": result,
    }
    measured = measure_accuracies(job, networks)
    own, new = (measured["accuracy"][name] for name in ("result", "new base"))
    assert job.data is not None
    labels = [split(batch)[1] for batch in job.data.measured_on[1]]
    verdict = judge(own, new, sum(int((part >= 0).sum()) for part in labels), kind)
    if job.method in FITTED:  # whose head the new base has, too
        verdict = verdict.replace("new base", "new base with this head").removesuffix(TRAIN_IT)
    return {kind: measured["accuracy"], "measured_on": measured["measured_on"], "verdict": verdict}


def judge(own: float, new: float, count: int, kind: str = "accuracy") -> str:
    """Whether a result is better than the new base, by the 95 % interval of the difference of two shares of ``count``
    labels (Agresti and Caffo, "Simple and Effective Confidence Intervals ...", 2000)."""
    shares = [(share * count + 1) / (count + 2) for share in (own, new)]
    error = 1.96 * math.sqrt(sum(share * (1 - share) / (count + 2) for share in shares))
    by = f"by {own - new:.3f} +- {error:.3f} ({kind} on {count} {'labels' if kind == 'accuracy' else 'inputs'}, 95 %)"
    if own - new > error:
        return f"better than the new base {by}"
    return f"no better than the new base {by}{TRAIN_IT}"
