"""What is to be done, checked before any work: memory, disk, and what a plan says of itself."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.porting.checkpoint_files import CheckpointFile, Entry, Layout, size
from regraft.porting.data import Data
from regraft.porting.fitting import Distances
from regraft.porting.subject import Subject
from regraft.symmetry import PermutationSpec

SHARD = 10**9
"""Bytes of one file of the result; an eighth of the memory that is allowed, where that is less."""

FLOAT = 4
PROOF = 5
"""Float32 copies of the model that a proof holds: its own, and two in float64."""

PROVING = "proving the symmetry of the model (or give a proven one with spec)"


@dataclass(frozen=True, eq=False)
class Plan:
    """A port, or an alignment, or a sum, before it is made.

    Attributes:
        method: what is done.
        checkpoints: role ("base", "fine-tune", "new base", ...) -> its tensors, under the model's names.
        subject: the network; None where none is needed.
        layout: what will be written.
        data: on which it is measured, and gradients are taken.
        config: what else was chosen, for the record (JSON values).
        distances: of the fine-tune from the bases.
        memory: bytes that the process will need at its peak, what it has now included.
        in_memory: whether the networks are held whole.
    """

    method: str
    checkpoints: Mapping[str, CheckpointFile]
    subject: Subject | None
    layout: Layout
    data: Data | None
    config: Mapping[str, Any]
    distances: Distances | None
    memory: int
    in_memory: bool

    @property
    def head(self) -> tuple[str, ...]:
        """The tensors that are carried over, since a base has them for other classes, or not at all."""
        tuned = self.checkpoints.get("fine-tune", ())
        others = [c for role, c in self.checkpoints.items() if role != "fine-tune"]
        return tuple(name for name in tuned if any(name not in other for other in others))

    @property
    def notes(self) -> list[str]:
        """What was done to names and left out."""
        return [f"{role}: {note}" for role, c in self.checkpoints.items() for note in c.notes]

    def lines(self) -> list[str]:
        """For a reader, without the groups."""
        found = [f"method {self.method}: {'in memory' if self.in_memory else 'streamed from the files'}"]
        for role, checkpoint in self.checkpoints.items():
            found.append(f"{role}: {checkpoint.path}, {len(checkpoint)} tensors")
        found += self.notes
        if self.distances:
            far = ", ".join(f"{name} {distance:.3f}" for name, distance in self.distances.farthest())
            found.append(
                f"relative distance of the fine-tune: {self.distances.base:.3f} from the base, "
                f"{self.distances.new_base:.3f} from the new base (1: unrelated); farthest: {far}"
            )
        if self.head:
            found.append(f"head of other classes, carried over: {', '.join(self.head)}")
        found.append(
            f"writes {size(self.layout.bytes)} in {len(self.layout.shards)} files; "
            f"needs about {size(self.memory)} of memory"
        )
        return found

    def told(self) -> dict[str, Any]:
        """The same as JSON data, with the groups."""
        return {
            "method": self.method,
            "in_memory": self.in_memory,
            "checkpoints": {role: str(c.path) for role, c in self.checkpoints.items()},
            "notes": self.notes,
            "distances": None if self.distances is None else vars(self.distances),
            "head": list(self.head),
            "groups": {} if self.subject is None else self.subject.spec.groups,
            "bytes": self.layout.bytes,
            "files": len(self.layout.shards),
            "memory": self.memory,
            "config": dict(self.config),
        }


def layout_like(result: CheckpointFile, dtypes_of: CheckpointFile, max_memory: int | None) -> Layout:
    """The result's tensors in the dtypes of another checkpoint; what that lacks in the dtype that most of it has."""
    floating = [e for e in dtypes_of.entries.values() if e.dtype.is_floating_point]
    common = max({e.dtype for e in floating}, key=lambda d: sum(e.numel for e in floating if e.dtype == d))

    def dtype(name: str, entry: Entry) -> Any:
        if name in dtypes_of:
            return dtypes_of.entries[name].dtype
        return common if entry.dtype.is_floating_point else entry.dtype

    limit = SHARD if max_memory is None else min(SHARD, max_memory // 8)
    return Layout.of({name: (dtype(name, e), e.shape) for name, e in result.entries.items()}, limit)


# ---------------------------------------------------------------- memory and disk


def streamed(spec: PermutationSpec | None, layout: Layout) -> int:
    """Bytes at the peak of matching and writing tensor by tensor: similarities of the largest groups with what the
    assignment makes of them, and a pair of the largest tensors with copies; or one file, which is held twice as it is
    written, with the tensors that its last one is made of."""
    largest = FLOAT * max((math.prod(shape) for _, shape in layout.tensors.values()), default=0)
    families = () if spec is None else spec.families
    matching = max(
        (_similarities([spec.groups[g] for g in family]) for family in families if spec), default=0
    )
    shard = max((sum(_bytes(layout, name) for name in names) for names in layout.shards), default=0)
    return max(matching + 8 * largest, 2 * shard + 8 * largest)


def _similarities(sizes: Sequence[int]) -> int:
    """Float32, and in float64 the costs of the largest twice: the solver's own copy."""
    return FLOAT * sum(n * n for n in sizes) + 16 * max(sizes) ** 2


def _bytes(layout: Layout, name: str) -> int:
    dtype, shape = layout.tensors[name]
    return dtype.itemsize * math.prod(shape)


def check_memory(needed: int, why: str, allowed: int | None) -> int:
    """What the process holds now and ``needed`` bytes more, if that is allowed (None: what the machine has).

    Raises OSError (ENOMEM) that says how much is missing, and for what.
    """
    total = _resident() + needed
    limit = _resident() + _available() if allowed is None else allowed
    if total > limit:
        raise OSError(errno.ENOMEM, f"{why} takes about {size(total)} of memory, and there are {size(limit)}")
    return total


def check_disk(out: Path, needed: int) -> None:
    """Raises OSError (ENOSPC), naming the place, where it has not so many bytes."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{out} takes {size(needed)}, and {place} has {size(free)}")


def _resident() -> int:
    """Bytes of memory that the process holds; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _available() -> int:
    """Bytes of memory that the machine could give; without end where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 62
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 1 << 62)
