"""Memory: caches, scratch space and blocks on the host, and numbers brought to a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes that one instruction of a GPU can move: what stands at multiples of it has variants of its own."""

BLOCK_BYTES = 1 << 20
"""The torch paths work on blocks of rows of this size: what one step writes is still in the cache for the next."""

SMALL = 1 << 10
"""Up to so many elements, calling an operation costs more than what it does: such tensors are stacked."""

MOST_STACKED = 256
"""Tensors of one stack, so that it fits a block."""

Value = TypeVar("Value")


class LRUCache(Generic[Value]):
    """Values by key; beyond `limit` the least recently used one is dropped."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._values: dict[Hashable, Value] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of `key`, made at its first use."""
        value = self._values.pop(key) if key in self._values else make()
        self._values[key] = value
        while len(self._values) > self.limit:
            del self._values[next(iter(self._values))]
        return value


class Scratch:
    """Memory for intermediate results, reused: new pages cost more than the work that is done in them."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor on the device of `like`, of its dtype unless another is given; contents arbitrary.

        It shares no memory with `like`. Tensors given before, other than `like`, are void.
        """
        dtype, size = dtype or like.dtype, math.prod(shape)
        for block in self._blocks:
            if block.dtype == dtype and len(block) >= size and block.data_ptr() != like.data_ptr():
                return block[:size].view(shape)
        new = torch.empty(size, dtype=dtype, device=like.device)
        kept = [b for b in self._blocks if b.dtype != dtype or b.data_ptr() == like.data_ptr()]
        self._blocks = [*kept, new]
        return new.view(shape)


def row_blocks(matrix: Tensor | np.ndarray) -> list[slice]:
    """Slices of about BLOCK_BYTES each that cover the rows (the first dimension) of a tensor or an array."""
    rows = len(matrix)
    each = max(1, BLOCK_BYTES * rows // max(matrix.nbytes, 1))
    return [slice(start, min(start + each, rows)) for start in range(0, rows, each)]


def group_small(tensors: Iterable[tuple[str, int, Hashable]]) -> list[list[str]]:
    """The names of small tensors that can be stacked, of (name, elements, layout): several of one layout."""
    groups: dict[Hashable, list[str]] = {}
    for name, elements, layout in tensors:
        if elements <= SMALL:
            groups.setdefault(layout, []).append(name)
    return [
        names[first : first + MOST_STACKED]
        for names in groups.values()
        if len(names) > 1
        for first in range(0, len(names), MOST_STACKED)
    ]


def stack_named(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """These of the tensors, one after the other."""
    return torch.stack([tensors[name] for name in names])


def of_one_dtype(tensors: Mapping[str, Tensor], names: Sequence[str]) -> bool:
    """Whether these of the tensors can be stacked as they are."""
    return len({tensors[name].dtype for name in names}) == 1


def unstack_into(out: Mapping[str, Tensor], names: Sequence[str], stack: Tensor) -> None:
    """Copy each part of a stack to the tensor of that name."""
    torch._foreach_copy_([out[name] for name in names], list(stack.unbind()))


def as_in_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values, contiguous, negative and conjugate views resolved: what a kernel can read by address for as
    long as the result is kept."""
    return {
        name: tensor
        if tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj()
        else tensor.resolve_conj().resolve_neg().contiguous()
        for name, tensor in tensors.items()
    }


_UPLOADS: LRUCache[tuple[int, Tensor]] = LRUCache(64)
_CAPTURED: list[Tensor] = []
"""What captured graphs read: a few kilobytes for each captured call, for as long as the process lives."""


def upload_words(words: np.ndarray, device: torch.device) -> Tensor:
    """int64 words on the device: one copy, and none where the same words are still there.

    While a CUDA graph captures nothing can be copied: raises RuntimeError unless the same call was made before.
    """
    if device.type != "cuda":
        return torch.from_numpy(words)
    key = words.tobytes(), device
    if torch.cuda.is_current_stream_capturing():
        if key not in _UPLOADS:
            raise RuntimeError("call it once with the same tensors, and `out`, before a CUDA graph captures it")
        table = _UPLOADS.get(key, lambda: (0, torch.empty(0)))[1]
        _CAPTURED.append(table)
        return table
    stream = torch.cuda.current_stream(device).cuda_stream

    def copy() -> tuple[int, Tensor]:
        return stream, torch.from_numpy(words).pin_memory().to(device, non_blocking=True)

    owner, table = _UPLOADS.get(key, copy)
    # A copy on another stream may still be under way.
    return table if owner == stream else copy()[1]


def upload_tables(tables: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """int64 tables on the device, in one copy; each begins at a multiple of ALIGNMENT."""
    unit = ALIGNMENT // 8
    words = np.zeros(sum(-(-table.size // unit) * unit for table in tables), np.int64)
    spans, start = [], 0
    for table in tables:
        words[start : start + table.size] = table.ravel()
        spans.append((start, start + table.size))
        start += -(-table.size // unit) * unit
    joined = upload_words(words, device)
    return [joined[first:end].view(table.shape) for table, (first, end) in zip(tables, spans, strict=True)]


def upload_numbers(numbers: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on the device as float32 or float64, flat, as `upload_words` brings them there."""
    table = np.asarray(numbers, np.float64 if dtype == torch.float64 else np.float32).ravel()
    padded = np.zeros(-(-table.nbytes // ALIGNMENT) * ALIGNMENT // table.itemsize, table.dtype)
    padded[: len(table)] = table
    return upload_words(padded.view(np.int64), device).view(dtype)
