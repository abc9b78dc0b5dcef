"""What there is to measure: studies, scenarios, methods, tables, figures and data sets, for the command line."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.data import MissingData, load
from regraft_bench.report.render import glossary, load_rows
from regraft_bench.report.tables import Sheet, current
from regraft_bench.rows import Row
from regraft_bench.studies import STUDIES, study
from regraft_bench.study import Scenario, Study
from regraft_bench.text import STANDARD_LIBRARY


def list_studies(results: Path, data: Path | None) -> Iterator[Sheet]:
    """A line for each study, then the data sets that scenarios need, and whether they are there."""
    studies = [study(name) for name in STUDIES]
    lines = tuple(
        (one.name, one.title, str(len(one.scenarios)), f"{len(one.quick)}", _format_hours(load_rows(results, one)))
        for one in studies
    )
    yield Sheet("Studies", ("name", "of", "scenarios", "quick", "CPU hours, all"), lines)
    needs: dict[str, int] = {}
    for scenario in (scenario for one in studies for scenario in one.scenarios):
        for name in find_data(scenario.config(scenario.methods[0])):
            needs[name] = needs.get(name, 0) + 1
    sets = tuple((name, str(count), _find(name, data)) for name, count in needs.items())
    yield Sheet("Data sets", ("name", "scenarios", "here"), sets)


def list_study(one: Study, results: Path) -> Iterator[Sheet]:
    """A study's scenarios with what they need and take, its methods, tables and figures."""
    rows = load_rows(results, one)
    yield Sheet(
        f"{one.title}: scenarios (* quick)",
        ("scenario", "data", "methods", "seeds", "CPU s a seed"),
        tuple(_describe_scenario(scenario, one, rows) for scenario in one.scenarios),
    )
    yield Sheet("Methods", ("name", "what it does"), tuple((names, about) for about, names in glossary(one).items()))
    for kind, items in (("Tables", one.tables), ("Figures", one.figures)):
        yield Sheet(kind, ("name", "of"), tuple((item.name, item.title) for item in items))


def find_data(config: Any) -> list[str]:
    """The data sets that a configuration names, wherever in it."""
    if isinstance(config, Mapping):
        own = [config["data"]] if isinstance(config.get("data"), str) else []
        config = list(config.values())
    else:
        own = []
    parts = config if isinstance(config, list | tuple) else []
    return list(dict.fromkeys([*own, *(name for part in parts for name in find_data(part))]))


def _describe_scenario(scenario: Scenario, one: Study, rows: Sequence[Row]) -> tuple[str, ...]:
    by_seed: dict[int, float] = {}
    for row in current(rows, (scenario.name,)):
        by_seed[row.seed] = by_seed.get(row.seed, 0.0) + sum(cost.cpu for cost in row.cost.values())
    took = statistics.fmean(by_seed.values()) if by_seed else 0.0
    name = scenario.name + "*" * (scenario.name in one.quick)
    data = ", ".join(find_data(scenario.config(scenario.methods[0]))) or "none"
    return (name, data, str(len(scenario.methods)), str(scenario.seeds), f"{took:,.1f}" if took else "–")


def _format_hours(rows: Sequence[Row]) -> str:
    seconds = sum(cost.cpu for row in current(rows) for cost in row.cost.values())
    return f"{seconds / 3600:.2g}" if seconds else "–"


def _find(name: str, root: Path | None) -> str:
    if name == STANDARD_LIBRARY:
        return "yes"
    try:
        load(name, root=root)
    except (MissingData, ValueError):
        return "no"
    return "yes"
