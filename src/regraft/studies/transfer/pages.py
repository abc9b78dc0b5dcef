"""Tables and figures of the transfer study: functions of its rows and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from regraft.studies.figures import Figure, Panel, curves
from regraft.studies.rows import Row
from regraft.studies.tables import (
    COMMON,
    Column,
    Group,
    Rows,
    Sheet,
    Table,
    by_method,
    by_scenario,
    groups,
    mean,
    share_of_plain,
    value,
)
from regraft.studies.transfer.scenarios import SCENARIOS

NAMES = tuple(scenario.name for scenario in SCENARIOS)
SHARE = 0.95
"""Of plain training's accuracy: what a transferred network is to reach."""

# ---------------------------------------------------------------- joined on reading


def reach(row: Row, accuracy: float) -> tuple[float, float] | None:
    """(epochs, seconds) of training until test accuracy is at least this, all that came before it paid too.

    Seconds are of the clock that counts on the row's device. None: it never was.
    """
    clock = "CPU" if row.environment.kind == "cpu" else "wall"
    if "subsequent" not in row.series:
        return None
    paid = dict(row.series[f"subsequent cost [{clock} s]"].points())
    return next(((at, paid[at]) for at, own in row.series["subsequent"].points() if own >= accuracy), None)


def races(group: Group) -> Iterator[tuple[tuple[float, float] | None, tuple[float, float] | None]]:
    """The method's and plain training's (epochs, seconds) to the same accuracy, for each seed that has both rows."""
    for own, plain in group.beside():
        if (trained := plain.values.get("accuracy")) is not None:
            yield reach(own, SHARE * trained), reach(plain, SHARE * trained)


def epochs(group: Group) -> str:
    """A cell: epochs of the training that follows until it is there."""
    return _reached([own and own[0] for own, _ in races(group)], "{:.1f}")


def speed_up(group: Group) -> str:
    """A cell: plain training's seconds until it is there, over the method's."""
    return _reached([own and plain and plain[1] / own[1] for own, plain in races(group)], "{:.1f}x")


def _reached(found: list[float | None], form: str) -> str:
    """The mean over the seeds that got there, and how many did where not all of them."""
    there = [number for number in found if number is not None]
    if not there:
        return "not reached" if found else "–"
    return mean(there, form) + (f" ({len(there)} of {len(found)})" if len(there) < len(found) else "")


def untrained(group: Group) -> str:
    """A cell: test accuracy right after the transfer; plain training has nothing without training."""
    return "–" if group.method == "plain" else value("accuracy")(group)


# ---------------------------------------------------------------- tables

DELTA = Column("‖Δ‖ / ‖θ₁⁰‖", value("delta_ratio", "{:.2f}"))
SEEDS, _, SECONDS, PLAIN_SHARE = COMMON
COLUMNS = (
    SEEDS,
    Column("accuracy, no training", untrained),
    SECONDS,
    PLAIN_SHARE,
    DELTA,
    Column("accuracy, trained on", value("final")),
    Column("epochs to 95 %", epochs),
    Column("speed-up to 95 %", speed_up),
)
QUESTIONS = (("fgmt", "naive"), ("fgmt", "weights"), ("fgmt", "oracle"), ("gmt", "fgmt"))


def overview(rows: Rows) -> Iterator[Sheet]:
    """One line a scenario, one column a method: accuracy without training, plain training's own beside it."""
    methods = [name for name in dict.fromkeys(row.method for row in rows) if name != "plain"]
    lines = []
    for scenario, own in by_scenario(rows).items():
        found = groups(own)
        cells = [value("accuracy")(found[m]) if m in found else "–" for m in (*methods, "plain")]
        fgmt = found.get("fgmt")
        cells += [DELTA.cell(fgmt), share_of_plain(fgmt)] if fgmt else ["–", "–"]
        lines.append((scenario, *cells))
    heading = ("scenario", *methods, "plain training", DELTA.heading, "fgmt's CPU s, of plain training's")
    if lines:
        yield Sheet("Accuracy without training", heading, tuple(lines))


TABLES = (
    Table("main", "What a network knows that was never trained", NAMES, overview),
    Table("methods", "Every scenario", NAMES, by_method(COLUMNS, QUESTIONS)),
)

# ---------------------------------------------------------------- figures


def _panels(series: str, x: str, y: str) -> tuple[Panel, ...]:
    """One for each scenario; those without rows are left out when the figure is drawn."""
    return tuple(Panel(name, x, y, curves(series, scenario=name)) for name in NAMES)


FIGURES = (
    Figure(
        "path",
        "Along the transferred path, no training",
        NAMES,
        _panels("validation", "step t", "validation accuracy"),
    ),
    Figure(
        "subsequent",
        "The training that follows, and plain training",
        NAMES,
        _panels("subsequent", "epoch", "test accuracy"),
    ),
)
