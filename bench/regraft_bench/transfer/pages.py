"""Tables of the transfer study: functions of its rows and of nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from regraft_bench.report.tables import (
    COMMON,
    Column,
    Comparison,
    Group,
    Rows,
    Sheet,
    Table,
    by_method,
    by_scenario,
    compare_methods,
    groups,
    mean,
    provenance,
    share_of_plain,
    value,
)
from regraft_bench.rows import Row
from regraft_bench.study import Scenario
from regraft_bench.transfer import scenarios
from regraft_bench.transfer.methods.ports import metric_name

# ---------------------------------------------------------------- joined on reading

Race = tuple[float, float] | None
"""(epochs, seconds) of training until an accuracy is reached; None: it never was."""


def reach(row: Row, accuracy: float) -> Race:
    """(epochs, seconds) of training until test accuracy is at least this, all that came before it paid too.

    Seconds are of the clock that counts on the row's device. None: it never was.
    """
    clock = "CPU" if row.environment.kind == "cpu" else "wall"
    if "subsequent" not in row.series:
        return None
    paid = dict(row.series[f"subsequent cost [{clock} s]"].points())
    return next(((at, paid[at]) for at, own in row.series["subsequent"].points() if own >= accuracy), None)


def races(group: Group, share: float) -> Iterator[tuple[Race, Race]]:
    """The method's and plain training's race to the same accuracy, for each seed that has both rows."""
    for own, plain in group.beside():
        if (trained := plain.values.get("accuracy")) is not None:
            yield reach(own, share * trained), reach(plain, share * trained)


def epochs(group: Group, share: float = 0.95) -> str:
    """A cell: epochs of the training that follows until it is there."""
    return _format_reached([own and own[0] for own, _ in races(group, share)], "{:.2f}")


def speed_up(group: Group, share: float = 0.95) -> str:
    """A cell: plain training's seconds until it is there, over the method's."""
    ratios = [own and plain and (plain[1] / own[1] if own[1] else math.inf) for own, plain in races(group, share)]
    return _format_reached(ratios, "{:.2g}x").replace("infx", "at no cost")


def _format_reached(numbers: Sequence[float | None], form: str) -> str:
    """The mean over the seeds that got there, and how many did where not all of them."""
    there = [number for number in numbers if number is not None]
    if not there:
        return "not reached" if numbers else "–"
    return mean(there, form) + (f" ({len(there)} of {len(numbers)})" if len(there) < len(numbers) else "")


def accuracy_untrained(group: Group) -> str:
    """A cell: test accuracy right after the transfer; plain training has nothing without training.

    Where no step of the path was above chance on validation, for most seeds, the cell says so.
    """
    if group.method == "plain":
        return "–"
    lost = sum(bool(row.notes.get("at chance")) for row in group.rows)
    return value("accuracy")(group) + (" (chance)" if 2 * lost > len(group.rows) else "")


# ---------------------------------------------------------------- one column a method

MethodColumn = tuple[str, Column]
"""The method whose rows a column is made of, and the column."""


def fill_line(rows: Rows, columns: Sequence[MethodColumn]) -> list[str]:
    """The cells of one scenario's rows."""
    own = groups(rows)
    return [column.cell(own[method]) if method in own else "–" for method, column in columns]


def accuracy_columns(methods: Sequence[str]) -> list[MethodColumn]:
    """Accuracy without training; plain training's own."""
    return [(m, Column(m, value("accuracy") if m == "plain" else accuracy_untrained)) for m in methods]


DELTA = Column("‖Δ‖ / ‖θ₁⁰‖", value("delta_ratio", "{:.2f}"))


def compare_scenarios(rows: Rows) -> Iterator[Sheet]:
    """One line a scenario, one column a method: accuracy without training, plain training's own beside it."""
    methods = [name for name in dict.fromkeys(row.method for row in rows) if name != "plain"]
    columns = (
        *accuracy_columns(methods),
        ("plain", Column("plain training", value("accuracy"))),
        ("fgmt", DELTA),
        ("fgmt", Column("fgmt's CPU s, of plain training's", share_of_plain)),
    )
    lines = tuple((scenario, *fill_line(own, columns)) for scenario, own in by_scenario(rows).items())
    if lines:
        heading = ("scenario", *(column.heading for _, column in columns))
        yield Sheet("Accuracy without training", heading, lines)


