"""base + scale_k * pi(end - start), for many scales and many targets: the trajectory update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from regraft_kernels.backend import resolve
from regraft_kernels.packing import Packing, Tensors
from regraft_kernels.permute import permute_reference


def graft_reference(
    base: Tensors,
    start: Tensors,
    end: Tensors,
    scales: Tensor,
    indices: Mapping[str, Tensor],
    packing: Packing,
) -> dict[str, Tensor]:
    """The definition of `graft` for one target: subtract, permute, scale, add."""
    out = {}
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            out[name] = tensor.expand(len(scales), *tensor.shape).clone()
            continue
        wide = torch.promote_types(tensor.dtype, torch.float32)
        delta = {name: end[name].to(wide) - start[name].to(wide)}
        moved = permute_reference(delta, indices, packing)[name]
        steps = [tensor.to(wide) + scale * moved for scale in scales.tolist()]
        out[name] = torch.stack(steps).to(tensor.dtype) if steps else tensor.new_empty((0, *tensor.shape))
    return out


def graft(
    base: Tensors,
    start: Tensors,
    end: Tensors,
    scales: Sequence[float] | Tensor,
    indices: Mapping[str, Tensor],
    packing: Packing,
    *,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """base + scale_k * pi(end - start), as name -> [K, *shape]; only floating tensors take part.

    `base`, `start`, `end`: name -> [*shape]; `scales` [K]. For P targets `base` is [P, *shape] and every
    index vector [P, length]; the result is then [P, K, *shape]. Arithmetic is in float32 (float64 for
    float64 tensors). Tensors that are not floating are copied from `base`.

    Raises ValueError for names, shapes, dtypes or devices that do not fit.
    """
    batch = packing.check(base, "base")
    for what, tensors in (("start", start), ("end", end)):
        missing = sorted(name for name in base if base[name].is_floating_point() and name not in tensors)
        if missing:
            raise ValueError(f"{what} lacks {', '.join(missing)}")
        if packing.check(tensors, what):
            raise ValueError(f"{what} must have no batch dimension")
    device = next((t.device for t in base.values()), torch.device("cpu"))
    resolve(backend, device)
    scales = torch.as_tensor(scales, dtype=torch.float64).reshape(-1)
    names = [name for name in base if base[name].is_floating_point()]
    packing.vectors(indices, names, device, targets=batch[0] if batch else None)
    if not batch:
        return graft_reference(base, start, end, scales, indices, packing)
    grafted = [
        graft_reference(
            {name: tensor[p] for name, tensor in base.items()},
            start, end, scales, {slot: index[p] for slot, index in indices.items()}, packing,
        )
        for p in range(batch[0])
    ]  # fmt: skip
    return {name: torch.stack([g[name] for g in grafted]) for name in base}
