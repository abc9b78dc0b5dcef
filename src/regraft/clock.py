"""Seconds by phase: wall clock and CPU time of all threads, synchronised with the accelerator."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Clock:
    """Seconds spent in each named phase.

    Attributes:
        wall: seconds of wall clock by phase.
        cpu: seconds of CPU time by phase, summed over the process's threads. On a machine that is
            shared with others this is the figure to compare.
    """

    wall: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    cpu: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def phase(self, name: str, device: torch.device | str = "cpu") -> Iterator[None]:
        """Charge the body to `name`; work queued on a CUDA `device` is waited for."""
        synchronise(device)
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            synchronise(device)
            self.wall[name] += time.perf_counter() - wall
            self.cpu[name] += time.process_time() - cpu

    def add(self, wall: Mapping[str, float], cpu: Mapping[str, float]) -> None:
        """Charge what another clock measured."""
        for name in wall:
            self.wall[name] += wall[name]
            self.cpu[name] += cpu[name]


def synchronise(device: torch.device | str) -> None:
    """Wait for a CUDA device; the CPU has nothing to wait for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
