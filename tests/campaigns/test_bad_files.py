"""Files that are not what they should be: damaged, edited, of another kind, of no kind, hostile."""

from __future__ import annotations

import bz2
import copy
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import lru_cache, partial, reduce
from operator import getitem
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from campaigns import subjects
from campaigns.subjects import FORMATS
from regraft.core.files import write_sealed
from regraft.core.tensors import Tensors
from regraft.data import load
from regraft.learning_transfer.trajectory import TRAJECTORY_INDEX
from regraft.training.state import _hashes

pytestmark = pytest.mark.filterwarnings("ignore")
Damage = Callable[[Path], object]
EXECUTED = "executed"
"""What a file makes where it is executed."""
HTML = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>not here</body></html>" * 20


@lru_cache
def whole_files(name: str) -> dict[str, bytes]:
    """All files that a whole one of this format consists of."""
    with TemporaryDirectory() as folder:
        FORMATS[name].write(Path(folder) / FORMATS[name].file)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def read_damaged(name: str, damage: Damage, folder: Path) -> None:
    """Write a whole file, damage it, and read it."""
    for file, data in whole_files(name).items():
        (folder / file).write_bytes(data)
    file = sorted(folder.glob(FORMATS[name].file))[0]
    damage(file)
    FORMATS[name].read(file)


@pytest.fixture
def refuse_damaged(refuse, tmp_path_factory):
    """Check that a damaged file of a format is refused with the name of one of its files or tensors."""

    def check(name: str, what: str, damage: Damage) -> None:
        folder = tmp_path_factory.mktemp("case")
        words = (*whole_files(name), *subjects.weights(1))
        refuse(f"{name}: {what}", lambda: read_damaged(name, damage, folder), words)
        assert not (folder / EXECUTED).exists(), f"{name}: {what}: the file was executed"

    return check


@pytest.mark.parametrize("name", FORMATS)
def test_every_whole_file_is_accepted(name, tmp_path):
    """What is refused is refused for what is wrong with it."""
    read_damaged(name, lambda file: None, tmp_path)


# ---------------------------------------------------------------- whole files


def replace(by: Callable[[bytes], bytes]) -> Damage:
    return lambda file: file.write_bytes(by(file.read_bytes()))


DAMAGES: dict[str, Damage] = {
    "another encoding (UTF-16)": replace(lambda data: data.decode("latin-1").encode("utf-16")),
    "bytes that are not UTF-8": replace(lambda data: b"\xff\xfe" + data),
    "an HTML page": replace(lambda data: HTML),
    "lists without end": replace(lambda data: b"[" * 200_000),
    "objects without end": replace(lambda data: b'{"a":' * 200_000),
    "an integer of 5,000 digits": replace(lambda data: b'{"groups": {"a": %b}, "axes": {}}' % (b"9" * 5000)),
    "NaN": replace(lambda data: b'{"content": NaN}'),
    "null": replace(lambda data: b"null"),
    "a number": replace(lambda data: b"3"),
    "a text": replace(lambda data: b'"index"'),
    "a list": replace(lambda data: b"[1, 2]"),
    "an empty object": replace(lambda data: b"{}\n"),
    "other tensors": replace(lambda data: save({"x": torch.ones(2)})),
    "zeros": replace(lambda data: bytes(len(data))),
    "noise": replace(lambda data: np.random.default_rng(0).bytes(len(data))),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}
TRUNCATED = {
    "empty": replace(lambda data: b""),
    **{
        f"cut at {share:.0%}": replace(lambda data, share=share: data[: int(len(data) * share) - 2])
        for share in (0.02, 0.25, 0.5, 0.75, 1.0)
    },
}


def flip_bit(data: bytes, at: int) -> bytes:
    place = (2 * at + 1) * (len(data) - 1) // 48
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


BITS = {f"bit {at} of 24": replace(partial(flip_bit, at=at)) for at in range(24)}


@pytest.mark.parametrize("name", FORMATS)
def test_whole_files(refuse_damaged, name):
    """Every format, damaged as a whole; what hashes cover, with single bits changed."""
    damages = DAMAGES | TRUNCATED | (BITS if FORMATS[name].sealed else {})
    if name == "rows":  # damaged lines are named and skipped: tests/bench/test_rows.py
        skipped = ("zeros", "bytes that are not UTF-8")
        damages = {what: damage for what, damage in DAMAGES.items() if what not in skipped}
    if not FORMATS[name].optional:
        damages = damages | {"missing": lambda file: file.unlink()}
    for what, damage in damages.items():
        refuse_damaged(name, what, damage)


# ---------------------------------------------------------------- JSON, edited where it has structure

WRONG: tuple[Any, ...] = (None, "x", -1, 10**30, 1.5, True, [], {}, [[]])


