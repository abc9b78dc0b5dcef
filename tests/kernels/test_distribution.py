"""The distribution of its own: what it needs and carries, and that it works without triton, lapx, lapjv and regraft."""

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from regraft_kernels import Packing, assign, backend, permute

ROOT = Path(__file__).parents[2]
REFUSE = """
import importlib.util, sys
REFUSED = ("triton", "lap", "lapjv", "regraft", "regraft_bench")
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in REFUSED else real(name, package)
"""
WITHOUT_OPTIONAL = """
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


def test_works_without_its_optional_packages_and_without_regraft():
    run(REFUSE + WITHOUT_OPTIONAL)


def test_the_example_of_its_readme_runs_alone():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "kernels" / "README.md").read_text(), re.DOTALL)
    run(REFUSE + example)


def test_its_script_times_every_kernel(tmp_path, monkeypatch, capsys):
    script = ROOT / "kernels" / "examples" / "time_kernels.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--sizes", "4", "8", "--seconds", "1e-4", "--out", str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    for kernel in ("permute", "graft", "combine", "similarity", "assign"):
        rows = (tmp_path / f"{kernel}.csv").read_text().splitlines()
        assert [row.split(",")[:2] for row in rows[1::2]] == [["4", "regraft_kernels"], ["8", "regraft_kernels"]]
        assert float(rows[2].split(",")[2]) > 0 and f"{kernel:12} n = 8" in printed
        assert "<svg" in (tmp_path / f"{kernel}.svg").read_text()


def test_importing_it_loads_nothing_but_its_dependencies():
    code = "import sys, torch; before = set(sys.modules); import regraft_kernels; print(*set(sys.modules) - before)"
    loaded = {name.split(".")[0] for name in run(code).split()} - set(sys.stdlib_module_names)
    loaded = {name for name in loaded if not name.startswith("_sysconfigdata")}
    assert loaded - {"triton", "numpy", "torch", "cython_runtime"} == {"regraft_kernels"}


def test_both_distributions_carry_it_with_the_same_requirements():
    whole, alone = (tomllib.loads((ROOT / place / "pyproject.toml").read_text()) for place in (".", "kernels"))
    assert alone["project"]["dependencies"] == ["torch>=2.11", "numpy>=1.26", "scipy>=1.14"]
    assert set(alone["project"]["dependencies"]) <= set(whole["project"]["dependencies"])
    extras = [project["project"]["optional-dependencies"]["assignment"] for project in (whole, alone)]
    assert extras[0] == extras[1]
    wheels = [project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] for project in (whole, alone)]
    assert wheels == [["src/regraft", "kernels/regraft_kernels", "bench/regraft_bench"], ["regraft_kernels"]]
    assert (ROOT / "kernels" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(backend, "INTERPRETING", False)
    packing = Packing.build({"w": (2,)}, {"w": ("a",)})
    with pytest.raises(ValueError, match="'triton' needs tensors on a GPU"):
        permute({"w": torch.zeros(2)}, {"a": torch.arange(2)}, packing, backend="triton")
    assert assign(torch.eye(2)).perm.tolist() == [0, 1]
