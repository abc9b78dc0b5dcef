"""The kernels compile for every GPU family, and do not spill on sm_90: ahead of time, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "compiled.py"


@pytest.mark.parametrize(
    ("target", "kernel"), [("sm_90", ""), ("sm_80", "graft"), ("sm_100", "permute"), ("gfx942", "combine")]
)
def test_compiles_without_spilling(target, kernel):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "--target", target, "--kernel", kernel]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows
    assert all(row["target"] == target and row["registers"] > 0 for row in rows)
    if not kernel:
        assert {row["kernel"] for row in rows} == {"permute", "graft", "combine", "similarity"}
        assert not [row for row in rows if row["spilled"]]
