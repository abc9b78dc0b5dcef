"""Data for the command: a folder of images, or a function of the user."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from regraft.core.arguments import Device
from regraft.core.files import BadFile
from regraft.core.forward import split
from regraft.core.guard import same_streams
from regraft.core.tensors import Batch, tensor_digest
from regraft.data import load
from regraft.porting.models import NamedModel, from_module

BATCH = 64
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Data:
    """Batches; each part can be iterated over again.

    Attributes:
        train: for gradients and BatchNorm statistics.
        validation: by which a step is chosen; None: the last one is taken.
        test: on which accuracies are measured, and what it is called.
        classes: how many there are, where that is known.
        folder: of the images, where they lie in one.
    """

    train: Iterable[Batch]
    validation: Iterable[Batch] | None = None
    test: Iterable[Batch] | None = None
    classes: int | None = None
    folder: Path | None = None

    def digest(self) -> str:
        """SHA-256 of the contents: of a folder's files, else of the batches in the order in which they come now."""
        whole = hashlib.sha256()
        if self.folder is not None:
            for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
                with path.open("rb") as file:
                    contents = hashlib.file_digest(file, "sha256").hexdigest()
                whole.update(os.fsencode(path.relative_to(self.folder)) + b"\0" + contents.encode())
            return whole.hexdigest()
        for part in PARTS:
            for leaf in _leaves(getattr(self, part)):
                whole.update(f"{part} {tensor_digest(leaf) if isinstance(leaf, Tensor) else leaf!r}\n".encode())
        return whole.hexdigest()

    def to(self, device: Device, dtype: torch.dtype) -> Data:
        """With batches that move there, and to float64 where that is the dtype, as they come."""
        parts = (self.validation, self.test)
        validation, test = (None if part is None else _OnDevice(part, device, dtype) for part in parts)
        return replace(self, train=_OnDevice(self.train, device, dtype), validation=validation, test=test)

    @property
    def measured_on(self) -> tuple[str, Iterable[Batch]]:
        """The part on which accuracies are measured: the first that there is of test, validation, train."""
        parts = ((name, getattr(self, name)) for name in reversed(PARTS))
        return next((name, part) for name, part in parts if part is not None)


@dataclass(frozen=True)
class _OnDevice(Iterable[Batch]):
    """Batches on a device."""

    batches: Iterable[Batch]
    device: Device
    dtype: torch.dtype

    def __iter__(self) -> Iterator[Batch]:
        move = partial(to_place, device=self.device, dtype=self.dtype)
        return (tree_map(move, batch) for batch in self.batches)


def to_place(tensor: Tensor, device: Device, dtype: torch.dtype) -> Tensor:
    """The tensor on a device; floating ones in float64 where that is the dtype."""
    return tensor.to(device, dtype if dtype == torch.float64 and tensor.is_floating_point() else tensor.dtype)


def _leaves(batches: Iterable[Batch] | None) -> Iterator[object]:
    """What is in the batches; random states stay as they were."""
    if batches is None:
        return
    batches = batches.batches if isinstance(batches, _OnDevice) else batches
    generator = getattr(batches, "generator", None)
    before = generator.get_state() if isinstance(generator, torch.Generator) else torch.get_rng_state()
    with same_streams():
        for batch in batches:
            yield from tree_leaves(batch)
    if isinstance(generator, torch.Generator):
        generator.set_state(before)


def data_by_name(name: str, named: NamedModel) -> Data:
    """A folder ``{train, test or val}/<class>/<image>``, or ``module:function`` as `data_of` takes its result.

    Images of a folder have the size of the model's inputs, and its normalisation where that is known (else the data's).
    Raises OSError or BadFile for a missing or another folder, ValueError for a function that fails.
    """
    if ":" in name and not Path(name).exists():
        made = from_module(name)
        try:
            return data_of(made() if callable(made) else made)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"{name!r} gives no batches: {type(error).__name__}: {error}") from error
    (pixels,) = named.inputs.values() if isinstance(named.inputs, dict) else (named.inputs,)
    if pixels.ndim != 4:
        raise ValueError("a folder of images is no data for this model: give module:function")
    try:
        dataset = load(f"folder:{name}", image_size=pixels.shape[-1], channels=pixels.shape[1], workers=0)
    except FileNotFoundError:
        raise
    except ValueError as problem:
        raise BadFile(str(problem)) from problem
    own = {"mean": named.mean, "std": named.std} if named.mean and named.std else {}
    train, validation, test = (replace(getattr(dataset, part), **own) for part in PARTS)
    return Data(
        train.batches(BATCH, generator=torch.Generator().manual_seed(0)),
        validation.batches(BATCH),
        test.batches(BATCH),
        dataset.num_classes,
        Path(name),
    )


def data_of(given: object) -> Data:
    """Data of what a user has: `Data`, an iterable of batches, or a dictionary with "train", and perhaps "validation"
    and "test". Batches are those of `regraft.core.forward`. Raises ValueError for anything else."""
    if isinstance(given, Data):
        return given
    if isinstance(given, Mapping):
        if "train" not in given or not given.keys() <= set(PARTS):
            raise ValueError(f"data are a dictionary with 'train', and perhaps {PARTS[1:]}, not {sorted(given)}")
        train, validation, test = (_again(given[part]) if part in given else None for part in PARTS)
        assert train is not None
        return Data(train, validation, test)
    if isinstance(given, Iterable):
        return Data(_again(given))
    raise ValueError(f"data are batches (inputs, labels), not a {type(given).__name__}")


def _again(batches: Iterable[Batch]) -> Iterable[Batch]:
    """Batches that can be iterated over again; those of an iterator are kept."""
    kept = batches if iter(batches) is not batches else list(batches)
    first = next(iter(kept), None)
    if first is None:
        raise ValueError("there is no batch")
    split(first)
    return kept
