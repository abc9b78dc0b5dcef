"""factor * theta."""

import torch
from torch import Tensor

from regraft_kernels.backend import resolve, tl, triton, use_device

SCALE_BLOCK = 1024


def scale_reference(tensor: Tensor, factor: float) -> Tensor:
    """The definition of `scale`."""
    return factor * tensor


@triton.jit
def _scale_kernel(source, target, count, factor, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    here = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = here < count
    tl.store(target + here, factor * tl.load(source + here, mask=inside), mask=inside)


def _scale_triton(tensor: Tensor, factor: float) -> Tensor:
    source = tensor.contiguous()
    target = torch.empty_like(source)
    programs = triton.cdiv(source.numel(), SCALE_BLOCK)
    with use_device(tensor.device):
        _scale_kernel[(programs,)](source, target, source.numel(), factor, BLOCK=SCALE_BLOCK)
    return target


def scale(tensor: Tensor, factor: float, *, backend: str = "auto") -> Tensor:
    """factor * tensor: a new float32 tensor of the same shape."""
    run = _scale_triton if resolve(backend, tensor.device) == "triton" else scale_reference
    return run(tensor, factor)
