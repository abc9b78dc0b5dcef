"""Data sets: loaded once, split with a seed, handed out in normalised batches.

    data = load("mnist", root="data")
    for images, labels in data.train.batches(128, generator=generator):
        ...                                     # float32 [128, 1, 28, 28] and int64 [128]

A set that fits is kept in memory as it was published (``uint8``) and is normalised batch by batch; a
set of image files is streamed from disk behind the same interface. Normalisation constants come from
the training split alone. Orders, splits and augmentation are drawn from generators that are handed in.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT_VARIABLE = "REGRAFT_DATA"

# Class subsets that the papers use. In "Transferring Learning Trajectories" the ten classes were drawn
# at random and are not named; these ten are ours, and are in the 18-class extract. The fusion paper
# names its ten.
DIGITS_LOW = (0, 1, 2, 3, 4)
DIGITS_HIGH = (5, 6, 7, 8, 9)
CIFAR100_TRANSFER = (
    "aquarium_fish", "butterfly", "cloud", "dolphin", "oak_tree", "otter", "plain", "tank", "whale", "woman",
)  # fmt: skip
CIFAR100_FUSION = (
    "seal", "man", "palm_tree", "woman", "wardrobe",
    "beaver", "plain", "pickup_truck", "skyscraper", "possum",
)  # fmt: skip


class MissingData(FileNotFoundError):
    """A data set is not where it was looked for. The message says what, where, and how to get it."""


# ---------------------------------------------------------------------------------------------------
# Splits and batches


@dataclass(frozen=True, eq=False)
class Split:
    """Images in memory.

    images: uint8 [N, C, H, W] (0 to 255) or float32 [N, C, H, W]; labels: int64 [N]. ``mean`` and
    ``std``, one number per channel in units where uint8 pixels run from 0 to 1, are subtracted and
    divided out by ``batches``; without them uint8 pixels are only scaled to 0 to 1, float32 ones kept.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype not in (torch.uint8, torch.float32):
            raise ValueError(
                f"images must be uint8 or float32 [N, C, H, W], not "
                f"{self.images.dtype} {list(self.images.shape)}"
            )
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be int64 [{len(self.images)}], "
                f"not {self.labels.dtype} {list(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return tuple(self.images.shape[1:])

    def subset(self, indices: Tensor) -> Split:
        """The images at ``indices`` (int64), in that order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def to(self, device: torch.device | str) -> Split:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def per_class(self, count: int, generator: torch.Generator) -> Split:
        """``count`` images of each class, drawn by the generator: see `draw_per_class`."""
        return self.subset(draw_per_class(self.labels, count, generator))

    def batches(
        self,
        size: int,
        *,
        generator: torch.Generator | None = None,
        augment: bool = False,
        device: torch.device | str = "cpu",
        drop_last: bool = False,
    ) -> Batches:
        """Normalised batches: see `Batches`. The images move to ``device`` here, once."""
        return Batches(self.to(device), size, generator, augment, torch.device(device), drop_last)

    def fetch(self, order: Sequence[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Raw images and labels of each index vector of ``order``."""
        # Channels last, as the networks want them; loaders keep images that way.
        images = self.images.permute(0, 2, 3, 1)
        for indices in order:
            indices = indices.to(device)
            yield images.index_select(0, indices).permute(0, 3, 1, 2), self.labels.index_select(0, indices)


