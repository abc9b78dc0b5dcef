"""Assignment solvers by kind and size of matrix: cold, warm after a 1 % change, and in two threads.

``pytest bench/bench_assignment.py --benchmark-only``. float32. "scipy" in the tables is `linear_sum_assignment`
called directly; everything else goes through `assign`, with its checks. Contenders are alternated in one process on
one thread, and the medians of their thread's CPU seconds compared (threads: seconds by the clock,
so run that one where nothing else computes). Warm starts
from the duals of the matrix before the change; the duals' own time is in a column of its own. The tables go to
``results/assignment.md``.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits
from torch.nn import functional

import regraft_kernels as rk
from regraft.results import environment, write
from regraft_kernels.assignment import _installed

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("one_thread")]

RESULTS = Path(__file__).parents[1] / "results"
SIZES = (128, 512, 1024)
THREADS = 2
BACKENDS = [name for name, module in (("lapx", "lap"), ("lapjv", "lapjv")) if _installed(module)]


def gaussian(n: int, g: np.random.Generator) -> np.ndarray:
    return g.standard_normal((n, n))


def relu_gram(n: int, g: np.random.Generator) -> np.ndarray:
    a, b = np.maximum(g.standard_normal((2, n, 2 * n)), 0)
    return a @ b.T


def near_rank_one(n: int, g: np.random.Generator) -> np.ndarray:
    return np.outer(g.random(n), g.random(n)) + 1e-3 * g.standard_normal((n, n))


def heavy_tails(n: int, g: np.random.Generator) -> np.ndarray:
    """Student's t with two degrees of freedom, cubed; a fifth of the rows and of the columns are dead."""
    matrix = g.standard_t(2, (n, n)) ** 3
    matrix[g.random(n) < 0.2] = 0
    matrix[:, g.random(n) < 0.2] = 0
    return matrix


def real_gradients(n: int, g: np.random.Generator) -> np.ndarray:
    """Gradients of two MLPs 64-n-10 on ten batches of the digits, as FGMT matches them."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 8 - 1, dtype=torch.float32)
    y = torch.tensor(labels)
    generator = torch.Generator().manual_seed(int(g.integers(1 << 30)))
    nets = []
    for _ in range(2):
        shapes = ((n, 64), (n,), (10, n))
        net = [torch.empty(s).uniform_(-(s[-1] ** -0.5), s[-1] ** -0.5, generator=generator) for s in shapes]
        nets.append([p.requires_grad_() for p in net])
    stacks = []
    for first, bias, second in nets:
        found = []
        for batch in torch.arange(1280).view(10, 128):
            logits = functional.linear(functional.relu(functional.linear(x[batch], first, bias)), second)
            loss = functional.cross_entropy(logits, y[batch])
            found.append(torch.autograd.grad(loss, (first, bias, second)))
        stacks.append([torch.stack(part) for part in zip(*found, strict=True)])
    terms = [rk.Term(b, a, axis) for a, b, axis in zip(*stacks, (0, 0, 1), strict=True)]
    return rk.similarity(terms).numpy()


def integer_ties(n: int, g: np.random.Generator) -> np.ndarray:
    return g.integers(0, 100, (n, n)).astype(float)


KINDS = {
    "Gaussian": gaussian,
    "ReLU Gram": relu_gram,
    "near rank one": near_rank_one,
    "heavy tails, dead rows": heavy_tails,
    "real gradients": real_gradients,
    "integer ties": integer_ties,
}


@cache
def matrices(kind: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix of this kind, and the same after a change of 1 %."""
    g = np.random.default_rng(0)
    matrix = KINDS[kind](n, g).astype(np.float32)
    changed = matrix * (1 + 0.01 * g.standard_normal((n, n)))
    return matrix, changed.astype(np.float32)


def best(matrix: np.ndarray) -> float:
    rows, columns = linear_sum_assignment(matrix, maximize=True)
    return float(matrix[rows, columns].sum(dtype=np.float64))


