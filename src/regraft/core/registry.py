"""Functions that configurations may name. A row keeps the name alone, so that code can move without touching rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_REGISTERED: dict[str, Callable[..., Any]] = {}
_NAMES: dict[Callable[..., Any], str] = {}


def register(function: F, name: str | None = None) -> F:
    """Decorator: configurations know the function by its name, or by the one given (rows keep the name that they have).

    Raises ValueError where another has that name.
    """
    name = name or function.__name__
    known = _REGISTERED.setdefault(name, function)
    if known is not function:
        raise ValueError(f"two functions are registered as {name!r}: in {known.__module__} and {function.__module__}")
    _NAMES[function] = name
    return function


def registered_name(function: Callable[..., Any]) -> str:
    """The name that configurations know the function by. Raises TypeError for a function that has none."""
    if function not in _NAMES:
        name = getattr(function, "__name__", repr(function))
        raise TypeError(f"a configuration cannot hold {name!r}: it is not registered (regraft.core.registry.register)")
    return _NAMES[function]
