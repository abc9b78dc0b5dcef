"""Every kernel and tile, compiled ahead of time for every GPU family: what the machine code says, what it should say,
and what it lets one expect of a GPU. Needs triton and no GPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from regraft.core.clock import Clock
from regraft.data import MissingData
from regraft_bench.kernels.machine_code import MachineCode, read_machine_code
from regraft_bench.kernels.networks import resnet50, vit_b_16
from regraft_bench.kernels.variants import Variant, operators
from regraft_bench.study import Measured, Method, Setting
from regraft_kernels.backend import HAS_TRITON, INTERPRETING, triton_dtype
from regraft_kernels.launch import FAMILIES, tile_of
from regraft_kernels.packing import MoveKind

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}


CODE = "This variant's machine code, compiled ahead of time and read: nothing is timed."


def compile_methods() -> tuple[Method, ...]:
    """One for every variant that a kernel file exports."""
    variants = [variant for operator in operators().values() for variant in operator.variants]
    variants.sort(key=lambda variant: list(TARGETS).index(variant.target))
    return tuple(
        Method(f"{v.target} {v.label}", partial(_measure, v), {"warps": v.warps, "stages": v.stages}, about=CODE)
        for v in variants
    )


def _measure(variant: Variant, setting: Setting) -> Measured:
    if not HAS_TRITON:
        raise MissingData("compiling the kernels needs triton, which is not installed")
    if INTERPRETING:
        raise MissingData("Triton's interpreter compiles nothing: run without TRITON_INTERPRET")
    clock = Clock()
    with clock.phase("compile"):
        built = built_for(variant)
    values = values_of(variant, read_machine_code(built))
    missed = [goal.text(values) for goal in GOALS if goal.concerns(variant) and not goal.is_met(values)]
    return Measured(values, cost=clock.seconds, notes={"beyond its goal": missed} if missed else {})


def values_of(variant: Variant, code: MachineCode) -> dict[str, float]:
    """What is shown and checked of a variant's code, by name. Predicted values are of the machines in MACHINES."""
    values: dict[str, float] = {
        "registers": code.registers,
        "spilled [bytes]": code.spilled,
        "shared memory [bytes]": code.shared,
        "instructions": code.instructions,
        "loop instructions": code.loop,
        "divisions": code.divisions,
        "16-byte stores": sum(width >= 128 for width in code.stored),
        "narrower stores": sum(width < 128 for width in code.stored),
        "narrower loads in the loop": code.narrow_loads,
        "narrower shared stores in the loop": code.narrow_shared_stores,
        "matrix instructions": code.matrix,
        "copies in flight": code.in_flight,
    }
    if variant.reads:
        values["instructions per 16 bytes"] = _per_16_bytes(variant, code)
    if variant.gathered:
        values["cache bytes over used"] = _fetched_over_used(variant)
    if variant.target == "sm_90":
        share = _share_of_copy if variant.reads else _share_of_products
        values |= {f"predicted share, {name}": share(variant, code, machine) for name, machine in MACHINES.items()}
    return {name: float(value) for name, value in values.items()}


def _per_16_bytes(variant: Variant, code: MachineCode) -> float:
    """Instructions of a thread for each 16 bytes of tensors that it reads or writes."""
    moved = variant.moved / (32 * variant.warps)
    return code.instructions_to_store(moved / (1 + variant.reads)) / (moved / 16)


# ---------------------------------------------------------------- goals


@dataclass(frozen=True)
class Goal:
    """A bound on one value of the variants whose target and label match a pattern: at least or at most."""

    variants: str
    value: str
    most: float | None = None
    least: float | None = None

    def concerns(self, variant: Variant) -> bool:
        return re.search(self.variants, f"{variant.target} {variant.label}") is not None

    def is_met(self, values: Mapping[str, float]) -> bool:
        found = values[self.value]
        return (self.most is None or found <= self.most) and (self.least is None or found >= self.least)

    def text(self, values: Mapping[str, float]) -> str:
        bound = f"at most {self.most:g}" if self.most is not None else f"at least {self.least:g}"
        return f"{self.value}: {values[self.value]:g}, {bound}"


_PRODUCTS = "similarity (float32 tf32|bfloat16|float16)"
_MOVES = "(permute|graft|combine)"
GOALS = (
    Goal("", "spilled [bytes]", most=0),
    Goal("", "divisions", most=0),
    Goal(f"sm.* {_MOVES} .*aligned|similarity", "narrower stores", most=0),
    Goal("sm.* permute int(32|64) rows aligned", "16-byte stores", least=4),
    Goal("sm.* permute int(32|64) .*columns aligned", "16-byte stores", least=1),  # a step's, of many programs
    Goal("sm_90 permute int32 rows aligned", "instructions per 16 bytes", most=16),
    Goal("sm_90 permute int32 columns aligned", "instructions per 16 bytes", most=40),
    Goal("sm_90 combine two float32 aligned", "instructions per 16 bytes", most=16),
    Goal(f"sm_90 {_MOVES} .*(int32|float32) .*aligned", "registers", most=128),
    Goal("sm_90 (permute|combine) .*(int32|float32) .*aligned", "registers", most=64),
    Goal("sm.* similarity", "narrower loads in the loop", most=0),
    Goal(f"sm.* {_PRODUCTS}", "narrower shared stores in the loop", most=0),
    Goal("sm.* similarity", "copies in flight", least=2),  # two of one stage: target's and source's
    Goal(_PRODUCTS, "matrix instructions", least=4),
    Goal("sm_90 similarity (bfloat16|float16)", "loop instructions", most=150),
    Goal("sm_90 similarity float32 tf32 ", "loop instructions", most=150),
    Goal("sm_90 similarity float32 tf32x3 64x128x32", "loop instructions", most=600),
    Goal("sm_90 similarity float32 tf32x3 64x128x32", "predicted share, H100", least=0.7),
)
"""In one place: what every variant's code must show. The test of compiled code fails beyond them."""


