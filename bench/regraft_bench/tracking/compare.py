"""Two sets of rows beside one another: is anything slower or less accurate than it was?

    changes = find_changes(read_rows("before.jsonl"), read_rows("after.jsonl"))
    worse = [change for change in changes if Limits(slowdown=0.1, error_rise=0.005).is_exceeded_by(change)]

Rows are paired by seed. On the same kind of machine with the same packages, equal code gives equal bits: there every
value and every point of every series is compared, and whatever moved is told, in either direction. Elsewhere errors
alone are compared, and a verdict needs a confidence interval. Costs are compared as ratios to a control of the same run
(plain training, or straightforward PyTorch), so that a slower machine is no regression, and only between rows of the
same kind of machine. One run is one measurement, however many rounds it took: rounds within one process are not
independent. Phases (similarity, assignment) are compared over all scenarios and methods of a study together: a phase is
a small part of a run, and one scenario's seeds are too few to see it. What the first side has and the second does not
(a method, a seed, a value) has vanished.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from regraft_bench.rows import Row
from regraft_bench.study import TUNING_SEED

CONFIDENCE = 0.95
"""Of all intervals of a comparison together: each is widened by how many there are (Bonferroni)."""

BETTER, WORSE, NO_EVIDENCE, ONE_SIDED = "better", "worse", "no evidence", "on one side only"
EQUAL, CHANGED = "equal", "changed"
"""Where equal code gives equal bits: no number moved, or some did."""
VANISHED = "vanished"
"""The second side does not have it, or has no finite number for it."""


PHASE, EVERY = "cost of ", ("every scenario", "every method")
PHASE_SLOWDOWN = 0.5
"""By how much a phase may become slower: some take milliseconds, and one process is unlike the next."""
PHASE_SHARE = 0.1
"""The least share of a run that a phase takes to be compared."""

Quantity = tuple[str, str, str, str]
"""Study, scenario, method, and what of it."""


def is_cost(quantity: str) -> bool:
    """Whether it is a ratio of costs: of a whole method, or of one of its phases."""
    return quantity == "cost" or quantity.startswith(PHASE)


@dataclass(frozen=True)
class Change:
    """One quantity of one method, before and after.

    Attributes:
        study, scenario, method: of what. quantity: "error", "cost", "cost of" a phase, "runs", a value or a series.
        before, after: means (error: share of 1; cost: in units of the control's); where equal code gives equal bits,
            of the point of the seed that moved most. None where there is none.
        change: after - before; cost: after / before - 1.
        low, high: of the confidence interval; None where one measurement a side allows none, or none is needed.
        n: seeds, or pairs of runs, that it rests on.
        verdict: "better", "worse", "no evidence", "equal", "changed", "vanished" or "on one side only".
        scale: what an allowed change is a share of: 1 for errors and costs, else the largest of the compared numbers.
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
    scale: float = 1.0

    @property
    def name(self) -> Quantity:
        return self.study, self.scenario, self.method, self.quantity

    @property
    def is_cost(self) -> bool:
        return is_cost(self.quantity)


@dataclass(frozen=True)
class Limits:
    """What may become worse, and how many pairs of turns are taken to find out.

    slowdown: share of a cost; error_rise: in shares of 1, of other values in shares of the value; least, most: turns.
    """

    slowdown: float = 0.1
    error_rise: float = 0.005
    least: int = 4
    most: int = 12

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"turns must be at least 1, and at most no fewer: {self.least} to {self.most}")

    def is_exceeded_by(self, change: Change) -> bool:
        """Whether it vanished, is worse, or moved where nothing should move, and by more than is allowed."""
        if change.verdict == VANISHED or (change.verdict == CHANGED and change.change is None):
            return True
        if change.change is None or change.verdict not in (WORSE, CHANGED):
            return False
        size = abs(change.change) if change.verdict == CHANGED else change.change
        return size > self.allowance(change)

    def allowance(self, change: Change) -> float:
        """By how much this quantity may become worse."""
        if change.quantity.startswith(PHASE):
            return PHASE_SLOWDOWN
        return self.slowdown if change.quantity == "cost" else self.error_rise * change.scale

    def is_undecided(self, change: Change) -> bool:
        """Whether it looks slower by half of what is allowed, without evidence."""
        looks_slower = change.quantity == "cost" and (change.change or 0.0) > self.slowdown / 2
        return looks_slower and change.verdict == NO_EVIDENCE


