"""Traces and proves all of torchvision's classification models (or those named): `make test-models [ARGS=...]`.

Writes results/symmetry-torchvision.json and .md after every model: an interrupted run goes on where it stopped, and
a row is made again only where the code or the versions of torch and torchvision have changed.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torchvision.models as zoo
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from regraft import results
from regraft.symmetry import parameters_moved, trace, verify

RESULTS = Path(__file__).parents[1] / "results"
TABLE = RESULTS / "symmetry-torchvision.md"
ROWS = RESULTS / "symmetry-torchvision.json"

SIDE = 64
"""Pixels: what a model computes with is the same at any size that it takes, and small ones are fast."""
SIDES = {"inception_v3": 299, "maxvit_t": 224}
"""Where the auxiliary head, or the windows, need more."""


def side_of(name: str) -> int:
    return SIDES.get(name, 224 if name.startswith("vit_") else SIDE)


def make(name: str) -> nn.Module:
    """The untrained model; without the slow initialisation that two of them have (the proof draws its own values)."""
    slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    torch.manual_seed(0)
    return zoo.get_model(name, **slow)


def prove(name: str) -> dict[str, Any]:
    """One row. Raises what trace and verify raise."""
    model, side = make(name), side_of(name)
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    spec = trace(model, image)
    traced = time.perf_counter()
    error = verify(spec, model, image)
    proved = time.perf_counter()
    return {
        "groups": len(spec.groups),
        "units": sum(spec.groups.values()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "moved": parameters_moved(spec, model),
        "error": error,
        "seconds": {"trace": traced - started, "verify": proved - traced},
        "peak_memory": results.peak_memory(),
    }


def main() -> int:
    """0 where every model is proved."""
    environment = results.plain_data(results.environment())
    rows: dict[str, dict[str, Any]] = {}
    if ROWS.exists():
        rows = {row["model"]: row for row in json.loads(ROWS.read_text(encoding="utf-8"))}
    every = zoo.list_models(module=zoo)
    names = sys.argv[1:] or every
    if strange := set(names) - set(every):
        raise SystemExit(f"torchvision has no classification model {min(strange)!r}")
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            if not _is_current(rows.get(name), environment):
                rows[name] = {
                    "model": name,
                    "side": side_of(name),
                    **_attempt(name),
                    "environment": environment,
                }
                save([rows[n] for n in every if n in rows])
                if "failure" in rows[name]:
                    progress.console.print(f"{name}: {rows[name]['failure']}")
            progress.advance(task)
    failed = [name for name in names if "failure" in rows[name]]
    console.print(f"{len(names) - len(failed)} of {len(names)} models proved; see {TABLE}")
    return 1 if failed else 0


def _attempt(name: str) -> dict[str, Any]:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            row = prove(name)
        return {**row, "warnings": sorted({str(w.message) for w in caught if w.category is UserWarning})}
    except (ValueError, RuntimeError) as problem:
        return {"failure": f"{type(problem).__name__}: {problem}"}


def _is_current(row: dict[str, Any] | None, environment: dict[str, Any]) -> bool:
    """Whether a row was made by this code, with these versions, and is no failure."""
    same = ("code", "versions")
    return (
        row is not None
        and "failure" not in row
        and all(row["environment"][key] == environment[key] for key in same)
    )


def save(rows: list[dict[str, Any]]) -> None:
    """Writes both files: the table first, since the rows decide what is done again."""
    results.write(TABLE, table(rows))
    results.write(ROWS, json.dumps(rows, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: how it was made, then one line per model."""
    made = rows[-1]["environment"]
    versions = ", ".join(f"{name} {made['versions'][name]}" for name in ("python", "torch", "torchvision"))
    proved = [row for row in rows if "failure" not in row]
    seconds = sum(sum(row["seconds"].values()) for row in proved)
    commits = sorted(
        {f"{row['environment']['commit']}{' (dirty)' * bool(row['environment']['dirty'])}" for row in rows}
    )
    lines = [
        "# Permutation symmetries of torchvision's classification models",
        "",
        "Traced by `regraft.trace` and proved by `regraft.verify` (at least two random permutations each, float64,",
        "random parameters and statistics). *moved*: the share of the parameters that a random permutation moves to",
        "another place. *error*: the largest difference of the outputs, relative to the largest output.",
        "",
        f"- made by `make test-models` (`{made['command']}`), commit {', '.join(commits)}",
        f"- {versions}; {made['machine']}, {made['threads']} threads",
        f"- {len(proved)} of {len(rows)} models proved, largest error "
        f"{max((row['error'] for row in proved), default=0.0):.1e}, {seconds:.0f} s in all, "
        f"{max((row['peak_memory'] for row in proved), default=0) / 2**30:.1f} GiB of memory at most",
        "",
        "| model | input | groups | units | parameters | moved | error | trace [s] | verify [s] |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "failure" in row:
            lines.append(f"| {row['model']} | {row['side']} | {row['failure']} | | | | | | |")
            continue
        lines.append(
            f"| {row['model']} | {row['side']} | {row['groups']} | {row['units']} | {row['parameters']} | "
            f"{row['moved']:.2%} | {row['error']:.1e} | "
            f"{row['seconds']['trace']:.1f} | {row['seconds']['verify']:.1f} |"
        )
    remarks = [f"- {row['model']}: {remark}" for row in proved for remark in row["warnings"]]
    return "\n".join([*lines, *(["", *remarks] if remarks else [])]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
