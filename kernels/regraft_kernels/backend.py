"""Which implementation runs: "auto" | "torch" | "triton". Triton itself, where it is installed.

"auto" is Triton on GPU tensors and torch elsewhere. The choice is an argument of every operation. On CPU tensors Triton
runs only in its interpreter (TRITON_INTERPRET=1 before this package is imported), which is what the tests use.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # its kernels stay plain functions, which nothing calls: `resolve` refuses "triton"

    def _undecorated(function: Any = None, **options: Any) -> Any:
        return _undecorated if function is None else function

    triton = SimpleNamespace(jit=_undecorated)  # type: ignore[assignment]  # stands in for the package
    tl = SimpleNamespace(constexpr=lambda value: value)  # type: ignore[assignment]

BACKENDS = ("auto", "torch", "triton")
HAS_TRITON = not isinstance(triton, SimpleNamespace)
INTERPRETING = HAS_TRITON and triton.knobs.runtime.interpret  # decided where the kernels are decorated

Made = TypeVar("Made")


def resolve(backend: str, device: torch.device) -> str:
    """The implementation, "torch" or "triton", that `backend` means on `device`.

    Raises ValueError for an unknown name, or for "triton" on a device it cannot run on; ImportError where
    "triton" is asked for by name and is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend == "auto":
        return "triton" if device.type == "cuda" and HAS_TRITON else "torch"
    if backend == "triton":
        if not HAS_TRITON:
            raise ImportError("backend 'triton' was asked for, but the triton package is not installed")
        if device.type != "cuda" and not INTERPRETING:
            raise ValueError(f"backend 'triton' needs tensors on a GPU, not on {device}")
    return backend


def triton_dtype(dtype: torch.dtype) -> Any:
    """The Triton type of a torch dtype, for a kernel's constexpr arguments."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one: Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Recent(Generic[Made]):
    """What was made last, by key; beyond `limit` the one that was used longest ago is dropped."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._made: dict[Hashable, Made] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._made

    def __len__(self) -> int:
        return len(self._made)

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What belongs to `key`, made at its first use."""
        made = self._made.pop(key) if key in self._made else make()
        self._made[key] = made
        while len(self._made) > self.limit:
            del self._made[next(iter(self._made))]
        return made
