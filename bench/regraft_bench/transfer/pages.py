"""Tables of the transfer study: functions of its rows and of nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

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
    spread,
    value,
)
from regraft_bench.rows import Row
from regraft_bench.study import Scenario
from regraft_bench.transfer import scenarios
from regraft_bench.transfer.methods.ports import metric_name

SHARES = (0.90, 0.95, 0.99)
"""Of plain training's accuracy: what a transferred network is to reach."""


def names(found: Sequence[Scenario]) -> tuple[str, ...]:
    return tuple(scenario.name for scenario in found)


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


def races(
    group: Group, share: float
) -> Iterator[tuple[tuple[float, float] | None, tuple[float, float] | None]]:
    """The method's and plain training's (epochs, seconds) to the same accuracy, for each seed that has both rows."""
    for own, plain in group.beside():
        if (trained := plain.values.get("accuracy")) is not None:
            yield reach(own, share * trained), reach(plain, share * trained)


def epochs(group: Group, share: float = 0.95) -> str:
    """A cell: epochs of the training that follows until it is there."""
    return _reached([own and own[0] for own, _ in races(group, share)], "{:.2f}")


def speed_up(group: Group, share: float = 0.95) -> str:
    """A cell: plain training's seconds until it is there, over the method's."""
    found = [
        own and plain and (plain[1] / own[1] if own[1] else math.inf) for own, plain in races(group, share)
    ]
    return _reached(found, "{:.2g}x").replace("infx", "at no cost")


def _reached(found: list[float | None], form: str) -> str:
    """The mean over the seeds that got there, and how many did where not all of them."""
    there = [number for number in found if number is not None]
    if not there:
        return "not reached" if found else "–"
    return mean(there, form) + (f" ({len(there)} of {len(found)})" if len(there) < len(found) else "")


def untrained(group: Group) -> str:
    """A cell: test accuracy right after the transfer; plain training has nothing without training.

    Where no step of the path was above chance on validation, for most seeds, the cell says so.
    """
    if group.method == "plain":
        return "–"
    lost = sum(bool(row.notes.get("at chance")) for row in group.rows)
    return value("accuracy")(group) + (" (chance)" if 2 * lost > len(group.rows) else "")


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
        cells = [untrained(found[m]) if m in found else "–" for m in methods]
        cells.append(value("accuracy")(found["plain"]) if "plain" in found else "–")
        fgmt = found.get("fgmt")
        cells += [DELTA.cell(fgmt), share_of_plain(fgmt)] if fgmt else ["–", "–"]
        lines.append((scenario, *cells))
    heading = ("scenario", *methods, "plain training", DELTA.heading, "fgmt's CPU s, of plain training's")
    if lines:
        yield Sheet("Accuracy without training", heading, tuple(lines))


RACE = tuple(
    Column(f"{heading} to {share:.0%}", lambda group, cell=cell, share=share: cell(group, share))
    for share in SHARES
    for heading, cell in (("epochs", epochs), ("speed-up", speed_up))
)


def compared(question: str, methods: Sequence[str], *, depth: int = 2) -> Callable[[Rows], Iterator[Sheet]]:
    """One sheet a base, one line a variant, one column a method: accuracy without training.

    Names are question-base-variant; with depth 1 they are question-variant, and all lines are on one sheet.
    """

    def sheets(rows: Rows) -> Iterator[Sheet]:
        bases: dict[str, dict[str, list[Row]]] = {}
        for name, own in by_scenario(rows).items():
            base, variant = _split(name, depth)
            bases.setdefault(base, {})[variant] = own
        for base, variants in bases.items():
            shown = [m for m in methods if any(r.method == m for own in variants.values() for r in own)]
            lines = []
            for variant, own in variants.items():
                found = groups(own)
                cells = [_accuracy(found.get(name)) for name in shown]
                lines.append((variant, _ratio(own), *cells))
            notes = [f"{n}: {text}" for n, own in variants.items() for text in _questions(own)]
            everything = [row for own in variants.values() for row in own]
            heading = ("", DELTA.heading, *shown)
            yield Sheet(
                f"{question}-{base}".rstrip("-"), heading, tuple(lines), (*notes, *provenance(everything))
            )

    return sheets


def _split(name: str, depth: int) -> tuple[str, str]:
    parts = name.split("-", depth)
    return ("", parts[1]) if depth == 1 else (parts[1], parts[2])


