"""The model card that is written beside a result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft import __version__
from regraft.core.clock import Cost
from regraft.core.files import write_text
from regraft.porting.plans import Plan

NAME = "README.md"


def write_card(
    folder: Path, plan: Plan, hashes: Mapping[str, str], found: Mapping[str, Any], cost: Mapping[str, Cost]
) -> None:
    """README.md: what was measured, as JSON front matter (which is YAML) and in words; what was not is absent.

    hashes: SHA-256 of each checkpoint's files. found: quantities by name, those of ``accuracy`` by network.
    """
    data = {
        "library_name": "regraft",
        "regraft": {
            "version": __version__,
            **{
                key: value
                for key, value in plan.told().items()
                if key not in ("checkpoints", "groups", "memory")
            },
            "inputs": {
                role: {"name": c.path.name, "sha256": hashes[role]} for role, c in plan.checkpoints.items()
            },
            **found,
            "seconds": told_seconds(cost),
        },
    }
    front = json.dumps(data, indent=1, allow_nan=False)
    write_text(folder / NAME, f"---\n{front}\n---\n\n" + "\n".join(_words(plan, hashes, found, cost)) + "\n")


def _words(
    plan: Plan, hashes: Mapping[str, str], found: Mapping[str, Any], cost: Mapping[str, Cost]
) -> list[str]:
    lines = [f"# {plan.method}, by regraft {__version__}", "", "| input | file | SHA-256 |", "|---|---|---|"]
    lines += [f"| {role} | {c.path.name} | `{hashes[role]}` |" for role, c in plan.checkpoints.items()]
    lines += ["", *(f"- {note}" for note in plan.notes)]
    if plan.head:
        lines.append(
            "- The fine-tune has other classes than the base: its head is carried over, permuted on its input side "
            f"({', '.join(plan.head)})."
        )
    if plan.distances:
        lines.append(
            f"- Relative distance of the fine-tune: {plan.distances.base:.3f} from its base, "
            f"{plan.distances.new_base:.3f} from the new base (0: equal, 1: unrelated)."
        )
    if "function_error" in found:
        lines.append(
            "- A permuted base computes what the base computes: relative difference "
            f"{found['function_error']:.1e} in float32."
        )
    if "accuracy" in found:
        lines += ["", f"| accuracy, on {found['measured_on']} | |", "|---|---:|"]
        lines += [f"| {network} | {value:.4f} |" for network, value in found["accuracy"].items()]
    lines += ["", "| cost | wall s | CPU s |", "|---|---:|---:|"]
    return lines + [f"| {phase} | {c.wall:.1f} | {c.cpu:.1f} |" for phase, c in cost.items()]


def told_seconds(cost: Mapping[str, Cost]) -> dict[str, dict[str, float]]:
    """As JSON data."""
    return {phase: {"wall": c.wall, "cpu": c.cpu} for phase, c in cost.items()}