@dataclass(frozen=True)
class _Run:
    """A row, and what it took in units of what its control took (None: it has none)."""

    row: Row
    cost: float | None


_Method = tuple[str, str, str]
"""Study, scenario, method."""


@dataclass(frozen=True)
class _Sample:
    """Pairs (before, after) of errors or costs, to be judged by an interval."""

    key: _Method
    quantity: str
    pairs: Sequence[tuple[float, float]]


def find_changes(before: Sequence[Row], after: Sequence[Row], *, one_machine: bool = False) -> list[Change]:
    """Every method that both sides have: its error, its other values and its cost; and what only one side has.

    Of a side that holds rows of several codes or configurations, the newest ones count. Rows of another configuration
    or kind of device than the other side's are not compared; of another machine, by error alone. one_machine: both
    sides were measured on the same one, whether its kind is known or not. Raises ValueError where the two sides have
    nothing in common.
    """
    old, new = _by_method(before), _by_method(after)
    shared = [key for key in old if key in new]
    if not shared:
        raise ValueError("the two sides have no run of the same study, scenario, method and configuration")
    changes: list[Change] = []
    samples: list[_Sample] = []
    phases: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for key in shared:
        pairs = [(old[key][seed][-1].row, new[key][seed][-1].row) for seed in old[key] if seed in new[key]]
        exact = all(_give_equal_bits(a, b, one_machine) for a, b in pairs)
        changes += _compare_values(key[:3], pairs, exact)
        samples += () if exact else _sample_errors(key[:3], pairs)
        runs = _pair_runs(old[key], new[key], one_machine)
        samples += _sample_costs(key[:3], runs)
        for phase, costs in _pair_phases(runs):
            phases.setdefault((key[0], phase), []).append(costs)
    samples += [_Sample((study, *EVERY), PHASE + phase, pairs) for (study, phase), pairs in phases.items()]
    level = 1 - (1 - CONFIDENCE) / max(1, len(samples))
    changes += [_judge(sample, level) for sample in samples]
    for key, seeds in old.items():
        if lost := seeds.keys() - new.get(key, {}).keys():
            changes.append(_one_sided(key[:3], "runs", len(lost), VANISHED))
    return [*changes, *(_one_sided(k[:3], "runs", len(new[k]), ONE_SIDED) for k in new if k not in old)]


def _one_sided(key: _Method, quantity: str, n: int, verdict: str) -> Change:
    return Change(*key, quantity, None, None, None, None, None, n, verdict)


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


def _give_equal_bits(before: Row, after: Row, one_machine: bool) -> bool:
    """Whether equal code would have given equal numbers."""
    a, b = before.environment, after.environment
    return a.arithmetic == b.arithmetic and (one_machine or a.is_known)


Pairs = Sequence[tuple[Row, Row]]


def _compare_values(key: _Method, pairs: Pairs, exact: bool) -> Iterator[Change]:
    """Runs that began to fail, values that vanished, and, where equal code gives equal bits, whatever moved."""
    if any(b.failure is not None and a.failure is None for a, b in pairs):
        before, after = (statistics.fmean(map(_error, side)) for side in zip(*pairs, strict=True))
        yield Change(*key, "error", before, after, after - before, None, None, len(pairs), WORSE)
    whole = [(_numbers(a), _numbers(b)) for a, b in pairs if a.failure is None and b.failure is None]
    for name in dict.fromkeys(name for numbers, _ in whole for name in numbers):
        points = [(a.get(name, ()), b.get(name, ())) for a, b in whole]
        if any(map(_has_vanished, *zip(*points, strict=True))):
            yield _one_sided(key, name, len(whole), VANISHED)
        elif exact:
            yield _compare_points(key, name, points)