# ---------------------------------------------------------------- what to expect of a GPU


@dataclass(frozen=True)
class Machine:
    """A GPU as the predictions see it: per multiprocessor and clock, four instructions of 32 threads each.

    memory, cache: bytes a second, of the data sheet, and of the second-level cache as others measured it. flop: by
    kind of product, per multiprocessor and clock. latency: seconds until a load of memory arrives.
    """

    multiprocessors: int
    hertz: float
    memory: float
    cache: float
    flop: Mapping[str, float]
    latency: float = 600e-9
    registers: int = 65536
    threads: int = 2048
    shared: int = 227 << 10

    def resident(self, threads: int, code: MachineCode) -> int:
        """Blocks of so many threads at once on a multiprocessor."""
        registers = self.registers // (-(-code.registers // 8) * 8 * threads)
        return max(1, min(self.threads // threads, registers, self.shared // max(code.shared, 1)))


_FLOP = {"half": 4096.0, "tf32": 2048.0, "tf32x3": 2048.0 / 3, "ieee": 256.0}
MACHINES = {
    "H100": Machine(132, 1.755e9, 3.35e12, 5.5e12, _FLOP),
    "H200": Machine(132, 1.755e9, 4.8e12, 5.5e12, _FLOP),
}


def _share_of_copy(variant: Variant, code: MachineCode, machine: Machine) -> float:
    """Of the copy's bandwidth: what instructions can be issued for, and what the loads in flight can fetch.

    Issue: 4 x 32 threads' instructions a clock on each multiprocessor, each 16 bytes moved costing `_per_16_bytes`. In
    flight (Little's law): a thread's loads, 16 bytes each and as many as it stores, of all resident threads, once every
    latency. Second-level cache: all bytes that are used, and what else is in the sectors of gathered columns.
    """
    threads, reads = 32 * variant.warps, variant.reads
    issue = 128 * machine.multiprocessors * machine.hertz * 16 / _per_16_bytes(variant, code)
    loaded = sum(code.stored_in_loop or code.stored) / 8 * reads
    resident = machine.resident(threads, code) * threads * machine.multiprocessors
    fetched = (1 + 1 / reads) * resident * loaded / machine.latency
    unused = variant.gathered * (_fetched_over_used(variant) - 1) if variant.gathered else 0
    cached = machine.cache * (1 + reads) / (1 + reads + unused)
    return min(1.0, min(issue, fetched, cached) / machine.memory)


SECTOR = 32
"""Bytes that the second-level cache gives at least."""


def _fetched_over_used(variant: Variant) -> float:
    """Bytes of the sectors that this tile's gathered columns touch, over those that it uses: of the rows of ResNet-50
    and ViT-B/16 that such a tile moves, at random permutations."""
    kind = MoveKind(variant.constants["DTYPE"], True, True)
    fetched, used, g = 0, 0, np.random.default_rng(0)
    for segment in (*resnet50().segments.values(), *vit_b_16().segments.values()):
        length, columns = segment.columns * segment.tail, variant.constants["COLUMNS"]
        if segment.column_factors and tile_of(FAMILIES[variant.target], kind, length, 1).columns == columns:
            sources = (g.permutation(segment.columns)[:, None] * segment.tail + np.arange(segment.tail)).ravel()
            sectors = sources * kind.dtype.itemsize // SECTOR
            fetched += (
                segment.rows * SECTOR * sum(len(set(sectors[n : n + columns])) for n in range(0, length, columns))
            )
            used += segment.size * kind.dtype.itemsize
    return fetched / used


def _share_of_products(variant: Variant, code: MachineCode, machine: Machine) -> float:
    """Of the matrix unit's rate: the clocks of one step's products over those that the step takes.

    A step takes as long as its products, its instructions (four warps issue one each a clock) or its bytes from the
    second-level cache; products and instructions one after the other where neither a second block is resident nor the
    next product started before the last is done.
    """
    m, n, k = (variant.constants[name] for name in "MNK")
    dtype, precision = variant.constants["DTYPE"], variant.constants["PRECISION"]
    kind = "half" if dtype != torch.float32 else precision
    blocks = machine.resident(32 * variant.warps, code)
    products = 2 * m * n * k / machine.flop[kind]
    issue = code.loop * variant.warps / 4
    read = (m + n) * k * dtype.itemsize / (machine.cache / machine.multiprocessors / machine.hertz)
    overlapped = blocks > 1 or code.overlapped or kind == "ieee"
    step = max(products, issue) if overlapped else products + issue
    return products / max(step, read)


def built_for(variant: Variant) -> Any:
    """Triton's compiled kernel; raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    order = variant.kernel.arg_names
    constants = {k: triton_dtype(v) if isinstance(v, torch.dtype) else v for k, v in variant.constants.items()}
    signature = {name: variant.signature.get(name, "constexpr") for name in order}
    aligned = {
        (order.index(name),): [["tt.divisibility", 16]]
        for name, kind in variant.signature.items()
        if kind.startswith("*")
    }
    return triton.compile(
        ASTSource(variant.kernel, signature, constants, aligned),
        target=GPUTarget(*TARGETS[variant.target]),
        options={"num_warps": variant.warps, "num_stages": variant.stages},
    )
