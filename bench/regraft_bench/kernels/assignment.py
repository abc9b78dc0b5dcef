"""Assignment solvers by kind and size of matrix: cold, warm after a change of 1 %, and in two threads."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional

import regraft_kernels as rk
from regraft_bench.contests import Contest, MicroSetting
from regraft_bench.timing import BY_HAND, Contender
from regraft_kernels.assignment import Assignment, backends

Draw = np.random.Generator


def gaussian(n: int, g: Draw) -> np.ndarray:
    return g.standard_normal((n, n))


def relu_gram(n: int, g: Draw) -> np.ndarray:
    a, b = np.maximum(g.standard_normal((2, n, 2 * n)), 0)
    return a @ b.T


def near_rank_one(n: int, g: Draw) -> np.ndarray:
    return np.outer(g.random(n), g.random(n)) + 1e-3 * g.standard_normal((n, n))


def rank_one(n: int, g: Draw) -> np.ndarray:
    """To a millionth: every row prefers the same columns, and bids for them rise by crumbs."""
    return np.outer(g.random(n), g.random(n)) + 1e-6 * g.standard_normal((n, n))


def heavy_tails(n: int, g: Draw) -> np.ndarray:
    """Student's t with two degrees of freedom, cubed; a fifth of the rows and of the columns are dead."""
    matrix = g.standard_t(2, (n, n)) ** 3
    matrix[g.random(n) < 0.2] = 0
    matrix[:, g.random(n) < 0.2] = 0
    return matrix


def real_gradients(n: int, g: Draw) -> np.ndarray:
    """Gradients of two MLPs 64-n-10 on ten batches of the digits, as FGMT matches them."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 8 - 1, dtype=torch.float32), torch.tensor(labels)
    generator = torch.Generator().manual_seed(int(g.integers(1 << 30)))
    stacks = []
    for _ in range(2):
        shapes = ((n, 64), (n,), (10, n))
        net = [torch.empty(s).uniform_(-(s[-1] ** -0.5), s[-1] ** -0.5, generator=generator) for s in shapes]
        first, bias, second = (p.requires_grad_() for p in net)
        found = []
        for batch in torch.arange(1280).view(10, 128):
            logits = functional.linear(functional.relu(functional.linear(x[batch], first, bias)), second)
            loss = functional.cross_entropy(logits, y[batch])
            found.append(torch.autograd.grad(loss, (first, bias, second)))
        stacks.append([torch.stack(part) for part in zip(*found, strict=True)])
    terms = [rk.Term(b, a, axis) for a, b, axis in zip(*stacks, (0, 0, 1), strict=True)]
    return rk.similarity(terms).numpy()


def integer_ties(n: int, g: Draw) -> np.ndarray:
    return g.integers(0, 100, (n, n)).astype(float)


MATRIX_KINDS = {
    "Gaussian": gaussian,
    "ReLU Gram": relu_gram,
    "near rank one": near_rank_one,
    "rank one to 1e-6": rank_one,
    "heavy tails, dead rows": heavy_tails,
    "real gradients": real_gradients,
    "integer ties": integer_ties,
}
MATRIX_SIZES = (128, 512, 1024)
WARM, WITH_DUALS, SCIPY_WARM = "auto, warm", "auto, warm, and new duals", "scipy, warm"
CONTENDERS = (BY_HAND, "auto", WARM, WITH_DUALS, SCIPY_WARM, *backends())


def _draw(kind: str, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix of this kind, and the same after a change of 1 %, float32."""
    g = np.random.default_rng(seed)
    matrix = MATRIX_KINDS[kind](n, g).astype(np.float32)
    return matrix, (matrix * (1 + 0.01 * g.standard_normal((n, n)))).astype(np.float32)


def _make(kind: str, n: int, setting: MicroSetting) -> dict[str, Contender]:
    """By hand is scipy's solver alone; everything else goes through `assign`, with its checks."""
    before, changed = _draw(kind, n, setting.seed)
    duals = rk.assign(before).duals
    rows, columns = linear_sum_assignment(changed, maximize=True)
    optimum = float(changed[rows, columns].sum(dtype=np.float64))

    def error(found: Assignment) -> dict[str, float]:
        return {"relative error": (optimum - found.objective) / max(abs(optimum), 1e-30)}

    def duals_too() -> Assignment:
        found = rk.assign(changed, warm=duals)
        _ = found.duals  # computed when first asked for
        return found

    contenders = {
        BY_HAND: Contender(lambda: linear_sum_assignment(changed, maximize=True)),
        "auto": Contender(lambda: rk.assign(changed), error),
        WARM: Contender(lambda: rk.assign(changed, warm=duals), error),
        WITH_DUALS: Contender(duals_too, error),
        SCIPY_WARM: Contender(lambda: rk.assign(changed, backend="scipy", warm=duals), error),
    }
    for name in backends():
        contenders[name] = Contender(partial(rk.assign, changed, backend=name), error)
    return contenders


def contest(kind: str, n: int) -> Contest:
    """The solvers on one kind and size of matrix."""
    return Contest(f"{kind}, n = {n}", CONTENDERS, partial(_make, kind, n))


def _make_many(setting: MicroSetting) -> dict[str, Contender]:
    g = np.random.default_rng(setting.seed)
    many = [relu_gram(1024, g).astype(np.float32) for _ in range(8)]
    return {
        BY_HAND: Contender(lambda: [rk.assign(matrix) for matrix in many]),
        "assign_many, two threads": Contender(lambda: rk.assign_many(many, threads=2)),
    }


MANY = Contest("eight matrices", (BY_HAND, "assign_many, two threads"), _make_many)
"""ReLU Gram matrices, n = 1024; by hand is one after the other. By the wall clock: wants two free cores."""

TOGETHER = "assign_many"


def _make_small(n: int, setting: MicroSetting) -> dict[str, Contender]:
    """By hand is a loop over scipy's solver, without any check."""
    g = np.random.default_rng(setting.seed)
    stack = torch.from_numpy(g.standard_normal((200, n, n)).astype(np.float32))
    many = list(stack)
    return {
        BY_HAND: Contender(lambda: [linear_sum_assignment(m.numpy(), maximize=True) for m in many]),
        "assign, one by one": Contender(lambda: [rk.assign(m) for m in many]),
        TOGETHER: Contender(lambda: rk.assign_many(many, threads=1)),
    }


SMALL = tuple(
    Contest(f"200 of n = {n}", (BY_HAND, "assign, one by one", TOGETHER), partial(_make_small, n)) for n in (8, 16, 64)
)
"""Gaussian matrices of one size."""
