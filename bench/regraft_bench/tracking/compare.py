"""Two sets of rows beside one another: is anything slower or less accurate than it was?

    changes = find_changes(read_rows("before.jsonl"), read_rows("after.jsonl"))
    worse = [change for change in changes if Limits(slowdown=0.1, error_rise=0.005).is_exceeded_by(change)]

Errors are paired by seed. On the same kind of machine with the same packages they are bit for bit the same unless the
code's arithmetic changed, so that there any rise is one, whatever an interval says. Costs are compared as ratios to a
control of the same run (plain training, or what one would write by hand), so that a slower machine is no regression,
and only between rows of the same kind of machine. One run is one measurement, however many rounds it took: rounds
within one process are not independent. A verdict needs a confidence interval; one measurement proves nothing, and it
is said so.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console

from regraft_bench.report.tables import Sheet
from regraft_bench.rows import Row
from regraft_bench.study import TUNING_SEED

CONFIDENCE = 0.95
"""Of all intervals of a comparison together: each is widened by how many there are (Bonferroni)."""

BETTER, WORSE, NO_EVIDENCE, ONE_SIDED = "better", "worse", "no evidence", "on one side only"
CHANGED = "changed"
"""Where equal code would give equal bits: the numbers moved, and the seeds do not say whether for the worse."""


@dataclass(frozen=True)
class Change:
    """One quantity of one method, before and after.

    Attributes:
        study, scenario, method: of what. quantity: "error", or "cost".
        before, after: means (error: share of 1; cost: in units of the control's); None where there is none.
        change: error: after - before, in shares of 1. cost: after / before - 1.
        low, high: of the confidence interval; None where one measurement a side allows none.
        n: seeds, or pairs of runs, that it rests on.
        verdict: "better", "worse", "changed", "no evidence" or "on one side only".
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


@dataclass(frozen=True)
class Limits:
    """What may become worse, and how many pairs of turns are taken to find out.

    slowdown: share of a cost; error_rise: in shares of 1; least, most: turns.
    """

    slowdown: float = 0.1
    error_rise: float = 0.005
    least: int = 4
    most: int = 12

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"turns must be at least 1, and at most no fewer: {self.least} to {self.most}")

    def is_exceeded_by(self, change: Change) -> bool:
        """Whether it is worse (or moved where nothing should move), and by more than is allowed."""
        if change.verdict not in (WORSE, CHANGED) or change.change is None:
            return False
        return change.change > (self.slowdown if change.quantity == "cost" else self.error_rise)

    def is_undecided(self, change: Change) -> bool:
        """Whether it looks slower by half of what is allowed, without evidence."""
        looks_slower = change.quantity == "cost" and (change.change or 0.0) > self.slowdown / 2
        return looks_slower and change.verdict == NO_EVIDENCE


@dataclass(frozen=True)
class _Run:
    """A row, and what it took in units of what its control took (None: it has none)."""

    row: Row
    cost: float | None


@dataclass(frozen=True)
class _Sample:
    """Pairs (before, after) of the same quantity: errors, or costs. exact: equal code would give equal numbers."""

    key: tuple[str, str, str]
    quantity: str
    pairs: Sequence[tuple[float, float]]
    exact: bool = False