def _accuracy(group: Group | None) -> str:
    if group is None:
        return "–"
    return value("accuracy")(group) if group.method == "plain" else untrained(group)


def _ratio(rows: Rows) -> str:
    """The source's, and the target's own where no row has a source."""
    ratios = [v for r in rows if r.method != "plain" and (v := r.values.get("delta_ratio")) is not None]
    return mean(ratios, "{:.2f}")


def _questions(rows: Rows) -> list[str]:
    asked = (("fgmt", "naive"), ("gmt", "fgmt"))
    return [f"{a} − {b}: {c}" for a, b in asked if (c := compare_methods(rows, a, b)) is not None]


def inherited(rows: Rows) -> Iterator[Sheet]:
    """The source's own accuracy beside what its transfer comes to, and what training the target does."""
    for sheet in compared("inherits", ("naive", "oracle", "fgmt", "gmt", "plain"), depth=1)(rows):
        sources = {
            _split(name, 1)[1]: spread([r.values.get("source") for r in own if r.method == "fgmt"])
            for name, own in by_scenario(rows).items()
        }
        lines = tuple((name, sources[name], *rest) for name, *rest in sheet.lines)
        notes = [
            f"{_split(name, 1)[1]}: {text}"
            for name, own in by_scenario(rows).items()
            for text in _beyond_the_source(own)
        ]
        heading = ("", "the source itself", *sheet.heading[1:])
        yield Sheet("A poorly pre-trained source", heading, lines, (*notes, *sheet.notes))


def _beyond_the_source(rows: Rows) -> list[str]:
    own = [r for r in rows if r.method in ("fgmt", "gmt", "plain")]
    as_methods = [
        replace(r, method="source", values={"accuracy": r.values["source"]})
        for r in own
        if r.method == "fgmt"
    ]
    found = [
        (name, compare_methods([*own, *as_methods], name, "source")) for name in ("fgmt", "gmt", "plain")
    ]
    return [f"{name} − the source: {c}" for name, c in found if c is not None]


def assumption(rows: Rows) -> Iterator[Sheet]:
    """Distances under each way to choose pi: at the first update, on average, and over the last half."""
    lines = []
    for name, own in by_scenario(rows).items():
        found = groups(own)
        for method, group in found.items():
            cells = [value(part)(group) for part in ("first", "distance", "last")]
            lines.append((f"{_split(name, 1)[1]}, {method}", *cells))
    heading = ("network, permutation", "first update", "mean over looks", "last look")
    if lines:
        yield Sheet("Distance of what two runs learn", heading, tuple(lines), tuple(provenance(rows)))


def theorem(rows: Rows) -> Iterator[Sheet]:
    """One line a width, one column a number of inputs and a permutation."""
    cells: dict[int, dict[str, str]] = {}
    for name, own in by_scenario(rows).items():
        _, side, width = name.split("-")
        for method, group in groups(own).items():
            cells.setdefault(int(width), {})[f"{side}, {method}"] = value("distance")(group)
    columns = list(dict.fromkeys(column for line in cells.values() for column in line))
    lines = tuple(
        (str(width), *(cells[width].get(column, "–") for column in columns)) for width in sorted(cells)
    )
    if lines:
        title = "Distance of the expected gradients at two random starts"
        yield Sheet(title, ("hidden units", *columns), lines, tuple(provenance(rows)))


BASINS = (
    SEEDS,
    Column("barrier [nats]", value("barrier")),
    Column("accuracy of the first", value("accuracy of the first")),
    Column("accuracy of the second", value("accuracy of the second")),
    Column("lowest between", value("lowest accuracy")),
)
ENSEMBLES = (
    SEEDS,
    Column("accuracy", value("accuracy")),
    Column("log-likelihood loss [nats]", value("nll [nats]")),
    Column("calibration error", value("calibration error")),
    Column("mean of members", value("mean of members")),
    Column("disagreement", value("disagreement")),
    Column("CPU s, the source's included", SECONDS.cell),
)


def _share_of_work(group: Group) -> str:
    shares = [own.values["work [FLOP]"] / plain.values["work [FLOP]"] for own, plain in group.beside()]
    return mean(shares, "{:.2%}")


