"""A fine-tune onto a new base: checked, made, checked again, measured, and written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

from torch import Tensor

from regraft.core.clock import EVALUATION, Clock, Cost
from regraft.core.tensors import Perm, Tensors
from regraft.porting.card import told_seconds, write_card
from regraft.porting.checkpoint_files import (
    CheckpointFile,
    Layout,
    Lazy,
    beside,
    check_free,
    keep_tensors,
    write_shards,
)
from regraft.porting.fitting import check_base, distances
from regraft.porting.methods import IN_MEMORY, METHODS, Ported, Weights, Work
from regraft.porting.plans import (
    FLOAT,
    PROOF,
    PROVING,
    Plan,
    check_disk,
    check_memory,
    layout_like,
    streamed,
)
from regraft.porting.subject import Example, Model, Spec, Subject, lazy, numel, subject
from regraft.training.evaluation import accuracy, batch_norms, reset_batchnorm

BASE, TUNED, NEW_BASE = ROLES = "base", "fine-tune", "new base"

STATISTICS_BATCHES = 20
"""From which BatchNorm statistics are estimated anew."""


class Asked(TypedDict, total=False):
    """What may be said about a port.

    model: a name as `regraft.porting.models.by_name` takes it, or a module; what streams can do with ``spec`` alone.
    inputs: example inputs of the model, batch first, or for a named model their shape; its usual ones if not given.
    spec: its proven permutation groups, or their file; traced and proven on the model if not given.
    data: a folder of images or ``module:function`` (`data_by_name`), or batches (`data_of`). Method "fgmt" takes
        gradients on them; with any method accuracies are measured and BatchNorm statistics estimated anew.
    method: of `METHODS`.
    steps: T of "fgmt".
    max_memory: bytes that the process may hold; what the machine has if not given.
    device: where to compute.
    """

    model: Model | None
    inputs: Example
    spec: Spec | None
    data: object
    method: str
    steps: int
    max_memory: int | None
    device: str


DEFAULTS: Asked = {
    "model": None,
    "inputs": None,
    "spec": None,
    "data": None,
    "method": "fgmt",
    "steps": 30,
    "max_memory": None,
    "device": "cpu",
}


@dataclass(frozen=True)
class Port:
    """What a port was.

    Attributes:
        out: the folder: shards, their index, README.md.
        plan: what was planned.
        perm: pi, on the CPU.
        found: what was measured, by name: "function_error", "accuracy" by network, "measured_on".
        seconds: by phase.
    """

    out: Path
    plan: Plan
    perm: Perm
    found: dict[str, Any]
    seconds: dict[str, Cost]

    def told(self) -> dict[str, Any]:
        """As JSON data."""
        return {"out": str(self.out), **self.plan.told(), **self.found, "seconds": told_seconds(self.seconds)}


def port(
    base: Path | str,
    tuned: Path | str,
    new_base: Path | str,
    out: Path | str,
    *,
    resume: bool = False,
    **asked: Unpack[Asked],
) -> Port:
    """Bring what a fine-tuning changed in ``base`` onto ``new_base``, and write the result as a checkpoint.

    ``result = new_base + scale pi (tuned - base)``: the methods differ in pi, and are functions of three dictionaries
    in `regraft.porting.METHODS`. Floating tensors are computed in float32 and written in the dtype of the new base,
    integers are the new base's. A head of other classes than the bases' is carried over, permuted on its input side.

    Args:
        base, tuned, new_base: checkpoints as `regraft.porting.checkpoint_files.Checkpoint.open` reads them.
        out: a folder that is not there yet; it is made beside and renamed when it is complete.
        resume: go on from what an interrupted run with the same inputs and settings has finished.
        asked: see `Asked`.

    Raises BadFile (a ValueError) for files that are damaged, of another architecture, of another base, or not finite;
    OSError for files that are not there, too little memory or disk, or something at ``out``; ValueError for what is
    asked wrongly. All before any work; the tensor or path is named.
    """
    out, clock = Path(out), Clock()
    with clock.phase("checks"):
        made = plan(base, tuned, new_base, out, **asked)
        hashes = {role: checkpoint.sha256() for role, checkpoint in made.checkpoints.items()}
    identity = {"method": made.method, "inputs": hashes, "files": len(made.layout.shards), **made.config}
    with beside(out, identity, resume=resume) as part:
        ported, found = _make(made, part, clock)
        with clock.phase("writing"):
            write_shards(part, made.layout, ported.tensors)
        _copy_config(made.checkpoints[TUNED], part)
        write_card(part, made, hashes, found, clock.seconds)
    return Port(out, made, ported.perm, found, clock.seconds)


def plan(
    base: Path | str,
    tuned: Path | str,
    new_base: Path | str,
    out: Path | str | None = None,
    **asked: Unpack[Asked],
) -> Plan:
    """Everything that is checked before a port, and what it would do. Raises as `port` does."""
    chosen: Asked = {**DEFAULTS, **asked}
    _check_asked(chosen)
    if out is not None:
        check_free(Path(out))
    found, checkpoints = _fitted((base, tuned, new_base), chosen)
    data = found.data(chosen["data"], chosen["device"])
    layout = layout_like(checkpoints[TUNED], checkpoints[NEW_BASE], chosen["max_memory"])
    in_memory = data is not None
    needed = (
        _copies(chosen) * FLOAT * numel(checkpoints[TUNED]) if in_memory else _streamed(chosen, found, layout)
    )
    memory = check_memory(needed, _why(chosen), chosen["max_memory"])
    if out is not None:
        check_disk(Path(out), layout.bytes)
    config: dict[str, Any] = {"steps": chosen["steps"]} if chosen["method"] in IN_MEMORY else {}
    config |= {name: str(chosen[name]) for name in ("model", "data") if isinstance(chosen[name], str | Path)}
    made = Plan(chosen["method"], checkpoints, found, layout, data, config, None, memory, in_memory)
    return replace(made, distances=_distances(made))


def _check_asked(asked: Asked) -> None:
    method = asked["method"]
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    if method in IN_MEMORY and asked["data"] is None:
        raise ValueError(f"method {method!r} takes gradients: it needs data")
    if asked["steps"] < 1:
        raise ValueError(f"steps must be at least 1, got {asked['steps']}")


def _fitted(paths: Sequence[Path | str], asked: Asked) -> tuple[Subject, dict[str, CheckpointFile]]:
    """The network, proven, and the three checkpoints under its names."""
    opened = {role: CheckpointFile.open(path) for role, path in zip(ROLES, paths, strict=True)}
    if asked["spec"] is None:
        check_memory(PROOF * FLOAT * numel(opened[TUNED]), PROVING, asked["max_memory"])
    found, tuned = subject(opened[TUNED], asked["model"], asked["inputs"], asked["spec"], asked["device"])
    bases = {role: found.fitted(opened[role]) for role in (BASE, NEW_BASE)}
    return found, _alike({role: {**bases, TUNED: tuned}[role] for role in ROLES})


def _copies(asked: Asked) -> int:
    """Of the model in float32, at the peak of what holds it in memory: FGMT stacks a pair of gradients a step."""
    return 8 + 2 * asked["steps"] * ("fgmt" in asked["method"])


def _streamed(asked: Asked, found: Subject, layout: Layout) -> int:
    """Bytes, for what reads tensor by tensor; a model that is there is run once, to check its function."""
    spec = None if asked["method"] == "naive" else found.spec
    model = 3 * FLOAT * sum(p.numel() for p in found.model.parameters()) if found.model is not None else 0
    return max(streamed(spec, layout), model)


def _why(asked: Asked) -> str:
    how = "tensor by tensor" if asked["data"] is None else "with data, and so the networks in memory"
    return f"method {asked['method']!r} ({how})"


def _alike(checkpoints: dict[str, CheckpointFile]) -> dict[str, CheckpointFile]:
    """With the head tensors that only some have taken out of all but the fine-tune, and no counter that one lacks."""
    tuned = checkpoints[TUNED]
    lacking = {name for name in tuned for role in (BASE, NEW_BASE) if name not in checkpoints[role]}
    counters = {name for name in lacking if not tuned.entries[name].dtype.is_floating_point}
    tuned = tuned.without(counters, "a base has no such counter")
    why = "another base has it for other classes, or not at all"
    found = {
        r: c.without(c.entries.keys() - (tuned.entries.keys() - lacking), why) for r, c in checkpoints.items()
    }
    return {**found, TUNED: tuned}


def _sides(made: Plan, device: str = "cpu") -> dict[str, Lazy]:
    tuned = made.checkpoints[TUNED]
    return {role: lazy(checkpoint, tuned, device) for role, checkpoint in made.checkpoints.items()}


def _distances(made: Plan) -> Any:
    """Checked: the fine-tune comes from its base, and all values are finite."""
    sides = _sides(made)
    paths = [str(made.checkpoints[role].path) for role in ROLES]
    found = distances(sides[BASE], sides[TUNED], sides[NEW_BASE], paths)
    check_base(found, paths[0], paths[2])
    return found


def _make(made: Plan, part: Path, clock: Clock) -> tuple[Ported, dict[str, Any]]:
    """The result, its statistics and what was measured of it."""
    found = made.subject
    assert found is not None
    device = "cpu" if found.model is None else str(next(found.model.parameters()).device)
    base, tuned, new_base = sides = [_sides(made, device)[role] for role in ROLES]
    work = Work(steps=made.config.get("steps", 1), keep=partial(keep_tensors, part), clock=clock)
    if made.data is not None:
        data = made.data
        work = replace(work, model=found.classifier(), train=data.train, validation=data.validation)
    ported = METHODS[made.method](found.spec, base, tuned, new_base, work)
    measured: dict[str, Any] = {}
    if found.model is not None:
        with clock.phase("checks"):
            measured["function_error"] = found.check_function(_base_with_head(made, sides), ported.perm)
    if made.data is None:
        return ported, measured
    ported = replace(ported, tensors=_with_statistics(ported.tensors, work))
    with clock.phase(EVALUATION):
        measured |= _measured(made, sides, ported, work)
    return ported, measured


def _base_with_head(made: Plan, sides: list[Lazy]) -> Tensors:
    """The base, with the fine-tune's head where it has none of its own: zeros would compute the same in any order."""
    base, tuned, _ = sides
    return {name: (tuned if name in made.head else base)[name] for name in tuned}


