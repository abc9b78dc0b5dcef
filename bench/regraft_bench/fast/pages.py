"""The FAST paper's figures 3 to 15 and table 1, and FAST beside its baselines: functions of rows."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from regraft_bench.fast.claims import list_fast_claims
from regraft_bench.fast.scenarios import COMPARISON, PAPER, QUICK_DIGITS, TWO_CORES
from regraft_bench.report.figures import Figure, Panel, curves
from regraft_bench.report.tables import (
    Column,
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
    seconds,
    seeds,
    share_of_plain,
    spread,
    value,
)
from regraft_bench.rows import Row

Rates = tuple[float | None, ...]

# ---------------------------------------------------------------- cells


def rates(row: Row) -> Rates:
    """Of the head and of the features."""
    return tuple(row.config["method"]["rates"])


def rates_cell(group: Group) -> str:
    return ", ".join("–" if rate is None else f"{rate:g}" for rate in rates(group.rows[-1]))


def seeds_cell(group: Group) -> str:
    diverged = sum(row.values.get("diverged [step]") is not None for row in group.rows)
    return seeds(group) + (f" ({diverged} diverged)" if diverged else "")


def steps_cell(group: Group) -> str:
    """The first checkpoint, a mean over seeds, at which 95 % of the scenario's best accuracy at the end is deployed."""
    means = [
        statistics.fmean(found) for g in groups(group.scenario).values() if (found := g.values("accuracy"))
    ]
    reached = [
        next((step for step, accuracy in row.series["deployed"].points() if accuracy >= 0.95 * max(means)), None)
        for row in group.rows
        if "deployed" in row.series
    ]  # fmt: skip
    known = [step for step in reached if step is not None]
    if not known:
        return "never" if reached else "–"
    return f"{statistics.fmean(known):.0f}" + (f" ({len(known)} of {len(reached)})" * (known != reached))


def early_cell(group: Group) -> str:
    """The mean of the deployed accuracy over the checkpoints up to step 21."""
    curves = [row.series["deployed"].points() for row in group.rows if "deployed" in row.series]
    return spread([statistics.fmean(a for step, a in curve if 0 < step <= 21) for curve in curves])


COLUMNS = (
    Column("rates (head, body)", rates_cell),
    Column("seeds", seeds_cell),
    Column("area", value("area")),
    Column("area to step 21", early_cell),
    Column("accuracy", value("accuracy")),
    Column("steps to 95 % of the best", steps_cell),
    Column("source at the start", value("source_start")),
    Column("source area", value("source_area")),
    Column("source at the end", value("source_end")),
    Column("distance", value("distance", "{:.2f}")),
    Column("CPU s", seconds),
)
SUMMARY = (
    Column("rates (head, body)", rates_cell),
    Column("seeds", seeds_cell),
    Column("accuracy", value("accuracy")),
    Column("area", value("area")),
    Column("source at the end", value("source_end")),
    Column("CPU s", seconds),
    Column("share of plain training", share_of_plain),
)
"""Accuracies are of what is deployed: at the end, or (area) on average over the checkpoints. source: what is left."""

# ---------------------------------------------------------------- rates at an edge


@dataclass(frozen=True)
class Edge:
    """Rates that were the best of those tried, and are the smallest or the largest of them: better ones may lie beyond.

    method: its name, or, where a method has lines at several rates, what their names have in common.
    """

    scenario: str
    method: str
    best: Rates
    tried: tuple[Rates, ...]

    def __str__(self) -> str:
        told = ", ".join("–" if rate is None else f"{rate:g}" for rate in self.best)
        return f"{self.method}: the best rates, {told}, are at an edge of the {len(self.tried)} tried"


def at_edge(rows: Rows) -> list[Edge]:
    """Every method whose best rates are at an edge: those tuned (what was tried is in their rows' notes), and those
    whose names end in their rate, of which the best has the largest mean ``validation``.
    """
    found = []
    for scenario, own in by_scenario(rows).items():
        lines: dict[str, dict[Rates, Group]] = {}
        for name, group in groups(own).items():
            chosen = rates(group.rows[-1])
            if tried := group.rows[-1].notes.get("tried"):
                found.append(Edge(scenario, name, chosen, tuple(map(tuple, tried))))
            elif chosen[0] is not None and name.endswith(ending := f" {chosen[0]:g}"):
                lines.setdefault(name.removesuffix(ending), {})[chosen] = group
        for name, family in lines.items():
            scores = {k: statistics.fmean(v) for k, g in family.items() if (v := g.values("validation"))}
            if scores:
                best = max(scores, key=lambda chosen: scores[chosen])
                found.append(Edge(scenario, name, best, tuple(family)))
    return [edge for edge in found if _extreme(edge.best, edge.tried)]