def find_changes(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """Every method that both sides have: its error and its cost; and those that only one side has.

    Of a side that holds rows of several codes or configurations, the newest ones count. Rows of another configuration
    or kind of device than the other side's are not compared; of another machine, by error alone. Raises ValueError
    where the two sides have nothing in common.
    """
    old, new = _by_method(before), _by_method(after)
    shared = [key for key in old if key in new]
    if not shared:
        raise ValueError("the two sides have no run of the same study, scenario, method and configuration")
    samples = [sample for key in shared for sample in _samples(key[:3], old[key], new[key])]
    level = 1 - (1 - CONFIDENCE) / max(1, len(samples))
    judged = [_judge(sample, level) for sample in samples]
    lonely = [*(k for k in old if k not in new), *(k for k in new if k not in old)]
    return [*judged, *(Change(*k[:3], "runs", None, None, None, None, None, 0, ONE_SIDED) for k in lonely)]


_Key = tuple[str, str, str, str, str]


def _by_method(rows: Sequence[Row]) -> dict[_Key, dict[int, list[_Run]]]:
    """By study, scenario, method, kind of device and configuration (the newest), and by seed: the runs of the code that
    measured that seed last.
    """
    configurations = {(r.study, r.scenario, r.method): r.config for r in rows if r.seed != TUNING_SEED}
    by_method: dict[_Key, dict[int, list[_Run]]] = {}
    for row, cost in zip(rows, relative_costs(rows), strict=True):
        name = (row.study, row.scenario, row.method)
        if row.seed == TUNING_SEED or row.config != configurations[name]:
            continue
        seeds = by_method.setdefault((*name, row.environment.kind, repr(row.config)), {})
        runs = seeds.setdefault(row.seed, [])
        if runs and not runs[-1].row.code.same(row.code):
            runs.clear()
        runs.append(_Run(row, cost))
    return by_method


def _samples(
    key: tuple[str, str, str], old: dict[int, list[_Run]], new: dict[int, list[_Run]]
) -> Iterator[_Sample]:
    seeds = sorted(old.keys() & new.keys())
    last = [(old[seed][-1].row, new[seed][-1].row) for seed in seeds]
    errors = [(x, y) for a, b in last if (x := _error(a)) is not None and (y := _error(b)) is not None]
    if seeds and len(errors) == len(seeds):
        exact = all(a.environment.arithmetic == b.environment.arithmetic for a, b in last)
        yield _Sample(key, "error", errors, exact)
    kinds = [machines(run.row for runs in side.values() for run in runs) for side in (old, new)]
    if kinds[0] != kinds[1]:
        return
    pairs = [pair for seed in seeds for pair in zip(old[seed], new[seed], strict=False)]
    costs = [(a.cost, b.cost) for a, b in pairs if a.cost is not None and b.cost is not None]
    if costs:
        yield _Sample(key, "cost", costs)


def machines(rows: Iterable[Row]) -> set[str]:
    """The kinds of machine that rows were measured on."""
    return {f"{row.environment.machine}, {row.environment.threads} thread(s)" for row in rows}


def _error(row: Row) -> float | None:
    """Of a run: 1 - accuracy; everything is wrong where it failed; None where a study measures no accuracy."""
    if row.failure is not None:
        return 1.0
    accuracy = row.values.get("accuracy")
    return None if accuracy is None else 1.0 - accuracy


def relative_costs(rows: Sequence[Row]) -> list[float | None]:
    """Of each row what it took over what its control took: of the same code and seed, its first run over the control's
    first, and so on. None without a control, and for a control itself.

    The control is the method that the row's configuration names as ``beside``, else plain training.
    """
    runs: dict[tuple[str | int, ...], list[Row]] = {}
    for row in rows:
        runs.setdefault(_run_of(row, row.method), []).append(row)
    taken: dict[tuple[str | int, ...], int] = {}
    costs: list[float | None] = []
    for row in rows:
        own, name = _run_of(row, row.method), row.config.get("method", {}).get("beside", "plain")
        number = taken[own] = taken.get(own, -1) + 1
        controls = runs.get(_run_of(row, name), []) if name != row.method else []
        control = controls[min(number, len(controls) - 1)] if controls else row
        counts = controls and all(r.failure is None and r.seconds > 0 for r in (row, control))
        costs.append(least(row) / least(control) if counts else None)
    return costs


def _run_of(row: Row, method: str) -> tuple[str | int, ...]:
    return row.study, row.scenario, method, row.seed, *row.code.trees


ROUNDS = "time by round [ms]"


def least(row: Row) -> float:
    """Seconds (milliseconds, where it has rounds) of a run: the shortest round, which other work disturbed least."""
    if ROUNDS in row.series:
        return min(value for _, value in row.series[ROUNDS].points())
    return row.seconds


def _judge(sample: _Sample, level: float) -> Change:
    """By the paired differences: of errors, or of the logarithms of costs."""
    is_cost = sample.quantity == "cost"
    before, after = (
        [math.log(x) if is_cost else x for x in side] for side in zip(*sample.pairs, strict=True)
    )
    differences = [b - a for a, b in zip(before, after, strict=True)]
    middle, half = statistics.fmean(differences), _half_width(differences, level)
    back = math.expm1 if is_cost else float
    change = back(middle)
    low, high = (None, None) if half is None else (back(middle - half), back(middle + half))
    old, new = ((math.exp if is_cost else float)(statistics.fmean(side)) for side in (before, after))
    verdict = _verdict(change, low, high)
    if sample.exact and change != 0 and verdict == NO_EVIDENCE:
        verdict = CHANGED
    return Change(*sample.key, sample.quantity, old, new, change, low, high, len(differences), verdict)


def _verdict(change: float, low: float | None, high: float | None) -> str:
    if low is not None and low > 0 and change > 0:
        return WORSE
    return BETTER if high is not None and high < 0 and change < 0 else NO_EVIDENCE


def _half_width(values: Sequence[float], level: float) -> float | None:
    """Of the t interval of a mean; None for one value. Equal values have no width."""
    from scipy import stats

    if len(values) < 2:
        return None
    quantile = float(stats.t.ppf((1 + level) / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


# ---------------------------------------------------------------- shown


def changes_sheet(changes: Sequence[Change], everything: bool = False) -> Sheet:
    """What changed, the worst first; with `everything` also what did not."""
    order = (WORSE, CHANGED, ONE_SIDED, BETTER, NO_EVIDENCE)
    shown = [c for c in changes if everything or c.verdict != NO_EVIDENCE]
    shown.sort(key=lambda c: (order.index(c.verdict), -abs(c.change or 0)))
    few = sum(c.verdict == NO_EVIDENCE and c.low is None for c in changes)
    notes = [f"{len(changes)} comparisons; {sum(c.verdict == WORSE for c in changes)} worse"]
    if few:
        notes.append(
            f"{few} rest on one measurement a side, which proves nothing: run more seeds, or `regraft against`"
        )
    if any(c.verdict == CHANGED for c in changes):
        notes.append(
            "changed: the same machine and packages gave other errors, so the code's arithmetic changed; "
            "the seeds do not say whether for the worse"
        )
    heading = ("study, scenario, method", "of", "before", "after", "change", "interval", "n", "verdict")
    return Sheet("What changed", heading, tuple(map(_line, shown)), tuple(notes))


def _name(change: Change) -> str:
    return f"{change.study}, {change.scenario}, {change.method}"


def _line(change: Change) -> tuple[str, ...]:
    numbers = ["–"] * 4
    if change.change is not None:
        form = "{:+.1%}" if change.quantity == "cost" else "{:+.4f}"
        interval = "–" if change.low is None else f"{form.format(change.low)} to {form.format(change.high)}"
        means = (f"{value:.4g}" for value in (change.before, change.after))
        numbers = [*means, form.format(change.change), interval]
    return (_name(change), change.quantity, *numbers, str(change.n), change.verdict)


WHAT_NOW = """Measure it alone: regraft against COMMIT --scenario NAME --method NAME (its control among the methods).
If intended, run `make baseline`, commit results/baseline with it and say why; otherwise fix it."""


def print_changes(
    changes: Sequence[Change], limits: Limits, *, everything: bool = False, as_json: bool = False
) -> int:
    """Print changes; 1 where any is worse by more than is allowed, else 0."""
    beyond = [change for change in changes if limits.is_exceeded_by(change)]
    if as_json:
        print(
            json.dumps({"changes": list(map(asdict, changes)), "beyond": list(map(asdict, beyond))}, indent=1)
        )
        return int(bool(beyond))
    sheet = changes_sheet(changes, everything)
    Console(markup=False).print(sheet.rich() if sheet.lines else "; ".join(("nothing changed", *sheet.notes)))
    for change in beyond:
        is_cost = change.quantity == "cost"
        size = f"{change.change:+.1%}" if is_cost else f"{change.change:+.4f}"
        allowed = f"{limits.slowdown:.0%}" if is_cost else f"{limits.error_rise:g}"
        print(f"{_name(change)}: {change.quantity} {size} (allowed: {allowed})")
    if beyond:
        print(WHAT_NOW)
    return int(bool(beyond))
