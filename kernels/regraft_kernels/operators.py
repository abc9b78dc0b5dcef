"""How an operation enters PyTorch: when it goes by its operator, and what all operators share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from regraft_kernels.indices import Indices
from regraft_kernels.packing import Packing, Tensors

TRACED = (FakeTensor, FunctionalTensor)
_ORDINARY = Tensor.__torch_dispatch__


def needs_operator(tensors: Tensors, what: str, out: Tensors | None, *more: Tensors) -> bool:
    """Whether PyTorch must see the operation: something traces or differentiates it, or there is no memory to read.

    Raises ValueError, naming the tensor, for one that keeps its values elsewhere (DTensor), and where `out` is given
    although gradients are wanted or a compiler traces.
    """
    if torch.compiler.is_compiling():
        seen = True
    else:
        seen = _functorch.peek_interpreter_stack() is not None or _get_current_dispatch_mode() is not None
        for group in (tensors, *more):
            if any(kind is not Tensor for kind in set(map(type, group.values()))):
                seen = any([_stands_for_values(name, tensor, what) for name, tensor in group.items()]) or seen
            if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in group.values()]):
                seen = True
            if group and next(iter(group.values())).is_meta:
                seen = True
    if seen and out is not None:
        raise ValueError("out cannot be given where gradients are wanted, or where PyTorch traces")
    return seen


def _stands_for_values(name: str, tensor: Tensor, what: str) -> bool:
    """Whether a tensor of a subclass is one of those that stand for values while PyTorch traces."""
    if isinstance(tensor, TRACED):
        return True
    if type(tensor).__torch_dispatch__ is not _ORDINARY:
        kind = type(tensor).__name__
        raise ValueError(f"{what}: {name!r} is a {kind}, which has no memory of its own; give plain tensors")
    return False


def operator_vectors(
    packing: Packing, tensors: Tensors, indices: Mapping[str, Tensor] | Indices
) -> tuple[list[str], list[Tensor]]:
    """The slots that the tensors need, in order, and their vectors."""
    slots = list(dict.fromkeys(slot for name in tensors for slot in packing.axes[name] if slot is not None))
    vectors = indices.by_slot() if isinstance(indices, Indices) else indices
    for slot in slots:
        if slot not in vectors:
            raise ValueError(f"indices: slot {slot!r} is missing")
    return slots, [vectors[slot] for slot in slots]


def packing_of(tensors: Sequence[Tensor], axes: Sequence[int], batched: bool) -> Packing:
    """The packing that an operator's arguments describe."""
    return _packing(tuple(tuple(t.shape[int(batched) :]) for t in tensors), tuple(axes))


@lru_cache(maxsize=32)
def _packing(shapes: tuple[tuple[int, ...], ...], axes: tuple[int, ...]) -> Packing:
    slots, place = {}, 0
    for number, shape in enumerate(shapes):
        some = axes[place : place + len(shape)]
        slots[str(number)] = tuple(None if slot < 0 else str(slot) for slot in some)
        place += len(shape)
    return Packing.build({str(number): shape for number, shape in enumerate(shapes)}, slots)


def one_by_one(operator: Callable[..., list[Tensor]]) -> Callable[..., Any]:
    """A rule for torch.func.vmap: the operator for one element of the batch after the other."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[list[Tensor], list[int]]:
        def pick(argument: Any, dim: Any, number: int) -> Any:
            if isinstance(argument, (list, tuple)) and isinstance(dim, (list, tuple)):
                return [pick(a, d, number) for a, d in zip(argument, dim, strict=True)]
            return argument if dim is None else argument.select(dim, number)

        results = [
            operator(*(pick(a, d, number) for a, d in zip(args, in_dims, strict=True)))
            for number in range(info.batch_size)
        ]
        stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
        return stacked, [0] * len(stacked)

    return rule
