"""Mutation testing: how many small faults in the code make a test fail. Run it with `make mutants`; it takes hours.

A fixed sample of mutants is drawn: comparisons that are flipped, + for -, * for /, numbers that are one larger, `not`
left out, the first two arguments exchanged. Each is planted in a copy of the tree, and the tests that run its lines (or
those of its folder, where none does: constants, children of tests) run until one fails. Which tests run a line is
measured once a commit. Verdicts are appended to a file: a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from coverage import CoverageData

ROOT = Path(__file__).resolve().parents[1]
CODE = {
    "src/regraft": "tests",
    "kernels/regraft_kernels": "tests/kernels",
    "bench/regraft_bench": "tests/bench",
}
OPERATORS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
}  # fmt: skip


def mutate(node: ast.AST) -> ast.AST | None:
    """Another node in its place; None where there is none of these kinds."""
    other = copy.deepcopy(node)
    if isinstance(other, ast.Compare) and type(other.ops[0]) in OPERATORS:
        other.ops[0] = OPERATORS[type(other.ops[0])]()
    elif isinstance(other, ast.BinOp) and type(other.op) in OPERATORS:
        other.op = OPERATORS[type(other.op)]()
    elif isinstance(other, ast.Constant) and type(other.value) in (int, float):
        other.value += 1
    elif isinstance(other, ast.UnaryOp) and isinstance(other.op, ast.Not):
        return other.operand
    elif isinstance(other, ast.Call) and len(other.args) > 1:
        if any(isinstance(argument, ast.Starred) for argument in other.args[:2]):
            return None
        other.args[:2] = reversed(other.args[:2])
        return None if ast.unparse(other) == ast.unparse(node) else other
    else:
        return None
    return other


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run: no annotations, and nothing in f-strings, whose places are not known."""
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if (
                isinstance(child, ast.AST)
                and name not in ("annotation", "returns")
                and not isinstance(child, ast.JoinedStr)
            ):
                yield child
                yield from walk(child)


def find_mutants(root: Path) -> list[tuple[str, int, str, str, bytes, int]]:
    """(file, line, before, after, the whole file with it, its last line) of every mutant there is."""
    mutants = []
    for file in sorted(file for folder in CODE for file in (root / folder).rglob("*.py")):
        source = file.read_bytes()
        starts = [0]
        for line in source.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        for node in walk(ast.parse(source)):
            if (other := mutate(node)) is not None:
                begin, end = (
                    starts[node.lineno - 1] + node.col_offset,
                    starts[node.end_lineno - 1] + node.end_col_offset,
                )
                after = f"({ast.unparse(other)})"
                whole = source[:begin] + after.encode() + source[end:]
                mutants.append(
                    (
                        str(file.relative_to(root)),
                        node.lineno,
                        source[begin:end].decode(),
                        after,
                        whole,
                        node.end_lineno,
                    )
                )
    return mutants


def copy_tree(tree: Path) -> None:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)


def run_tests(tree: Path, arguments: Sequence[str], seconds: float | None = None) -> int:
    """The exit status of pytest in a copy of the tree. Raises subprocess.TimeoutExpired."""
    paths = os.pathsep.join(str(tree / folder) for folder in ("src", "kernels", "bench"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, timeout=seconds, cwd=tree, env=env).returncode


def measure_coverage(tree: Path) -> dict[str, dict[int, set[str]]]:
    """Of each file and line of the code the tests that run it: measured by the whole suite, once a commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    kept = ROOT / ".cache" / f"mutants-{commit.stdout.strip()}.coverage"
    if not kept.is_file():
        print("running the whole suite once, to see which tests run which lines", flush=True)
        run_tests(tree, ["-n", "auto", *(f"--cov={folder}" for folder in CODE), "--cov-context=test", "--cov-report="])
        kept.parent.mkdir(exist_ok=True)
        shutil.copy(tree / ".coverage", kept)
    data = CoverageData(str(kept))
    data.read()
    return {
        file[file.rindex("/tree/") + len("/tree/") :]: {
            line: {context.partition("|")[0] for context in contexts if context}
            for line, contexts in data.contexts_by_lineno(file).items()
        }
        for file in data.measured_files()
    }


def find_tests(file: str, lines: range, coverage: dict[str, dict[int, set[str]]]) -> list[str]:
    """The tests that run any of these lines of a file of code, those of its own folder first; else that folder."""
    folder = next(folder for folder in CODE if file.startswith(folder + "/"))
    area = f"tests/{file.removeprefix(folder + '/').partition('/')[0]}"
    own = area if folder == "src/regraft" and (ROOT / area).is_dir() else CODE[folder]
    tests = set().union(*(coverage.get(file, {}).get(line, set()) for line in lines))
    return sorted(tests, key=lambda test: (not test.startswith(own + "/"), test)) or [own]


def is_killed(tree: Path, file: str, whole: bytes, tests: Sequence[str], seconds: float) -> bool:
    """Whether a test fails, or does not end, with this content in the file."""
    path = tree / file
    before = path.read_bytes()
    path.write_bytes(whole)
    try:
        return run_tests(tree, ["-x", *tests], seconds) != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_bytes(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="mutants, of the fixed order that --seed gives")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="mutants of files whose path contains this")
    parser.add_argument("--seconds", type=float, default=900, help="after which tests that do not end have failed")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "mutants.jsonl")
    options = parser.parse_args()
    lines = options.out.read_text().splitlines() if options.out.is_file() else []
    verdicts = {tuple(key): killed for *key, killed in map(json.loads, lines)}
    mutants = find_mutants(ROOT)
    random.Random(options.seed).shuffle(mutants)
    sample = [mutant for mutant in mutants if options.only in mutant[0]][: options.count]
    with TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        coverage = measure_coverage(tree)
        for *key, whole, last in sample:
            if tuple(key) not in verdicts:
                tests = find_tests(key[0], range(key[1], last + 1), coverage)
                verdicts[tuple(key)] = killed = is_killed(tree, key[0], whole, tests, options.seconds)
                with options.out.open("a") as out:
                    print(json.dumps([*key, killed]), file=out, flush=True)
    survivors = [key for *key, _, _ in sample if not verdicts[tuple(key)]]
    for file, line, before, after in survivors:
        print(f"{file}:{line}: {before}  ->  {after}")
    print(f"{len(sample) - len(survivors)} of {len(sample)} mutants were caught")


if __name__ == "__main__":
    main()