COST = (
    SEEDS,
    Column("gradients", value("gradients", "{:.0f}")),
    Column("FLOP", value("work [FLOP]", "{:.3g}")),
    Column("share of plain training's FLOP", _share_of_work),
    SECONDS,
    PLAIN_SHARE,
)
PEERS = (*COLUMNS[:4], *COLUMNS[5:])
OTHERS = ("random", "end-weights", "end-activations", "end-sinkhorn", "warm-start", "brief", "distillation")


def _basins(rows: Rows) -> Iterator[Sheet]:
    return by_method(BASINS)([row for row in rows if row.method != "plane"])


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


def _seconds_at(images: int) -> Callable[[Group], str]:
    """A cell: CPU seconds of the port with so many images of each class."""
    return lambda group: mean(
        [dict(row.series["cost by images [CPU s]"].points())[images] for row in group.rows if row.series],
        "{:.2g}",
    )


def _counts(rows: Rows) -> list[int]:
    """Images of each class that methods were given."""
    series = [row.series["accuracy by images"] for row in rows if row.series]
    return [int(count) for found in series[:1] for count, _ in found.points()]


def ported(rows: Rows) -> Iterator[Sheet]:
    """One line a method, one column a number of images of each class."""
    for own in by_scenario(rows).values():
        counts = _counts(own)
        columns = (
            SEEDS,
            *(Column(str(count), value(metric_name(count))) for count in counts),
            *(Column(f"CPU s at {count}", _seconds_at(count)) for count in counts[-1:]),
        )
        yield from by_method(columns)(own)


def port_questions(rows: Rows) -> Iterator[Sheet]:
    """Who is ahead of whom, number of images by number: mean difference and p of the paired test."""
    for scenario, own in by_scenario(rows).items():
        counts, lines = _counts(own), []
        for one, other in PORT_QUESTIONS:
            found = [compare_methods(own, one, other, metric_name(count)) for count in counts]
            if any(found):
                pairs = max(each.n for each in found if each)
                lines.append((f"{one} − {other}", str(pairs), *map(_difference, found)))
        if lines:
            yield Sheet(scenario, ("", "n", *map(str, counts)), tuple(lines), tuple(provenance(own)))


def _difference(found: Comparison | None) -> str:
    if found is None:
        return "–"
    return f"{found.difference:+.3f}" + ("" if math.isnan(found.p) else f" (p = {found.p:.2g})")


FIVE = ("naive", "weights", "oracle", "fgmt", "plain")
_main = names(scenarios.COMPARISONS)

TABLES = (
    Table("main", "What a network knows that was never trained", _main, overview),
    Table("methods", "Every scenario", _main, by_method(COLUMNS, QUESTIONS)),
    Table("race", "The training that follows, and its cost", _main, by_method(RACE)),
    Table(
        "peers",
        "What else one could do with the source",
        names(scenarios.PEER_COMPARISONS),
        by_method(PEERS, tuple(("fgmt", other) for other in OTHERS)),
    ),
    Table("regime", "When transfer works", names(scenarios.REGIMES), compared("regime", FIVE)),
    Table("schedules", "Paths", names(scenarios.PATHS), compared("schedule", ("naive", "fgmt", "gmt"))),
    Table(
        "sensitivity",
        "What each setting does",
        names(scenarios.SENSITIVITY),
        compared("sensitivity", ("fgmt", "gmt")),
    ),
    Table("failures", "Where it fails", names(scenarios.FAILURES), compared("fails", FIVE)),
    Table("inherited", "Generalisation inherited", names(scenarios.INHERITANCE), inherited),
    Table("assumption", "Assumption (P)", names(scenarios.ASSUMPTION), assumption),
    Table("theorem", "Theorem A.1", names(scenarios.THEOREM), theorem),
    Table("basins", "Barriers", names(scenarios.BASINS), _basins),
    Table("ensembles", "Ensembles", names(scenarios.ENSEMBLE_COMPARISONS), by_method(ENSEMBLES)),
    Table("cost", "Gradients, operations, seconds", names(scenarios.COSTS), by_method(COST)),
    Table(
        "normalised",
        "FGMT with normalised gradients, a lead of ours",
        names(scenarios.NORMALISED),
        by_method(
            (SEEDS, Column("accuracy, no training", untrained), SECONDS),
            (("nfgmt", "fgmt"), ("nfgmt", "gmt"), ("gmt", "fgmt")),
        ),
    ),
    Table("ports", "A fine-tune on a new base, by images of each class", names(scenarios.PORTS), ported),
    Table("port-questions", "Which port is ahead", names(scenarios.PORTS), port_questions),
)
