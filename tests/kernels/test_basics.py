"""The torch path of every operation against the plainest possible formula."""

import numpy as np
import pytest
import torch

import regraft_kernels as rk


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


SHAPES = {"a.weight": (6, 4), "a.bias": (6,), "b.weight": (3, 6, 3, 3), "c": (6, 2, 6), "count": ()}
AXES = {"a.weight": ("g", None), "a.bias": ("g",), "b.weight": (None, "g", None, None), "c": ("g", None, "g")}


def draw(generator, lead=()):
    tensors = {n: torch.randn((*lead, *s), generator=generator) for n, s in SHAPES.items()}
    tensors["count"] = torch.full(lead, 7)
    return tensors


def test_permute_gathers_every_axis_and_back(generator):
    packing = rk.Packing.build(SHAPES, AXES)
    tensors, index = draw(generator), torch.randperm(6, generator=generator)
    moved = rk.permute(tensors, {"g": index}, packing)
    assert torch.equal(moved["c"], tensors["c"][index][:, :, index])
    assert torch.equal(moved["b.weight"], tensors["b.weight"][:, index])
    back = rk.permute(moved, {"g": index}, packing, inverse=True)
    assert all(torch.equal(back[n], tensors[n]) for n in tensors)


def test_graft_follows_the_formula(generator):
    packing = rk.Packing.build(SHAPES, AXES)
    base, start, end = draw(generator), draw(generator), draw(generator)
    index = torch.randperm(6, generator=generator)
    out = rk.graft(base, start, end, [0.5, 2.0], {"g": index}, packing)
    torch.testing.assert_close(
        out["a.weight"][1], base["a.weight"] + 2 * (end["a.weight"] - start["a.weight"])[index]
    )
    assert out["count"].tolist() == [7, 7]


def test_combine_follows_the_formula(generator):
    a, b = draw(generator), draw(generator)
    out = rk.combine([a, b], [[1.0, 2.0], [0.0, -1.0]])
    torch.testing.assert_close(out["c"], torch.stack([a["c"] + 2 * b["c"], -b["c"]]))


def test_similarity_and_its_update(generator):
    target, source = (torch.randn(3, 5, 4, 2, 2, generator=generator) for _ in range(2))
    old, new = torch.arange(5), torch.randperm(5, generator=generator)
    S = rk.similarity([rk.Term(target, source, 1, None, (old, None, None, None))])
    expected = torch.einsum("tiakl,tibkl->ab", target, source)
    torch.testing.assert_close(S, expected)
    term = rk.Term(target, source, 1)
    rk.similarity_update_(S, term, 0, old, new)
    torch.testing.assert_close(S, torch.einsum("tiakl,tibkl->ab", target, source[:, new]))


@pytest.mark.parametrize("backend", ["auto", "scipy"])
def test_assign_warm_equals_cold(backend, generator):
    S = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    cold = rk.assign(S, backend=backend)
    assert cold.objective == pytest.approx(S[torch.arange(40), cold.perm].sum().item())
    slack = cold.duals.u[:, None] + cold.duals.v - S.numpy()
    assert slack.min() > -1e-9
    assert np.abs(slack[np.arange(40), cold.perm]).max() < 1e-9
    warm = rk.assign(S, backend=backend, warm=cold.duals)
    assert warm.objective == pytest.approx(cold.objective, rel=1e-12)
