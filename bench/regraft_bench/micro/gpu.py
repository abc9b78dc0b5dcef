"""The cases of a GPU run as methods of this study."""

from __future__ import annotations

from functools import partial

import torch

from regraft.data import MissingData
from regraft_bench.contests import MicroSetting
from regraft_bench.kernels.gpu import Bench, Case, cases
from regraft_bench.study import Measured, Method


def gpu_methods() -> tuple[Method, ...]:
    """A method for every case of ``python -m regraft_bench.kernels.gpu``."""
    return tuple(Method(case.name, partial(_measure, case), about="Measured on the device.") for case in cases())


_BENCHES: dict[str, Bench] = {}


def _measure(case: Case, setting: MicroSetting) -> Measured:
    if not setting.device.startswith("cuda") or not torch.cuda.is_available():
        raise MissingData(f"this scenario needs a CUDA device, not {setting.device}: --device cuda")
    bench = _BENCHES.setdefault(setting.device, Bench(torch.device(setting.device)))
    return Measured(dict(case.measure(bench)))
