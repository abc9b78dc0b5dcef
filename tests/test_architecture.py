"""Imports go down only, the library needs no benchmark tool, and a name says one thing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import regraft

ROOT = Path(__file__).parents[1]
KERNELS, LIBRARY, SUITE = (ROOT / name for name in ("kernels/regraft_kernels", "src/regraft", "bench/regraft_bench"))
HARNESS = ("regraft.cli", "regraft.__main__")
TOOLS = ("pandas", "pytest", "plotly", "vl_convert", "sklearn", "torchvision.datasets", "tabulate")


PARTICIPLE = re.compile(
    "_*([a-z]+ed|bound|built|chosen|drawn|found|held|kept|known|made|met|seen|sent|shown|taken|told|written)_*"
)
# `recorded`: `Trajectory.recorded` is a public name.
NO_PARTICIPLES = {"embed", "feed", "need", "seed", "speed", "spread", "recorded"}
CONTRACT = {"STUDY", "SCENARIOS", "TABLES", "FIGURES"}  # of every study


def modules() -> list[str]:
    """Every module of the library and of the kernels, the command apart."""
    names = []
    for package in (LIBRARY, KERNELS):
        for path in sorted(package.rglob("*.py")):
            name = ".".join([package.name, *path.relative_to(package).with_suffix("").parts])
            names.append(name.removesuffix(".__init__"))
    return [name for name in names if not name.startswith(HARNESS)]


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


def test_no_module_needs_what_one_system_alone_has():
    """A module of Python's that Windows lacks is imported inside a function, which says what it gives instead."""
    posix = {"fcntl", "grp", "pwd", "resource", "syslog", "termios"}
    for path in (path for package in (KERNELS, LIBRARY, SUITE) for path in package.rglob("*.py")):
        imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {getattr(node, "module", None) or alias.name for node in imports for alias in node.names}
        assert not names & posix, path


def test_type_checkers_see_the_public_names():
    tree = ast.parse((ROOT / "src" / "regraft" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: f"{node.module}.{alias.name}" for node in imports for alias in node.names if alias.asname}
    table = {name: f"regraft.{path.replace(':', '.')}" for name, path in regraft._PUBLIC.items()}
    table |= {name: f"regraft_bench.studies.{name}" for name in regraft._OF_THE_SUITE}
    assert seen | {"activations": "regraft.fusion.repair"} == table
    assert "__getattr__" not in {getattr(node, "name", "") for node in tree.body}, "any name would pass"


def test_the_names_are_resolved_on_first_use():
    words = "import regraft, sys; assert 'torch' not in sys.modules; regraft.transfer; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", words], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = regraft.nothing


@pytest.mark.parametrize("package", [KERNELS, LIBRARY, SUITE], ids=lambda path: path.name)
def test_a_name_says_one_thing(package):
    """No public name in two modules (`reference` mirrors what it checks); no function named by a bare participle."""
    places, participles = defaultdict(set), set()
    for path in package.rglob("*.py"):
        tree, module = ast.parse(path.read_text(encoding="utf-8")), str(path.relative_to(package))
        for node in tree.body if not module.startswith("reference") else ():
            for target in getattr(node, "targets", [getattr(node, "target", node)]):
                places[getattr(target, "name", getattr(target, "id", "_"))].add(module)
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)} - NO_PARTICIPLES
        participles |= {f"{module}: {name}" for name in names if PARTICIPLE.fullmatch(name)}
    public = {name: where for name, where in places.items() if name[0] != "_" and name not in CONTRACT}
    assert not participles
    assert not {name: where for name, where in public.items() if len(where) > 1}
