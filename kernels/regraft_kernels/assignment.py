"""The linear assignment problem behind one contract: scipy | lapx | lapjv, warm starts, many at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from regraft_kernels.permute import row_blocks

Matrix = Tensor | np.ndarray


@dataclass(frozen=True)
class Duals:
    """Potentials of an assignment, float64 [n] each: to rounding, u[i] + v[j] >= S[i, j] for all i and j where S
    was maximised (<= where it was minimised), with equality where j = perm[i]."""

    u: np.ndarray
    v: np.ndarray


@dataclass(frozen=True)
class Assignment:
    """An optimal assignment: `perm` int64 [n] on the CPU, `objective` = sum_i S[i, perm[i]] in float64, and the
    `backend` that found it. `duals` and `gap` are computed when first asked for (O(n^2) in practice); until
    then the problem is kept."""

    perm: Tensor
    objective: float
    backend: str
    _problem: _Problem = field(repr=False, compare=False)

    @cached_property
    def duals(self) -> Duals:
        """Potentials of the optimum, from which a similar problem starts warm."""
        return self._problem.tight_duals(self.perm.numpy())

    @cached_property
    def gap(self) -> float:
        """The certificate: no assignment is better than this one by more than `gap` (rounding, if optimal)."""
        exact = self._problem.feasible_duals(self.perm.numpy())
        return max(0.0, self._problem.sign * (float(exact.u.sum() + exact.v.sum()) - self.objective))


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
    (`linear_sum_assignment`), "lapx" (`lapjvr`), "lapjv", or "auto": lapx where it is installed, for it was
    the fastest on every kind of matrix measured (results/micro/tables.md), scipy otherwise. `warm`: the duals
    of a similar problem, which save time and leave the optimum as it is. `name` stands in error messages.

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
    """`assign` for each matrix, in `threads` threads (by default torch's number): the solvers run in parallel.

    All matrices are copied from their device before the first is solved. Raises as `assign` does.
    """
    count = len(similarities)
    starts = [None] * count if warm is None else list(warm)
    labels = [f"similarity {number}" for number in range(count)] if names is None else list(names)
    if len(starts) != count or len(labels) != count:
        raise ValueError(f"{len(starts)} warm starts and {len(labels)} names for {count} matrices")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be positive, not {threads}")
    chosen = _resolve(backend)
    matrices = _to_host(similarities, labels)
    workers = min(torch.get_num_threads() if threads is None else threads, max(count, 1))
    if workers == 1:
        return [
            _solve(m, label, maximize, chosen, w)
            for m, label, w in zip(matrices, labels, starts, strict=True)
        ]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(_solve, matrices, labels, repeat(maximize), repeat(chosen), starts))


def _to_host(similarities: Sequence[Matrix], names: Sequence[str]) -> list[np.ndarray]:
    """float32 or float64 arrays [n, n]; those on a GPU through pinned memory, all copies under way at once."""
    arrays: list[np.ndarray] = []
    waiting = set()
    for similarity, name in zip(similarities, names, strict=True):
        if isinstance(similarity, Tensor):
            if not similarity.is_floating_point():
                raise ValueError(f"{name} must be real and floating, not {similarity.dtype}")
            tensor = similarity.detach().to(torch.promote_types(similarity.dtype, torch.float32))
            if tensor.is_cuda:
                waiting.add(torch.cuda.current_stream(tensor.device))
                tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
                    tensor, non_blocking=True
                )
            arrays.append(tensor.cpu().numpy())
        else:
            array = np.asarray(similarity)
            if array.dtype not in (np.float16, np.float32, np.float64):
                raise ValueError(f"{name} must be real and floating, not {array.dtype}")
            arrays.append(array.astype(np.promote_types(array.dtype, np.float32), copy=False))
        if arrays[-1].ndim != 2 or arrays[-1].shape[0] != arrays[-1].shape[1]:
            raise ValueError(f"{name} must be square, not {arrays[-1].shape}")
    for stream in waiting:
        stream.synchronize()
    return arrays


def _solve(matrix: np.ndarray, name: str, maximize: bool, backend: str, warm: Duals | None) -> Assignment:
    n = len(matrix)
    if warm is not None and (warm.u.shape != (n,) or warm.v.shape != (n,)):
        raise ValueError(f"{name}: duals of length {len(warm.v)} for {n} units")
    if warm is not None and not np.isfinite(warm.v).all():
        raise ValueError(f"{name}: the duals are not finite")
    problem = _Problem.build(matrix, 1.0 if maximize else -1.0, None if warm is None else warm.v, name)
    perm = np.arange(n) if n < 2 else np.asarray(SOLVERS[backend](problem.cost), dtype=np.int64)
    if perm.shape != (n,) or not np.array_equal(np.sort(perm), np.arange(n)):
        raise RuntimeError(f"{name}: backend {backend} returned no permutation")
    objective = float(matrix[np.arange(n), perm].sum(dtype=np.float64))
    return Assignment(torch.from_numpy(perm), objective, backend, problem)


@dataclass(frozen=True)
class _Problem:
    """cost[i, j] = row[i] + column[j] - sign * S[i, j], all of it >= 0 with a zero in every row: to be minimised.

    Differences from the row's maximum rather than -S, because the solvers' column reduction then has
    something to start from, and float32 keeps its digits for the entries that matter.
    """

    cost: np.ndarray
    row: np.ndarray
    column: np.ndarray
    sign: float

    @staticmethod
    def build(matrix: np.ndarray, sign: float, column: np.ndarray | None, name: str) -> _Problem:
        n = len(matrix)
        if n == 0:
            return _Problem(matrix, np.zeros(0), np.zeros(0), sign)
        low, high = matrix.min(), matrix.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError(f"{name} has entries that are not finite")
        reach = max(-float(low), float(high)) + (0.0 if column is None else float(np.abs(column).max()))
        if reach > np.finfo(np.float64).max / 4:
            raise ValueError(f"{name} has entries too large to subtract in float64")
        if reach > np.finfo(np.float32).max / 4:
            matrix = matrix.astype(np.float64)
        column = np.zeros(n) if column is None else sign * column
        shift = column.astype(matrix.dtype)
        cost, row = np.empty_like(matrix), np.empty(n, matrix.dtype)
        for block in row_blocks(matrix):  # one pass over memory for all three steps
            part = cost[block]
            (np.subtract if sign > 0 else np.add)(shift, matrix[block], out=part)
            row[block] = -part.min(axis=1)
            part += row[block, None]
        return _Problem(cost, row.astype(np.float64), column, sign)

    def tight_duals(self, perm: np.ndarray) -> Duals:
        """Potentials that are tight on the assignment, and feasible to rounding where it is optimal."""
        if len(perm) == 0:
            return Duals(np.zeros(0), np.zeros(0))
        v = _column_potentials(self.cost, perm)
        u = self.cost[np.arange(len(perm)), perm] - v[perm]
        return Duals(self.sign * (self.row - u), self.sign * (self.column - v))

    def feasible_duals(self, perm: np.ndarray) -> Duals:
        """Potentials that are feasible always, and tight on the assignment to the rounding of float64."""
        if len(perm) == 0:
            return Duals(np.zeros(0), np.zeros(0))
        v = _column_potentials(self.cost.astype(np.float64), perm)
        pieces = np.array_split(self.cost, -(-self.cost.size // (1 << 20)))
        u = np.concatenate([(piece - v).min(axis=1) for piece in pieces])
        return Duals(self.sign * (self.row - u), self.sign * (self.column - v))


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
    return v.astype(np.float64)


@cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def backends() -> list[str]:
    """The names of the solvers that are installed."""
    return [name for name, module in MODULES.items() if _installed(module)]


def _resolve(backend: str) -> str:
    if backend == "auto":
        return "lapx" if _installed("lap") else "scipy"
    if backend not in SOLVERS:
        raise ValueError(f"backend must be one of auto, {', '.join(SOLVERS)}, not {backend!r}")
    if backend not in backends():
        raise ImportError(f"backend {backend!r} was asked for, but the package {backend} is not installed")
    return backend


def _scipy(cost: np.ndarray) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(cost)[1]


def _lapx(cost: np.ndarray) -> np.ndarray:
    import lap

    return lap.lapjvr(cost, return_cost=False)[1]


def _lapjv(cost: np.ndarray) -> np.ndarray:
    from lapjv import lapjv

    return lapjv(cost, force_doubles=cost.dtype == np.float64)[0]


MODULES = {"scipy": "scipy", "lapx": "lap", "lapjv": "lapjv"}
SOLVERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"scipy": _scipy, "lapx": _lapx, "lapjv": _lapjv}
"""Each takes a finite, row-reduced cost matrix [n, n], n >= 2, float32 or float64: row i -> column."""
