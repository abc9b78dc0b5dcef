"""permute: gather and scatter, exact to the bit."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import models, same_bits

from regraft_kernels import Packing, permute
from regraft_kernels.permute import permute_reference


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


@pytest.mark.parametrize("block_bytes", [1, 400])
def test_blocks_of_rows_join_up(block_bytes, monkeypatch, generator):
    monkeypatch.setattr(sys.modules["regraft_kernels.permute"], "BLOCK_BYTES", block_bytes)
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