_Points = tuple[float | None, ...]


def _has_vanished(before: _Points, after: _Points) -> bool:
    """Whether there is a number before, and none in its place after."""
    return any(x is not None and y is None for x, y in zip_longest(before, after))


def _compare_points(key: _Method, name: str, pairs: Sequence[tuple[_Points, _Points]]) -> Change:
    """Of all points of all seeds the one that moved most."""
    both = [point for a, b in pairs for point in zip_longest(a, b)]
    if any(x is None and y is not None for x, y in both):
        return _one_sided(key, name, len(pairs), CHANGED)
    finite = [(x, y) for x, y in both if x is not None and y is not None]
    before, after = max(finite, key=lambda pair: abs(pair[1] - pair[0]), default=(0.0, 0.0))
    scale = 1.0 if name == ERROR else max((abs(x) for pair in finite for x in pair), default=0.0)
    verdict = EQUAL if before == after else CHANGED
    return Change(*key, name, before, after, after - before, None, None, len(pairs), verdict, scale)


ERROR = "error"
"""1 - the value "accuracy"."""
MACHINE_UNITS = ("CPU s]", "wall s]", "[ms]", "[GB/s]", "[Gflop/s]", "peak_memory [bytes]")
"""How the names of those values end that two runs of equal code do not share."""


