"""The one timer: contenders take turns within one run, so that what else the machine does happens to all of them."""

from __future__ import annotations

import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from regraft.core.clock import Cost, synchronise

OURS, BY_HAND, COPY, PRODUCT = "regraft", "by hand", "copy", "one product"
"""The names of contenders that many contests have."""

SHORTEST = 1e-3
"""Seconds: what takes less is called several times a round, so that a clock's own cost does not count."""


@dataclass(frozen=True)
class Contender:
    """Something to time.

    values: what its result says beside the time, by name. charge: the part of a call that counts, where its result
    knows better than the clock (a matching within a transfer).
    """

    run: Callable[[], Any]
    values: Callable[[Any], Mapping[str, float]] | None = None
    charge: Callable[[Any], Cost] | None = None


@dataclass(frozen=True)
class Timing:
    """What a contender took: seconds of one call in each round; and what its last result says.

    clock: which of the two clocks counts, "wall" or "cpu".
    """

    rounds: tuple[Cost, ...]
    clock: str
    values: Mapping[str, float]

    @property
    def median(self) -> Cost:
        return Cost(*(statistics.median(getattr(cost, k) for cost in self.rounds) for k in ("wall", "cpu")))

    @property
    def seconds(self) -> float:
        """The median on the clock that counts."""
        return getattr(self.median, self.clock)

    def milliseconds(self) -> list[float]:
        """Round by round."""
        return [1e3 * getattr(cost, self.clock) for cost in self.rounds]


@dataclass
class _Turns:
    """One contender's turns so far."""

    contender: Contender
    calls: int = 0  # a round; 0: not yet known
    rounds: list[Cost] = field(default_factory=list)
    spent: Cost = field(default_factory=Cost)
    result: Any = None  # of the last call, where it is asked for anything

    def take(self, clock: Callable[[], Cost]) -> None:
        """One round; the first finds out how many calls make one."""
        contender, calls = self.contender, max(self.calls, 1)
        before = clock()
        for _ in range(calls):
            result = contender.run()
        after = clock()
        spent = Cost(after.wall - before.wall, after.cpu - before.cpu)
        self.spent += spent
        each = Cost(spent.wall / calls, spent.cpu / calls)
        self.rounds.append(contender.charge(result) if contender.charge is not None else each)
        self.result = result if contender.values is not None else None
        if not self.calls:
            self.calls = max(1, math.ceil(SHORTEST / max(each.wall, 1e-9)))

    def timing(self, clock: str) -> Timing:
        values = self.contender.values(self.result) if self.contender.values is not None else {}
        return Timing(tuple(self.rounds[1:] or self.rounds), clock, values)


def alternate(
    contenders: Mapping[str, Contender],
    *,
    rounds: int = 11,
    budget: float = 2.0,
    threads: int = 1,
    clock: str = "cpu",
    keep_pages: bool = True,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Time every contender in turn, `rounds` times after one that only warms up.

    rounds, budget: a contender stops early once it has taken `budget` seconds, on the clock that counts; if that was
    in its first round, that one counts. threads: torch's, meanwhile; the CPU time of one thread is that of this thread,
    of more that of the process. clock: "cpu" or "wall"; on a GPU it is the wall clock always, with the device waited
    for. keep_pages: whether memory that was freed is kept, meanwhile: new pages can cost more than the work.
    """
    if torch.device(device).type != "cpu":
        clock = "wall"
    cpu = time.thread_time if threads == 1 else time.process_time

    def now() -> Cost:
        synchronise(device)
        return Cost(time.perf_counter(), cpu())

    turns = {name: _Turns(contender) for name, contender in contenders.items()}
    with _threads(threads), _pages(keep_pages):
        for number in range(rounds + 1):
            for turn in turns.values():
                if number == 0 or getattr(turn.spent, clock) < budget:
                    turn.take(now)
    return {name: turn.timing(clock) for name, turn in turns.items()}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's mallopt


@contextmanager
def _pages(kept: bool) -> Iterator[None]:
    """An allocator that keeps large blocks that are free, or returns them at once, as it does afterwards."""
    _keep_pages(kept)
    try:
        yield
    finally:
        _keep_pages(False)


def _keep_pages(keep: bool) -> None:
    """Does nothing where the C library is not glibc."""
    if sys.platform == "win32":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
    mallopt(M_MMAP_THRESHOLD, 1 << 17)
    mallopt(M_MMAP_MAX, 0 if keep else 1 << 16)
    mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1 if keep else 1 << 17)


def peak_resident() -> int | None:
    """Bytes that this process has held in memory at most; None where the system does not say."""
    try:
        import resource
    except ModuleNotFoundError:  # on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
