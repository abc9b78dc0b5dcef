"""A job on checkpoints, before it is done: what is read, what will be written, and what that takes."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.core.files import BadFile
from regraft.porting.checkpoint_files import CheckpointFile, Layout, Lazy
from regraft.porting.data import Data
from regraft.porting.fitting import Distances, ValueCheck
from regraft.porting.model_spec import ModelSpec, Settings, find_model_spec
from regraft.porting.output_folder import part_of, unfinished_bytes
from regraft.porting.sizes import check_memory, format_size
from regraft.porting.stored_tensors import Entry
from regraft.porting.torch_files import describe_choice
from regraft.porting.travelling import list_travelling
from regraft.symmetry import PermutationSpec

SHARD = 10**9
"""Bytes of one file of the result; an eighth of the memory that is allowed, where that is less."""

FLOAT = 4
PROOF = 5
"""Float32 copies of the model that a proof holds: its own, and two in float64."""

PROVING = "proving the symmetry of the model (or give a proven one with spec)"


@dataclass(frozen=True, eq=False)
class Job:
    """A port, an alignment or a sum, before it is done.

    Attributes:
        method: what is done.
        checkpoints: role ("base", "fine-tune", "new base", ...) -> its tensors, under the model's names.
        like: the role whose names and shapes the result has; the networks are read with these names.
        model_spec: the network; None where none is needed.
        layout: what will be written.
        data: on which it is measured, and gradients are taken.
        config: what else was chosen, for the record (JSON values).
        memory: bytes that the process will need at its peak, what it has now included.
        distances: of the fine-tune from the bases.
        travelling: files that go with the result.
    """

    method: str
    checkpoints: Mapping[str, CheckpointFile]
    like: str
    model_spec: ModelSpec | None
    layout: Layout
    data: Data | None
    config: Mapping[str, Any]
    memory: int = 0
    distances: Distances | None = None
    travelling: tuple[Path, ...] = ()

    @property
    def in_memory(self) -> bool:
        """Whether the networks are held whole."""
        return self.data is not None

    @property
    def spec(self) -> PermutationSpec:
        """The permutation groups, of a job that has some."""
        assert self.model_spec is not None
        return self.model_spec.spec

    @property
    def head(self) -> tuple[str, ...]:
        """The tensors that are carried over, since a base has them for other classes, or not at all."""
        others = [checkpoint for role, checkpoint in self.checkpoints.items() if role != self.like]
        return tuple(name for name in self.checkpoints[self.like] if any(name not in other for other in others))

    @property
    def notes(self) -> list[str]:
        """What was done to names and left out."""
        return [f"{role}: {note}" for role, c in self.checkpoints.items() for note in c.notes]

    @property
    def dtype(self) -> torch.dtype:
        """In which floating tensors are computed: float64 where any of them is that, else float32."""
        entries = [entry for checkpoint in self.checkpoints.values() for entry in checkpoint.entries.values()]
        return torch.float64 if any(entry.dtype == torch.float64 for entry in entries) else torch.float32

    def value_check(self, summed: int) -> ValueCheck:
        """A check of the values of all checkpoints. summed: how many of them are added or subtracted."""
        parameters = () if self.model_spec is None else self.model_spec.parameters
        return ValueCheck([str(c.path) for c in self.checkpoints.values()], parameters, summed)

    def networks(self, device: str = "cpu") -> dict[str, Lazy]:
        """By role, each tensor read when it is asked for, floating in `dtype` on a device; zero where it is absent."""
        dtype, like = self.dtype, self.checkpoints[self.like]

        def read(checkpoint: CheckpointFile, name: str) -> Tensor:
            if name not in checkpoint:
                return torch.zeros(like.entries[name].shape, device=device)
            tensor = checkpoint[name].to(device)
            if tensor.shape != (wanted := like.entries[name].shape):  # a table with more or fewer rows
                tensor = torch.cat([tensor, tensor.new_zeros(wanted)])[: wanted[0]]
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        return {role: Lazy(tuple(like), partial(read, c)) for role, c in self.checkpoints.items()}

    def check_room(
        self,
        out: Path | str | None,
        allowed: int | None,
        *,
        copies: int,
        matches: bool,
        resume: bool,
        activations: int = 0,
    ) -> Job:
        """The same, with `memory`. Raises OSError where that, or the disk, is not there.

        copies: of the model in float32, at the peak of a job that holds networks in memory. matches: whether units are.
        resume: what an interrupted run has written is kept. activations: bytes of what a method runs at once.
        """
        if self.data is not None:
            how = "with data, and so the networks in memory"
            needed = copies * self.dtype.itemsize * self.checkpoints[self.like].numel
            needed += self.data.kept_bytes + activations
        else:
            how, needed = "tensor by tensor", self._streaming_bytes(matches)
        if out is not None:
            check_disk(Path(out), self.layout.bytes, resume)
        return replace(self, memory=check_memory(needed, f"method {self.method!r} ({how})", allowed))

    def _streaming_bytes(self, matches: bool) -> int:
        """At the peak of matching and writing tensor by tensor: similarities of the largest groups with what the
        assignment makes of them, and a pair of the largest tensors with copies; or one file, which is held twice as it
        is written, with the tensors that its last one is made of; or the model, run once to check its function."""
        sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in self.layout.tensors.items()}
        alive = max(8, 2 + 2 * len(self.checkpoints))  # tensors of one name, with copies
        largest = self.dtype.itemsize * max((math.prod(shape) for _, shape in self.layout.tensors.values()), default=0)
        spec = None if self.model_spec is None or not matches else self.model_spec.spec
        families = () if spec is None else [[spec.groups[group] for group in family] for family in spec.families]
        # Float32, and in float64 the costs of the largest twice: the solver's own copy.
        matching = max((FLOAT * sum(n * n for n in f) + 16 * max(f) ** 2 for f in families), default=0)
        shard = max((sum(sizes[name] for name in names) for names in self.layout.shards), default=0)
        model = None if self.model_spec is None else self.model_spec.model
        own = 0 if model is None else 3 * FLOAT * sum(p.numel() for p in model.parameters())
        return max(matching + alive * largest, 2 * shard + alive * largest, own)

    def describe(self) -> list[str]:
        """What was read, a sentence each."""
        lines = self.notes
        if self.model_spec is not None and not self.spec.groups:
            lines.append("no group of units may be exchanged in this model: nothing is aligned")
        if self.head:
            lines.append(
                "the fine-tune has other classes than the base: its head is carried over, permuted on its input side "
                f"({', '.join(self.head)})"
            )
        if self.distances:
            far = ", ".join(f"{name} {distance:.3f}" for name, distance in self.distances.farthest())
            lines.append(
                f"relative distance of the fine-tune: {self.distances.base:.3f} from its base, "
                f"{self.distances.new_base:.3f} from the new base (0: equal, 1: unrelated); farthest: {far}"
            )
        return lines

    def lines(self) -> list[str]:
        """What will be done, for a reader, without the groups."""
        how = "in memory" if self.in_memory else "streamed from the files"
        written, needed = format_size(self.layout.bytes), format_size(self.memory)
        return [
            f"method {self.method}: {how}",
            *(f"{role}: {c.path}, {len(c)} tensors" for role, c in self.checkpoints.items()),
            *self.describe(),
            f"writes {written} in {len(self.layout.shards)} files; needs about {needed} of memory",
        ]

    def to_json(self) -> dict[str, Any]:
        """The same as JSON data, with the groups."""
        return {
            "method": self.method,
            "in_memory": self.in_memory,
            "checkpoints": {role: str(c.path) for role, c in self.checkpoints.items()},
            "notes": self.notes,
            "distances": None if self.distances is None else vars(self.distances),
            "head": list(self.head),
            "groups": {} if self.model_spec is None else self.spec.groups,
            "bytes": self.layout.bytes,
            "files": len(self.layout.shards),
            "memory": self.memory,
            "config": dict(self.config),
        }


def read_checkpoints(
    paths: Sequence[tuple[str, Path | str]], lead: str, settings: Settings, *, needs_spec: bool = True
) -> tuple[ModelSpec | None, dict[str, CheckpointFile]]:
    """The network, proven, and the checkpoints by role, under its names; as they are where no network is needed.

    lead: the role whose classes the network's head has; another checkpoint may have none, or a head of other classes.
    """
    key, max_memory = settings.get("key"), settings.get("max_memory")
    checkpoints = {role: CheckpointFile.open(path, key, max_memory) for role, path in paths}
    if key and not any(describe_choice(key) in checkpoint.notes for checkpoint in checkpoints.values()):
        raise BadFile(f"no checkpoint has a network {key!r} in it, such as {checkpoints[lead].path}")
    if not needs_spec and settings.get("model") is None and settings.get("data") is None:
        return None, checkpoints
    if settings.get("spec") is None:
        check_memory(PROOF * FLOAT * checkpoints[lead].numel, PROVING, settings.get("max_memory"))
    floats = [e.dtype for c in checkpoints.values() for e in c.entries.values() if e.dtype.is_floating_point]
    dtype = torch.float64 if torch.float64 in floats else torch.float32
    model_spec, leader = find_model_spec(checkpoints[lead], settings, dtype)
    return model_spec, {r: leader if r == lead else model_spec.fit_base(c) for r, c in checkpoints.items()}


def open_job(
    method: str,
    checkpoints: tuple[ModelSpec | None, dict[str, CheckpointFile]],
    like: str,
    dtypes_of: str,
    settings: Settings,
    config: Mapping[str, Any],
) -> Job:
    """A job on what `read_checkpoints` read. dtypes_of: the role whose dtypes the result has."""
    model_spec, by_role = checkpoints
    data = None if model_spec is None else model_spec.load_data(settings)
    layout = _layout_like(by_role[like], by_role[dtypes_of], settings.get("max_memory"))
    named = {"model": settings.get("model"), "data": settings.get("data"), "key": settings.get("key")}
    config = {**config, **{key: str(value) for key, value in named.items() if isinstance(value, str | Path)}}
    travelling = list_travelling(by_role[like].path, by_role[like].is_folder)
    return Job(method, by_role, like, model_spec, layout, data, config, travelling=travelling)


def _layout_like(result: CheckpointFile, dtypes_of: CheckpointFile, max_memory: int | None) -> Layout:
    """The result's tensors in the dtypes of another checkpoint; what that lacks in the dtype that most of it has."""
    floating = [e for e in dtypes_of.entries.values() if e.dtype.is_floating_point]
    if not floating:
        raise BadFile(f"{dtypes_of.path} holds no floating tensor: there is nothing to move or to sum")
    common = max({e.dtype for e in floating}, key=lambda d: sum(e.numel for e in floating if e.dtype == d))

    def dtype(name: str, entry: Entry) -> torch.dtype:
        if name in dtypes_of:
            return dtypes_of.entries[name].dtype
        return common if entry.dtype.is_floating_point else entry.dtype

    limit = SHARD if max_memory is None else min(SHARD, max_memory // 8)
    return Layout.of({name: (dtype(name, e), e.shape) for name, e in result.entries.items()}, limit)


def check_disk(out: Path, needed: int, resume: bool) -> None:
    """Raises OSError (ENOSPC) where the disk of ``out`` has not so many bytes besides what is to be resumed."""
    left = unfinished_bytes(out)
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed - left * resume:
        holds = f"; {part_of(out)} of an interrupted run holds {format_size(left)}: resume or delete it"
        said = f"{out} takes {format_size(needed)}, and {place} has {format_size(free)}"
        raise OSError(errno.ENOSPC, said + holds * bool(left))