def compare_variants(
    methods: Sequence[str],
    title: str | None = None,
    *,
    before: Sequence[MethodColumn] = (),
    answer: Callable[[Rows], list[str]] = lambda rows: [],
) -> Callable[[Rows], Iterator[Sheet]]:
    """One sheet a base, one line a variant, one column a method: accuracy without training.

    Names are question-base-variant; with a title they are question-variant, and all lines are on one sheet. before:
    more columns; answer: more notes on a variant.
    """

    def sheets(rows: Rows) -> Iterator[Sheet]:
        bases: dict[str, dict[str, list[Row]]] = {}
        for name, own in by_scenario(rows).items():
            *first, variant = name.split("-", 1 if title else 2)
            bases.setdefault("-".join(first), {})[variant] = own
        for base, variants in bases.items():
            everything = [row for own in variants.values() for row in own]
            columns = accuracy_columns([m for m in methods if any(row.method == m for row in everything)])
            lines = tuple(
                (variant, *fill_line(own, before), _delta_ratio(own), *fill_line(own, columns))
                for variant, own in variants.items()
            )
            notes = [f"{n}: {text}" for ask in (answer, _questions) for n, own in variants.items() for text in ask(own)]
            heading = ("", *(c.heading for _, c in before), DELTA.heading, *(c.heading for _, c in columns))
            yield Sheet(title or base, heading, lines, (*notes, *provenance(everything)))

    return sheets


def _delta_ratio(rows: Rows) -> str:
    """The source's, and the target's own where no row has a source."""
    ratios = [v for r in rows if r.method != "plain" and (v := r.values.get("delta_ratio")) is not None]
    return mean(ratios, "{:.2f}")


def _questions(rows: Rows) -> list[str]:
    pairs = (("fgmt", "naive"), ("gmt", "fgmt"))
    return [f"{a} − {b}: {c}" for a, b in pairs if (c := compare_methods(rows, a, b)) is not None]


def compare_with_source(rows: Rows) -> list[str]:
    """Whether the target is better than the source that its learning came from, or that it might have been."""
    fgmt = [row for row in rows if row.method == "fgmt"]
    sources = [replace(row, method="source", values={"accuracy": row.values["source"]}) for row in fgmt]
    comparisons = {m: compare_methods([*rows, *sources], m, "source") for m in ("fgmt", "gmt", "plain")}
    return [f"{name} − the source: {result}" for name, result in comparisons.items() if result is not None]


# ---------------------------------------------------------------- other tables


def list_distances(rows: Rows) -> Iterator[Sheet]:
    """Distances under each way to choose pi: at the first update, on average, and over the last half."""
    cells = [value(part) for part in ("first", "distance", "last")]
    lines = tuple(
        (f"{name.partition('-')[2]}, {method}", *(cell(group) for cell in cells))
        for name, own in by_scenario(rows).items()
        for method, group in groups(own).items()
    )
    heading = ("network, permutation", "first update", "mean over looks", "last look")
    if lines:
        yield Sheet("Distance of what two runs learn", heading, lines, tuple(provenance(rows)))


def list_first_gradients(rows: Rows) -> Iterator[Sheet]:
    """One line a width, one column a number of inputs and a permutation."""
    cells: dict[int, dict[str, str]] = {}
    for name, own in by_scenario(rows).items():
        _, side, width = name.split("-")
        for method, group in groups(own).items():
            cells.setdefault(int(width), {})[f"{side}, {method}"] = value("distance")(group)
    columns = list(dict.fromkeys(column for line in cells.values() for column in line))
    lines = tuple((str(width), *(cells[width].get(name, "–") for name in columns)) for width in sorted(cells))
    if lines:
        title = "Distance of the expected gradients at two random starts"
        yield Sheet(title, ("hidden units", *columns), lines, tuple(provenance(rows)))


