"""graft and combine against their formulas."""

import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import models, same_bits
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from regraft_kernels import Packing, Term, combine, graft, permute, similarity
from regraft_kernels.combine import combine_reference
from regraft_kernels.graft import graft_reference
from regraft_kernels.permute import permute_reference

NUMBERS = st.sampled_from([0.0, 1.0, -1.0, 0.5, 3.25])


def close(found, expected):
    """Equal, but for the rounding that fusing a product and a sum saves."""
    if not found.is_floating_point():
        return same_bits(found, expected)
    torch.testing.assert_close(found, expected, equal_nan=True)
    return True


@settings(max_examples=20)
@given(
    model=models(),
    scales=st.lists(NUMBERS, max_size=3),
    targets=st.sampled_from([None, 0, 1, 3]),
    seed=st.integers(0, 99),
)
def test_graft_equals_the_reference(backend, model, scales, targets, seed):
    generator = torch.Generator().manual_seed(seed)
    base = model.tensors(generator, () if targets is None else (targets,))
    start, end = model.tensors(generator), model.tensors(generator)
    indices = model.indices(generator, targets)
    found = graft(base, start, end, scales, indices, model.packing, backend=backend)
    assert found.keys() == base.keys()
    for target in range(1 if targets is None else targets):
        if targets is None:
            here, index, result = base, indices, found
        else:
            here, index, result = (
                {name: t[target] for name, t in tensors.items()} for tensors in (base, indices, found)
            )
        expected = graft_reference(here, start, end, scales, index, model.packing)
        assert all(close(result[name], expected[name]) for name in base)


