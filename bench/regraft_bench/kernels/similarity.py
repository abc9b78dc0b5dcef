"""similarity, against index_select, movedim and matmul; its update, against building the term again."""

from __future__ import annotations

from functools import partial

import torch

from regraft_bench.contests import Contest, MicroSetting
from regraft_bench.kernels.contenders import similarity_contenders
from regraft_bench.kernels.variants import Variant, dtype_name, register_operator
from regraft_bench.timing import BY_HAND, OURS, PRODUCT, Contender
from regraft_kernels import Term, similarity, similarity_update_
from regraft_kernels.launch import FAMILIES, DotTile
from regraft_kernels.similarity import PRECISIONS, _similarity_kernel

_SIGNATURE = {"programs": "*i64", "parts": "*i64", "out": "*fp32"}


def _variants(target: str) -> list[Variant]:
    tiles = FAMILIES[target]
    kinds = [(torch.float32, p) for p in PRECISIONS if p not in tiles.substitutes]
    kinds += [(torch.bfloat16, "half"), (torch.float16, "half")]
    return [_variant(target, *kind, tile) for kind in kinds for tile in dict.fromkeys(tiles.dot[kind[1]])]


def _variant(target: str, dtype: torch.dtype, precision: str, tile: DotTile) -> Variant:
    constants = {
        "DTYPE": dtype,
        "FACTOR": dtype,
        "PRECISION": "ieee" if precision == "half" else precision,
        "M": tile.m,
        "N": tile.n,
        "K": tile.k,
    }
    kind = dtype_name(dtype) if precision == "half" else f"{dtype_name(dtype)} {precision}"
    label = f"similarity {kind} {tile.m}x{tile.n}x{tile.k}"
    return Variant(_similarity_kernel, target, label, _SIGNATURE, constants, tile.warps, tile.stages)


def _make(shape: tuple[int, int, int, int], axis: int, setting: MicroSetting) -> dict[str, Contender]:
    contenders = similarity_contenders(shape, axis, torch.device(setting.device))
    return {name: Contender(run) for name, run in contenders.items()}


def _contest(steps: int, rows: int, columns: int, area: int, axis: int) -> Contest:
    shape = (steps, rows, columns, area)
    name = f"similarity, [{steps}, {rows}, {columns}, {area}], axis {axis}"
    flop = 2 * shape[1 + axis] * steps * rows * columns * area
    return Contest(name, (OURS, BY_HAND, PRODUCT), partial(_make, shape, axis), flop=flop)


def _make_update(n: int, count: int, setting: MicroSetting) -> dict[str, Contender]:
    """So many of a neighbour's units changed."""
    g = torch.Generator(setting.device).manual_seed(0)
    target, source = torch.randn(2, 1, n, n, generator=g, device=setting.device)
    old = torch.randperm(n, generator=g, device=setting.device)
    new = old.clone()
    new[:count] = old[:count].roll(1)
    total, term = torch.zeros(n, n, device=setting.device), Term(target, source, 0)
    rebuilt = Term(target, source, 0, None, (None, new))
    return {
        OURS: Contender(lambda: similarity_update_(total, term, 1, old, new)),
        BY_HAND: Contender(lambda: similarity([rebuilt])),
    }


_CONTESTS = (
    _contest(10, 256, 256, 9, 0),
    _contest(10, 256, 256, 9, 1),
    _contest(10, 512, 512, 1, 0),
    _contest(10, 512, 512, 1, 1),
    _contest(10, 512, 512, 9, 0),
    Contest("similarity_update_, n = 1024, 50 changed", (OURS, BY_HAND), partial(_make_update, 1024, 50)),
)
register_operator("similarity", _variants, _CONTESTS)
