"""Data sets: splits, batches, augmentation, and every loader on a tiny folder of its own."""

import itertools
import json
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from regraft import data
from regraft.data import ImageFiles, MissingData, Split, draw_per_class, flip_and_crop, load, stratified_split
from regraft.data.sets import READERS


def seed(number=0):
    return torch.Generator().manual_seed(number)


def coloured(count, channels=3, size=8):
    """Images whose first pixel tells their number."""
    images = torch.randint(0, 255, (count, channels, size, size), dtype=torch.uint8, generator=seed())
    images[:, 0, 0, 0] = torch.arange(count)
    return images


@pytest.fixture
def split():
    return Split(coloured(100), torch.arange(100) % 5)


# --- splits and batches


def test_batches_in_order_cover_the_split_again_and_again(split):
    batches = split.batches(32)
    assert len(batches) == 4
    for _ in range(2):
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.equal(labels, split.labels)
        assert torch.equal(images, split.images.float() / 255)


def test_shuffled_batches_are_a_new_seeded_order_each_time(split):
    batches, twin = split.batches(32, generator=seed(1)), split.batches(32, generator=seed(1))
    orders = [[(images[:, 0, 0, 0] * 255).round().int().tolist() for images, _ in batches] for _ in range(2)]
    again = [[(images[:, 0, 0, 0] * 255).round().int().tolist() for images, _ in twin] for _ in range(2)]
    assert orders == again
    assert orders[0] != orders[1]
    assert sorted(itertools.chain(*orders[0])) == list(range(100))
    for images, labels in batches:
        assert torch.equal((images[:, 0, 0, 0] * 255).round().long() % 5, labels)


def test_incomplete_batches_are_dropped_when_asked(split):
    batches = split.batches(32, drop_last=True)
    assert len(batches) == 3 and [len(labels) for _, labels in batches] == [32, 32, 32]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"size": 0}, "at least 1"),
        ({"size": 200, "drop_last": True}, "100 images"),
        ({"size": 10, "augment": True}, "generator"),
    ],
)
def test_batches_that_cannot_be_are_refused(split, arguments, words):
    with pytest.raises(ValueError, match=words):
        split.batches(**arguments)


def test_an_empty_split_has_no_batches(split):
    with pytest.raises(ValueError, match="0 images"):
        split.subset(torch.empty(0, dtype=torch.int64)).batches(4)


@pytest.mark.parametrize(
    "images, labels",
    [
        (torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, 1, 8, 8, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, 1, 8, 8), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(3, 1, 8, 8), torch.zeros(3)),
    ],
)
def test_splits_check_shapes_and_dtypes(images, labels):
    with pytest.raises(ValueError, match="must be"):
        Split(images, labels)


def test_normalisation_is_that_of_the_training_split_alone():
    everything = load("digits")
    images = everything.train.images.double()
    assert everything.mean[0] == pytest.approx(float(images.mean()), rel=1e-6)
    assert everything.std[0] == pytest.approx(float(images.std(correction=0)), rel=1e-6)
    train = torch.cat([images for images, _ in everything.train.batches(100)])
    assert abs(float(train.mean())) < 1e-5 and float(train.std(correction=0)) == pytest.approx(1, rel=1e-5)
    assert everything.test.mean == everything.validation.mean == everything.mean