def alternate(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of the thread; a contender that takes over 20 times the first runs once."""
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            if spent[name] and spent[name][0] > 20 * next(iter(spent.values()))[0]:
                continue
            start = time.thread_time()
            run()
            spent[name].append(time.thread_time() - start)
    return {name: 1e3 * statistics.median(values) for name, values in spent.items()}


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_cold_and_warm(kind: str, n: int, benchmark, request) -> None:
    matrix, changed = matrices(kind, n)
    before = rk.assign(matrix)
    duals = before.duals
    contenders: dict[str, Callable[[], object]] = {
        "scipy": lambda: linear_sum_assignment(changed, maximize=True),
        "auto": lambda: rk.assign(changed),
        "auto warm": lambda: rk.assign(changed, warm=duals),
        "auto warm and duals": lambda: rk.assign(changed, warm=duals).duals,
        "assign scipy": lambda: rk.assign(changed, backend="scipy"),
        "assign scipy warm": lambda: rk.assign(changed, backend="scipy", warm=duals),
    }
    contenders |= {name: lambda name=name: rk.assign(changed, backend=name) for name in BACKENDS}
    times = alternate(contenders, 11 if n <= 512 else 5)
    benchmark.pedantic(contenders["auto"], rounds=1)
    optimum = best(changed)
    found = {"cold": rk.assign(changed), "warm": rk.assign(changed, warm=duals)}
    errors = {name: (optimum - a.objective) / max(abs(optimum), 1e-30) for name, a in found.items()}
    row = {"kind": kind, "n": n, "backend": found["cold"].backend, "milliseconds": times, "errors": errors}
    benchmark.extra_info.update(row)
    keep(request.config, "rows", row)
    assert max(errors.values()) <= 1e-6, errors


def test_two_threads(benchmark, request) -> None:
    g = np.random.default_rng(0)
    many = [relu_gram(1024, g).astype(np.float32) for _ in range(8)]
    spent: dict[int, list[float]] = {1: [], THREADS: []}
    for _ in range(5):
        for threads, values in spent.items():
            start = time.perf_counter()
            rk.assign_many(many, threads=threads)
            values.append(time.perf_counter() - start)
    benchmark.pedantic(lambda: rk.assign_many(many, threads=THREADS), rounds=1)
    seconds = {threads: min(values) for threads, values in spent.items()}
    keep(request.config, "threads", {"seconds": seconds, "ratio": seconds[1] / seconds[THREADS]})


def keep(config: pytest.Config, table: str, row: dict) -> None:
    """Add a row to the results; it replaces an earlier one of its kind and size, and the others stay."""
    path = RESULTS / "assignment.json"
    book = json.loads(path.read_text()) if path.is_file() else {}
    rows = [r for r in book.get(table, []) if (r.get("kind"), r.get("n")) != (row.get("kind"), row.get("n"))]
    where = environment()
    row = {**row, "commit": where.commit, "dirty": where.dirty}
    save({"rows": [], "threads": [], **book, table: [*rows, row], "environment": asdict(where)})


def save(book: dict[str, Any]) -> None:
    """``results/assignment.json`` and the tables made from it."""
    where = book["environment"]
    write(RESULTS / "assignment.json", json.dumps(book, indent=1) + "\n")
    commits = sorted({row["commit"] + " (dirty)" * row["dirty"] for row in book["rows"] + book["threads"]})
    columns = [
        "scipy",
        "auto",
        "auto warm",
        "auto warm and duals",
        "assign scipy",
        "assign scipy warm",
        *BACKENDS,
    ]
    lines = [
        "# Assignment",
        "",
        __doc__ or "",
        f"Measured at {', '.join(commits)}, {where['machine']}, "
        f"versions {', '.join(f'{k} {v}' for k, v in where['versions'].items())}. Milliseconds.",
        "",
        f"| kind | n | {' | '.join(columns)} | auto took | scipy / auto | scipy / warm | largest error |",
        "|---|---:|" + "---:|" * len(columns) + "---|---:|---:|---:|",
    ]
    for row in sorted(book["rows"], key=lambda row: (list(KINDS).index(row["kind"]), row["n"])):
        t = row["milliseconds"]
        cells = " | ".join(f"{t[name]:.2f}" for name in columns)
        lines.append(
            f"| {row['kind']} | {row['n']} | {cells} | {row['backend']} | {t['scipy'] / t['auto']:.2f} "
            f"| {t['scipy'] / t['auto warm']:.2f} | {max(row['errors'].values()):.1e} |"
        )
    for row in book["threads"]:
        one, two = row["seconds"].values()
        lines += [
            "",
            f"`assign_many` of eight ReLU Gram matrices, n = 1024: {one:.3f} s in one thread, {two:.3f} s in "
            f"{THREADS}: {row['ratio']:.2f} times (the best of five each, by the clock).",
        ]
    write(RESULTS / "assignment.md", "\n".join([*lines, ""]))
