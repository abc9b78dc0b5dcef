"""The fusion study's pages: every table beside the paper's, an overview of all cells, heat maps and curves."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

from regraft_bench.fusion.accuracy import A, B
from regraft_bench.fusion.claims import list_fusion_claims
from regraft_bench.fusion.nearness import Grid, in_numbers, ours
from regraft_bench.fusion.paper import Published, load_published
from regraft_bench.fusion.recipe_pages import recipes, retained, whole_tables, widths
from regraft_bench.fusion.scenarios import (
    DIGITS,
    FIGURE_FORMULAS,
    FIGURE_SCENARIOS,
    RECIPE_SCENARIOS,
    WHOLE_TABLE_SCENARIOS,
    WIDTH_SCENARIOS,
)
from regraft_bench.report.figures import Cells, Figure, Heatmap, Line, Panel
from regraft_bench.report.tables import (
    COMMON,
    Column,
    Rows,
    Sheet,
    Table,
    by_method,
    by_scenario,
    groups,
    mean,
    percent,
    provenance,
    seconds,
)
from regraft_bench.rows import Row

# ---------------------------------------------------------------- tables


def _measured(rows: Rows) -> Iterator[tuple[str, Published, Grid]]:
    """(scenario, the paper's table, ours) of every table that was measured."""
    for scenario, own in by_scenario(rows).items():
        paper = load_published()[scenario.removeprefix("table-").removesuffix("-paper")]
        if (grid := ours(paper, own)) is not None:
            yield scenario, paper, grid


def overview(rows: Rows) -> Iterator[Sheet]:
    """One line a table, and one for all cells; paper-size runs apart."""
    found = list(_measured(rows))
    for size, wanted in (("all-tables", False), ("all-tables-paper-size", True)):
        own = [entry for entry in found if entry[0].endswith("-paper") == wanted]
        if not own:
            continue
        lines = [
            (paper.table, paper.what, *in_numbers([(grid, paper.values)]), _recipe(rows, scenario))
            for scenario, paper, grid in own
        ]
        lines.append(
            ("all", f"{len(own)} tables", *in_numbers([(grid, paper.values) for _, paper, grid in own]), "")
        )
        heading = (
            "table", "what", "cells", "median difference [points]", "largest [points]",
            "share off by more than 10 points", "rank correlation", "recipe",
        )  # fmt: skip
        yield Sheet(size, heading, tuple(lines))


def _recipe(rows: Rows, scenario: str) -> str:
    """Optimiser, highest rate and epochs of the table's networks; what its rows say, not what would be run today."""
    settings = next(row.config.get("settings", {}) for row in rows if row.scenario == scenario)
    regime = settings.get("regime", {})
    recipe = regime.get(settings.get("scale", "large"))
    if recipe is None:
        return "–"
    return f"{recipe['optimizer']} {recipe['lr']:g}, {recipe['epochs']} epochs, width {regime['width']:g}"


def side_by_side(rows: Rows) -> Iterator[Sheet]:
    """A table's cells beside the paper's, and below them every other method."""
    for scenario, paper, grid in _measured(rows):
        own = by_scenario(rows)[scenario]
        lines = tuple(
            (str(at), *(_cell(o, p) for o, p in zip(line, other, strict=True)))
            for at, line, other in zip(paper.rows, grid, paper.values, strict=True)
        )
        columns = _target_names(own) or [str(column) for column in paper.columns]
        _, median, largest, far, rank = in_numbers([(grid, paper.values)])
        notes = [
            f"{paper.what}; in each cell: ours / the paper's (difference), percent",
            f"median absolute difference {median} points, largest {largest}; {far} of the cells are off by more than "
            f"10 points; rank correlation along {paper.row_name} {rank}",
            *_remarks(own),
            *provenance(own),
        ]
        yield Sheet(scenario, (f"{paper.row_name} \\ {paper.column_name}", *columns), lines, tuple(notes))
        yield from controls(paper, scenario, own)


def _cell(ours: float, theirs: float) -> str:
    return f"{100 * ours:.1f} / {100 * theirs:.1f} ({100 * (ours - theirs):+.1f})"


def _target_names(rows: Rows) -> list[str]:
    """The targets that were really there, where the table has targets."""
    series = next((r.series["accuracy"] for r in rows if "accuracy" in r.series), None)
    return [] if series is None else [str(name) for name in series.at[1]]


def _remarks(rows: Rows) -> list[str]:
    """What stood in for what, and runs that failed."""
    stand_ins = next((r.notes["stands in for"] for r in rows if "stands in for" in r.notes), {})
    return [
        *(f"{name} stands in for {missing}, which is not here" for name, missing in stand_ins.items()),
        *(f"{r.method}, seed {r.seed}: {r.failure}" for r in rows if r.failure),
    ]


BOTH_TASKS = (
    Column("test, task A [%]", percent(A)),
    Column("test, task B [%]", percent(B)),
    Column("harmonic mean [%]", percent("accuracy")),
)
CHOSEN = (
    Column("alpha", lambda group: mean(group.values("alpha"), "{:.3g}")),
    Column("beta", lambda group: mean(group.values("beta"), "{:.3g}")),
)
CHARGED = Column("CPU s", seconds)


def controls(paper: Published, scenario: str, rows: Rows) -> Iterator[Sheet]:
    """Every method of a table's scenario along alpha, and what coefficients chosen on validation reach on test."""
    found = groups(rows)
    if paper.targets:
        at = [str(alpha) for alpha in paper.rows]
        both = (Column("both tasks [%]", percent("both_tasks")),) if paper.targets == "trained" else ()
        columns = (Column("test, alpha chosen [%]", percent("accuracy")), *both, CHARGED)
        along: Callable[[Row], dict[str, str]] = _mean_over_targets
        note = (
            "along alpha: accuracy on the table's images, percent, mean over the targets; both tasks: harmonic mean "
            "with the target's own, alpha chosen for it"
        )
    else:
        at = [str(alpha) for alpha in (0.1, 0.5, 1.0, 5.0)] if paper.formula else []
        columns, along = (*BOTH_TASKS, *CHOSEN, CHARGED), _both_along_alpha
        note = (
            "at alpha = beta: accuracy on the table's images, tasks A (CIFAR-10) / B (CIFAR-100), percent; then on "
            "test images, with coefficients chosen on validation images"
        )
    lines = []
    for method, group in found.items():
        cells = along(group.rows[0])
        lines.append((method, *(cells.get(a, "–") for a in at), *(c.cell(group) for c in columns)))
    heading = ("method", *(f"alpha = {a}" for a in at), *(c.heading for c in columns))
    yield Sheet(f"{scenario}-methods", heading, tuple(lines), (note, "CPU s: beyond the trained networks"))


def _mean_over_targets(row: Row) -> dict[str, str]:
    series = row.series.get("accuracy")
    if series is None:
        return {}
    return {
        str(a): f"{100 * statistics.fmean(line):.1f}"
        for a, line in zip(series.at[0], series.values, strict=True)
    }


def _both_along_alpha(row: Row) -> dict[str, str]:
    """From a control's curve, or the diagonal of a grid."""
    a, b = row.series.get(A), row.series.get(B)
    if a is None or b is None:
        return {}
    if a.axes == ("alpha",):
        positions = {str(at): k for k, at in enumerate(a.at[0])}
        return {at: f"{100 * a.values[k]:.1f} / {100 * b.values[k]:.1f}" for at, k in positions.items()}
    return {
        str(at): f"{100 * a.values[a.at[0].index(at)][k]:.1f} / {100 * b.values[b.at[0].index(at)][k]:.1f}"
        for k, at in enumerate(a.at[1])
        if at in a.at[0]
    }


def theory(rows: Rows) -> Iterator[Sheet]:
    """One line a rate and number of steps."""
    for row in rows:
        names = [
            name for name in ("difference", "predicted", "relative_error", "cosine") if name in row.series
        ]
        steps, rates = row.series[names[0]].at
        lines = tuple(
            (f"{step:g} at {rate:g}", *(f"{row.series[name].values[i][k]:.3g}" for name in names))
            for i, step in enumerate(steps)
            for k, rate in enumerate(rates)
        )
        yield Sheet(row.scenario, ("steps a task, at rate", *names), lines, tuple(provenance([row])))


def _scenarios(number: str) -> tuple[str, str]:
    return f"table-{number}", f"table-{number}-paper"


TABLES = (
    Table(
        "overview",
        "All of the paper's cells",
        tuple(chain.from_iterable(_scenarios(number) for number in load_published())),
        overview,
    ),
    Table(
        "two-tasks",
        "Two tasks in one network",
        (DIGITS.name,),
        by_method((*COMMON, *BOTH_TASKS[:2], *CHOSEN)),
    ),
    Table(
        "claims",
        "What the paper says",
        tuple(f"table-{number}" for number in load_published()),
        list_fusion_claims,
    ),
    Table("recipes", "Which recipe", tuple(s.name for s in RECIPE_SCENARIOS), recipes),
    Table(
        "whole-tables",
        "Other recipes, all cells",
        tuple(s.name for s in (*RECIPE_SCENARIOS, *WHOLE_TABLE_SCENARIOS)),
        whole_tables,
    ),
    Table("widths", "One start or two, by width", tuple(s.name for s in WIDTH_SCENARIOS), widths),
    *(
        Table(f"table-{number}", f"Table {number}: {paper.title}", _scenarios(number), side_by_side)
        for number, paper in load_published().items()
    ),
    Table("appendix-b2", "Appendix B.2: the Hessian term", ("appendix-b2",), theory),
)

# ---------------------------------------------------------------- figures


def _cells(paper: Published, which: str, rows: Rows) -> Cells | None:
    """ "ours", "paper" or "difference", where the table was measured."""
    grid = ours(paper, [row for row in rows if row.scenario == f"table-{paper.table}"])
    if grid is None:
        return None
    values = {
        "ours": grid,
        "paper": paper.values,
        "ours - paper": tuple(
            tuple(o - p for o, p in zip(line, other, strict=True))
            for line, other in zip(grid, paper.values, strict=True)
        ),
    }[which]
    return Cells(tuple(map(str, paper.rows)), tuple(map(str, paper.columns)), values)


def _heatmaps(paper: Published) -> Figure:
    panels = tuple(
        Heatmap(which, "alpha", "beta", partial(_cells, paper, which), low=low)
        for which, low in (("ours", 0.0), ("paper", 0.0), ("ours - paper", -1.0))
    )
    name = f"table-{paper.table}"
    return Figure(name, f"Table {paper.table}: {paper.what}", (name,), panels)


def _curves(number: str, panel: str, rows: Rows) -> list[Line]:
    """Accuracy over alpha: a line a target, a zero target's, and the paper's columns where a table has them."""
    lines = []
    for row in rows:
        series = row.series.get(panel)
        if row.seed != 0 or series is None:
            continue
        columns = list(zip(*series.values, strict=True))
        names = [str(name) for name in series.at[1]] if row.method == "sum" else [row.method]
        lines += [
            Line(name, series.at[0], tuple(column)) for name, column in zip(names, columns, strict=False)
        ]
    tabled = next((t for t in load_published().values() if t.figure == f"{number}{_letter(panel)}"), None)
    if tabled is not None and lines:
        lines += [
            Line(line.name, tabled.rows, column, dashed=True)
            for line, column in zip(lines, zip(*tabled.values, strict=True), strict=False)
        ]
    return lines


def _letter(panel: str) -> str:
    names = [p.name for p in FIGURE_SCENARIOS[0].settings.panels]
    return "abcd"[names.index(panel)]


def _figure(number: str) -> Figure:
    formula, onto = FIGURE_FORMULAS[number]
    scenario = FIGURE_SCENARIOS[list(FIGURE_FORMULAS).index(number)]
    panels = tuple(
        Panel(panel.name, "alpha", "accuracy", partial(_curves, number, panel.name), x_log=True)
        for panel in scenario.settings.panels
    )
    return Figure(
        f"figure-{number}",
        f"Figure {number}: {formula}, {onto} targets (dashed: the paper's)",
        (scenario.name,),
        panels,
    )


FIGURE_PAGES = (
    *(_figure(number) for number in FIGURE_FORMULAS),
    Figure(
        "recipes",
        "What theta_A + theta_B retains",
        tuple(s.name for s in RECIPE_SCENARIOS),
        (Panel("", "‖g‖ / ‖theta_0‖", "accuracy", retained, x_log=True, markers=True),),
    ),
    *(_heatmaps(paper) for paper in load_published().values() if paper.column_name == "alpha"),
)
