"""Tables of the matching study: a line for each way to match."""

from __future__ import annotations

from regraft_bench.matching.methods import MATCHING_SCENARIOS
from regraft_bench.report.tables import Column, Group, Table, by_method, mean, percent, seeds, spread, value


def over_default(group: Group) -> str:
    """A cell: the objective over that of `regraft.match` without options, of the same seed."""
    pairs = [(own.values.get("objective"), ours.values.get("objective")) for own, ours in group.beside("regraft")]
    return spread([own / ours for own, ours in pairs if own is not None and ours], "{:.4f}")


def cpu_milliseconds(group: Group) -> str:
    """A cell: CPU time of one matching."""
    return mean([1e3 * row.seconds for row in group.rows if row.cost and not row.failure], "{:.3g}")


COLUMNS = (
    Column("seeds", seeds),
    Column("objective / regraft's", over_default),
    Column("accuracy of the middle [%]", percent("accuracy")),
    Column("after REPAIR [%]", percent("accuracy after REPAIR")),
    Column("barrier of the loss", value("barrier")),
    Column("of the ends [%]", percent("accuracy of the ends")),
    Column("CPU ms", cpu_milliseconds),
)
MATCHING_QUESTIONS = (
    ("regraft, joint start", "regraft"),
    ("regraft, 5 restarts", "regraft"),
    ("regraft, joint start", "regraft, best of 5 random starts"),
    ("regraft, joint start", "Frank-Wolfe"),
    ("activations", "regraft"),
    ("regraft, unit norms", "regraft"),
)
MATCHING_TABLES = (
    Table(
        "trained-pairs",
        "Pairs of trained networks",
        tuple(scenario.name for scenario in MATCHING_SCENARIOS),
        by_method(COLUMNS, MATCHING_QUESTIONS),
    ),
)
