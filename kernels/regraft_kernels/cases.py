"""What every kernel file exports beside its operation: VARIANTS, what to compile, and CASES, what to time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from regraft_kernels.packing import Packing, Tensors
from regraft_kernels.tiles import FAMILIES

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Variant:
    """A kernel with one set of compile-time arguments, for one GPU family (a name in FAMILIES).

    `signature`: argument -> Triton's name of its type; `constants`: argument -> value, dtypes as torch's. `moved`:
    bytes of tensors that a program reads and writes, where that is what it does.
    """

    kernel: Any
    target: str
    label: str
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    moved: int = 0


@dataclass(frozen=True)
class Case:
    """Something to time. `make(device)` draws its inputs and returns the contenders, functions of no arguments.

    OURS is the operation, BY_HAND what a PyTorch user would write; COPY, of as many bytes, and PRODUCT, of matrices
    of as many elements, are the floors. `bytes` are read and written, `flop` computed, by one call.
    """

    name: str
    make: Callable[[torch.device], Mapping[str, Callable[[], object]]]
    contenders: tuple[str, ...]
    bytes: int = 0
    flop: int = 0


OURS, BY_HAND, COPY, PRODUCT = "regraft", "by hand", "copy", "one product"


def each_family(variants: Callable[[str], list[Variant]]) -> tuple[Variant, ...]:
    """The variants of all GPU families."""
    return tuple(variant for name in FAMILIES for variant in variants(name))


def kernels() -> dict[str, ModuleType]:
    """The modules of this package that export VARIANTS and CASES, by name: a new kernel is a new file."""
    package = __name__.rpartition(".")[0]
    names = [module.name for module in iter_modules([os.path.dirname(__file__)])]
    modules = {name: import_module(f"{package}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "CASES")}


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------- networks


@dataclass(frozen=True)
class Network:
    """A network's shapes with a random permutation for each slot, and tensors of those shapes."""

    packing: Packing
    indices: dict[str, Tensor]
    device: torch.device

    @staticmethod
    def of(packing: Packing, device: torch.device) -> Network:
        """Permutations are drawn with a fixed seed."""
        g = torch.Generator().manual_seed(0)
        indices = {slot: torch.randperm(n, generator=g).to(device) for slot, n in packing.slots.items()}
        return Network(packing, indices, device)

    def draw(self, seed: int) -> dict[str, Tensor]:
        """Random tensors, float32."""
        g = torch.Generator(self.device).manual_seed(seed)
        shapes = self.packing.shapes
        return {n: torch.randn(shape, generator=g, device=self.device) for n, shape in shapes.items()}

    def moved(self, name: str, tensor: Tensor) -> Tensor:
        """pi of one tensor as one would write it: axis after axis."""
        for axis, slot in enumerate(self.packing.axes[name]):
            if slot is not None:
                tensor = tensor.index_select(axis, self.indices[slot])
        return tensor


def size(packing: Packing) -> int:
    """Bytes of one set of the tensors in float32."""
    return 4 * sum(segment.size for segment in packing.segments.values())


def copy_of(tensors: Tensors, moved: int, *, out: bool = False) -> Callable[[], object]:
    """Copies of as many bytes as are in `moved` sets of tensors, read or written: into new tensors, or given ones."""
    whole, half = divmod(moved, 2)
    parts = list(tensors.values()) * whole
    parts += [tensor.flatten()[: tensor.numel() // 2] for tensor in tensors.values()] * half
    if not out:
        return lambda: [part.clone() for part in parts]
    given = [part.clone() for part in parts]
    return lambda: [old.copy_(part) for old, part in zip(given, parts, strict=True)]


def _resnet(blocks: tuple[int, ...], expansion: int) -> Packing:
    """A slot for each stage's shortcut, and one for each inner layer of each block (two in a bottleneck)."""
    shapes: dict[str, tuple[int, ...]] = {}
    axes: dict[str, tuple[str | None, ...]] = {}

    def convolution(name: str, rows: str, columns: str | None, *shape: int) -> None:
        shapes[f"{name}.weight"], axes[f"{name}.weight"] = shape, (rows, columns, None, None)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.norm.{part}"], axes[f"{name}.norm.{part}"] = (shape[0],), (rows,)

    convolution("stem", "stem", None, 64, 3, 7, 7)
    before, channels = "stem", 64
    for stage, width in enumerate((64, 128, 256, 512)):
        wide, shortcut = expansion * width, f"stage{stage}"
        if wide == channels:
            shortcut = before
        else:
            convolution(f"{shortcut}.shortcut", shortcut, before, wide, channels, 1, 1)
        for block in range(blocks[stage]):
            first, second = (f"stage{stage}.block{block}.{part}" for part in ("first", "second"))
            if expansion == 1:
                convolution(first, first, before, width, channels, 3, 3)
                convolution(second, shortcut, first, width, width, 3, 3)
            else:
                convolution(first, first, before, width, channels, 1, 1)
                convolution(second, second, first, width, width, 3, 3)
                convolution(f"stage{stage}.block{block}.third", shortcut, second, wide, width, 1, 1)
            before, channels = shortcut, wide
    shapes["head"], axes["head"] = (1000, channels), (None, before)
    return Packing.build(shapes, axes)


@cache
def resnet18() -> Packing:
    """The shapes of ResNet-18, without the head's bias."""
    return _resnet((2, 2, 2, 2), 1)


@cache
def resnet50() -> Packing:
    """The shapes of ResNet-50, without the head's bias."""
    return _resnet((3, 4, 6, 3), 4)


@cache
def vit_b_16() -> Packing:
    """The shapes of ViT-B/16's twelve blocks: one slot for the stream, one for each block's hidden layer."""
    shapes: dict[str, tuple[int, ...]] = {}
    axes: dict[str, tuple[str | None, ...]] = {}
    for block in range(12):
        hidden = f"block{block}.hidden"
        for name, shape, slots in (
            ("norms", (4, 768), (None, "stream")),
            ("qkv", (2304, 768), (None, "stream")),
            ("qkv.bias", (2304,), (None,)),
            ("projection", (768, 768), ("stream", None)),
            ("up", (3072, 768), (hidden, "stream")),
            ("up.bias", (3072,), (hidden,)),
            ("down", (768, 3072), ("stream", hidden)),
            ("biases", (2, 768), (None, "stream")),
        ):
            shapes[f"block{block}.{name}"], axes[f"block{block}.{name}"] = shape, slots
    return Packing.build(shapes, axes)


NETWORKS = {"ResNet-50": resnet50, "ViT-B/16": vit_b_16, "ResNet-18": resnet18}
PLANS = [("ResNet-50", False), ("ViT-B/16", False), ("ResNet-18", False), ("ResNet-18", True)]
"""The networks that permute, graft and combine are timed on, and whether into tensors that are given."""
