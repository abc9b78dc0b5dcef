"""The FAST paper's figures 3 to 15 and table 1, and FAST beside its baselines: functions of rows."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from typing import Any

from regraft_bench.fast.claims import early_accuracy, list_fast_claims
from regraft_bench.fast.methods import Rates
from regraft_bench.fast.scenarios import COMPARISON, PAPER, QUICK_BATCHNORM, QUICK_DIGITS, TWO_CORES
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
    make_sheet,
    mean,
    provenance,
    seconds,
    seeds,
    share_of_plain,
    spread,
    value,
)

# ---------------------------------------------------------------- cells


def _read_rates(group: Group) -> Rates:
    """Of the head and of the features, from the newest row."""
    head, body = group.rows[-1].config["method"]["rates"]
    return head, body


def _format_rates(rates: Rates) -> str:
    return ", ".join("–" if rate is None else f"{rate:g}" for rate in rates)


def count_seeds(group: Group) -> str:
    diverged = sum(row.values.get("diverged [step]") is not None for row in group.rows)
    return seeds(group) + (f" ({diverged} diverged)" if diverged else "")


def count_steps_to_best(group: Group) -> str:
    """The first checkpoint, a mean over seeds, at which 95 % of the scenario's best accuracy at the end is deployed."""
    means = [statistics.fmean(own) for g in groups(group.scenario).values() if (own := g.values("accuracy"))]
    reached = [
        next((step for step, accuracy in row.series["deployed"].points() if accuracy >= 0.95 * max(means)), None)
        for row in group.rows
        if "deployed" in row.series
    ]  # fmt: skip
    known = [step for step in reached if step is not None]
    if not known:
        return "never" if reached else "–"
    return f"{statistics.fmean(known):.0f}" + (f" ({len(known)} of {len(reached)})" * (known != reached))


