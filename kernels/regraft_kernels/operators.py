"""How an operation enters PyTorch: one policy for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import _FlopCounterMode, register_flop_formula

from regraft_kernels.indices import Indices
from regraft_kernels.packing import Packing, Tensors

_PLAIN = Tensor.__torch_dispatch__


Route = Literal["launch", "operator", "definition"]


def choose_route(groups: Iterable[Tensors], out: Tensors | None = None) -> Route:
    """How an operation runs.

    "launch": its kernels directly, which saves a fifth to a third of the time on small networks, checks prepared
    indices no second time and can write to `out`. "operator": where PyTorch must see it, because something traces,
    differentiates or counts it, or there is no memory to read. "definition": in plain PyTorch, inside the
    transformations of torch.func and where forward-mode derivatives are taken; `torch.library` has no rule for these.

    Raises ValueError, naming the tensor, for one that is not dense or has its values in other tensors (DTensor), and
    where `out` is given although gradients are wanted or a compiler traces.
    """
    readable, transformed = is_readable(groups), is_transformed()
    if out is not None:
        if transformed or not readable:
            raise ValueError("out cannot be given where gradients are wanted, or where PyTorch traces")
        return "launch"
    if transformed:
        return "definition"
    if not readable or isinstance(_get_current_dispatch_mode(), _FlopCounterMode):
        return "operator"
    return "launch"


def is_transformed() -> bool:
    """Whether torch.func transforms, or forward-mode derivatives are taken."""
    # What torch.autograd.Function asks too; no public function tells.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_readable(groups: Iterable[Tensors]) -> bool:
    """Whether all values can be read and nothing traces or differentiates; raises as `choose_route` does."""
    return not torch.compiler.is_compiling() and get_proxy_mode() is None and _all_direct(groups)


def _all_direct(groups: Iterable[Tensors]) -> bool:
    direct, gradients = True, torch.is_grad_enabled()
    for tensors in groups:
        for name, tensor in tensors.items():
            if tensor.layout is not torch.strided or tensor.is_nested:
                kind = "nested" if tensor.is_nested else str(tensor.layout)
                raise ValueError(f"{name!r} is {kind}; give dense tensors")
            if type(tensor).__torch_dispatch__ is not _PLAIN:
                if hasattr(tensor, "__tensor_flatten__"):
                    kind = type(tensor).__name__
                    raise ValueError(f"{name!r} is a {kind}, which has no memory of its own; give plain tensors")
                direct = False
            elif gradients and tensor.requires_grad:
                direct = False
            else:
                try:  # not the values of meta tensors, nor those inside torch.func's transformations
                    direct = direct and (tensor.data_ptr() != 0 or not tensor.numel())
                except RuntimeError:
                    direct = False
    return direct


def define(
    schema: str,
    run: Callable[..., list[Tensor]],
    *,
    fake: Callable[..., list[Tensor]],
    save: Callable[..., None],
    backward: Callable[..., Any],
    flops: Callable[..., int],
) -> None:
    """Make `run` the operator torch.ops.regraft.<name of the schema>: shapes without values by `fake`, gradients by
    `save` and `backward`; `flops`, of shapes in place of tensors, is what torch.utils.flop_counter counts. Called
    directly where forward-mode derivatives are taken it raises NotImplementedError."""
    name, arguments = schema.split("(", 1)

    def run_primals(*args: Any) -> list[Tensor]:
        # Tangents never arrive here, so that nothing tells which calls would drop one.
        if forward_ad._current_level >= 0:
            raise NotImplementedError(
                f"torch.ops.regraft.{name} has no forward-mode derivative; call regraft_kernels.{name}, which has one"
            )
        return run(*args)

    operator = torch.library.custom_op(f"regraft::{name}", run_primals, mutates_args=(), schema=f"({arguments}")
    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=save)
    register_flop_formula(getattr(torch.ops.regraft, name))(flops)


# ---------------------------------------------------------------- packings as arguments


def slot_vectors(
    packing: Packing,
    tensors: Tensors,
    indices: Mapping[str, Tensor] | Indices,
    route: Route,
    inverse: bool = False,
    targets: int | None = None,
) -> dict[str, Tensor]:
    """The vector of every slot that the tensors need. A definition checks none, so that they are checked here, where
    their values can be read; an operator does it itself."""
    if isinstance(indices, Indices):
        indices.refuse_inverse(inverse)
        indices = {slot: indices.slot_vector(slot) for slot in indices.places}
    lengths = {slot: packing.slots[slot] for n in tensors for slot in packing.axes[n] if slot is not None}
    for slot in lengths:
        if slot not in indices:
            raise ValueError(f"indices: slot {slot!r} is missing")
    vectors = {slot: indices[slot] for slot in lengths}
    if route == "definition" and vectors and is_readable([vectors]):
        device = next(iter(tensors.values())).device
        Indices.from_vectors(vectors, lengths, device, targets, False, "torch")
    return vectors


def flatten_axes(packing: Packing, tensors: Tensors, vectors: Iterable[str]) -> list[int]:
    """For each axis of each tensor the place of its slot among `vectors`, -1 for none."""
    places: dict[str | None, int] = {None: -1, **{slot: place for place, slot in enumerate(vectors)}}
    return [places[slot] for name in tensors for slot in packing.axes[name]]


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
