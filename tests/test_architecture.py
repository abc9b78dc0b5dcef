"""Imports go down only, and the library needs no benchmark tool."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import regraft

ROOT = Path(__file__).parents[1]
HARNESS = ("regraft.cli", "regraft_bench.session", "regraft.__main__", "regraft_bench")
TOOLS = ("pandas", "pytest", "plotly", "vl_convert", "sklearn", "torchvision.datasets", "tabulate")


def modules() -> list[str]:
    """Every module of the library and of the kernels, studies and harness apart."""
    found = []
    for package in (ROOT / "src" / "regraft", ROOT / "kernels" / "regraft_kernels"):
        for path in sorted(package.rglob("*.py")):
            name = ".".join([package.name, *path.relative_to(package).with_suffix("").parts])
            found.append(name.removesuffix(".__init__"))
    return [name for name in found if not name.startswith(HARNESS)]


def test_imports_go_down_only():
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_of_the_library_works_without_the_bench_tools():
    words = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in {TOOLS!r}:
            raise ModuleNotFoundError(f"no module named {{name}}", name=name)
sys.meta_path.insert(0, Absent())
import importlib
for name in {modules()!r}:
    importlib.import_module(name)
found = [name for name in {TOOLS!r} if name in sys.modules]
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_type_checkers_see_the_public_names():
    tree = ast.parse((ROOT / "src" / "regraft" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in imports
        for alias in node.names
        if alias.asname
    }
    table = {name: f"regraft.{path.replace(':', '.')}" for name, path in regraft._PUBLIC.items()}
    assert seen | {"activations": "regraft.fusion.repair"} == table


def test_the_names_are_resolved_on_first_use():
    words = "import regraft, sys; assert 'torch' not in sys.modules; regraft.transfer; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", words], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = regraft.nothing
