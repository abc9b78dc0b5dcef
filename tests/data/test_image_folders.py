"""Folders of images that would block, loop or be clipped are refused by name."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from regraft.data import load, sets, splits
from regraft.data.sets import open_image


@pytest.fixture
def folder(tmp_path):
    """Two classes, ten training images and a test image each."""
    for part, number in (("train", 10), ("test", 1)):
        for label, shade in (("cat", 10), ("dog", 200)):
            (tmp_path / "images" / part / label).mkdir(parents=True)
            for index in range(number):
                image = Image.new("RGB", (8, 8), (shade, index, 9))
                image.save(tmp_path / "images" / part / label / f"{index}.png")
    return tmp_path / "images"


def read(folder):
    return load(f"folder:{folder}", image_size=8, workers=0)


@pytest.mark.parametrize("half", ["train", "test"])
def test_a_pipe_does_not_block(folder, half):
    os.mkfifo(folder / half / "cat" / "5.jpg")
    with pytest.raises(OSError, match=r"5\.jpg cannot be read: it is no file"):
        read(folder).in_memory()


@pytest.mark.parametrize("target", ["..", "../..", "../dog"])
def test_a_loop_of_links_is_refused(folder, target):
    (folder / "train" / "cat" / "again").symlink_to(target)
    if target == "../dog":
        (folder / "train" / "dog" / "back").symlink_to("../cat")
    with pytest.raises(ValueError, match=r"(again|back)\S* is a loop of links"):
        read(folder)


def test_a_link_to_a_folder_elsewhere_is_followed(folder):
    (folder / "train" / "cat").rename(folder.parent / "cats")
    (folder / "train" / "cat").symlink_to(folder.parent / "cats")
    data = read(folder)
    assert len(data.train) + len(data.validation) == 20


@pytest.mark.parametrize(("dtype", "suffix"), [(np.uint16, "png"), (np.int32, "tiff"), (np.float32, "tiff")])
def test_pixels_of_more_than_eight_bits_are_not_clipped(folder, dtype, suffix):
    Image.fromarray(np.full((8, 8), 8000, dtype=dtype)).save(folder / "test" / "cat" / f"deep.{suffix}")
    with pytest.raises(OSError, match=rf"deep\.{suffix} cannot be read: its pixels have more than 8 bits"):
        read(folder).in_memory()


def test_a_large_image_is_decoded_once_however_many_passes_there_are(folder, monkeypatch):
    """Of 4000 x 4000 pixels, kept as 8 x 8; the splits share what was decoded."""
    Image.new("RGB", (4000, 4000), (10, 3, 9)).save(folder / "train" / "cat" / "0.png")
    decoded = []

    def count(path):
        decoded.append(path)
        return open_image(path)

    monkeypatch.setattr(sets, "open_image", count)
    data = read(folder)
    passes = [[images for images, _ in data.train.batches(4)] for _ in range(3)]
    data.validation.in_memory()
    assert len(decoded) == len(set(decoded)) == len(data.train) + len(data.validation)
    assert all(torch.equal(a, b) for other in passes[1:] for a, b in zip(passes[0], other, strict=True))


def test_what_is_kept_of_decoded_images_has_a_bound(folder, monkeypatch):
    monkeypatch.setattr(splits, "KEPT_BYTES", 5 * 3 * 8 * 8)
    data = read(folder)
    data.train.in_memory()
    assert len(data.train.images.kept) == 5
