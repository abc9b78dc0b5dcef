"""Both wheels, built and installed into an empty folder, work outside the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def install(project: Path, folder: Path):
    """Build and install a project's wheel. Returns a function that runs Python with it, in the folder."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, site = folder / "wheels", folder / "site"
    build = [*pip, "wheel", str(project), "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)]
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
    run = install(ROOT, tmp_path)
    code = "import regraft as a, regraft_kernels as b, regraft_bench as c; print(a.__file__, b.__file__, c.__file__)"
    assert all(file.startswith(str(tmp_path / "site")) for file in run("-c", code).split())
    text = run("-m", "regraft", "--help")
    assert all(verb in text for verb in ("port", "match", "fuse", "symmetry", "bench", "report", "against"))
    run("-m", "regraft", "bench", "--scenario", "digits-fixed", "--seeds", "1", "--results", "rows")
    assert list(tmp_path.glob("rows/*/rows.jsonl"))


def test_the_wheel_of_the_kernels(tmp_path):
    run = install(ROOT / "kernels", tmp_path)
    assert not (tmp_path / "site" / "regraft").exists()
    code = "import regraft_kernels as rk, torch; print(rk.__file__, rk.assign(torch.eye(2)).perm.tolist())"
    file, _, perm = run("-c", code).strip().partition(" ")
    assert file.startswith(str(tmp_path / "site")) and perm == "[0, 1]"