@dataclass(frozen=True, eq=False)
class FileSplit:
    """Images that stay on disk and are decoded when a batch wants them; otherwise like `Split`.

    ``source[i]`` is a pair whose first member is the PIL image number i; ``indices`` (int64 [N]) are the
    numbers that belong to this split and ``labels`` (int64 [N]) their classes. Images are converted to
    ``channels`` (1 or 3), their shorter side is resized to ``size`` pixels and the centre is cut out.
    ``workers`` processes decode (0: this one).
    """

    source: Any
    indices: Tensor
    labels: Tensor
    size: int
    channels: int = 3
    workers: int = 0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    def subset(self, indices: Tensor) -> FileSplit:
        return replace(self, indices=self.indices[indices], labels=self.labels[indices])

    def per_class(self, count: int, generator: torch.Generator) -> FileSplit:
        """``count`` images of each class, drawn by the generator: see `draw_per_class`."""
        return self.subset(draw_per_class(self.labels, count, generator))

    def batches(
        self,
        size: int,
        *,
        generator: torch.Generator | None = None,
        augment: bool = False,
        device: torch.device | str = "cpu",
        drop_last: bool = False,
    ) -> Batches:
        """Normalised batches: see `Batches`."""
        return Batches(self, size, generator, augment, torch.device(device), drop_last)

    def fetch(self, order: Sequence[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Raw images and labels of each index vector of ``order``."""
        loader = torch.utils.data.DataLoader(
            _Decoder(self.source, self.indices, self.labels, self.size, self.channels),
            batch_sampler=[indices.tolist() for indices in order],
            num_workers=self.workers,
            pin_memory=device.type == "cuda",
            # Its own generator: a loader without one draws a seed from the global state.
            generator=torch.Generator(),
        )
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def in_memory(self) -> Split:
        """Every image decoded once: a `Split` of uint8 images."""
        if len(self) == 0:
            return Split(torch.empty((0, *self.shape), dtype=torch.uint8), self.labels, self.mean, self.std)
        order = torch.arange(len(self)).split(256)
        images = [images for images, _ in self.fetch(order, torch.device("cpu"))]
        return Split(torch.cat(images), self.labels, self.mean, self.std)


AnySplit = Split | FileSplit


class _Decoder(torch.utils.data.Dataset):
    """(uint8 [C, S, S], label) of each image of a FileSplit; workers can pickle it."""

    def __init__(self, source: Any, indices: Tensor, labels: Tensor, size: int, channels: int) -> None:
        from torchvision.transforms import v2

        self.source, self.indices, self.labels = source, indices.tolist(), labels.tolist()
        self.mode = "L" if channels == 1 else "RGB"
        self.transform = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        image = self.source[self.indices[item]][0]
        return self.transform(image.convert(self.mode)), self.labels[item]


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of a split: float32 normalised images [B, C, H, W] and int64 labels [B], on ``device``.

    Can be iterated again. Without a generator the images come in order, always the same; with one, each
    iteration draws a new order from it (on the CPU, so that the order does not depend on the device).
    ``augment`` flips and crops at random (`flip_and_crop`), drawn from the same generator.

    Raises ValueError for a size below one, for a split that yields no batch, and for augmentation
    without a generator.
    """

    split: AnySplit
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

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images_in_split = len(self.split)
        if self.generator is None:
            order = torch.arange(images_in_split)
        else:
            order = torch.randperm(images_in_split, generator=self.generator)
        mean, std = self.split.mean, self.split.std
        for images, labels in self.split.fetch(order.split(self.size)[: len(self)], self.device):
            if self.augment:
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
    found = padded.flatten(0, 2).index_select(0, pixel.flatten().to(images.device))
    return found.unflatten(0, (count, height, width)).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------
# Drawing from a split


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


# ---------------------------------------------------------------------------------------------------
# Data sets


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named data set in three splits, all normalised by the training split's mean and deviation.

    ``mean`` and ``std`` hold one number per channel, in units where pixels run from 0 to 1. ``classes``
    are the names of labels 0 to num_classes - 1.
    """

    name: str
    train: AnySplit
    validation: AnySplit
    test: AnySplit
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
        """The same with every image decoded once and kept as uint8."""
        splits = {
            name: split.in_memory() if isinstance(split, FileSplit) else split
            for name, split in [("train", self.train), ("validation", self.validation), ("test", self.test)]
        }
        return replace(self, **splits)


@dataclass(frozen=True, eq=False)
class _Raw:
    """What a loader finds: everything that is not test data, and the test data."""

    train: AnySplit
    test: AnySplit
    classes: tuple[str, ...]


@dataclass(frozen=True)
class _Place:
    """Where and how a loader looks: the root folder, and how file-based images are decoded.

    ``classes`` are those asked for, which tell the CIFAR-100 loader whether its extract would do.
    """

    root: Path
    download: bool
    classes: Sequence[str | int] | None
    size: int
    channels: int
    workers: int

    def files(self, source: Any, labels: Sequence[int] | Tensor) -> FileSplit:
        labels = torch.as_tensor(labels, dtype=torch.int64)
        return FileSplit(source, torch.arange(len(labels)), labels, self.size, self.channels, self.workers)


def default_root() -> Path:
    """The folder named by the environment variable REGRAFT_DATA, else ``data`` in the working directory."""
    return Path(os.environ.get(ROOT_VARIABLE) or "data")


def load(
    name: str,
    *,
    root: str | Path | None = None,
    classes: Sequence[str | int] | None = None,
    seed: int = 0,
    validation: float = 0.1,
    download: bool = False,
    image_size: int | None = None,
    channels: int | None = None,
    workers: int | None = None,
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
        pixels and colour unless told; the others keep what they have.
    workers: processes that decode file-based images; by default as many as there are cores.

    Raises MissingData (a FileNotFoundError) where the set is not there, ValueError for an unknown name or
    class, or a class that would be missing from the validation split.
    """
    family, _, path = name.partition(":")
    if family not in _LOADERS or bool(path) != (family == "folder"):
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(_LOADERS)}:PATH")
    place = _Place(
        root=Path(path) if path else Path(root) if root is not None else default_root(),
        download=download,
        classes=classes,
        size=image_size or 224,
        channels=channels or 3,
        workers=(os.cpu_count() or 1) if workers is None else workers,
    )
    raw = _LOADERS[family](place)
    raw = _choose_classes(raw, classes) if classes is not None else raw
    raw = replace(
        raw, train=_convert(raw.train, image_size, channels), test=_convert(raw.test, image_size, channels)
    )
    kept, held = stratified_split(
        raw.train.labels, validation, torch.Generator().manual_seed(seed), raw.classes
    )
    train = raw.train.subset(kept)
    mean, std = _statistics(train)
    return Dataset(
        name=name,
        train=replace(train, mean=mean, std=std),
        validation=replace(raw.train.subset(held), mean=mean, std=std),
        test=replace(raw.test, mean=mean, std=std),
        classes=raw.classes,
        mean=mean,
        std=std,
    )


def _choose_classes(raw: _Raw, wanted: Sequence[str | int]) -> _Raw:
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

    def choose(split: AnySplit) -> AnySplit:
        labels = renumber[split.labels]
        chosen = (labels >= 0).nonzero().flatten()
        return replace(split.subset(chosen), labels=labels[chosen])

    return _Raw(choose(raw.train), choose(raw.test), tuple(raw.classes[n] for n in numbers))


def _convert(split: AnySplit, size: int | None, channels: int | None) -> AnySplit:
    """Resize an in-memory split, change its number of channels, and lay it out as `Split.fetch` reads it.

    File-based splits resize and change channels on decoding.
    """
    if isinstance(split, FileSplit):
        return split
    images = split.images
    if size is not None and images.shape[2:] != (size, size):
        from torchvision.transforms.v2.functional import resize

        images = torch.cat([resize(part, [size, size], antialias=True) for part in images.split(4096)])
    if channels == 3 and images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1).contiguous()
    elif channels == 1 and images.shape[1] == 3:
        from torchvision.transforms.v2.functional import rgb_to_grayscale

        images = rgb_to_grayscale(images)
    elif channels is not None and channels != images.shape[1]:
        raise ValueError(f"images have {images.shape[1]} channels; 1 and 3 can be had, not {channels}")
    return replace(split, images=images.contiguous(memory_format=torch.channels_last))


