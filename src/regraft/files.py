"""Files that are either the old one or the new one, never a mixture."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, flush it to disk, then rename it into place.

    A kill at any moment leaves the earlier file (and perhaps `path` + ".part", which the next call replaces).
    """
    part = path.with_name(path.name + ".part")
    write(part)
    with part.open("rb") as handle:
        os.fsync(handle.fileno())
    part.replace(path)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` to `path`, making its folder: the old file or the new one, never a mixture."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, lambda part: part.write_text(text, encoding="utf-8"))
