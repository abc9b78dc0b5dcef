"""Where each data set lies and how it is read. To add one, add an entry to `READERS`, at the end.

A reader takes a `DataSource` and returns a `Raw`; `TorchvisionReader` reads torchvision's. scikit-learn and
torchvision's data sets are imported when a set is read, not before.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.core.extras import require_packages
from regraft.core.text import clean_text
from regraft.data.splits import ImageFiles, Split, stratified_split

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

TEN_DIGITS = tuple(map(str, range(10)))


class MissingData(FileNotFoundError):
    """A data set was not found. The message says where it was expected, and how to get it."""


@dataclass(frozen=True, eq=False)
class Raw:
    """What a reader returns: all but the test data, the test data, and the names of labels 0, 1, ..."""

    train: Split
    test: Split
    classes: tuple[str, ...]


@dataclass(frozen=True)
class DataSource:
    """What a reader gets: the set's name, the root folder, and how image files are decoded.

    ``classes``: the requested ones; the CIFAR-100 reader uses its extract if that has them all.
    """

    name: str
    root: Path
    download: bool
    classes: Sequence[str | int] | None
    size: int
    channels: int
    workers: int

    def files(self, source: Any, labels: Sequence[int] | Tensor) -> Split:
        """Image files by number, and their labels."""
        labels = torch.as_tensor(labels, dtype=torch.int64)
        images = ImageFiles(source, torch.arange(len(labels)), self.size, self.channels, self.workers)
        return Split(images, labels)

    def missing(self, looked_for: str, how: str, cause: Exception | None = None) -> MissingData:
        """The exception to raise: where the set was expected, and how to get it."""
        reason = (
            f" ({str(cause).splitlines()[0].partition('. ')[0].rstrip('.')})"
            if cause is not None and str(cause)
            else ""
        )
        return MissingData(
            f"{self.name} is missing{' or damaged' if cause else ''}: "
            f"looked for {self.root / looked_for}{reason}. {how} "
            f"Another folder is chosen with --data (in Python: root=...) or the environment variable {ROOT_VARIABLE}."
        )

    def construct(self, cls: str, looked_for: str, how: str | None, *args: Any, **options: Any) -> Any:
        """One of torchvision's data sets; `MissingData` where its files are not there.

        how: how to get the files; None if they can be downloaded.
        """
        from torchvision import datasets

        if how is None:
            options["download"] = self.download
            how = (
                "The download failed." if self.download else f"Fetch it in Python: load({self.name!r}, download=True)."
            )
        try:
            return getattr(datasets, cls)(*args, **options)
        except Exception as cause:  # torchvision raises whatever its parsers do for a bad file
            raise self.missing(looked_for, how, cause) from cause


HALVES = ({"train": True}, {"train": False})
SPLITS = ({"split": "train"}, {"split": "test"})


@dataclass(frozen=True)
class TorchvisionReader:
    """A data set that torchvision reads.

    cls: its name in torchvision.datasets. folder: where its files lie, under the root. halves: arguments of the class
    for the training and for the test images. labels: gets them from an instance. classes: their names, if the
    instances have no usable ones. root: the class's own root, under ours. files: images are decoded on demand;
    otherwise they are in memory. how: where to get it, if it cannot be downloaded.
    """

    cls: str
    folder: str
    halves: tuple[Mapping[str, Any], Mapping[str, Any]]
    labels: Callable[[Any], Sequence[int]] = attrgetter("targets")
    classes: tuple[str, ...] | None = None
    root: str = ""
    files: bool = False
    how: str | None = None

    def __call__(self, source: DataSource) -> Raw:
        train, test = (
            source.construct(self.cls, self.folder, self.how, source.root / self.root, **half) for half in self.halves
        )
        kept, tests = (self._split(source, part) for part in (train, test))
        return Raw(kept, tests, tuple(self.classes or train.classes))

    def _split(self, source: DataSource, part: Any) -> Split:
        labels = torch.as_tensor(self.labels(part), dtype=torch.int64)
        return source.files(part, labels) if self.files else Split(_channels_first(part.data), labels)


def _channels_first(data: Any) -> Tensor:
    """[N, H, W], [N, H, W, 3] or [N, 3, H, W], array or tensor -> [N, C, H, W]."""
    pixels: Tensor = torch.as_tensor(data)
    if pixels.ndim == 3:
        return pixels[:, None].contiguous()
    return pixels.permute(0, 3, 1, 2) if pixels.shape[3] == 3 else pixels


def digits(source: DataSource) -> Raw:
    """scikit-learn's 1,797 digits, 8x8. They have no test split: ours is fixed, so that seeds share it."""
    try:
        require_packages("the data set digits", ("sklearn",), "bench")
    except ValueError as problem:
        raise MissingData(str(problem)) from None
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32)[:, None] / 16
    everything = Split(images, torch.from_numpy(bunch.target).to(torch.int64))
    return _hold_out(everything, 397 / 1797, TEN_DIGITS)


