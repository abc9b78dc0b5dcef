"""Which implementation runs: "auto" | "torch" | "triton". Triton itself, where it is installed.

"auto" is Triton on GPU tensors and torch elsewhere. The choice is an argument of every operation. On CPU tensors Triton
runs only in its interpreter (TRITON_INTERPRET=1 before this package is imported), which is what the tests use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # its kernels stay plain functions, which nothing calls: `resolve` refuses "triton"

    def _no_decorator(function: Any = None, **options: Any) -> Any:
        return _no_decorator if function is None else function

    triton = SimpleNamespace(jit=_no_decorator)  # type: ignore[assignment]  # stands in for the package
    tl = SimpleNamespace(constexpr=lambda value: value)  # type: ignore[assignment]

BACKENDS = ("auto", "torch", "triton")
HAS_TRITON = not isinstance(triton, SimpleNamespace)
INTERPRETING = HAS_TRITON and triton.knobs.runtime.interpret  # decided where the kernels are decorated


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


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of a floating dtype are computed in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_dtype(dtype: torch.dtype) -> Any:
    """The Triton type of a torch dtype, for a kernel's constexpr arguments."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def use_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one: Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def use_float32_products(device: torch.device, precision: str) -> Iterator[None]:
    """Torch's products on a GPU in tf32 where that was asked for, and in float32 otherwise."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def reports_assertions(device: torch.device) -> bool:
    """Whether an assertion that fails on the device is reported: PyTorch's builds for AMD leave them out."""
    return device.type == "cuda" and not torch.version.hip


def wait_for(device: torch.device) -> None:
    """Wait until what the current stream of a GPU was asked to do is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
