"""Splits of a data set, in memory or as image files, and what draws from them: batches, subsets, augmentation.

Orders, subsets and augmentation are drawn from generators that are handed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from regraft.core.tensors import Pair

KEPT_BYTES = 1 << 28
"""Of decoded images, at most: 1,780 of 224 pixels in colour."""


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images that stay on disk and are decoded when a batch wants them.

    ``source[i]`` is a pair whose first member is the PIL image number i; ``numbers`` (int64 [N]) are those that
    belong here. Images are converted to ``channels`` (1 or 3), their shorter side is resized to ``size`` pixels
    and the centre is cut out. ``workers`` processes decode (0: this one, which keeps up to `KEPT_BYTES` of what it
    decoded, so that large images are not decoded in every pass).
    """

    source: Any
    numbers: Tensor
    size: int
    channels: int = 3
    workers: int = 0
    kept: dict[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, channels, size, size)."""
        return len(self), self.channels, self.size, self.size

    def subset(self, indices: Tensor) -> ImageFiles:
        return replace(self, numbers=self.numbers[indices])

    def __getitem__(self, index: int) -> Tensor:
        """The image at an index, decoded: uint8 [C, S, S]. Raises OSError, naming it, where it cannot be."""
        from torchvision.transforms.v2 import functional as transforms

        number = int(self.numbers[index])
        if number in self.kept:
            return self.kept[number]
        try:
            image = self.source[number][0].convert("L" if self.channels == 1 else "RGB")
        except Exception as cause:  # decoders raise anything, and do not say which file it was
            files = getattr(self.source, "samples", None) or {}
            where = files[number][0] if number < len(files) else f"number {number}"
            raise OSError(f"image {where} cannot be read: {cause}") from cause
        image = transforms.resize(image, [self.size], antialias=True)
        pixels: Tensor = transforms.pil_to_tensor(transforms.center_crop(image, [self.size, self.size]))
        if self.workers == 0 and (len(self.kept) + 1) * pixels.numel() <= KEPT_BYTES:
            self.kept[number] = pixels
        return pixels

    def decode(self, order: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        """uint8 images [B, C, S, S] of each index vector of ``order``."""
        loader: DataLoader[Tensor] = DataLoader(
            self,  # type: ignore[arg-type]
            batch_sampler=[indices.tolist() for indices in order],
            num_workers=self.workers,
            pin_memory=device.type == "cuda",
            # a loader without a generator of its own draws a seed from the global state
            generator=torch.Generator(),
        )
        for images in loader:
            yield images.to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their classes.

    images: uint8 [N, C, H, W] (0 to 255) or float32 [N, C, H, W] in memory, or `ImageFiles`; labels: int64 [N].
    ``mean`` and ``std``, one number per channel in units where uint8 pixels run from 0 to 1, are subtracted and
    divided out by ``batches``; without them uint8 pixels are only scaled to 0 to 1, float32 ones kept.

    Raises ValueError for images or labels of another shape or dtype.
    """

    images: Tensor | ImageFiles
    labels: Tensor
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if isinstance(images, Tensor) and (images.ndim != 4 or images.dtype not in (torch.uint8, torch.float32)):
            raise ValueError(f"images must be uint8 or float32 [N, C, H, W], not {images.dtype} {list(images.shape)}")
        if labels.shape != (len(images),) or labels.dtype != torch.int64:
            raise ValueError(f"labels must be int64 [{len(images)}], not {labels.dtype} {list(labels.shape)}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def subset(self, indices: Tensor) -> Split:
        """The images at ``indices`` (int64), in that order."""
        own = self.images
        images = own[indices] if isinstance(own, Tensor) else own.subset(indices)
        return replace(self, images=images, labels=self.labels[indices])

    def per_class(self, count: int, generator: torch.Generator) -> Split:
        """``count`` images of each class, drawn by the generator: see `draw_per_class`."""
        return self.subset(draw_per_class(self.labels, count, generator))

    def to(self, device: torch.device | str) -> Split:
        """Images in memory and labels on ``device``; image files stay where they are, and so do their labels."""
        if isinstance(self.images, ImageFiles):
            return self
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def in_memory(self) -> Split:
        """The same with every image file decoded once."""
        if isinstance(self.images, Tensor):
            return self
        order = torch.arange(len(self)).split(256) if len(self) else []
        parts = list(self.images.decode(order, torch.device("cpu")))
        empty = torch.empty((0, *self.shape), dtype=torch.uint8)
        return replace(self, images=torch.cat([empty, *parts]))

    def batches(
        self,
        size: int,
        *,
        generator: torch.Generator | None = None,
        augment: bool = False,
        device: torch.device | str = "cpu",
        drop_last: bool = False,
    ) -> Batches:
        """Normalised batches: see `Batches`. Images in memory move to ``device`` here, once."""
        return Batches(self.to(device), size, generator, augment, torch.device(device), drop_last)

    def fetch(self, order: Sequence[Tensor], device: torch.device) -> Iterator[Pair]:
        """Images as they are stored, and labels, of each index vector of ``order``."""
        if isinstance(self.images, ImageFiles):
            for images, indices in zip(self.images.decode(order, device), order, strict=True):
                yield images, self.labels[indices].to(device)
            return
        # Channels last, as the networks want them; loaders keep images that way.
        images = self.images.permute(0, 2, 3, 1)
        for indices in order:
            indices = indices.to(device)
            yield images.index_select(0, indices).permute(0, 3, 1, 2), self.labels.index_select(0, indices)


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of a split: float32 normalised images [B, C, H, W] and int64 labels [B], on ``device``.

    Can be iterated again. Without a generator the images come in order, always the same; with one, each
    iteration draws a new order from it (on the CPU, so that the order does not depend on the device).
    ``augment`` flips and crops at random (`flip_and_crop`), drawn from the same generator.

    Raises ValueError for a size below one, for a split that yields no batch, and for augmentation
    without a generator.
    """

    split: Split
    size: int
    generator: torch.Generator | None
    augment: bool
    device: torch.device
    drop_last: bool

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"the batch size must be at least 1, not {self.size}")
        if self.augment and self.generator is None:
            raise ValueError("augmentation is random: hand in a generator")
        if len(self) == 0:
            raise ValueError(
                f"no batch: the split has {len(self.split)} images, the batch size is {self.size}"
                + (", and incomplete batches are dropped" if self.drop_last else "")
            )

    def __len__(self) -> int:
        full, rest = divmod(len(self.split), self.size)
        return full + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[Pair]:
        count = len(self.split)
        shuffled = self.generator is not None
        order = torch.randperm(count, generator=self.generator) if shuffled else torch.arange(count)
        mean, std = self.split.mean, self.split.std
        for images, labels in self.split.fetch(order.split(self.size)[: len(self)], self.device):
            if self.augment and self.generator is not None:
                images = flip_and_crop(images, self.generator)
            yield normalise(images, mean, std), labels


def normalise(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """(images - mean) / std per channel, as float32; uint8 images count as 0 to 1. A new tensor.

    images: [B, C, H, W]. The result is channels last in memory: convolutions are a quarter faster that
    way on a CPU (measured on Conv8).
    """
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    images = images.to(torch.float32, memory_format=torch.channels_last)
    if mean is None or std is None:
        return images / unit
    # Constants for every pixel: broadcast along channels alone, the product took six times as long.
    height, width = images.shape[2:]
    factors = torch.tensor([[1 / (unit * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]])
    scale, shift = factors[:, None, None].repeat(1, height, width, 1).permute(0, 3, 1, 2).to(images.device)
    return torch.addcmul(shift, images, scale)


def flip_and_crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip each image left to right with probability 1/2, and shift it by up to an eighth of its size.

    images: [B, C, H, W], any dtype. The shift is a random crop after zero padding of H // 8 pixels (4 at
    size 32, the usual choice for CIFAR). Draws from the (CPU) generator, whatever the images' device.
    """
    count, _, height, width = images.shape
    padding = height // 8
    flip = torch.rand(count, 1, generator=generator) < 0.5
    down, right = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    rows = down + torch.arange(height)
    columns = torch.arange(width)
    columns = right + torch.where(flip, width - 1 - columns, columns)
    # One gather of whole pixels (all channels side by side), from the padded images laid end to end.
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, *(padding,) * 4))
    image = torch.arange(count)[:, None, None] * (height + 2 * padding)
    pixel = (image + rows[:, :, None]) * (width + 2 * padding) + columns[:, None, :]
    cropped = padded.flatten(0, 2).index_select(0, pixel.flatten().to(images.device))
    return cropped.view(count, height, width, -1).permute(0, 3, 1, 2)


