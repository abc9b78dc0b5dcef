"""Every kernel and tile, compiled ahead of time for every GPU family, and what the machine code says.

Needs triton and no GPU: NVIDIA's numbers come from `cuobjdump` and `nvdisasm`, which the triton wheel carries, AMD's
from the assembly.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from regraft.clock import Clock
from regraft.data import MissingData
from regraft.studies.study import Measured, Method, Setting
from regraft_kernels.backend import HAS_TRITON, INTERPRETING, triton_dtype
from regraft_kernels.cases import Variant, kernels

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


def methods() -> tuple[Method, ...]:
    """One for every variant that a kernel file exports."""
    variants = [variant for kernel in kernels().values() for variant in kernel.VARIANTS]
    variants.sort(key=lambda variant: list(TARGETS).index(variant.target))
    return tuple(
        Method(f"{v.target} {v.label}", partial(_measure, v), {"warps": v.warps, "stages": v.stages})
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
    read = _amd(built.asm["amdgcn"]) if "amdgcn" in built.asm else _nvidia(built.asm["cubin"])
    values = {**read, "shared memory [bytes]": built.metadata.shared}
    return Measured({name: float(value) for name, value in values.items()}, cost=clock.seconds)


def built_for(variant: Variant) -> Any:
    """Triton's compiled kernel; raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    order = variant.kernel.arg_names
    constants = {
        k: triton_dtype(v) if isinstance(v, torch.dtype) else v for k, v in variant.constants.items()
    }
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


def _nvidia(cubin: bytes) -> dict[str, int]:
    """Per thread: registers and spilled bytes; static instructions (SASS), and those that move 16 bytes globally."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "--print-code", file.name)
    registers, stack, local = (int(_found(rf"{key}:(\d+)", usage)) for key in ("REG", "STACK", "LOCAL"))
    instructions = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE)
    wide = [name for name in instructions if re.match(r"(LDG|STG|LDGSTS)\b.*\.128", name)]
    return {
        "registers": registers,
        "spilled [bytes]": stack + local,
        "instructions": len([name for name in instructions if name != "NOP"]),
        "16-byte moves": len(wide),
    }


def _tool(name: str, *arguments: str) -> str:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def _amd(assembly: str) -> dict[str, int]:
    count, spilled = (
        int(_found(rf"\.{key}:\s*(\d+)", assembly)) for key in ("vgpr_count", "vgpr_spill_count")
    )
    instructions = re.findall(r"^\s+((?:[svd]|ds|buffer|global|flat)_\w+)", assembly, re.MULTILINE)
    wide = [name for name in instructions if re.match(r"(global|buffer)_(load|store)_dwordx4", name)]
    return {
        "registers": count,
        "spilled [bytes]": 4 * spilled,
        "instructions": len([name for name in instructions if name != "s_nop"]),
        "16-byte moves": len(wide),
    }


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's report has no {pattern}")
    return found[1]
