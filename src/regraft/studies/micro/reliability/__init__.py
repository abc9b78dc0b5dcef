"""Nothing lost, nothing silently wrong: campaigns of bad things, each of which must be refused clearly.

pytest bench --benchmark-only --study micro --scenario reliability

A method is a campaign; it counts what was tried, and what came of it: clear, silent, raw, hang (`attempt`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from regraft.studies.micro.reliability import assignments, files, inputs, writers
from regraft.studies.micro.reliability.attempt import OUTCOMES, Case, attempt, tally
from regraft.studies.micro.reliability.writers import WRITERS, Found
from regraft.studies.study import Measured, Method, Setting

__all__ = ["OUTCOMES", "Campaign", "methods"]


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
    disks: tuple[int, ...] = (0, 1, 100, 1000, 2000)


def _cases(make: Callable[[], Iterator[Case]]) -> Callable[[Campaign], Iterator[Found]]:
    def tried(campaign: Campaign) -> Iterator[Found]:
        for case in list(make())[:: campaign.every]:
            yield case.name, attempt(case)

    return tried


def _kills(writer: writers.Writer, campaign: Campaign) -> Iterator[Found]:
    steps = writers.kills(writer, 1000 if campaign.every == 1 else 12)
    return chain(steps, writers.timed_kills(writer, campaign.kills))


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


def methods() -> tuple[Method, ...]:
    """One a campaign; the assignments have one for each kind of matrix and each backend that is installed."""
    found = [Method(name, partial(_measure, campaign)) for name, campaign in CAMPAIGNS.items()]
    for kind, backend, _ in assignments.everything(0):
        found.append(Method(f"assignments: {kind}, {backend}", partial(_assignments, kind, backend)))
    return tuple(found)


def _measure(campaign: Callable[[Campaign], Iterator[Found]], setting: Setting) -> Measured:
    return tally(campaign(setting.settings))


def _assignments(kind: str, backend: str, setting: Setting) -> Measured:
    every = assignments.everything(setting.settings.assignments)
    return tally(chain.from_iterable(found for k, b, found in every if (k, b) == (kind, backend)))


def not_clear(measured: Measured) -> Sequence[str]:
    """What a campaign found that must not be."""
    return measured.notes["not clear"]
