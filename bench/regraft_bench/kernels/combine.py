"""combine of two networks, against a x + b y tensor by tensor."""

from __future__ import annotations

from functools import partial

import torch

from regraft_bench.contests import Contest, MicroSetting
from regraft_bench.kernels.contenders import combine_contenders
from regraft_bench.kernels.networks import NETWORKS, PLANS, Network, packing_bytes
from regraft_bench.kernels.variants import FLOATING, Variant, dtype_name, register_operator
from regraft_bench.timing import BY_HAND, COPY, OURS, Contender
from regraft_kernels.backend import accumulator
from regraft_kernels.combine import _combine_kernel, block_of
from regraft_kernels.launch import FAMILIES
from regraft_kernels.packing import MoveKind

_SIGNATURE = {
    "addresses": "*i64",
    "count": "i32",
    "segments": "*i64",
    "tiles": "*i32",
    "moved": "fp32",
    "steps": "i32",
    "sources": "i32",
}


def _variants(target: str) -> list[Variant]:
    variants, tile = [], FAMILIES[target].flat
    for dtype in FLOATING:
        wide = accumulator(dtype)
        signature = {**_SIGNATURE, "coefficients": "*fp64" if wide == torch.float64 else "*fp32"}
        for held, label in ((2, "two"), (4, "four"), (0, "many")):
            for kind in (MoveKind(dtype, False, True), MoveKind(dtype, False, False)):
                block = block_of(tile, kind, held)
                reads = held or 2  # with one result; of two sources where there may be any number
                variants.append(
                    Variant(
                        _combine_kernel,
                        target,
                        f"combine {label} {dtype_name(dtype)} {kind.alignment}",
                        signature,
                        {"DTYPE": dtype, "WIDE": wide, "VEC": kind.vector, "HELD": held, "BLOCK": block},
                        tile.warps,
                        moved=(1 + reads) * block * dtype.itemsize,
                        reads=reads,
                    )
                )
    return variants


def _make(network: str, into_given: bool, count: int, setting: MicroSetting) -> dict[str, Contender]:
    net = Network.of(NETWORKS[network](), torch.device(setting.device))
    return {name: Contender(run) for name, run in combine_contenders(net, into_given, count).items()}


def _contest(network: str, into_given: bool, count: int) -> Contest:
    name = f"combine, {network}, 2 sources, {count} result{'s' * (count > 1)}{', out' * into_given}"
    moved = (2 + count) * packing_bytes(NETWORKS[network]())
    return Contest(name, (OURS, BY_HAND, COPY), partial(_make, network, into_given, count), bytes=moved)


register_operator("combine", _variants, (_contest(*plan, count) for plan in PLANS for count in (1, 4)))
