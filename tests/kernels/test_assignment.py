"""assign: every backend against the optimum, on the matrices that matter and on those that break solvers."""

import importlib.util
import itertools
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment

from regraft_kernels import Duals, assign, assign_many
from regraft_kernels import assignment as module
from regraft_kernels.assignment import assign_stack

MODULES = {"scipy": "scipy", "lapx": "lap", "lapjv": "lapjv"}
SOLVERS = [
    pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"no {name}"))
    for name, package in MODULES.items()
]


@pytest.fixture(params=["auto", *SOLVERS])
def solver(request):
    return request.param


def kinds(n, seed=0):
    """The kinds of similarity that occur, and the hard ones."""
    g = np.random.default_rng(seed)
    yield "gaussian", g.standard_normal((n, n))
    a, b = np.maximum(g.standard_normal((2, n, 2 * n)), 0)
    yield "relu gram", a @ b.T
    yield "near rank one", np.outer(g.random(n), g.random(n)) + 1e-3 * g.standard_normal((n, n))
    heavy = g.standard_t(2, (n, n)) ** 3
    heavy[g.random(n) < 0.3], heavy[:, g.random(n) < 0.3] = 0, 0
    yield "heavy tails with dead rows", heavy
    yield "integer ties", g.integers(0, 5, (n, n)).astype(float)
    yield "zero", np.zeros((n, n))
    yield "constant rows", np.repeat(g.standard_normal((n, 1)), n, 1)
    yield "tiny", 1e-30 * g.standard_normal((n, n))


def best(matrix, maximize=True):
    rows, columns = linear_sum_assignment(matrix, maximize=maximize)
    return float(matrix[rows, columns].sum(dtype=np.float64))


