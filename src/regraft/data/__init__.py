"""Data sets: loaded once, split with a seed, handed out in normalised batches.

    data = load("mnist", root="data")
    for images, labels in data.train.batches(128, generator=generator):
        ...                                     # float32 [128, 1, 28, 28] and int64 [128]

A set that fits is kept in memory as it was published (``uint8``) and is normalised batch by batch; a
set of image files is streamed from disk behind the same interface. Normalisation constants come from
the training split alone.
"""

from regraft.data.load import Dataset, default_root, load, load_unlabelled
from regraft.data.sets import CIFAR100_FUSION, CIFAR100_TRANSFER, DIGITS_HIGH, DIGITS_LOW, MissingData
from regraft.data.splits import (
    Batches,
    ImageFiles,
    Split,
    draw_per_class,
    flip_and_crop,
    normalise,
    stratified_split,
)

__all__ = [
    "CIFAR100_FUSION", "CIFAR100_TRANSFER", "DIGITS_HIGH", "DIGITS_LOW", "Batches", "Dataset", "ImageFiles",
    "MissingData", "Split", "default_root", "draw_per_class", "flip_and_crop", "load", "load_unlabelled",
    "normalise", "stratified_split"
]  # fmt: skip
