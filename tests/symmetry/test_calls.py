"""What is traced: states as they are saved, inputs by name, outputs by choice; and what cannot be, in one line."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Net, parameter
from torch import Tensor, nn

from regraft.symmetry import PermutationSpec, apply, trace, verify


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Rotary(nn.Module):
    """Query and key are multiplied by a table that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)
        self.register_buffer("table", torch.rand(5, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x) * self.table, self.k(x) * self.table
        return self.out(torch.nn.functional.scaled_dot_product_attention(q, k, self.v(x)))


def loaded(spec: PermutationSpec, model: nn.Module) -> nn.Module:
    """A copy of a model into which its permuted state dictionary is loaded."""
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(apply(spec, spec.random(torch.Generator().manual_seed(1)), model.state_dict()))
    return fresh


def test_what_is_not_saved_is_a_constant():
    model, x = Rotary().double(), torch.rand(2, 5, 4).double()
    spec = trace(model, x, verify=True)
    assert "table" not in spec.axes
    assert spec.groups == {"v": 8}
    assert torch.allclose(loaded(spec, model)(x), model(x), atol=1e-12)
    assert spec.proven
    assert PermutationSpec.from_json(spec.to_json()).proven
    assert not PermutationSpec.from_json(spec.to_json().replace('["v"]', "[8]")).proven
    assert not spec.with_axis("v.bias", 0, spec.axes["v.bias"][0]).proven


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, *, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        features = self.norm(self.stem(left + right))
        return {"features": features, "logits": self.head(features)}

    def embed(self, x: Tensor) -> Tensor:
        return self.stem(x)


def test_outputs_and_inputs_by_name():
    model, inputs = Several(), {"left": torch.rand(2, 4), "right": torch.rand(2, 4)}
    spec = trace(model, inputs, verify=True)
    assert spec.groups == {"stem": 6}
    assert trace(model, kwargs=inputs) == spec
    assert trace(model, inputs, output="features").groups == {"head": 3}  # logits are a by-product then
    both = trace(model, inputs, output=("logits", "features"))
    assert both.groups == {}
    with pytest.raises(ValueError, match="output 'absent' of Several is no tensor"):
        trace(model, inputs, output="absent")
    with pytest.warns(UserWarning, match="not used"):
        assert trace(model, torch.rand(2, 4), forward="embed").groups == {}
    perm = spec.random(torch.Generator().manual_seed(1))
    assert apply(spec, perm, dict(model.named_parameters())).keys() == dict(model.named_parameters()).keys()


def test_casts_to_less_are_lifted_in_the_proof():
    net = Net(
        lambda m, x: m.out(
            (m.gain * (h := m.stem(x).float()) * h.square().mean(-1, True).rsqrt()).to(x.dtype)
        ),
        stem=nn.Linear(4, 6),
        gain=parameter(6),
        out=nn.Linear(6, 2),
    )
    x = torch.rand(3, 4)
    assert verify(trace(net, x), net, x) < 1e-12


@pytest.mark.parametrize("norm", ["new", "old"])
def test_weight_normalised_layers(norm):
    wrap = nn.utils.parametrizations.weight_norm if norm == "new" else nn.utils.weight_norm
    net = Net(lambda m, x: m.out(m.fc(x).relu()), fc=wrap(nn.Linear(4, 6)), out=nn.Linear(6, 2))
    spec = trace(net, torch.rand(3, 4), verify=True)
    assert list(spec.groups.values()) == [6]


def test_what_is_read_by_data_stays_or_passes():
    net = Net(
        lambda m, x: m.out(m.stem(x)[torch.arange(2), x[..., 0].argmax(1)]),
        stem=nn.Linear(4, 6),
        out=nn.Linear(6, 2),
    )
    assert trace(net, torch.rand(2, 5, 4), verify=True).groups == {"stem": 6}
    routed = Net(
        lambda m, x: m.router(m.stem(x)).topk(2).values, stem=nn.Linear(4, 6), router=nn.Linear(6, 5)
    )
    with pytest.warns(UserWarning, match="topk"):
        assert trace(routed, torch.rand(2, 4), verify=True).groups == {"stem": 6}


def test_what_cannot_be_traced_says_so_in_one_line(capfd):
    branching = Net(lambda m, x: m.fc(x) if x.sum() > 0 else x, fc=nn.Linear(4, 4))
    texts = Net(lambda m, x: "text", fc=nn.Linear(4, 4))
    for model, complaint in (
        (branching, "cannot trace Net .*Net"),
        (texts, "the output of Net is no tensor"),
        (nn.Linear(4, 4, device="meta"), "'weight' of Linear is on the meta device"),
    ):
        with pytest.raises(ValueError, match=complaint) as caught:
            trace(model, torch.rand(2, 4))
        assert "\n" not in str(caught.value)
    assert "graph" not in capfd.readouterr().out


def test_versions_of_a_state_dictionary_are_kept():
    class Versioned(nn.Linear):
        def _load_from_state_dict(self, state: object, prefix: str, metadata: dict, *rest: object) -> None:
            assert metadata.get("version") == 1
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    model = nn.Sequential(Versioned(4, 6), nn.ReLU(), nn.Linear(6, 2))
    loaded(trace(model, torch.rand(2, 4), verify=True), model)
