"""A fine-tune onto a new base: checked, made, checked again, measured, and written whole or not at all."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from regraft.checkpoint_files import Checkpoint, Lazy, beside, check_free, keep_tensors, write_shards
from regraft.clock import EVALUATION, Clock, Cost
from regraft.evaluation import accuracy, batch_norms, reset_batchnorm
from regraft.porting.card import told_seconds, write_card
from regraft.porting.fitting import check_base, distances
from regraft.porting.methods import IN_MEMORY, METHODS, Ported, Weights, Work
from regraft.porting.plans import (
    FLOAT,
    PROOF,
    Plan,
    check_disk,
    check_memory,
    layout_like,
    streamed,
)
from regraft.porting.subject import Example, Model, Spec, lazy, numel, subject
from regraft.tensors import Perm, Tensors

BASE, TUNED, NEW_BASE = ROLES = "base", "fine-tune", "new base"

STATISTICS_BATCHES = 20
"""From which BatchNorm statistics are estimated anew."""


class Asked(TypedDict, total=False):
    """What may be said about a port.

    model: a name as `regraft.models.by_name` takes it, or a module; what streams can do with ``spec`` alone.
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
        base, tuned, new_base: checkpoints as `regraft.checkpoint_files.Checkpoint.open` reads them.
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
    if out is not None:
        check_free(Path(out))
    method, allowed = asked.get("method", "fgmt"), asked.get("max_memory")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    if method in IN_MEMORY and asked.get("data") is None:
        raise ValueError(f"method {method!r} takes gradients: it needs data")
    if (steps := asked.get("steps", 30)) < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    opened = {r: Checkpoint.open(p) for r, p in zip(ROLES, (base, tuned, new_base), strict=True)}
    whole = FLOAT * numel(opened[TUNED])
    if asked.get("spec") is None:
        check_memory(
            PROOF * whole, "proving the symmetry of the model (or give a proven one with spec)", allowed
        )
    found, fitted = subject(
        opened[TUNED], asked.get("model"), asked.get("inputs"), asked.get("spec"), asked.get("device", "cpu")
    )
    fitted_to = {TUNED: fitted, **{role: found.fitted(opened[role]) for role in (BASE, NEW_BASE)}}
    checkpoints = _alike({role: fitted_to[role] for role in ROLES})
    data = found.data(asked.get("data"), asked.get("device", "cpu"))
    layout = layout_like(checkpoints[TUNED], checkpoints[NEW_BASE], allowed)
    in_memory = method in IN_MEMORY or data is not None
    copies = 2 * steps + 8 if method in IN_MEMORY else 8
    needed, why = (copies * whole, "with data, the networks in memory") if in_memory else (
        streamed(None if method == "naive" else found.spec, layout) + (3 * whole if found.model else 0), "streaming"
    )  # fmt: skip
    memory = check_memory(needed, f"method {method!r} ({why})", allowed)
    if out is not None:
        check_disk(Path(out), layout.bytes)
    config = {"steps": steps} if method in IN_MEMORY else {}
    config |= {"model": str(asked["model"])} if isinstance(asked.get("model"), str) else {}
    config |= {"data": str(asked["data"])} if isinstance(asked.get("data"), str | Path) else {}
    made = Plan(method, checkpoints, found, layout, data, config, None, memory, in_memory)
    return replace(made, distances=_distances(made))


def _alike(checkpoints: dict[str, Checkpoint]) -> dict[str, Checkpoint]:
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
    sides = [_sides(made, device)[role] for role in ROLES]
    data, keep = made.data, partial(keep_tensors, part)
    model = found.classifier() if data is not None else None
    work = Work(
        model,
        data and data.train,
        data and data.validation,
        made.config.get("steps", 1),
        keep,
        clock,
    )
    ported = METHODS[made.method](found.spec, *sides, work)
    measured: dict[str, Any] = {}
    if found.model is not None:
        with clock.phase("checks"):
            measured["function_error"] = found.check_function(_base_with_head(made, sides), ported.perm)
    if data is None:
        return ported, measured
    ported = replace(ported, tensors=_with_statistics(model, ported.tensors, work))
    with clock.phase(EVALUATION):
        measured |= _measured(made, sides, ported, work)
    return ported, measured


def _base_with_head(made: Plan, sides: list[Lazy]) -> Tensors:
    """The base, with the fine-tune's head where it has none of its own: zeros would compute the same in any order."""
    base, tuned, _ = sides
    return {name: (tuned if name in made.head else base)[name] for name in tuned}


def _with_statistics(model: torch.nn.Module, tensors: Weights, work: Work) -> Weights:
    """With BatchNorm statistics of the data; the same tensors for a model without BatchNorm."""
    if not batch_norms(model):
        return tensors

    def estimate() -> Tensors:
        with work.clock.phase("batchnorm"):
            whole = reset_batchnorm(model, dict(tensors.items()), work.train, STATISTICS_BATCHES)
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
            work.model, plain.tensors, replace(work, keep=Work().keep, clock=Clock())
        ),
        "result": ported.tensors,
    }  # fmt: skip
    found = {name: accuracy(work.model, dict(theta.items()), batches) for name, theta in networks.items()}
    return {"accuracy": found, "measured_on": where}


def _copy_config(tuned: Checkpoint, part: Path) -> None:
    """transformers finds a model by the config.json that stands beside its weights."""
    config = tuned.path.parent / "config.json"
    if config.is_file():
        shutil.copyfile(config, part / "config.json")
