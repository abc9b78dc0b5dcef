"""The linear assignment problem behind one contract: scipy | lapx | lapjv, warm starts, many at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

BACKENDS = ("auto", "scipy", "lapx", "lapjv")


@dataclass(frozen=True)
class Duals:
    """Potentials of an assignment, float64 [n] each: u[i] + v[j] >= S[i, j] (maximised; <= if minimised),
    with equality where j = perm[i]."""

    u: np.ndarray
    v: np.ndarray


@dataclass(frozen=True)
class Assignment:
    """An optimal assignment: `perm` int64 [n] on the CPU, `objective` = sum of S[i, perm[i]] in float64, and
    the `backend` that found it. `duals` are computed when first asked for."""

    perm: Tensor
    objective: float
    backend: str
    _cost: np.ndarray = field(repr=False, compare=False)
    _sign: float = field(repr=False, compare=False)

    @cached_property
    def duals(self) -> Duals:
        u, v = _duals(self._cost.astype(np.float64), self.perm.numpy())
        return Duals(self._sign * u, self._sign * v)


def assign(
    similarity: Tensor | np.ndarray,
    *,
    maximize: bool = True,
    backend: str = "auto",
    warm: Duals | None = None,
    name: str = "similarity",
) -> Assignment:
    """The permutation that maximises (or minimises) sum_i S[i, perm[i]].

    `similarity`: [n, n], floating, finite, on any device. `warm`: the duals of a similar problem; they
    change the time and not the result. `name` stands in the messages of the errors.

    Raises ValueError for an array that is not square, floating and finite; ImportError for a backend that
    was asked for by name and is not installed.
    """
    matrix = _check(similarity, name)
    chosen = _resolve(backend, matrix)
    sign = -1.0 if maximize else 1.0
    cost = sign * matrix
    reduced = cost if warm is None else cost - sign * warm.u[:, None] - sign * warm.v[None, :]
    perm = _SOLVERS[chosen](reduced)
    objective = float(matrix[np.arange(len(matrix)), perm].sum(dtype=np.float64))
    return Assignment(torch.from_numpy(perm.astype(np.int64)), objective, chosen, cost, sign)


def assign_many(
    similarities: Sequence[Tensor | np.ndarray],
    *,
    threads: int = 2,
    maximize: bool = True,
    backend: str = "auto",
    warm: Sequence[Duals | None] | None = None,
) -> list[Assignment]:
    """`assign` for each matrix, in `threads` threads (every backend releases the interpreter's lock)."""
    starts = [None] * len(similarities) if warm is None else list(warm)
    if len(starts) != len(similarities):
        raise ValueError(f"{len(starts)} warm starts for {len(similarities)} matrices")

    def solve(number: int) -> Assignment:
        return assign(
            similarities[number],
            maximize=maximize, backend=backend, warm=starts[number], name=f"similarity {number}",
        )  # fmt: skip

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(solve, range(len(similarities))))


def _check(similarity: Tensor | np.ndarray, name: str) -> np.ndarray:
    if isinstance(similarity, Tensor):
        if not similarity.is_floating_point():
            raise ValueError(f"{name} must be real and floating, not {similarity.dtype}")
        wide = torch.promote_types(similarity.dtype, torch.float32)
        matrix = similarity.detach().to("cpu", wide).numpy()
    else:
        matrix = np.asarray(similarity)
    if matrix.dtype not in (np.float32, np.float64):
        raise ValueError(f"{name} must be real and floating, not {matrix.dtype}")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name} must be square, not {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} has entries that are not finite")
    return matrix


@cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _resolve(backend: str, matrix: np.ndarray) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend == "lapx" and not _installed("lap"):
        raise ImportError("backend 'lapx' was asked for, but the lapx package is not installed")
    if backend == "lapjv" and not _installed("lapjv"):
        raise ImportError("backend 'lapjv' was asked for, but the lapjv package is not installed")
    return "scipy" if backend == "auto" else backend


def _solve_scipy(cost: np.ndarray) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(cost)[1]


def _solve_lapx(cost: np.ndarray) -> np.ndarray:
    import lap

    return lap.lapjvr(cost, return_cost=False)[1]


def _solve_lapjv(cost: np.ndarray) -> np.ndarray:
    from lapjv import lapjv

    return lapjv(cost)[0].astype(np.int64)


_SOLVERS = {"scipy": _solve_scipy, "lapx": _solve_lapx, "lapjv": _solve_lapjv}


def _duals(cost: np.ndarray, perm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """u + v <= cost with equality on the assignment, by shortest paths (Bellman-Ford) over the columns."""
    n = len(cost)
    matched = cost[np.arange(n), perm]
    weights = cost - matched[:, None]
    v = np.zeros(n)
    active = np.arange(n)
    row_of = np.empty(n, dtype=np.int64)
    row_of[perm] = np.arange(n)
    for _ in range(n):
        if not len(active):
            break
        reached = (weights[active] + v[perm[active], None]).min(axis=0)
        closer = reached < v
        v = np.minimum(v, reached)
        active = row_of[np.flatnonzero(closer)]
    return matched - v[perm], v
