"""Assignments of every kind and backend, cold and from duals that are stale, scaled, foreign or no numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import regraft_kernels as rk
from regraft_bench.kernels.assignment import MATRIX_KINDS
from regraft_kernels.assignment import Duals, backends

SIZES = (1, 2, 3, 8, 17, 40)
BACKENDS = [name for name in backends() if name != "auto"]
Draw = np.random.Generator


ALL_KINDS: dict[str, Callable[[int, Draw], np.ndarray]] = {
    **{name: kind for name, kind in MATRIX_KINDS.items() if name != "real gradients"},
    "rows from 1e-30 to 1e30": lambda n, g: g.standard_normal((n, n)) * 10.0 ** g.integers(-30, 30, (n, 1)),
    "all entries equal": lambda n, g: np.full((n, n), g.standard_normal()),
}

WARM: dict[str, Callable[[Duals, Draw], Duals]] = {
    "stale": lambda d, g: Duals(d.u + g.standard_normal(len(d.u)), d.v + g.standard_normal(len(d.v))),
    "scaled": lambda d, g: Duals(d.u * 1e3, d.v * 1e3),
    "foreign": lambda d, g: Duals(1e6 * g.standard_normal(len(d.u)), 1e6 * g.standard_normal(len(d.v))),
    "reversed": lambda d, g: Duals(-d.u, -d.v),
    "NaN": lambda d, g: Duals(d.u * np.nan, d.v * np.nan),
}


def draw(kind: str, number: int, g: Draw) -> np.ndarray:
    return ALL_KINDS[kind](SIZES[number % len(SIZES)], g).astype((np.float32, np.float64)[number % 2])


def check_optimal(matrix: np.ndarray, assignment: rk.Assignment) -> None:
    """It loses no more than rounding to scipy's optimum in float64, and its gap bounds the loss."""
    exact = matrix.astype(np.float64)
    rows, columns = linear_sum_assignment(exact, maximize=True)
    best = float(exact[rows, columns].sum())
    loss = best - float(exact[np.arange(len(exact)), assignment.perm.numpy()].sum())
    scale = float(np.abs(exact).max()) * len(exact)
    assert loss <= scale * (1e-12 if matrix.dtype == np.float64 else 4e-6), f"{loss:.2e} below {best:.6e}"
    assert loss <= assignment.gap + 1e-12 * scale


def test_the_check_knows_a_wrong_one():
    matrix = np.random.default_rng(0).standard_normal((5, 5))
    check_optimal(matrix, rk.assign(matrix))
    with pytest.raises(AssertionError, match="below"):
        check_optimal(matrix, rk.assign(-matrix))


@pytest.mark.parametrize("count", [12, pytest.param(134, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_assignments(record_property, backend, kind, count):
    """Matrices of one kind, in float32 and float64, solved cold, compared with scipy in float64."""
    g = np.random.default_rng([sum(map(ord, kind)), sum(map(ord, backend))])
    record_property("attempts", count)
    for number in range(count):
        matrix = draw(kind, number, g)
        check_optimal(matrix, rk.assign(matrix, backend=backend))


@pytest.mark.parametrize("count", [40, pytest.param(267, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_assignments_from_wrong_duals(record_property, backend, count):
    """Of every kind of wrong by turns; NaN must be refused or do no harm."""
    g = np.random.default_rng(count)
    record_property("attempts", count)
    names, kinds = list(WARM), list(ALL_KINDS)
    for number in range(count):
        wrong, kind = names[number % len(names)], kinds[number // len(names) % len(kinds)]
        matrix = draw(kind, number, g)
        duals = WARM[wrong](rk.assign(matrix, backend=backend).duals, g)
        try:
            assignment = rk.assign(matrix, backend=backend, warm=duals)
        except ValueError as problem:
            assert wrong == "NaN" and "not finite" in str(problem)
        else:
            check_optimal(matrix, assignment)
