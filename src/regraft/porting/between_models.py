"""A fine-tune onto a new base of another model: what is checked, made and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.core.clock import EVALUATION, Clock
from regraft.core.files import BadFile
from regraft.core.tensors import state
from regraft.porting.alignment import IN_MEMORY_COPIES
from regraft.porting.checkpoint_files import CheckpointFile, Layout, Lazy
from regraft.porting.fitting import measure_distances
from regraft.porting.job import Job, read_checkpoints
from regraft.porting.methods import PORT_METHODS, PortProblem, with_statistics
from regraft.porting.model_spec import ModelSpec, find_untraced
from regraft.porting.port_settings import BASE, NEW_BASE, ROLES, TUNED, PortSettings, prepare_work, settle
from regraft.porting.result import Made
from regraft.porting.travelling import list_travelling
from regraft.symmetry import PermutationSpec
from regraft.training.evaluation import accuracy


@dataclass(frozen=True, eq=False)
class JobBetweenModels(Job):
    """A port whose result has the names and shapes of the new base's model, and a head of the fine-tune's classes.

    Attributes:
        new_spec: that model.
    """

    new_spec: ModelSpec | None = None

    @property
    def head(self) -> tuple[str, ...]:
        """None is carried over: it is fitted."""
        return ()

    def describe(self) -> list[str]:
        """What was read, a sentence each."""
        return [*self.notes, "the new base is of another model: its head is fitted to the fine-tune's predictions"]

    def networks(self, device: str = "cpu") -> dict[str, Lazy]:
        """By role, each under the names of its own model; a head that the new base has not is 0."""
        assert self.new_spec is not None
        dtype, new = self.dtype, self.checkpoints[NEW_BASE]
        shapes = self.new_spec.layout.shapes

        def read(checkpoint: CheckpointFile, name: str) -> Tensor:
            tensor = checkpoint[name].to(device) if name in checkpoint else torch.zeros(shapes[name], device=device)
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        own = {role: Lazy(tuple(self.checkpoints[TUNED]), partial(read, self.checkpoints[role])) for role in ROLES[:2]}
        names = tuple(name for name in shapes if name in new or name not in self.new_spec.layout.optional)
        return own | {NEW_BASE: Lazy(names, partial(read, new))}


def plan_between_models(
    paths: Sequence[Path | str], out: Path | str | None, settings: PortSettings, resume: bool
) -> Job:
    """Everything that is checked before, as `regraft.porting.plan` does; paths: base, fine-tune, new base."""
    model_spec, own = read_checkpoints(list(zip(ROLES[:2], paths[:2], strict=True)), TUNED, settings)
    new_model = settings.get("new_model")
    assert model_spec is not None and new_model is not None
    model = model_spec.require_model().model
    outputs = model_spec.outputs(state(model)).shape[-1]
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    new_spec = find_untraced(new_model, settings, outputs, dtype)
    new = _fit_new_base(new_spec, CheckpointFile.open(paths[2], settings.get("key"), settings.get("max_memory")))
    common = own[BASE].entries.keys() & own[TUNED].entries.keys()
    checkpoints = {BASE: own[BASE], TUNED: own[TUNED], NEW_BASE: new}
    config = {name: str(settings.get(name)) for name in ("model", "new_model", "data", "key") if settings.get(name)}
    job: Job = JobBetweenModels(
        "auto", checkpoints, NEW_BASE, model_spec, _lay_out(new_spec, new), model_spec.load_data(settings), config,
        travelling=list_travelling(new.path, new.is_folder), new_spec=new_spec,
    )  # fmt: skip
    job = settle(job, settings.get("method"), settings)
    job = job.check_room(out, settings.get("max_memory"), copies=IN_MEMORY_COPIES, matches=False, resume=resume)
    base, tuned, new_base = job.networks().values()
    check = job.value_check(summed=0)
    measure_distances([Lazy(tuple(common), network.__getitem__) for network in (base, tuned, base)], check)
    for name in new_base:
        check(name, [new_base[name]] * 3)
    return job


def _fit_new_base(new_spec: ModelSpec, checkpoint: CheckpointFile) -> CheckpointFile:
    """Under the model's names, without a head of other classes. Raises BadFile for anything else that is not there."""
    fitted = new_spec.fit_base(checkpoint).with_counters(new_spec.layout.shapes)
    head = {name for name in new_spec.layout.shapes if name.rpartition(".")[0] == new_spec.head}
    lacking = [n for n in new_spec.layout.shapes if n not in fitted and n not in new_spec.layout.optional | head]
    if lacking:
        raise BadFile(f"{checkpoint.path} has no tensor {lacking[0]!r}, which the new model has and no head is")
    return fitted


def _lay_out(new_spec: ModelSpec, new: CheckpointFile) -> Layout:
    """The new base's tensors in its dtypes; a head that it has not in that of most of it."""
    floating = [entry for entry in new.entries.values() if entry.dtype.is_floating_point]
    common = max({e.dtype for e in floating}, key=lambda d: sum(e.numel for e in floating if e.dtype == d))
    shapes = {n: s for n, s in new_spec.layout.shapes.items() if n in new or n not in new_spec.layout.optional}
    return Layout.of({n: (new.entries[n].dtype if n in new else common, shape) for n, shape in shapes.items()}, 10**9)


def make_between_models(job: JobBetweenModels, part: Path, clock: Clock) -> Made:
    """The result, its statistics and what was measured of it."""
    assert job.model_spec is not None and job.new_spec is not None and job.data is not None
    model, new_model = job.model_spec.require_model().model, job.new_spec.require_model().model
    base, tuned, new_base = job.networks(job.model_spec.device).values()
    kind = job.data.judged_by
    labelled, work, measured = prepare_work(job, tuned, part, clock)
    work = replace(work, new_model=new_model)
    ported = PORT_METHODS[job.method](PortProblem(PermutationSpec({}, {}), base, tuned, new_base), work)
    tensors = ported.tensors if ported.keeps_statistics else with_statistics(ported.tensors, work)
    assert labelled.data is not None
    where, batches = labelled.data.measured_on
    scores: dict[str, Any] = {}
    with clock.phase(EVALUATION):
        scores["fine-tune on its own base"] = accuracy(model, dict(tuned.items()), batches)
        scores["result"] = accuracy(new_model, dict(tensors.items()), batches)
    return Made(tensors, ({},), measured | dict(ported.measured) | {kind: scores, "measured_on": where})