def _numbers(row: Row) -> dict[str, _Points]:
    """All that a row publishes and that equal code repeats: values, and the points of series."""
    numbers: dict[str, _Points] = {}
    for name, value in row.values.items():
        if name == "accuracy":
            numbers[ERROR] = (None if _finite(value) is None else _error(row),)
        elif not name.endswith(MACHINE_UNITS):
            numbers[f"value {name}" if name == ERROR else name] = (_finite(value),)
    for name, series in row.series.items():
        if not name.endswith(MACHINE_UNITS):
            points = tuple(map(_finite, _flatten(series.values)))
            numbers[f"{name} by {', '.join(series.axes)}"] = points
    return numbers


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _flatten(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flatten(value)
        else:
            yield value


def _sample_errors(key: _Method, pairs: Pairs) -> Iterator[_Sample]:
    errors = [(_error(a), _error(b)) for a, b in pairs if _has_error(a) and _has_error(b)]
    if errors and len(errors) == len(pairs):
        yield _Sample(key, ERROR, errors)


def _pair_runs(old: dict[int, list[_Run]], new: dict[int, list[_Run]], one_machine: bool) -> list[tuple[_Run, _Run]]:
    """Runs whose costs may be compared: none where the machines are unlike, or not known to be alike."""
    rows = [[run.row for runs in side.values() for run in runs] for side in (old, new)]
    known = one_machine or all(row.environment.is_known for row in rows[0])
    if not known or machines(rows[0]) != machines(rows[1]) or find_other_packages(*rows):
        return []
    return [pair for seed in old if seed in new for pair in zip(old[seed], new[seed], strict=False)]


def _sample_costs(key: _Method, pairs: Sequence[tuple[_Run, _Run]]) -> Iterator[_Sample]:
    costs = [(a.cost, b.cost) for a, b in pairs if a.cost is not None and b.cost is not None]
    if costs:
        yield _Sample(key, "cost", costs)


def _pair_phases(pairs: Sequence[tuple[_Run, _Run]]) -> Iterator[tuple[str, tuple[float, float]]]:
    """By phase what both runs took for it, in units of their controls; of a run with one phase its cost says that."""
    for pair in pairs:
        before, after = (_phase_costs(run) for run in pair)
        if len(before) > 1 and len(after) > 1:
            for phase in before.keys() & after.keys():
                if before[phase] >= PHASE_SHARE * sum(before.values()) and after[phase] > 0:
                    yield phase, (before[phase], after[phase])


def _phase_costs(run: _Run) -> dict[str, float]:
    if run.cost is None or ROUNDS in run.row.series:
        return {}
    return {phase: run.cost * seconds / run.row.seconds for phase, seconds in run.row.phases.items()}


def machines(rows: Iterable[Row]) -> set[str]:
    """The kinds of machine that rows were measured on."""
    return {f"{row.environment.machine}, {row.environment.threads} thread(s)" for row in rows}


def find_other_packages(before: Iterable[Row], after: Iterable[Row]) -> dict[str, tuple[str, str]]:
    """The packages of which two sides have other versions, and which ones: a cost with lapx is none without it."""
    sides: list[dict[str, set[str]]] = [{}, {}]
    for versions, rows in zip(sides, (before, after), strict=True):
        for own in {tuple(row.environment.versions.items()) for row in rows}:
            for package, version in own:
                versions.setdefault(package, set()).add(version)
    old, new = sides
    return {
        package: (_list_versions(old, package), _list_versions(new, package))
        for package in sorted(old.keys() | new.keys())
        if old.get(package) != new.get(package)
    }


def _list_versions(versions: dict[str, set[str]], package: str) -> str:
    return " and ".join(sorted(versions.get(package, ()))) or "none"


def explain_uncompared(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """Why costs are not compared, a sentence each: other machines, other packages."""
    said = []
    apart = [" and ".join(sorted(machines(side))) for side in (before, after)]
    if apart[0] != apart[1]:
        said.append(f"other machines, so that costs are not compared where they differ: {apart[0]}; {apart[1]}")
    if packages := find_other_packages(before, after):
        listed = ", ".join(f"{package} {old} and {new}" for package, (old, new) in packages.items())
        said.append(f"other packages, so that costs are not compared where they differ: {listed}")
    return said


def _has_error(row: Row) -> bool:
    return row.failure is not None or _finite(row.values.get("accuracy")) is not None


def _error(row: Row) -> float:
    """Of a run: 1 - accuracy; everything is wrong where it failed, and nothing where a study measures no accuracy."""
    if row.failure is not None:
        return 1.0
    accuracy = _finite(row.values.get("accuracy"))
    return 0.0 if accuracy is None else 1.0 - accuracy


def relative_costs(rows: Sequence[Row]) -> list[float | None]:
    """Of each row what it took over what its control took: of the same code and seed, its first run over the control's
    first, and so on. None without a control, and for a control itself.

    The control is the method that the row's configuration names as ``beside``, else plain training; beside None, what a
    row took counts as it is.
    """
    runs: dict[tuple[str | int, ...], list[Row]] = {}
    for row in rows:
        runs.setdefault(_run_of(row, row.method), []).append(row)
    taken: dict[tuple[str | int, ...], int] = {}
    costs: list[float | None] = []
    for row in rows:
        own, name = _run_of(row, row.method), row.config.get("method", {}).get("beside", "plain")
        if name is None:
            costs.append(least(row) if row.failure is None and row.seconds > 0 else None)
            continue
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
    ratio = is_cost(sample.quantity)
    before, after = ([math.log(x) if ratio else x for x in side] for side in zip(*sample.pairs, strict=True))
    differences = [b - a for a, b in zip(before, after, strict=True)]
    middle, half = statistics.fmean(differences), _half_width(differences, level)
    back = math.expm1 if ratio else float
    change = back(middle)
    low, high = (None, None) if half is None else (back(middle - half), back(middle + half))
    old, new = ((math.exp if ratio else float)(statistics.fmean(side)) for side in (before, after))
    verdict = _verdict(change, low, high)
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
