"""What is traced: states as they are saved, inputs by name, outputs by choice; and what cannot be, in one line."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
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
        lambda m, x: m.out((m.gain * (h := m.stem(x).float()) * h.square().mean(-1, True).rsqrt()).to(x.dtype)),
        stem=(4, 6),
        gain=parameter(6),
        out=(6, 2),
    )
    x = torch.rand(3, 4)
    assert verify(trace(net, x), net, x) < 1e-12


@pytest.mark.parametrize("norm", ["new", "old"])
def test_weight_normalised_layers(norm):
    wrap = nn.utils.parametrizations.weight_norm if norm == "new" else nn.utils.weight_norm
    net = Net(lambda m, x: m.out(m.fc(x).relu()), fc=wrap(nn.Linear(4, 6)), out=(6, 2))
    spec = trace(net, torch.rand(3, 4), verify=True)
    assert list(spec.groups.values()) == [6]


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv2d(4, 6, 3, padding=1)], ids=["linear", "conv"])
def test_spectrally_normalised_layers(layer):
    """With the two vectors that the norm is estimated by: they are saved, and move with the weight."""
    stem, out = (nn.Linear, nn.Linear) if isinstance(layer, nn.Linear) else (nn.Conv2d, nn.Conv2d)
    size = () if isinstance(layer, nn.Linear) else (1,)
    fc = nn.utils.parametrizations.spectral_norm(layer)
    net = Net(lambda m, x: m.out(m.fc(m.stem(x)).relu()), stem=stem(3, 4, *size), fc=fc, out=out(6, 2, *size))
    spec = trace(net, torch.rand((2, 3, 5, 5) if size else (2, 3)), verify=True)
    assert sorted(spec.groups.values()) == [4, 6]
    assert "fc.parametrizations.weight.0._u" in spec.axes


@pytest.mark.parametrize("how", ["var", "std_mean", "norm", "batch_norm"])
def test_standardised_weights(how):
    def standard(w: Tensor) -> Tensor:
        if how == "var":
            return (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        if how == "std_mean":
            std, mean = torch.std_mean(w, (1, 2, 3), keepdim=True)
            return (w - mean) / std
        if how == "norm":
            return w / w.norm()
        return F.batch_norm(w.reshape(1, 6, -1), None, None, training=True).reshape(w.shape)

    net = Net(
        lambda m, x: m.out(F.conv2d(m.stem(x), m.gain * standard(m.weight)).relu()),
        stem=nn.Conv2d(2, 4, 1), weight=parameter(6, 4, 3, 3), gain=parameter(6, 1, 1, 1), out=nn.Conv2d(6, 2, 1),
    )  # fmt: skip
    assert sorted(trace(net, torch.rand(2, 2, 5, 5), verify=True).groups.values()) == [4, 6]


def test_what_is_read_by_data_stays_or_passes():
    net = Net(lambda m, x: m.out(m.stem(x)[torch.arange(2), x[..., 0].argmax(1)]), stem=(4, 6), out=(6, 2))
    assert trace(net, torch.rand(2, 5, 4), verify=True).groups == {"stem": 6}
    best = Net(lambda m, x: m.fc(m.stem(x)).topk(2).values, stem=(4, 6), fc=(6, 5))
    assert trace(best, torch.rand(2, 4), verify=True).groups == {"stem": 6, "fc": 5}
    added = Net(lambda m, x: m.fc(m.stem(x)).cumsum(1), stem=(4, 6), fc=(6, 5))
    with pytest.warns(UserWarning, match="cumsum"):
        assert trace(added, torch.rand(2, 4), verify=True).groups == {"stem": 6}


def test_what_cannot_be_traced_says_so_in_one_line(capfd):
    branching = Net(lambda m, x: m.fc(x) if x.sum() > 0 else x, fc=(4, 4))
    texts = Net(lambda m, x: "text", fc=(4, 4))
    for model, complaint in (
        (branching, "cannot trace Net .*Net"),
        (texts, "the output of Net is no tensor"),
        (nn.Linear(4, 4, device="meta"), "'weight' of Linear is on the meta device"),
    ):
        with pytest.raises(ValueError, match=complaint) as caught:
            trace(model, torch.rand(2, 4))
        assert "\n" not in str(caught.value)
    assert "graph" not in capfd.readouterr().out


def test_keyword_inputs_that_are_required_and_devices_that_differ():
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            return self.out(self.fc(x) * scale)

    x = torch.rand(2, 4)
    assert trace(Asking(), x, {"scale": torch.rand(1)}, verify=True).groups == {"fc": 6}
    with pytest.raises(ValueError, match=r"Asking.*'scale'"):
        trace(Asking(), x)
    mixed = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2, device="meta"))
    with pytest.raises(ValueError, match=r"'1.weight' of Sequential is on the meta device"):
        trace(mixed, x)
    with pytest.raises(ValueError, match=r"several devices .*'weight' on cpu.*an input on meta"):
        trace(nn.Linear(4, 2), x.to("meta"))


def test_versions_of_a_state_dictionary_are_kept():
    class Versioned(nn.Linear):
        def _load_from_state_dict(self, state: object, prefix: str, metadata: dict, *rest: object) -> None:
            assert metadata.get("version") == 1
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    model = nn.Sequential(Versioned(4, 6), nn.ReLU(), nn.Linear(6, 2))
    loaded(trace(model, torch.rand(2, 4), verify=True), model)
