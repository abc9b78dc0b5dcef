"""The fusion study's pages: every table beside the paper's, an overview of all cells, heat maps and curves."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from regraft.studies.figures import Cells, Figure, Heatmap, Line, Panel
from regraft.studies.fusion.claims import claims
from regraft.studies.fusion.paper import Published, published
from regraft.studies.fusion.scenarios import (
    CANDIDATES,
    DIGITS,
    FIGURE_SCENARIOS,
    FIGURES,
    RECIPES,
    WHOLE,
    WHOLE_TABLES,
    WIDTHS,
)
from regraft.studies.fusion.setting import A, B
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
    provenance,
    seconds,
    seeds,
)

Grid = tuple[tuple[float, ...], ...]
FAR = 0.1  # ten points: a cell that differs by more is not the paper's

# ---------------------------------------------------------------- ours beside the paper's


def ours(paper: Published, rows: Rows) -> Grid | None:
    """Our cells of a published table, means over seeds; None where it was not measured."""
    if not paper.formula:
        return _table_5(rows)
    name = "accuracy" if paper.targets else A if paper.task == "CIFAR-10" else B
    return mean_grid([r.series[name].values for r in rows if r.method == "sum" and name in r.series])


def _table_5(rows: Rows) -> Grid | None:
    """The two orders of sequential training, on training and test images of both tasks."""
    names, found = ("training_a", "training_b", A, B), groups(rows)
    lines = [
        tuple(statistics.fmean(own) for name in names if (own := found[method].values(name)))
        for method in ("A then B", "B then A")
        if method in found
    ]
    return tuple(lines) if [len(line) for line in lines] == [4, 4] else None


def mean_grid(grids: Sequence[Sequence[Sequence[float]]]) -> Grid | None:
    """Cell by cell."""
    if not grids:
        return None
    return tuple(
        tuple(statistics.fmean(cells) for cells in zip(*lines, strict=True))
        for lines in zip(*grids, strict=True)
    )


@dataclass(frozen=True)
class Agreement:
    """How near two grids are.

    cells: how many. median, largest: of the absolute differences, 0 to 1. far: the share that is off by more than ten
    points. rank: the mean over columns of Spearman's rank correlation along the rows (None where neither varies).
    """

    cells: int
    median: float
    largest: float
    far: float
    rank: float | None


def agreement(pairs: Sequence[tuple[Grid, Grid]]) -> Agreement:
    """Of all cells of several (ours, paper's). Raises ValueError where two have different shapes."""
    sizes = [
        abs(o - p)
        for mine, theirs in pairs
        for line, other in zip(mine, theirs, strict=True)
        for o, p in zip(line, other, strict=True)
    ]
    ranks = [
        rank
        for mine, theirs in pairs
        for column, other in zip(zip(*mine, strict=True), zip(*theirs, strict=True), strict=True)
        if (rank := _rank_correlation(column, other)) is not None
    ]
    far = sum(size > FAR + 1e-9 for size in sizes) / len(sizes)
    return Agreement(
        len(sizes), statistics.median(sizes), max(sizes), far, statistics.fmean(ranks) if ranks else None
    )


def _rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's, with mean ranks for ties; None where one of the two does not vary."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)


# ---------------------------------------------------------------- tables


def _measured(rows: Rows) -> Iterator[tuple[str, Published, Grid]]:
    """(scenario, the paper's table, ours) of every table that was measured."""
    for scenario, own in by_scenario(rows).items():
        paper = published()[scenario.removeprefix("table-").removesuffix("-paper")]
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
            (paper.table, paper.what, *_numbers([(grid, paper.values)]), _recipe(rows, scenario))
            for scenario, paper, grid in own
        ]
        lines.append(
            ("all", f"{len(own)} tables", *_numbers([(grid, paper.values) for _, paper, grid in own]), "")
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


def _numbers(pairs: Sequence[tuple[Grid, Grid]]) -> tuple[str, ...]:
    near = agreement(pairs)
    rank = "–" if near.rank is None else f"{near.rank:.2f}"
    return (
        str(near.cells), f"{100 * near.median:.1f}", f"{100 * near.largest:.1f}", f"{near.far:.0%}", rank
    )  # fmt: skip


def side_by_side(rows: Rows) -> Iterator[Sheet]:
    """A table's cells beside the paper's, and below them every other method."""
    for scenario, paper, grid in _measured(rows):
        own = by_scenario(rows)[scenario]
        lines = tuple(
            (str(at), *(_cell(o, p) for o, p in zip(line, other, strict=True)))
            for at, line, other in zip(paper.rows, grid, paper.values, strict=True)
        )
        columns = _target_names(own) or [str(column) for column in paper.columns]
        _, median, largest, far, rank = _numbers([(grid, paper.values)])
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


def percent(name: str) -> Callable[[Group], str]:
    """A cell: mean ± standard deviation of an accuracy, in percent."""

    def cell(group: Group) -> str:
        own = [100 * found for found in group.values(name)]
        if not own:
            return "–"
        spread = f" ± {statistics.stdev(own):.1f}" if len(own) > 1 else ""
        return f"{statistics.fmean(own):.1f}{spread}"

    return cell


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


def _number(name: str, form: str) -> Callable[[Group], str]:
    return lambda group: mean(group.values(name), form)


_RATIO = _number("delta_ratio", "{:.3f}")


def recipes(rows: Rows) -> Iterator[Sheet]:
    """One line a candidate: what is retained on the diagonal, and how far training moved the weights."""
    columns = (
        Column("retained, task A [%]", percent(A)),
        Column("retained, task B [%]", percent(B)),
        Column("own accuracy, A [%]", percent("own_a")),
        Column("own accuracy, B [%]", percent("own_b")),
        Column("theta_B on A [%]", percent("other_a")),
        Column("theta_A on B [%]", percent("other_b")),
        Column("seeds", seeds),
        Column("‖g‖ / ‖theta_0‖", _RATIO),
    )
    lines = [
        (scenario.removeprefix("recipe-"), *(c.cell(groups(own)["diagonal"]) for c in columns))
        for scenario, own in by_scenario(rows).items()
    ]
    if lines:
        notes = (
            "theta_A + theta_B; small: on the training images (the paper: 92.5 and 82.5), large: on test images "
            "(79.8 and 29.7)",
            *provenance(rows),
        )
        yield Sheet("recipes", ("recipe", *(c.heading for c in columns)), tuple(lines), notes)


def whole_tables(rows: Rows) -> Iterator[Sheet]:
    """One line a candidate: how near sums of gradients and of weights are to all of the paper's cells."""
    own, lines = by_scenario(rows), []
    for scale in ("small", "large"):
        kinds = {kind: tables for kind, at, tables in WHOLE if at == scale}
        for name in CANDIDATES[scale]:
            found = {
                kind: [
                    (grid, paper.values)
                    for table in tables
                    if (grid := ours(paper := published()[table], own.get(f"{kind}-{scale}-{name}", ())))
                    is not None
                ]
                for kind, tables in kinds.items()
            }
            if not any(found.values()):
                continue
            moved = groups(own.get(f"recipe-{scale}-{name}", ())).get("diagonal")
            cells = [c for kind in ("gradients", "weights") for c in _nearness(found.get(kind, ()))]
            lines.append((f"{scale}-{name}", "–" if moved is None else _RATIO(moved), *cells))
    if lines:
        each = ("median [points]", "off by more than 10", "rank")
        heading = [f"sums of {kind}: {what}" for kind in ("gradients", "weights") for what in each]
        notes = [f"{kind}, {scale} scale: tables {' and '.join(tables)}" for kind, scale, tables in WHOLE]
        told = "no recipe was chosen by these"
        yield Sheet(
            "whole-tables",
            ("recipe", "‖g‖ / ‖theta_0‖", *heading),
            tuple(lines),
            (told, *notes, *provenance(rows)),
        )


def _nearness(pairs: Sequence[tuple[Grid, Grid]]) -> tuple[str, ...]:
    if not pairs:
        return ("–",) * 3
    _, median, _, far, rank = _numbers(pairs)
    return median, far, rank


def widths(rows: Rows) -> Iterator[Sheet]:
    """One line a width: what is left of both tasks in theta_A + theta_B, from one start, from two, and aligned."""
    lines, heading = [], ["width", "seeds", "own accuracy, A [%]", "own accuracy, B [%]"]
    starts = {
        "diagonal": "one start",
        "other start": "two starts",
        "other start, aligned": "two starts, aligned",
    }
    heading += [f"{told}, {task} [%]" for told in starts.values() for task in ("A", "B")]
    for scenario, own in by_scenario(rows).items():
        found = groups(own)
        if set(found) >= set(starts):
            cells = [percent(name)(found[method]) for method in starts for name in (A, B)]
            first = found["diagonal"]
            alone = [percent(name)(first) for name in ("own_a", "own_b")]
            lines.append((scenario.removeprefix("starts-width-"), seeds(first), *alone, *cells))
    if lines:
        notes = (
            "theta_A + theta_B on test images, as in table 6; two starts: theta_B began elsewhere",
            *provenance(rows),
        )
        yield Sheet("widths", tuple(heading), tuple(lines), notes)


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
        tuple(chain.from_iterable(_scenarios(number) for number in published())),
        overview,
    ),
    Table(
        "two-tasks",
        "Two tasks in one network",
        (DIGITS.name,),
        by_method((*COMMON, *BOTH_TASKS[:2], *CHOSEN)),
    ),
    Table("claims", "What the paper says", tuple(f"table-{number}" for number in published()), claims),
    Table("recipes", "Which recipe", tuple(s.name for s in RECIPES), recipes),
    Table(
        "whole-tables",
        "Other recipes, all cells",
        tuple(s.name for s in (*RECIPES, *WHOLE_TABLES)),
        whole_tables,
    ),
    Table("widths", "One start or two, by width", tuple(s.name for s in WIDTHS), widths),
    *(
        Table(f"table-{number}", f"Table {number}: {paper.title}", _scenarios(number), side_by_side)
        for number, paper in published().items()
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
    tabled = next((t for t in published().values() if t.figure == f"{number}{_letter(panel)}"), None)
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
    formula, onto = FIGURES[number]
    scenario = FIGURE_SCENARIOS[list(FIGURES).index(number)]
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


def _retained(rows: Rows) -> list[Line]:
    """Retained accuracy over |g| / |theta_0|, a line a scale and task."""
    lines = []
    for scale in ("small", "large"):
        for task, name in (("a", A), ("b", B)):
            points = sorted(
                (row.values[f"delta_ratio_{task}"], row.values[name])
                for row in rows
                if row.scenario.startswith(f"recipe-{scale}-") and not row.failure
            )
            if points:
                lines.append(Line(f"{scale} scale, task {task.upper()}", *zip(*points, strict=True)))
    return lines


FIGURE_PAGES = (
    *(_figure(number) for number in FIGURES),
    Figure(
        "recipes",
        "What theta_A + theta_B retains",
        tuple(s.name for s in RECIPES),
        (Panel("", "‖g‖ / ‖theta_0‖", "accuracy", _retained, x_log=True, markers=True),),
    ),
    *(_heatmaps(paper) for paper in published().values() if paper.column_name == "alpha"),
)