FAST_COLUMNS = (
    Column("rates (head, body)", lambda group: _format_rates(_read_rates(group))),
    Column("seeds", count_seeds),
    Column("area", value("area")),
    Column("area to step 21", lambda group: spread([early_accuracy(row) for row in group.rows])),
    Column("accuracy", value("accuracy")),
    Column("steps to 95 % of the best", count_steps_to_best),
    Column("source at the start", value("source_start")),
    Column("source area", value("source_area")),
    Column("source at the end", value("source_end")),
    Column("distance", value("distance", "{:.2f}")),
    Column("CPU s", seconds),
)
FAST_SUMMARY = (
    Column("rates (head, body)", lambda group: _format_rates(_read_rates(group))),
    Column("seeds", count_seeds),
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
        best = _format_rates(self.best)
        return f"{self.method}: the best rates, {best}, are at an edge of the {len(self.tried)} tried"


def find_edges(rows: Rows) -> list[Edge]:
    """Every method whose best rates are at an edge: those tuned (what was tried is in their rows' notes), and those
    whose names end in their rate, of which the best has the largest mean ``validation``.
    """
    edges = []
    for scenario, own in by_scenario(rows).items():
        lines: dict[str, dict[Rates, Group]] = {}
        for name, group in groups(own).items():
            best = _read_rates(group)
            if tried := group.rows[-1].notes.get("tried"):
                edges.append(Edge(scenario, name, best, tuple(map(tuple, tried))))
            elif best[0] is not None and name.endswith(ending := f" {best[0]:g}"):
                lines.setdefault(name.removesuffix(ending), {})[best] = group
        for name, family in lines.items():
            scores = {k: statistics.fmean(v) for k, g in family.items() if (v := g.values("validation"))}
            if scores:
                edges.append(Edge(scenario, name, max(scores, key=scores.__getitem__), tuple(family)))
    return [edge for edge in edges if _is_extreme(edge.best, edge.tried)]


def _is_extreme(best: Rates, tried: Sequence[Rates]) -> bool:
    """Whether one of the rates is the smallest or the largest of several tried in its place."""
    for rate, places in zip(best, zip(*tried, strict=True), strict=True):
        known = {other for other in places if other is not None}
        if len(known) > 1 and rate in (min(known), max(known)):
            return True
    return False


# ---------------------------------------------------------------- tables


def summarise_comparison(rows: Rows) -> Iterator[Sheet]:
    """One sheet: a line a method, a column a scenario, with area, source accuracy at the end and distance."""
    scenarios = {scenario: groups(own) for scenario, own in by_scenario(rows).items()}
    columns = [Column(scenario, partial(_summarise, own)) for scenario, own in scenarios.items()]
    methods = {name: name for own in scenarios.values() for name in own}
    if scenarios:
        yield make_sheet("Area, source accuracy at the end, distance", "method", columns, methods)


def _summarise(by_name: Mapping[str, Group], method: str) -> str:
    if method not in by_name:
        return "–"
    forms = {"area": "{:.3f}", "source_end": "{:.2f}", "distance": "{:.1f}"}
    return ", ".join(mean(by_name[method].values(name), form) for name, form in forms.items())


def compare_with_fast(rows: Rows) -> Iterator[Sheet]:
    """A sheet a scenario; methods by their area, then FAST against each of them, and rates at an edge."""
    for own in by_scenario(rows).values():
        area = {name: statistics.fmean(g.values("area") or [0.0]) for name, g in groups(own).items()}
        (sheet,) = list_experiments(own)
        lines = sorted(sheet.lines, key=lambda line: -area[line[0]])
        others = [line[0] for line in lines if line[0] != "fast" and "fast" in area]
        answers = [_compare_in_words(own, "fast", other) for other in others]
        yield replace(sheet, lines=tuple(lines), notes=(*answers, *sheet.notes))


def _compare_in_words(rows: Rows, method: str, other: str) -> str:
    quantities = {"area": "area", "source at the end": "source_end", "distance": "distance"}
    answers = {name: compare_methods(rows, method, other, value) for name, value in quantities.items()}
    known = [f"{name} {answer}" for name, answer in answers.items() if answer is not None]
    return f"{method} − {other}: " + "; ".join(known)


def list_experiments(rows: Rows) -> Iterator[Sheet]:
    """The numbers of the paper's figures: a sheet a scenario."""
    for sheet in by_method(FAST_COLUMNS)(rows):
        edges = map(str, find_edges(by_scenario(rows)[sheet.title]))
        yield replace(sheet, notes=(*edges, *sheet.notes))


TABLE_1: Mapping[str, Any] = json.loads((files(__package__) / "published" / "table_1.json").read_text("utf-8"))
"""The paper's own numbers."""


def compare_table_1(scenarios: Sequence[str]) -> Callable[[Rows], Iterator[Sheet]]:
    """One sheet a data set, in the paper's order: our numbers beside the paper's."""
    error, top5_error, distance = TABLE_1["columns"]

    def papers(number: int, numbers: Mapping[str, Sequence[Sequence[float]]], group: Group) -> str:
        return "{:g} ± {:g}".format(*numbers[group.method][number]) if group.method in numbers else "–"

    def sheets(rows: Rows) -> Iterator[Sheet]:
        own = by_scenario(rows)
        for (data, numbers), scenario in zip(TABLE_1["rows"].items(), scenarios, strict=True):
            if scenario in own:
                columns = (
                    Column("seeds", count_seeds),
                    Column(error, _error("accuracy")),
                    Column("the paper's", partial(papers, 0, numbers)),
                    Column(top5_error, _error("top5")),
                    Column("the paper's", partial(papers, 1, numbers)),
                    Column(distance, value("distance", "{:.2f}")),
                    Column("the paper's", partial(papers, 2, numbers)),
                )
                notes = (
                    f"the paper's: {data}, {TABLE_1['network']}",
                    *map(str, find_edges(own[scenario])),
                    *provenance(own[scenario]),
                )
                yield make_sheet(scenario, "method", columns, groups(own[scenario]), notes)

    return sheets


def _error(name: str) -> Callable[[Group], str]:
    return lambda group: spread([100 * (1 - accuracy) for accuracy in group.values(name)], "{:.2f}")


def scenario_names(scenarios: Sequence[Any], *, begin: str = "") -> tuple[str, ...]:
    """Of the scenarios whose name begins so."""
    return tuple(scenario.name for scenario in scenarios if scenario.name.startswith(begin))


LONGEST, LONGEST_PAPER = (
    scenario_names(TWO_CORES, begin="convergence"),
    scenario_names(PAPER, begin="convergence"),
)

FAST_TABLES = (
    Table("overview", "FAST beside its baselines, in short", scenario_names(COMPARISON), summarise_comparison),
    Table(
        "main",
        "FAST beside its baselines",
        scenario_names((*COMPARISON, QUICK_DIGITS, QUICK_BATCHNORM)),
        compare_with_fast,
    ),
    Table("claims", "What the paper says", scenario_names((*COMPARISON, *TWO_CORES)), list_fast_claims),
    Table("experiments", "The paper's experiments", scenario_names((*TWO_CORES, *PAPER)), list_experiments),
    Table("table_1", "Table 1", LONGEST, compare_table_1(LONGEST), TABLE_1),
    Table(
        "table_1-paper",
        "Table 1, at the paper's size",
        LONGEST_PAPER,
        compare_table_1(LONGEST_PAPER),
        TABLE_1,
    ),
)

# ---------------------------------------------------------------- figures

_METHODS = {s.name: tuple(m.name for m in s.methods) for s in (*TWO_CORES, *PAPER)}


def _draw_curves(scenario: str, series: str, y: str, title: str = "", *methods: str, y_log: bool = False) -> Panel:
    """A curve over the step, on a logarithmic axis, which has no place for step 0. methods: all if none is named."""
    lines = curves(series, scenario=scenario, methods=methods or None, first=1)
    return Panel(title, "step", y, lines, x_log=True, y_log=y_log)


def _draw_target(scenario: str, title: str, *methods: str) -> Panel:
    return _draw_curves(scenario, "deployed", "target ADP accuracy", title, *methods)


def _draw_norm(scenario: str, title: str, *methods: str) -> Panel:
    return _draw_curves(scenario, "head_norm", "||W||_F", title, *methods, y_log=True)


def _draw_both_tasks(scenario: str) -> tuple[Panel, Panel]:
    return _draw_target(scenario, "target task"), _draw_curves(scenario, "source", "source ADP accuracy", "source task")


def _scale_rates(scenario: str) -> tuple[Panel, ...]:
    together = ("c, c", "c/10, c/10", "10c, 10c")
    apart = ("c, c", "c, c/10", "10c, c", "c, 10c")
    return tuple(
        panel(scenario, title, *methods)
        for panel in (_draw_target, _draw_norm)
        for title, methods in (("together", together), ("apart", apart))
    )


def _compare_networks(densenet: str, vgg: str, *optimisers: str) -> tuple[Panel, ...]:
    """Every line of one optimiser, or FAST's of several."""
    begin = tuple(f"{name}: fast" if len(optimisers) > 1 else f"{name}: " for name in optimisers)
    return tuple(
        _draw_target(scenario, network, *(name for name in _METHODS[scenario] if name.startswith(begin)))
        for network, scenario in (("DenseNet", densenet), ("VGG", vgg))
    )


CAPTIONS = {
    3: "A line is the scale of the first classifier; the source task is measured with the same features.",
    4: "Whether a small first classifier grows to the norm of the others, and how soon.",
    5: "As figure 3, with a target task that has nothing to do with the source.",
    6: "alpha: the rate of the features; with a classifier that is never trained only they can learn.",
    7: "warm-up trains the classifier alone first; statistics: those of BatchNorm follow the target, too.",
    8: "Pairs are the rates of features and classifier, in units of those that a search chose.",
    9: "Pairs are the rates of features and classifier, in units of those that a search chose.",
    10: "FAST, and fan-in baselines at five rates of the classifier.",
    11: "FAST, and fan-in baselines at five rates of the classifier.",
    12: "FAST, and fan-in baselines at five rates of the classifier.",
    13: "Lines that lie close together say that the choice of the optimiser matters little.",
    14: "The baseline at five rates; early accuracy is what FAST is for.",
    15: "The baseline at five rates; early accuracy is what FAST is for.",
}
"""What to see in each figure."""


def _make_figures(size: str, first: str, second: str) -> Iterator[Figure]:
    """Figures 3 to 15 in one size; first, second: the scenarios of the longest runs."""
    same, other, frozen, warm, resnet, vgg, *both = (
        f"{name}{size}"
        for name in (
            "initial-same", "initial-other", "frozen-head", "warm-up", "rates-resnet", "rates-vgg",
            "optimisers-densenet", "optimisers-vgg",
        )
    )  # fmt: skip
    validated = _draw_curves(warm, "validated", "validation accuracy", "validation")
    figures = {
        3: ("Initial classifier: the source task again", (same,), _draw_both_tasks(same)),
        4: ("||W||_F in the runs of figure 3", (same,), (_draw_norm(same, ""),)),
        5: ("Initial classifier: an unrelated target task", (other,), _draw_both_tasks(other)),
        6: ("A random classifier that stays as it is", (frozen,), (_draw_target(frozen, ""),)),
        7: ("Classifier warm-up", (warm,), (validated, _draw_target(warm, "deployed"))),
        8: ("Rates scaled together and apart: residual network", (resnet,), _scale_rates(resnet)),
        9: ("Rates scaled together and apart: VGG", (vgg,), _scale_rates(vgg)),
        10: ("FAST and fan-in baselines under SGD with momentum", both, _compare_networks(*both, "sgd")),
        11: ("FAST and fan-in baselines under Adam", both, _compare_networks(*both, "adam")),
        12: ("FAST and fan-in baselines under RAdam", both, _compare_networks(*both, "radam")),
        13: (
            "FAST under every optimiser",
            both,
            _compare_networks(*both, "sgd", "nesterov", "adam", "radam"),
        ),
        14: ("Convergence: the first data set", (first,), (_draw_target(first, ""),)),
        15: ("Convergence: the second data set", (second,), (_draw_target(second, ""),)),
    }
    for number, (title, scenarios, panels) in figures.items():
        name = f"figure_{number}{size}"
        yield Figure(name, f"Figure {number}. {title}", tuple(scenarios), panels, CAPTIONS[number])


FAST_FIGURES = (*_make_figures("", *LONGEST), *_make_figures("-paper", *LONGEST_PAPER))
