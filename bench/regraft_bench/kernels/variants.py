"""What to compile of a kernel. Each operator's file in this folder exports VARIANTS, and CONTESTS, what to time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import torch

import regraft_bench.kernels
from regraft_kernels.launch import FAMILIES

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
    that moves tensors, `moved` is the bytes that a program reads and writes, `reads` the bytes read for each stored.
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


def for_each_family(variants: Callable[[str], list[Variant]]) -> tuple[Variant, ...]:
    """The variants for all GPU families."""
    return tuple(variant for name in FAMILIES for variant in variants(name))


def operators() -> dict[str, ModuleType]:
    """The modules of this package that export VARIANTS and CONTESTS, by name: a new operator is a new file."""
    package = regraft_bench.kernels
    names = [module.name for module in iter_modules(package.__path__)]
    modules = {name: import_module(f"{package.__name__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "VARIANTS")}


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")
