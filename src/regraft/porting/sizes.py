"""Sizes in words, and whether there is so much memory."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

_UNITS = {"": 1} | {
    f"{prefix}{binary}": base**power
    for binary, base in (("", 1000), ("I", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}


def parse_size(text: str) -> int:
    """Bytes: "8GB", "512MiB", "1000". Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"no size: {text!r}; say such as 8GB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2]])


def format_size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def check_memory(needed: int, why: str, allowed: int | None) -> int:
    """What the process holds now and ``needed`` bytes more, if that is allowed (None: what the machine has).

    Raises OSError (ENOMEM) that says how much is missing, and for what.
    """
    total = _resident() + needed
    limit = _resident() + _available() if allowed is None else allowed
    if total > limit:
        there = format_size(limit)
        raise OSError(errno.ENOMEM, f"{why} takes about {format_size(total)} of memory, and there are {there}")
    return total


def _resident() -> int:
    """Bytes of memory that the process holds; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _available() -> int:
    """Bytes of memory that the machine could give; without end where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 62
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 1 << 62)