def _with_statistics(tensors: Weights, work: Work) -> Weights:
    """With BatchNorm statistics of the data; the same tensors for a model without BatchNorm."""
    model, train = work.gradients("an estimate of statistics")
    if not batch_norms(model):
        return tensors

    def estimate() -> Tensors:
        with work.clock.phase("batchnorm"):
            whole = reset_batchnorm(model, dict(tensors.items()), train, STATISTICS_BATCHES)
        names = [
            f"{n}.{s}"
            for n in batch_norms(model)
            for s in ("running_mean", "running_var", "num_batches_tracked")
        ]
        return {name: whole[name] for name in names if name in tensors}

    statistics = work.keep("statistics", estimate)

    def read(name: str) -> Tensor:
        return statistics[name] if name in statistics else tensors[name]

    return Lazy(tuple(tensors), read)


def _measured(made: Plan, sides: list[Lazy], ported: Ported, work: Work) -> dict[str, Any]:
    """Accuracies of the result and of what it is to be compared with, on the first of test, validation, train."""
    base, tuned, new_base = sides
    assert made.data is not None and made.subject is not None and work.model is not None
    where, batches = made.data.measured_on
    plain = METHODS["naive"](made.subject.spec, base, tuned, new_base, Work())
    networks: dict[str, Weights] = {
        "fine-tune on its own base": tuned,
        "new base": Lazy(tuple(tuned), lambda n: (ported.tensors if n in made.head else new_base)[n]),
        "naive sum": ported.tensors if made.method == "naive" else _with_statistics(
            plain.tensors, replace(work, keep=Work().keep, clock=Clock())
        ),
        "result": ported.tensors,
    }  # fmt: skip
    found = {name: accuracy(work.model, dict(theta.items()), batches) for name, theta in networks.items()}
    return {"accuracy": found, "measured_on": where}


def _copy_config(tuned: CheckpointFile, part: Path) -> None:
    """transformers finds a model by the config.json that stands beside its weights."""
    config = tuned.path.parent / "config.json"
    if config.is_file():
        shutil.copyfile(config, part / "config.json")
