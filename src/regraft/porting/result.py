"""A job done: its result written whole or not at all, resumed, and the model card beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import regraft
import regraft_kernels
from regraft import __version__
from regraft.core.clock import Clock, Cost
from regraft.core.files import tree_hash, write_text
from regraft.core.tensors import Perm
from regraft.core.text import clean_markdown
from regraft.porting.checkpoint_files import write_shards
from regraft.porting.job import Job
from regraft.porting.output_folder import beside

CARD = "README.md"


@dataclass(frozen=True)
class Made:
    """What a job makes.

    Attributes:
        tensors: to write, each made when it is asked for.
        perms: of each network that was aligned: pi, on the CPU.
        measured: quantities by name; those of one kind in a dictionary.
        texts: of further files, by name.
    """

    tensors: Mapping[str, Tensor]
    perms: tuple[Perm, ...]
    measured: dict[str, Any]
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What a port, an alignment or a sum was.

    Attributes:
        out: the folder: shards, their index, README.md.
        plan: what was planned.
        perms: of each network that was aligned: pi, on the CPU.
        measured: by name, such as "function_error", "accuracy" by network, "measured_on", "distance", "barrier".
        seconds: by phase.
    """

    out: Path
    plan: Job
    perms: tuple[Perm, ...]
    measured: dict[str, Any]
    seconds: dict[str, Cost]

    @property
    def perm(self) -> Perm:
        """The only permutation of a port or an alignment."""
        (perm,) = self.perms
        return perm

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "out": str(self.out),
            **self.plan.to_json(),
            **self.measured,
            "seconds": _seconds(self.seconds),
        }


def run_job(job: Job, out: Path | str, make: Callable[[Path, Clock], Made], clock: Clock, *, resume: bool) -> Result:
    """Do a job: make the tensors, write them and the card.

    make: of the folder that is being filled, where `keep_tensors` keeps what a resumed run need not make again, and the
    clock. resume: go on from what an interrupted run with the same inputs and settings has finished.
    """
    out = Path(out)
    with clock.phase("checks"):
        hashes = {role: checkpoint.sha256() for role, checkpoint in job.checkpoints.items()}
    with beside(out, _identity(job, hashes), resume=resume) as part:
        made = make(part, clock)
        with clock.phase("writing"):
            write_shards(part, job.layout, made.tensors)
        for file in job.travelling:
            shutil.copyfile(file, part / file.name)
        for name, text in made.texts.items():
            write_text(part / name, text)
        write_card(part, job, hashes, made.measured, clock.seconds)
    return Result(out, job, made.perms, made.measured, clock.seconds)


def _identity(job: Job, hashes: Mapping[str, str]) -> dict[str, Any]:
    """All that decides the bytes of a result: what is begun with one identity is not resumed with another."""
    code = [tree_hash(Path(str(package.__file__)).parent) for package in (regraft, regraft_kernels)]
    identity = {"method": job.method, "inputs": hashes, "files": len(job.layout.shards), **job.config}
    identity["code"] = [*code, torch.__version__]
    if job.model_spec is not None:
        identity |= job.model_spec.identity()
    if job.data is not None:
        identity["contents of the data"] = job.data.digest()
    return identity


def write_card(
    folder: Path, job: Job, hashes: Mapping[str, str], measured: Mapping[str, Any], cost: Mapping[str, Cost]
) -> None:
    """README.md: what was measured, as JSON front matter (which is YAML) and in words; what was not is absent.

    hashes: SHA-256 of each checkpoint's files.
    """
    plan = {key: value for key, value in job.to_json().items() if key not in ("checkpoints", "groups", "memory")}
    inputs = {role: {"name": c.path.name, "sha256": hashes[role]} for role, c in job.checkpoints.items()}
    card = {"version": __version__, **plan, "inputs": inputs, **measured, "seconds": _seconds(cost)}
    front = json.dumps({"library_name": "regraft", "regraft": card}, indent=1, allow_nan=False)
    body = "\n".join(_describe(job, hashes, measured, cost))
    write_text(folder / CARD, f"---\n{front}\n---\n\n{body}\n")


def _describe(job: Job, hashes: Mapping[str, str], measured: Mapping[str, Any], cost: Mapping[str, Cost]) -> list[str]:
    lines = [f"# {job.method}, by regraft {__version__}", "", "| input | file | SHA-256 |", "|---|---|---|"]
    lines += [f"| {role} | {clean_markdown(c.path.name)} | `{hashes[role]}` |" for role, c in job.checkpoints.items()]
    lines += ["", *(f"- {clean_markdown(sentence)}" for sentence in job.describe())]
    if "function_error" in measured:
        lines.append(
            "- a permuted base computes what the base computes: relative difference "
            f"{measured['function_error']:.1e} in float32"
        )
    if "verdict" in measured:
        lines.append(f"- the result is {measured['verdict']}")
    if "warning" in measured:
        lines.append(f"- {measured['warning']}")
    for kind, what in (("accuracy", "accuracy"), ("agreement", "agreement with the fine-tune")):
        if kind in measured:
            lines += ["", f"| {what}, on {measured['measured_on']} | |", "|---|---:|"]
            lines += [f"| {network} | {value:.4f} |" for network, value in measured[kind].items()]
    lines += _describe_choice(measured)
    lines += ["", "| cost | wall s | CPU s |", "|---|---:|---:|"]
    return lines + [f"| {phase} | {c.wall:.1f} | {c.cpu:.1f} |" for phase, c in cost.items()]


def _describe_choice(measured: Mapping[str, Any]) -> list[str]:
    """What `auto` tried, and what it chose."""
    if "candidates" not in measured:
        return []
    head = f"| tried on {measured['tried_on']} inputs, judged by {measured['judged_by']} | score | CPU s |"
    rows = [f"| {name} | {t['score']:.4f} | {t['cpu_seconds']:.2f} |" for name, t in measured["candidates"].items()]
    related = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in measured.get("relation", {}).items())
    lines = ["", f"Chosen: {measured['chosen']}.", "", head, "|---|---:|---:|", *rows]
    return [*lines, *(["", f"How related the bases are: {related}."] if related else [])]


def _seconds(cost: Mapping[str, Cost]) -> dict[str, dict[str, float]]:
    return {phase: {"wall": c.wall, "cpu": c.cpu} for phase, c in cost.items()}
