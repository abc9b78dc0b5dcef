"""scale of a million numbers, against torch's product."""

import torch

from regraft_bench.contests import BY_HAND, OURS, Contest, MicroSetting
from regraft_bench.kernels.variants import Variant, register_operator
from regraft_bench.timing import Contender
from regraft_kernels.scale import SCALE_BLOCK, _scale_kernel, scale

_SIGNATURE = {"source": "*fp32", "target": "*fp32", "count": "i32", "factor": "fp32"}


def _variants(target: str) -> list[Variant]:
    moved = 2 * 4 * SCALE_BLOCK  # bytes that a program reads and writes
    label, constants = "scale float32", {"BLOCK": SCALE_BLOCK}
    return [Variant(_scale_kernel, target, label, _SIGNATURE, constants, warps=4, moved=moved, reads=1)]


def _make(setting: MicroSetting) -> dict[str, Contender]:
    tensor = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(setting.device)
    return {
        OURS: Contender(lambda: {"theta": scale(tensor, 0.5)}),
        BY_HAND: Contender(lambda: {"theta": 0.5 * tensor}),
    }


_CONTEST = Contest("scale, a million numbers", (OURS, BY_HAND), _make, bytes=8 << 20)
register_operator("scale", _variants, (_CONTEST,))
