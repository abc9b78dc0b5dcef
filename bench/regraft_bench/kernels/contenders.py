"""Each kernel, what one would write by hand, and the ceiling: same inputs, one call each. Needs torch alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regraft_bench.kernels.networks import Network, copy_of
from regraft_bench.timing import BY_HAND, COPY, OURS, PRODUCT
from regraft_kernels import Term, combine, graft, permute, similarity

Contenders = dict[str, Callable[[], object]]


def permute_contenders(net: Network, into_given: bool) -> Contenders:
    """permute, and index_select axis after axis."""
    tensors = net.draw(0)
    out = net.draw(1) if into_given else None
    return {
        OURS: lambda: permute(tensors, net.indices, net.packing, out=out),
        BY_HAND: lambda: {name: net.permute_by_hand(name, tensor) for name, tensor in tensors.items()},
        COPY: copy_of(tensors, 2, out=into_given),
    }


def graft_contenders(net: Network, into_given: bool, count: int) -> Contenders:
    """graft for `count` scales, and subtracting, permuting, scaling and adding tensor by tensor."""
    base, start, end = (net.draw(seed) for seed in range(3))
    scales = [(k + 1) / count for k in range(count)]
    out = graft(base, start, end, scales, net.indices, net.packing) if into_given else None

    def by_hand() -> dict[str, list[Tensor]]:
        result = {}
        for name, tensor in base.items():
            change = net.permute_by_hand(name, end[name] - start[name])
            result[name] = [tensor + scale * change for scale in scales]
        return result

    return {
        OURS: lambda: graft(base, start, end, scales, net.indices, net.packing, out=out),
        BY_HAND: by_hand,
        COPY: copy_of(base, 3 + count, out=into_given),
    }


def combine_contenders(net: Network, into_given: bool, count: int) -> Contenders:
    """combine of two sources to `count` results, and a x + b y tensor by tensor."""
    a, b = net.draw(0), net.draw(1)
    table = [[0.1 * k + 0.5, 0.5 - 0.1 * k] for k in range(count)]
    out = combine([a, b], table) if into_given else None
    return {
        OURS: lambda: combine([a, b], table, out=out),
        BY_HAND: lambda: {name: [x * a[name] + y * b[name] for x, y in table] for name in a},
        COPY: copy_of(a, 2 + count, out=into_given),
    }


def similarity_contenders(
    shape: tuple[int, int, int, int],
    axis: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    precision: str = "tf32x3",
) -> Contenders:
    """similarity of one term of stacks [steps, rows, columns, area], the other axis gathered; and its product by hand.

    Ours is given channels last, the user's way PyTorch's own order.
    """
    steps, rows, columns, area = shape
    n = shape[1 + axis]
    g = torch.Generator(device).manual_seed(0)
    stacks = torch.randn(2, steps, rows, area, columns, generator=g, device=device).to(dtype).movedim(-1, 3)
    target, source = stacks
    plain = target.contiguous(), source.contiguous()
    index = torch.randperm(shape[2 - axis], generator=g, device=device)
    left, right = torch.randn(2, n, target.numel() // n, generator=g, device=device).to(dtype)
    term = Term(target, source, axis, None, (None, index, None) if axis == 0 else (index, None, None))

    def by_hand() -> Tensor:
        gathered = plain[1].index_select(2 - axis, index)
        a, b = (stack.movedim(axis + 1, 0).reshape(n, -1) for stack in (plain[0], gathered))
        return a @ b.T

    return {OURS: lambda: similarity([term], precision=precision), BY_HAND: by_hand, PRODUCT: lambda: left @ right.T}
