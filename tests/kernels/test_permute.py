"""permute: gather and scatter, exact to the bit."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import models, same_bits

from regraft_kernels import Packing, graft, permute
from regraft_kernels import backend as backend_module
from regraft_kernels import indices as indices_module
from regraft_kernels.permute import _units, permute_reference


@settings(max_examples=25)
@given(model=models(), inverse=st.booleans(), lead=st.sampled_from([(), (1,), (3,)]), seed=st.integers(0, 99))
def test_equals_the_reference_to_the_bit(backend, model, inverse, lead, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors, indices = model.tensors(generator, lead), model.indices(generator)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    moved = permute(tensors, indices, model.packing, inverse=inverse, backend=backend)
    expected = permute_reference(tensors, indices, model.packing, inverse=inverse)
    assert moved.keys() == tensors.keys()
    for name in tensors:
        assert same_bits(moved[name], expected[name]), name
        assert same_bits(tensors[name], before[name]), name


def test_more_models_and_targets_than_a_grid_has_room_for(backend, monkeypatch, generator):
    for module in ("launch", "indices"):
        monkeypatch.setattr(sys.modules[f"regraft_kernels.{module}"], "GRID", 2)
    packing = Packing.build({"w": (3, 4)}, {"w": ("a", "b")})
    many = torch.randn(5, 3, 4, generator=generator)
    index = {
        slot: torch.stack([torch.randperm(n, generator=generator) for _ in range(5)])
        for slot, n in packing.slots.items()
    }
    one = {slot: vector[0] for slot, vector in index.items()}
    moved = permute({"w": many}, one, packing, backend=backend)["w"]
    assert torch.equal(moved, many[:, one["a"]][:, :, one["b"]])
    zero = {"w": torch.zeros(3, 4)}
    grafted = graft({"w": torch.zeros(5, 3, 4)}, zero, {"w": many[0]}, [1.0], index, packing, backend=backend)["w"]
    for target in range(5):
        assert torch.equal(grafted[target, 0], many[0][index["a"][target]][:, index["b"][target]])


def test_memory_that_is_not_aligned_is_moved_too(backend, generator):
    """Addresses that no 16-byte access can read; row lengths that are multiples of 16 bytes, and others."""
    packing = Packing.build({"w": (8, 16, 2), "v": (4, 8), "u": (64,)}, {"w": ("a", "b", None), "v": ("c", None)})
    indices = {slot: torch.randperm(n, generator=generator) for slot, n in packing.slots.items()}
    memory = torch.randn(2, 1000, generator=generator)
    tensors = {"w": memory[0, 1:257].view(8, 16, 2), "v": memory[0, 300:332].view(4, 8), "u": memory[1, 3:67]}
    moved = permute(tensors, indices, packing, backend=backend)
    for name, expected in permute_reference(tensors, indices, packing).items():
        assert torch.equal(moved[name], expected), name


@pytest.mark.parametrize("inverse", [False, True])
def test_prepared_indices_do_the_same_and_are_checked(backend, inverse, generator):
    packing = Packing.build({"w": (6, 5), "v": (6,)}, {"w": ("a", "b"), "v": ("a",)})
    tensors = {"w": torch.randn(6, 5, generator=generator), "v": torch.randn(6, generator=generator)}
    indices = {"a": torch.randperm(6, generator=generator), "b": torch.randperm(5, generator=generator)}
    prepared = packing.prepare(indices, inverse=inverse, backend=backend)
    expected = permute(tensors, indices, packing, inverse=inverse, backend=backend)
    for _ in range(2):
        for name, tensor in permute(tensors, prepared, packing, backend=backend).items():
            assert torch.equal(tensor, expected[name])
    half = packing.prepare({"a": indices["a"]}, backend=backend)
    stacked = packing.prepare({s: v.expand(2, -1) for s, v in indices.items()}, targets=2, backend=backend)
    other = Packing.build({"w": (6, 4)}, {"w": ("a", "b")})
    for call, text in (
        (lambda: permute(tensors, half, packing, backend=backend), "slot 'b' is missing"),
        (lambda: permute(tensors, stacked, packing, backend=backend), "indices are for 2 targets"),
        (
            lambda: permute(tensors, prepared, packing, inverse=True, backend=backend),
            "whether they are inverted",
        ),
        (lambda: permute({"w": torch.zeros(6, 4)}, prepared, other, backend=backend), "slot 'b' has shape"),
        (lambda: packing.prepare({"a": torch.zeros(6).long()}, backend=backend), "'a' is not a permutation"),
        (lambda: packing.prepare({"c": indices["a"]}), "no slot is named c"),
        (lambda: packing.prepare({}), "there are none"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_what_prepared_indices_compose_is_waited_for_once(backend, monkeypatch, generator):
    """Another stream may read it next; a dictionary's tables serve one call alone, which waits for nothing."""
    waits = []
    monkeypatch.setattr(indices_module, "wait_for", waits.append)
    packing = Packing.build({"w": (3, 200)}, {"w": ("a", "b")})
    tensors = {"w": torch.randn(3, 200, generator=generator)}
    vectors = {"a": torch.randperm(3), "b": torch.randperm(200)}
    permute(tensors, vectors, packing, backend=backend)
    assert waits == []
    prepared = packing.prepare(vectors, backend=backend)
    for _ in range(3):
        permute(tensors, prepared, packing, backend=backend)
    assert len(waits) == {"torch": 2, "triton": 1}[backend]


