"""Two sets of rows beside one another: is anything slower or less accurate than it was?

    changes = compare(read("before.jsonl"), read("after.jsonl"))
    worse = [change for change in changes if change.beyond(max_slowdown=0.1, max_error_rise=0.005)]

Errors are paired by seed. Costs are compared as ratios to a control of the same run (plain training, or what one would
write by hand), so that a slower machine is no regression, and only between rows of the same kind of machine. A verdict
needs a confidence interval; one measurement proves nothing and says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from regraft.studies.rows import Row
from regraft.studies.tables import Sheet, current

CONFIDENCE = 0.95
"""Of all intervals of a comparison together: each is widened by how many there are (Bonferroni)."""

BETTER, WORSE, NO_EVIDENCE, ONE_SIDED = "better", "worse", "no evidence", "on one side only"


@dataclass(frozen=True)
class Change:
    """One quantity of one method, before and after.

    Attributes:
        study, scenario, method: of what. quantity: "error", or "cost".
        before, after: means (error: share of 1; cost: in units of the control's); None where there is none.
        change: error: after - before, in shares of 1. cost: after / before - 1.
        low, high: of the confidence interval; None where one measurement a side allows none.
        n: seeds or rounds that it rests on.
        verdict: "better", "worse", "no evidence" or "on one side only".
    """

    study: str
    scenario: str
    method: str
    quantity: str
    before: float | None
    after: float | None
    change: float | None
    low: float | None
    high: float | None
    n: int
    verdict: str

    def beyond(self, max_slowdown: float, max_error_rise: float) -> bool:
        """Whether it is worse, and by more than is allowed."""
        if self.verdict != WORSE or self.change is None:
            return False
        return self.change > (max_slowdown if self.quantity == "cost" else max_error_rise)


@dataclass(frozen=True)
class _Sample:
    """Two lists of the same quantity; differences are of what is paired, or of two independent samples."""

    key: tuple[str, str, str]
    quantity: str
    before: Sequence[float]
    after: Sequence[float]
    paired: bool


def compare(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """Every method that both sides have: its error and its cost; and those that only one side has.

    Rows of another configuration, device kind or machine than the other side's are not compared. Raises ValueError
    where the two sides have nothing in common.
    """
    old, new = _by_method(before), _by_method(after)
    shared = [key for key in old if key in new]
    if not shared:
        raise ValueError("the two sides have no run of the same study, scenario, method and configuration")
    samples = [sample for key in shared for sample in _samples(key[:3], old[key], new[key], before, after)]
    level = 1 - (1 - CONFIDENCE) / max(1, len(samples))
    found = [_judged(sample, level) for sample in samples]
    lonely = [*(k for k in old if k not in new), *(k for k in new if k not in old)]
    return [*found, *(Change(*k[:3], "runs", None, None, None, None, None, 0, ONE_SIDED) for k in lonely)]


def _by_method(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for study in dict.fromkeys(row.study for row in rows):
        for row in current([row for row in rows if row.study == study]):
            key = (row.study, row.scenario, row.method, row.environment.kind, repr(row.config))
            found.setdefault(key, []).append(row)
    return found


def _samples(
    key: tuple[str, str, str], old: list[Row], new: list[Row], before: Sequence[Row], after: Sequence[Row]
) -> Iterable[_Sample]:
    seeds = sorted({row.seed for row in old} & {row.seed for row in new})
    errors = [
        [_error(row) for row in sorted(side, key=lambda r: r.seed) if row.seed in seeds]
        for side in (old, new)
    ]
    if seeds and all(error is not None for side in errors for error in side):
        yield _Sample(key, "error", *errors, paired=True)
    if {row.environment.machine for row in old} == {row.environment.machine for row in new}:
        costs = [relative_costs(side, rows) for side, rows in ((old, before), (new, after))]
        if all(costs):
            yield _Sample(key, "cost", *costs, paired=False)


def _error(row: Row) -> float | None:
    """Of a run: 1 - accuracy; everything is wrong where it failed; None where a study measures no accuracy."""
    if row.failure is not None:
        return 1.0
    accuracy = row.values.get("accuracy")
    return None if accuracy is None else 1.0 - accuracy


def relative_costs(rows: Sequence[Row], everything: Sequence[Row]) -> list[float]:
    """What each round of each row took, over the same round (or the whole) of its control; empty without a control.

    The control is the method that the row's configuration names as ``beside``, else plain training.
    """
    found = []
    for row in rows:
        name = row.config.get("method", {}).get("beside", "plain")
        control = next(
            (
                other
                for other in reversed(everything)
                if (other.study, other.scenario, other.method, other.seed)
                == (row.study, row.scenario, name, row.seed)
            ),
            None,
        )
        if control is None or control.method == row.method:
            continue
        own, theirs = rounds(row), rounds(control)
        if len(own) == len(theirs) and len(own) > 1:
            found += [a / b for a, b in zip(own, theirs, strict=True) if a > 0 and b > 0]
        elif own and theirs and min(theirs) > 0:
            found += [a / statistics.median(theirs) for a in own if a > 0]
    return found


ROUNDS = ("time by round [ms]", "cost by round [s]")


def rounds(row: Row) -> list[float]:
    """Seconds (or milliseconds) of every round of a row; its one cost where there is no more."""
    for name in ROUNDS:
        if name in row.series:
            return [value for _, value in row.series[name].points()]
    return [row.seconds] if row.failure is None and row.seconds > 0 else []


def _judged(sample: _Sample, level: float) -> Change:
    """Errors by the paired differences, costs by the difference of the mean logarithms (Welch)."""
    if sample.quantity == "error":
        differences = [b - a for a, b in zip(sample.before, sample.after, strict=True)]
        change, half = statistics.fmean(differences), _half_width(differences, level)
        low, high = (None, None) if half is None else (change - half, change + half)
        before, after = statistics.fmean(sample.before), statistics.fmean(sample.after)
    else:
        logs = [[math.log(value) for value in side] for side in (sample.before, sample.after)]
        middle, half = statistics.median(logs[1]) - statistics.median(logs[0]), _welch(*logs, level)
        change = math.expm1(middle)
        low, high = (None, None) if half is None else (math.expm1(middle - half), math.expm1(middle + half))
        before, after = (math.exp(statistics.median(side)) for side in logs)
    n = min(len(sample.before), len(sample.after))
    return Change(
        *sample.key, sample.quantity, before, after, change, low, high, n, _verdict(change, low, high)
    )


def _verdict(change: float, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return NO_EVIDENCE
    if low > 0 and change > 0:
        return WORSE
    return BETTER if high < 0 and change < 0 else NO_EVIDENCE


def _half_width(values: Sequence[float], level: float) -> float | None:
    """Of the t interval of a mean; None for one value. Equal values have no width."""
    from scipy import stats

    if len(values) < 2:
        return None
    return (
        float(stats.t.ppf((1 + level) / 2, len(values) - 1))
        * statistics.stdev(values)
        / math.sqrt(len(values))
    )


def _welch(a: Sequence[float], b: Sequence[float], level: float) -> float | None:
    """Of the interval of a difference of two independent means."""
    from scipy import stats

    if len(a) < 2 or len(b) < 2:
        return None
    parts = [statistics.variance(side) / len(side) for side in (a, b)]
    total = sum(parts)
    if total == 0:
        return 0.0
    freedom = total**2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, (a, b), strict=True))
    return float(stats.t.ppf((1 + level) / 2, freedom)) * math.sqrt(total)


# ---------------------------------------------------------------- shown


def sheet(changes: Sequence[Change], everything: bool = False) -> Sheet:
    """What changed, the worst first; with `everything` also what did not."""
    order = {WORSE: 0, ONE_SIDED: 1, BETTER: 2, NO_EVIDENCE: 3}
    shown = [c for c in changes if everything or c.verdict != NO_EVIDENCE]
    lines = tuple(_line(c) for c in sorted(shown, key=lambda c: (order[c.verdict], -abs(c.change or 0))))
    few = sum(c.verdict == NO_EVIDENCE and c.low is None for c in changes)
    notes = [f"{len(changes)} comparisons; {sum(c.verdict == WORSE for c in changes)} worse"]
    notes += [f"{few} rest on one measurement a side, which proves nothing: run more seeds or rounds"] * bool(
        few
    )
    heading = ("study, scenario, method", "of", "before", "after", "change", "interval", "n", "verdict")
    return Sheet("What changed", heading, lines, tuple(notes))


def _line(change: Change) -> tuple[str, ...]:
    name = f"{change.study}, {change.scenario}, {change.method}"
    if change.change is None:
        return (name, change.quantity, "–", "–", "–", "–", "0", change.verdict)
    form = "{:+.1%}" if change.quantity == "cost" else "{:+.4f}"
    interval = "–" if change.low is None else f"{form.format(change.low)} to {form.format(change.high)}"
    means = (f"{value:.4g}" for value in (change.before, change.after))
    return (
        name,
        change.quantity,
        *means,
        form.format(change.change),
        interval,
        str(change.n),
        change.verdict,
    )
