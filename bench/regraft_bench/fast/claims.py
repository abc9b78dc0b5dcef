"""What the paper says in comparisons, as our rows answer it: paired over seeds, with n and p."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace

from regraft_bench.report.claims import NO_WORSE, Claim, PairedTest
from regraft_bench.report.tables import Rows, Sheet, by_scenario
from regraft_bench.rows import Row

EARLY = 21  # steps


_TINY, _LARGE = "N(0, 1e-08²)", "N(0, 1²)"
_AREA, _EARLY, _END, _SOURCE = "area", "early", "accuracy", "source_lowest"
_EARLY_SCALE = "beta alone scaled down loses nothing in the first steps"
_LATE_SCALE = "and gains at the end"


FAST_CLAIMS = (
    Claim("6.2, figure 3", "a tiny head forgets less", "initial-same", _SOURCE, _TINY, _LARGE),
    Claim("6.2, figure 3", "and learns faster", "initial-same", _AREA, _TINY, _LARGE),
    Claim("6.2, figure 5", "also where the tasks are unrelated: forgets less", "initial-other", _SOURCE, _TINY, _LARGE),
    Claim("6.2, figure 5", "and learns faster", "initial-other", _AREA, _TINY, _LARGE),
    Claim("6.3, figure 6", "a frozen random head slows learning", "frozen-head", _AREA, "alpha = beta", "alpha = 0"),
    Claim(
        "6.4, figure 7", "a tiny head without warm-up beats fan-in with it", "warm-up", _AREA,
        "no warm-up: N(0, 1e-08²)", "fan-in",
    ),
    Claim(
        "6.4, figure 7", "and needs none itself", "warm-up", _AREA,
        "no warm-up: N(0, 1e-08²)", "N(0, 1e-08²), statistics", NO_WORSE,
    ),
    Claim("6.5, figure 8", "both rates scaled down lose early", "rates-resnet", _EARLY, "c, c", "c/10, c/10"),
    Claim("6.5, figure 8", "and gain at the end", "rates-resnet", _END, "c/10, c/10", "c, c"),
    Claim("6.5, figure 8", _EARLY_SCALE, "rates-resnet", _EARLY, "c, c/10", "c, c", NO_WORSE),
    Claim("6.5, figure 8", _LATE_SCALE, "rates-resnet", _END, "c, c/10", "c, c"),
    Claim("6.5, figure 9", _EARLY_SCALE, "rates-vgg", _EARLY, "c, c/10", "c, c", NO_WORSE),
    Claim("6.5, figure 9", _LATE_SCALE, "rates-vgg", _END, "c, c/10", "c, c"),
    Claim("6.5, figure 8", "two rates beat one: alpha alone scaled up", "rates-resnet", _AREA, "10c, c", "c, c"),
    Claim("6.5, figure 9", "two rates beat one: alpha alone scaled up", "rates-vgg", _AREA, "10c, c", "c, c"),
    *(
        Claim(f"6.6, {figure}", f"FAST learns faster than every fan-in baseline, {name}, {network}",
              f"optimisers-{network}", _AREA, f"{name}: fast", f"{name}: fan-in")
        for figure, name in (("figure 10", "sgd"), ("figure 11", "adam"), ("figure 12", "radam"))
        for network in ("densenet", "vgg")
    ),
    *(
        Claim(where, sentence, scenario, value, "fast", "baseline", test)
        for where, scenario in (("6.7, figure 14", "convergence-mnist"), ("6.7, figure 15", "convergence-digits"))
        for sentence, value, test in (
            ("FAST learns faster", _AREA, PairedTest()),
            ("with no worse end", _END, NO_WORSE),
            ("and stays closer to the source", "closeness", PairedTest()),
        )
    ),
    *(
        Claim("title", sentence, scenario, value, "fast", "fan-in")
        for scenario in ("digits", "fashion-mnist", "cifar10-cifar100", "cifar10-cifar100-other")
        for sentence, value in (("learns faster than fan-in", _AREA), ("forgets slower", "source_area"))
    ),
    Claim("title", "learns faster than fan-in", "imagenet-cifar100", _AREA, "fast", "fan-in"),
)  # fmt: skip
"""Where ``less`` is no method's name, it begins those of several rates, and the best of them by validation is taken."""


def list_fast_claims(rows: Rows) -> Iterator[Sheet]:
    """One line a sentence whose scenario has been measured."""
    own = by_scenario([_with_more(row) for row in rows])
    lines = tuple(_line(claim, own) for claim in FAST_CLAIMS if claim.scenario in own)
    if lines:
        heading = ("the paper says", "where", "scenario", "of", "difference", "verdict")
        notes = (
            f"early: mean deployed accuracy over the checkpoints to step {EARLY}; accuracy: at the end; closeness: "
            "minus the distance travelled",
            'supported, not supported: p < 0.05, paired over seeds; "no worse" can only be consistent, never shown',
        )
        yield Sheet("claims", heading, lines, notes)


def early_accuracy(row: Row) -> float | None:
    """The mean of the deployed accuracy over the checkpoints up to step `EARLY`."""
    if "deployed" not in row.series:
        return None
    accuracies = [accuracy for step, accuracy in row.series["deployed"].points() if 0 < step <= EARLY]
    return statistics.fmean(accuracies) if accuracies else None


def _with_more(row: Row) -> Row:
    """With what is made of a row's curves."""
    distance = row.values.get("distance")
    more = {"closeness": None if distance is None else -distance, _EARLY: early_accuracy(row)}
    return replace(row, values={**row.values, **more})


def _line(claim: Claim, rows: Mapping[str, Rows]) -> tuple[str, ...]:
    best = replace(claim, less=_best(rows[claim.scenario], str(claim.less)))
    sentence = claim.sentence if best.less == claim.less else f"{claim.sentence} ({best.less})"
    difference = str(best.compare(rows) or "–")
    return sentence, claim.where, claim.scenario, claim.metric, difference, best.verdict(rows)


def _best(rows: Rows, name: str) -> str:
    """The method of this name, or of those that begin with it the one with the best mean validation."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        if row.method == name:
            return name
        validation = row.values.get("validation")
        if row.method.startswith(f"{name} ") and validation is not None:
            scores.setdefault(row.method, []).append(validation)
    return max(scores, key=lambda method: statistics.fmean(scores[method]), default=name)
