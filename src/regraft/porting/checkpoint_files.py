"""Checkpoints as people have them: read lazily, by name, and written whole or not at all.

A checkpoint is a safetensors file, a PyTorch file (read with ``weights_only=True``: nothing in it is run), an index of
several of either, or a folder that holds one of these. What is written is a folder of safetensors shards with an index,
filled beside its place and renamed when it is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from regraft.core.files import (
    BadFile,
    check_file,
    only_writer,
    read_json,
    read_sealed,
    write_sealed,
    write_tensors,
    write_text,
)
from regraft.core.tensors import Tensors, check_finite

WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DataParallel and torch.compile put before every name."""

PREFIXES = (*WRAPPERS, "model.", "net.")
"""Those, and what Lightning modules usually call their network; taken away where the model has no such names."""

NESTED = ("state_dict", "model_state_dict", "model")
"""Where training scripts (Lightning, timm, ...) keep the state dictionary in a larger one."""

IN_FOLDER = (
    "*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt"
)  # fmt: skip

INDEX_FILE = "model.safetensors.index.json"
PART = "regraft-part-1"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""Of safetensors' names. Quantised weights (8-bit floats) mean nothing without their scales and are refused."""


# ---------------------------------------------------------------- lazy tensors


@dataclass(frozen=True, eq=False)
class Lazy(Mapping[str, Tensor]):
    """Tensors by name that are made by ``read`` each time one is asked for."""

    names: Collection[str]
    read: Callable[[str], Tensor]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies, and what it is. held: itself, mapped into memory, where its file is PyTorch's."""

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    held: Tensor | None = None

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def read(self) -> Tensor:
        """A new tensor. Raises BadFile, naming the file, where it cannot be read any more."""
        if self.held is not None:
            return self.held.detach().clone(memory_format=torch.contiguous_format)
        try:
            # Opened for each tensor: pages of a mapped file count as the process's memory until it is closed.
            with safe_open(self.file, framework="pt") as file:
                tensor: Tensor = file.get_tensor(self.key).clone()
                return tensor
        except (SafetensorError, OSError) as problem:
            raise BadFile(f"{self.file}: tensor {self.key!r} cannot be read ({problem})") from problem


@dataclass(frozen=True, eq=False)
class CheckpointFile(Mapping[str, Tensor]):
    """A checkpoint's tensors by name, each read when it is asked for.

    notes: what was done to its names, in words.
    """

    path: Path
    entries: Mapping[str, Entry]
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path | str) -> CheckpointFile:
        """What lies at ``path``; only names, shapes and dtypes are read, and the prefixes `WRAPPERS` taken away.

        Raises OSError where there is nothing, and BadFile, naming the file, for one that is truncated or damaged, that
        holds anything but tensors, or for an index that does not fit its files.
        """
        path = _in_folder(Path(path)) if Path(path).is_dir() else Path(path)
        check_file(path)
        entries, notes = _indexed_entries(path) if path.name.endswith(".index.json") else _entries(path)
        if not entries:
            raise BadFile(f"{path} holds no tensor")
        return cls(path, entries, notes)._strip_prefixes(WRAPPERS, lambda names: 1)

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def numel(self) -> int:
        """Of all tensors together."""
        return sum(entry.numel for entry in self.entries.values())

    @property
    def files(self) -> list[Path]:
        """Those that hold its tensors."""
        return sorted({entry.file for entry in self.entries.values()})

    def sha256(self) -> str:
        """Of its files, one after the other."""
        whole = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()

    def named_as(self, wanted: Collection[str], base_prefix: str = "") -> CheckpointFile:
        """With the names of ``wanted``, as far as taking `PREFIXES` away, or putting ``base_prefix`` (which
        transformers leaves out when it saves a model without a head) before all of them, brings them nearer."""

        def count_wanted(names: Collection[str]) -> int:
            return sum(name in wanted for name in names)

        stripped = self._strip_prefixes(PREFIXES, count_wanted)
        if count_wanted(stripped.entries):
            return stripped
        for prefix in (*filter(None, [base_prefix]), *PREFIXES):
            entries = {prefix + name: entry for name, entry in stripped.entries.items()}
            if count_wanted(entries):
                notes = (*stripped.notes, f"put {prefix!r} before all names")
                return replace(stripped, entries=entries, notes=notes)
        return stripped

    def without(self, names: Collection[str], why: str) -> CheckpointFile:
        """Lacking some tensors; the note says so."""
        if not names:
            return self
        note = f"left out {_first_four(sorted(names))} ({len(names)}): {why}"
        kept = {name: entry for name, entry in self.entries.items() if name not in names}
        return replace(self, entries=kept, notes=(*self.notes, note))

    def _strip_prefixes(
        self, prefixes: Sequence[str], score: Callable[[Collection[str]], int]
    ) -> CheckpointFile:
        """Without the prefixes that all names share; of all such forms the shortest that ``score`` counts most for."""
        best, best_taken, taken, names = dict(self.entries), "", "", dict(self.entries)
        while prefix := next((p for p in prefixes if all(name.startswith(p) for name in names)), None):
            names, taken = {name.removeprefix(prefix): e for name, e in names.items()}, taken + prefix
            if score(names) > score(best) or (prefix in WRAPPERS and score(names) == score(best)):
                best, best_taken = names, taken
        note = (f"took {best_taken!r} away from all names",) if best_taken else ()
        return replace(self, entries=best, notes=(*self.notes, *note))