def edits(document: Any) -> Iterator[tuple[str, Any]]:
    """(what, edited copy): each key taken away, and each place holding a value of another kind."""
    for place in places(document):
        where, old = ".".join(map(str, place)), reduce(getitem, place, document)
        edited = copy.deepcopy(document)
        reduce(getitem, place[:-1], edited).pop(place[-1])
        yield f"without {where}", edited
        wrong = [v for v in WRONG if type(v) not in (type(old), int if type(old) is float else None)]
        for value in (*wrong, *((-1, 10**30) if type(old) is int else ())):
            edited = copy.deepcopy(document)
            reduce(getitem, place[:-1], edited)[place[-1]] = value
            yield f"{where} = {value!r}", edited


def places(document: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    keys = range(min(len(document), 2)) if isinstance(document, list) else list(document)[:4]
    for key in keys:
        yield (*here, key)
        if isinstance(document[key], dict | list):
            yield from places(document[key], (*here, key))


def is_valid_edit(what: str) -> bool:
    """Edits after which the file is another valid one: free data, a path with a step less, fewer optional tensors, a
    specification without its proof."""
    valid = ("without legs.", "without content.metadata.", "without optional")
    unproven = ("without proven", "proven = None", "proven = 'x'")
    return "metadata." in what or what.startswith(valid) or what in unproven


@pytest.mark.parametrize("name", ["index of a trajectory", "state of a grid", "specification"])
def test_edited_json(refuse_damaged, name):
    """Index, grid and specification: edited, and sealed anew where there is a seal."""
    (text,) = (data for file, data in whole_files(name).items() if file.endswith(".json"))
    document = json.loads(text)
    for what, edited in edits(document):
        if not (name == "specification" and is_valid_edit(what)):
            text = json.dumps(edited)
            refuse_damaged(name, f"not sealed anew: {what}", lambda file, text=text: file.write_text(text))
    for what, edited in edits(document["content"]) if FORMATS[name].sealed else ():
        if not is_valid_edit(what):
            seal = partial(write_sealed, name=document["format"], content=edited)
            refuse_damaged(name, what, seal)


# ---------------------------------------------------------------- training checkpoints, hashed anew


Change = Callable[[Tensors, dict[str, Any]], object]


def resave(change: Change, file: Path) -> None:
    with safe_open(file, framework="pt") as checkpoint:
        metadata = checkpoint.metadata()
        tensors = {name: checkpoint.get_tensor(name) for name in checkpoint.keys()}  # noqa: SIM118
    texts = {key: json.loads(metadata[key]) for key in ("identity", "history")}
    change(tensors, texts)
    texts = {key: json.dumps(value) for key, value in texts.items()}
    save_file(tensors, file, texts | {"sha256": _hashes(tensors, texts["identity"], texts["history"])})


def drop(part: str) -> Change:
    return lambda tensors, texts: [tensors.pop(name) for name in list(tensors) if name.startswith(part)]


def change(name: str, by: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors, texts: tensors.update({name: by(tensors[name]).contiguous()})


MOMENTUM = "optimiser/0/momentum_buffer"
CHECKPOINTS: dict[str, Change] = {
    "no momentum of a parameter": drop(MOMENTUM),
    "no optimiser": drop("optimiser/"),
    "a parameter is missing": drop("model/0.weight"),
    "no generator": drop("generator"),
    "momentum of another shape": change(MOMENTUM, lambda t: t[:1]),
    "momentum of another dtype": change(MOMENTUM, lambda t: t.double()),
    "momentum is NaN": change(MOMENTUM, lambda t: t * torch.nan),
    "a weight is infinite": change("model/0.weight", lambda t: t + torch.inf),
    "a weight of another dtype": change("model/0.weight", lambda t: t.view(torch.int32)),
    "a weight of another shape": change("model/0.weight", lambda t: t[:2]),
    "a generator of another size": change("generator", lambda t: t[:10]),
    "momentum of a parameter that there is not": lambda t, texts: t.update({"optimiser/99/m": torch.ones(2)}),
    "a tensor that the model has not": lambda t, texts: t.update({"model/more": torch.ones(2)}),
    "an epoch beyond the run": lambda t, texts: texts["history"][-1].update(epoch=99),
    "an epoch before the run": lambda t, texts: texts["history"][0].update(epoch=-1),
    "epochs out of order": lambda t, texts: texts["history"].reverse(),
    "no history": lambda t, texts: texts["history"].clear(),
    "a history of texts": lambda t, texts: texts.update(history=["a", "b"]),
    "a history without costs": lambda t, texts: texts["history"][0].pop("cost"),
    "another seed": lambda t, texts: texts["identity"].update(generator="x"),
    "another recipe": lambda t, texts: texts["identity"]["recipe"].update(lr=1.0),
    "an identity that is a list": lambda t, texts: texts.update(identity=[1]),
}


def test_states_of_trainings(refuse_damaged):
    """States of trainings that are whole files, hashes and all, but of no run."""
    for what, change in CHECKPOINTS.items():
        refuse_damaged("state of a training", what, partial(resave, change))


def change_dtype(number: int, file: Path) -> None:
    """The dtype of one tensor in the header alone: as many bytes, other numbers."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    parts = data[8 : 8 + size].split(b'"F32"')
    at = number % (len(parts) - 1) + 1
    header = b'"F32"'.join(parts[:at]) + b'"I32"' + b'"F32"'.join(parts[at:])
    file.write_bytes(data[:8] + header + data[8 + size :])


@pytest.mark.parametrize("name", ["state of a training", "tensors of a trajectory"])
def test_types_in_a_header(refuse_damaged, name):
    for number in range(4):
        refuse_damaged(name, f"F32 -> I32, {number}", partial(change_dtype, number))


# ---------------------------------------------------------------- hostile pickles


class Hostile:
    """Calls something as soon as it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def to_bytes(write: Callable[..., object], *arguments: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    write(*arguments, stream, **options)
    return stream.getvalue()


def zip_bytes(data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return stream.getvalue()


def payloads(marker: Path) -> dict[str, bytes]:
    """26 files that make ``marker`` where they are unpickled."""
    run = Hostile(exec, f"open({str(marker)!r}, 'w')")
    calls = {
        "os.system": Hostile(os.system, f"touch {marker}"),
        "subprocess.call": Hostile(subprocess.call, ["touch", str(marker)]),
        "exec": run,
        "eval": Hostile(eval, f"open({str(marker)!r}, 'w')"),
        "open": Hostile(open, str(marker), "w"),
        "os.mkdir": Hostile(os.mkdir, str(marker)),
        "Path.touch": Hostile(Path.touch, marker),
        "os.mknod": Hostile(os.mknod, str(marker)),
    }
    plain, array = pickle.dumps(run), np.array([run], dtype=object)
    files = {name: pickle.dumps(call, protocol=2) for name, call in calls.items()}
    files |= {f"protocol {n}": pickle.dumps(run, protocol=n) for n in (0, 1, 3, 4, 5)}
    return files | {
        "in a dictionary": pickle.dumps({"weight": run}),
        "in a list": pickle.dumps([torch.ones(2), run]),
        "in a state dictionary": pickle.dumps(OrderedDict(weight=torch.ones(2), bias=run)),
        "torch.save": to_bytes(torch.save, run),
        "torch.save, a state dictionary": to_bytes(torch.save, {"weight": torch.ones(2), "bias": run}),
        "torch.save, the old format": to_bytes(torch.save, run, _use_new_zipfile_serialization=False),
        "npy": to_bytes(lambda stream: np.save(stream, array)),
        "npz": to_bytes(lambda stream: np.savez(stream, array)),
        "gzip": gzip.compress(plain),
        "bz2": bz2.compress(plain),
        "xz": lzma.compress(plain),
        "zip": zip_bytes(plain),
        "after a header of safetensors": struct.pack("<Q", 2) + b"{}" + plain,
    }


PAYLOADS = list(payloads(Path(EXECUTED)))
BATCHES = (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta")
IDX = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
DATA: dict[str, tuple[str, ...]] = {
    "cifar10": tuple(f"cifar-10-batches-py/{name}" for name in BATCHES),
    "cifar100": tuple(f"cifar-100-python/{name}" for name in ("train", "test", "meta")),
    "mnist": tuple(f"MNIST/raw/{name}" for name in IDX),
    "fashion-mnist": tuple(f"FashionMNIST/raw/{name}" for name in IDX),
    "svhn": ("train_32x32.mat", "test_32x32.mat", "svhn/train_32x32.mat", "svhn/test_32x32.mat"),
    "folder": tuple(f"{half}/{label}/{n}.png" for half in ("train", "test") for label in "ab" for n in range(20)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_hostile_pickles(refuse_damaged, name):
    """Every payload in place of every file; a trajectory's tensors have an index that knows their size."""

    def put(file: Path, payload: str) -> None:
        file.write_bytes(payloads(file.parent / EXECUTED)[payload])
        if file.suffix == ".safetensors" and (index := file.with_name(TRAJECTORY_INDEX)).exists():
            document = json.loads(index.read_text(encoding="utf-8"))
            for anchor in document["content"]["anchors"]:
                anchor["bytes"] = (file.parent / anchor["file"]).stat().st_size
            write_sealed(index, document["format"], document["content"])

    for payload in PAYLOADS:
        refuse_damaged(name, payload, partial(put, payload=payload))


@pytest.mark.parametrize("name", DATA)
def test_data_sets(refuse, tmp_path, name):
    """Every payload in place of all files of a data set; and HTML pages, as failed downloads leave them."""
    for what in ("HTML", *PAYLOADS):
        data = HTML if what == "HTML" else payloads(tmp_path / EXECUTED)[what]
        for file in DATA[name]:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes(data)
        source = f"folder:{tmp_path}" if name == "folder" else name
        options = {"root": tmp_path, "workers": 0, "image_size": 8}
        refuse(f"data set {name}: {what}", lambda source=source, o=options: load(source, **o), (name, ".png"))
        assert not (tmp_path / EXECUTED).exists(), f"data set {name}: {what}: the file was executed"