def list_barriers(rows: Rows) -> Iterator[Sheet]:
    return by_method(BARRIER_COLUMNS)([row for row in rows if row.method != "plane"])


def share_of_work(group: Group) -> str:
    """A cell: the method's operations over those of plain training."""
    pairs = [(own.values["work [FLOP]"], plain.values["work [FLOP]"]) for own, plain in group.beside()]
    return mean([own / plain for own, plain in pairs if own is not None and plain], "{:.2%}")


# ---------------------------------------------------------------- ports


def list_ports(rows: Rows) -> Iterator[Sheet]:
    """One line a method, one column a number of images of each class."""
    for own in by_scenario(rows).values():
        counts = _counts(own)
        columns = [SEEDS, *(Column(str(count), value(metric_name(count))) for count in counts)]
        if counts:
            columns.append(Column(f"CPU s at {counts[-1]}", _seconds_at(counts[-1])))
        yield from by_method(columns)(own)


def compare_ports(rows: Rows, questions: Sequence[tuple[str, str]] | None = None) -> Iterator[Sheet]:
    """Who is ahead of whom, number of images by number: mean difference and p of the paired test."""
    for scenario, own in by_scenario(rows).items():
        counts, lines = _counts(own), []
        for one, other in questions or PORT_QUESTIONS:
            comparisons = [compare_methods(own, one, other, metric_name(count)) for count in counts]
            if any(comparisons):
                pairs = max(each.n for each in comparisons if each)
                lines.append((f"{one} − {other}", str(pairs), *map(_difference, comparisons)))
        if lines:
            yield Sheet(scenario, ("", "n", *map(str, counts)), tuple(lines), tuple(provenance(own)))


def _counts(rows: Rows) -> list[int]:
    """Images of each class that methods were given."""
    series = [row.series["accuracy by images"] for row in rows if row.series]
    return [int(count) for first in series[:1] for count, _ in first.points()]


def _seconds_at(images: int) -> Callable[[Group], str]:
    """A cell: CPU seconds of the port with so many images of each class."""
    return lambda group: mean(
        [dict(row.series["cost by images [CPU s]"].points())[images] for row in group.rows if row.series],
        "{:.2g}",
    )


def _difference(comparison: Comparison | None) -> str:
    if comparison is None:
        return "–"
    p = "" if math.isnan(comparison.p) else f" (p = {comparison.p:.2g})"
    return f"{comparison.difference:+.3f}{p}"


# ---------------------------------------------------------------- all of them


def _column(name: str, heading: str | None = None) -> Column:
    return Column(heading or name, value(name))


SEEDS, _, SECONDS, PLAIN_SHARE = COMMON
UNTRAINED = Column("accuracy, no training", accuracy_untrained)
SUBSEQUENT = (
    _column("final", "accuracy, trained on"),
    Column("epochs to 95 %", epochs),
    Column("speed-up to 95 %", speed_up),
)
METHOD_COLUMNS = (SEEDS, UNTRAINED, SECONDS, PLAIN_SHARE, DELTA, *SUBSEQUENT)
RACE_COLUMNS = tuple(
    Column(f"{heading} to {share:.0%}", partial(cell, share=share))
    for share in (0.90, 0.95, 0.99)  # of plain training's accuracy
    for heading, cell in (("epochs", epochs), ("speed-up", speed_up))
)
BARRIER_COLUMNS = (
    SEEDS,
    _column("barrier", "barrier [nats]"),
    _column("accuracy of the first"),
    _column("accuracy of the second"),
    _column("lowest accuracy", "lowest between"),
)
ENSEMBLE_COLUMNS = (
    SEEDS,
    _column("accuracy"),
    _column("nll [nats]", "log-likelihood loss [nats]"),
    *map(_column, ("calibration error", "mean of members", "disagreement")),
    Column("CPU s, the source's included", SECONDS.cell),
)
COST_COLUMNS = (
    SEEDS,
    Column("gradients", value("gradients", "{:.0f}")),
    Column("FLOP", value("work [FLOP]", "{:.3g}")),
    Column("share of plain training's FLOP", share_of_work),
    SECONDS,
    PLAIN_SHARE,
)

