"""The kernels compile for every GPU family, and do not spill on sm_90: ahead of time, in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from regraft_kernels.backend import HAS_TRITON
from regraft_kernels.cases import kernels
from regraft_kernels.tiles import FAMILIES

COMPILE = """
import json, sys
from regraft.studies.micro.compiled import methods
for method in methods():
    if method.name.startswith(tuple(sys.argv[1:])):
        print(json.dumps([method.name, dict(method.run(None).values)]))
"""


def test_every_kernel_has_variants_for_every_family():
    for name, kernel in kernels().items():
        assert {variant.target for variant in kernel.VARIANTS} == set(FAMILIES), name
        labels = [(variant.target, variant.label) for variant in kernel.VARIANTS]
        assert len(set(labels)) == len(labels), name


@pytest.mark.skipif(not HAS_TRITON, reason="no triton")
def test_compiles_without_spilling():
    # Half precisions compile alike; the scenario "compiled" of the study micro has every variant.
    wanted = [
        f"sm_90 {kind}"
        for kind in ("permute int32", "permute int64", "graft float32", "graft float64", "combine float32")
    ]
    wanted += ["sm_90 similarity float32", "sm_90 similarity bfloat16"]
    wanted += ["sm_80 graft float32", "sm_100 permute int32", "gfx942 combine float32"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *wanted], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = dict(map(json.loads, done.stdout.splitlines()))
    for start in wanted:
        assert any(name.startswith(start) for name in found), start
    for name, values in found.items():
        assert values["registers"] > 0, name
        assert values["instructions"] > 50, name
    assert {name.split()[1] for name in found if name.startswith("sm_90")} == set(kernels())
    assert not [
        name for name, values in found.items() if name.startswith("sm_90") and values["spilled [bytes]"]
    ]
