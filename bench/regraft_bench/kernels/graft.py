"""graft, against subtracting, permuting, scaling and adding tensor by tensor."""

from __future__ import annotations

from functools import partial

import torch

from regraft_bench.contests import Contest, MicroSetting
from regraft_bench.kernels.contenders import graft_contenders
from regraft_bench.kernels.networks import NETWORKS, PLANS, Network, packing_bytes
from regraft_bench.kernels.variants import FLOATING, MOVE_SIGNATURE, Variant, move_tiles, register_operator
from regraft_bench.timing import BY_HAND, COPY, OURS, Contender
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
    return {name: Contender(run) for name, run in graft_contenders(net, into_given, count).items()}


def _contest(network: str, into_given: bool, count: int) -> Contest:
    name = f"graft, {network}, {count} scale{'s' * (count > 1)}{', out' * into_given}"
    moved = (3 + count) * packing_bytes(NETWORKS[network]())
    return Contest(name, (OURS, BY_HAND, COPY), partial(_make, network, into_given, count), bytes=moved)


register_operator("graft", _variants, (_contest(*plan, count) for plan in PLANS for count in (1, 4)))
