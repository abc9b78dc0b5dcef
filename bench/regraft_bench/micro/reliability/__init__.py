"""Nothing lost, nothing silently wrong: campaigns of bad things, each of which must be refused clearly.

pytest bench --benchmark-only --study micro --scenario reliability

A method is a campaign; it counts what was tried, and what came of it: clear, silent, raw, hang (`attempt`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain

from regraft_bench.micro.reliability import assignments, files, inputs, writers
from regraft_bench.micro.reliability.attempt import OUTCOMES, Case, attempt, tally
from regraft_bench.micro.reliability.writers import WRITERS, Found
from regraft_bench.study import Measured, Method, Setting

__all__ = ["OUTCOMES", "Campaign", "campaigns", "held", "methods"]


@dataclass(frozen=True)
class Campaign:
    """How long. every: one case in so many is tried. The others are numbers of tries; kills: of each writer, after
    a time."""

    every: int = 1
    kills: int = 20
    row_files: int = 6
    rows: int = 25
    folders: int = 20
    assignments: int = 4000
    disks: tuple[int, ...] = (0, 1, 20, 100, 200)


def _cases(make: Callable[[], Iterator[Case]]) -> Callable[[Campaign], Iterator[Found]]:
    def tried(campaign: Campaign) -> Iterator[Found]:
        for case in list(make())[:: campaign.every]:
            yield case.name, attempt(case)

    return tried


def _kills(writer: writers.Writer, campaign: Campaign) -> Iterator[Found]:
    return chain(writers.kills(writer, campaign.every), writers.timed_kills(writer, campaign.kills))


def _disks(campaign: Campaign) -> Iterator[Found]:
    return chain.from_iterable(writers.full_disks(writer, campaign.disks) for writer in WRITERS)


CAMPAIGNS: dict[str, Callable[[Campaign], Iterator[Found]]] = {
    "hostile pickles": _cases(files.pickles),
    "bad files: whole files": _cases(lambda: chain(files.whole_files(), files.pages())),
    "bad files: edited JSON": _cases(files.edited_json),
    "bad files: states of trainings": _cases(files.checkpoints),
    "bad inputs: tensors": _cases(inputs.tensor_cases),
    "bad inputs: batches": _cases(inputs.batch_cases),
    "bad inputs: numbers and names": _cases(inputs.number_cases),
    **{f"kills: {writer.name}": partial(_kills, writer) for writer in WRITERS},
    "two writers: rows": lambda campaign: writers.two_on_rows(campaign.row_files, campaign.rows),
    "two writers: trajectories": lambda campaign: writers.two_on_a_folder(campaign.folders),
    "a full disk": _disks,
}


def campaigns(assigned: int) -> dict[str, Callable[[Campaign], Iterator[Found]]]:
    """By name; ``assigned`` assignments are divided among kinds of matrix and backends that are installed."""
    every = assignments.everything(assigned)
    return CAMPAIGNS | {
        f"assignments: {kind}, {backend}": lambda _, f=found: f for kind, backend, found in every
    }


REFUSED = "Things that must be refused clearly: how many were, and how the others ended."


def methods() -> tuple[Method, ...]:
    """One a campaign."""
    return tuple(Method(name, partial(_measure, name), about=REFUSED) for name in campaigns(0))


def _measure(name: str, setting: Setting) -> Measured:
    campaign: Campaign = setting.settings
    if name in CAMPAIGNS:
        return held([name], campaign)[name]
    return tally(campaigns(campaign.assignments)[name](campaign))  # these need no process of their own


def held(names: Sequence[str], campaign: Campaign) -> dict[str, Measured]:
    """Hold campaigns in a fresh process. Raises RuntimeError with its last line where that fails."""
    command = [sys.executable, "-m", __name__, json.dumps([list(names), asdict(campaign)])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}")
    found = json.loads(done.stdout.rpartition("\n")[2])
    return {name: Measured(values, notes=notes) for name, (values, notes) in found.items()}
