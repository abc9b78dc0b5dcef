"""Trajectory: the parameters along a training run, recorded or on a straight line.

Every point of a path is written as ``theta^t = theta^0 + scale_t * (anchor_t - theta^0)``. A recorded
path has one anchor a step and scale 1; a linear path has one anchor, the end, and scales from 0 to 1.
Learning transfer needs nothing else: it moves ``theta^t - theta^0``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct
from msgspec.structs import asdict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from regraft.core.arguments import Count, check_arguments, check_fields
from regraft.core.files import only_writer, read_sealed, write_sealed, write_tensors
from regraft.core.tensors import Tensors, check_alike, check_finite, tensor_digest

TRAJECTORY_FORMAT = "regraft-trajectory-1"
TRAJECTORY_INDEX = "index.json"
OURS = re.compile(r"[0-9a-f]{24}\.safetensors|\.([0-9a-f]{24}\.safetensors|index\.json)\..+\.part")


def uniform_schedule(steps: int) -> list[float]:
    """l_t = t / T for t = 0 .. T."""
    return [t / steps for t in range(steps + 1)]


def cosine_schedule(steps: int) -> list[float]:
    """Steps l_{t+1} - l_t proportional to 1 + cos(pi t / T) (Chijiwa, section 3.3), t = 0 .. T-1."""
    lengths = [1 + math.cos(math.pi * t / steps) for t in range(steps)]
    fractions = [0.0]
    for length in lengths:
        fractions.append(fractions[-1] + length / sum(lengths))
    return [*fractions[:-1], 1.0]


SCHEDULES: dict[str, Callable[[int], list[float]]] = {"uniform": uniform_schedule, "cosine": cosine_schedule}


@dataclass(frozen=True)
class Trajectory:
    """A path ``theta^0 .. theta^T`` of parameters (and buffers).

    Attributes:
        anchors: the tensors that are stored, theta^0 first; any sequence, so also one that reads from disk.
        legs: for each t = 0 .. T the anchor it leans on and the scale, as in the module's formula.
        metadata: of the writer's choice (JSON values).
    """

    anchors: Sequence[Tensors]
    legs: tuple[tuple[int, float], ...]
    metadata: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_fields(self)
        count = len(self.anchors)
        if count == 0 or len(self.legs) < 2:
            raise ValueError(f"a path needs an anchor and two points, got {count} anchors and {len(self.legs)} points")
        for t, (anchor, scale) in enumerate(self.legs):
            if not (0 <= anchor < count and math.isfinite(scale)):
                raise ValueError(f"step {t} of the path has anchor {anchor} of {count} and scale {scale}")

    @classmethod
    @check_arguments
    def linear(
        cls, start: Tensors, end: Tensors, steps: Count = 30, schedule: str = "uniform", **metadata: Any
    ) -> Trajectory:
        """The straight line from `start` to `end` in `steps` steps.

        Args:
            start, end: parameters (and buffers) of the same names, shapes and dtypes.
            steps: T, at least 1.
            schedule: "uniform" (l_t = t/T) or "cosine" (steps proportional to 1 + cos(pi t/T)).

        Raises:
            ValueError: no step, an unknown schedule, tensors that differ in name, shape or dtype, or a
                value that is not finite; the tensor is named.
        """
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}; there are {', '.join(SCHEDULES)}")
        check_alike(start, end, "the start", "the end")
        for name, tensors in (("the start", start), ("the end", end)):
            check_finite(tensors, name)
        legs = tuple((1, fraction) for fraction in SCHEDULES[schedule](steps))
        return cls((start, end), legs, {"schedule": schedule, **metadata})

    @classmethod
    @check_arguments
    def recorded(cls, checkpoints: Sequence[Tensors], **metadata: Any) -> Trajectory:
        """The path through `checkpoints` = theta^0 .. theta^T (at least two, alike and finite, else ValueError)."""
        if len(checkpoints) < 2:
            raise ValueError(f"a trajectory needs a start and at least one step, got {len(checkpoints)} checkpoints")
        for t, tensors in enumerate(checkpoints):
            check_alike(checkpoints[0], tensors, "checkpoint 0", f"checkpoint {t}")
            check_finite(tensors, f"checkpoint {t}")
        return cls(tuple(checkpoints), tuple((t, 1.0) for t in range(len(checkpoints))), metadata)

    def __repr__(self) -> str:
        names = ", ".join(map(str, self.metadata)) or "nothing"
        return f"Trajectory(steps={self.steps}, anchors={len(self.anchors)}, metadata of {names})"

    @property
    def steps(self) -> int:
        """T: the number of steps after the start."""
        return len(self.legs) - 1

    @cached_property
    def start(self) -> Tensors:
        """theta^0."""
        return self.anchors[0]

    @cached_property
    def end(self) -> Tensors:
        """theta^T."""
        return self[self.steps]

    def leg(self, t: int) -> tuple[Tensors, float]:
        """(anchor, scale) with theta^t - theta^0 = scale * (anchor - theta^0), for 0 <= t <= T."""
        if not 0 <= t <= self.steps:
            raise IndexError(f"step {t} is not on a path of {self.steps} steps")
        anchor, scale = self.legs[t]
        return self.start if anchor == 0 else self.anchors[anchor], scale

    def __len__(self) -> int:
        return len(self.legs)

    def __getitem__(self, t: int) -> Tensors:
        anchor, scale = self.leg(t)
        if scale == 1.0:
            return anchor
        return {name: _between(self.start[name], anchor[name], scale) for name in anchor}

    def __iter__(self) -> Iterator[Tensors]:
        return (self[t] for t in range(len(self)))

    def to(self, device: torch.device | str) -> Trajectory:
        """The same path with its anchors on `device`."""
        moved = [{name: tensor.to(device) for name, tensor in anchor.items()} for anchor in self.anchors]
        return Trajectory(tuple(moved), self.legs, self.metadata)

    def save(self, folder: Path | str) -> None:
        """Write the path to `folder`: one safetensors file an anchor, and an index that comes last.

        A kill at any moment leaves the earlier path or this one, never a mixture: the files have names
        made from their content, and the index that names them replaces the old one in a single rename. Files that a
        killed writer left are removed first.

        Raises:
            ValueError: a value that is not finite; metadata that are no JSON data.
            OSError: another process writes the folder (BlockingIOError), or a file, which is named with its bytes,
                cannot be written; the earlier path is as it was.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with only_writer(folder):
            _clean(folder)
            try:
                anchors = [
                    asdict(_Anchor.write(folder, tensors, f"anchor {i}")) for i, tensors in enumerate(self.anchors)
                ]
                index = {"anchors": anchors, "legs": self.legs, "metadata": dict(self.metadata)}
                write_sealed(folder / TRAJECTORY_INDEX, TRAJECTORY_FORMAT, index)
            finally:
                _clean(folder)

    @classmethod
    def open(cls, folder: Path | str) -> Trajectory:
        """A path saved by `save`; an anchor is read, and its hashes are checked, at each access.

        Raises:
            FileNotFoundError: no index or an anchor's file is missing; the path is named.
            OSError: something that is no file lies in a file's place; the path is named.
            ValueError: not a trajectory, an index that was changed, or a file whose size does not fit (truncated);
                when an anchor is read, a tensor that differs from the index in name, dtype, shape or value, or that
                is not finite.
        """
        folder = Path(folder)
        path = folder / TRAJECTORY_INDEX
        if not path.exists():
            raise FileNotFoundError(f"no trajectory in {folder}: {TRAJECTORY_INDEX} is missing")
        index = read_sealed(path, TRAJECTORY_FORMAT, _Index)
        for anchor in index.anchors:
            anchor.check_size(folder)
        try:
            return cls(_Stored(folder, index.anchors), index.legs, index.metadata)
        except ValueError as problem:
            raise ValueError(f"{path}: {problem}") from None