def _extreme(best: Rates, tried: Sequence[Rates]) -> bool:
    """Whether one of the rates is the smallest or the largest of several tried in its place."""
    for rate, places in zip(best, zip(*tried, strict=True), strict=True):
        known = {other for other in places if other is not None}
        if len(known) > 1 and rate in (min(known), max(known)):
            return True
    return False


# ---------------------------------------------------------------- tables


def overview(rows: Rows) -> Iterator[Sheet]:
    """One sheet: a line a method, a column a scenario, with area, source accuracy at the end and distance."""
    found = {scenario: groups(own) for scenario, own in by_scenario(rows).items()}
    methods = dict.fromkeys(name for own in found.values() for name in own)
    lines = tuple((name, *(_in_short(own.get(name)) for own in found.values())) for name in methods)
    if found:
        yield Sheet("Area, source accuracy at the end, distance", ("method", *found), lines)


def _in_short(group: Group | None) -> str:
    forms = {"area": "{:.3f}", "source_end": "{:.2f}", "distance": "{:.1f}"}
    return "–" if group is None else ", ".join(mean(group.values(name), form) for name, form in forms.items())


def comparison(rows: Rows) -> Iterator[Sheet]:
    """A sheet a scenario; methods by their area, then FAST against each of them, and rates at an edge."""
    for sheet in by_method(COLUMNS)(rows):
        own = by_scenario(rows)[sheet.title]
        area = {name: statistics.fmean(g.values("area") or [0.0]) for name, g in groups(own).items()}
        lines = sorted(sheet.lines, key=lambda line: -area[line[0]])
        answers = (
            [_against(own, "fast", line[0]) for line in lines if line[0] != "fast"] if "fast" in area else []
        )
        edges = map(str, at_edge(own))
        yield replace(sheet, lines=tuple(lines), notes=(*answers, *edges, *sheet.notes))


def _against(rows: Rows, method: str, other: str) -> str:
    found = [
        f"{name} {answer}"
        for name, quantity in (
            ("area", "area"),
            ("source at the end", "source_end"),
            ("distance", "distance"),
        )
        if (answer := compare_methods(rows, method, other, quantity)) is not None
    ]
    return f"{method} − {other}: " + "; ".join(found)


def experiments(rows: Rows) -> Iterator[Sheet]:
    """The numbers of the paper's figures: a sheet a scenario."""
    for sheet in by_method(COLUMNS)(rows):
        edges = map(str, at_edge(by_scenario(rows)[sheet.title]))
        yield replace(sheet, notes=(*edges, *sheet.notes))


def published(name: str) -> Mapping[str, Any]:
    """The paper's own numbers: see the files of that folder."""
    return json.loads((files(__package__) / "published" / f"{name}.json").read_text(encoding="utf-8"))


TABLE_1 = published("table_1")


def table_1(scenarios: Sequence[str]) -> Callable[[Rows], Iterator[Sheet]]:
    """One sheet a data set, in the paper's order: our numbers beside the paper's."""

    def sheets(rows: Rows) -> Iterator[Sheet]:
        own = by_scenario(rows)
        columns = [cell for column in TABLE_1["columns"] for cell in (column, "the paper's")]
        for (data, theirs), scenario in zip(TABLE_1["rows"].items(), scenarios, strict=True):
            if scenario in own:
                lines = [_beside(group, theirs.get(name)) for name, group in groups(own[scenario]).items()]
                told = f"the paper's: {data}, {TABLE_1['network']}"
                notes = (told, *map(str, at_edge(own[scenario])), *provenance(own[scenario]))
                yield Sheet(scenario, ("method", "seeds", *columns), tuple(lines), notes)

    return sheets


def _beside(group: Group, theirs: Sequence[Sequence[float]] | None) -> tuple[str, ...]:
    """A line: each of our numbers, then the paper's."""
    ours = [spread([100 * (1 - v) for v in group.values(name)], "{:.2f}") for name in ("accuracy", "top5")]
    ours.append(spread(group.values("distance"), "{:.2f}"))
    papers = ["–"] * 3 if theirs is None else [f"{v:g} ± {s:g}" for v, s in theirs]
    return (group.method, seeds_cell(group), *(c for pair in zip(ours, papers, strict=True) for c in pair))


def names(scenarios: Sequence[Any], *, begin: str = "") -> tuple[str, ...]:
    """Of the scenarios whose name begins so."""
    return tuple(scenario.name for scenario in scenarios if scenario.name.startswith(begin))


LONGEST, LONGEST_PAPER = names(TWO_CORES, begin="convergence"), names(PAPER, begin="convergence")

