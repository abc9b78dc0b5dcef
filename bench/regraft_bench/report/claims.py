"""Claims of a paper as data: a sentence, what it compares, by which test, and the verdict that rows give it.

    Claim("6.2, figure 3", "a tiny head learns faster", "initial-same", "area", "tiny", "large")
    Claim("3.2", "at 5 the sum is above 0.7", "", "accuracy", accuracy_at_5, constant(0.7), Margin(), (0.74, 0.7))

A study lists its claims in a module of its own, and writes them before measuring. A page shows them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from regraft_bench.report.tables import Comparison, Rows, compare_methods

SUPPORTED, NOT_SUPPORTED = "supported", "not supported"
INCONCLUSIVE, CONSISTENT = "inconclusive", "consistent"
NOT_MEASURED = "not measured"

Number = Callable[[Mapping[str, Rows]], float | None]
"""Of rows by scenario: an accuracy or another number; None where it was not measured."""


@dataclass(frozen=True)
class PairedTest:
    """A two-sided t-test at 5 %, paired over seeds. or_equal: "no worse", which rows can refute but never show."""

    or_equal: bool = False

    def verdict(self, found: Comparison) -> str:
        """SUPPORTED, NOT_SUPPORTED, or where the seeds decide nothing INCONCLUSIVE (CONSISTENT with "no worse")."""
        if math.isnan(found.p) or (found.p >= 0.05 and not self.or_equal):
            return INCONCLUSIVE
        if found.p >= 0.05:
            return CONSISTENT
        return SUPPORTED if found.difference > 0 else NOT_SUPPORTED


NO_WORSE = PairedTest(or_equal=True)


@dataclass(frozen=True)
class Margin:
    """The difference is at least this: for tables of one seed, which allow no test."""

    least: float = 0.0

    def verdict(self, found: Comparison) -> str:
        """SUPPORTED or NOT_SUPPORTED."""
        return SUPPORTED if found.difference >= self.least else NOT_SUPPORTED


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper: ``more`` has more of ``metric`` than ``less`` has, as ``test`` decides.

    Attributes:
        where: the section, table or figure that says it.
        scenario: where it is measured ("": in several). metric: what is compared, a value of a row.
        more, less: two methods of the scenario, compared seed by seed; or two numbers made of all rows.
        published: the two numbers in the paper.
        control: what would score the same if the sentence did not mean what it says: its name and number.
    """

    where: str
    sentence: str
    scenario: str
    metric: str
    more: str | Number
    less: str | Number
    test: PairedTest | Margin = PairedTest()
    published: tuple[float, float] | None = None
    control: tuple[str, Number] | None = None

    def compare(self, rows: Mapping[str, Rows]) -> Comparison | None:
        """What rows by scenario say; None where a side was not measured."""
        if isinstance(self.more, str) and isinstance(self.less, str):
            return compare_methods(rows.get(self.scenario, ()), self.more, self.less, self.metric)
        assert callable(self.more) and callable(self.less), "a claim compares two methods or two numbers"
        more, less = self.more(rows), self.less(rows)
        return None if more is None or less is None else Comparison(1, more - less, math.nan)

    def verdict(self, rows: Mapping[str, Rows]) -> str:
        """One of the five words above."""
        found = self.compare(rows)
        return NOT_MEASURED if found is None else self.test.verdict(found)
