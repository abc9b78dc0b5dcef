"""What stays is named: the tensor, the operator, the module, and what happened there."""

from __future__ import annotations

import warnings

import pytest
import torch
from nets import Net, proved
from torch import nn

from regraft.symmetry import trace, verify


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


LOSSES = {
    "makes one unit of them": (Net(lambda m, h: h + h.roll(1, -1)), "add"),
    "tells them apart": (Net(lambda m, h: h * torch.arange(6.0)), "mul"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_warning_names_operator_module_and_tensor_of_lost_units(loss):
    mix, operator = LOSSES[loss]
    net = Net(lambda m, x: m.out(m.mix(m.stem(x))), stem=(4, 6), out=(6, 2), mix=mix)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        spec = trace(net, torch.rand(3, 4))
    (message,) = [str(w.message) for w in seen if loss in str(w.message)]
    assert "stay fixed" in message and f"aten.{operator}." in message and "'mix' (Net)" in message
    assert "'stem.weight'" in message and loss in spec.reasons["stem.weight:0"]
    assert loss in str(spec) and verify(spec, net, torch.rand(3, 4)) < 1e-10


def test_ends_and_lookups_are_reasons_without_a_warning():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = trace(net, torch.randint(0, 9, (3, 5)))
    assert spec.reasons["3.weight:0"] == "an output"
    assert "embedding" in spec.reasons["0.weight:0"] and "'0' (Embedding)" in spec.reasons["0.weight:0"]
    assert "3.weight:0 (an output)" in str(spec)


def test_a_proof_is_made_where_it_is_cheap_and_the_specification_says_so():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.rand(3, 4)
    made, left = trace(net, x), trace(net, x, verify=False)
    assert made == left and (made.proven, left.proven) == (True, False)
    assert "; proved" in str(made) and "not proved" in str(left)


def test_a_model_that_cannot_be_proved_is_traced_with_a_warning():
    net = Net(lambda m, x: m.out(m.stem(x) + torch.rand(3, 6)), stem=(4, 6), out=(6, 2))
    with pytest.warns(UserWarning, match="not proved: cannot verify: Net gives two results"):
        assert not trace(net, torch.rand(3, 4)).proven
    with pytest.raises(ValueError, match="cannot verify"):
        trace(net, torch.rand(3, 4), verify=True)


def test_axes_without_an_effect_are_reported():
    net = Net(
        lambda m, x: m.out(m.stem(x)) + 0 * m.idle(m.spare(x)), stem=(4, 6), out=(6, 2), spare=(4, 5), idle=(5, 2)
    )
    x = torch.rand(3, 4)
    spec = trace(net, x)
    assert set(spec.idle) == {"spare.weight:0", "spare.bias:0", "idle.weight:1"}
    assert "no effect on the output, not proved: spare.weight:0" in str(spec)
    with pytest.warns(
        UserWarning, match="no effect on the output of Net, so that nothing is proved: axes spare.weight"
    ):
        verify(spec, net, x)


def test_sizes_that_a_constant_mask_decides_are_known():
    mask = torch.tensor([True, False, True, True, False])
    net = Net(lambda m, x: m.out(m.stem(x)[:, mask]), stem=(4, 6), out=(6, 2))
    assert proved(net, 3, 5, 4).groups == {"stem": 6}