def _statistics(split: AnySplit, file_sample: int = 2000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, pixels counted from 0 to 1.

    Of all images in memory; of ``file_sample`` evenly spaced ones where they lie on disk. A constant
    channel gets deviation 1.
    """
    if len(split) == 0:
        raise ValueError("the training split is empty")
    if isinstance(split, FileSplit):
        step = max(1, len(split) // file_sample)
        split = split.subset(torch.arange(0, len(split), step)[:file_sample]).in_memory()
    total = torch.zeros(split.shape[0], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for part in split.images.split(1024):
        pixels = normalise(part, None, None)
        total += pixels.sum((0, 2, 3), dtype=torch.float64)
        squares += pixels.square_().sum((0, 2, 3), dtype=torch.float64)
    count = split.images.numel() // split.shape[0]
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    std[std < 1e-6] = 1.0
    return tuple(mean.tolist()), tuple(std.tolist())


# ---------------------------------------------------------------------------------------------------
# Loaders: one per set


def _missing(
    place: _Place, name: str, looked_for: str, how: str, cause: Exception | None = None
) -> MissingData:
    reason = f" ({str(cause).splitlines()[0].rstrip('.')})" if cause is not None and str(cause) else ""
    return MissingData(
        f"{name} is missing{' or damaged' if cause else ''}: "
        f"looked for {place.root / looked_for}{reason}. {how} "
        f"Another folder is chosen with root=... or the environment variable {ROOT_VARIABLE}."
    )


def _torchvision(place: _Place, name: str, looked_for: str, make: Callable[[], Any], how: str = "") -> Any:
    """Call a torchvision constructor and say clearly where the set was not found."""
    fetch = "Fetch it with download=True." if not place.download else "The download failed."
    try:
        return make()
    except (RuntimeError, OSError, ValueError) as cause:  # torchvision uses all three for "not there"
        raise _missing(place, name, looked_for, how or fetch, cause) from cause


def _digits(place: _Place) -> _Raw:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32)[:, None] / 16
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    everything = Split(images, labels)
    # scikit-learn's set has no test split. Ours is fixed, so that seeds share it.
    kept, held = stratified_split(labels, 397 / 1797, torch.Generator().manual_seed(0))
    return _Raw(everything.subset(kept), everything.subset(held), tuple(str(digit) for digit in range(10)))


def _mnist_like(cls_name: str, folder: str) -> Callable[[_Place], _Raw]:
    def read(place: _Place) -> _Raw:
        from torchvision import datasets

        cls = getattr(datasets, cls_name)
        parts = [
            _torchvision(
                place, cls_name, folder, lambda t=train: cls(place.root, train=t, download=place.download)
            )
            for train in (True, False)
        ]
        train, test = (Split(part.data[:, None].contiguous(), part.targets.long()) for part in parts)
        classes = tuple(map(str, range(10))) if cls_name == "MNIST" else tuple(parts[0].classes)
        return _Raw(train, test, classes)

    return read


def _cifar(cls_name: str, folder: str) -> Callable[[_Place], _Raw]:
    def read(place: _Place) -> _Raw:
        from torchvision import datasets

        cls = getattr(datasets, cls_name)
        parts = [
            _torchvision(
                place, cls_name, folder, lambda t=train: cls(place.root, train=t, download=place.download)
            )
            for train in (True, False)
        ]
        train, test = (
            Split(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets))
            for part in parts
        )
        return _Raw(train, test, tuple(parts[0].classes))

    return read


def _cifar100(place: _Place) -> _Raw:
    """All of CIFAR-100, or its 18-class extract where only that is there and holds what is wanted."""
    try:
        return _cifar("CIFAR100", "cifar-100-python")(place)
    except MissingData as missing:
        extract = place.root / "cifar-100-18" / "train"
        if not extract.is_dir():
            raise
        if not all(isinstance(name, str) and (extract / name).is_dir() for name in place.classes or [None]):
            there = ", ".join(sorted(folder.name for folder in extract.iterdir()))
            raise MissingData(
                f"{missing} Choose by name among the classes that are there: {there}."
            ) from missing
        warnings.warn(
            f"{missing} Its 18-class extract in {extract.parent} has the classes asked for and is used; "
            "the images are the same, their order is not.",
            stacklevel=3,
        )
        return _cifar100_18(place)


def _cifar100_18(place: _Place) -> _Raw:
    how = "Write the images of the classes there as <class>/<image>.png, or load all of cifar100."
    raw = _image_folder(
        replace(place, root=place.root / "cifar-100-18", size=32, channels=3), how, "CIFAR-100, 18 classes"
    )
    return replace(raw, train=raw.train.in_memory(), test=raw.test.in_memory())


def _stl10(place: _Place) -> _Raw:
    from torchvision.datasets import STL10

    parts = [
        _torchvision(
            place, "STL-10", "stl10_binary", lambda s=split: STL10(place.root, s, download=place.download)
        )
        for split in ("train", "test")
    ]
    train, test = (Split(torch.from_numpy(p.data), torch.from_numpy(p.labels).long()) for p in parts)
    return _Raw(train, test, tuple(parts[0].classes))


def _svhn(place: _Place) -> _Raw:
    from torchvision.datasets import SVHN

    folder = place.root / "svhn"
    parts = [
        _torchvision(
            place, "SVHN", f"svhn/{split}_32x32.mat", lambda s=split: SVHN(folder, s, download=place.download)
        )
        for split in ("train", "test")
    ]
    train, test = (Split(torch.from_numpy(p.data), torch.from_numpy(p.labels).long()) for p in parts)
    return _Raw(train, test, tuple(map(str, range(10))))


def _caltech256(place: _Place) -> _Raw:
    from torchvision.datasets import Caltech256

    source = _torchvision(
        place,
        "Caltech-256",
        "caltech256/256_ObjectCategories",
        lambda: Caltech256(place.root, download=place.download),
    )
    # The 257th folder is clutter, not a class.
    names = [name for name in source.categories if "clutter" not in name]
    everything = place.files(source, source.y)
    everything = everything.subset((everything.labels < len(names)).nonzero().flatten())
    kept, held = stratified_split(everything.labels, 0.2, torch.Generator().manual_seed(0))
    classes = tuple(name.partition(".")[2] or name for name in names)
    return _Raw(everything.subset(kept), everything.subset(held), classes)


def _food101(place: _Place) -> _Raw:
    from torchvision.datasets import Food101

    parts = [
        _torchvision(
            place, "Food-101", "food-101", lambda s=split: Food101(place.root, s, download=place.download)
        )
        for split in ("train", "test")
    ]
    # Its labels are not public; the alternative is to decode 100,000 images to learn them.
    train, test = (place.files(part, part._labels) for part in parts)
    return _Raw(train, test, tuple(parts[0].classes))


def _cars(place: _Place) -> _Raw:
    from torchvision.datasets import StanfordCars

    how = (
        "Its makers' server is gone: put cars_train, cars_test, devkit and cars_test_annos_withlabels.mat "
        "from a copy there, as torchvision's StanfordCars reads them."
    )
    parts = [
        _torchvision(
            place, "Stanford Cars", "stanford_cars", lambda s=split: StanfordCars(place.root, s), how
        )
        for split in ("train", "test")
    ]
    train, test = (place.files(part, [label for _, label in part._samples]) for part in parts)
    return _Raw(train, test, tuple(parts[0].classes))


def _cub200(place: _Place) -> _Raw:
    folder = place.root / "CUB_200_2011"
    how = "Unpack CUB_200_2011.tgz there (its images and its four tables)."

    def table(file: str) -> Mapping[int, str]:
        path = folder / file
        if not path.is_file():
            raise _missing(place, "CUB-200-2011", f"CUB_200_2011/{file}", how)
        return {
            int(number): value for number, value in (line.split() for line in path.open() if line.strip())
        }

    paths, labels, training, names = map(
        table, ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    )
    if not paths.keys() == labels.keys() == training.keys():
        raise ValueError(
            f"{folder}: images.txt, image_class_labels.txt and train_test_split.txt differ in ids"
        )
    order = {number: position for position, number in enumerate(sorted(names))}
    everything = place.files(
        _ImageFiles([folder / "images" / path for path in paths.values()]),
        [order[int(labels[number])] for number in paths],
    )
    in_training = torch.tensor([training[number] == "1" for number in paths])
    return _Raw(
        everything.subset(in_training.nonzero().flatten()),
        everything.subset((~in_training).nonzero().flatten()),
        tuple(names[number].partition(".")[2] or names[number] for number in sorted(names)),
    )


def _imagenet(place: _Place) -> _Raw:
    how = "Unpack the training and validation images there, one folder per class (train/n01440764/...)."
    return _image_folder(replace(place, root=place.root / "imagenet"), how, "ImageNet")


def _image_folder(
    place: _Place, how: str = "Images go into one folder per class.", name: str = "An image folder"
) -> _Raw:
    from torchvision.datasets import ImageFolder

    test_folder = next((f for f in ("test", "val") if (place.root / f).is_dir()), "test")
    parts = []
    for folder in ("train", test_folder):
        if not (place.root / folder).is_dir():
            raise _missing(place, name, folder, how)
        parts.append(_torchvision(place, name, folder, lambda f=folder: ImageFolder(place.root / f), how))
    if parts[0].classes != parts[1].classes:
        difference = sorted(set(parts[0].classes) ^ set(parts[1].classes))
        raise ValueError(
            f"{place.root}: train and {test_folder} differ in the classes {', '.join(difference)}"
        )
    train, test = (place.files(part, part.targets) for part in parts)
    return _Raw(train, test, tuple(parts[0].classes))


class _ImageFiles:
    """Image files by number, in the form of torchvision's data sets."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: int) -> tuple[Any, None]:
        from PIL import Image

        with Image.open(self.paths[item]) as image:
            image.load()
        return image, None


_LOADERS: dict[str, Callable[[_Place], _Raw]] = {
    "digits": _digits,
    "mnist": _mnist_like("MNIST", "MNIST/raw"),
    "fashion-mnist": _mnist_like("FashionMNIST", "FashionMNIST/raw"),
    "cifar10": _cifar("CIFAR10", "cifar-10-batches-py"),
    "cifar100": _cifar100,
    "cifar100-18": _cifar100_18,
    "stl10": _stl10,
    "svhn": _svhn,
    "caltech256": _caltech256,
    "food101": _food101,
    "cars": _cars,
    "cub200": _cub200,
    "imagenet": _imagenet,
    "folder": _image_folder,
}