@settings(max_examples=20)
@given(
    model=models(),
    table=st.data(),
    sources=st.integers(1, 6),  # those that the kernel keeps in registers, and more
    rows=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_combine_equals_the_reference(backend, model, table, sources, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    given_ = [model.tensors(generator) for _ in range(sources)]
    row = st.lists(NUMBERS, min_size=sources, max_size=sources)
    coefficients = table.draw(st.lists(row, min_size=rows, max_size=rows))
    found = combine(given_, coefficients, backend=backend)
    as_tensor = torch.tensor(coefficients, dtype=torch.float64).reshape(rows, sources)
    expected = combine_reference(given_, as_tensor)
    assert found.keys() == expected.keys()
    for name in found:
        # The order of the additions differs; bf16 and fp16 are rounded once in each.
        assert found[name].shape == (rows, *model.shapes[name])
        assert close(found[name], expected[name])


@settings(max_examples=10)
@given(
    shape=st.sampled_from([(), (5,), (5, 3), (5, 2, 3), (0, 5), (5, 300)]),
    count=st.sampled_from([2, 3, 300]),
    odd=st.sampled_from([None, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_small_tensors_that_are_alike_are_computed_as_one(shape, count, odd, seed):
    """On a CPU: several of one shape and slots, some of them of another dtype, more than one stack holds."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"t{number}" for number in range(count)]
    dtypes = {name: odd or torch.float32 if name == "t1" else torch.float32 for name in names}
    axes = {name: tuple({5: "a", 3: "b"}.get(n) for n in shape) for name in names}
    packing = Packing.build(dict.fromkeys(names, shape), axes)
    sets = [{n: torch.randn(shape, generator=generator).to(dtypes[n]) for n in names} for _ in range(3)]
    perm = {"a": torch.randperm(5, generator=generator), "b": torch.randperm(3, generator=generator)}
    table = torch.tensor([[0.5, -1.0, 2.0], [0.0, 1.0, 0.25]])
    moved, expected = permute(sets[0], perm, packing), permute_reference(sets[0], perm, packing)
    grafted, wanted = graft(*sets, [0.5, 1.0], perm, packing), graft_reference(*sets, [0.5, 1.0], perm, packing)
    summed, total = combine(sets, table), combine_reference(sets, table)
    for name in names:
        assert same_bits(moved[name], expected[name])
        assert close(grafted[name], wanted[name]) and close(summed[name], total[name])
        assert moved[name].is_contiguous() and grafted[name].is_contiguous() and summed[name].is_contiguous()
    if moved["t0"].numel():
        assert (
            len({results[name].untyped_storage().data_ptr() for results in (moved, grafted) for name in names}) > count
        )


def test_graft_of_many_targets_and_scales_at_once(backend, generator):
    """Sizes beyond a tile in both directions, every target with its own permutations."""
    packing = Packing.build({"w": (9, 20, 3), "v": (35,)}, {"w": ("a", "b", None), "v": ("c",)})
    targets, scales = 3, [0.5, -1.0]
    base = {
        "w": torch.randn(targets, 9, 20, 3, generator=generator),
        "v": torch.randn(targets, 35, generator=generator),
    }
    start, end = ({name: torch.randn(t.shape[1:], generator=generator) for name, t in base.items()} for _ in "ab")
    indices = {
        slot: torch.stack([torch.randperm(n, generator=generator) for _ in range(targets)])
        for slot, n in packing.slots.items()
    }
    found = graft(base, start, end, scales, indices, packing, backend=backend)
    assert found["w"].shape == (targets, 2, 9, 20, 3)
    for p in range(targets):
        a, b, c = (indices[slot][p] for slot in "abc")
        for k, scale in enumerate(scales):
            moved = (end["w"] - start["w"])[a][:, b]
            torch.testing.assert_close(found["w"][p, k], base["w"][p] + scale * moved)
            torch.testing.assert_close(found["v"][p, k], base["v"][p] + scale * (end["v"] - start["v"])[c])


def test_combine_in_blocks(monkeypatch, generator):
    """The torch path for large tensors: block by block, two sources in one pass, then the rest."""
    monkeypatch.setattr(sys.modules["regraft_kernels.combine"], "SMALL_SUM", 3)
    monkeypatch.setattr(sys.modules["regraft_kernels.memory"], "BLOCK_BYTES", 40)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        sources = [{"w": torch.randn(5, 9, generator=generator).to(dtype)} for _ in range(3)]
        found = combine(sources, [[1.0, 2.0, -1.0], [0.0, 0.5, 3.0]], backend="torch")["w"]
        a, b, c = (source["w"].double() for source in sources)
        expected = torch.stack([a + 2 * b - c, 0.5 * b + 3 * c]).to(dtype)
        torch.testing.assert_close(found, expected)


def test_combine_of_large_tensors(backend, generator):
    """Beyond a tile, with an odd rest."""
    sources = [{"w": torch.randn(7, 11, generator=generator)} for _ in range(3)]
    found = combine(sources, [[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]], backend=backend)["w"]
    a, b, c = (source["w"] for source in sources)
    torch.testing.assert_close(found, torch.stack([a + 2 * b - c, 0.5 * a + 3 * c]))


def test_outputs_given_are_filled_and_may_not_overlap(backend, generator):
    packing = Packing.build({"w": (6, 5)}, {"w": ("a", None)})
    base, start, end = ({"w": torch.randn(6, 5, generator=generator)} for _ in range(3))
    indices = {"a": torch.randperm(6, generator=generator)}
    out = {"w": torch.full((2, 6, 5), torch.nan)}
    assert graft(base, start, end, [1.0, 2.0], indices, packing, backend=backend, out=out)["w"] is out["w"]
    torch.testing.assert_close(out["w"][1], base["w"] + 2 * (end["w"] - start["w"])[indices["a"]])
    out["w"].fill_(torch.nan)
    combine([base, end], [[1, 2], [3, 4]], backend=backend, out=out)
    torch.testing.assert_close(out["w"][1], 3 * base["w"] + 4 * end["w"])
    one = {"w": base["w"].unsqueeze(0)}
    with pytest.raises(ValueError, match="share memory"):
        graft(base, start, end, [1.0], indices, packing, backend=backend, out=one)
    with pytest.raises(ValueError, match="share memory"):
        combine([end, base], [[1.0, 1.0]], backend=backend, out=one)


def test_parameters_that_want_gradients_are_read_like_any_tensor(backend):
    packing = Packing.build({"weight": (3, 4), "bias": (3,)}, {"weight": ("a", None), "bias": ("a",)})
    own = dict(torch.nn.Linear(4, 3).named_parameters())
    indices = {"a": torch.tensor([2, 0, 1])}
    with torch.no_grad():
        moved = permute(own, indices, packing, backend=backend)
        grafted = graft(own, own, own, [1.0], indices, packing, backend=backend)
        combined = combine([own, own], [[1.0, 0.0]], backend=backend)
        S = similarity([Term(own["weight"][None], own["weight"][None], 0)], backend=backend)
    assert torch.equal(moved["bias"], own["bias"].detach()[indices["a"]])
    assert torch.equal(grafted["bias"][0], own["bias"].detach())
    assert torch.equal(combined["weight"][0], own["weight"].detach())
    assert not any(t.requires_grad for t in (moved["bias"], grafted["bias"], combined["bias"], S))


def test_zero_times_nan_is_nan_everywhere(backend):
    bad, fine = {"w": torch.tensor([torch.nan, 1.0])}, {"w": torch.ones(2)}
    for sources in ([bad, fine], [fine, bad]):
        result = combine(sources, [[0.0, 1.0], [1.0, 0.0]], backend=backend)["w"]
        assert result.isnan().tolist() == [[True, False], [True, False]]


@pytest.mark.parametrize("count", [3, 1 << 15])
def test_a_small_coefficient_is_not_lost(backend, count):
    x, y = torch.full((count,), 1e9), torch.ones(count)
    for sources, row in (([x, y], [1e-9, 1 - 1e-9]), ([y, x], [1 - 1e-9, 1e-9])):
        found = combine([{"w": source} for source in sources], [row], backend=backend)["w"]
        assert torch.equal(found[0], torch.full((count,), 2.0)), row


def test_gradients_of_scales_on_the_cpu_come_back_there():
    """Tensors on another device: without values, because there need not be one."""
    graft_module, combine_module = (sys.modules[f"regraft_kernels.{name}"] for name in ("graft", "combine"))
    with FakeTensorMode():
        change = [torch.empty(4, 3, device="cuda") for _ in range(2)]
        gradient, index = (
            torch.empty(2, 4, 3, device="cuda"),
            torch.empty(4, dtype=torch.int64, device="cuda"),
        )
        scales, table = torch.ones(2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
        rest = [0, -1], False, "torch"
        ctx = SimpleNamespace(rest=rest, sizes=(1, 1), saved_tensors=[scales, index, *change])
        found = graft_module._backward(ctx, [gradient])[3]
        assert (found.device, found.shape) == (scales.device, scales.shape)
        ctx = SimpleNamespace(saved_tensors=[table, *change])
        with Devices() as seen:
            found = combine_module._backward(ctx, [gradient])[1]
        assert (found.device, found.shape) == (table.device, table.shape)
        assert seen.large_copies == 0


class Devices(TorchDispatchMode):
    """Counts the copies to the CPU of more than the table's entries."""

    large_copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "_to_copy" and result.device.type == "cpu" and result.numel() > 4:
            self.large_copies += 1
        return result


def test_refuses_what_does_not_fit():
    packing = Packing.build({"w": (4, 2), "n": ()}, {"w": ("a", None)})
    one = {"w": torch.zeros(4, 2)}
    index = {"a": torch.arange(4)}
    for start, end, scales, text in (
        ({}, one, [1.0], "start lacks w"),
        (one, {}, [1.0], "end lacks w"),
        ({"w": torch.zeros(3, 4, 2)}, one, [1.0], "start must have no batch"),
        (one, {"w": torch.zeros(4, 2).double()}, [1.0], "end: dtype of 'w'"),
        (one, {"w": torch.zeros(4, 2, device="meta")}, [1.0], "end: device of 'w'"),
        (one, one, [float("nan")], "scales must be finite"),
    ):
        with pytest.raises(ValueError, match=text):
            graft(one, start, end, scales, index, packing)
    strange = {"w": torch.zeros(4, 2, dtype=torch.complex64)}
    with pytest.raises(ValueError, match="'w' is torch\\.complex64"):
        graft(strange, strange, strange, [1.0], index, packing)
    with pytest.raises(ValueError, match="'w' is torch\\.complex64"):
        combine([strange], [[1.0]])
    with pytest.raises(ValueError, match="slot 'a' has shape"):
        graft({"w": torch.zeros(3, 4, 2)}, one, one, [1.0], index, packing)
    for sources, coefficients, text in (
        ([], [[1.0]], "at least one source"),
        ([one], [[1.0, 2.0]], "coefficients have shape"),
        ([one], [1.0], "coefficients have shape"),
        ([one], [[float("inf")]], "coefficients must be finite"),
        ([one, {"v": one["w"]}], [[1.0, 1.0]], "source 1 and source 0 differ in v, w"),
        ([one, {"w": torch.zeros(2, 4)}], [[1.0, 1.0]], "'w': shape is"),
        ([one, {"w": torch.zeros(4, 2).half()}], [[1.0, 1.0]], "'w': dtype is"),
        ([one, {"w": torch.zeros(4, 2, device="meta")}], [[1.0, 1.0]], "'w' of source 1 is on meta"),
    ):
        with pytest.raises(ValueError, match=text):
            combine(sources, coefficients)
    assert graft({}, {}, {}, [1.0], {}, packing) == {}
    assert combine([{}], [[1.0]]) == {}
