"""The user's objects stay as they are: whatever runs a user's model does so inside `preserve_state`.

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
"""How to read and to set what a process has one of."""


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Inside, anything may happen to the model; afterwards it is as before.

    That is: every attribute of every module (mode, hooks, which parameters, buffers and submodules it has, counters,
    momenta), what takes a gradient and which it has, and torch's settings (threads, determinism, default dtype). Not
    the values of its tensors, which are run as copies, and no random state: see `same_streams`.
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
def same_settings() -> Iterator[None]:
    """Inside, torch's settings (see `SETTINGS`) may be set; afterwards they are as before."""
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
    """Inside, torch, numpy and Python may draw random numbers; afterwards their global states are as before.

    device: a CUDA device's own state is kept too.
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
    """Let this process take only algorithms that give the same bits in every run; rows say so.

    The number of threads still matters, on a CPU, and is in the row too.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