def test_uint8_and_float_images_normalise_alike():
    images = coloured(20)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    expected = (images.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(data.normalise(images, mean, std).double(), expected, atol=1e-6)
    assert torch.allclose(data.normalise(images.float() / 255, mean, std).double(), expected, atol=1e-6)


# --- augmentation


def test_flip_and_crop_shifts_and_mirrors_whole_images():
    size, padding = 32, 4
    image = torch.arange(size * size, dtype=torch.float32).reshape(1, 1, size, size) + 1
    images = torch.cat([image, image + 5000]).expand(2, 3, size, size).repeat(200, 1, 1, 1)
    found = flip_and_crop(images, seed())
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    seen = set()
    for number in range(len(images)):
        matches = [
            (down, right, flipped)
            for down, right, flipped in itertools.product(range(9), range(9), (False, True))
            if torch.equal(
                found[number],
                padded[number, :, down : down + size, right : right + size].flip(-1)
                if flipped
                else padded[number, :, down : down + size, right : right + size],
            )
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    downs, rights, flips = map(set, zip(*seen, strict=True))
    assert downs == rights == set(range(9)) and flips == {False, True}


def test_augmentation_is_drawn_from_the_generator(split):
    first, second, third = (
        torch.cat([images for images, _ in split.batches(32, generator=seed(n), augment=True)]) for n in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


# --- drawing


def test_stratified_split_keeps_proportions_and_loses_nothing():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 21)[torch.randperm(101, generator=seed())]
    kept, held = stratified_split(labels, 0.1, seed(3))
    assert len(held) == 10
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(101))
    assert labels[held].bincount().tolist() == [5, 3, 2]
    assert torch.equal(stratified_split(labels, 0.1, seed(3))[1], held)
    assert not torch.equal(stratified_split(labels, 0.1, seed(4))[1], held)


def test_a_class_missing_from_validation_is_refused_by_name():
    labels = torch.tensor([0] * 50 + [1] * 3)
    with pytest.raises(ValueError, match=r"class 'rare' would be missing from the held-out split.*3 image"):
        stratified_split(labels, 0.1, seed(), ["common", "rare"])
    with pytest.raises(ValueError, match="class 1 would be missing from the remaining"):
        stratified_split(torch.tensor([0] * 50 + [1]), 0.9, seed())
    with pytest.raises(ValueError, match="share"):
        stratified_split(labels, 1.0, seed())


def test_draws_per_class_are_balanced_and_nested():
    labels = torch.arange(500) % 5
    few, many = draw_per_class(labels, 4, seed(7)), draw_per_class(labels, 60, seed(7))
    assert labels[few].bincount().tolist() == [4] * 5
    assert labels[many].bincount().tolist() == [60] * 5
    assert set(few.tolist()) <= set(many.tolist())
    with pytest.raises(ValueError, match="class 0 has 100 images"):
        draw_per_class(labels, 101, seed())


# --- data sets


def test_digits_are_embedded_and_split_with_the_seed():
    first, second = load("digits", seed=0), load("digits", seed=1)
    assert [len(s) for s in (first.train, first.validation, first.test)] == [1260, 140, 397]
    assert first.shape == (1, 8, 8) and first.num_classes == 10
    assert torch.equal(first.test.images, second.test.images)
    assert not torch.equal(first.validation.images, second.validation.images)


def test_class_subsets_are_renumbered_in_the_order_given():
    high, mixed = load("digits", classes=data.DIGITS_HIGH), load("digits", classes=["9", 5])
    assert high.classes == ("5", "6", "7", "8", "9")
    assert high.train.labels.unique().tolist() == [0, 1, 2, 3, 4]
    nines = mixed.test.images[mixed.test.labels == 0]
    assert torch.equal(nines, high.test.images[high.test.labels == 4])


@pytest.mark.parametrize("classes", [["10"], [10], [1, 1], [], [-1]])
def test_classes_that_cannot_be_are_refused(classes):
    with pytest.raises(ValueError, match="class"):
        load("digits", classes=classes)


def test_images_are_resized_and_coloured_on_request():
    found = load("digits", image_size=16, channels=3)
    assert found.shape == (3, 16, 16)
    assert torch.equal(found.train.images[:, 0], found.train.images[:, 2])
    with pytest.raises(ValueError, match="channels"):
        load("digits", channels=2)


@pytest.mark.parametrize("name", ["digit", "folder", "folder:", "digits:here"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="unknown data set"):
        load(name)


ON_DISK = sorted(READERS.keys() - {"digits", "folder"})


@pytest.mark.parametrize("name", ON_DISK)
def test_a_missing_set_says_what_where_and_how(name, tmp_path):
    with pytest.raises(MissingData) as caught:
        load(name, root=tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message and "REGRAFT_DATA" in message
    assert any(word in message for word in ("download=True", "Unpack", "put", "Write")), message


def test_the_root_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("REGRAFT_DATA", str(tmp_path / "here"))
    with pytest.raises(MissingData, match="here"):
        load("mnist")


# --- loaders on tiny folders in the makers' own formats


def png(path, value, size=(12, 10), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 10, 20)).save(path)


def image_folder(root, train=6, test=2, classes=("cat", "dog"), folders=("train", "test")):
    for folder, count in zip(folders, (train, test), strict=True):
        for number, name in enumerate(classes):
            for image in range(count):
                png(root / folder / name / f"{image}.png", 100 * number + image)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_image_folder_streams_like_any_other_split(tmp_path, workers):
    image_folder(tmp_path)
    found = load(f"folder:{tmp_path}", image_size=8, validation=0.34, workers=workers)
    assert isinstance(found.train.images, ImageFiles)
    assert found.classes == ("cat", "dog") and found.shape == (3, 8, 8)
    assert (len(found.train), len(found.validation), len(found.test)) == (8, 4, 4)
    shuffled = [images for images, _ in found.train.batches(3, generator=seed(), augment=True)]
    assert [tuple(images.shape) for images in shuffled] == [(3, 3, 8, 8)] * 2 + [(2, 3, 8, 8)]
    in_memory = found.in_memory()
    streamed = torch.cat([images for images, _ in found.train.batches(3, generator=seed())])
    kept = torch.cat([images for images, _ in in_memory.train.batches(3, generator=seed())])
    assert torch.equal(streamed, kept)
    # A file's red value tells its class and number.
    red = in_memory.train.images[:, 0, 4, 4]
    assert torch.equal((red >= 100).long(), in_memory.train.labels)
    assert len(found.train.per_class(2, seed())) == 4
    assert len(found.train.subset(torch.arange(0)).in_memory()) == 0


def test_streaming_leaves_the_global_random_state_alone(tmp_path):
    image_folder(tmp_path)
    found = load(f"folder:{tmp_path}", image_size=8, validation=0.34, workers=0)
    before = torch.get_rng_state()
    list(found.train.batches(3, generator=seed(), augment=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_folder_in_grey_and_with_val(tmp_path):
    image_folder(tmp_path, folders=("train", "val"))
    found = load(f"folder:{tmp_path}", image_size=8, channels=1, validation=0.34, workers=0)
    assert found.shape == (1, 8, 8) and next(iter(found.test.batches(4)))[0].shape == (4, 1, 8, 8)


def test_a_folder_whose_halves_differ_in_classes_is_refused(tmp_path):
    image_folder(tmp_path)
    png(tmp_path / "test" / "bird" / "0.png", 7)
    with pytest.raises(ValueError, match="bird"):
        load(f"folder:{tmp_path}")


def test_imagenet_is_read_from_its_folder(tmp_path):
    image_folder(tmp_path / "imagenet", classes=("n01440764", "n01443537"), folders=("train", "val"))
    found = load("imagenet", root=tmp_path, image_size=8, validation=0.34, workers=0)
    assert found.classes == ("n01440764", "n01443537") and len(found.test) == 4


def test_the_cifar100_extract_stands_in_for_the_classes_it_has(tmp_path):
    image_folder(tmp_path / "cifar-100-18", classes=("seal", "woman", "plain"), train=10)
    everything = load("cifar100-18", root=tmp_path)
    assert isinstance(everything.train.images, torch.Tensor) and everything.shape == (3, 32, 32)
    with pytest.warns(UserWarning, match="18-class extract"):
        found = load("cifar100", root=tmp_path, classes=["woman", "seal"])
    assert found.classes == ("woman", "seal")
    assert (found.train.images[found.train.labels == 0][:, 0] >= 100).all()
    for classes in (None, ["apple", "seal"]):
        with pytest.raises(MissingData, match=r"cifar-100-python.*plain, seal, woman"):
            load("cifar100", root=tmp_path, classes=classes)


def test_cub200_is_read_from_its_folder(tmp_path):
    folder = tmp_path / "CUB_200_2011"
    lines = {"images": [], "image_class_labels": [], "train_test_split": []}
    for number in range(12):
        # Class ids start at 1; files are not in the order of their ids' names.
        cls, training = number % 2 + 1, number < 8
        path = f"{cls:03}.Bird_{cls}/{99 - number}.png"
        png(folder / "images" / path, 100 * cls + number, mode="L" if number == 3 else "RGB")
        lines["images"].append(f"{number + 1} {path}")
        lines["image_class_labels"].append(f"{number + 1} {cls}")
        lines["train_test_split"].append(f"{number + 1} {int(training)}")
    lines["classes"] = ["1 001.Bird_1", "2 002.Bird_2"]
    for name, rows in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(rows) + "\n")
    found = load("cub200", root=tmp_path, image_size=8, validation=0.25, workers=0)
    assert found.classes == ("Bird_1", "Bird_2")
    assert (len(found.train) + len(found.validation), len(found.test)) == (8, 4)
    test = found.test.in_memory()
    assert test.images[:, 0, 0, 0].tolist() == [108, 209, 110, 211]
    assert test.labels.tolist() == [0, 1, 0, 1]
    (folder / "image_class_labels.txt").write_text("1 1\n")
    with pytest.raises(ValueError, match="differ in ids"):
        load("cub200", root=tmp_path)


def test_caltech256_gets_a_fixed_test_split_and_loses_its_clutter(tmp_path):
    root = tmp_path / "caltech256" / "256_ObjectCategories"
    for number, name in enumerate(("001.ak47", "002.flag", "257.clutter")):
        for image in range(10):
            png(root / name / f"{number + 1:03}_{image + 1:04}.jpg", 50 * number)
    splits = [load("caltech256", root=tmp_path, image_size=8, seed=s, workers=0) for s in (0, 1)]
    assert splits[0].classes == ("ak47", "flag")
    assert len(splits[0].test) == 4
    assert torch.equal(splits[0].test.images.numbers, splits[1].test.images.numbers)


def test_food101_is_read_from_its_folder(tmp_path):
    root = tmp_path / "food-101"
    meta = {"train": {}, "test": {}}
    for number, name in enumerate(("apple_pie", "waffles")):
        for image in range(14):
            png(root / "images" / name / f"{image}.jpg", 100 * number)
            meta["test" if image < 4 else "train"].setdefault(name, []).append(f"{name}/{image}")
    (root / "meta").mkdir()
    for split, files in meta.items():
        (root / "meta" / f"{split}.json").write_text(json.dumps(files))
    found = load("food101", root=tmp_path, image_size=8, workers=0)
    assert found.classes == ("apple_pie", "waffles")
    assert (len(found.train), len(found.validation), len(found.test)) == (18, 2, 8)
    assert found.test.in_memory().labels.tolist() == [0] * 4 + [1] * 4


def test_stanford_cars_are_read_from_their_folder(tmp_path):
    from scipy.io import savemat

    root = tmp_path / "stanford_cars"
    (root / "devkit").mkdir(parents=True)
    names = np.array(["Audi", "BMW"], dtype=object)
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
    for folder, count, file in (
        ("cars_train", 20, "devkit/cars_train_annos.mat"),
        ("cars_test", 4, "cars_test_annos_withlabels.mat"),
    ):
        rows = []
        for image in range(count):
            png(root / folder / f"{image}.jpg", 100 * (image % 2))
            rows.append((f"{image}.jpg", image % 2 + 1))
        annotations = np.array(rows, dtype=[("fname", object), ("class", object)])
        savemat(root / file, {"annotations": annotations})
    found = load("cars", root=tmp_path, image_size=8, workers=0)
    assert found.classes == ("Audi", "BMW")
    assert (len(found.train), len(found.validation), len(found.test)) == (18, 2, 4)
    assert found.test.in_memory().labels.tolist() == [0, 1, 0, 1]


def idx(array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_and_fashion_mnist_are_read_from_idx_files(name, folder, tmp_path):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 100), ("t10k", 20)):
        images = np.arange(count)[:, None, None] * np.ones((1, 28, 28))
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 10))
    found = load(name, root=tmp_path)
    assert (len(found.train), len(found.validation), len(found.test)) == (90, 10, 20)
    assert found.shape == (1, 28, 28) and found.train.images.dtype == torch.uint8
    assert torch.equal(found.train.images[:, 0, 3, 3].long() % 10, found.train.labels)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_its_pickles(name, tmp_path, monkeypatch):
    """torchvision compares md5 sums, which a made-up file cannot have."""
    from torchvision import datasets

    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = tmp_path / cls.base_folder
    folder.mkdir()
    key = cls.meta["key"]
    for file, _ in cls.train_list + cls.test_list:
        pixels = np.zeros((20, 3, 32, 32), dtype=np.uint8)
        pixels[:, 1, 2, 5] = np.arange(20)  # green, row 2, column 5
        labels = [number % 2 for number in range(20)]
        entry = {"data": pixels.reshape(20, -1), "labels" if name == "cifar10" else "fine_labels": labels}
        (folder / file).write_bytes(pickle.dumps(entry))
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps({key: ["apple", "seal"]}))
    found = load(name, root=tmp_path)
    assert found.classes == ("apple", "seal") and found.shape == (3, 32, 32)
    assert torch.equal(found.test.images[:, 1, 2, 5], torch.arange(20, dtype=torch.uint8))
    assert int(found.test.images.int().sum()) == sum(range(20))


