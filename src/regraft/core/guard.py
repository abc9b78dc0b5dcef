"""The user's objects stay as they are: all code that runs a user's model does so inside `preserve_state`.

Values are safe in another way: a model is run on copies of them (`torch.func.functional_call`), never on the user's.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from regraft.core.tensors import device_of


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Restore the model after the body.

    Restored are every attribute of every module (mode, hooks, parameters, buffers, submodules, counters, momenta),
    `requires_grad` and gradients, and torch's settings (threads, determinism, default dtype). Not restored are the
    values of its tensors, since models run on copies, and random states: see `same_streams`.
    """
    modules = [(module, _contents(module)) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        with same_settings():
            yield
    finally:
        for module, before in modules:
            _restore(module, before)
        for parameter, flag, grad in parameters:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
            if parameter.grad is not grad:
                parameter.grad = grad


@contextmanager
def mode(model: nn.Module, training: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Put each submodule in training mode if ``training(submodule)``, for the body; then restore the model."""
    with preserve_state(model):
        for module in model.modules():
            module.training = training(module)
        yield


@contextmanager
def evaluating(model: nn.Module, *, heads: bool = False) -> Iterator[None]:
    """Put the model in evaluation mode for the body; then restore it and the global random states.

    ``heads``: composite modules stay in training mode, so that auxiliary heads run; layers (dropout, norms) do not.
    """

    def training(module: nn.Module) -> bool:
        return heads and any(module.children()) and not type(module).__module__.startswith("torch.nn")

    with same_streams(device_of(model)), mode(model, training):
        yield


@contextmanager
def same_settings() -> Iterator[None]:
    """Restore torch's settings (see `SETTINGS`) after the body."""
    settings = [(put, get, get()) for get, put in SETTINGS]
    try:
        yield
    finally:
        for put, get, value in settings:
            if get() != value:
                put(value)


def _contents(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Each attribute, with a copy of what it holds where it is a container."""
    return {
        name: (value, value.copy() if isinstance(value, dict | set | list) else None)
        for name, value in module.__dict__.items()
    }


def _restore(module: nn.Module, before: dict[str, tuple[Any, Any]]) -> None:
    own = module.__dict__
    for name in own.keys() - before.keys():
        del own[name]
    for name, (value, held) in before.items():
        if own.get(name, before) is not value:
            own[name] = value
        if held is not None and not _same(value, held):
            value.clear()
            value.extend(held) if isinstance(value, list) else value.update(held)


def _same(one: Any, other: Any) -> bool:
    """Whether two containers hold the same objects; by identity, since tensors have no plain equality."""
    if isinstance(one, set):
        return bool(one == other)
    if isinstance(one, dict):
        one, other = [*one, *one.values()], [*other, *other.values()]
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


@contextmanager
def same_streams(device: torch.device | str = "cpu") -> Iterator[None]:
    """Restore the global random states of torch, numpy and Python after the body.

    device: of a CUDA device, its own state too.
    """
    device = torch.device(device)
    python, arrays, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)


def make_deterministic() -> None:
    """Use only algorithms that give the same bits in every run, in this process; rows record it.

    On a CPU the number of threads still matters; rows record that, too.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (_deterministic, _set_deterministic),
    (
        lambda: torch.backends.cudnn.deterministic,
        lambda on: setattr(torch.backends.cudnn, "deterministic", on),
    ),
    (lambda: torch.backends.cudnn.benchmark, lambda on: setattr(torch.backends.cudnn, "benchmark", on)),
)
"""How to read and set each of torch's process-wide settings."""
