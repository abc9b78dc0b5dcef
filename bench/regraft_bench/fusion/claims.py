"""What the paper says in comparisons, as our rows answer it, each beside the control that says what it means."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

from regraft_bench.fusion.accuracy import A, B
from regraft_bench.report.claims import NOT_MEASURED, Claim, Margin, Number
from regraft_bench.report.tables import Rows, Sheet, by_scenario
from regraft_bench.rows import Row


def _number(table: str, method: str, pick: Callable[[Row], float | None]) -> Number:
    """What is picked of a table's rows of one method, the mean over seeds."""

    def read(rows: Mapping[str, Rows]) -> float | None:
        own = [row for row in rows.get(f"table-{table}", ()) if row.method == method and not row.failure]
        known = [number for row in own if (number := pick(row)) is not None]
        return statistics.fmean(known) if known else None

    return read


def value_of(table: str, name: str, method: str = "sum") -> Number:
    """A value of the rows."""
    return _number(table, method, lambda row: row.values.get(name))


def at_alpha(
    table: str, alpha: float, method: str = "sum", of: Callable[[Sequence[float]], float] = statistics.fmean
) -> Number:
    """The accuracies of all targets at one alpha: their mean, or what else is made of them."""

    def pick(row: Row) -> float | None:
        series = row.series.get("accuracy")
        return None if series is None or alpha not in series.at[0] else of(series.values[series.at[0].index(alpha)])

    return _number(table, method, pick)


def on_diagonal(table: str, of: Callable[[Sequence[float]], float]) -> Number:
    """Made of task A's accuracies where alpha = beta > 0."""

    def pick(row: Row) -> float | None:
        series = row.series.get(A)
        return None if series is None else of([series.values[k][k] for k, b in enumerate(series.at[0]) if float(b) > 0])

    return _number(table, "sum", pick)


def spread_of(accuracies: Sequence[float]) -> float:
    """Largest minus smallest."""
    return max(accuracies) - min(accuracies)


def constant(value: float) -> Number:
    """What the paper names as a number."""
    return lambda rows: value


def better(*numbers: Number) -> Number:
    """The largest of those that were measured."""

    def largest(rows: Mapping[str, Rows]) -> float | None:
        known = [value for one in numbers if (value := one(rows)) is not None]
        return max(known) if known else None

    return largest


BOTH = "accuracy"  # of a row's values: the harmonic mean of both tasks
IN_TURN = better(value_of("5", BOTH, "A then B"), value_of("5", BOTH, "B then A"))


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
        at_alpha("1", 5.0), constant(0.7), ("g alone", at_alpha("1", 5.0, "g alone")),
    ),
    _claim(
        "3.2, table 2", "g carries the task to other trained networks: at alpha = 10 far above chance, on test",
        (0.38, 0.1), at_alpha("2", 10.0), constant(0.1),
        ("g alone", at_alpha("2", 10.0, "g alone")), 0.1,
    ),
    _claim(
        "3.2, figure 2", "beyond alpha = 10 it hardly matters which network g is added to (spread below 5 points)",
        (0.05, 0.01), constant(0.05), at_alpha("2", 20.0, of=spread_of), ("g alone", at_alpha("2", 20.0, "g alone")),
    ),
    _claim(
        "4.2, tables 1, 3", "sums of weights grow faster in alpha than sums of gradients: at 0.8, small scale",
        (0.66, 0.28), at_alpha("3", 0.8), at_alpha("1", 0.8),
        ("theta_A alone", at_alpha("3", 0.8, "theta_A alone")), 0.1,
    ),
    _claim(
        "4.2, tables 2, 4", "theta_A is a better guide than g: at alpha = 5, on test", (0.5, 0.37),
        at_alpha("4", 5.0), at_alpha("2", 5.0),
        ("theta_A alone", at_alpha("4", 5.0, "theta_A alone")), 0.05,
    ),
    _claim(
        "5.2, table 5", "training one task after the other forgets the first: A then B", (0.88, 0.23),
        value_of("5", B, "A then B"), value_of("5", A, "A then B"), ("both at once", value_of("5", BOTH, "plain")), 0.3,
    ),
    _claim(
        "5.2, table 6", "fusion alleviates forgetting: both tasks, harmonic mean on test", (0.63, 0.36),
        value_of("6", BOTH), IN_TURN,
        ("both networks' logits", value_of("6", BOTH, "ensemble")), 0.02,
    ),
    _claim(
        "5.2, tables A10, A11", "so do sums of gradients", (0.63, 0.36), value_of("A10", BOTH),
        IN_TURN,
        ("both networks' logits", value_of("A10", BOTH, "ensemble")), 0.02,
    ),
    _claim(
        "6", "scaling the sum hardly matters: cells with alpha = beta differ by less than a point (table 6)",
        (0.01, 0.001), constant(0.01),
        on_diagonal("6", spread_of),
        ("the largest of them", on_diagonal("6", max)),
    ),
)  # fmt: skip


def list_fusion_claims(rows: Rows) -> Iterator[Sheet]:
    """One line a sentence. Supported: above by the margin; not supported: below; not measured: a number is missing."""
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
    bound = f"{name}: {_percent(control(rows))}"
    return claim.sentence, claim.where, _pair(*claim.published), ours, bound, claim.verdict(rows)


def _pair(more: float | None, less: float | None) -> str:
    return f"{_percent(more)} against {_percent(less)}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
