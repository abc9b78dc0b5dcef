"""Data for the command: a folder of images, or a function of the user."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from regraft.core.arguments import Device
from regraft.core.files import BadFile
from regraft.core.forward import examples, inputs_of, is_labelled, portion, split
from regraft.core.guard import same_streams
from regraft.core.tensors import Batch, Inputs, tensor_digest
from regraft.data import Split, load, load_unlabelled
from regraft.data.splits import KEPT_BYTES
from regraft.porting.models import NamedModel, from_module

BATCH = 64
PARTS = ("train", "validation", "test")
HELD_OUT_OF = 4096


@dataclass(frozen=True)
class Data:
    """Batches; each part can be iterated over again.

    Attributes:
        train: for gradients and BatchNorm statistics.
        validation: by which a step is chosen; None: the last one is taken.
        test: on which accuracies are measured, and what it is called.
        classes: how many there are, where that is known.
        folder: of the images, where they lie in one.
        unlabelled: the parts whose batches are inputs alone.
        kept_bytes: what decoded images may come to hold in memory.
    """

    train: Iterable[Batch]
    validation: Iterable[Batch] | None = None
    test: Iterable[Batch] | None = None
    classes: int | None = None
    folder: Path | None = None
    unlabelled: frozenset[str] = frozenset()
    kept_bytes: int = 0

    def without_labels(self) -> Data:
        """The same, of which train and validation count as unlabelled."""
        parts = {"train"} | ({"validation"} if self.validation is not None else set())
        return replace(self, unlabelled=self.unlabelled | parts)

    def hold_out(self) -> Data:
        """With a fifth of each batch of train as validation, where there is nothing else to measure on.

        Batches that may come in another order the next time are kept, the first `HELD_OUT_OF` examples of them.
        """
        if self.validation is not None or self.test is not None:
            return self
        unlabelled = self.unlabelled | ({"validation"} if self.unlabelled else set())
        batches = self.train if self.folder is not None or isinstance(self.train, list) else _take_first(self.train)
        kept, held = (_Share(batches, held) for held in (False, True))
        return replace(self, train=kept, validation=held, unlabelled=unlabelled)

    def label(self, predict: Callable[[Inputs], Tensor]) -> Data:
        """With the classes that ``predict`` gives as the labels of what is unlabelled, each time it is read."""
        parts: dict[str, Any] = {part: _Predicted(getattr(self, part), predict) for part in self.unlabelled}
        return replace(self, unlabelled=frozenset(), **parts)

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
    def judged_by(self) -> str:
        """What right answers on that part are: "accuracy", or without labels "agreement" with the fine-tune."""
        return "agreement" if self.measured_on[0] in self.unlabelled else "accuracy"

    @property
    def measured_on(self) -> tuple[str, Iterable[Batch]]:
        """The part on which accuracies are measured: the first that there is of test, validation, train."""
        parts = ((name, getattr(self, name)) for name in reversed(PARTS))
        return next((name, part) for name, part in parts if part is not None)


@dataclass(frozen=True)
class Unlabelled(Iterable[Inputs]):
    """The inputs of batches."""

    batches: Iterable[Batch]

    def __iter__(self) -> Iterator[Inputs]:
        return map(inputs_of, self.batches)


@dataclass(frozen=True)
class _Predicted(Iterable[Batch]):
    """Batches with predictions as their labels."""

    batches: Iterable[Batch]
    predict: Callable[[Inputs], Tensor]

    def __iter__(self) -> Iterator[Batch]:
        return ((inputs, self.predict(inputs)) for inputs in Unlabelled(self.batches))


@dataclass(frozen=True)
class _Share(Iterable[Batch]):
    """The last fifth of each batch (at least one example), or what is before it; batches of one are kept whole."""

    batches: Iterable[Batch]
    held: bool

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            inputs, count = inputs_of(batch), examples(inputs_of(batch))
            cut = count - max(1, count // 5) if count > 1 else count
            begin, end = (cut, count) if self.held else (0, cut)
            if begin == end:
                continue
            part = portion(inputs, begin, end)
            yield (part, split(batch)[1][begin:end]) if is_labelled(batch) else part


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
    """A folder ``{train, test or val}/<class>/<image>``, or without the classes, or of images alone; or
    ``module:function`` as `data_of` takes its result.

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
    own: dict[str, Any] = {"mean": named.mean, "std": named.std} if named.mean and named.std else {}
    form: dict[str, Any] = {"image_size": pixels.shape[-1], "channels": pixels.shape[1]}
    try:
        if _lacks_classes(Path(name)):
            splits = {part: replace(split, **own) for part, split in load_unlabelled(name, **form).items()}
            parts: dict[str, Any] = {part: split.batches(BATCH) for part, split in splits.items()}
            kept = _count_kept_bytes(splits.values())
            return Data(**parts, folder=Path(name), unlabelled=frozenset(parts), kept_bytes=kept)
        dataset = load(f"folder:{name}", **form, workers=0)
    except FileNotFoundError:
        raise
    except ValueError as problem:
        raise BadFile(str(problem)) from problem
    train, validation, test = (replace(getattr(dataset, part), **own) for part in PARTS)
    return Data(
        train.batches(BATCH, generator=torch.Generator().manual_seed(0)),
        validation.batches(BATCH),
        test.batches(BATCH),
        dataset.num_classes,
        Path(name),
        kept_bytes=_count_kept_bytes((train, validation, test)),
    )


def _take_first(batches: Iterable[Batch]) -> list[Batch]:
    taken: list[Batch] = []
    stream, count = iter(batches), 0
    while count < HELD_OUT_OF and (batch := next(stream, None)) is not None:
        taken.append(batch)
        count += examples(inputs_of(batch))
    return taken


def _count_kept_bytes(splits: Iterable[Split]) -> int:
    return min(KEPT_BYTES, sum(len(split) * math.prod(split.shape) for split in splits))


def _lacks_classes(folder: Path) -> bool:
    """Whether images lie in the folder itself, or in its train, and no folders of classes."""
    train = folder / "train"
    place = train if train.is_dir() else folder
    return place.is_dir() and any(place.iterdir()) and not any(entry.is_dir() for entry in place.iterdir())


def data_of(given: object) -> Data:
    """Data of what a user has: `Data`, an iterable of batches, or a dictionary with "train", and perhaps "validation"
    and "test". Batches are those of `regraft.core.forward`; without labels a tensor, one in a tuple, or a mapping of
    keyword arguments. Raises ValueError for anything else."""
    if isinstance(given, Data):
        return given
    if isinstance(given, Mapping):
        if "train" not in given or not given.keys() <= set(PARTS):
            raise ValueError(f"data are a dictionary with 'train', and perhaps {PARTS[1:]}, not {sorted(given)}")
        parts = {part: _again(batches) for part, batches in given.items()}
        unlabelled = frozenset(part for part, (_, labelled) in parts.items() if not labelled)
        train, validation, test = (parts[part][0] if part in parts else None for part in PARTS)
        assert train is not None
        return Data(train, validation, test, unlabelled=unlabelled)
    if isinstance(given, Iterable):
        return data_of({"train": given})
    raise ValueError(f"data are batches (inputs, labels), not a {type(given).__name__}")


def _again(batches: Iterable[Batch]) -> tuple[Iterable[Batch], bool]:
    """Batches that can be iterated over again (those of an iterator are kept), and whether they have labels."""
    kept = batches if iter(batches) is not batches else list(batches)
    first = next(iter(kept), None)
    if first is None:
        raise ValueError("there is no batch")
    if labelled := is_labelled(first):
        split(first)
    return kept, labelled
