"""The kernels compile for every GPU family, and their machine code meets its goals; no GPU is needed."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from regraft_bench.kernels.compiled import GOALS, MACHINES
from regraft_bench.kernels.machine_code import read_machine_code
from regraft_bench.kernels.variants import operators
from regraft_kernels.backend import HAS_TRITON
from regraft_kernels.launch import FAMILIES

COMPILE = """
import json, re, sys
from regraft_bench.kernels.compiled import compile_methods
for method in compile_methods():
    if re.search(sys.argv[1], method.name):
        found = method.run(None)
        print(json.dumps([method.name, {**found.values}, {**found.notes}]))
"""
# Half precisions compile alike; the scenario "compiled" of the study micro has every variant.
WANTED = (
    "sm_90 (permute int32|(graft|combine two) float32 .*aligned|similarity (float32 tf32x3|bfloat16 128))",
    "sm_90 similarity float32 tf32 128",
    "sm_80 (graft float32 rows aligned|similarity (float32 tf32x3|bfloat16) 128)",
    "sm_100 (combine two float32 aligned|similarity bfloat16 128x128)",
    "sm_120 (permute int32 columns aligned|similarity float32 tf32x3)",
    "gfx942 (permute int32 rows aligned|graft float32 rows aligned|similarity bfloat16 128)",
)
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="no triton")


@pytest.fixture(scope="module")
def compiled():
    """(values, notes) by name of the variants that WANTED names, compiled once for all tests."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, "|".join(WANTED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: (values, notes) for name, values, notes in map(json.loads, done.stdout.splitlines())}


def test_every_kernel_has_variants_for_every_family():
    for name, operator in operators().items():
        assert {variant.target for variant in operator.variants} == set(FAMILIES), name
        labels = [(variant.target, variant.label) for variant in operator.variants]
        assert len(set(labels)) == len(labels), name


def test_every_goal_concerns_something():
    variants = [variant for operator in operators().values() for variant in operator.variants]
    for goal in GOALS:
        assert any(goal.concerns(variant) for variant in variants), goal


def test_machine_code_meets_its_goals(compiled):
    for start in WANTED:
        assert any(re.search(start, name) for name in compiled), start
    assert {name.split()[1] for name in compiled if name.startswith("sm_90")} == set(operators())
    assert {name.split()[0] for name in compiled} == set(FAMILIES)
    for name, (values, _) in compiled.items():
        assert values["registers"] > 0, name
        assert values["instructions"] > 50, name
    assert {name: notes for name, (_, notes) in compiled.items() if notes} == {}


def test_the_goals_of_products_and_moves_are_read_from_their_code(compiled):
    """That the numbers are there at all: a reader that finds nothing would meet most goals."""
    tf32x3 = compiled["sm_90 similarity float32 tf32x3 64x128x32"][0]
    assert (tf32x3["matrix instructions"], tf32x3["copies in flight"]) == (12, 2)
    assert 300 < tf32x3["loop instructions"] <= 600
    half = compiled["sm_90 similarity bfloat16 128x128x64"][0]
    assert (half["matrix instructions"], half["16-byte stores"]) == (4, 16)
    assert 50 < half["loop instructions"] <= 150
    aligned, general = (compiled[f"sm_90 permute int32 rows {kind}"][0] for kind in ("aligned", "general"))
    assert aligned["16-byte stores"] and not aligned["narrower stores"]
    assert general["narrower stores"] and not general["16-byte stores"]
    assert 5 < aligned["instructions per 16 bytes"] <= 16 < general["instructions per 16 bytes"]


def test_predictions_are_shares(compiled):
    for name, (values, _) in compiled.items():
        for machine in MACHINES:
            share = values.get(f"predicted share, {machine}")
            assert (share is not None) == name.startswith("sm_90"), name
            assert share is None or 0 < share <= 1, name


def test_amds_loop_is_the_innermost_that_works():
    """The lines of a made-up program: a loop in a loop, in which a product of matrices stands twice."""
    text = """
    v_mfma_f32_32x32x8_bf16 a, b
.LBB0_1:
    global_load_dwordx4 v[0:3], v4, s[0:1]
.LBB0_2:
    global_load_dwordx2 v[0:3], v4, s[0:1]
    v_mfma_f32_32x32x8_bf16 a, b
    s_cbranch_scc1 .LBB0_2
    s_cbranch_scc0 .LBB0_1
    global_store_dwordx4 v4, v[0:3], s[0:1]
    global_store_short v4, v0, s[0:1]
    .vgpr_count: 12
    .vgpr_spill_count: 1
"""
    asm = {"amdgcn": text, "llir": "%1 = sdiv i64 %a, %b\n"}
    code = read_machine_code(SimpleNamespace(asm=asm, metadata=SimpleNamespace(shared=7)))
    assert (code.registers, code.spilled, code.shared, code.divisions) == (12, 4, 7, 1)
    assert (code.instructions, code.loop, code.matrix) == (8, 3, 1)
    assert (code.loads, code.narrow_loads, code.stored) == (1, 1, (128, 16))
