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
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from regraft.core.files import write_sealed
from regraft.core.tensors import Tensors
from regraft.data import load
from regraft.learning_transfer.trajectory import INDEX_FILE
from regraft.training.state import _hashes
from regraft_bench.micro.reliability import subjects
from regraft_bench.micro.reliability.attempt import LIMIT, Case, in_a_process
from regraft_bench.micro.reliability.subjects import FORMATS, Format

HTML = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>not here</body></html>" * 20

# ---------------------------------------------------------------- whole files


def _replaced(by: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda file: _put(file, by(file.read_bytes()))


def _put(file: Path, data: bytes) -> None:
    file.write_bytes(data)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "another encoding (UTF-16)": _replaced(lambda data: data.decode("latin-1").encode("utf-16")),
    "bytes that are not UTF-8": _replaced(lambda data: b"\xff\xfe" + data),
    "an HTML page": _replaced(lambda data: HTML),
    "lists without end": _replaced(lambda data: b"[" * 200_000),
    "objects without end": _replaced(lambda data: b'{"a":' * 200_000),
    "an integer of 5,000 digits": _replaced(
        lambda data: b'{"groups": {"a": ' + b"9" * 5000 + b'}, "axes": {}}'
    ),
    "NaN": _replaced(lambda data: b'{"content": NaN}'),
    "null": _replaced(lambda data: b"null"),
    "a number": _replaced(lambda data: b"3"),
    "a text": _replaced(lambda data: b'"index"'),
    "a list": _replaced(lambda data: b"[1, 2]"),
    "an empty object": _replaced(lambda data: b"{}\n"),
    "zeros": _replaced(lambda data: bytes(len(data))),
    "noise": _replaced(lambda data: np.random.default_rng(0).bytes(len(data))),
    "a folder": _folder,
    "a pipe": _pipe,
}
TRUNCATED = {
    "empty": _replaced(lambda data: b""),
    **{
        f"cut at {share:.0%}": _replaced(lambda data, share=share: data[: int(len(data) * share) - 2])
        for share in (0.02, 0.25, 0.5, 0.75, 1.0)
    },
}
MISSING = {"missing": lambda file: file.unlink()}


@lru_cache
def _whole(name: str) -> dict[str, bytes]:
    """All files that a whole one of this format consists of."""
    with TemporaryDirectory() as folder:
        in_a_process(lambda: str(FORMATS[name].write(Path(folder))), LIMIT)  # autograd wants no fork after it
        files = [file for file in Path(folder).rglob("*") if file.is_file()]
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def _damaged(format: Format, damage: Callable[[Path], None], folder: Path) -> None:
    """Write a whole file, damage it, and read it."""
    for name, data in _whole(format.name).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    file = _file(format, folder)
    damage(file)
    format.read(file)


def _file(format: Format, folder: Path) -> Path:
    names = sorted(name for name in _whole(format.name))
    tensors = [name for name in names if name.endswith(".safetensors")]
    return folder / (
        tensors[0] if format.name.startswith("tensors") else [*(set(names) - set(tensors)), *names][0]
    )


def _names(format: Format) -> tuple[str, ...]:
    return (*(Path(name).name for name in _whole(format.name)), *subjects.weights(1))


def whole_files() -> Iterator[Case]:
    """Every format, damaged as a whole; what hashes cover, with single bits changed."""
    for format in FORMATS.values():
        damages = (
            DAMAGES | (TRUNCATED if format.name != "rows" else {}) | ({} if format.optional else MISSING)
        )
        if format.sealed:
            damages = damages | {f"bit {at} of 24": _replaced(partial(_flipped, at=at)) for at in range(24)}
        for name, damage in damages.items():
            yield Case(f"{format.name}: {name}", partial(_damaged, format, damage), _names(format))


def _flipped(data: bytes, at: int) -> bytes:
    place = (2 * at + 1) * (len(data) - 1) // 48
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


# ---------------------------------------------------------------- JSON, edited where it has structure

WRONG: tuple[Any, ...] = (None, "x", -1, 10**30, 1.5, True, [], {}, [[]])


def edits(document: Any) -> Iterator[tuple[str, Any]]:
    """(what, edited copy): each key taken away, and each place holding a value of another kind."""
    for place in _places(document):
        where = ".".join(map(str, place))
        yield f"without {where}", _edited(document, place, lambda holder, key: holder.pop(key))
        old = _at(document, place)
        for value in WRONG:
            if type(value) is not type(old) and not (type(old) is float and type(value) is int):
                yield f"{where} = {value!r}", _edited(document, place, partial(_assign, value=value))
        if type(old) is int:
            for value in (-1, 10**30):
                yield f"{where} = {value}", _edited(document, place, partial(_assign, value=value))


