"""How near our cells are to the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from regraft_bench.fusion.accuracy import A, B
from regraft_bench.fusion.paper import Published
from regraft_bench.report.tables import Rows, groups

Grid = tuple[tuple[float, ...], ...]
FAR = 0.1  # ten points: a cell that differs by more is not the paper's


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


def in_numbers(pairs: Sequence[tuple[Grid, Grid]]) -> tuple[str, ...]:
    near = agreement(pairs)
    rank = "–" if near.rank is None else f"{near.rank:.2f}"
    return (
        str(near.cells), f"{100 * near.median:.1f}", f"{100 * near.largest:.1f}", f"{near.far:.0%}", rank
    )  # fmt: skip
