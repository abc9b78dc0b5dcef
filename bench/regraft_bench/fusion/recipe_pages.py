"""Pages on recipes: what sums retain under each, how near whole tables would have been, and what width does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from regraft_bench.fusion.accuracy import A, B
from regraft_bench.fusion.nearness import average_cells, measure_agreement
from regraft_bench.fusion.paper import load_published
from regraft_bench.fusion.scenarios import CANDIDATES, WHOLE_TABLES
from regraft_bench.report.figures import Line
from regraft_bench.report.tables import (
    Column,
    Group,
    Rows,
    Sheet,
    by_scenario,
    groups,
    make_sheet,
    mean,
    percent,
    provenance,
    seeds,
)

DELTA_RATIO = Column("‖g‖ / ‖theta_0‖", lambda group: mean(group.values("delta_ratio"), "{:.3f}"))


def list_recipes(rows: Rows) -> Iterator[Sheet]:
    """One line a candidate: what is retained on the diagonal, and how far training moved the weights."""
    columns = (
        Column("retained, task A [%]", percent(A)),
        Column("retained, task B [%]", percent(B)),
        Column("own accuracy, A [%]", percent("own_a")),
        Column("own accuracy, B [%]", percent("own_b")),
        Column("theta_B on A [%]", percent("other_a")),
        Column("theta_A on B [%]", percent("other_b")),
        Column("seeds", seeds),
        DELTA_RATIO,
    )
    lines = {name.removeprefix("recipe-"): groups(own)["diagonal"] for name, own in by_scenario(rows).items()}
    note = (
        "theta_A + theta_B; small: on the training images (the paper: 92.5 and 82.5), large: on test images "
        "(79.8 and 29.7)"
    )
    if lines:
        yield make_sheet("recipes", "recipe", columns, lines, (note, *provenance(rows)))


def list_whole_tables(rows: Rows) -> Iterator[Sheet]:
    """One line a candidate: how near sums of gradients and of weights are to all of the paper's cells."""
    own = by_scenario(rows)
    headings = [
        f"sums of {kind}: {what}"
        for kind in ("gradients", "weights")
        for what in ("median [points]", "off by more than 10", "rank")
    ]
    lines = []
    for scale, candidates in CANDIDATES.items():
        for name in candidates:
            near = [
                cell
                for kind in ("gradients", "weights")
                for cell in _compare_tables(own.get(f"{kind}-{scale}-{name}", ()), (kind, scale))
            ]
            diagonal = groups(own.get(f"recipe-{scale}-{name}", ())).get("diagonal")
            if set(near) != {"–"}:
                lines.append((f"{scale}-{name}", "–" if diagonal is None else DELTA_RATIO.cell(diagonal), *near))
    if lines:
        tables = [
            f"{kind}, {scale} scale: tables {' and '.join(numbers)}" for (kind, scale), numbers in WHOLE_TABLES.items()
        ]
        notes = ("no recipe was chosen by these", *tables, *provenance(rows))
        yield Sheet("whole-tables", ("recipe", DELTA_RATIO.heading, *headings), tuple(lines), notes)


def _compare_tables(rows: Rows, which: tuple[str, str]) -> tuple[str, str, str]:
    """Median difference, share of cells that are far off, rank correlation, over the tables of both tasks."""
    papers = [load_published()[number] for number in WHOLE_TABLES.get(which, ())]
    pairs = [(grid, paper.values) for paper in papers if (grid := average_cells(paper, rows)) is not None]
    if not pairs:
        return "–", "–", "–"
    _, median, _, far, rank = measure_agreement(pairs).to_text()
    return median, far, rank


def _of_method(method: str, cell: Callable[[Group], str]) -> Callable[[dict[str, Group]], str]:
    return lambda by_method: cell(by_method[method])


def compare_widths(rows: Rows) -> Iterator[Sheet]:
    """One line a width: what is left of both tasks in theta_A + theta_B, from one start, from two, and aligned."""
    starts = {
        "diagonal": "one start",
        "other start": "two starts",
        "other start, aligned": "two starts, aligned",
    }
    columns = (
        Column("seeds", _of_method("diagonal", seeds)),
        Column("own accuracy, A [%]", _of_method("diagonal", percent("own_a"))),
        Column("own accuracy, B [%]", _of_method("diagonal", percent("own_b"))),
        *(
            Column(f"{start}, {task} [%]", _of_method(method, percent(name)))
            for method, start in starts.items()
            for task, name in (("A", A), ("B", B))
        ),
    )
    widths = {name.removeprefix("starts-width-"): groups(own) for name, own in by_scenario(rows).items()}
    lines = {width: by_method for width, by_method in widths.items() if set(by_method) >= set(starts)}
    note = "theta_A + theta_B on test images, as in table 6; two starts: theta_B began elsewhere"
    if lines:
        yield make_sheet("widths", "width", columns, lines, (note, *provenance(rows)))


def draw_retained(rows: Rows) -> list[Line]:
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
                ratios, accuracies = zip(*points, strict=True)
                lines.append(Line(f"{scale} scale, task {task.upper()}", ratios, accuracies))
    return lines