class _Index(Struct):
    weight_map: dict[str, str]


def _first_four(names: Sequence[str]) -> str:
    return f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"


def _in_folder(folder: Path) -> Path:
    for pattern in IN_FOLDER:
        files = sorted(folder.glob(pattern))
        if len(files) > 1:
            raise BadFile(f"{folder} holds {len(files)} files {pattern}: name one, such as {files[0]}")
        if files:
            return files[0]
    raise FileNotFoundError(
        errno.ENOENT, f"no checkpoint in the folder ({', '.join(IN_FOLDER)})", str(folder)
    )


def _indexed_entries(path: Path) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """The entries of all files that an index names."""
    try:
        names = read_json(path, _Index, "an index of a sharded checkpoint").weight_map
    except ValueError as problem:
        raise BadFile(str(problem)) from problem
    entries: dict[str, Entry] = {}
    for file in sorted(set(names.values())):
        shard = path.parent / file
        if Path(file).name != file or not shard.is_file():
            raise BadFile(f"{path} names {file!r}, which is missing")
        for name, entry in _entries(shard)[0].items():
            if names.get(name) != file:
                raise BadFile(f"{path} does not say that tensor {name!r} is in {file}")
            entries[name] = entry
    if missing := names.keys() - entries.keys():
        raise BadFile(f"{path} says that tensor {min(missing)!r} is in {names[min(missing)]}, which has none")
    return entries, ()


def _entries(path: Path) -> tuple[dict[str, Entry], tuple[str, ...]]:
    if path.suffix != ".safetensors":
        return _torch_entries(path)
    entries = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise BadFile(
                        f"{path}: tensor {name!r} has dtype {part.get_dtype()}, which is not served"
                    )
                entries[name] = Entry(path, name, DTYPES[part.get_dtype()], tuple(part.get_shape()))
    except (SafetensorError, OSError) as problem:
        raise BadFile(f"{path} is truncated, or no safetensors file ({problem})") from problem
    return entries, ()


def _torch_entries(path: Path) -> tuple[dict[str, Entry], tuple[str, ...]]:
    try:
        held = _load_mapped(path)
    except Exception as problem:  # torch raises anything for what is not its own file
        said = str(problem).strip().partition("\n")[0][:160]
        raise BadFile(
            f"{path} is damaged, or holds more than tensors, which is not run ({type(problem).__name__}: {said})"
        ) from problem
    notes: list[str] = []
    while isinstance(held, Mapping):
        inner = next((key for key in NESTED if isinstance(held.get(key), Mapping)), None)
        if inner is None:
            break
        held = held[inner]
        notes.append(f"read its entry {inner!r}")
    if not isinstance(held, Mapping):
        raise BadFile(f"{path} holds a {type(held).__name__}, no state dictionary")
    others = [str(name) for name, value in held.items() if not isinstance(value, Tensor)]
    if others:
        notes.append(f"left out {_first_four(others)}: no tensors")
    entries = {
        str(name): Entry(path, str(name), value.dtype, tuple(value.shape), value)
        for name, value in held.items()
        if isinstance(value, Tensor)
    }
    return entries, tuple(notes)


