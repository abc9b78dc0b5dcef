"""How near our cells are to the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from regraft_bench.fusion.accuracy import A, B
from regraft_bench.fusion.paper import Published
from regraft_bench.report.tables import Rows, groups

CellGrid = tuple[tuple[float, ...], ...]
FAR = 0.1  # ten points: a cell that differs by more is not the paper's


def average_cells(paper: Published, rows: Rows) -> CellGrid | None:
    """Our cells of a published table, means over seeds; None where it was not measured."""
    if not paper.formula:
        return _average_table_5(rows)
    name = "accuracy" if paper.targets else A if paper.task == "CIFAR-10" else B
    return average_grids([r.series[name].values for r in rows if r.method == "sum" and name in r.series])


def _average_table_5(rows: Rows) -> CellGrid | None:
    """The two orders of sequential training, on training and test images of both tasks."""
    names, by_method = ("training_a", "training_b", A, B), groups(rows)
    lines = [
        tuple(statistics.fmean(own) for name in names if (own := by_method[method].values(name)))
        for method in ("A then B", "B then A")
        if method in by_method
    ]
    return tuple(lines) if [len(line) for line in lines] == [4, 4] else None


def average_grids(grids: Sequence[Sequence[Sequence[float]]]) -> CellGrid | None:
    """Cell by cell."""
    if not grids:
        return None
    return tuple(
        tuple(statistics.fmean(cells) for cells in zip(*lines, strict=True)) for lines in zip(*grids, strict=True)
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

    def to_text(self) -> tuple[str, ...]:
        """Cells of a table: how many, median and largest difference in points, share that is far off, rank."""
        rank = "–" if self.rank is None else f"{self.rank:.2f}"
        return (
            str(self.cells),
            f"{100 * self.median:.1f}",
            f"{100 * self.largest:.1f}",
            f"{self.far:.0%}",
            rank,
        )


def measure_agreement(pairs: Sequence[tuple[CellGrid, CellGrid]]) -> Agreement:
    """Of all cells of several (ours, paper's). Raises ValueError where two have different shapes."""
    columns = [
        (own, other)
        for ours, papers in pairs
        for own, other in zip(zip(*ours, strict=True), zip(*papers, strict=True), strict=True)
    ]
    sizes = [abs(o - p) for own, other in columns for o, p in zip(own, other, strict=True)]
    ranks = [rank for own, other in columns if (rank := _rank_correlation(own, other)) is not None]
    far = sum(size > FAR + 1e-9 for size in sizes) / len(sizes)
    rank = statistics.fmean(ranks) if ranks else None
    return Agreement(len(sizes), statistics.median(sizes), max(sizes), far, rank)


def _rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's, with mean ranks for ties; None where one of the two does not vary."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)