def test_svhn_is_read_from_its_matrices(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision import datasets

    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    (tmp_path / "svhn").mkdir()
    for split, count in (("train", 40), ("test", 8)):
        pixels = np.zeros((32, 32, 3, count), dtype=np.uint8)
        pixels[2, 5, 1] = np.arange(count)
        # Its zeros are labelled 10.
        savemat(tmp_path / "svhn" / f"{split}_32x32.mat", {"X": pixels, "y": np.arange(count)[:, None] % 2 * 10})
    found = load("svhn", root=tmp_path)
    assert torch.equal(found.test.images[:, 1, 2, 5], torch.arange(8, dtype=torch.uint8))
    assert len(found.train) == 36


def test_stl10_is_read_from_its_binaries(tmp_path, monkeypatch):
    from torchvision import datasets

    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    (folder / "class_names.txt").write_text("airplane\nbird\n")
    for split, count in (("train", 20), ("test", 6)):
        pixels = np.zeros((count, 3, 96, 96), dtype=np.uint8)
        pixels[:, 1, 5, 2] = np.arange(count)  # stored column by column
        (folder / f"{split}_X.bin").write_bytes(pixels.tobytes())
        (folder / f"{split}_y.bin").write_bytes((np.arange(count, dtype=np.uint8) % 2 + 1).tobytes())
    found = load("stl10", root=tmp_path)
    assert found.classes == ("airplane", "bird")
    assert torch.equal(found.test.images[:, 1, 2, 5], torch.arange(6, dtype=torch.uint8))
    assert found.test.labels.tolist() == [0, 1] * 3


# --- the real sets, where they are


def real(name):
    try:
        return load(name)
    except MissingData as missing:
        pytest.skip(str(missing))


@pytest.mark.data
@pytest.mark.parametrize(
    "name, sizes, mean",
    [
        ("mnist", (54000, 6000, 10000), 0.1307),
        ("fashion-mnist", (54000, 6000, 10000), 0.2860),
        ("cifar10", (45000, 5000, 10000), 0.4914),
        ("cifar100-18", (8100, 900, 1800), None),
    ],
)
def test_real_sets_have_their_known_sizes_and_means(name, sizes, mean):
    found = real(name)
    assert (len(found.train), len(found.validation), len(found.test)) == sizes
    held = found.validation.labels.bincount()
    assert ((held - sizes[1] / found.num_classes).abs() < 150).all()
    assert mean is None or found.mean[0] == pytest.approx(mean, abs=1e-3)
