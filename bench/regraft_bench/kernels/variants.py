"""What every operator's file in this folder registers: what to compile of its kernel, and what to time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch

import regraft_bench.kernels
from regraft_bench.contests import Contest
from regraft_kernels.launch import FAMILIES, MoveTile, tile_of
from regraft_kernels.packing import MoveKind

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


MOVE_SIGNATURE = {
    "addresses": "*i64",
    "count": "i32",
    "segments": "*i64",
    "tiles": "*i32",
    "tables": "*i32",
    "entries": "i32",
    "programs": "i32",
    "moved": "fp32",
}
"""The types of the arguments that the kernels of permute and graft share."""


@dataclass(frozen=True)
class Variant:
    """A kernel with one set of compile-time arguments, for one GPU family (a name in FAMILIES).

    `signature`: argument -> Triton's name of its type; `constants`: argument -> value, dtypes as torch's. For a kernel
    that moves tensors, `moved` is the bytes that a program reads and writes, `reads` the bytes read for each stored,
    and `gathered` how many of those are read by gathered columns.
    """

    kernel: Any
    target: str
    label: str
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    moved: int = 0
    reads: int = 0
    gathered: int = 0


@dataclass(frozen=True)
class Operator:
    """What to compile of an operator's kernel, for all GPU families, and what to time, the main contest first."""

    variants: tuple[Variant, ...]
    contests: tuple[Contest, ...]


_OPERATORS: dict[str, Operator] = {}


def register_operator(name: str, variants: Callable[[str], list[Variant]], contests: Iterable[Contest]) -> None:
    """Called once by each operator's file; `variants`: those of a GPU family, a name in FAMILIES."""
    compiled = tuple(variant for family in FAMILIES for variant in variants(family))
    _OPERATORS[name] = Operator(compiled, tuple(contests))


def operators() -> dict[str, Operator]:
    """All operators by name. A new operator is a new file in this folder."""
    package = regraft_bench.kernels
    for module in iter_modules(package.__path__):
        import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_OPERATORS.items()))


def move_tiles(target: str, dtype: torch.dtype, live_values: int) -> Iterator[tuple[str, MoveKind, MoveTile]]:
    """Every tile that a family moves a dtype by, with its label and kind."""
    widths = [tile.columns for tile in FAMILIES[target].gather]
    for gathered in (False, True):
        for aligned16 in (True, False):
            kind = MoveKind(dtype, gathered, aligned16)
            for width in widths if gathered else [0]:
                label = kind.label if width in (0, widths[-1]) else kind.label.replace("columns", "narrow columns")
                yield label, kind, tile_of(FAMILIES[target], kind, width, live_values)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")
