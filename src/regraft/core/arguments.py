"""Public functions check what they are given once, before any work, by their own annotations.

`check_arguments` decorates a function, `check_fields` is called by a dataclass. An argument of another kind, or beyond
its bounds (`Between`, inside ``Annotated``), raises `WrongArgument`: one sentence that names it and says what it must
be.
Items of lists and dictionaries are checked too, those of other containers (which may read from disk) are not.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from functools import cache, wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, Unpack, cast, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

MANY = 1_000_000
"""The largest number of steps, batches, epochs or seeds: more would never end."""


class WrongArgument(ValueError, TypeError):
    """An argument of another kind than the function takes, or out of bounds; both of Python's exceptions for it."""


@dataclass(frozen=True)
class Between:
    """In ``Annotated``: the smallest and the largest value of a finite number."""

    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        if math.isinf(self.high):
            return "finite" if math.isinf(self.low) else f"finite and at least {self.low:g}"
        return f"from {self.low:g} to {self.high:,g}" if self.high < MANY else f"from {self.low:g} to {MANY:,}"


Count = Annotated[int, Between(1, MANY)]
"""A number of things, at least one."""

CountOrNone = Annotated[int, Between(0, MANY)]
"""A number of things, or 0."""

Finite = Annotated[float, Between()]
"""A number that is neither NaN nor infinite."""

NotNegative = Annotated[float, Between(0)]
"""A finite number, at least 0."""

Device = torch.device | Annotated[str, "a device"]
"""Where to compute."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def check_arguments(function: _Function) -> _Function:
    """Decorator: the function raises `WrongArgument` for an argument that does not fit its annotation."""
    positional = [
        name
        for name, parameter in signature(function).parameters.items()
        if parameter.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    ]

    @wraps(function)
    def check_and_call(*args: Any, **kwargs: Any) -> Any:
        hints = _hints(function)
        for name, value in (*zip(positional, args, strict=False), *kwargs.items()):
            _check(name, value, hints)
        return function(*args, **kwargs)

    return cast(_Function, check_and_call)


def check_fields(instance: Any) -> None:
    """Raise `WrongArgument` for a field of a dataclass that does not fit its annotation."""
    owner: Any = type(instance)
    hints = _hints(owner)
    for field in fields(instance):
        if field.init:
            _check(field.name, getattr(instance, field.name), hints)


def check_device(device: torch.device | str) -> None:
    """Raise `WrongArgument` where torch cannot compute on a device of this machine."""
    if fault := _find_fault("device", device, Device):
        raise WrongArgument(fault)


def _check(name: str, value: Any, hints: Mapping[str, Any]) -> None:
    if name in hints and (fault := _find_fault(name, value, hints[name])) is not None:
        raise WrongArgument(fault)


@cache
def _hints(owner: Any) -> dict[str, Any]:
    """Annotations by name, those of a ``**settings: Unpack[...]`` among them."""
    hints = get_type_hints(owner, include_extras=True)
    for hint in list(hints.values()):
        if get_origin(hint) is Unpack:
            hints |= get_type_hints(get_args(hint)[0], include_extras=True)
    return hints


def _find_fault(name: str, value: Any, hint: Any) -> str | None:
    """The sentence that says what is wrong; None for a value that fits."""
    kinds = list(_alternatives(hint))
    fitting = [kind for kind in kinds if _is_kind(value, kind)]
    if not fitting:
        return f"{name} must be {' or '.join(map(_describe, kinds))}, not {_show(value)}"
    faults = [next(_faults_inside(name, value, kind), None) for kind in fitting]
    return None if None in faults else faults[0]


def _alternatives(hint: Any) -> Iterator[Any]:
    """The members of a union, or the hint alone."""
    if get_origin(hint) in (Union, types.UnionType):
        for member in get_args(hint):
            yield from _alternatives(member)
    else:
        yield hint


def _plain(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """(class, arguments) of a hint without its bounds; ``Any`` for what is not checked."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    origin = get_origin(hint)
    if origin is None and (not isinstance(hint, type) or getattr(hint, "_is_protocol", False)):
        return Any, ()
    return origin or hint, get_args(hint)