METHOD_QUESTIONS = (("fgmt", "naive"), ("fgmt", "weights"), ("fgmt", "oracle"), ("gmt", "fgmt"))
_peers = ("random", "end-weights", "end-activations", "end-sinkhorn", "warm-start", "brief", "distillation")
PEER_QUESTIONS = tuple(("fgmt", peer) for peer in _peers)
LEAD_QUESTIONS = (("nfgmt", "fgmt"), ("nfgmt", "gmt"), ("gmt", "fgmt"))
PORT_QUESTIONS = (
    ("gradfix", "naive"),
    ("gradfix, mean", "gradfix"),
    ("weights", "naive"),
    ("fgmt", "weights"),
    ("fgmt", "fgmt, head alone"),
    ("fgmt + gradfix", "fgmt"),
    ("fgmt + gradfix, mean", "fgmt"),
    ("fgmt", "few-shot"),
    ("fgmt + gradfix, mean", "few-shot"),
    ("fgmt, then few-shot", "few-shot, twice as long"),
)

FIVE = ("naive", "weights", "oracle", "fgmt", "plain")
list_inheritance = compare_variants(
    ("naive", "oracle", "fgmt", "gmt", "plain"),
    "A poorly pre-trained source",
    before=[("fgmt", _column("source", "the source itself"))],
    answer=compare_with_source,
)


def _table(name: str, title: str, asked: Sequence[Scenario], sheets: Callable[[Rows], Iterator[Sheet]]) -> Table:
    return Table(name, title, scenarios.list_names(asked), sheets)


TRANSFER_TABLES = (
    _table("main", "What a network knows that was never trained", scenarios.COMPARISONS, compare_scenarios),
    _table("methods", "Every scenario", scenarios.COMPARISONS, by_method(METHOD_COLUMNS, METHOD_QUESTIONS)),
    _table("race", "The training that follows, and its cost", scenarios.COMPARISONS, by_method(RACE_COLUMNS)),
    _table(
        "peers",
        "What else one could do with the source",
        scenarios.PEER_COMPARISONS,
        by_method((SEEDS, UNTRAINED, SECONDS, PLAIN_SHARE, *SUBSEQUENT), PEER_QUESTIONS),
    ),
    _table("regime", "When transfer works", scenarios.REGIMES, compare_variants(FIVE)),
    _table("schedules", "Paths", scenarios.PATHS, compare_variants(("naive", "fgmt", "gmt"))),
    _table("sensitivity", "What each setting does", scenarios.SENSITIVITY, compare_variants(("fgmt", "gmt"))),
    _table("failures", "Where it fails", scenarios.FAILURES, compare_variants(FIVE)),
    _table("inherited", "Generalisation inherited", scenarios.INHERITANCE, list_inheritance),
    _table("assumption", "Assumption (P)", scenarios.ASSUMPTION, list_distances),
    _table("theorem", "Theorem A.1", scenarios.THEOREM, list_first_gradients),
    _table("basins", "Barriers", scenarios.BASINS, list_barriers),
    _table("ensembles", "Ensembles", scenarios.ENSEMBLE_COMPARISONS, by_method(ENSEMBLE_COLUMNS)),
    _table("cost", "Gradients, operations, seconds", scenarios.COSTS, by_method(COST_COLUMNS)),
    _table(
        "normalised",
        "FGMT with normalised gradients, a lead of ours",
        scenarios.NORMALISED,
        by_method((SEEDS, UNTRAINED, SECONDS), LEAD_QUESTIONS),
    ),
    _table("ports", "A fine-tune on a new base, by images of each class", scenarios.PORTS, list_ports),
    _table("port-questions", "Which port is ahead", scenarios.PORTS, compare_ports),
)
