"""The GPU run, tried without a GPU: with torch, triton, numpy and scipy alone, on tiny tensors, in two calls."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regraft_bench.kernels import gpu, gpu_checks
from regraft_bench.kernels.networks import Network
from regraft_bench.micro.gpu import gpu_methods

BARE = """
import sys
from importlib.metadata import requires
from packaging.requirements import Requirement

def closure(name, seen):
    if name in seen:
        return seen
    seen.add(name)
    try:
        found = requires(name) or []
    except Exception:
        return seen
    for line in found:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            closure(requirement.name.lower().replace("_", "-"), seen)
    return seen

from importlib.metadata import packages_distributions
allowed = set()
for name in ("torch", "triton", "numpy", "scipy", "pytest"):
    closure(name, allowed)
theirs = packages_distributions()
class Blocker:
    def find_spec(self, name, path=None, target=None):
        owners = [owner.lower().replace("_", "-") for owner in theirs.get(name.partition(".")[0], [])]
        if owners and not set(owners) & allowed and not name.startswith("regraft"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
for name in ("msgspec", "tyro"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name)
import runpy
sys.argv = ["gpu", *sys.argv[1:]]
runpy.run_module("regraft_bench.kernels.gpu", run_name="__main__")
"""


def call(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", BARE, "--out", str(out), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_it_needs_nothing_else_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_checks, "_backend", lambda net: "torch")
    assert gpu.main(["--out", str(tmp_path), "--dry-run", "--case", "correctness", "--case", "ceilings"]) == 0
    path = tmp_path / "rows.jsonl"
    first = [row["case"] for row in gpu.read_gpu_rows(path)]
    assert [name.partition(",")[0] for name in first] == ["correctness"] * 7 + ["ceilings"]
    path.write_text(path.read_text() + '{"case": "permute, Res')  # as a machine that was taken away leaves it
    done = call(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(gpu.read_gpu_rows(path))
    names = [row["case"] for row in rows]
    assert sorted(names) == sorted(case.name for case in gpu.cases())
    assert names[: len(first)] == first
    skipped = {row["case"]: row["failure"] for row in rows if row["failure"] is not None}
    assert all(text.startswith("not run: ") for text in skipped.values()), skipped
    assert set(skipped) == {"FGMT, Conv8, T = 30", "counters, permute, ViT-B/16"}
    for row in rows:
        assert row["values"] or row["failure"]
        assert row["versions"]["torch"] == torch.__version__
        assert row["date"]


def test_time_that_is_up_and_failures_have_their_exit_status(tmp_path, monkeypatch, capsys):
    arguments = ["--out", str(tmp_path), "--dry-run", "--case", "ceilings"]
    assert gpu.main([*arguments, "--seconds", "-1"]) == 3
    assert "1 cases are left for the next call" in capsys.readouterr().out
    monkeypatch.setattr(gpu.Bench, "copy_rate", lambda bench: 1 / 0)
    assert gpu.main(arguments) == 1
    monkeypatch.undo()
    assert gpu.main(arguments) == 0
    failed, measured = gpu.read_gpu_rows(tmp_path / "rows.jsonl")
    assert failed["failure"].startswith("ZeroDivisionError: division by zero (test_gpu.py:")
    assert measured["failure"] is None
    assert gpu.main(arguments) == 0
    assert len(list(gpu.read_gpu_rows(tmp_path / "rows.jsonl"))) == 2


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "new")])
    assert "there is no CUDA device here; --dry-run tries the script without one" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_cases_have_names_of_their_own_and_are_the_study_s():
    names = [case.name for case in gpu.cases()]
    assert len(set(names)) == len(names)
    assert [method.name for method in gpu_methods()] == names


@pytest.mark.parametrize(
    ("kernel", "check"),
    [
        *((kernel, gpu_checks.check_network) for kernel in ("permute", "graft", "combine", "similarity")),
        *((kernel, gpu_checks._halves) for kernel in ("permute", "graft", "combine")),
    ],
)
def test_the_checks_find_errors_of_a_lesser_precision(kernel, check, monkeypatch):
    """A result that went through the next lesser dtype is beyond what is allowed."""
    monkeypatch.setattr(gpu_checks, "_backend", lambda net: "torch")
    net, right = Network.of(gpu.TINY_SHAPES, torch.device("cpu")), getattr(gpu_checks.rk, kernel)
    less = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float8_e5m2, torch.float16: torch.bfloat16}

    def spoil(*args, **kwargs):
        result = right(*args, **kwargs)
        if kernel == "similarity":
            return result * (1 + 2**-7)
        return {name: t.to(less[t.dtype]).to(t.dtype) for name, t in result.items()}

    check(net)
    monkeypatch.setattr(gpu_checks.rk, kernel, spoil)
    with pytest.raises(ArithmeticError, match=kernel):
        check(net)
