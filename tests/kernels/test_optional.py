"""The package alone: quick to import, and at work without triton, lapx and lapjv."""

import subprocess
import sys

import pytest
import torch

from regraft_kernels import Packing, assign, backend, permute

ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "lap", "lapjv", "regraft"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import importlib.util
real = importlib.util.find_spec
def find_spec(name, package=None):
    return None if name in ("triton", "lap", "lapjv", "regraft") else real(name, package)
importlib.util.find_spec = find_spec
import torch, regraft_kernels as rk
S = torch.eye(4).roll(1, 1)
found = rk.assign(S)
assert (found.backend, found.perm.tolist()) == ("scipy", [1, 2, 3, 0])
packing = rk.Packing.build({"w": (4, 2)}, {"w": ("a", None)})
w = {"w": torch.arange(8.0).view(4, 2)}
assert rk.permute(w, {"a": found.perm}, packing)["w"][0].tolist() == [2.0, 3.0]
assert rk.graft(w, w, w, [1.0], {"a": found.perm}, packing)["w"].shape == (1, 4, 2)
assert rk.combine([w, w], [[1.0, 1.0]])["w"][0, 3, 1] == 14
assert rk.similarity([rk.Term(w["w"][None], w["w"][None], 0)]).shape == (4, 4)
for call in (lambda: rk.permute(w, {"a": found.perm}, packing, backend="triton"),
             lambda: rk.assign(S, backend="lapx"), lambda: rk.assign(S, backend="lapjv")):
    try:
        call()
    except ImportError as error:
        assert "is not installed" in str(error)
    else:
        raise AssertionError("no error")
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_works_without_its_optional_packages():
    run(ALONE)


def test_importing_it_loads_nothing_heavy_but_torch_and_triton():
    code = "import sys, torch; before = set(sys.modules); import regraft_kernels; print(*set(sys.modules) - before)"
    loaded = {name.split(".")[0] for name in run(code).split()}
    assert not loaded & {"lap", "lapjv", "scipy", "regraft", "pandas"}


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(backend, "INTERPRETING", False)
    packing = Packing.build({"w": (2,)}, {"w": ("a",)})
    with pytest.raises(ValueError, match="'triton' needs tensors on a GPU"):
        permute({"w": torch.zeros(2)}, {"a": torch.arange(2)}, packing, backend="triton")
    assert assign(torch.eye(2)).perm.tolist() == [0, 1]
