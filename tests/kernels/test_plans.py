"""Plans: a call bound to its tensors does again what the call does, and nothing but its launches."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import models
from test_launches import Note, Operators

import regraft_kernels as rk
from regraft_bench.kernels.networks import Network, resnet18


@settings(max_examples=5)
@given(model=models(), inverse=st.booleans(), seed=st.integers(0, 99))
def test_a_plan_computes_from_what_the_tensors_hold_by_then(backend, model, inverse, seed):
    generator = torch.Generator().manual_seed(seed)
    sets = [{n: t.contiguous() for n, t in model.tensors(generator).items()} for _ in range(3)]
    indices, packing, table = model.indices(generator), model.packing, [[1.0, -0.5, 3.25], [0.5, 0.0, 1.0]]
    calls = (
        (rk.permute, rk.plan_permute, (sets[0], indices, packing), {"inverse": inverse}),
        (rk.graft, rk.plan_graft, (*sets, [0.5, 1.0], indices, packing), {}),
        (rk.combine, rk.plan_combine, (sets, table), {}),
    )
    plans = [bind(*given_, **more, backend=backend) for _, bind, given_, more in calls]
    for tensors in sets:
        for tensor in tensors.values():
            tensor.copy_(tensor.flip(0) if tensor.ndim else tensor + 1)
    for plan, (run, _, given_, more) in zip(plans, calls, strict=True):
        expected, results = run(*given_, **more, backend="torch"), plan()
        assert plan.backend == (backend if model.shapes else "torch")
        assert results is plan.results and results.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(results[name], expected[name])


def test_a_plan_leaves_the_launches_alone(monkeypatch):
    notes = []
    for name in ("permute", "graft", "combine"):
        monkeypatch.setattr(sys.modules[f"regraft_kernels.{name}"], f"_{name}_kernel", Note(name, notes))
    net = Network.of(resnet18(), torch.device("cpu"))
    a = net.draw(0)
    out = {name: torch.empty_like(tensor) for name, tensor in a.items()}
    plans = [
        rk.plan_permute(a, net.indices, net.packing, out=out, backend="triton"),
        rk.plan_graft(a, a, a, [1.0], net.packing.prepare(net.indices), net.packing, backend="triton"),
        rk.plan_combine([a, a], [[1.0, 2.0]], backend="triton"),
    ]
    with Operators(notes):
        results = [plan() for plan in plans]
    assert all(results[0][name] is tensor for name, tensor in out.items())
    assert set(notes) == {"permute", "graft", "combine"} and len(notes) <= 6


def test_a_plan_refuses_what_it_could_not_read_again():
    packing = rk.Packing.build({"w": (4, 4)}, {"w": ("a", "b")})
    index = {"a": torch.arange(4), "b": torch.arange(4)}
    whole = {"w": torch.zeros(4, 4)}
    turned = {"w": torch.arange(16.0).view(4, 4).T}
    for bind in (
        lambda: rk.plan_permute(turned, index, packing),
        lambda: rk.plan_graft(whole, turned, whole, [1.0], index, packing),
        lambda: rk.plan_combine([whole, turned], [[1.0, 1.0]]),
    ):
        with pytest.raises(ValueError, match="'w' is not contiguous, and a plan reads tensors where they stand"):
            bind()
    learned = {"w": torch.zeros(4, 4, requires_grad=True)}
    with pytest.raises(ValueError, match="a plan cannot be made where gradients are wanted"):
        rk.plan_permute(learned, index, packing)
    with torch.no_grad():
        assert rk.plan_permute(learned, index, packing)()["w"].shape == (4, 4)
    with pytest.raises(ValueError, match="'w' and 'w' share memory"):
        rk.plan_permute(whole, index, packing, out=whole)
    assert rk.plan_permute({}, {}, packing)() == {}
