"""What a router chooses, and gates: experts exchange whole, and a gate ties nothing that it multiplies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import Net, parameter, proved, share
from torch import Tensor, nn

from regraft.symmetry import trace, verify

EXPERTS, HIDDEN = 5, 6


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def routed(experts: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Net:
    """A mixture of experts between two linear layers: ``experts(m, h [T, 8], probabilities [T, E])`` -> [T, 8]."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.stem(x).tanh()
        return m.out(h + experts(m, h, m.router(h).softmax(-1)))

    return Net(
        forward, stem=(3, 8), router=nn.Linear(8, EXPERTS), out=(8, 2),
        up=parameter(EXPERTS, HIDDEN, 8), bias=parameter(EXPERTS, HIDDEN), down=parameter(EXPERTS, 8, HIDDEN),
    )  # fmt: skip


def looked_up(m: nn.Module, h: Tensor, p: Tensor) -> Tensor:
    """The weights of the chosen experts, for each token."""
    best, which = p.topk(2, dim=-1)
    which, rows = which.reshape(-1), h.repeat_interleave(2, 0)
    inner = torch.bmm(m.up[which], rows.unsqueeze(-1)).squeeze(-1) + m.bias[which]
    outer = torch.bmm(inner.relu().unsqueeze(1), m.down[which].transpose(1, 2)).squeeze(1)
    return (outer * best.reshape(-1, 1)).view(-1, 2, 8).sum(1)


def test_experts_exchange_whole_where_they_are_looked_up():
    net = routed(looked_up)
    spec = proved(net, 4, 3)
    assert spec.groups == {"stem": 8, "router": EXPERTS, "up": HIDDEN}
    axes = [spec.axes[name][0][0].group for name in ("router.weight", "router.bias", "up", "bias", "down")]
    assert axes == ["router"] * 5
    assert share(spec, net) > 0.99


def test_the_best_expert_alone_and_what_its_probability_is():
    def best(m: nn.Module, h: Tensor, p: Tensor) -> Tensor:
        which = p.argmax(-1)
        weight = p.gather(1, which[:, None])
        inner = torch.relu(m.up[which] @ h[..., None] + m.bias[which][..., None])
        return (m.down[which] @ inner)[..., 0] * weight

    assert proved(routed(best), 4, 3).groups["router"] == EXPERTS


@pytest.mark.parametrize("kind", ["scatter", "one_hot"])
def test_a_router_that_masks(kind):
    def masked(m: nn.Module, h: Tensor, p: Tensor) -> Tensor:
        best, which = p.topk(2, dim=-1)
        if kind == "scatter":
            kept = torch.zeros(4, EXPERTS).scatter(1, which, best)
        else:
            kept = F.one_hot(which, EXPERTS).sum(1) * p
        return F.linear(kept, m.mix.T)

    net = routed(masked)
    net.mix = parameter(EXPERTS, 8)
    with pytest.warns(UserWarning, match="not used"):
        spec = trace(net, torch.rand(4, 3))
    assert verify(spec, net, torch.rand(4, 3)) < 1e-12
    assert spec.groups["router"] == EXPERTS
    assert spec.axes["mix"][0][0].group == "router"


@pytest.mark.parametrize("use", ["number", "output", "unsorted"])
def test_a_choice_that_is_used_otherwise_keeps_the_experts_where_they_are(use):
    def experts(m: nn.Module, h: Tensor, p: Tensor) -> Tensor:
        best, which = p.topk(2, dim=-1, sorted=use != "unsorted")
        if use == "number":
            return h * which.sum(-1, keepdim=True)
        return h * best[:, :1]

    net = routed(experts)
    if use == "output":
        inner = net.function
        net.function = lambda m, x: (m.router(m.stem(x)).argmax(-1), inner(m, x))
    with pytest.warns(UserWarning):
        spec = trace(net, torch.rand(4, 3), output=[0, 1] if use == "output" else None)
    verify(spec, net, torch.rand(4, 3), output=[0, 1] if use == "output" else None)
    assert "router" not in spec.groups


def test_units_in_the_order_of_their_values_have_no_order_of_their_own():
    net = Net(lambda m, x: m.out(m.stem(x).sort(-1).values), stem=(4, 6), out=(6, 2))
    spec = proved(net, 3, 4)
    assert spec.groups == {"stem": 6}
    assert spec.axes["out.weight"][1][0].group is None


def test_rows_of_a_parameter_that_the_input_looks_up_stay_and_their_columns_move():
    net = Net(
        lambda m, x: m.out(m.inner(m.table[x.long()] + m.bias)),
        table=parameter(9, 6), bias=parameter(6), inner=(6, 5), out=(5, 2),
    )  # fmt: skip
    spec = proved(net, 2, 3)
    assert sorted(spec.groups.values()) == [5, 6]
    assert spec.axes["table"][0][0].group is None


def test_a_gate_ties_nothing_that_it_multiplies():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h, gates = m.stem(x).split([8, 3], 1)
        return m.out(sum(h.relu() * gates[:, i : i + 1] for i in range(3)))

    net = Net(forward, stem=(4, 11), out=(8, 2))
    assert 8 in proved(net, 2, 4).groups.values()


def test_gates_of_heads_move_with_them():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.stem(x)
        return m.out((m.values(h).unflatten(1, (3, 4)) * m.gate(h).sigmoid()[..., None]).flatten(1))

    net = Net(forward, stem=(5, 6), values=(6, 12), gate=(6, 3), out=(12, 2))
    spec = proved(net, 2, 5)
    assert spec.groups == {"stem": 6, "values/blocks": 3, "values": 12}
    assert spec.axes["gate.weight"][0][0].group == "values/blocks"


def test_one_unit_with_a_value_for_each_place_is_no_gate():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        places = m.places(x.unsqueeze(1))  # [B, 4, 5]: a channel is one unit, at five places
        return m.out((places * m.stem(x).unflatten(1, (4, 5))).flatten(1))

    net = Net(forward, places=nn.Conv1d(1, 4, 1), stem=(5, 20), out=(20, 2))
    assert proved(net, 2, 5).groups == {"places": 4}


def test_tokens_with_positions_of_their_own_before_the_first_norm():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.norm(torch.cat([m.token, m.stem(x) + m.places[..., None, None]], 2).flatten(2).mT)
        return m.out(h + m.inner(m.second(h)))[:, 0]

    net = Net(
        forward, stem=nn.Conv2d(2, 6, 1), token=parameter(1, 6, 1, 9), places=parameter(6), norm=nn.LayerNorm(6),
        second=nn.LayerNorm(6), inner=(6, 6), out=(6, 2),
    )  # fmt: skip
    assert proved(net, 1, 2, 9, 9).groups == {"stem": 6}


@pytest.mark.parametrize("select", [False, True])
def test_branches_that_are_added_have_the_same_units(select):
    """A selective kernel: a softmax over branches weighs their channels."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.stack([m.a(x), m.b(x)], 1).relu()
        if select:
            h = h * m.weigh(h.sum(1).mean((2, 3))).view(-1, 2, 6, 1, 1).softmax(1)
        return m.out(h.sum(1))

    layers = {"a": nn.Conv2d(2, 6, 1), "b": nn.Conv2d(2, 6, 1), "out": nn.Conv2d(6, 2, 1)}
    net = Net(forward, **layers, **({"weigh": (6, 12)} if select else {}))
    assert proved(net, 1, 2, 3, 3).groups == {"a": 6}