def _clean(folder: Path) -> None:
    """Remove our files that the index does not name; none where there is an index that cannot be read."""
    path = folder / TRAJECTORY_INDEX
    try:
        named = {a.file for a in read_sealed(path, TRAJECTORY_FORMAT, _Index).anchors} if path.exists() else set()
    except (ValueError, OSError):
        return
    for file in folder.iterdir():
        if OURS.fullmatch(file.name) and file.name not in named:
            file.unlink()


class _Anchor(Struct, forbid_unknown_fields=True):
    """One anchor's file by name, its size in bytes, and the digest of each tensor."""

    file: str
    bytes: int
    sha256: dict[str, str]

    @classmethod
    def write(cls, folder: Path, tensors: Tensors, what: str) -> _Anchor:
        """Write the file beside its place and rename it; it is named by its content."""
        check_finite(tensors, what)
        # clones, because safetensors refuses tensors that share memory and the index knows tensors by name alone
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
        digest = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
        file = folder / f"{digest[:24]}.safetensors"
        write_tensors(file, tensors)
        return cls(file.name, file.stat().st_size, digests)

    def path(self, folder: Path) -> Path:
        """In the folder, whatever the index says."""
        return folder / Path(self.file).name

    def check_size(self, folder: Path) -> None:
        """Raise where the file is missing or has another size: that costs nothing, and finds truncated files."""
        path = self.path(folder)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing or no plain file, though {TRAJECTORY_INDEX} names it")
        if (size := path.stat().st_size) != self.bytes:
            raise ValueError(f"{path} has {size} bytes instead of {self.bytes}: it is truncated or changed")

    def read(self, folder: Path) -> Tensors:
        """The tensors. Raises ValueError for any that is not what the index says, or not finite."""
        path = self.path(folder)
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if odd := sorted(tensors.keys() ^ self.sha256.keys()):
            raise ValueError(f"{path}: tensor {odd[0]!r} stands in only one of file and index")
        for name, expected in self.sha256.items():
            if tensor_digest(tensors[name]) != expected:
                raise ValueError(f"{path}: tensor {name!r} does not have the digest that the index gives")
        check_finite(tensors, str(path))
        return tensors


class _Index(Struct, forbid_unknown_fields=True):
    anchors: list[_Anchor]
    legs: tuple[tuple[int, float], ...]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class _Stored(Sequence[Tensors]):
    """Anchors on disk, each read when it is needed."""

    folder: Path
    anchors: Sequence[_Anchor]

    def __len__(self) -> int:
        return len(self.anchors)

    def __getitem__(self, i: int) -> Tensors:  # type: ignore[override]
        return self.anchors[i].read(self.folder)


def _between(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """(1 - l) start + l end; counters (num_batches_tracked) are those of the end."""
    return torch.lerp(start, end, fraction) if start.is_floating_point() else end
