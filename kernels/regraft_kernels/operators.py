"""How an operation enters PyTorch: one policy for all of them, on public interfaces alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from regraft_kernels.indices import Indices
from regraft_kernels.packing import Packing, Tensors

_PLAIN = Tensor.__torch_dispatch__


def needs_operator(groups: Iterable[Tensors], out: Tensors | None = None) -> bool:
    """Whether PyTorch must see the operation: something traces or differentiates it, or there is no memory to read.

    Where it need not, operations run directly: by way of `torch.ops` they would take a fifth to a half longer on
    small networks, check prepared indices again, and could not write to `out`.

    Raises ValueError, naming the tensor, for one whose values are in other tensors (DTensor), and where `out` is given
    although gradients are wanted or a compiler traces.
    """
    needed = torch.compiler.is_compiling() or get_proxy_mode() is not None or not _all_direct(groups)
    if needed and out is not None:
        raise ValueError("out cannot be given where gradients are wanted, or where PyTorch traces")
    return needed


def _all_direct(groups: Iterable[Tensors]) -> bool:
    direct, gradients = True, torch.is_grad_enabled()
    for tensors in groups:
        for name, tensor in tensors.items():
            if type(tensor).__torch_dispatch__ is not _PLAIN:
                if hasattr(tensor, "__tensor_flatten__"):
                    kind = type(tensor).__name__
                    raise ValueError(
                        f"{name!r} is a {kind}, which has no memory of its own; give plain tensors"
                    )
                direct = False
            elif (gradients and tensor.requires_grad) or not _has_memory(tensor):
                direct = False
    return direct


def _has_memory(tensor: Tensor) -> bool:
    """Whether the values can be read: not those of meta tensors, nor inside torch.func's transformations."""
    try:
        return tensor.data_ptr() != 0 or not tensor.numel()
    except RuntimeError:
        return False


def define(
    schema: str,
    run: Callable[..., list[Tensor]],
    *,
    fake: Callable[..., list[Tensor]],
    save: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Make `run` the operator torch.ops.regraft.<name of the schema>: shapes without values by `fake`, gradients by
    `save` and `backward`, torch.func.vmap by one call for each element."""
    name, arguments = schema.split("(", 1)
    operator = torch.library.custom_op(f"regraft::{name}", run, mutates_args=(), schema=f"({arguments}")
    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=save)
    operator.register_vmap(_call_for_each(operator))


def _call_for_each(operator: Callable[..., list[Tensor]]) -> Callable[..., Any]:
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


# ---------------------------------------------------------------- packings as arguments


def flatten_indices(
    packing: Packing, tensors: Tensors, indices: Mapping[str, Tensor] | Indices, inverse: bool = False
) -> tuple[list[Tensor], list[int]]:
    """The vectors that the tensors need, and for each axis of each tensor the place of its vector, -1 for none."""
    if isinstance(indices, Indices):
        indices.refuse_inverse(inverse)
        indices = {slot: indices.slot_vector(slot) for slot in indices.places}
    slots = list(dict.fromkeys(slot for name in tensors for slot in packing.axes[name] if slot is not None))
    for slot in slots:
        if slot not in indices:
            raise ValueError(f"indices: slot {slot!r} is missing")
    places: dict[str | None, int] = {None: -1, **{slot: place for place, slot in enumerate(slots)}}
    axes = [places[slot] for name in tensors for slot in packing.axes[name]]
    return [indices[slot] for slot in slots], axes


def unflatten_packing(tensors: Sequence[Tensor], axes: Sequence[int], batched: bool) -> Packing:
    """The packing that an operator's arguments describe; names and slots are numbers."""
    return _packing(tuple(tuple(t.shape[int(batched) :]) for t in tensors), tuple(axes))


@lru_cache(maxsize=32)
def _packing(shapes: tuple[tuple[int, ...], ...], axes: tuple[int, ...]) -> Packing:
    slots, left = {}, iter(axes)
    for number, shape in enumerate(shapes):
        own = [next(left) for _ in shape]
        slots[str(number)] = tuple(None if slot < 0 else str(slot) for slot in own)
    return Packing.build({str(number): shape for number, shape in enumerate(shapes)}, slots)


def by_number(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The tensors, or index vectors, as a packing of `unflatten_packing` names them."""
    return {str(number): tensor for number, tensor in enumerate(tensors)}
