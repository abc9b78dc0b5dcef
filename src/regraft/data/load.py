"""Load a data set by name: read it, select classes, resize, split with a seed, normalise."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from regraft.core.arguments import Count, CountOrNone, check_arguments
from regraft.data.sets import READERS, ROOT_VARIABLE, DataSource, Raw, list_images
from regraft.data.splits import ImageFiles, Split, normalise, stratified_split

FILE_SAMPLE = 2000  # image files that are decoded for mean and deviation


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named data set in three splits, all normalised by the training split's mean and deviation.

    ``mean`` and ``std`` hold one number per channel, in units where pixels run from 0 to 1. ``classes``
    are the names of labels 0 to num_classes - 1.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return self.train.shape

    def in_memory(self) -> Dataset:
        """The same with every image file decoded once and kept as uint8."""
        train, validation, test = (s.in_memory() for s in (self.train, self.validation, self.test))
        return replace(self, train=train, validation=validation, test=test)


def default_root() -> Path:
    """The folder named by the environment variable REGRAFT_DATA, else ``data`` in the working directory."""
    return Path(os.environ.get(ROOT_VARIABLE) or "data")


@check_arguments
def load(
    name: str,
    *,
    root: str | Path | None = None,
    classes: Sequence[str | int] | None = None,
    seed: int = 0,
    validation: float = 0.1,
    download: bool = False,
    image_size: Count | None = None,
    channels: Count | None = None,
    workers: CountOrNone | None = None,
) -> Dataset:
    """Load a data set and split it.

    name: ``digits`` (embedded), ``mnist``, ``fashion-mnist``, ``cifar10``, ``cifar100``,
        ``cifar100-18`` (a folder ``cifar-100-18/{train,test}/<class>/*.png``), ``stl10``, ``svhn``,
        ``caltech256``, ``food101``, ``cars``, ``cub200``, ``imagenet`` (a folder
        ``imagenet/{train,val}/<class>``), or ``folder:PATH`` (``PATH/{train,test}/<class>``, or ``val``
        in place of ``test``).
    root: where the sets lie; by default `default_root`.
    classes: only these, by name or number, renumbered 0, 1, ... in the order given.
    seed: of the stratified validation split. Sets without a test split of their own (digits, Caltech-256)
        get one that does not depend on it: 397 of 1,797 and 20 %.
    validation: share of the training images held out for validation.
    download: fetch what is missing, where the set's makers allow it.
    image_size, channels: resize to squares and turn grey into colour or back. File-based sets are 224
        pixels and colour by default; the others keep their own.
    workers: processes that decode file-based images; by default as many as there are cores.

    Raises MissingData (a FileNotFoundError) where the set is not there, ValueError for an unknown name or
    class, or a class that would be missing from the validation split.
    """
    family, _, path = name.partition(":")
    if family not in READERS or bool(path) != (family == "folder"):
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(READERS)}:PATH")
    source = DataSource(
        name=name,
        root=Path(path) if path else Path(root) if root is not None else default_root(),
        download=download,
        classes=classes,
        size=image_size or 224,
        channels=channels or 3,
        workers=(os.cpu_count() or 1) if workers is None else workers,
    )
    raw = READERS[family](source)
    if classes is not None:
        raw = _choose_classes(raw, classes)
    everything, test = (_convert(split, image_size, channels) for split in (raw.train, raw.test))
    kept, held = stratified_split(everything.labels, validation, torch.Generator().manual_seed(seed), raw.classes)
    mean, std = _statistics(everything.subset(kept))
    train, held_out, test = (
        replace(split, mean=mean, std=std) for split in (everything.subset(kept), everything.subset(held), test)
    )
    return Dataset(name, train, held_out, test, raw.classes, mean, std)


@check_arguments
def load_unlabelled(folder: str | Path, *, image_size: Count = 224, channels: Count = 3) -> dict[str, Split]:
    """Images that lie in ``folder`` itself ("train"), or in its ``train`` and ``test`` (or ``val``), by part.

    They have no classes: all labels are 0. Normalised by the mean and deviation of "train". Raises ValueError where a
    part holds no image, OSError for a folder that is not there.
    """
    root = Path(folder)
    held_out = next((name for name in ("test", "val") if (root / name).is_dir()), None)
    folders = {"train": root / "train" if (root / "train").is_dir() else root}
    if held_out is not None and folders["train"] != root:
        folders["test"] = root / held_out
    parts = {}
    for part, place in folders.items():
        files = list_images(place)
        images = ImageFiles(files, torch.arange(len(files.samples)), image_size, channels)
        parts[part] = Split(images, torch.zeros(len(files.samples), dtype=torch.int64))
    mean, std = _statistics(parts["train"])
    return {part: replace(split, mean=mean, std=std) for part, split in parts.items()}


def _choose_classes(raw: Raw, wanted: Sequence[str | int]) -> Raw:
    if len(wanted) == 0 or len(set(wanted)) != len(wanted):
        raise ValueError(f"classes must be a list of distinct names or numbers, not {list(wanted)}")
    numbers = []
    for choice in wanted:
        number = raw.classes.index(choice) if choice in raw.classes else choice
        if not isinstance(number, int) or not 0 <= number < len(raw.classes):
            raise ValueError(f"no class {choice!r}: there are {', '.join(raw.classes[:20])}")
        numbers.append(number)
    renumber = torch.full((len(raw.classes),), -1)
    renumber[numbers] = torch.arange(len(numbers))

    def choose(split: Split) -> Split:
        labels = renumber[split.labels]
        chosen = (labels >= 0).nonzero().flatten()
        return replace(split.subset(chosen), labels=labels[chosen])

    return Raw(choose(raw.train), choose(raw.test), tuple(raw.classes[n] for n in numbers))


def _convert(split: Split, size: int | None, channels: int | None) -> Split:
    """Images in memory at another size and number of channels, laid out as `Split.fetch` reads them.

    Image files are resized and change channels on decoding.
    """
    if isinstance(split.images, ImageFiles):
        return split
    images = split.images
    if size is not None and images.shape[2:] != (size, size):
        from torchvision.transforms.v2.functional import resize

        images = torch.cat([resize(part, [size, size], antialias=True) for part in images.split(4096)])
    if channels is not None and channels != images.shape[1]:
        images = _recolour(images, channels)
    return replace(split, images=images.contiguous(memory_format=torch.channels_last))


def _recolour(images: Tensor, channels: int) -> Tensor:
    if (images.shape[1], channels) == (1, 3):
        return images.expand(-1, 3, -1, -1)
    if (images.shape[1], channels) == (3, 1):
        from torchvision.transforms.v2.functional import rgb_to_grayscale

        grey: Tensor = rgb_to_grayscale(images)
        return grey
    raise ValueError(f"images have {images.shape[1]} channels; 1 and 3 can be had, not {channels}")


def _statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, pixels counted from 0 to 1; a constant channel gets deviation 1.

    Of all images in memory; of `FILE_SAMPLE` evenly spaced ones where they lie on disk.
    """
    if len(split) == 0:
        raise ValueError("the training split is empty")
    if isinstance(split.images, ImageFiles):
        step = max(1, len(split) // FILE_SAMPLE)
        split = split.subset(torch.arange(0, len(split), step)[:FILE_SAMPLE]).in_memory()
    images = split.images
    assert isinstance(images, Tensor)
    total = torch.zeros(split.shape[0], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for part in images.split(1024):
        pixels = normalise(part, None, None)
        total += pixels.sum((0, 2, 3), dtype=torch.float64)
        squares += pixels.square_().sum((0, 2, 3), dtype=torch.float64)
    count = images.numel() // split.shape[0]
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    std[std < 1e-6] = 1.0
    return tuple(mean.tolist()), tuple(std.tolist())
