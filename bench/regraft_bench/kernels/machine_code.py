"""What machine code says of itself: registers, widths of accesses, matrix instructions, the loop that does the work.

NVIDIA's is read from what `cuobjdump` and `nvdisasm` print of a binary (the triton wheel carries both), AMD's from its
assembly. No GPU is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class MachineCode:
    """One compiled kernel. Counts are static and of one thread; `loop` is the loop that does the work: the innermost
    with a matrix instruction; where there is none, that stores and loads as often or oftener, or that multiplies.

    registers, spilled [bytes]; shared [bytes] of a block; instructions: all but those that only fill up. divisions: of
    integers, left to run time. stored: widths in bits of the global stores. matrix, loads, narrow_loads,
    narrow_shared_stores: in the loop; narrow are those of less than 16 bytes. in_flight: groups of asynchronous copies
    that the loop does not wait for. overlapped: whether it starts a matrix product before the last one is done.
    """

    registers: int
    spilled: int
    shared: int
    instructions: int
    loop: int
    divisions: int
    stored: tuple[int, ...]
    stored_in_loop: tuple[int, ...]
    matrix: int
    loads: int
    narrow_loads: int
    narrow_shared_stores: int
    in_flight: int
    overlapped: bool

    def instructions_to_store(self, stored: float) -> float:
        """Instructions of a thread that stores so many bytes: the loop as often as that takes, the rest once."""
        if not self.stored_in_loop:
            return self.instructions
        trips = max(1.0, stored / (sum(self.stored_in_loop) / 8))
        return self.instructions + (trips - 1) * self.loop


@dataclass(frozen=True)
class _Dialect:
    """How a vendor's disassembly writes what is counted: patterns of an instruction's name, or of all of its text."""

    label: str
    branch: str
    matrix: str
    multiply: str
    load: str
    store: str
    shared_store: str
    filler: str


_NVIDIA = _Dialect(
    label=r"\s*(\.L_x_\d+):",
    branch=r"BRA\b.*`\((\.L_x_\d+)\)",
    matrix=r"(HGMMA|HMMA|UTC\w*MMA)\b",
    multiply=r"FFMA",
    load=r"(LDG|LDGSTS)\b",
    store=r"STG\b",
    shared_store=r"STS\b",
    filler=r"NOP\b",
)
_AMD = _Dialect(
    label=r"(\.LBB\w+):",
    branch=r"s_c?branch\w*\s+(\.LBB\w+)",
    matrix=r"v_mfma",
    multiply=r"v_(pk_)?fma",
    load=r"(global|buffer)_load",
    store=r"(global|buffer)_store",
    shared_store=r"ds_write",
    filler=r"s_nop",
)


def read_machine_code(built: Any) -> MachineCode:
    """Read what Triton compiled. Raises ValueError where the compiler's report lacks what is looked for."""
    if "amdgcn" in built.asm:
        text = built.asm["amdgcn"]
        registers = int(_search(r"\.vgpr_count:\s*(\d+)", text))
        spilled = 4 * int(_search(r"\.vgpr_spill_count:\s*(\d+)", text))
        lines = re.findall(r"^(?:\.LBB\w+:|\s+(?:[svd]|ds|buffer|global|flat)_\w+.*)", text, re.MULTILINE)
        dialect, instructions = _AMD, [line.strip() for line in lines]
    else:
        usage, text = _disassemble(built.asm["cubin"])
        registers, stack, local = (int(_search(rf"{k}:(\d+)", usage)) for k in ("REG", "STACK", "LOCAL"))
        spilled = stack + local
        pattern = r"^\s*(?:/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\S.*?);|(\.L_x_\d+:))"
        dialect, instructions = _NVIDIA, ["".join(pair) for pair in re.findall(pattern, text, re.MULTILINE)]
    divisions = len(re.findall(r"= [su](?:div|rem) ", built.asm["llir"]))
    return _count(dialect, instructions, registers, spilled, built.metadata.shared, divisions)


def _count(
    dialect: _Dialect, lines: Sequence[str], registers: int, spilled: int, shared: int, divisions: int
) -> MachineCode:
    def select(lines: Sequence[str], pattern: str) -> list[str]:
        return [line for line in lines if re.match(pattern, line)]

    def drop_fillers(lines: Sequence[str]) -> list[str]:
        return [x for x in lines if not re.match(f"{dialect.filler}|{dialect.label}", x)]

    def store_widths(lines: Sequence[str]) -> tuple[int, ...]:
        return tuple(_width(line) for line in select(lines, dialect.store))

    loop = _working_loop(dialect, lines)
    waits = [int(x, 0) for line in loop for x in re.findall(r"^DEPBAR\.LE SB\d, (\w+)", line)]
    products = [int(x, 0) for line in loop for x in re.findall(r"^WARPGROUP\.DEPBAR\.LE gsb0, (\w+)", line)]
    loads = select(loop, dialect.load)
    return MachineCode(
        registers=registers,
        spilled=spilled,
        shared=shared,
        instructions=len(drop_fillers(lines)),
        loop=len(drop_fillers(loop)),
        divisions=divisions,
        stored=store_widths(lines),
        stored_in_loop=store_widths(loop),
        matrix=len(select(loop, dialect.matrix)),
        loads=len(loads),
        narrow_loads=len([line for line in loads if _width(line) < 128]),
        narrow_shared_stores=len([x for x in select(loop, dialect.shared_store) if _width(x) < 128]),
        in_flight=min(waits, default=0),
        overlapped=min(products, default=0) > 0,
    )


def _working_loop(dialect: _Dialect, lines: Sequence[str]) -> Sequence[str]:
    """The lines from a label to a branch back to it; none where the code has no loop that works."""
    labels = {found[1]: k for k, line in enumerate(lines) if (found := re.match(dialect.label, line))}
    loops = []
    for end, line in enumerate(lines):
        found = re.match(dialect.branch, line)
        if found and labels.get(found[1], end) < end:
            loops.append(lines[labels[found[1]] : end + 1])
    products, multiplies = ([x for x in loops if _matching(p, x)] for p in (dialect.matrix, dialect.multiply))
    moves = [x for x in loops if 0 < _matching(dialect.store, x) <= _matching(dialect.load, x)]
    return min(products or moves or multiplies, key=len, default=[])


def _matching(pattern: str, lines: Sequence[str]) -> int:
    return sum(bool(re.match(pattern, line)) for line in lines)


def _width(line: str) -> int:
    """Bits that an access moves for one thread."""
    name = line.split()[0]
    if name.startswith(("LD", "ST")):
        found = re.search(r"\.(?:[US]?(8|16|64|128))\b", name)
        return int(found[1]) if found else 32
    found = re.search(r"_(?:dword|b|short|byte|ushort|ubyte)(?:x)?(\d*)(?:_|$)", name)
    if "dword" in name:
        return 32 * int(found[1] or 1) if found else 32
    if "_b" in name and found and found[1]:
        return int(found[1]) * (2 if "write2" in name else 1)
    return 16 if "short" in name else 8


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """What it uses, and its instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return (
            _tool("cuobjdump", "--dump-resource-usage", file.name),
            _tool("nvdisasm", "--print-code", file.name),
        )


def _tool(name: str, *arguments: str) -> str:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def _search(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's report has no {pattern}")
    return found[1]