def _hold_out(everything: Split, share: float, classes: tuple[str, ...]) -> Raw:
    """A set without a test split of its own: always the same images."""
    kept, held = stratified_split(everything.labels, share, torch.Generator().manual_seed(0))
    return Raw(everything.subset(kept), everything.subset(held), classes)


def image_folder(
    source: DataSource,
    folder: str = "",
    how: str = "Images go into one folder per class, under train and test.",
) -> Raw:
    """``folder``/{train,test or val}/<class>/<image>."""
    source = replace(source, root=source.root / folder)
    held_out = next((f for f in ("test", "val") if (source.root / f).is_dir()), "test")
    for half in ("train", held_out):
        if not (source.root / half).is_dir():
            raise source.missing(half, how)
        _check_links(source.root / half)
    train, test = (
        source.construct("ImageFolder", half, how, source.root / half, loader=open_image)
        for half in ("train", held_out)
    )
    if train.classes != test.classes:
        difference = ", ".join(sorted(set(train.classes) ^ set(test.classes)))
        raise ValueError(f"{source.root}: train and {held_out} differ in the classes {difference}")
    return Raw(source.files(train, train.targets), source.files(test, test.targets), tuple(train.classes))


def _check_links(folder: Path, above: frozenset[str] = frozenset()) -> None:
    """Raise ValueError, naming it, for a link that leads back to a folder that it stands in."""
    real = os.path.realpath(folder)
    if real in above:
        raise ValueError(f"{folder} is a loop of links: it leads back to {real}")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                _check_links(folder / entry.name, above | {real})


@dataclass(frozen=True)
class ImageList:
    """Image files without classes, as `ImageFiles` reads them. samples: (path, 0) of each."""

    samples: Sequence[tuple[str, int]]

    def __getitem__(self, number: int) -> tuple[Any, int]:
        return open_image(self.samples[number][0]), 0


