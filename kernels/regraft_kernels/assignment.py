"""The linear assignment problem behind one contract: scipy | lapx | lapjv, warm starts, many at once."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft_kernels.memory import row_blocks

Matrix = Tensor | np.ndarray


@dataclass(frozen=True, eq=False)
class Duals:
    """Potentials of an assignment, float64 [n] each: to rounding, u[i] + v[j] >= S[i, j] for all i and j where S
    was maximised (<= where it was minimised), with equality where j = perm[i]."""

    u: np.ndarray
    v: np.ndarray


@dataclass(frozen=True, eq=False)
class Assignment:
    """An optimal assignment: `perm` int64 [n] on the CPU, `objective` = sum_i S[i, perm[i]] in float64, and the
    `backend` that found it. `duals` and `gap` are computed when first asked for (O(n^2) in practice) from a copy of S,
    which is kept with the assignment."""

    perm: Tensor
    objective: float
    backend: str
    _source: _Problem | Callable[[], _Problem] = field(repr=False)

    @cached_property
    def _problem(self) -> _Problem:
        return self._source if isinstance(self._source, _Problem) else self._source()

    @cached_property
    def duals(self) -> Duals:
        """Potentials of the optimum, from which a similar problem starts warm."""
        return self._problem.tight_duals(self.perm.numpy())

    @cached_property
    def start(self) -> Duals | None:
        """What a similar problem should start from: `duals`, or None where these cost more than they save, which is so
        for few units, and where most rows have a best column of their own."""
        n = len(self.perm)
        if n <= SMALL_START or self._problem.rows.wanted_columns >= UNCONTESTED * n:
            return None
        return self.duals

    @cached_property
    def gap(self) -> float:
        """The certificate: no assignment of S, as it was given, is better than this one by more than `gap` (rounding,
        if optimal): float64 throughout, the rounding of its own sums included."""
        sign, exact = self._problem.rows.sign, self._problem.feasible_duals(self.perm.numpy())
        size = float(np.abs(exact.u).sum() + np.abs(exact.v).sum()) + abs(self.objective)
        rounding = 4 * np.finfo(np.float64).eps * size
        return max(0.0, sign * (float(exact.u.sum() + exact.v.sum()) - self.objective)) + rounding


def assign(
    similarity: Matrix,
    *,
    maximize: bool = True,
    backend: str = "auto",
    warm: Duals | None = None,
    name: str = "similarity",
) -> Assignment:
    """The permutation that maximises (or minimises) sum_i S[i, perm[i]].

    `similarity`: [n, n], floating and finite, a tensor on any device or an array; it is solved in float64
    where it is float64, otherwise in float32 (the potentials in float64). `backend`: "scipy"
    (`linear_sum_assignment`), "lapx" (`lapjvr`), "lapjv", or "auto": lapx where it is installed, scipy
    otherwise. lapjv can be the faster and the much slower one (results/micro/tables.md), hence by name only.
    `warm`: the duals of a similar problem (its `Assignment.start`), which save time and leave the optimum as it is;
    those that cannot be of a similar one, because they reach further than S itself, are not used, and lapjv uses none.
    Without them a large problem whose rows compete for few columns starts from the potentials of its parts. `name`
    stands in error messages.

    Raises ValueError for a matrix that is not square, real, floating and finite, or duals that do not fit;
    ImportError for a backend that was asked for by name and is not installed; RuntimeError where a solver
    returns no permutation. Source: Jonker and Volgenant, Computing 38 (1987); Crouse, IEEE TAES 52 (2016).
    """
    return _solve(_to_host([similarity], [name])[0], name, maximize, _resolve(backend), warm)


def assign_many(
    similarities: Sequence[Matrix],
    *,
    threads: int | None = None,
    maximize: bool = True,
    backend: str = "auto",
    warm: Sequence[Duals | None] | None = None,
    names: Sequence[str] | None = None,
) -> list[Assignment]:
    """`assign` for each matrix, in `threads` threads (by default torch's number): the solvers run in parallel, the
    longest problem first. Small ones (n <= 64) of one size are prepared and solved together, without their warm
    starts, which would take longer to use than they save.

    All matrices are copied from their device before the first is solved. Raises as `assign` does.
    """
    count = len(similarities)
    starts = [None] * count if warm is None else list(warm)
    labels = [f"similarity {number}" for number in range(count)] if names is None else list(names)
    if len(starts) != count or len(labels) != count:
        raise ValueError(f"{len(starts)} warm starts and {len(labels)} names for {count} matrices")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be positive, not {threads}")
    chosen, sign = _resolve(backend), 1.0 if maximize else -1.0
    workers = min(torch.get_num_threads() if threads is None else threads, max(count, 1))
    results: dict[int, Assignment] = {}
    alike = _alike(similarities)
    stacks = _to_host([_stack([similarities[p] for p in some]) for some in alike], [labels[p[0]] for p in alike], 3)
    for places, stack in zip(alike, stacks, strict=True):
        for place in places:
            _check_duals(starts[place], stack.shape[1], labels[place])
        together = _solve_alike(stack, [labels[p] for p in places], sign, chosen, workers)
        results |= zip(places, together, strict=True)
    rest = [place for place in range(count) if place not in results]
    matrices = _to_host([similarities[p] for p in rest], [labels[p] for p in rest])
    jobs = [(m, labels[p], maximize, chosen, starts[p]) for m, p in zip(matrices, rest, strict=True)]
    order = sorted(range(len(rest)), key=lambda k: -len(matrices[k]))
    if workers == 1:
        alone = [_solve(*jobs[k]) for k in order]
    else:
        with ThreadPoolExecutor(workers) as pool:
            alone = list(pool.map(lambda k: _solve(*jobs[k]), order))
    results |= {rest[k]: result for k, result in zip(order, alone, strict=True)}
    return [results[place] for place in range(count)]


SMALL_UNITS = 64
"""Up to so many units, what Python does for a problem takes as long as its solver."""


def _alike(similarities: Sequence[Matrix]) -> list[list[int]]:
    """The places of small square matrices of one kind and size, where there are several."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, matrix in enumerate(similarities):
        if isinstance(matrix, Tensor | np.ndarray) and matrix.ndim == 2:
            rows, columns = matrix.shape
            if 2 <= rows == columns <= SMALL_UNITS:
                kind = matrix.dtype, matrix.device if isinstance(matrix, Tensor) else None, rows
                groups.setdefault(kind, []).append(place)
    return [places for places in groups.values() if len(places) > 1]


def _stack(matrices: Sequence[Matrix]) -> Matrix:
    if isinstance(matrices[0], Tensor):
        return torch.stack([matrix for matrix in matrices if isinstance(matrix, Tensor)])
    return np.stack(matrices)


def assign_stack(
    stack: Tensor, *, threads: int | None = None, maximize: bool = True, backend: str = "auto", name: str = "stack"
) -> tuple[Tensor, Tensor]:
    """The permutations int64 [B, n] of `assign` for each of [B, n, n], and their objectives float64 [B], on the CPU.

    For thousands of small problems, of which nothing else is asked: no object is made for each. Raises as `assign`.
    """
    (host,) = _to_host([stack], [name], 3)
    workers = torch.get_num_threads() if threads is None else threads
    perms, objectives = _solve_stack(
        host, lambda place: f"{name}[{place}]", 1.0 if maximize else -1.0, backend, workers
    )
    return torch.from_numpy(perms), torch.from_numpy(objectives)


def _solve_stack(
    stack: np.ndarray, name_of: Callable[[int], str], sign: float, backend: str, workers: int
) -> tuple[np.ndarray, np.ndarray]:
    """`_solve` for [B, n, n] without a warm start: whatever can be is done for all at once."""
    backend, (count, n) = _resolve(backend), stack.shape[:2]
    if not stack.size or n < 2:
        zeros = np.zeros((count, n), np.int64)
        return zeros, stack.sum(axis=(1, 2), dtype=np.float64)
    low, high = stack.min(axis=(1, 2)), stack.max(axis=(1, 2))
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError(f"{name_of(int(np.argmin(np.isfinite(low + high))))} has entries that are not finite")
    reach = np.maximum(-low.astype(np.float64), high.astype(np.float64))
    _check_reach(float(reach.max()), name_of(int(reach.argmax())))
    wide = stack.astype(np.float64) if reach.max() > np.finfo(np.float32).max / 4 else stack
    cost = wide.max(axis=2, keepdims=True) - wide if sign > 0 else wide - wide.min(axis=2, keepdims=True)
    perms = BATCHES.get(backend, partial(_one_by_one, SOLVERS[backend]))(cost, workers)
    wrong = (np.sort(perms, axis=1) != np.arange(n)).any(axis=1)
    if wrong.any():
        raise RuntimeError(f"{name_of(int(wrong.argmax()))}: backend {backend} returned no permutation")
    return perms, np.take_along_axis(stack, perms[:, :, None], 2).sum(axis=(1, 2), dtype=np.float64)


def _solve_alike(stack: np.ndarray, names: Sequence[str], sign: float, backend: str, workers: int) -> list[Assignment]:
    """`_solve` for [B, n, n] without a warm start."""
    perms, objectives = _solve_stack(stack, names.__getitem__, sign, backend, workers)
    make = [partial(_Problem.cold, matrix, sign, name) for matrix, name in zip(stack, names, strict=True)]
    return [
        Assignment(perm, objective, backend, problem)
        for perm, objective, problem in zip(torch.from_numpy(perms).unbind(), objectives.tolist(), make, strict=True)
    ]


def _to_host(similarities: Sequence[Matrix], names: Sequence[str], ndim: int = 2) -> list[np.ndarray]:
    """float32 or float64 arrays [n, n], or [B, n, n] where ndim is 3; those on a GPU through pinned memory, all copies
    under way at once."""
    arrays: list[np.ndarray] = []
    waiting = set()
    for similarity, name in zip(similarities, names, strict=True):
        if isinstance(similarity, Tensor):
            if not similarity.is_floating_point():
                raise ValueError(f"{name} must be real and floating, not {similarity.dtype}")
            if similarity.layout is not torch.strided or similarity.is_nested:
                raise ValueError(f"{name} must be a dense tensor")
            tensor = similarity.detach().to(torch.promote_types(similarity.dtype, torch.float32))
            if tensor.is_cuda:
                waiting.add(torch.cuda.current_stream(tensor.device))
                tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            arrays.append(tensor.cpu().numpy())
        else:
            array = np.asarray(similarity)
            if array.dtype not in (np.float16, np.float32, np.float64):
                raise ValueError(f"{name} must be real and floating, not {array.dtype}")
            arrays.append(array.astype(np.promote_types(array.dtype, np.float32), copy=False))
        if arrays[-1].ndim != ndim or arrays[-1].shape[-2] != arrays[-1].shape[-1]:
            raise ValueError(f"{name} must be square, not {arrays[-1].shape}")
    for stream in waiting:
        stream.synchronize()
    return arrays


def _check_duals(warm: Duals | None, n: int, name: str) -> None:
    if warm is None:
        return
    if warm.u.shape != (n,) or warm.v.shape != (n,):
        raise ValueError(f"{name}: duals of length {len(warm.v)} for {n} units")
    if not (np.isfinite(warm.u).all() and np.isfinite(warm.v).all()):
        raise ValueError(f"{name}: the duals are not finite")


def _check_reach(reach: float, name: str) -> None:
    if reach > np.finfo(np.float64).max / 4:
        raise ValueError(f"{name} has entries too large to subtract in float64")


def _solve(matrix: np.ndarray, name: str, maximize: bool, backend: str, warm: Duals | None) -> Assignment:
    n = len(matrix)
    _check_duals(warm, n, name)
    rows = _Rows.of(matrix, 1.0 if maximize else -1.0, name)
    # lapjv's price war has no bound: from duals of another problem it was seen not to end
    start = None
    if backend != "lapjv":
        start = _of_parts(rows, name, backend) if warm is None else warm.v
    problem = _Problem.build(rows, start)
    perm = np.arange(n) if n < 2 else np.asarray(SOLVERS[backend](problem.cost), dtype=np.int64)
    if perm.shape != (n,) or not np.array_equal(np.sort(perm), np.arange(n)):
        raise RuntimeError(f"{name}: backend {backend} returned no permutation")
    objective = float(matrix[np.arange(n), perm].sum(dtype=np.float64))
    return Assignment(torch.from_numpy(perm), objective, backend, problem)


PARTS = 4
CONTESTED = 1 / 6
"""Rows whose best columns are fewer than this share of all compete for them, and a solver that starts cold is slow."""
LARGE = 256
"""From so many units on, the parts take less time than they save."""
UNCONTESTED = 0.4
SMALL_START = 128
"""Where best columns are a larger share of all, or units are no more than these, finding duals costs more than they
save (measured: Gaussian, heavy tails, integers; gradients have .2 to .27)."""


def _of_parts(rows: _Rows, name: str, backend: str) -> np.ndarray | None:
    """Column potentials to start a large contested problem from: those of its parts, every fourth row and column; None
    for any other problem, which a solver is done with sooner.

    Where rows compete, prices rise in many small steps. In a part they do so at a sixteenth of the cost, and end near
    the prices of the whole, whose rows and columns are like the part's.
    """
    n = len(rows.matrix)
    if n < LARGE or rows.wanted_columns >= CONTESTED * n:
        return None
    column = np.empty(n)
    for part in (slice(first, None, PARTS) for first in range(PARTS)):
        own = _solve(rows.matrix[part, part], name, rows.sign > 0, backend, None).duals.v
        # Each part's are known but for a constant, which they must share.
        column[part] = own - np.median(own)
    return column


@dataclass(frozen=True)
class _Rows:
    """A copy of S, each row's best entry and its column, the smallest and the largest entry, +1 to maximise or -1."""

    matrix: np.ndarray
    best: np.ndarray
    best_column: np.ndarray
    low: float
    high: float
    sign: float

    @staticmethod
    def of(matrix: np.ndarray, sign: float, name: str) -> _Rows:
        """Raises ValueError for entries that are not finite, or too large to subtract."""
        n = len(matrix)
        kept, best, column = np.empty_like(matrix), np.empty(n, matrix.dtype), np.empty(n, np.int64)
        if not n:
            return _Rows(kept, best, column, 0.0, 0.0, sign)
        other = []
        for block in row_blocks(matrix):  # one pass over memory for all steps
            part = kept[block]
            part[:] = matrix[block]
            column[block] = part.argmax(axis=1) if sign > 0 else part.argmin(axis=1)
            best[block] = part[np.arange(len(part)), column[block]]
            other.append(part.min() if sign > 0 else part.max())
        extremes = [float(best.max()), float(min(other))] if sign > 0 else [float(best.min()), float(max(other))]
        if not np.isfinite(extremes).all():
            raise ValueError(f"{name} has entries that are not finite")
        _check_reach(max(map(abs, extremes)), name)
        return _Rows(kept, best, column, min(extremes), max(extremes), sign)

    @property
    def wanted_columns(self) -> int:
        """How many columns are the best of a row."""
        return int(np.count_nonzero(np.bincount(self.best_column, minlength=1)))


@dataclass(frozen=True)
class _Problem:
    """cost[i, j] = row[i] + column[j] - sign * S[i, j], all of it >= 0 with a zero in every row: to be minimised.

    Differences from the row's maximum rather than -S, because the solvers' column reduction then has
    something to start from, and float32 keeps its digits for the entries that matter.
    """

    rows: _Rows
    cost: np.ndarray
    row: np.ndarray
    column: np.ndarray

    @staticmethod
    def cold(matrix: np.ndarray, sign: float, name: str) -> _Problem:
        return _Problem.build(_Rows.of(matrix, sign, name), None)

    @staticmethod
    def build(rows: _Rows, column: np.ndarray | None) -> _Problem:
        matrix, best, sign = rows.matrix, rows.best, rows.sign
        if max(-rows.low, rows.high) > float(np.finfo(np.float32).max) / 8:
            matrix, best = matrix.astype(np.float64), best.astype(np.float64)
        column = _possible(column, sign, rows.high - rows.low)
        shift = None if column is None else column.astype(matrix.dtype)
        cost, row = np.empty_like(matrix), sign * best.astype(np.float64)
        for block in row_blocks(matrix):
            part, own = cost[block], best[block, None]
            above, below = (own, matrix[block]) if sign > 0 else (matrix[block], own)
            np.subtract(above, below, out=part)
            if shift is not None:  # after the difference, so that a large mean of S costs no digits
                part += shift
                least = part.min(axis=1)
                part -= least[:, None]
                row[block] -= least
        return _Problem(rows, cost, row, np.zeros(len(row)) if column is None else column)

    def tight_duals(self, perm: np.ndarray) -> Duals:
        """Potentials that are tight on the assignment, and feasible to rounding where it is optimal."""
        if len(perm) == 0:
            return Duals(np.zeros(0), np.zeros(0))
        v = _column_potentials(self.cost, perm)
        u = self.cost[np.arange(len(perm)), perm] - v[perm]
        return Duals(self.rows.sign * (self.row - u), self.rows.sign * (self.column - v))

    def feasible_duals(self, perm: np.ndarray) -> Duals:
        """Potentials that are feasible for S to the last bit of float64, and tight on an optimal assignment to the
        rounding of the cost."""
        if len(perm) == 0:
            return Duals(np.zeros(0), np.zeros(0))
        v = self.column - _column_potentials(self.cost.astype(np.float64), perm)
        matrix, sign = self.rows.matrix, self.rows.sign
        blocks = (matrix[block].astype(np.float64) for block in row_blocks(matrix))
        u = np.concatenate([(sign * block - v).max(axis=1) for block in blocks])
        return Duals(sign * u, sign * v)


def _possible(v: np.ndarray | None, sign: float, spread: float) -> np.ndarray | None:
    """Column potentials to start from, centred; none where they cannot be of a similar problem.

    Where row i has column k, S[i, k] - v[k] >= S[i, j] - v[j]: the potentials of an optimum differ by no more than the
    entries of S. Within twice that the reduced costs keep the digits that those of a cold start have, so that what a
    stale start may do to the result is rounding; beyond it they would be lost.
    """
    if v is None or not len(v):
        return None
    with np.errstate(over="ignore"):
        low, high = float(v.min()), float(v.max())
        return None if not high - low <= 2 * spread else sign * (v - (low + high) / 2)


def _column_potentials(cost: np.ndarray, perm: np.ndarray) -> np.ndarray:
    """v of feasible potentials that are tight on an optimal assignment, by shortest paths over the columns.

    Bellman-Ford, in which only the rows whose column came closer are looked at again: 1 to 25 passes' worth
    in all kinds of matrices measured. An edge counts as shorter by more than rounding only, so that the
    search ends where `perm` is optimal to rounding only; the number of rounds is bounded in any case.
    """
    n = len(cost)
    own = cost[np.arange(n), perm]
    tolerance = 4 * np.finfo(cost.dtype).eps * float(cost.max())
    row_of = np.argsort(perm)
    v = cost.min(axis=0)
    active = np.arange(n)
    for _ in range(n):
        reached = v.copy()
        for block in row_blocks(cost[: len(active)]):
            rows = active[block]
            part = cost[rows]
            part += (v[perm[rows]] - own[rows])[:, None]
            np.minimum(reached, part.min(axis=0), out=reached)
        closer = np.flatnonzero(reached < v - tolerance)
        if not len(closer):
            break
        v[closer] = reached[closer]
        active = np.sort(row_of[closer])
    return np.asarray(v, dtype=np.float64)


@cache
def _find_function(module: str, name: str) -> Any:
    """A solver's function, None where it is not installed: the package lap has the module of lapx without lapjvr."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def backends() -> list[str]:
    """The names of the solvers that are installed, of those that `assign` takes by name."""
    return [name for name, function in FUNCTIONS.items() if _find_function(*function) is not None]


def _resolve(backend: str) -> str:
    if backend == "auto":
        return "lapx" if "lapx" in backends() else "scipy"
    if backend not in SOLVERS:
        raise ValueError(f"backend must be one of auto, {', '.join(SOLVERS)}, not {backend!r}")
    if backend not in backends():
        raise ImportError(f"backend {backend!r} was asked for, but the package {backend} is not installed")
    return backend


def _scipy(cost: np.ndarray) -> np.ndarray:
    return np.asarray(_find_function(*FUNCTIONS["scipy"])(cost)[1])


def _lapx(cost: np.ndarray) -> np.ndarray:
    return np.asarray(_find_function(*FUNCTIONS["lapx"])(cost, return_cost=False)[1])


def _lapjv(cost: np.ndarray) -> np.ndarray:
    solve = _find_function(*FUNCTIONS["lapjv"])
    return np.asarray(solve(cost, force_doubles=cost.dtype == np.float64)[0])


def _lapx_batch(cost: np.ndarray, workers: int) -> np.ndarray:
    solve = _find_function("lap", "lapjvr_batch")
    if solve is None:
        return _one_by_one(_lapx, cost, workers)
    return np.asarray(solve(cost, return_cost=False, n_threads=workers)[1], dtype=np.int64)


def _one_by_one(solver: Solver, cost: np.ndarray, workers: int) -> np.ndarray:
    return np.stack([np.asarray(solver(one), dtype=np.int64) for one in cost])


FUNCTIONS = {
    "scipy": ("scipy.optimize", "linear_sum_assignment"),
    "lapx": ("lap", "lapjvr"),
    "lapjv": ("lapjv", "lapjv"),
}
"""Module and name of each solver's function."""
Solver = Callable[[np.ndarray], np.ndarray]
SOLVERS: dict[str, Solver] = {"scipy": _scipy, "lapx": _lapx, "lapjv": _lapjv}
"""Each takes a finite, row-reduced cost matrix [n, n], n >= 2, float32 or float64: row i -> column."""
BATCHES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"lapx": _lapx_batch}
"""Each takes [B, n, n] and a number of threads; a solver that has none is called for one after the other."""