def is_permutation(perm):
    return perm.dtype == torch.int64 and perm.sort().values.tolist() == list(range(len(perm)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("maximize", [True, False])
def test_is_optimal_cold_and_warm_on_every_kind(solver, dtype, maximize):
    for kind, wide in kinds(40):
        matrix = wide.astype(dtype)
        size = max(1e-300, float(np.abs(matrix).max()) * len(matrix))
        exact = 1e-6 if dtype == np.float32 else 1e-12
        cold = assign(matrix, maximize=maximize, backend=solver)
        assert is_permutation(cold.perm), kind
        found = matrix[np.arange(40), cold.perm.numpy()].sum(dtype=np.float64)
        assert cold.objective == pytest.approx(found, abs=1e-12 * size), kind
        assert abs(cold.objective - best(matrix, maximize)) <= exact * size, kind
        changed = (matrix * (1 + 0.01 * np.random.default_rng(1).standard_normal(matrix.shape))).astype(dtype)
        warm = assign(changed, maximize=maximize, backend=solver, warm=cold.duals)
        assert is_permutation(warm.perm), kind
        assert abs(warm.objective - best(changed, maximize)) <= exact * size, kind


@pytest.mark.parametrize("maximize", [True, False])
def test_duals_are_a_certificate(solver, maximize):
    for kind, matrix in kinds(30):
        for warm in (None, Duals(np.linspace(0, 1, 30), np.linspace(2, 0, 30))):
            found = assign(matrix, maximize=maximize, backend=solver, warm=warm)
            size = np.abs(matrix).max() + 2
            slack = found.duals.u[:, None] + found.duals.v - matrix
            assert (slack if maximize else -slack).min() >= -1e-12 * size, kind
            assert np.abs(slack[np.arange(30), found.perm.numpy()]).max() <= 1e-10 * size, kind
            assert 0 <= found.gap <= 1e-10 * size, kind


def test_gap_shows_what_is_not_optimal(monkeypatch):
    monkeypatch.setitem(module.SOLVERS, "scipy", lambda cost: np.arange(len(cost)))
    matrix = np.random.default_rng(0).standard_normal((20, 20))
    found = assign(matrix, backend="scipy")
    assert found.gap >= best(matrix) - found.objective > 1


@settings(max_examples=60)
@given(
    matrix=hnp.arrays(
        np.float64,
        st.integers(0, 5).map(lambda n: (n, n)),
        elements=st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, 1.0]),
    )
)
def test_small_ones_against_every_permutation(matrix):
    n = len(matrix)
    expected = max(sum(matrix[i, p[i]] for i in range(n)) for p in itertools.permutations(range(n)))
    found = assign(matrix)
    assert is_permutation(found.perm)
    assert len(found.perm) == n
    assert found.objective == pytest.approx(expected, rel=1e-12, abs=1e-9)
    assert found.gap <= 1e-6 * max(1.0, np.abs(matrix).max(initial=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_takes_tensors_of_any_floating_dtype_and_layout(solver, dtype, generator):
    matrix = torch.randn(25, 25, generator=generator).to(dtype)
    for given_ in (matrix, matrix.T.contiguous().T, matrix.clone().requires_grad_()):
        assert assign(given_, backend=solver).objective == pytest.approx(best(matrix.double().numpy()), rel=1e-6)
    before = matrix.clone()
    assign(matrix, backend=solver).duals  # noqa: B018
    assert torch.equal(matrix, before)


def test_duals_outlive_changes_of_the_matrix(generator):
    matrix = torch.randn(20, 20, generator=generator)
    plain = assign(matrix.clone()).duals
    found = assign(matrix)
    matrix.zero_()
    assert np.array_equal(found.duals.v, plain.v)


def test_sizes_zero_and_one(solver):
    assert assign(torch.zeros(0, 0), backend=solver).perm.tolist() == []
    assert assign(torch.zeros(0, 0), backend=solver).gap == 0
    one = assign(torch.tensor([[-3.0]]), backend=solver)
    assert (one.perm.tolist(), one.objective, one.duals.u.tolist()) == ([0], -3.0, [-3.0])


@pytest.mark.parametrize("scale", [1e30, 3e38])
def test_large_entries_do_not_overflow(solver, scale):
    matrix = (np.random.default_rng(0).uniform(-1, 1, (12, 12)) * scale).astype(np.float32)
    found = assign(matrix, backend=solver)
    assert found.objective == pytest.approx(best(matrix.astype(np.float64)), rel=1e-6)


@pytest.mark.parametrize(
    ("matrix", "text"),
    [
        (torch.zeros(2, 3), "layer1 must be square"),
        (torch.zeros(4), "layer1 must be square"),
        (torch.zeros(2, 2, 2), "layer1 must be square"),
        (torch.zeros(3, 3).long(), "layer1 must be real and floating, not torch.int64"),
        (torch.zeros(3, 3).bool(), "layer1 must be real and floating"),
        (torch.zeros(3, 3, dtype=torch.complex64), "layer1 must be real and floating"),
        (np.zeros((3, 3), np.int32), "layer1 must be real and floating, not int32"),
        (np.zeros((3, 3), complex), "layer1 must be real and floating"),
        (torch.tensor([[0.0, torch.nan], [0.0, 0.0]]), "layer1 has entries that are not finite"),
        (torch.tensor([[0.0, torch.inf], [0.0, 0.0]]), "layer1 has entries that are not finite"),
        (torch.tensor([[0.0, -torch.inf], [0.0, 0.0]]), "layer1 has entries that are not finite"),
        (np.array([[1e308, -1e308], [0.0, 0.0]]), "layer1 has entries too large"),
    ],
)
def test_refuses_bad_matrices_before_any_solver_sees_them(monkeypatch, matrix, text):
    def never(cost):
        raise AssertionError("a solver was called")

    for name in MODULES:
        monkeypatch.setitem(module.SOLVERS, name, never)
        if importlib.util.find_spec(MODULES[name]) is not None:
            with pytest.raises(ValueError, match=text):
                assign(matrix, backend=name, name="layer1")


def test_refuses_bad_options(monkeypatch):
    matrix = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="backend must be one of auto, scipy, lapx, lapjv"):
        assign(matrix, backend="hungarian")
    with pytest.raises(ValueError, match="duals of length 2 for 3 units"):
        assign(matrix, warm=Duals(np.zeros(2), np.zeros(2)))
    with pytest.raises(ValueError, match="duals are not finite"):
        assign(matrix, warm=Duals(np.zeros(3), np.full(3, np.nan)))
    with pytest.raises(ValueError, match="threads must be positive"):
        assign_many([matrix], threads=0)
    with pytest.raises(ValueError, match="1 warm starts"):
        assign_many([matrix, matrix], warm=[None])
    with pytest.raises(ValueError, match="conv2 has entries"):
        assign_many([matrix, torch.full((2, 2), torch.nan)], names=["conv1", "conv2"])
    for result in ([0, 0, 1], [0, 1, 3], [0, 1]):
        monkeypatch.setitem(module.SOLVERS, "scipy", lambda cost, result=result: np.array(result))
        with pytest.raises(RuntimeError, match="fc1: backend scipy returned no permutation"):
            assign(matrix, backend="scipy", name="fc1")


def test_a_backend_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(module, "backends", lambda: ["scipy"])
    assert assign(torch.eye(3)).backend == "scipy"
    for name in ("lapx", "lapjv"):
        with pytest.raises(ImportError, match=f"the package {name} is not installed"):
            assign(torch.eye(3), backend=name)


def test_a_module_lap_without_lapjvr_is_not_lapx(monkeypatch, generator):
    """The package lap, whose module has the name of that of lapx."""
    monkeypatch.setitem(sys.modules, "lap", types.ModuleType("lap"))
    module._find_function.cache_clear()
    try:
        assert "lapx" not in module.backends()
        S = torch.randn(70, 70, generator=generator)
        assert assign(S).backend == "scipy"
        assert [found.backend for found in assign_many([S, S[:9, :9], S[9:18, 9:18]])] == ["scipy"] * 3
    finally:
        module._find_function.cache_clear()


def test_a_lapx_without_batches_solves_one_by_one(monkeypatch, generator):
    if "lapx" not in module.backends():
        pytest.skip("no lapx")
    matrices = list(torch.randn(3, 9, 9, generator=generator))
    expected = assign_many(matrices, backend="lapx")
    monkeypatch.delattr("lap.lapjvr_batch")
    module._find_function.cache_clear()
    found = assign_many(matrices, backend="lapx")
    module._find_function.cache_clear()
    assert all(torch.equal(one.perm, two.perm) for one, two in zip(found, expected, strict=True))


def test_results_are_pickled_and_compared_by_identity(generator):
    matrices = list(torch.randn(2, 9, 9, generator=generator))
    for found in (assign(matrices[0]), assign_many(matrices)[0]):
        again = pickle.loads(pickle.dumps(found))
        assert (again.objective, again.gap) == (found.objective, found.gap)
        assert np.array_equal(again.duals.v, found.duals.v)
        assert found == found and found != again and found.duals != again.duals
        assert len({found, again, found.duals}) == 3


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_many_in_threads_equal_one_by_one(threads, generator):
    matrices = [torch.randn(n, n, generator=generator) for n in (5, 0, 30, 1, 17)]
    together = assign_many(matrices, threads=threads)
    for found, matrix in zip(together, matrices, strict=True):
        assert found.objective == assign(matrix).objective
        assert found.backend == assign(matrix).backend
    again = assign_many(matrices, threads=threads, warm=[f.duals for f in together])
    assert [f.objective for f in again] == pytest.approx([f.objective for f in together], rel=1e-6)
    assert assign_many([], threads=threads) == []


def unlikely_duals(matrix, g):
    """Duals of the same matrix, of an older one, of another, scaled, shifted, huge: what a caller may come with."""
    n = len(matrix)
    older = assign(matrix * (1 + g.standard_normal(matrix.shape).astype(matrix.dtype))).duals
    foreign = assign(g.standard_normal((n, n)) * 10.0 ** g.integers(-3, 6)).duals
    yield from (older, foreign)
    for scale in (-1.0, 1e-6, 1e3, 1e8, 1e30, 1e300):
        yield Duals(older.u * scale, older.v * scale)
    yield Duals(older.u - 1e9, older.v + 1e9)
    yield Duals(older.u, older.v[g.permutation(n)])


def test_no_start_makes_a_result_worse_and_the_gap_bounds_the_loss():
    g = np.random.default_rng(0)
    tried = wrong = 0
    for round_ in range(7):
        for (_, wide), offset in itertools.product(kinds(24, round_), (0.0, 1e6)):
            matrix = (wide + offset).astype(np.float32)
            exact = matrix.astype(np.float64)
            optimum, spread = best(exact), float(exact.max() - exact.min())
            rounding = 24 * np.finfo(np.float32).eps * spread
            for duals in unlikely_duals(matrix, g):
                found = assign(matrix, warm=duals)
                loss = optimum - found.objective
                tried += 1
                wrong += not (loss <= rounding and loss <= found.gap)
    assert tried >= 1000
    assert wrong == 0


def test_gap_is_of_the_matrix_that_was_given(monkeypatch):
    """A solver may return anything: the gap is at least what was lost, by the entries and not their roundings."""
    g = np.random.default_rng(0)
    for solver in (lambda cost: g.permutation(len(cost)), lambda cost: np.arange(len(cost))):
        monkeypatch.setitem(module.SOLVERS, "scipy", solver)
        for kind, wide in kinds(20):
            for matrix in (wide.astype(np.float32), wide + 1e6):
                found = assign(matrix, backend="scipy")
                assert found.gap >= best(matrix.astype(np.float64)) - found.objective, kind


@pytest.mark.parametrize("threads", [1, 2])
def test_many_small_ones_together_equal_one_by_one(solver, threads, generator):
    shapes = [(n, dtype) for n in (2, 9, 64) for dtype in (torch.float32, torch.float64, torch.bfloat16)] * 3
    matrices = [torch.randn(n, n, generator=generator).to(dtype) for n, dtype in shapes]
    matrices += [matrix.float().numpy() for matrix in matrices[:9]]
    for maximize in (True, False):
        together = assign_many(matrices, threads=threads, backend=solver, maximize=maximize)
        for found, matrix in zip(together, matrices, strict=True):
            alone = assign(matrix, backend=solver, maximize=maximize)
            assert is_permutation(found.perm)
            assert found.objective == pytest.approx(alone.objective, rel=1e-6)
            assert found.gap <= 1e-5 * len(matrix)
            assert found.duals.v.shape == (len(matrix),)


def test_many_small_ones_are_one_call_of_the_solver(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_resolve", lambda backend: "lapx")
    monkeypatch.setitem(
        module.BATCHES,
        "lapx",
        lambda cost, workers: calls.append(cost.shape) or np.tile(np.arange(3), (50, 1)),
    )
    assign_many([torch.eye(3)] * 50)
    assert calls == [(50, 3, 3)]


def test_the_longest_is_solved_first(monkeypatch, generator):
    sizes = []
    monkeypatch.setitem(module.SOLVERS, "scipy", lambda cost: sizes.append(len(cost)) or np.arange(len(cost)))
    assign_many([torch.zeros(n, n) for n in (70, 90, 65, 80)], backend="scipy", threads=1)
    assert sizes == [90, 80, 70, 65]


def test_bad_ones_among_small_ones_are_named(monkeypatch):
    matrices = [torch.eye(3), torch.full((3, 3), torch.nan), torch.eye(3)]
    with pytest.raises(ValueError, match="conv2 has entries that are not finite"):
        assign_many(matrices, names=["conv1", "conv2", "conv3"])
    with pytest.raises(ValueError, match="conv1 must be real"):
        assign_many([torch.eye(3).long()] * 2, names=["conv1", "conv2"])
    with pytest.raises(ValueError, match="similarity 1: duals of length 2"):
        assign_many([torch.eye(3)] * 2, warm=[None, Duals(np.zeros(2), np.zeros(2))])
    monkeypatch.setitem(module.BATCHES, "lapx", lambda cost, workers: np.zeros((len(cost), 3), np.int64))
    monkeypatch.setattr(module, "_resolve", lambda backend: "lapx")
    with pytest.raises(RuntimeError, match="similarity 0: backend lapx returned no permutation"):
        assign_many([torch.eye(3)] * 2)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_problem_is_reduced_by_rows(sign):
    g = np.random.default_rng(0)
    matrix, column = g.standard_normal((700, 700)).astype(np.float32), g.standard_normal(700)
    problem = module._Problem.build(module._Rows.of(matrix, sign, "similarity"), column)
    assert (problem.cost.min(axis=1) == 0).all()
    expected = problem.row[:, None] + problem.column - sign * matrix
    np.testing.assert_allclose(problem.cost, expected, atol=1e-5)


@pytest.mark.skipif("lapjv" not in module.backends(), reason="lapjv is not installed")
def test_lapjv_takes_no_duals_because_its_price_war_may_not_end():
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-30, 30, 40, dtype=torch.float64)[:, None]
    S = torch.randn(40, 40, generator=generator, dtype=torch.float64) * scales
    foreign = assign(torch.randn(40, 40, generator=generator, dtype=torch.float64) * scales.flip(0)).duals
    cold = assign(S, backend="lapjv")
    warm = assign(S, backend="lapjv", warm=foreign)
    assert torch.equal(warm.perm, cold.perm)


@pytest.mark.parametrize("maximize", [True, False])
def test_only_contested_problems_of_many_units_start_a_similar_one(maximize):
    by_kind = dict(kinds(module.SMALL_START + 1))
    for kind, starts in (("near rank one", True), ("gaussian", False)):
        found = assign(by_kind[kind], maximize=maximize)
        assert found.start is (found.duals if starts else None), kind
    assert assign(by_kind["near rank one"][1:, 1:]).start is None
    assert assign(np.eye(2)).start is assign(np.empty((0, 0))).start is None


# ---------------------------------------------------------------- large ones, in which rows compete


def sizes_solved(monkeypatch, matrix, backend="scipy"):
    """How large the problems were that `assign` had solved for this one."""
    sizes, solve = [], module.SOLVERS[backend]
    monkeypatch.setitem(module.SOLVERS, backend, lambda cost: sizes.append(len(cost)) or solve(cost))
    assign(matrix, backend=backend)
    return sizes


@pytest.mark.parametrize("maximize", [True, False])
def test_is_optimal_on_every_kind_where_it_is_large(solver, maximize):
    n = module.LARGE + 9
    for kind, wide in kinds(n):
        matrix = wide.astype(np.float32)
        found = assign(matrix, maximize=maximize, backend=solver)
        assert is_permutation(found.perm), kind
        rounding = 1e-6 * max(1e-300, float(np.abs(matrix).max()) * n)
        assert abs(found.objective - best(matrix.astype(np.float64), maximize)) <= rounding, kind


def test_a_large_contested_problem_starts_from_its_parts_and_no_other(monkeypatch):
    n = module.LARGE + 9
    by_kind = dict(kinds(n))
    assert sizes_solved(monkeypatch, by_kind["near rank one"]) == [67, 66, 66, 66, n]
    smaller = module.LARGE - 1
    assert sizes_solved(monkeypatch, by_kind["near rank one"][:smaller, :smaller]) == [smaller]
    assert sizes_solved(monkeypatch, by_kind["gaussian"]) == [n]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_parts_start_is_near_the_optimum(sign):
    """Rows that preferred the same columns no longer do, once the columns have these prices."""
    matrix = sign * dict(kinds(module.LARGE))["near rank one"].astype(np.float32)
    rows = module._Rows.of(matrix, sign, "similarity")
    warm = module._Problem.build(rows, module._of_parts(rows, "similarity", "scipy")).cost
    cold = module._Problem.build(rows, None).cost
    preferred_cold, preferred_warm = (len(np.unique(cost.argmin(axis=1))) for cost in (cold, warm))
    assert preferred_warm > 5 * preferred_cold


def test_what_is_not_finite_outside_the_parts_is_named():
    matrix = dict(kinds(module.LARGE))["near rank one"]
    matrix[0, 1] = np.nan
    with pytest.raises(ValueError, match="conv1 has entries that are not finite"):
        assign(matrix, name="conv1")


@pytest.mark.parametrize("shape", [(5, 7, 7), (3, 1, 1), (0, 4, 4), (2, 70, 70), (2, 0, 0)])
@pytest.mark.parametrize("backend", ["auto", "scipy"])
def test_a_stack_is_solved_as_its_matrices_are(shape, backend):
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    perms, objectives = assign_stack(stack, backend=backend)
    assert perms.shape == shape[:2] and perms.dtype == torch.int64 and objectives.dtype == torch.float64
    for matrix, perm, objective in zip(stack, perms, objectives.tolist(), strict=True):
        one = assign(matrix)
        assert torch.equal(perm.sort().values, torch.arange(shape[1]))
        assert objective == pytest.approx(one.objective, rel=1e-12)
        assert float(matrix.gather(1, perm[:, None]).sum()) == pytest.approx(objective, rel=1e-12)


def test_a_stacks_matrix_that_is_not_finite_is_named():
    stack = torch.zeros(3, 4, 4)
    stack[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"heads\[1\] has entries that are not finite"):
        assign_stack(stack, name="heads")