def list_images(folder: Path) -> ImageList:
    """The image files that lie in a folder, by name. Raises ValueError where there is none."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    files = sorted(str(file) for file in folder.iterdir() if file.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise ValueError(f"{folder} holds no image ({', '.join(IMG_EXTENSIONS)})")
    return ImageList([(file, 0) for file in files])


def open_image(path: str | Path) -> Any:
    """The PIL image of a file, decoded. Raises OSError for what is no file, which could block for ever, and for pixels
    of more than 8 bits, which would be clipped."""
    from PIL import Image

    if not os.path.isfile(path):
        raise OSError("it is no file")
    with Image.open(path) as image:
        if image.mode[0] in "IF":
            raise OSError(f"its pixels have more than 8 bits (mode {image.mode}): convert it to 8 bits a channel")
        image.load()
    return image


def cifar100_extract(source: DataSource) -> Raw:
    """Some classes of CIFAR-100 as image files, read into memory."""
    how = "Write the images of the classes there as <class>/<image>.png, or load all of cifar100."
    raw = image_folder(replace(source, size=32, channels=3), EXTRACT, how)
    return replace(raw, train=raw.train.in_memory(), test=raw.test.in_memory())


EXTRACT = "cifar-100-18"


def cifar100(source: DataSource) -> Raw:
    """All of CIFAR-100, or its 18-class extract where only that is there and holds what is wanted."""
    try:
        return TorchvisionReader("CIFAR100", "cifar-100-python", HALVES)(source)
    except MissingData as missing:
        extract = source.root / EXTRACT / "train"
        if not extract.is_dir():
            raise
        if not all(isinstance(name, str) and (extract / name).is_dir() for name in source.classes or (None,)):
            there = ", ".join(sorted(folder.name for folder in extract.iterdir()))
            raise MissingData(f"{missing} Choose by name among the classes that are there: {there}.") from missing
        warnings.warn(
            clean_text(
                f"{missing} Its 18-class extract in {extract.parent} has the classes asked for and is used; "
                "the images are the same, their order is not."
            ),
            stacklevel=3,
        )
        return cifar100_extract(source)


def caltech256(source: DataSource) -> Raw:
    """Caltech-256 without its 257th folder, which is clutter; a fixed fifth of it are the test images."""
    images = source.construct("Caltech256", "caltech256/256_ObjectCategories", None, source.root)
    names = [name for name in images.categories if "clutter" not in name]
    everything = source.files(images, images.y)
    everything = everything.subset((everything.labels < len(names)).nonzero().flatten())
    return _hold_out(everything, 0.2, tuple(name.partition(".")[2] or name for name in names))


def cub200(source: DataSource) -> Raw:
    """CUB-200-2011 by its four tables."""
    folder = source.root / "CUB_200_2011"

    def table(file: str) -> Mapping[int, str]:
        path = folder / file
        if not path.is_file():
            how = "Unpack CUB_200_2011.tgz there (its images and its four tables)."
            raise source.missing(f"CUB_200_2011/{file}", how)
        rows = (line.split() for line in path.read_text().splitlines() if line.strip())
        return {int(number): value for number, value in rows}

    paths, labels, training, names = map(
        table, ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    )
    if not paths.keys() == labels.keys() == training.keys():
        raise ValueError(f"{folder}: images.txt, image_class_labels.txt and train_test_split.txt differ in ids")
    order = {number: position for position, number in enumerate(sorted(names))}
    images = _Files([folder / "images" / path for path in paths.values()])
    everything = source.files(images, [order[int(labels[number])] for number in paths])
    in_training = torch.tensor([training[number] == "1" for number in paths])
    return Raw(
        everything.subset(in_training.nonzero().flatten()),
        everything.subset((~in_training).nonzero().flatten()),
        tuple(names[number].partition(".")[2] or names[number] for number in sorted(names)),
    )


@dataclass(frozen=True)
class _Files:
    """Image files by number, in the form of torchvision's data sets."""

    paths: Sequence[Path]

    def __getitem__(self, number: int) -> tuple[Any, None]:
        return open_image(self.paths[number]), None


_CARS = (
    "Its makers' server is gone: put cars_train, cars_test, devkit and cars_test_annos_withlabels.mat "
    "from a copy there, as torchvision's StanfordCars reads them."
)
_IMAGENET = "Unpack the training and validation images there, one folder per class (train/n01440764/...)."

READERS: dict[str, Callable[[DataSource], Raw]] = {
    "digits": digits,
    "mnist": TorchvisionReader("MNIST", "MNIST/raw", HALVES, classes=TEN_DIGITS),
    "fashion-mnist": TorchvisionReader("FashionMNIST", "FashionMNIST/raw", HALVES),
    "cifar10": TorchvisionReader("CIFAR10", "cifar-10-batches-py", HALVES),
    "cifar100": cifar100,
    "cifar100-18": cifar100_extract,
    "stl10": TorchvisionReader("STL10", "stl10_binary", SPLITS, attrgetter("labels")),
    "svhn": TorchvisionReader("SVHN", "svhn", SPLITS, attrgetter("labels"), classes=TEN_DIGITS, root="svhn"),
    "caltech256": caltech256,
    # The labels of these two are not public; the alternative is to decode every image to learn them.
    "food101": TorchvisionReader("Food101", "food-101", SPLITS, attrgetter("_labels"), files=True),
    "cars": TorchvisionReader(
        "StanfordCars",
        "stanford_cars",
        SPLITS,
        lambda part: [n for _, n in part._samples],
        files=True,
        how=_CARS,
    ),
    "cub200": cub200,
    "imagenet": partial(image_folder, folder="imagenet", how=_IMAGENET),
    "folder": image_folder,
}