def test_a_device_that_reports_no_assertion_is_waited_for(backend, monkeypatch):
    """AMD's builds leave assertions out: a vector that is no permutation would be clamped in silence."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.version, "hip", None)
    assert backend_module.reports_assertions(cuda) and not backend_module.reports_assertions(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not backend_module.reports_assertions(cuda)
    packing, wrong = Packing.build({"v": (3,)}, {"v": ("a",)}), {"a": torch.tensor([0, 0, 2])}
    for reports, error in ((False, ValueError), (True, RuntimeError)):
        monkeypatch.setattr(indices_module, "reports_assertions", lambda device, reports=reports: reports)
        with pytest.raises(error, match=r"no(t a)? permutation"):
            permute({"v": torch.zeros(3)}, wrong, packing, backend=backend)


@pytest.mark.parametrize("block_bytes", [1, 400])
def test_blocks_of_rows_join_up(block_bytes, monkeypatch, generator):
    monkeypatch.setattr(sys.modules["regraft_kernels.memory"], "BLOCK_BYTES", block_bytes)
    packing = Packing.build({"w": (9, 5, 3), "v": (4, 7)}, {"w": ("a", "b", None), "v": (None, "c")})
    tensors = {"w": torch.randn(9, 5, 3, generator=generator), "v": torch.randn(4, 7, generator=generator)}
    indices = {slot: torch.randperm(n, generator=generator) for slot, n in packing.slots.items()}
    moved = permute(tensors, indices, packing)
    assert torch.equal(moved["w"], tensors["w"][indices["a"]][:, indices["b"]])
    assert torch.equal(moved["v"], tensors["v"][:, indices["c"]])


def test_inverse_undoes_and_nan_survives(backend, generator):
    packing = Packing.build({"w": (7, 2, 7)}, {"w": ("a", None, "a")})
    tensors = {"w": torch.randn(7, 2, 7, generator=generator)}
    tensors["w"][0, 0, 0], tensors["w"][1, 1, 1] = torch.nan, torch.inf
    indices = {"a": torch.randperm(7, generator=generator)}
    moved = permute(tensors, indices, packing, backend=backend)
    back = permute(moved, indices, packing, inverse=True, backend=backend)
    assert same_bits(back["w"], tensors["w"])


def test_fills_out_and_refuses_overlap(backend, generator):
    packing = Packing.build({"w": (6, 5), "v": (6,)}, {"w": ("a", None), "v": ("a",)})
    memory = torch.randn(100, generator=generator)
    tensors = {"w": memory[:30].view(6, 5), "v": memory[30:36]}
    indices = {"a": torch.randperm(6, generator=generator)}
    out = {"w": torch.full((6, 5), torch.nan), "v": torch.full((6,), torch.nan)}
    moved = permute(tensors, indices, packing, backend=backend, out=out)
    assert moved["w"] is out["w"]
    assert torch.equal(out["w"], tensors["w"][indices["a"]])
    for where, text in ((memory[35:65], "share memory"), (memory[10:40], "share memory")):
        with pytest.raises(ValueError, match=text):
            permute(tensors, indices, packing, backend=backend, out={**out, "w": where.view(6, 5)})
    with pytest.raises(ValueError, match="share memory"):
        shared = torch.empty(33)
        bad = {"w": shared[:30].view(6, 5), "v": shared[27:33]}
        permute(tensors, indices, packing, backend=backend, out=bad)
    with pytest.raises(ValueError, match="not contiguous"):
        permute(tensors, indices, packing, backend=backend, out={**out, "w": torch.empty(5, 6).T})
    with pytest.raises(ValueError, match="out: 'w' is"):
        permute(tensors, indices, packing, backend=backend, out={**out, "w": torch.empty(5, 5)})
    with pytest.raises(ValueError, match="out lacks 'v'"):
        permute(tensors, indices, packing, backend=backend, out={"w": out["w"]})


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ([0, 1, 2, 2], "slot 'a' is not a permutation"),
        ([0, 1, 2, 4], "slot 'a' is not a permutation"),
        ([0, 1, 2, -1], "slot 'a' is not a permutation"),
        ([0, 1, 2], "has shape"),
        ([[0, 1, 2, 3]], "has shape"),
    ],
)
def test_refuses_what_is_no_permutation(backend, index, text):
    packing = Packing.build({"w": (4, 2)}, {"w": ("a", None)})
    with pytest.raises(ValueError, match=text):
        permute({"w": torch.zeros(4, 2)}, {"a": torch.tensor(index)}, packing, backend=backend)


def test_refuses_what_does_not_fit():
    packing = Packing.build({"w": (4, 2), "v": (4,)}, {"w": ("a", None)})
    fine, index = torch.zeros(4, 2), torch.arange(4)
    for tensors, indices, text in (
        ({"w": fine, "x": fine}, {"a": index}, "'x' is not in the packing"),
        ({"w": torch.zeros(2, 4)}, {"a": index}, "'w' has shape"),
        ({"w": torch.zeros(1, 1, 4, 2)}, {"a": index}, "'w' has shape"),
        ({"w": fine, "v": torch.zeros(3, 4)}, {"a": index}, "'v' has leading dimensions"),
        ({"w": fine.to("meta"), "v": torch.zeros(4)}, {"a": index}, "'v' is on cpu"),
        ({"w": fine}, {}, "slot 'a' is missing"),
        ({"w": fine}, {"a": index.int()}, "slot 'a' must be an int64 tensor"),
        ({"w": fine}, {"a": [0, 1, 2, 3]}, "slot 'a' must be an int64 tensor, not list"),
        ({"w": fine}, {"a": index.to("meta")}, "slot 'a' is on meta"),
    ):
        with pytest.raises(ValueError, match=text):
            permute(tensors, indices, packing)
    with pytest.raises(ValueError, match="backend must be one of"):
        permute({"w": fine}, {"a": index}, packing, backend="numba")
    assert permute({}, {}, packing) == {}


def test_each_tensor_moves_by_its_own_element_size():
    """One tensor of two bytes makes no other move as pairs; a counter of eight bytes needs no launch of its own."""
    assert _units((4, 2, 8, 1)) == ((torch.int32, 1), (torch.int16, 1), (torch.int32, 2), (torch.int8, 1))
    assert _units((2, 8, 16)) == ((torch.int16, 1), (torch.int16, 4), (torch.int16, 8))
    assert _units((8, 16, 1)) == ((torch.int64, 1), (torch.int64, 2), (torch.int8, 1))