def draw_per_class(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices (int64, sorted) of ``count`` images of each class.

    Draws with equal generators are nested: the 4 of a class are among its 100. Raises ValueError where a
    class has fewer.
    """
    order = torch.randperm(len(labels), generator=generator)
    drawn = []
    for label in labels.unique():
        members = order[labels[order] == label]
        if len(members) < count:
            raise ValueError(f"class {int(label)} has {len(members)} images, {count} were asked for")
        drawn.append(members[:count])
    return torch.cat(drawn).sort().values


def stratified_split(
    labels: Tensor, share: float, generator: torch.Generator, classes: Sequence[str] | None = None
) -> tuple[Tensor, Tensor]:
    """(kept, held out): sorted indices, with round(share * N) held out in proportion to the classes.

    labels: int64 [N]. Places that proportions leave open go to the classes with the largest remainder.
    Raises ValueError, naming the class, where one would be absent from either side.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the share held out must be at least 0 and below 1, not {share}")
    order = torch.randperm(len(labels), generator=generator)
    if share == 0:
        return torch.arange(len(labels)), torch.empty(0, dtype=torch.int64)
    present, sizes = labels.unique(return_counts=True)
    quota = sizes.double() * share
    held_sizes = quota.floor().long()
    open_places = round(len(labels) * share) - int(held_sizes.sum())
    held_sizes[(quota - held_sizes).argsort(descending=True, stable=True)[:open_places]] += 1
    held = []
    for label, size, held_size in zip(present.tolist(), sizes.tolist(), held_sizes.tolist(), strict=True):
        if not 0 < held_size < size:
            side = "held-out" if held_size == 0 else "remaining"
            name = classes[label] if classes else label
            raise ValueError(
                f"class {name!r} would be missing from the {side} split: it has {size} image(s) and the "
                f"share held out is {share:g}; hold out another share or leave the class out"
            )
        held.append(order[labels[order] == label][:held_size])
    held_out = torch.cat(held).sort().values
    mask = torch.ones(len(labels), dtype=torch.bool)
    mask[held_out] = False
    return mask.nonzero().flatten(), held_out
