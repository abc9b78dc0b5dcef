"""permute, against index_select axis after axis."""

from __future__ import annotations

from functools import partial

import torch

from regraft_bench.contests import Contest, MicroSetting
from regraft_bench.kernels.contenders import permute_contenders
from regraft_bench.kernels.networks import NETWORKS, PLANS, Network, packing_bytes
from regraft_bench.kernels.variants import MOVE_SIGNATURE, Variant, move_tiles, register_operator
from regraft_bench.timing import BY_HAND, COPY, OURS, Contender
from regraft_kernels.launch import shape_of
from regraft_kernels.permute import _LIVE_VALUES, _permute_kernel


def _variants(target: str) -> list[Variant]:
    variants = []
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        for label, kind, tile in move_tiles(target, dtype, _LIVE_VALUES):
            variants.append(
                Variant(
                    _permute_kernel,
                    target,
                    f"permute {label}",
                    MOVE_SIGNATURE,
                    {"DTYPE": dtype, **shape_of(tile, kind)},
                    tile.warps,
                    moved=2 * tile.size * dtype.itemsize,
                    reads=1,
                    gathered=int(kind.gathered),
                )
            )
    return variants


def _make(network: str, into_given: bool, setting: MicroSetting) -> dict[str, Contender]:
    net = Network.of(NETWORKS[network](), torch.device(setting.device))
    return {name: Contender(run) for name, run in permute_contenders(net, into_given).items()}


def _contest(network: str, into_given: bool) -> Contest:
    name = f"permute, {network}{', out' * into_given}"
    moved = 2 * packing_bytes(NETWORKS[network]())
    return Contest(name, (OURS, BY_HAND, COPY), partial(_make, network, into_given), bytes=moved)


register_operator("permute", _variants, (_contest(*plan) for plan in PLANS))
