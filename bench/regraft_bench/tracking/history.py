"""Error and cost of every scenario and method over commits, and where they made a step."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from rich.console import Console

from regraft_bench.report.tables import Sheet
from regraft_bench.rows import Row
from regraft_bench.study import TUNING_SEED
from regraft_bench.tracking.compare import CONFIDENCE, ERROR, Limits, relative_costs


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

    @property
    def became_worse(self) -> bool:
        """Whether its last step was for the worse."""
        return bool(self.steps) and self.values[self.steps[-1]] > self.values[self.steps[-1] - 1]


_Runs = Mapping[str, Sequence[float]]
"""Of each code, what each of its runs gave."""


def find_tracks(rows: Sequence[Row], limits: Limits | None = None) -> list[Track]:
    """Every method that was measured with two codes or more; nothing of older code is dropped.

    Rows of one device, machine and packages make a track: there equal code gives equal errors. A step of costs needs
    evidence, as in `regraft_bench.tracking.compare`: that the runs of both levels differ.
    """
    limits = limits or Limits()
    rows = sorted(rows, key=lambda row: row.time)
    by_method: dict[tuple[str, ...], dict[str, list[tuple[Row, float | None]]]] = {}
    for row, cost in zip(rows, relative_costs(rows), strict=True):
        if row.seed != TUNING_SEED and row.failure is None:
            key = (row.study, row.scenario, row.method, repr(row.environment.arithmetic), repr(row.config))
            by_method.setdefault(key, {}).setdefault(_code(row), []).append((row, cost))
    measured = [
        ((study, scenario, method, quantity), runs)
        for (study, scenario, method, *_), by_code in by_method.items()
        for quantity, runs in _quantities(by_code).items()
        if len(runs) > 1
    ]
    chance = (1 - CONFIDENCE) / max(1, len(measured))
    return [_make_track(name, runs, limits, chance) for name, runs in measured]


def _make_track(name: tuple[str, str, str, str], runs: _Runs, limits: Limits, chance: float) -> Track:
    average = statistics.fmean if name[-1] == ERROR else statistics.median
    values = [average(own) for own in runs.values()]
    marks = steps(values, name[-1], limits)
    if name[-1] != ERROR:
        ends = [0, *marks, len(values)]
        levels = [[cost for own in list(runs.values())[a:b] for cost in own] for a, b in pairwise(ends)]
        marks = tuple(
            at for at, (old, new) in zip(marks, pairwise(levels), strict=True) if _probability(old, new) < chance
        )
    return Track(*name, tuple(runs), tuple(values), marks)


def _probability(old: Sequence[float], new: Sequence[float]) -> float:
    """That runs of one level differ so much by chance (Welch's test of the logarithms); 1 for a single run a level."""
    from scipy import stats

    if min(len(old), len(new)) < 2:
        return 1.0
    a, b = ([math.log(value) for value in side] for side in (old, new))
    if statistics.pvariance(a) == statistics.pvariance(b) == 0:
        return float(a[0] == b[0])
    return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def _code(row: Row) -> str:
    name = (row.code.commit or row.code.regraft)[:10]
    return f"{name} with changes ({row.code.regraft[:6]})" if row.code.changed else name


def _quantities(by_code: dict[str, list[tuple[Row, float | None]]]) -> dict[str, _Runs]:
    errors, costs = {}, {}
    for name, own in by_code.items():
        if wrong := [1 - a for row, _ in own if (a := row.values.get("accuracy")) is not None]:
            errors[name] = wrong
        if known := [cost for _, cost in own if cost is not None]:
            costs[name] = known
    return {ERROR: errors, "cost": costs}


def steps(values: Sequence[float], quantity: str, limits: Limits | None = None) -> tuple[int, ...]:
    """Positions at which the level changes (PELT, l2 cost, by ruptures), of steps that are large enough."""
    import numpy as np
    import ruptures

    signal = np.asarray(values, dtype=float)
    limits = limits or Limits()
    scale = 1.0 if quantity == ERROR else max(float(np.median(np.abs(signal))), 1e-12)
    least = (limits.error_rise if quantity == ERROR else limits.slowdown) * scale
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
    notes = ("error in shares of 1; cost in units of the control of the same run (of a bench without one, in ms)",)
    return Sheet("History", heading, tuple(lines), notes)


def print_history(tracks: Sequence[Track], *, as_json: bool = False) -> int:
    """As a table, or as JSON; 1 where the last step of any was for the worse, else 0."""
    if as_json:
        print(json.dumps([asdict(track) for track in tracks], indent=1))
    else:
        Console(markup=False).print(tracks_sheet(tracks))
    return int(any(track.became_worse for track in tracks))
