"""Kinds of networks whose wrong symmetry would pass in silence; each was once found wrong."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from nets import proved
from torch import nn

from regraft.symmetry import trace, verify


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- tensors that share memory


def layers() -> nn.Sequential:
    linear = [nn.Linear(*sizes) for sizes in ((4, 6), (6, 6), (6, 6), (6, 2))]
    return nn.Sequential(*(x for layer in linear for x in (layer, nn.Tanh())))


def share_data(model: nn.Sequential) -> None:
    model[4].weight.data = model[2].weight.data


def share_transposed(model: nn.Sequential) -> None:
    model[4].weight = nn.Parameter(model[2].weight.t())


def share_part(model: nn.Sequential) -> None:
    memory = torch.randn(40)
    model[2].weight.data, model[4].weight.data = memory[:36].view(6, 6), memory[4:].view(6, 6)


def share_with_constant(model: nn.Sequential) -> None:
    model[4].scale = model[2].weight.data[0]
    model[4].register_forward_hook(lambda m, inputs, output: output * m.scale)


@pytest.mark.parametrize("tie", [share_data, share_transposed, share_part, share_with_constant])
def test_tensors_that_share_memory_move_alike_or_stay(tie):
    free, tied = layers(), layers()
    tie(tied)
    x = torch.rand(3, 4)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        spec = trace(tied, x)
    assert verify(spec, tied, x) < 1e-10
    assert [tuple(axis) for axis in spec.axes["2.weight"]] == [tuple(axis) for axis in spec.axes["4.weight"]]
    assert any("different layouts" in str(w.message) for w in seen) == (tie is not share_data)
    assert spec.groups == ({"0": 6} if tie is share_data else {})
    if tie is not share_with_constant:
        with pytest.raises(ValueError, match="changes the function"):  # the proof keeps the memory shared
            verify(trace(free, x), tied, x)


def test_parts_of_one_memory_that_do_not_overlap_are_independent():
    model = layers()
    memory = torch.randn(72)
    model[2].weight.data, model[4].weight.data = memory[:36].view(6, 6), memory[36:].view(6, 6)
    assert sorted(proved(model, 3, 4).groups.values()) == [6, 6, 6]


def test_a_buffer_of_two_modules_is_one():
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
    )
    model[3].running_mean = model[1].running_mean
    assert proved(model, 3, 4).groups == {"0": 6}
    with pytest.raises(ValueError, match="changes the function"):
        separate = copy.deepcopy(model)
        separate[3].running_mean = torch.zeros(6)
        verify(trace(separate, torch.rand(3, 4)), model, torch.rand(3, 4))
