"""Which implementation runs: "auto" | "torch" | "triton". Triton itself, where it is installed.

"auto" is Triton on GPU tensors and torch elsewhere. The choice is an argument of every operation. On CPU tensors Triton
runs only in its interpreter (TRITON_INTERPRET=1 before this package is imported), which is what the tests use.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # its kernels stay plain functions, which nothing calls: `resolve` refuses "triton"
    triton: Any = SimpleNamespace(jit=lambda function: function)
    tl: Any = SimpleNamespace(constexpr=int)

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


def triton_dtype(dtype: torch.dtype) -> Any:
    """The Triton type of a torch dtype, for a kernel's constexpr arguments."""
    return getattr(tl, str(dtype).removeprefix("torch."))
