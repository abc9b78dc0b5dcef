"""The fusion study's pages: every table beside the paper's, an overview of all cells, heat maps and curves."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from regraft_bench.fusion.accuracy import A, B
from regraft_bench.fusion.claims import list_fusion_claims
from regraft_bench.fusion.nearness import CellGrid, average_cells, measure_agreement
from regraft_bench.fusion.paper import Published, load_published
from regraft_bench.fusion.recipe_pages import compare_widths, draw_retained, list_recipes, list_whole_tables
from regraft_bench.fusion.scenarios import (
    FIGURE_FORMULAS,
    FIGURE_SCENARIOS,
    RECIPE_SCENARIOS,
    TWO_DIGIT_TASKS,
    WHOLE_TABLE_SCENARIOS,
    WIDTH_SCENARIOS,
)
from regraft_bench.fusion.theory import HESSIAN_VALUES
from regraft_bench.report.figures import Cells, Figure, Heatmap, Line, Panel
from regraft_bench.report.tables import (
    COMMON,
    Column,
    Group,
    Rows,
    Sheet,
    Table,
    by_method,
    by_scenario,
    groups,
    make_sheet,
    mean,
    percent,
    provenance,
    seconds,
)
from regraft_bench.rows import Row

# ---------------------------------------------------------------- tables


def _find_measured(rows: Rows) -> Iterator[tuple[str, Published, CellGrid]]:
    """(scenario, the paper's table, our cells) of every table that was measured."""
    for scenario, own in by_scenario(rows).items():
        paper = load_published()[scenario.removeprefix("table-").removesuffix("-paper")]
        if (grid := average_cells(paper, own)) is not None:
            yield scenario, paper, grid


def summarise_tables(rows: Rows) -> Iterator[Sheet]:
    """One line a table, and one for all cells; paper-size runs apart."""
    heading = (
        "table", "what", "cells", "median difference [points]", "largest [points]",
        "share off by more than 10 points", "rank correlation", "recipe",
    )  # fmt: skip
    measured = list(_find_measured(rows))
    for title, at_paper_size in (("all-tables", False), ("all-tables-paper-size", True)):
        own = [entry for entry in measured if entry[0].endswith("-paper") == at_paper_size]
        lines = [
            (paper.table, paper.what, *_compare_cells((paper, grid)), _describe_recipe(rows, scenario))
            for scenario, paper, grid in own
        ]
        if own:
            everything = _compare_cells(*((paper, grid) for _, paper, grid in own))
            lines.append(("all", f"{len(own)} tables", *everything, ""))
            yield Sheet(title, heading, tuple(lines))


def _compare_cells(*tables: tuple[Published, CellGrid]) -> tuple[str, ...]:
    return measure_agreement([(grid, paper.values) for paper, grid in tables]).to_text()


def _describe_recipe(rows: Rows, scenario: str) -> str:
    """Optimiser, highest rate and epochs of the table's networks; what its rows say, not what would be run today."""
    settings = next(row.config.get("settings", {}) for row in rows if row.scenario == scenario)
    regime = settings.get("regime", {})
    recipe = regime.get(settings.get("scale", "large"))
    if recipe is None:
        return "–"
    return f"{recipe['optimizer']} {recipe['lr']:g}, {recipe['epochs']} epochs, width {regime['width']:g}"


def show_beside_paper(rows: Rows) -> Iterator[Sheet]:
    """A table's cells beside the paper's, and below them every other method."""
    for scenario, paper, grid in _find_measured(rows):
        own = by_scenario(rows)[scenario]
        lines = {str(at): pairs for at, *pairs in zip(paper.rows, grid, paper.values, strict=True)}
        headings = _target_names(own) or [str(column) for column in paper.columns]
        columns = [Column(heading, partial(_cell_beside_paper, k)) for k, heading in enumerate(headings)]
        _, median, largest, far, rank = _compare_cells((paper, grid))
        notes = (
            f"{paper.what}; in each cell: ours / the paper's (difference), percent",
            f"median absolute difference {median} points, largest {largest}; {far} of the cells are off by more than "
            f"10 points; rank correlation along {paper.row_name} {rank}",
            *_list_remarks(own),
            *provenance(own),
        )
        yield make_sheet(scenario, f"{paper.row_name} \\ {paper.column_name}", columns, lines, notes)
        yield _compare_all_methods(paper, scenario, own)


def _cell_beside_paper(column: int, pair: Sequence[Sequence[float]]) -> str:
    ours, papers = (line[column] for line in pair)
    return f"{100 * ours:.1f} / {100 * papers:.1f} ({100 * (ours - papers):+.1f})"


def _target_names(rows: Rows) -> list[str]:
    """The targets that were really there, where the table has targets."""
    series = next((r.series["accuracy"] for r in rows if "accuracy" in r.series), None)
    return [] if series is None else [str(name) for name in series.at[1]]


def _list_remarks(rows: Rows) -> list[str]:
    """What stood in for what, and runs that failed."""
    stand_ins: Mapping[str, str] = next((r.notes["stands in for"] for r in rows if "stands in for" in r.notes), {})
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
CONTROL_ALPHAS = (0.1, 0.5, 1.0, 5.0)


def _compare_all_methods(paper: Published, scenario: str, rows: Rows) -> Sheet:
    """Every method of a table's scenario along alpha, and what coefficients chosen on validation reach on test."""
    if paper.targets:
        both = (Column("both tasks [%]", percent("both_tasks")),) if paper.targets == "trained" else ()
        alphas, along = paper.rows, _mean_over_targets
        columns = (Column("test, alpha chosen [%]", percent("accuracy")), *both, CHARGED)
        note = (
            "along alpha: accuracy on the table's images, percent, mean over the targets; both tasks: harmonic mean "
            "with the target's own, alpha chosen for it"
        )
    else:
        alphas, along = CONTROL_ALPHAS if paper.formula else (), _both_along_alpha
        columns = (*BOTH_TASKS, *CHOSEN, CHARGED)
        note = (
            "at alpha = beta: accuracy on the table's images, tasks A (CIFAR-10) / B (CIFAR-100), percent; then on "
            "test images, with coefficients chosen on validation images"
        )

    def cell(alpha: float, group: Group) -> str:
        return along(group.rows[0]).get(alpha, "–")

    at_alphas = [Column(f"alpha = {alpha}", partial(cell, alpha)) for alpha in alphas]
    notes = (note, "CPU s: beyond the trained networks")
    return make_sheet(f"{scenario}-methods", "method", (*at_alphas, *columns), groups(rows), notes)


def _mean_over_targets(row: Row) -> dict[float | str, str]:
    if (series := row.series.get("accuracy")) is None:
        return {}
    return {a: f"{100 * statistics.fmean(line):.1f}" for a, line in zip(series.at[0], series.values, strict=True)}


def _both_along_alpha(row: Row) -> dict[float | str, str]:
    """From a control's curve, or the diagonal of a grid (beta, alpha)."""
    if A not in row.series or B not in row.series:
        return {}
    a, b = row.series[A], row.series[B]
    if a.axes == ("alpha",):
        pairs = {at: (a.values[k], b.values[k]) for k, at in enumerate(a.at[0])}
    else:
        rows = {at: number for number, at in enumerate(a.at[0])}
        pairs = {at: (a.values[rows[at]][k], b.values[rows[at]][k]) for k, at in enumerate(a.at[1]) if at in rows}
    return {at: f"{100 * on_a:.1f} / {100 * on_b:.1f}" for at, (on_a, on_b) in pairs.items()}


def list_hessian_terms(rows: Rows) -> Iterator[Sheet]:
    """One line a rate and number of steps."""
    for row in rows:
        names = [name for name in HESSIAN_VALUES if name in row.series]
        columns = [Column(name, partial(_format_at, row.series[name].values)) for name in names]
        steps, rates = row.series[names[0]].at
        lines = {f"{s:g} at {r:g}": (i, k) for i, s in enumerate(steps) for k, r in enumerate(rates)}
        yield make_sheet(row.scenario, "steps a task, at rate", columns, lines, provenance([row]))


def _format_at(values: Sequence[Sequence[float]], position: tuple[int, int]) -> str:
    return f"{values[position[0]][position[1]]:.3g}"


PAPER_TABLES = {number: (f"table-{number}", f"table-{number}-paper") for number in load_published()}
"""The scenarios of each published table, in two sizes."""

FUSION_TABLES = (
    Table("overview", "All of the paper's cells", sum(PAPER_TABLES.values(), ()), summarise_tables),
    Table(
        "two-tasks",
        "Two tasks in one network",
        (TWO_DIGIT_TASKS.name,),
        by_method((*COMMON, *BOTH_TASKS[:2], *CHOSEN)),
    ),
    Table("claims", "What the paper says", tuple(name for name, _ in PAPER_TABLES.values()), list_fusion_claims),
    Table("recipes", "Which recipe", tuple(s.name for s in RECIPE_SCENARIOS), list_recipes),
    Table(
        "whole-tables",
        "Other recipes, all cells",
        tuple(s.name for s in (*RECIPE_SCENARIOS, *WHOLE_TABLE_SCENARIOS)),
        list_whole_tables,
    ),
    Table("widths", "One start or two, by width", tuple(s.name for s in WIDTH_SCENARIOS), compare_widths),
    *(
        Table(f"table-{number}", f"Table {number}: {paper.title}", PAPER_TABLES[number], show_beside_paper)
        for number, paper in load_published().items()
    ),
    Table("appendix-b2", "Appendix B.2: the Hessian term", ("appendix-b2",), list_hessian_terms),
)

# ---------------------------------------------------------------- figures


def _select_cells(paper: Published, which: str, rows: Rows) -> Cells | None:
    """ "ours", "paper" or "ours - paper", where the table was measured."""
    grid = average_cells(paper, [row for row in rows if row.scenario == f"table-{paper.table}"])
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


def _make_heatmaps(paper: Published) -> Figure:
    panels = tuple(
        Heatmap(which, "alpha", "beta", partial(_select_cells, paper, which), low=low)
        for which, low in (("ours", 0.0), ("paper", 0.0), ("ours - paper", -1.0))
    )
    name = f"table-{paper.table}"
    caption = "Accuracy of every sum; on the right red cells are below the paper's, blue ones above."
    return Figure(name, f"Table {paper.table}: {paper.what}", (name,), panels, caption)


def _draw_curves(number: str, panel: str, rows: Rows) -> list[Line]:
    """Accuracy over alpha: a line a target, a zero target's, and the paper's columns where a table has them."""
    lines: list[Line] = []
    for row in rows:
        if row.seed == 0 and (series := row.series.get(panel)) is not None:
            names = [str(name) for name in series.at[1]] if row.method == "sum" else [row.method]
            columns = zip(*series.values, strict=True)
            lines += [Line(name, series.at[0], column) for name, column in zip(names, columns, strict=False)]
    letter = "abcd"[[p.name for p in FIGURE_SCENARIOS[0].settings.panels].index(panel)]
    tables = [table for table in load_published().values() if table.figure == number + letter and lines]
    return lines + [
        Line(line.name, table.rows, column, dashed=True)
        for table in tables[:1]
        for line, column in zip(lines, zip(*table.values, strict=True), strict=False)
    ]


def _make_figure(number: str) -> Figure:
    formula, onto = FIGURE_FORMULAS[number]
    scenario = FIGURE_SCENARIOS[list(FIGURE_FORMULAS).index(number)]
    panels = tuple(
        Panel(panel.name, "alpha", "accuracy", partial(_draw_curves, number, panel.name), x_log=True)
        for panel in scenario.settings.panels
    )
    return Figure(
        f"figure-{number}",
        f"Figure {number}: {formula}, {onto} targets (dashed: the paper's)",
        (scenario.name,),
        panels,
        "Accuracy on the gradient's task. Lines that reach g alone say that the target is overwritten. One seed.",
    )


FUSION_FIGURES = (
    *(_make_figure(number) for number in FIGURE_FORMULAS),
    Figure(
        "recipes",
        "What theta_A + theta_B retains",
        tuple(s.name for s in RECIPE_SCENARIOS),
        (Panel("", "‖g‖ / ‖theta_0‖", "accuracy", draw_retained, x_log=True, joined=False),),
        "A point is a training recipe: a sum keeps both tasks where training moved the weights little.",
    ),
    *(_make_heatmaps(paper) for paper in load_published().values() if paper.column_name == "alpha"),
)
