"""The networks that the kernels are timed on: shapes, permutations, and what one would write by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from regraft_kernels.packing import Packing, Tensors


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

    def permute_by_hand(self, name: str, tensor: Tensor) -> Tensor:
        """pi of one tensor as one would write it: axis after axis."""
        for axis, slot in enumerate(self.packing.axes[name]):
            if slot is not None:
                tensor = tensor.index_select(axis, self.indices[slot])
        return tensor


def packing_bytes(packing: Packing) -> int:
    """Bytes of one set of the tensors in float32."""
    return 4 * sum(segment.size for segment in packing.segments.values())


def copy_of(tensors: Tensors, moved: int, *, out: bool = False) -> Callable[[], object]:
    """A copy of as many bytes as `moved` sets of tensors have, read or written: to new tensors, or to given ones."""
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
