"""Seconds by phase: wall clock and CPU time of all threads, synchronised with the accelerator."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

EVALUATION = "evaluation"  # the one phase that is not charged to a method


@dataclass(frozen=True)
class Cost:
    """Seconds of one thing, twice: by the wall clock, and of CPU time summed over the process's threads.

    On a machine that others use too, CPU seconds are the steadier; on a GPU only the wall clock means anything.
    """

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu)


def total_charge(seconds: Mapping[str, Cost]) -> Cost:
    """The sum over phases, evaluation apart."""
    return sum((cost for phase, cost in seconds.items() if phase != EVALUATION), Cost())


@dataclass
class Clock:
    """Seconds spent in each named phase.

    Attributes:
        seconds: phase -> Cost.
    """

    seconds: dict[str, Cost] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, device: torch.device | str = "cpu") -> Iterator[None]:
        """Charge the body to `name`; work queued on a CUDA `device` is waited for."""
        synchronise(device)
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            synchronise(device)
            self.add({name: Cost(time.perf_counter() - wall, time.process_time() - cpu)})

    def add(self, seconds: Mapping[str, Cost]) -> None:
        """Charge what another clock measured."""
        for name, cost in seconds.items():
            self.seconds[name] = self.seconds.get(name, Cost()) + cost

    @property
    def cost(self) -> Cost:
        """The sum over phases, evaluation apart."""
        return total_charge(self.seconds)


def synchronise(device: torch.device | str) -> None:
    """Wait for a CUDA device; the CPU has nothing to wait for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