def _assign(holder: Any, key: Any, value: Any) -> None:
    holder[key] = value


def _places(document: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    keys = range(min(len(document), 2)) if isinstance(document, list) else list(document)[:4]
    for key in keys:
        yield (*here, key)
        if isinstance(document[key], dict | list):
            yield from _places(document[key], (*here, key))


def _at(document: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        document = document[key]
    return document


def _edited(document: Any, place: tuple[Any, ...], change: Callable[[Any, Any], object]) -> Any:
    edited = copy.deepcopy(document)
    change(_at(edited, place[:-1]), place[-1])
    return edited


def _is_valid_edit(what: str) -> bool:
    """Edits after which the file is another valid one: free data, and a path with a step less."""
    return "metadata." in what or what.startswith(("without legs.", "without content.metadata."))


def edited_json() -> Iterator[Case]:
    """Index, grid and specification: edited, sealed anew where there is a seal; the first two also without."""
    for name in ("index of a trajectory", "state of a grid", "specification"):
        format = FORMATS[name]
        (text,) = (data for file, data in _whole(name).items() if file.endswith(".json"))
        document = json.loads(text)
        if not format.sealed:
            for what, edited in edits(document):
                yield Case(
                    f"{name}: {what}", partial(_damaged, format, partial(_rewrite, edited)), _names(format)
                )
            continue
        for what, edited in edits(document):
            damage = partial(_rewrite, edited)
            yield Case(f"{name}, not sealed anew: {what}", partial(_damaged, format, damage), _names(format))
        for what, edited in edits(document["content"]):
            if not _is_valid_edit(what):
                damage = partial(_reseal, document["format"], edited)
                yield Case(f"{name}: {what}", partial(_damaged, format, damage), _names(format))


def _rewrite(document: Any, file: Path) -> None:
    file.write_text(json.dumps(document), encoding="utf-8")


def _reseal(format: str, content: Any, file: Path) -> None:
    write_sealed(file, format, content)


# ---------------------------------------------------------------- training checkpoints, hashed anew


def _resaved(change: Callable[[Tensors, dict[str, Any]], object], file: Path) -> None:
    with safe_open(file, framework="pt") as held:
        metadata = held.metadata()
        tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    texts = {key: json.loads(metadata[key]) for key in ("identity", "history")}
    change(tensors, texts)
    texts = {key: json.dumps(value) for key, value in texts.items()}
    save_file(tensors, file, texts | {"sha256": _hashes(tensors, texts["identity"], texts["history"])})


def _drop(part: str) -> Callable[[Tensors, Any], None]:
    return lambda tensors, texts: (
        [tensors.pop(name) for name in list(tensors) if name.startswith(part)] and None
    )


def _change(name: str, by: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors, Any], None]:
    return lambda tensors, texts: tensors.update({name: by(tensors[name]).contiguous()})


MOMENTUM = "optimiser/0/momentum_buffer"
CHECKPOINTS: dict[str, Callable[[Tensors, dict[str, Any]], object]] = {
    "no momentum of a parameter": _drop(MOMENTUM),
    "no optimiser": _drop("optimiser/"),
    "a parameter is missing": _drop("model/0.weight"),
    "no generator": _drop("generator"),
    "momentum of another shape": _change(MOMENTUM, lambda t: t[:1]),
    "momentum of another dtype": _change(MOMENTUM, lambda t: t.double()),
    "momentum is NaN": _change(MOMENTUM, lambda t: t * torch.nan),
    "a weight is infinite": _change("model/0.weight", lambda t: t + torch.inf),
    "a weight of another dtype": _change("model/0.weight", lambda t: t.view(torch.int32)),
    "a weight of another shape": _change("model/0.weight", lambda t: t[:2]),
    "a generator of another size": _change("generator", lambda t: t[:10]),
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


def checkpoints() -> Iterator[Case]:
    """States of trainings that are whole files, hashes and all, but of no run; and types edited in the header."""
    format = FORMATS["state of a training"]
    for what, change in CHECKPOINTS.items():
        damage = partial(_resaved, change)
        yield Case(f"{format.name}: {what}", partial(_damaged, format, damage), ("run.safetensors",))
    for other in (format, FORMATS["tensors of a trajectory"]):
        for number in range(4):
            damage = partial(_retyped, number)
            yield Case(f"{other.name}: F32 -> I32, {number}", partial(_damaged, other, damage), _names(other))


def _retyped(number: int, file: Path) -> None:
    """The dtype of one tensor in the header alone: as many bytes, other numbers."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    parts = data[8 : 8 + size].split(b'"F32"')
    at = number % (len(parts) - 1) + 1
    header = b'"F32"'.join(parts[:at]) + b'"I32"' + b'"F32"'.join(parts[at:])
    file.write_bytes(data[:8] + header + data[8 + size :])


# ---------------------------------------------------------------- hostile pickles


class Hostile:
    """Calls something as soon as it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _zipped(data: bytes) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return held.getvalue()


def _by_torch(value: Any, **how: Any) -> bytes:
    held = io.BytesIO()
    torch.save(value, held, **how)
    return held.getvalue()


def _by_numpy(value: Any, save: Callable[..., None]) -> bytes:
    held = io.BytesIO()
    save(held, np.array([value], dtype=object))
    return held.getvalue()


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
    plain = pickle.dumps(run)
    found = {name: pickle.dumps(call, protocol=2) for name, call in calls.items()}
    found |= {f"protocol {n}": pickle.dumps(run, protocol=n) for n in (0, 1, 3, 4, 5)}
    return found | {
        "in a dictionary": pickle.dumps({"weight": run}),
        "in a list": pickle.dumps([torch.ones(2), run]),
        "in a state dictionary": pickle.dumps(OrderedDict(weight=torch.ones(2), bias=run)),
        "torch.save": _by_torch(run),
        "torch.save, a state dictionary": _by_torch({"weight": torch.ones(2), "bias": run}),
        "torch.save, the old format": _by_torch(run, _use_new_zipfile_serialization=False),
        "npy": _by_numpy(run, np.save),
        "npz": _by_numpy(run, np.savez),
        "gzip": gzip.compress(plain),
        "bz2": bz2.compress(plain),
        "xz": lzma.compress(plain),
        "zip": _zipped(plain),
        "after a header of safetensors": struct.pack("<Q", 2) + b"{}" + plain,
    }


def _hostile(format: Format, payload: str, folder: Path) -> None:
    _damaged(format, lambda file: _put(file, payloads(folder / "executed")[payload]), folder)


def _hostile_anchor(payload: str, folder: Path) -> None:
    """In place of a trajectory's tensors, with an index that knows its size."""

    def damage(file: Path) -> None:
        file.write_bytes(payloads(folder / "executed")[payload])
        index = file.with_name(INDEX_FILE)
        document = json.loads(index.read_text(encoding="utf-8"))
        for anchor in document["content"]["anchors"]:
            anchor["bytes"] = (file.parent / anchor["file"]).stat().st_size
        write_sealed(index, document["format"], document["content"])

    _damaged(FORMATS["tensors of a trajectory"], damage, folder)


def _hostile_data(name: str, places: tuple[str, ...], payload: str | None, folder: Path) -> None:
    """In place of all files of a data set; an HTML page where there is no payload."""
    data = HTML if payload is None else payloads(folder / "executed")[payload]
    for place in places:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(data)
    load(f"folder:{folder}" if name == "folder" else name, root=folder, workers=0, image_size=8)


BATCHES = (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta")
IDX = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
DATA: dict[str, tuple[str, ...]] = {
    "cifar10": tuple(f"cifar-10-batches-py/{name}" for name in BATCHES),
    "cifar100": tuple(f"cifar-100-python/{name}" for name in ("train", "test", "meta")),
    "mnist": tuple(f"MNIST/raw/{name}" for name in IDX),
    "fashion-mnist": tuple(f"FashionMNIST/raw/{name}" for name in IDX),
    "svhn": ("train_32x32.mat", "test_32x32.mat", "svhn/train_32x32.mat", "svhn/test_32x32.mat"),
    "folder": tuple(
        f"{half}/{label}/{n}.png" for half in ("train", "test") for label in "ab" for n in range(20)
    ),
}


def pickles() -> Iterator[Case]:
    """Every payload at every entry point that takes a path."""
    with TemporaryDirectory() as folder:
        kinds = list(payloads(Path(folder) / "executed"))
    for payload in kinds:
        for format in FORMATS.values():
            run = partial(_hostile_anchor, payload) if format.name.startswith("tensors") else None
            yield Case(f"{format.name}: {payload}", run or partial(_hostile, format, payload), _names(format))
        for name, places in DATA.items():
            run = partial(_hostile_data, name, places, payload)
            yield Case(f"data set {name}: {payload}", run, (name, ".png"))


def pages() -> Iterator[Case]:
    """HTML pages, as failed downloads leave them, in place of data sets."""
    for name, places in DATA.items():
        yield Case(f"data set {name}: HTML", partial(_hostile_data, name, places, None), (name, ".png"))
