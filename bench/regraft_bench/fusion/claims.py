"""What the paper says in comparisons, as our rows answer it, each beside the control that says what it means."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping

from regraft_bench.fusion.accuracy import A, B
from regraft_bench.report.claims import NOT_MEASURED, Claim, Margin, Number
from regraft_bench.report.tables import Rows, Sheet, by_scenario
from regraft_bench.rows import Row


def at(
    table: str, name: str, method: str = "sum", alpha: float | None = None, beta: float | None = None
) -> Number:
    """A cell of a series: at alpha (and beta), over targets their mean; of a value where no alpha is given."""

    def number(rows: Mapping[str, Rows]) -> float | None:
        found = [row for row in rows.get(f"table-{table}", ()) if row.method == method and not row.failure]
        numbers = [_cell(row, name, alpha, beta) for row in found]
        known = [number for number in numbers if number is not None]
        return statistics.fmean(known) if known else None

    return number


def _cell(row: Row, name: str, alpha: float | None, beta: float | None) -> float | None:
    if alpha is None:
        return row.values.get(name)
    series = row.series.get(name)
    if series is None:
        return None
    values = series.values
    for axis, positions in zip(series.axes, series.at, strict=True):
        wanted = {"alpha": alpha, "beta": beta}.get(axis)
        if wanted is None:
            continue
        if wanted not in positions:
            return None
        values = values[positions.index(wanted)]
    return statistics.fmean(values) if isinstance(values, tuple | list) else values


def constant(value: float) -> Number:
    """What the paper names as a number."""
    return lambda rows: value


def spread_at(table: str, alpha: float) -> Number:
    """Largest minus smallest over the targets."""

    def number(rows: Mapping[str, Rows]) -> float | None:
        for row in rows.get(f"table-{table}", ()):
            if row.method == "sum" and "accuracy" in row.series:
                series = row.series["accuracy"]
                line = series.values[series.at[0].index(alpha)]
                return max(line) - min(line)
        return None

    return number


def diagonal(table: str, name: str, pick: Callable[[list[float]], float]) -> Number:
    """Of the cells in which alpha = beta > 0."""

    def number(rows: Mapping[str, Rows]) -> float | None:
        for row in rows.get(f"table-{table}", ()):
            if row.method == "sum" and name in row.series:
                series = row.series[name]
                cells = [series.values[k][k] for k, at_ in enumerate(series.at[0]) if at_ > 0]
                return pick(cells)
        return None

    return number


def better(*numbers: Number) -> Number:
    """The largest of those that were measured."""

    def number(rows: Mapping[str, Rows]) -> float | None:
        known = [value for one in numbers if (value := one(rows)) is not None]
        return max(known) if known else None

    return number


BOTH = "accuracy"  # of a row's values: the harmonic mean of both tasks


def _claim(
    where: str,
    sentence: str,
    published: tuple[float, float],
    more: Number,
    less: Number,
    control: tuple[str, Number],
    margin: float = 0.0,
) -> Claim:
    return Claim(where, sentence, "", "accuracy", more, less, Margin(margin), published, control)


FUSION_CLAIMS = (
    _claim(
        "3.2, table 1", "with alpha at 5 theta_n + alpha g is above 0.7 (small scale)", (0.74, 0.7),
        at("1", "accuracy", alpha=5.0), constant(0.7), ("g alone", at("1", "accuracy", "g alone", 5.0)),
    ),
    _claim(
        "3.2, table 2", "g carries the task to other trained networks: at alpha = 10 far above chance, on test",
        (0.38, 0.1), at("2", "accuracy", alpha=10.0), constant(0.1),
        ("g alone", at("2", "accuracy", "g alone", 10.0)), 0.1,
    ),
    _claim(
        "3.2, figure 2", "beyond alpha = 10 it hardly matters which network g is added to (spread below 5 points)",
        (0.05, 0.01), constant(0.05), spread_at("2", 20.0), ("g alone", at("2", "accuracy", "g alone", 20.0)),
    ),
    _claim(
        "4.2, tables 1, 3", "sums of weights grow faster in alpha than sums of gradients: at 0.8, small scale",
        (0.66, 0.28), at("3", "accuracy", alpha=0.8), at("1", "accuracy", alpha=0.8),
        ("theta_A alone", at("3", "accuracy", "theta_A alone", 0.8)), 0.1,
    ),
    _claim(
        "4.2, tables 2, 4", "theta_A is a better guide than g: at alpha = 5, on test", (0.5, 0.37),
        at("4", "accuracy", alpha=5.0), at("2", "accuracy", alpha=5.0),
        ("theta_A alone", at("4", "accuracy", "theta_A alone", 5.0)), 0.05,
    ),
    _claim(
        "5.2, table 5", "training one task after the other forgets the first: A then B", (0.88, 0.23),
        at("5", B, "A then B"), at("5", A, "A then B"), ("both at once", at("5", BOTH, "plain")), 0.3,
    ),
    _claim(
        "5.2, table 6", "fusion alleviates forgetting: both tasks, harmonic mean on test", (0.63, 0.36),
        at("6", BOTH), better(at("5", BOTH, "A then B"), at("5", BOTH, "B then A")),
        ("both networks' logits", at("6", BOTH, "ensemble")), 0.02,
    ),
    _claim(
        "5.2, tables A10, A11", "so do sums of gradients", (0.63, 0.36), at("A10", BOTH),
        better(at("5", BOTH, "A then B"), at("5", BOTH, "B then A")),
        ("both networks' logits", at("A10", BOTH, "ensemble")), 0.02,
    ),
    _claim(
        "6", "scaling the sum hardly matters: cells with alpha = beta differ by less than a point (table 6)",
        (0.01, 0.001), constant(0.01),
        diagonal("6", A, lambda cells: max(cells) - min(cells)),
        ("the largest of them", diagonal("6", A, max)),
    ),
)  # fmt: skip


def list_fusion_claims(rows: Rows) -> Iterator[Sheet]:
    """One line a sentence. Holds: above by the margin; holds not: below it; not measured: a number is missing."""
    own = by_scenario([row for row in rows if not row.scenario.endswith("-paper")])
    heading = ("the paper says", "where", "the paper's", "ours", "control", "verdict")
    lines = tuple(_line(claim, own) for claim in FUSION_CLAIMS)
    if any(line[-1] != NOT_MEASURED for line in lines):
        notes = ("percent; one seed unless a table says otherwise",)
        yield Sheet("claims", heading, lines, notes)


def _line(claim: Claim, rows: Mapping[str, Rows]) -> tuple[str, ...]:
    assert callable(claim.more) and callable(claim.less) and claim.published and claim.control
    name, control = claim.control
    ours = _pair(claim.more(rows), claim.less(rows))
    beside = f"{name}: {_percent(control(rows))}"
    return claim.sentence, claim.where, _pair(*claim.published), ours, beside, claim.verdict(rows)


def _pair(more: float | None, less: float | None) -> str:
    return f"{_percent(more)} against {_percent(less)}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
