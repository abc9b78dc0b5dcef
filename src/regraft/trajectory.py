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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from regraft.files import write_beside, write_text
from regraft.tensors import Tensors, check_alike, check_finite, tensor_digest

FORMAT = "regraft-trajectory-1"
INDEX = "index.json"
LEFTOVER = re.compile(r"[0-9a-f]{24}\.safetensors(\.part)?|index\.json\.part")  # nobody else's files


def uniform(steps: int) -> list[float]:
    """l_t = t / T for t = 0 .. T."""
    return [t / steps for t in range(steps + 1)]


def cosine(steps: int) -> list[float]:
    """Steps l_{t+1} - l_t proportional to 1 + cos(pi t / T) (Chijiwa, section 3.3), t = 0 .. T-1."""
    lengths = [1 + math.cos(math.pi * t / steps) for t in range(steps)]
    fractions = [0.0]
    for length in lengths:
        fractions.append(fractions[-1] + length / sum(lengths))
    return [*fractions[:-1], 1.0]


SCHEDULES: dict[str, Callable[[int], list[float]]] = {"uniform": uniform, "cosine": cosine}


@dataclass(frozen=True)
class Trajectory:
    """A path ``theta^0 .. theta^T`` of parameters (and buffers).

    Attributes:
        anchors: the tensors that are stored, theta^0 first; any sequence, so also one that reads from disk.
        legs: for each t = 0 .. T the anchor it leans on and the scale, as in the module's formula.
        metadata: whatever the writer wants to keep with it (JSON values).
    """

    anchors: Sequence[Tensors]
    legs: tuple[tuple[int, float], ...]
    metadata: Mapping[str, Any]

    @classmethod
    def linear(
        cls, start: Tensors, end: Tensors, steps: int = 30, schedule: str = "uniform", **metadata: Any
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
        if steps < 1:
            raise ValueError(f"a trajectory needs at least one step, got steps={steps}")
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}; there are {', '.join(SCHEDULES)}")
        check_alike(start, end, "the start", "the end")
        for name, tensors in (("the start", start), ("the end", end)):
            check_finite(tensors, name)
        legs = tuple((1, fraction) for fraction in SCHEDULES[schedule](steps))
        return cls((start, end), legs, {"schedule": schedule, **metadata})

    @classmethod
    def recorded(cls, checkpoints: Sequence[Tensors], **metadata: Any) -> Trajectory:
        """The path through `checkpoints` = theta^0 .. theta^T (at least two, alike and finite, else ValueError)."""
        if len(checkpoints) < 2:
            raise ValueError(
                f"a trajectory needs a start and at least one step, got {len(checkpoints)} checkpoints"
            )
        for t, tensors in enumerate(checkpoints):
            check_alike(checkpoints[0], tensors, "checkpoint 0", f"checkpoint {t}")
            check_finite(tensors, f"checkpoint {t}")
        return cls(tuple(checkpoints), tuple((t, 1.0) for t in range(len(checkpoints))), metadata)

    def __repr__(self) -> str:
        kept = ", ".join(map(str, self.metadata)) or "nothing"
        return f"Trajectory(steps={self.steps}, anchors={len(self.anchors)}, metadata of {kept})"

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
        made from their content, and the index that names them replaces the old one in a single rename.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stored = [_Anchor.write(folder, tensors) for tensors in self.anchors]
        anchors = [{"file": a.file.name, "bytes": a.bytes, "sha256": a.digests} for a in stored]
        index = {"format": FORMAT, "anchors": anchors, "legs": self.legs, "metadata": dict(self.metadata)}
        write_text(folder / INDEX, json.dumps(index, indent=1))
        kept = {anchor.file.name for anchor in stored}
        for leftover in folder.iterdir():
            if leftover.name not in kept and LEFTOVER.fullmatch(leftover.name):
                leftover.unlink()

    @classmethod
    def open(cls, folder: Path | str) -> Trajectory:
        """A path saved by `save`; anchors are read, and their hashes checked, each time one is asked for.

        Raises:
            FileNotFoundError: no index or an anchor's file is missing; the path is named.
            ValueError: not a trajectory, or a file whose size does not fit (truncated); when an anchor is
                read, a tensor that differs from the index in name, dtype, shape or value, or that is not finite.
        """
        folder = Path(folder)
        path = folder / INDEX
        if not path.is_file():
            raise FileNotFoundError(f"no trajectory in {folder}: {INDEX} is missing")
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if index["format"] != FORMAT:
                raise ValueError(f"format {index['format']!r}, this version reads {FORMAT!r}")
            stored = [
                _Anchor(folder / Path(e["file"]).name, int(e["bytes"]), dict(e["sha256"]))
                for e in index["anchors"]
            ]
            legs = tuple((int(anchor), float(scale)) for anchor, scale in index["legs"])
            metadata = dict(index["metadata"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} is not a trajectory's index: {error!r}") from error
        for anchor in stored:
            anchor.check_size()
        fits = all(0 <= anchor < len(stored) and math.isfinite(scale) for anchor, scale in legs)
        if len(legs) < 2 or not fits:
            raise ValueError(f"{path}: the steps do not fit the {len(stored)} stored anchors")
        return cls(_Stored(tuple(stored)), legs, metadata)


@dataclass(frozen=True)
class _Anchor:
    """One anchor's file, its size in bytes, and the digest of each tensor."""

    file: Path
    bytes: int
    digests: Mapping[str, str]

    @classmethod
    def write(cls, folder: Path, tensors: Tensors) -> _Anchor:
        """Write the file beside its place and rename it; it is named by its content."""
        # clones, because safetensors refuses tensors that share memory and the index knows tensors by name alone
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
        whole = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
        file = folder / f"{whole[:24]}.safetensors"
        write_beside(file, lambda part: save_file(tensors, part))
        return cls(file, file.stat().st_size, digests)

    def check_size(self) -> None:
        """Raise where the file is missing or has another size: that costs nothing, and finds what is truncated."""
        if not self.file.is_file():
            raise FileNotFoundError(f"{self.file} is missing, though {INDEX} names it")
        if self.file.stat().st_size != self.bytes:
            raise ValueError(
                f"{self.file} has {self.file.stat().st_size} bytes instead of {self.bytes}: "
                "it is truncated or changed"
            )

    def read(self) -> Tensors:
        """The tensors. Raises ValueError for any that is not what the index says, or not finite."""
        try:
            tensors = load_file(self.file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.file} cannot be read: {error}") from error
        if odd := sorted(tensors.keys() ^ self.digests.keys()):
            raise ValueError(f"{self.file}: tensor {odd[0]!r} stands in only one of file and index")
        for name, expected in self.digests.items():
            if tensor_digest(tensors[name]) != expected:
                raise ValueError(
                    f"{self.file}: tensor {name!r} does not have the digest that the index gives"
                )
        check_finite(tensors, str(self.file))
        return tensors


@dataclass(frozen=True)
class _Stored(Sequence[Tensors]):
    """Anchors on disk, read when they are asked for."""

    anchors: tuple[_Anchor, ...]

    def __len__(self) -> int:
        return len(self.anchors)

    def __getitem__(self, i: int) -> Tensors:  # type: ignore[override]
        return self.anchors[i].read()


def _between(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """(1 - l) start + l end; counters (num_batches_tracked) are those of the end."""
    return torch.lerp(start, end, fraction) if start.is_floating_point() else end
