"""Which implementation runs: "auto" | "torch" | "triton".

"auto" is Triton on GPU tensors and torch elsewhere. The choice is an argument of every operation. On CPU
tensors Triton runs only in its interpreter, which is what the tests use.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch

BACKENDS = ("auto", "torch", "triton")


@cache
def has_triton() -> bool:
    """Whether the triton package can be imported (found, not imported)."""
    return importlib.util.find_spec("triton") is not None


def resolve(backend: str, device: torch.device) -> str:
    """The implementation, "torch" or "triton", that `backend` means on `device`.

    Raises ValueError for an unknown name, or for "triton" on a device it cannot run on; ImportError where
    "triton" is asked for by name and is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend == "auto":
        return "triton" if device.type == "cuda" and has_triton() else "torch"
    if backend == "triton":
        if not has_triton():
            raise ImportError("backend 'triton' was asked for, but the triton package is not installed")
        if device.type != "cuda" and not interpreting():
            raise ValueError(f"backend 'triton' needs tensors on a GPU, not on {device}")
    return backend


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 at import)."""
    import triton

    return triton.knobs.runtime.interpret


class Kernel:
    """A Triton kernel whose compilation, and triton's import, wait until it is first launched."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__

    @cached_property
    def jit(self) -> Any:
        import triton
        import triton.language

        self.function.__globals__["tl"] = triton.language
        return triton.jit(self.function)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self.jit[grid]


def triton_dtype(dtype: torch.dtype) -> Any:
    """The Triton type of a torch dtype, for a kernel's constexpr arguments."""
    import triton.language

    return getattr(triton.language, str(dtype).removeprefix("torch."))
