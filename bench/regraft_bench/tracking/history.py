"""Error and cost of every scenario and method over commits, and where they made a step."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from rich.console import Console

from regraft_bench.report.tables import Sheet
from regraft_bench.rows import Row
from regraft_bench.study import TUNING_SEED
from regraft_bench.tracking.compare import relative_costs

SMALLEST_STEP = {"error": 0.005, "cost": 0.10}
"""Smaller steps are not reported: in shares of 1 for errors, in shares of the value for costs."""


@dataclass(frozen=True)
class Track:
    """One quantity of one method over the codes that it was measured with, oldest first.

    codes: the commit's first ten digits, and the tree's where that had changes. values: the mean of each code's rows.
    steps: positions at which a new level begins.
    """

    study: str
    scenario: str
    method: str
    quantity: str
    codes: tuple[str, ...]
    values: tuple[float, ...]
    steps: tuple[int, ...]


def find_tracks(rows: Sequence[Row]) -> list[Track]:
    """Every method that was measured with two codes or more; nothing of older code is dropped."""
    rows = sorted(rows, key=lambda row: row.time)
    by_method: dict[tuple[str, ...], dict[str, list[tuple[Row, float | None]]]] = {}
    for row, cost in zip(rows, relative_costs(rows), strict=True):
        if row.seed != TUNING_SEED and row.failure is None:
            key = (row.study, row.scenario, row.method, row.environment.machine, repr(row.config))
            by_method.setdefault(key, {}).setdefault(_code(row), []).append((row, cost))
    tracks = []
    for (study, scenario, method, *_), by_code in by_method.items():
        for quantity, values in _quantities(by_code).items():
            if len(values) > 1:
                codes, series = tuple(values), tuple(values.values())
                marks = steps(series, quantity)
                tracks.append(Track(study, scenario, method, quantity, codes, series, marks))
    return tracks


def _code(row: Row) -> str:
    name = (row.code.commit or row.code.regraft)[:10]
    return f"{name} with changes ({row.code.regraft[:6]})" if row.code.changed else name


def _quantities(by_code: dict[str, list[tuple[Row, float | None]]]) -> dict[str, dict[str, float]]:
    errors, costs = {}, {}
    for name, own in by_code.items():
        accuracies = [a for row, _ in own if (a := row.values.get("accuracy")) is not None]
        if accuracies:
            errors[name] = 1 - statistics.fmean(accuracies)
        known = [cost for _, cost in own if cost is not None]
        if known:
            costs[name] = statistics.median(known)
    return {"error": errors, "cost": costs}


def steps(values: Sequence[float], quantity: str) -> tuple[int, ...]:
    """Positions at which the level changes (PELT, l2 cost, by ruptures), of steps that are large enough."""
    import numpy as np
    import ruptures

    signal = np.asarray(values, dtype=float)
    scale = 1.0 if quantity == "error" else max(float(np.median(np.abs(signal))), 1e-12)
    least = SMALLEST_STEP[quantity] * scale
    if len(signal) == 2:
        ends = [1, 2]
    else:
        # a step of `least` over one commit pays for itself; smaller ones do not
        ends = ruptures.Pelt(model="l2", min_size=1, jump=1).fit(signal).predict(pen=least**2 / 2)
    levels = [signal[a:b].mean() for a, b in pairwise([0, *ends])]
    return tuple(at for at, (low, high) in zip(ends[:-1], pairwise(levels), strict=True) if abs(high - low) >= least)


def tracks_sheet(tracks: Sequence[Track]) -> Sheet:
    """Every track in a line, those with a step first, and where it is."""
    lines = []
    for track in sorted(tracks, key=lambda track: -len(track.steps)):
        marks = "; ".join(
            f"at {track.codes[at]}: {track.values[at - 1]:.4g} -> {track.values[at]:.4g}" for at in track.steps
        )
        name = f"{track.study}, {track.scenario}, {track.method}"
        ends = (f"{value:.4g}" for value in (track.values[0], track.values[-1]))
        lines.append((name, track.quantity, str(len(track.codes)), *ends, marks or "–"))
    heading = ("study, scenario, method", "of", "codes", "first", "last", "steps")
    notes = ("error in shares of 1; cost in units of the control of the same run",)
    return Sheet("History", heading, tuple(lines), notes)


def print_history(tracks: Sequence[Track], *, as_json: bool = False) -> None:
    """As a table, or as JSON."""
    if as_json:
        print(json.dumps([asdict(track) for track in tracks], indent=1))
    else:
        Console(markup=False).print(tracks_sheet(tracks))