TABLES = (
    Table("overview", "FAST beside its baselines, in short", names(COMPARISON), overview),
    Table("main", "FAST beside its baselines", names((*COMPARISON, QUICK_DIGITS)), comparison),
    Table("claims", "What the paper says", names((*COMPARISON, *TWO_CORES)), list_fast_claims),
    Table("experiments", "The paper's experiments", names((*TWO_CORES, *PAPER)), experiments),
    Table("table_1", "Table 1", LONGEST, table_1(LONGEST), TABLE_1),
    Table("table_1-paper", "Table 1, at the paper's size", LONGEST_PAPER, table_1(LONGEST_PAPER), TABLE_1),
)

# ---------------------------------------------------------------- figures

_METHODS = {s.name: tuple(m.name for m in s.methods) for s in (*TWO_CORES, *PAPER)}


def _panel(scenario: str, series: str, y: str, title: str = "", *methods: str, y_log: bool = False) -> Panel:
    """A curve over the step, on a logarithmic axis, which has no place for step 0. methods: all if none is named."""
    lines = curves(series, scenario=scenario, methods=methods or None, first=1)
    return Panel(title, "step", y, lines, x_log=True, y_log=y_log)


def _target(scenario: str, title: str, *methods: str) -> Panel:
    return _panel(scenario, "deployed", "target ADP accuracy", title, *methods)


def _norm(scenario: str, title: str, *methods: str) -> Panel:
    return _panel(scenario, "head_norm", "||W||_F", title, *methods, y_log=True)


def _both_tasks(scenario: str) -> tuple[Panel, Panel]:
    return _target(scenario, "target task"), _panel(scenario, "source", "source ADP accuracy", "source task")


def _scaled(scenario: str) -> tuple[Panel, ...]:
    together = ("c, c", "c/10, c/10", "10c, 10c")
    apart = ("c, c", "c, c/10", "10c, c", "c, 10c")
    return tuple(
        panel(scenario, title, *methods)
        for panel in (_target, _norm)
        for title, methods in (("together", together), ("apart", apart))
    )


def _under(densenet: str, vgg: str, *optimisers: str) -> tuple[Panel, Panel]:
    """Every line of one optimiser, or FAST's of several."""
    return tuple(
        _target(scenario, network, *_lines(scenario, optimisers))
        for network, scenario in (("DenseNet", densenet), ("VGG", vgg))
    )


def _lines(scenario: str, optimisers: Sequence[str]) -> tuple[str, ...]:
    begin = [f"{name}: fast" if len(optimisers) > 1 else f"{name}: " for name in optimisers]
    return tuple(name for name in _METHODS[scenario] if name.startswith(tuple(begin)))


def _figures(size: str, first: str, second: str) -> Iterator[Figure]:
    """Figures 3 to 15 in one size; first, second: the scenarios of the longest runs."""
    same, other, frozen, warm, resnet, vgg, *both = (
        f"{name}{size}"
        for name in (
            "initial-same", "initial-other", "frozen-head", "warm-up", "rates-resnet", "rates-vgg",
            "optimisers-densenet", "optimisers-vgg",
        )
    )  # fmt: skip
    validated = _panel(warm, "validated", "validation accuracy", "validation")
    drawn = {
        3: ("Initial classifier: the source task again", (same,), _both_tasks(same)),
        4: ("||W||_F in the runs of figure 3", (same,), (_norm(same, ""),)),
        5: ("Initial classifier: an unrelated target task", (other,), _both_tasks(other)),
        6: ("A random classifier that stays as it is", (frozen,), (_target(frozen, ""),)),
        7: ("Classifier warm-up", (warm,), (validated, _target(warm, "deployed"))),
        8: ("Rates scaled together and apart: residual network", (resnet,), _scaled(resnet)),
        9: ("Rates scaled together and apart: VGG", (vgg,), _scaled(vgg)),
        10: ("FAST and fan-in baselines under SGD with momentum", both, _under(*both, "sgd")),
        11: ("FAST and fan-in baselines under Adam", both, _under(*both, "adam")),
        12: ("FAST and fan-in baselines under RAdam", both, _under(*both, "radam")),
        13: ("FAST under every optimiser", both, _under(*both, "sgd", "nesterov", "adam", "radam")),
        14: ("Convergence: the first data set", (first,), (_target(first, ""),)),
        15: ("Convergence: the second data set", (second,), (_target(second, ""),)),
    }
    for number, (title, scenarios, panels) in drawn.items():
        yield Figure(f"figure_{number}{size}", f"Figure {number}. {title}", tuple(scenarios), panels)


FIGURES = (*_figures("", *LONGEST), *_figures("-paper", *LONGEST_PAPER))
