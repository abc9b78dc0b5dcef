"""Contests: contenders that do the same thing and are timed by turns; each contender is a method, each timing a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from regraft_bench.rows import Environment, Series
from regraft_bench.study import Measured, Method, Setting
from regraft_bench.timing import BY_HAND, COPY, OURS, PRODUCT, Contender, Timing, alternate

TIME = "time [ms]"
ABOUT = {
    OURS: "This project's way, as its users call it.",
    BY_HAND: "What one would write without this project: what the others are compared with.",
    COPY: "A plain copy of as much memory: what the machine's bandwidth allows.",
    PRODUCT: "One matrix product of as many operations: what the machine computes at best.",
    "auto": "The solver that `assign` takes when none is named.",
    "auto, warm": "The solver that `assign` takes, from the duals of a matrix that differed by 1 %.",
    "auto, warm, and new duals": "From the duals of a matrix that differed by 1 %, and new duals for the next one.",
    "scipy, warm": "scipy's solver from the duals of a matrix that differed by 1 %.",
    "assign, one by one": "A loop over `assign`.",
    "assign_many": "All matrices in one call, one thread.",
    "assign_many, two threads": "All matrices in one call, two threads.",
    "after_step, nothing due": "The recorder's call after a step at which nothing is validated.",
    "a copy of the state": "Parameters and buffers copied, as at a validation that finds a better state.",
}
"""What a contender is, where its name is not a solver's."""


@dataclass(frozen=True)
class Timed:
    """How contenders are timed: see :func:`regraft_bench.timing.alternate`."""

    rounds: int = 11
    budget: float = 2.0
    threads: int = 1
    clock: str = "cpu"
    keep_pages: bool = True


@dataclass(frozen=True)
class Contest:
    """`make(setting)` draws the inputs and returns the contenders; their names are known before.

    The one called BY_HAND is what one would write without this project; the others are compared with it. bytes, flop:
    what one call moves and computes, for a rate.
    """

    name: str
    contenders: tuple[str, ...]
    make: Callable[[MicroSetting], Mapping[str, Contender]]
    bytes: int = 0
    flop: int = 0


@dataclass(eq=False)
class MicroSetting(Setting):
    """Contests of one scenario and seed: each is held once, and its contenders' rows share it."""

    _held: dict[str, Mapping[str, Timing]] = field(default_factory=dict)

    def timing(self, contest: Contest, contender: str) -> Timing:
        """Hold the contest, if it was not yet, and say what this contender took."""
        if contest.name not in self._held:
            how: Timed = self.settings
            self._held[contest.name] = alternate(
                contest.make(self),
                rounds=how.rounds,
                budget=how.budget,
                threads=how.threads,
                clock=how.clock,
                keep_pages=how.keep_pages,
                device=self.device,
            )
        return self._held[contest.name][contender]

    def environment(self) -> Environment:
        """With the number of threads that was timed, not what the process had before and after."""
        found = super().environment()
        return replace(found, threads=getattr(self.settings, "threads", found.threads))


def timed_methods(contests: Sequence[Contest]) -> tuple[Method, ...]:
    """A method for every contender, named after the contest too where there are several."""
    found = []
    for contest in contests:
        prefix = f"{contest.name}: " if len(contests) > 1 else ""
        config = {"contest": contest.name, "beside": prefix + BY_HAND}
        for name in contest.contenders:
            about = ABOUT.get(name, f"{name} solves it, called through `assign` with its checks.")
            found.append(Method(prefix + name, partial(_measure, contest, name), config, about=about))
    return tuple(found)


def _measure(contest: Contest, contender: str, setting: MicroSetting) -> Measured:
    timing = setting.timing(contest, contender)
    values = {TIME: 1e3 * timing.seconds, **timing.values}
    for unit, amount in (("GB/s", contest.bytes), ("Gflop/s", contest.flop)):
        if amount:
            values[f"rate [{unit}]"] = amount / timing.seconds / 1e9
    rounds = timing.milliseconds()
    series = {"time by round [ms]": Series.over("round", range(1, len(rounds) + 1), rounds)}
    return Measured(values, series, {"call": timing.median}, {"clock": timing.clock})
