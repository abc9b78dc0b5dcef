"""Assignments of every kind and backend, cold and from duals that are stale, scaled, foreign or no numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from scipy.optimize import linear_sum_assignment

import regraft_kernels as rk
from regraft_bench.kernels.assignment import KINDS
from regraft_bench.micro.reliability.attempt import CLEAR, RAW, SILENT
from regraft_bench.micro.reliability.writers import Found
from regraft_kernels.assignment import Duals, backends

SIZES = (1, 2, 3, 8, 17, 40)
Draw = np.random.Generator


def _tiny_and_huge(n: int, g: Draw) -> np.ndarray:
    return g.standard_normal((n, n)) * 10.0 ** g.integers(-30, 30, (n, 1))


def _constant(n: int, g: Draw) -> np.ndarray:
    return np.full((n, n), g.standard_normal())


ALL_KINDS: dict[str, Callable[[int, Draw], np.ndarray]] = {
    **{name: kind for name, kind in KINDS.items() if name != "real gradients"},
    "rows from 1e-30 to 1e30": _tiny_and_huge,
    "all entries equal": _constant,
}

WARM: dict[str, Callable[[Duals, Draw], Duals]] = {
    "stale": lambda d, g: Duals(d.u + g.standard_normal(len(d.u)), d.v + g.standard_normal(len(d.v))),
    "scaled": lambda d, g: Duals(d.u * 1e3, d.v * 1e3),
    "foreign": lambda d, g: Duals(1e6 * g.standard_normal(len(d.u)), 1e6 * g.standard_normal(len(d.v))),
    "reversed": lambda d, g: Duals(-d.u, -d.v),
    "NaN": lambda d, g: Duals(d.u * np.nan, d.v * np.nan),
}


def solved(kind: str, backend: str, count: int) -> Iterator[Found]:
    """``count`` matrices of one kind, in float32 and float64, solved cold, compared with scipy in float64."""
    g = np.random.default_rng([sum(map(ord, kind)), sum(map(ord, backend))])
    for number in range(count):
        matrix = ALL_KINDS[kind](SIZES[number % len(SIZES)], g).astype((np.float32, np.float64)[number % 2])
        yield f"{kind}, {backend}, {number}", judged(matrix, lambda m=matrix: rk.assign(m, backend=backend))


def warm(backend: str, count: int) -> Iterator[Found]:
    """``count`` starts from wrong duals, of every kind of wrong by turns; NaN must be refused or do no harm."""
    g = np.random.default_rng(count)
    names, kinds = list(WARM), list(ALL_KINDS)
    for number in range(count):
        wrong, kind = names[number % len(names)], kinds[number // len(names) % len(kinds)]
        matrix = ALL_KINDS[kind](SIZES[number % len(SIZES)], g).astype((np.float32, np.float64)[number % 2])
        duals = WARM[wrong](rk.assign(matrix, backend=backend).duals, g)

        def solve(matrix: np.ndarray = matrix, duals: Duals = duals) -> rk.Assignment:
            return rk.assign(matrix, backend=backend, warm=duals)

        yield f"{wrong} duals, {kind}, {backend}, {number}", judged(matrix, solve)


def judged(matrix: np.ndarray, solve: Callable[[], rk.Assignment]) -> tuple[str, str]:
    """Whether a solution loses no more than rounding to scipy's optimum in float64, and its gap bounds the loss."""
    exact = matrix.astype(np.float64)
    rows, columns = linear_sum_assignment(exact, maximize=True)
    best = float(exact[rows, columns].sum())
    try:
        found = solve()
        loss = best - float(exact[np.arange(len(exact)), found.perm.numpy()].sum())
        gap = found.gap
    except ValueError as problem:
        return (CLEAR, "refused") if "not finite" in str(problem) else (RAW, str(problem))
    except Exception as problem:
        return RAW, f"{type(problem).__name__}: {problem}"
    rounding = 1e-12 * float(np.abs(exact).max()) * len(exact)
    allowed = rounding + (0 if matrix.dtype == np.float64 else 4e-6 * float(np.abs(exact).max()) * len(exact))
    if loss > allowed:
        return SILENT, f"{loss:.2e} below the optimum {best:.6e}"
    if loss > gap + rounding:
        return SILENT, f"loses {loss:.2e}, though its gap is {gap:.2e}"
    return CLEAR, "optimal"


def everything(count: int) -> Iterator[tuple[str, str, Iterator[Found]]]:
    """(kind, backend, what was found): ``count`` in all at least, one in five of them warm."""
    names = [name for name in backends() if name != "auto"]
    cold = math.ceil(count * 4 / 5 / (len(ALL_KINDS) * len(names)))
    for backend in names:
        for kind in ALL_KINDS:
            yield kind, backend, solved(kind, backend, cold)
        yield "warm, from wrong duals", backend, warm(backend, math.ceil(count / 5 / len(names)))