def _load_mapped(path: Path) -> Any:
    """Mapped into memory, where the file's format allows it (torch's since 1.6)."""
    import zipfile

    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Layout:
    """What is written: dtype and shape of every tensor, and which stand in one file together."""

    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    shards: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], limit: int) -> Layout:
        """In the order given; files of at most ``limit`` bytes, or of one tensor."""
        shards: list[list[str]] = []
        room = 0
        for name, (dtype, shape) in tensors.items():
            size = dtype.itemsize * torch.Size(shape).numel()
            if not shards or size > room:
                shards.append([])
                room = limit
            shards[-1].append(name)
            room -= size
        return cls(dict(tensors), tuple(map(tuple, shards)))

    @property
    def bytes(self) -> int:
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self.tensors.values())

    def file(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{len(self.shards):05d}.safetensors"


@contextmanager
def beside(out: Path, identity: Mapping[str, Any], *, resume: bool) -> Iterator[Path]:
    """A folder beside ``out`` to fill, which takes its place when the body is done.

    What fails leaves nothing; a kill or an interruption leaves the folder, hidden, for ``resume``, which goes on where
    it was made for an equal ``identity`` (JSON data), or else for the next run to clear away.

    Raises FileExistsError where something is at ``out`` already, BlockingIOError where somebody else writes it, and
    ValueError, saying what differs, where what is to be resumed was made for something else.
    """
    check_free(out)
    part = out.parent / f".{out.name}.part"
    out.parent.mkdir(parents=True, exist_ok=True)
    part.mkdir(exist_ok=True)
    with only_writer(part):
        mark = part / "identity.json"
        if resume and mark.exists():
            begun = read_sealed(mark, PART, dict[str, Any])
            if differing := sorted(key for key in identity if begun.get(key) != identity[key]):
                raise ValueError(
                    f"{part} was begun with another {' and '.join(differing)}: run without --resume"
                )
        else:
            _clear(part)
        write_sealed(mark, PART, dict(identity))
        try:
            yield part
            for kept in (*part.glob("*.kept"), mark):
                kept.unlink()
            if out.exists():
                out.rmdir()
            part.rename(out)
        except Exception:
            shutil.rmtree(part, ignore_errors=True)
            raise


def check_free(out: Path) -> None:
    """Raises FileExistsError unless there is nothing, or an empty folder, at ``out``."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(errno.EEXIST, "there is something already", str(out))


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_shards(folder: Path, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors, in the layout's dtypes, one file after the other, and the index last.

    Files that are there already stay: they were written whole, by a run that was interrupted. Raises BadFile, naming
    the tensor, for a value that is not finite or another shape.
    """
    for number, names in enumerate(layout.shards):
        path = folder / layout.file(number)
        if not path.exists():
            write_tensors(
                path, {name: _as_written(name, layout, tensors[name]) for name in names}, {"format": "pt"}
            )
    where = {name: layout.file(number) for number, names in enumerate(layout.shards) for name in names}
    write_text(
        folder / INDEX_FILE,
        json.dumps({"metadata": {"total_size": layout.bytes}, "weight_map": where}, indent=1),
    )
    _check_written(folder / INDEX_FILE, layout)


def check_values(name: str, tensor: Tensor, where: str) -> None:
    """Raises BadFile, naming both, for a value that is not finite."""
    try:
        check_finite({name: tensor}, where)
    except ValueError as problem:
        raise BadFile(str(problem)) from problem


def _as_written(name: str, layout: Layout, tensor: Tensor) -> Tensor:
    dtype, shape = layout.tensors[name]
    if tuple(tensor.shape) != shape:
        raise BadFile(f"tensor {name!r} of the result has shape {tuple(tensor.shape)} instead of {shape}")
    written = tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
    check_values(name, written, f"the result (in {str(dtype).removeprefix('torch.')})")
    return written


def _check_written(index: Path, layout: Layout) -> None:
    """Raises BadFile for what is missing, too much, or other than the layout says."""
    written = {name: (entry.dtype, entry.shape) for name, entry in _indexed_entries(index)[0].items()}
    if odd := sorted(
        name
        for name in written.keys() | layout.tensors.keys()
        if written.get(name) != layout.tensors.get(name)
    ):
        raise BadFile(f"{index}: tensor {odd[0]!r} was not written as it should be")


def keep_tensors(folder: Path, name: str, make: Callable[[], Tensors]) -> Tensors:
    """What ``make`` gives, or, where it was kept in a folder of `beside` before, that."""
    path = folder / f"{name}.kept"
    if path.exists():
        return load_file(path)
    made = make()
    write_tensors(path, {key: tensor.cpu().contiguous() for key, tensor in made.items()})
    return made
