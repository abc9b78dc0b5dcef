"""Frozen tile configurations per GPU family, and how one is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch


@dataclass(frozen=True)
class MoveTile:
    """A program of permute and graft: `repeat` times rows x columns, one below the other; a column is an element."""

    rows: int
    columns: int
    repeat: int
    warps: int

    @property
    def size(self) -> int:
        """Elements that a program moves."""
        return self.rows * self.repeat * self.columns

    def lower(self, times: int) -> MoveTile:
        """The same work in more steps of fewer rows, which takes fewer registers."""
        times = min(times, self.rows)
        return MoveTile(self.rows // times, self.columns, self.repeat * times, self.warps)


@dataclass(frozen=True)
class FlatTile:
    """A tile of combine: `block` consecutive elements."""

    block: int
    warps: int


@dataclass(frozen=True)
class DotTile:
    """A tile of similarity: m x n of the result, k at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Family:
    """The tiles of one GPU family: `move` for rows as they stand, `gather` for gathered columns, `dot` by precision,
    from small to large, where "half" stands for bf16 and fp16; `substitutes` names what is multiplied instead where
    the hardware lacks a precision: never a lesser one."""

    name: str
    move: MoveTile
    gather: MoveTile
    flat: FlatTile
    dot: Mapping[str, tuple[DotTile, ...]]
    substitutes: dict[str, str] = field(default_factory=dict)


_AMPERE_DOT = {
    "half": (DotTile(64, 64, 64, 4, 3), DotTile(128, 128, 32, 8, 4)),
    "tf32": (DotTile(64, 64, 32, 4, 3), DotTile(128, 128, 32, 8, 3)),
    "tf32x3": (DotTile(64, 64, 32, 4, 3), DotTile(128, 64, 32, 8, 3)),
    "ieee": (DotTile(32, 32, 32, 4, 3), DotTile(64, 64, 16, 4, 3)),
}
_HOPPER_DOT = {
    "half": (DotTile(64, 64, 64, 4, 4), DotTile(128, 128, 64, 8, 3), DotTile(128, 256, 64, 8, 3)),
    "tf32": (DotTile(64, 64, 32, 4, 4), DotTile(128, 128, 32, 8, 3), DotTile(128, 256, 32, 8, 3)),
    "tf32x3": (DotTile(64, 64, 32, 4, 4), DotTile(128, 128, 32, 8, 4)),
    "ieee": (DotTile(32, 32, 32, 4, 3), DotTile(64, 64, 16, 4, 3)),
}
_BLACKWELL_DOT = {**_HOPPER_DOT, "tf32x3": (DotTile(128, 64, 32, 8, 3), DotTile(128, 128, 32, 8, 4))}
_CDNA3_DOT = {
    "half": (DotTile(64, 64, 64, 4, 2), DotTile(128, 128, 64, 8, 2)),
    "tf32": (DotTile(64, 64, 32, 4, 2), DotTile(128, 128, 32, 8, 2)),
    "ieee": (DotTile(64, 64, 16, 4, 2), DotTile(128, 64, 16, 8, 2)),
}

MOVE, GATHER, FLAT = MoveTile(8, 512, 4, 4), MoveTile(16, 128, 4, 4), FlatTile(2048, 4)

# Chosen so that nothing spills (results/micro/tables.md); not yet tuned by measurement on any GPU.
FAMILIES = {
    "sm_80": Family("sm_80", MOVE, GATHER, FLAT, _AMPERE_DOT),
    "sm_90": Family("sm_90", MOVE, GATHER, FLAT, _HOPPER_DOT),
    "sm_100": Family("sm_100", MOVE, GATHER, FLAT, _BLACKWELL_DOT),
    "gfx942": Family("gfx942", MOVE, GATHER, FLAT, _CDNA3_DOT, {"tf32x3": "ieee"}),
}
INTERPRETER = Family(
    "interpreter",
    MoveTile(2, 16, 2, 1),
    MoveTile(4, 8, 2, 1),
    FlatTile(32, 1),
    {p: (DotTile(16, 16, 16, 1, 1),) for p in ("half", "tf32", "tf32x3", "ieee")},
)
"""Small tiles for Triton's interpreter, so that small tests cross their borders."""


@cache
def family(device: torch.device) -> Family:
    """The tiles for a device; those of the nearest older NVIDIA family where there are none of its own."""
    if device.type != "cuda":
        return INTERPRETER
    if torch.version.hip:
        return FAMILIES["gfx942"]
    major, _ = torch.cuda.get_device_capability(device)
    return FAMILIES["sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"]


def dot_choice(tiles: Family, dtype: torch.dtype, precision: str, units: int) -> tuple[DotTile, str]:
    """The tile of similarity for inputs of `dtype` and groups of `units`, and the precision to ask for: the largest of
    which two stand side by side."""
    if dtype != torch.float32:
        kind, asked = "half", "ieee"
    else:
        kind = asked = tiles.substitutes.get(precision, precision)
    small, *larger = tiles.dot[kind]
    return next((tile for tile in reversed(larger) if 2 * tile.n <= units), small), asked
