"""Tensors by name, which every part of the library takes and returns, and the checks and sums that all share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regraft.core.files import tensor_bytes


def state(model: nn.Module) -> Tensors:
    """The model's parameters and buffers by name, as detached, contiguous copies."""
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in live_state(model).items()
    }


def live_state(model: nn.Module) -> Tensors:
    """The model's own parameters and buffers by name: not copies. What its state dictionary does not hold
    (buffers that are not persistent) belongs to the function, not to the state."""
    passing = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in passing}
    return {**dict(model.named_parameters()), **buffers}


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lies; the CPU for a model without any."""
    return next((tensor.device for tensor in live_state(model).values()), torch.device("cpu"))


def complete(model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensors:
    """``tensors`` with the model's own buffers where they are absent.

    Raises ValueError naming a parameter that is missing, a name that the model does not have, or a shape
    that differs.
    """
    own = live_state(model)
    parameters = dict(model.named_parameters())
    missing = sorted(parameters.keys() - tensors.keys())
    extra = sorted(tensors.keys() - own.keys())
    if missing or extra:
        words = [f"lack {', '.join(missing[:5])}"] * bool(missing)
        words += [f"have {', '.join(extra[:5])}, which the model has not"] * bool(extra)
        raise ValueError(f"the tensors {' and '.join(words)}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, the model's is {list(own[name].shape)}")
    return {**{name: own[name] for name in own if name not in parameters}, **tensors}


def copies(model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensors:
    """Copies of `complete`: in-place changes by the model never reach the user's tensors.

    Convolution weights have the memory format in which convolutions are fastest.
    """
    layouts = {True: torch.channels_last, False: torch.contiguous_format}
    return {
        name: value.detach().clone(memory_format=layouts[value.ndim == 4])
        for name, value in complete(model, tensors).items()
    }


def fill_(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy `values` into the model's own parameters and buffers; those that `values` lacks raise KeyError."""
    with torch.no_grad():
        for name, tensor in live_state(model).items():
            tensor.copy_(values[name])


@contextmanager
def use_generator(generator: torch.Generator, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's global random state from the generator for the body; restore it afterwards.

    For code that can only draw from the global state: module constructors, dropout. Takes one number
    from the generator. Not thread-safe: all threads share the global state.
    """
    device = torch.device(device)
    accelerators = [device] if device.type == "cuda" else []
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=accelerators):
        # Not torch.manual_seed, which reseeds every accelerator, those that are not restored included.
        torch.default_generator.manual_seed(seed)
        for accelerator in accelerators:
            with torch.cuda.device(accelerator):
                torch.cuda.manual_seed(seed)
        yield


def norm(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm of all entries together, summed in float64; 0 where there is no tensor."""
    norms = [torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64) for tensor in tensors]
    return float(torch.stack(norms).norm()) if norms else 0.0


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_i weights[i] tensors[i]`` of floating tensors of one shape and dtype: a new tensor."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        if weight:
            total.add_(tensor, alpha=weight)
    return total


def sum_networks(networks: Sequence[Mapping[str, Tensor]], weights: Sequence[float], name: str) -> Tensor:
    """The tensor ``name`` of a weighted sum of networks: integers and infinities are the first's, a variance stays at
    least 0."""
    first = networks[0][name]
    if not first.is_floating_point():
        return first
    total = weighted_sum([first, *(network[name] for network in networks[1:])], weights)
    if not is_finite(total):  # a mask of infinities, which all have, is no number to be weighted
        total = torch.where(first.isinf(), first, total)
    return total.clamp_(min=0) if name.endswith("running_var") else total


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, whatever their order."""
    described = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes."""
    whole = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    whole.update(tensor_bytes(tensor.cpu().contiguous()))
    return whole.hexdigest()


def check_alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor], a_is: str, b_is: str) -> None:
    """Raise a ValueError that names the first tensor in which `a` and `b` differ in name, shape, dtype or device."""
    for one, other, missing_in in ((a, b, b_is), (b, a, a_is)):
        for name in one:
            if name not in other:
                raise ValueError(f"{missing_in} has no tensor {name!r}")
    for name, tensor in a.items():
        for what in ("shape", "dtype", "device"):
            left, right = getattr(tensor, what), getattr(b[name], what)
            if left != right:
                raise ValueError(f"tensor {name!r}: {what} {_plain(left)} in {a_is}, {_plain(right)} in {b_is}")


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise a ValueError that names the first tensor with a NaN or an infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ValueError(f"tensor {name!r} of {where} holds a value that is not finite")


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is a NaN or an infinity."""
    # The sum takes one pass and is not finite if an entry is not; only a sum that overflows needs the exact check.
    return bool(tensor.sum(dtype=torch.float64).isfinite()) or bool(tensor.isfinite().all())


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value


Tensors = dict[str, Tensor]
"""Parameters and buffers by name."""

Perm = dict[str, Tensor]
"""Group name -> index vector, int64: ``(pi theta)[i] = theta[perm[i]]`` along each axis of the group."""

Pair = tuple[Tensor, Tensor]
"""(images, labels), as `regraft.data` makes them."""

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""What a model is called with: one tensor, positional arguments, or keyword arguments."""

Batch = Pair | Sequence[Any] | Mapping[str, Any]
"""Inputs and labels, in any form that `regraft.core.forward` knows: (images, labels), (inputs, labels),
(first, second, ..., labels), or a mapping of keyword arguments and "labels"."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits, labels) -> the mean over the batch."""
