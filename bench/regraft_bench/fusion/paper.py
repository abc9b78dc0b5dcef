"""The paper's tables as data: "Rethinking the Dependence Between Gradients and the Initial Point in Deep Learning".

They lie in ``published`` as JSON, one file each: "1" to "6" of the main text, "A1" to "A19" of the appendix.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Published:
    """One table as published.

    table: "1" to "6", or "A1" to "A19". values: accuracies from 0 to 1, row by row. rows, columns: what a row and a
    column stand for (alpha, beta, or names), by row_name and column_name. task: the data set that accuracies are on
    ("" where there are two). scale: "small" (4 training images a class), "medium" (100) or "large" (all).
    evaluated_on: "test", or whose training images. targets: "random" or "trained". alone: accuracies of theta_A and g
    that the caption gives.
    """

    table: str
    title: str
    task: str
    formula: str
    scale: str
    evaluated_on: str
    row_name: str
    rows: tuple[Any, ...]
    column_name: str
    columns: tuple[Any, ...]
    values: tuple[tuple[float, ...], ...]
    targets: str = ""
    figure: str = ""
    alone: dict[str, float] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """The formula, and where it is evaluated, in a few words."""
        if not self.formula:
            return "sequential training, both orders; large scale"
        images = "the test set" if self.evaluated_on == "test" else f"the {self.evaluated_on}"
        return f"{self.formula}; {self.scale} scale, on {images} of {self.task}"


@cache
def load_published() -> dict[str, Published]:
    """Every table by its number, those of the main text first."""
    folder = files("regraft_bench.fusion") / "published"
    tables = [
        _read(json.loads(file.read_text(encoding="utf-8"))) for file in folder.iterdir() if file.name.endswith(".json")
    ]
    return {t.table: t for t in sorted(tables, key=lambda t: (t.table.startswith("A"), int(t.table.strip("A"))))}


def _read(raw: dict[str, Any]) -> Published:
    unit = {"percent": 100.0, "fraction": 1.0}[raw["unit"]]
    return Published(
        table=raw["table"],
        title=raw["title"],
        task=raw.get("task", ""),
        formula=raw.get("formula", ""),
        scale=raw["scale"],
        evaluated_on=raw.get("evaluated_on", ""),
        row_name=raw["rows"]["name"],
        rows=tuple(raw["rows"]["values"]),
        column_name=raw["columns"]["name"],
        columns=tuple(raw["columns"]["values"]),
        values=tuple(tuple(value / unit for value in row) for row in raw["values"]),
        targets=raw.get("targets", ""),
        figure=raw.get("figure", ""),
        alone=raw.get("alone", {}),
    )
