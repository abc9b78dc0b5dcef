"""A fine-tune onto a new base: checked, made, checked again, measured, and written whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from regraft.core.arguments import Count, NotNegative, check_arguments
from regraft.core.clock import EVALUATION, Clock
from regraft.core.forward import split
from regraft.core.tensors import Inputs, Tensors
from regraft.porting.alignment import IN_MEMORY_COPIES, measure_accuracies
from regraft.porting.auto import AUTO
from regraft.porting.checkpoint_files import CheckpointFile, Lazy
from regraft.porting.data import Unlabelled
from regraft.porting.fitting import measure_distances
from regraft.porting.function_ports import FITTED, TRAINED, UPDATES
from regraft.porting.job import Job, open_job, read_checkpoints
from regraft.porting.label_free import predict
from regraft.porting.methods import (
    ANY_MODEL,
    PORT_METHODS,
    STREAMED,
    VOTING_BATCHES,
    Ported,
    PortProblem,
    PortWork,
    Weights,
    with_statistics,
)
from regraft.porting.model_spec import Settings
from regraft.porting.output_folder import check_output, keep_tensors
from regraft.porting.result import Made, Result, run_job
from regraft.porting.spectral import with_singular_vectors

BASE, TUNED, NEW_BASE = ROLES = "base", "fine-tune", "new base"


class PortSettings(Settings, total=False):
    """What `port` takes besides the checkpoints: `Settings`, and

    method: of `PORT_METHODS`; "fgmt" if not given, "auto" where the data have no labels. All but "naive" and "weights"
        need ``data``. Where there are data, with any method accuracies are measured and, where the method has not
        made its own, BatchNorm statistics estimated anew.
    steps: T of the path of "fgmt", 30 if not given; updates of what trains, 100 if not given.
    lr: the learning rate of what trains; chosen among three if not given.
    labels: "none" leaves the labels of the data for training aside: the fine-tune's predictions stand in for them, as
        where the data have none. Test data keep theirs.
    new_model: the new base's model, where it is another one than ``model``, as that is given.
    """

    method: str | None
    steps: Count | None
    lr: NotNegative | None
    labels: Literal["given", "none"]
    new_model: str | nn.Module | None


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
    return run_job(job, out, partial(_make, job), clock, resume=resume)


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
    _check_settings(method, settings)
    if out is not None:
        check_output(Path(out))
    paths = list(zip(ROLES, (base, tuned, new_base), strict=True))
    model_spec, checkpoints = read_checkpoints(paths, TUNED, settings)
    job = open_job(method or "fgmt", (model_spec, _drop_uncommon(checkpoints)), TUNED, NEW_BASE, settings, {})
    job = _settle(job, method, settings)
    steps = job.config.get("steps", 1)
    # FGMT stacks a pair of gradients a step.
    copies = IN_MEMORY_COPIES + 2 * steps * ("gmt" in job.method)
    job = job.check_room(out, settings.get("max_memory"), copies=copies, matches=job.method != "naive", resume=resume)
    networks, check = job.networks(), job.value_check(summed=2)
    distances = measure_distances([networks[role] for role in ROLES], check)
    return replace(job, distances=distances, layout=replace(job.layout, infinite=frozenset(check.infinite)))


def _check_settings(method: str | None, settings: PortSettings) -> None:
    if method is not None and method not in PORT_METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(PORT_METHODS)}")
    if method not in STREAMED and settings.get("data") is None:
        raise ValueError(
            f"method {method or 'fgmt'!r} looks at inputs of the task: it needs data, with labels or without (--data; "
            "--method weights and naive need none)"
        )
    if settings.get("new_model") is not None and method not in (None, *ANY_MODEL):
        raise ValueError(
            f"method {method!r} needs a new base of the fine-tune's model; for another one there are "
            f"{', '.join(sorted(ANY_MODEL))}"
        )


def _settle(job: Job, method: str | None, settings: PortSettings) -> Job:
    """The job with its method and what that needs, which may depend on whether the data have labels."""
    data = job.data
    if data is not None and settings.get("labels") == "none":
        data = data.without_labels()
    labelled = data is None or "train" not in data.unlabelled
    if method is None:
        method = "fgmt" if labelled and settings.get("new_model") is None else AUTO
    if method == "few-shot" and not labelled:
        raise ValueError("method 'few-shot' trains on labels, and there are none: distil trains on the fine-tune's")
    steps = settings.get("steps") or (UPDATES if method in TRAINED else 30)
    config: dict[str, Any] = {} if method in STREAMED else {"steps": steps}
    config |= {"lr": settings["lr"]} if settings.get("lr") is not None and method in TRAINED else {}
    config |= {} if labelled else {"labels": "the fine-tune's predictions"}
    if data is not None and (method in FITTED or not labelled):
        data = data.hold_out()
    return replace(job, method=method, data=data, config=config | dict(job.config))


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
    work = PortWork(
        steps=job.config.get("steps", 1), lr=job.config.get("lr"), keep=partial(keep_tensors, part), clock=clock
    )
    measured: dict[str, Any] = {}
    if job.data is not None:
        model, raw = model_spec.require_model().model, job.data
        job = replace(job, data=raw.label(partial(_predict_classes, model, networks[TUNED])))
        assert job.data is not None
        work = replace(work, model=model, train=job.data.train, validation=job.data.validation)
        if "train" in raw.unlabelled:
            work = replace(work, inputs=Unlabelled(raw.train), labelled=False)
            measured |= _warn_of_one_class(work)
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
            measured |= _compare(job, problem, ported, work)
            if raw.measured_on[0] in raw.unlabelled:
                measured["agreement"] = measured.pop("accuracy")
    return Made(ported.tensors, (ported.perm,), measured)


def _predict_classes(model: nn.Module, tuned: Weights, inputs: Inputs) -> Tensor:
    return predict(model, dict(tuned.items()), [inputs])[0].argmax(-1)


def _warn_of_one_class(work: PortWork) -> dict[str, Any]:
    """What is to be said where the fine-tune gives all inputs that are looked at one class."""
    assert work.train is not None
    classes = torch.cat([split(batch)[1].flatten() for batch in islice(work.train, VOTING_BATCHES)])
    if len(classes) < 10 or len(classes.unique()) > 1:
        return {}
    said = f"the fine-tune puts all of {len(classes)} inputs into class {int(classes[0])}: are these data of its task?"
    return {"warning": said}


def _compare(job: Job, problem: PortProblem, ported: Ported, work: PortWork) -> dict[str, Any]:
    """Accuracies of the result and of what it is to be compared with, on the first of test, validation, train."""
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
    return measured | {"verdict": judge(own, new, sum(int((part >= 0).sum()) for part in labels))}


def judge(own: float, new: float, count: int) -> str:
    """Whether a result is better than the new base, by the 95 % interval of the difference of two shares of ``count``
    labels (Agresti and Caffo, "Simple and Effective Confidence Intervals ...", 2000)."""
    shares = [(share * count + 1) / (count + 2) for share in (own, new)]
    error = 1.96 * math.sqrt(sum(share * (1 - share) / (count + 2) for share in shares))
    by = f"by {own - new:.3f} +- {error:.3f} (accuracy on {count} labels, 95 %)"
    if own - new > error:
        return f"better than the new base {by}"
    return f"no better than the new base {by}: train it instead"