def _is_kind(value: Any, hint: Any) -> bool:
    """Whether the value is of the hint's class, whatever it holds."""
    kind, args = _plain(hint)
    if kind is Any:
        return True
    if kind is Literal:
        return value in args
    if kind in (int, float):
        return not isinstance(value, bool) and _is_number(value, whole=kind is int)
    if kind is bool:
        return isinstance(value, bool | int | np.bool_)
    if kind in (dict, Mapping):
        return isinstance(value, Mapping)
    if kind in (list, tuple, Sequence):
        if isinstance(value, (str, bytes, Mapping, Set)) or (isinstance(value, Tensor) and value.ndim == 0):
            return False
        return hasattr(value, "__len__") and hasattr(value, "__iter__")
    if kind is Iterable:
        return not isinstance(value, str | bytes) and (hasattr(value, "__iter__") or hasattr(value, "__getitem__"))
    return isinstance(value, os.PathLike if kind is Path else kind)


def _is_number(value: Any, whole: bool) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and not (value.is_complex() or (whole and value.is_floating_point()))
    return isinstance(value, numbers.Integral if whole else numbers.Real)


def _faults_inside(name: str, value: Any, hint: Any) -> Iterator[str]:
    """What is wrong with a value of the right class: bounds, no such device, a tensor without values, or an item."""
    kind, args = _plain(hint)
    if get_origin(hint) is Annotated and kind in (int, float):
        bounds = next(bounds for bounds in get_args(hint) if isinstance(bounds, Between))
        number = operator.index(value) if kind is int else float(value)
        if not (math.isfinite(number) and bounds.low <= number <= bounds.high):
            yield f"{name} must be {_describe(hint)}, not {_show(value)}"
    elif kind is torch.device or (get_origin(hint) is Annotated and kind is str):
        if not _computes(value):
            yield f"{name}: torch cannot compute on {str(value)!r} here (cpu is always there)"
    elif isinstance(value, Tensor) and kind is Tensor and (odd := _lacks_values(value)):
        yield f"{name} is {odd}"
    elif kind in (dict, Mapping) and isinstance(value, dict) and args:
        items = ((f"{name}[{key!r}]", item) for key, item in value.items())
        yield from filter(None, (_find_fault(where, item, args[1]) for where, item in items))
    elif kind in (list, tuple, Sequence) and isinstance(value, list | tuple) and args:
        of_each = args if kind is tuple and len(args) == len(value) and args[-1] is not ... else [args[0]] * len(value)
        pairs = zip(value, of_each, strict=True)
        yield from filter(None, (_find_fault(f"{name}[{i}]", item, of) for i, (item, of) in enumerate(pairs)))


def _computes(device: torch.device | str) -> bool:
    """Whether a number comes back from a device: torch knows others that this machine or build does not have."""
    try:
        return torch.zeros((), device=device).item() == 0
    except (RuntimeError, AssertionError, NotImplementedError):
        return False


def _lacks_values(tensor: Tensor) -> str | None:
    """Why one cannot compute with the tensor; None for a plain one."""
    if is_lazy(tensor):
        return "a tensor that has no shape yet: call the model once first"
    if tensor.is_meta:
        return "a tensor on the meta device, without values: give it some first"
    if tensor.layout != torch.strided:
        return "a sparse tensor: make it dense first"
    return "a quantised tensor: dequantise it first" if tensor.is_quantized else None


def _describe(hint: Any) -> str:
    """What a hint asks for, in words."""
    kind, args = _plain(hint)
    if kind is Literal:
        return " or ".join(map(repr, args))
    if kind in (dict, Mapping):
        return "tensors by name" if Tensor in args else "a dictionary"
    if kind in (int, float):
        bounds = "".join(
            f" {of}" if kind is int or math.isfinite(of.high) else f", {of}"
            for of in get_args(hint)
            if isinstance(of, Between)
        )
        return ("a whole number" if kind is int else "a number") + bounds
    words = {
        str: "a text", list: "a list", tuple: "a list", Sequence: "a list", Iterable: "an iterable", Path: "a path",
        type(None): "None", Callable: "a function", Tensor: "a tensor", nn.Module: "a model (torch.nn.Module)",
        nn.Linear: "a linear layer (torch.nn.Linear)", torch.Generator: "a torch.Generator",
    }  # fmt: skip
    return words.get(kind) or _with_article(getattr(kind, "__name__", str(kind)))


def _show(value: Any) -> str:
    """A value in a few words, on one line."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}" if value.ndim else str(value.item())
    if value is None or isinstance(value, numbers.Number | str):
        return repr(value)[:80]
    return _with_article(type(value).__name__)


def _with_article(word: str) -> str:
    return f"{'an' if word[:1] in 'aeiouAEIOU' else 'a'} {word}"
