"""Pages on recipes: what sums retain under each, how near whole tables would have been, and what width does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from regraft_bench.fusion.accuracy import A, B
from regraft_bench.fusion.nearness import in_numbers, ours
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
    mean,
    percent,
    provenance,
    seeds,
)

KINDS = ("gradients", "weights")


def _ratio(group: Group) -> str:
    return mean(group.values("delta_ratio"), "{:.3f}")


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
        Column("‖g‖ / ‖theta_0‖", _ratio),
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
    own = by_scenario(rows)
    lines = [
        (f"{scale}-{name}", *_moved(own.get(f"recipe-{scale}-{name}", ())), *chain(*near.values()))
        for scale, candidates in CANDIDATES.items()
        for name in candidates
        if (near := {kind: _near(own, kind, scale, name) for kind in KINDS})
        and set(chain(*near.values())) != {"–"}
    ]
    if lines:
        each = ("median [points]", "off by more than 10", "rank")
        heading = [f"sums of {kind}: {what}" for kind in KINDS for what in each]
        notes = [
            f"{kind}, {scale} scale: tables {' and '.join(tables)}"
            for (kind, scale), tables in WHOLE_TABLES.items()
        ]
        notes = ("no recipe was chosen by these", *notes, *provenance(rows))
        yield Sheet("whole-tables", ("recipe", "‖g‖ / ‖theta_0‖", *heading), tuple(lines), notes)


def _near(own: Mapping[str, Rows], kind: str, scale: str, name: str) -> tuple[str, ...]:
    """Median difference, share of cells that are far off, rank correlation, over the tables of both tasks."""
    found = own.get(f"{kind}-{scale}-{name}", ())
    papers = [load_published()[table] for table in WHOLE_TABLES.get((kind, scale), ())]
    pairs = [(grid, paper.values) for paper in papers if (grid := ours(paper, found)) is not None]
    if not pairs:
        return ("–",) * 3
    _, median, _, far, rank = in_numbers(pairs)
    return median, far, rank


def _moved(rows: Rows) -> tuple[str]:
    diagonal = groups(rows).get("diagonal")
    return ("–" if diagonal is None else _ratio(diagonal),)


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


def retained(rows: Rows) -> list[Line]:
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
