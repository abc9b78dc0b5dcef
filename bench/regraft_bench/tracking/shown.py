"""What changed between two sets of rows, as a table or JSON, and what one can do about it."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict

from rich.console import Console

from regraft.core.text import clean_text
from regraft_bench.report.tables import Sheet
from regraft_bench.tracking.compare import (
    BETTER,
    CHANGED,
    EQUAL,
    EVERY,
    NO_EVIDENCE,
    ONE_SIDED,
    VANISHED,
    WORSE,
    Change,
    Limits,
    Quantity,
)  # fmt: skip


def changes_sheet(changes: Sequence[Change], everything: bool = False) -> Sheet:
    """What changed, the worst first; with `everything` also what did not."""
    order = (WORSE, VANISHED, CHANGED, ONE_SIDED, BETTER, NO_EVIDENCE, EQUAL)
    shown = [c for c in changes if everything or c.verdict not in (NO_EVIDENCE, EQUAL)]
    shown.sort(key=lambda c: (order.index(c.verdict), -abs(c.change or 0)))
    few = sum(c.verdict == NO_EVIDENCE and c.low is None for c in changes)
    notes = [f"{len(changes)} comparisons; {sum(c.verdict == WORSE for c in changes)} worse"]
    if few:
        notes.append(
            f"{few} rest on one measurement a side, which proves nothing: run more seeds, or `regraft against`"
        )
    if any(c.verdict == CHANGED for c in changes):
        notes.append(
            "changed: the same machine and packages gave other numbers, so the code's arithmetic changed; "
            "shown is the seed that moved most"
        )
    heading = ("study, scenario, method", "of", "before", "after", "change", "interval", "n", "verdict")
    return Sheet("What changed", heading, tuple(map(_line, shown)), tuple(notes))


def _name(change: Change) -> str:
    return f"{change.study}, {change.scenario}, {change.method}"


def _line(change: Change) -> tuple[str, ...]:
    numbers = ["–"] * 4
    if change.change is not None:
        form = "{:+.1%}" if change.is_cost else "{:+.4f}"
        interval = "–" if change.low is None else f"{form.format(change.low)} to {form.format(change.high)}"
        means = (f"{value:.4g}" for value in (change.before, change.after))
        numbers = [*means, form.format(change.change), interval]
    return (_name(change), change.quantity, *numbers, str(change.n), change.verdict)


def _describe_excess(change: Change, limits: Limits) -> str:
    if change.change is None:
        return "vanished" if change.verdict == VANISHED else "has a number where there was none"
    form = "{:+.1%} (allowed: {:.0%})" if change.is_cost else "{:+.4g} (allowed: {:.4g})"
    return form.format(change.change, limits.allowance(change))


def advise(beyond: Sequence[Change], commit: str | None) -> str:
    """What one can do about changes that are more than allowed, as commands that run as they stand.

    commit: with whose code the first side was measured.
    """
    scenarios = dict.fromkeys(c.scenario for c in beyond if c.scenario != EVERY[0] and c.verdict != VANISHED)
    studies = dict.fromkeys(c.study for c in beyond if c.scenario == EVERY[0])
    asked = [*(f"--study {name}" for name in studies), *(f"--scenario {name}" for name in scenarios)]
    lines = []
    if commit and asked:
        lines.append(f"Measure both codes by turns: regraft against {commit} {' '.join(asked)}")
    lines.append("If intended, run `make baseline`, commit results/baseline with it and say why; otherwise fix it.")
    return "\n".join(lines)


def print_changes(
    changes: Sequence[Change],
    limits: Limits,
    *,
    meant: Collection[Quantity] = (),
    allow_missing: bool = False,
    everything: bool = False,
    as_json: bool = False,
) -> list[Change]:
    """Print changes; returns those that are worse by more than is allowed, or have vanished.

    meant: quantities that are told and do not count. allow_missing: nor do runs that only the first side has.
    """
    exceeded = [c for c in changes if limits.is_exceeded_by(c) and not (allow_missing and c.quantity == "runs")]
    beyond = [change for change in exceeded if change.name not in meant]
    if as_json:
        print(json.dumps({"changes": list(map(asdict, changes)), "beyond": list(map(asdict, beyond))}, indent=1))
        return beyond
    sheet = changes_sheet(changes, everything)
    Console(markup=False).print(sheet if sheet.lines else "; ".join(("nothing changed", *sheet.notes)))
    for change in exceeded:
        excuse = "" if change in beyond else "; the renewed baseline says so, too"
        said = f"{_name(change)}: {change.quantity} {_describe_excess(change, limits)}{excuse}"
        print(clean_text(said))
    return beyond
