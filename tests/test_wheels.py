"""Both wheels, built and installed into an empty folder, work outside the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def install(what: list[str], folder: Path):
    """Build the wheels of what pip is asked for, and install them. Returns a function that runs Python with them, in
    the folder."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, site = folder / "wheels", folder / "site"
    build = [*pip, "wheel", *what, "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)]
    subprocess.run(build, check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), *map(str, wheels.iterdir())], check=True)

    def run(*arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(site)}
        command = [sys.executable, "-P", *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_the_wheel_of_all_three_packages(tmp_path):
    run = install([str(ROOT)], tmp_path)
    code = "import regraft as a, regraft_kernels as b, regraft_bench as c; print(a.__file__, b.__file__, c.__file__)"
    assert all(file.startswith(str(tmp_path / "site")) for file in run("-c", code).split())
    text = run("-m", "regraft", "--help")
    assert all(verb in text for verb in ("port", "match", "fuse", "symmetry", "bench", "report", "against"))
    run("-m", "regraft", "bench", "--scenario", "digits-fixed", "--seeds", "1", "--results", "rows")
    assert list(tmp_path.glob("rows/*/rows.jsonl"))


def test_the_kernels_are_one_line_of_another_projects_requirements(tmp_path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"regraft-kernels @ {(ROOT / 'kernels').as_uri()}\n")
    run = install(["-r", str(requirements)], tmp_path)
    assert not (tmp_path / "site" / "regraft").exists()
    code = """
import torch, regraft_kernels as rk
perm = rk.assign(torch.eye(3).roll(1, 1)).perm
packing = rk.Packing.build({"w": (3,)}, {"w": ("units",)})
print(rk.__file__, rk.permute({"w": torch.arange(3)}, {"units": perm}, packing)["w"].tolist())
"""
    file, _, moved = run("-c", code).strip().partition(" ")
    assert file.startswith(str(tmp_path / "site")) and moved == "[1, 2, 0]"
