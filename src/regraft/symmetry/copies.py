"""Copies of a model, and the memory that its tensors share.

Two parameters may be one piece of memory: ``b.weight.data = a.weight.data``, or a decoder whose weight is a transposed
view of the encoder's. Loading a state dictionary writes to both, so both must move alike.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# ---- shared memory


def memory_key(tensor: Tensor) -> Hashable:
    """Equal for tensors that show the same memory in the same layout; else of the tensor alone."""
    if not _has_memory(tensor):
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def overlapping(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The places of the tensors whose memory overlaps, in clusters of two or more."""
    clusters: list[list[int]] = []
    end = 0
    placed = [(tensor.data_ptr(), i) for i, tensor in enumerate(tensors) if _has_memory(tensor)]
    for start, i in sorted(placed):
        tensor = tensors[i]
        if start < end:
            clusters[-1].append(i)
        else:
            clusters.append([i])
        end = max(end, tensor.data_ptr() + _extent(tensor) * tensor.element_size())
    return [cluster for cluster in clusters if len(cluster) > 1]


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.numel() > 0 and tensor.data_ptr() != 0


def _extent(tensor: Tensor) -> int:
    """The number of places of memory from a tensor's first scalar to its last."""
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _share_memory_(cluster: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Makes copies share memory as the tensors do."""
    start, size = min(map(Tensor.data_ptr, cluster)), cluster[0].element_size()
    offsets = [(tensor.data_ptr() - start) // size for tensor in cluster]
    length = max(offset + _extent(tensor) for offset, tensor in zip(offsets, cluster, strict=True))
    memory = copies[0].new_empty(length)
    for tensor, offset, copied in zip(cluster, offsets, copies, strict=True):
        shared = memory.as_strided(tensor.shape, tensor.stride(), offset)
        shared.copy_(copied.data)
        copied.data = shared


def all_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and plain attributes of all modules, in a fixed order; some several times."""
    for module in model.modules():
        for x in itertools.chain(module._parameters.values(), module._buffers.values(), vars(module).values()):
            if isinstance(x, Tensor):
                yield x


# ---- copies


def double(model: nn.Module) -> nn.Module:
    """A deep copy in float64: also of buffers that are not saved, and of tensors that are plain attributes. What shares
    memory in the model does so in the copy."""
    copied = _copy(model, lambda tensor: to_double(tensor.detach()).clone()).double()
    for parameter in copied.parameters():
        if parameter.is_complex():  # which double() leaves as they are
            parameter.data = to_double(parameter.data)
    for module in copied.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = to_double(buffer)
    copied.requires_grad_(False)
    pairs = {id(y): (x, y) for x, y in zip(all_tensors(model), all_tensors(copied), strict=True)}
    tensors, copies = zip(*pairs.values(), strict=True) if pairs else ((), ())
    for cluster in overlapping(tensors):
        if len({tensors[i].dtype for i in cluster}) == 1:
            _share_memory_([tensors[i] for i in cluster], [copies[i] for i in cluster])
    return copied


def clone_model(model: nn.Module) -> nn.Module:
    """A copy of the modules and their tensors."""
    return _copy(model, lambda tensor: tensor.detach().clone())


def shadow(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares the model's tensors: what the copy caches does not reach the model."""
    tensors = [*model.parameters(), *model.buffers()]
    return _copy(model, lambda tensor: tensor, {id(tensor): tensor for tensor in tensors})


def _copy(model: nn.Module, copy_tensor: Callable[[Tensor], Tensor], memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy; plain attributes that are tensors (torch copies none with a history) go through ``copy_tensor``."""
    memo = memo or {}
    for module in model.modules():
        memo |= {id(x): copy_tensor(x) for x in vars(module).values() if isinstance(x, Tensor)}
    return copy.deepcopy(model, memo)


def to_double(tensor: Tensor) -> Tensor:
    """A floating or complex tensor in double precision, any other as it is."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor
