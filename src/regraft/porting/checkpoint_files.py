"""Checkpoints as people have them: read lazily, by name, and written whole or not at all.

A checkpoint is a safetensors file, a PyTorch file (read with ``weights_only=True``: nothing in it is run), an index of
several of either, or a folder that holds one of these. What is written is a folder of safetensors shards with an index,
filled beside its place and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from regraft.core.files import (
    BadFile,
    write_text,
)
from regraft.core.tensors import Tensors, check_finite
from regraft.porting.output_folder import write_once
from regraft.porting.stored_tensors import (
    ADAPTER,
    MERGE_FIRST,
    Entry,
    check_there,
    find_in_folder,
    list_entries,
)
from regraft.porting.tensor_names import PREFIXES, count_wanted, rename_forms, strip_wrappers
from regraft.porting.torch_files import describe_choice, describe_several, list_first

COUNTER = "num_batches_tracked"

INDEX_FILE = "model.safetensors.index.json"


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


@dataclass(frozen=True, eq=False)
class CheckpointFile(Mapping[str, Tensor]):
    """A checkpoint's tensors by name, each read when it is asked for.

    notes: what was done to its names, in words. is_folder: whether it was given as a folder.
    """

    path: Path
    entries: Mapping[str, Entry]
    notes: tuple[str, ...] = ()
    is_folder: bool = False

    @classmethod
    def open(cls, path: Path | str, key: str | None = None, max_memory: int | None = None) -> CheckpointFile:
        """What lies at ``path``; only names, shapes and dtypes are read, and names of wrappers taken away.

        key: which network of several in a file. max_memory: bytes that the process may hold where a file is compressed.
        Raises OSError where there is nothing, and BadFile, naming the file, for one that is truncated or damaged, that
        holds no tensors, or kinds of tensors that are not served, several networks and no key, or an adapter's; and for
        an index that does not fit its files.
        """
        is_folder = Path(path).is_dir()
        path = find_in_folder(Path(path)) if is_folder else Path(path)
        check_there(path)
        entries, notes = list_entries(path, key, max_memory)
        inside = f"{key}."
        if key and describe_choice(key) not in notes and any(name.startswith(inside) for name in entries):
            entries = {n.removeprefix(inside): e for n, e in entries.items() if n.startswith(inside)}
            notes = [*notes, describe_choice(key)]
        bare, taken = strip_wrappers(entries)
        if not bare:
            raise BadFile(f"{path} holds no tensor")
        if adapter := next(filter(ADAPTER.search, bare), None):
            raise BadFile(f"{path} has tensor {adapter!r}: {MERGE_FIRST}")
        return cls(path, {name: entries[own] for name, own in bare.items()}, (*notes, *taken), is_folder)

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

    def named_as(
        self, wanted: Collection[str], base_prefix: str = "", required: Collection[str] | None = None
    ) -> CheckpointFile:
        """With the names of ``wanted``, as far as one prefix that is taken away, or put before all (`PREFIXES`, or
        ``base_prefix``, which transformers leaves out when it saves a model without a head), brings them nearer.

        required: of those, the ones that make a whole network; where there is one behind a prefix, what stands beside
        it is left out. Raises BadFile where there are several.
        """
        renamed = rename_forms(self.entries, wanted)
        self = self._rename({name: renamed.get(name, name) for name in self.entries}, "read older or newer names")
        counts, needed = count_wanted(self.entries, wanted), set(wanted if required is None else required)
        whole = [p for p in counts if counts[p] >= len(needed) and all(p + n in self.entries for n in needed)]
        if len(whole) > 1 and "" not in whole:
            raise BadFile(describe_several(self.path, [prefix.removesuffix(".") for prefix in whole], None))
        if "" in whole or counts.keys() == {""}:
            return self
        shared = [prefix for prefix in counts if all(name.startswith(prefix) for name in self.entries)]
        if prefix := next(iter(whole), max(shared, key=lambda p: (counts[p], -len(p)), default="")):
            inside = {name: name.removeprefix(prefix) for name in self.entries if name.startswith(prefix)}
            beside = self.without(self.entries.keys() - inside.keys(), f"beside the network in {prefix!r}")
            return beside._rename(inside, f"took {prefix!r} away from all names")
        known = [prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in self.entries)]
        for taken in ("", *known):
            for put in filter(None, (base_prefix, *PREFIXES)):
                names = {name: put + name.removeprefix(taken) for name in self.entries}
                if not counts and any(name in wanted for name in names.values()):
                    bare = self._rename(
                        {n: n.removeprefix(taken) for n in names}, f"took {taken!r} away from all names"
                    )
                    return bare._rename({n: put + n for n in bare.entries}, f"put {put!r} before all names")
        return self

    def _rename(self, names: Mapping[str, str], note: str) -> CheckpointFile:
        """Under other names, where they differ; the note says so."""
        if all(new == old for old, new in names.items()):
            return self
        return replace(self, entries={names[n]: e for n, e in self.entries.items()}, notes=(*self.notes, note))

    def with_counters(self, names: Collection[str]) -> CheckpointFile:
        """With the counters of BatchNorm among ``names`` that it lacks, at 0, as torch reads such a file."""
        lacking = [
            name
            for name in names
            if name not in self.entries
            and name.endswith(COUNTER)
            and name.removesuffix(COUNTER) + "running_mean" in self.entries
        ]
        if not lacking:
            return self
        zero = torch.tensor(0)
        added = {name: Entry(self.path, name, zero.dtype, (), held=zero) for name in lacking}
        note = f"set {COUNTER} to 0 ({len(lacking)}), as torch does where it is absent"
        return replace(self, entries={**self.entries, **added}, notes=(*self.notes, note))

    def without(self, names: Collection[str], why: str) -> CheckpointFile:
        """Lacking some tensors; the note says so."""
        if not names:
            return self
        note = f"left out {list_first(sorted(names))} ({len(names)}): {why}"
        kept = {name: entry for name, entry in self.entries.items() if name not in names}
        return replace(self, entries=kept, notes=(*self.notes, note))


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Layout:
    """What is written: dtype and shape of every tensor, which stand in one file together, and which have infinities."""

    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    shards: tuple[tuple[str, ...], ...]
    infinite: frozenset[str] = frozenset()

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
        if len(self.shards) == 1:
            return "model.safetensors"
        return f"model-{number + 1:05d}-of-{len(self.shards):05d}.safetensors"


def write_shards(folder: Path, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors, in the layout's dtypes, one file after the other, and the index last.

    Files that an interrupted run has finished stay. Raises BadFile, naming the tensor, for a value that is not finite
    or another shape.
    """
    for number, names in enumerate(layout.shards):

        def make(names: Sequence[str] = names) -> Tensors:
            return {name: _as_written(name, layout, tensors[name]) for name in names}

        write_once(folder / layout.file(number), make, {"format": "pt"})
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
    kept = name in layout.infinite and torch.equal(written.isfinite(), tensor.cpu().isfinite())
    if not kept or bool(written.isnan().any()):
        check_values(name, written, f"the result (in {str(dtype).removeprefix('torch.')})")
    return written


def _check_written(index: Path, layout: Layout) -> None:
    """Raises BadFile for what is missing, too much or not as the layout says."""
    written = {name: (entry.dtype, entry.shape) for name, entry in list_entries(index, None, None)[0].items()}
    if odd := sorted(
        name for name in written.keys() | layout.tensors.keys() if written.get(name) != layout.tensors.get(name)
    ):
        raise BadFile(f"{index}: tensor {odd[0]!r} was not written as it should be")
