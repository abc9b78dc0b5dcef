"""Compile every kernel and tile configuration ahead of time, and read what the compilers made of them.

    python bench/compiled.py [--target sm_90 ...] [--results DIRECTORY]

Needs triton, and no GPU: NVIDIA's numbers come from `cuobjdump`, which the triton wheel carries, AMD's from the
assembly. Exits with 1 where a kernel for sm_90 spills registers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from regraft_kernels.backend import Kernel, triton_dtype
from regraft_kernels.combine import _combine_kernel
from regraft_kernels.graft import _graft_kernel
from regraft_kernels.permute import _permute_kernel
from regraft_kernels.similarity import PRECISIONS, _similarity_kernel
from regraft_kernels.tiles import FAMILIES, Family

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MUST_NOT_SPILL = "sm_90"


@dataclass(frozen=True)
class Variant:
    """One kernel with one set of compile-time arguments."""

    kernel: Kernel
    label: str
    signature: dict[str, str]
    constants: dict[str, object]
    warps: int
    stages: int = 3


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of a variant: per thread registers and spilled bytes, bytes of shared memory."""

    target: str
    kernel: str
    variant: str
    warps: int
    registers: int
    spilled: int
    shared: int


def variants(family: Family) -> Iterator[Variant]:
    """Every kernel, dtype, precision and tile that the launchers can ask for on this family."""
    move = {"ROWS": family.move.rows, "COLUMNS": family.move.columns}
    tables = {"addresses": "*i64", "count": "i32", "segments": "*i64", "tiles": "*i64"}
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        yield Variant(
            _permute_kernel, _name(dtype), {**tables, "vectors": "*i64"},
            {"DTYPE": triton_dtype(dtype), **move}, family.move.warps,
        )  # fmt: skip
    for dtype in FLOATING:
        wide = torch.promote_types(dtype, torch.float32)
        types = {"DTYPE": triton_dtype(dtype), "WIDE": triton_dtype(wide)}
        pointer = "*fp64" if wide == torch.float64 else "*fp32"
        graft = {**tables, "vectors": "*i64", "vector_length": "i32", "scales": pointer, "steps": "i32"}
        yield Variant(_graft_kernel, _name(dtype), graft, {**types, **move}, family.move.warps)
        combine = {**tables, "coefficients": pointer, "steps": "i32", "sources": "i32"}
        block = {"BLOCK": family.flat.block}
        yield Variant(_combine_kernel, _name(dtype), combine, {**types, **block}, family.flat.warps)
    pointers = {"programs": "*i64", "parts": "*i64", "rows": "*i64", "columns": "*i64", "out": "*fp32"}
    for precision in PRECISIONS:
        if precision not in family.substitutes:
            yield from _dots(family, torch.float32, precision, pointers)
    for dtype in (torch.bfloat16, torch.float16):
        yield from _dots(family, dtype, "half", pointers)


def _dots(family: Family, dtype: torch.dtype, precision: str, signature: dict[str, str]) -> Iterator[Variant]:
    for tile in dict.fromkeys(family.dot[precision]):
        constants = {
            "DTYPE": triton_dtype(dtype),
            "FACTOR": triton_dtype(dtype),
            "PRECISION": "ieee" if precision == "half" else precision,
            "M": tile.m,
            "N": tile.n,
            "K": tile.k,
        }
        label = f"{_name(dtype)} {'' if precision == 'half' else precision + ' '}{tile.m}x{tile.n}x{tile.k}"
        yield Variant(_similarity_kernel, label, signature, constants, tile.warps, tile.stages)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compile_variant(variant: Variant, target: str) -> Compiled:
    """Compile one variant for one target; raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    order = variant.kernel.jit.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in order}
    aligned = {
        (order.index(name),): [["tt.divisibility", 16]]
        for name, kind in variant.signature.items()
        if kind.startswith("*")
    }
    source = ASTSource(variant.kernel.jit, signature, variant.constants, aligned)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    built = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    registers, spilled = _amd(built.asm["amdgcn"]) if "amdgcn" in built.asm else _nvidia(built.asm["cubin"])
    return Compiled(
        target, variant.kernel.__name__.strip("_").removesuffix("_kernel"), variant.label, variant.warps,
        registers, spilled, built.metadata.shared,
    )  # fmt: skip


def _nvidia(cubin: bytes) -> tuple[int, int]:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _amd(assembly: str) -> tuple[int, int]:
    count, spilled = (
        int(re.search(rf"\.{key}:\s*(\d+)", assembly)[1]) for key in ("vgpr_count", "vgpr_spill_count")
    )
    return count, 4 * spilled


def table(rows: list[Compiled]) -> str:
    """The rows as Markdown, with the versions that made them."""
    import triton

    lines = [
        "# The kernels, compiled ahead of time",
        "",
        f"triton {triton.__version__}, torch {torch.__version__}; made by `python bench/compiled.py` without a GPU. "
        "Registers and spilled bytes are per thread, shared memory is in bytes per block.",
        "",
        "| target | kernel | variant | warps | registers | spilled | shared |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r.target} | {r.kernel} | {r.variant} | {r.warps} | {r.registers} | {r.spilled} | {r.shared} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--results", type=Path, help="write kernels-compiled.md and .json there")
    arguments = parser.parse_args()
    rows = []
    for target in arguments.target or list(TARGETS):
        for variant in variants(FAMILIES[target]):
            if arguments.kernel and arguments.kernel not in variant.kernel.__name__:
                continue
            rows.append(compile_variant(variant, target))
            print(json.dumps(asdict(rows[-1])), flush=True)
    if arguments.results:
        for suffix, text in (
            (".md", table(rows)),
            (".json", json.dumps([asdict(r) for r in rows], indent=1)),
        ):
            path = arguments.results / f"kernels-compiled{suffix}"
            beside = path.with_suffix(suffix + ".tmp")
            beside.write_text(text)
            beside.replace(path)
    spilling = [r for r in rows if r.target == MUST_NOT_SPILL and r.spilled]
    for r in spilling:
        print(f"{r.target} {r.kernel} {r.variant} spills {r.spilled} bytes", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # which would keep triton from compiling anything
    sys.exit(main())
