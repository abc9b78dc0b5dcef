"""graft, against subtracting, permuting, scaling and adding tensor by tensor."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from regraft_bench.contests import BY_HAND, COPY, OURS, Contest, MicroSetting
from regraft_bench.kernels.networks import NETWORKS, PLANS, Network, copy_of, packing_bytes
from regraft_bench.kernels.variants import FLOATING, MOVE_SIGNATURE, Variant, move_tiles, register_operator
from regraft_bench.timing import Contender
from regraft_kernels import graft
from regraft_kernels.backend import accumulator
from regraft_kernels.graft import _LIVE_VALUES, _graft_kernel
from regraft_kernels.launch import shape_of


def _variants(target: str) -> list[Variant]:
    variants = []
    for dtype in FLOATING:
        wide = accumulator(dtype)
        signature = {
            **MOVE_SIGNATURE,
            "scales": "*fp64" if wide == torch.float64 else "*fp32",
            "steps": "i32",
        }
        for label, kind, tile in move_tiles(target, dtype, _LIVE_VALUES):
            variants.append(
                Variant(
                    _graft_kernel,
                    target,
                    f"graft {label}",
                    signature,
                    {"DTYPE": dtype, "WIDE": wide, **shape_of(tile, kind)},
                    tile.warps,
                    moved=4 * tile.size * dtype.itemsize,
                    reads=3,  # with one scale
                    gathered=2 * kind.gathered,
                )
            )
    return variants


def _make(network: str, into_given: bool, count: int, setting: MicroSetting) -> dict[str, Contender]:
    net = Network.of(NETWORKS[network](), torch.device(setting.device))
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
        OURS: Contender(lambda: graft(base, start, end, scales, net.indices, net.packing, out=out)),
        BY_HAND: Contender(by_hand),
        COPY: Contender(copy_of(base, 3 + count, out=into_given)),
    }


def _contest(network: str, into_given: bool, count: int) -> Contest:
    name = f"graft, {network}, {count} scale{'s' * (count > 1)}{', out' * into_given}"
    moved = (3 + count) * packing_bytes(NETWORKS[network]())
    return Contest(name, (OURS, BY_HAND, COPY), partial(_make, network, into_given, count), bytes=moved)


register_operator("graft", _variants, (_contest(*plan, count) for plan in PLANS for count in (1, 4)))
