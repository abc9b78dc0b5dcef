"""Clocks of a GPU: seconds on the device and on the host, kernels that a call launches. On a CPU, its own time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

REPEATS = 20
PRODUCTS = {
    "ieee": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "bfloat16": (torch.bfloat16, "ieee"),
    "float16": (torch.float16, "ieee"),
}


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Torch's own products of float32 in this precision, "ieee" or "tf32"."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_seconds(run: Callable[[], object], device: torch.device, only: str = "", repeats: int = REPEATS) -> float:
    """Seconds on the device of one call: of all its kernels, or of those whose name contains `only`.

    Raises RuntimeError where the profiler saw no such kernel.
    """
    if device.type != "cuda":
        return host_seconds(run, device, repeats=1)
    events = _profile(run, repeats)
    seconds = sum(time_ for name, time_, _ in events if only in name) / repeats / 1e6
    if not seconds:
        raise RuntimeError(f"the profiler saw no kernel named {only!r}" if only else "the profiler saw no kernel")
    return seconds


def count_kernels(run: Callable[[], object], device: torch.device) -> float:
    """Kernels and copies that one call asks of the device; none on a CPU."""
    return sum(count for _, _, count in _profile(run, 1)) if device.type == "cuda" else 0


def _profile(run: Callable[[], object], repeats: int) -> list[tuple[str, float, int]]:
    """Name, microseconds and count of all that ran on the device."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    events = [event for event in trace.key_averages() if event.self_device_time_total]
    return [(event.key, event.self_device_time_total, event.count) for event in events]


def host_seconds(
    run: Callable[[], object], device: torch.device, repeats: int = REPEATS, *, wait: bool = False
) -> float:
    """The median wall time of a call on the host alone, without waiting for the device unless `wait`."""
    run()
    times = []
    for _ in range(repeats):
        synchronise(device)
        before = time.perf_counter()
        run()
        if wait:
            synchronise(device)
        times.append(time.perf_counter() - before)
    return statistics.median(times)
