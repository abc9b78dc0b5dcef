"""Kinds of networks whose wrong symmetry would pass in silence; each was once found wrong."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import Net, parameter, proved
from torch import Tensor, nn

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
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    model[3].running_mean = model[1].running_mean
    assert proved(model, 3, 4).groups == {"0": 6}
    with pytest.raises(ValueError, match="changes the function"):
        separate = copy.deepcopy(model)
        separate[3].running_mean = torch.zeros(6)
        verify(trace(separate, torch.rand(3, 4)), model, torch.rand(3, 4))


# ---- single scalars, parts of axes, and changed parts


def soup(m: Net, x: Tensor) -> Tensor:
    share = m.alpha.softmax(0)
    return m.out((x @ (share[0] * m.u + share[1] * m.v)).tanh())


def scaled_by_a_norm(m: Net, x: Tensor) -> Tensor:
    return m.out(x @ (m.u * m.norm.weight[3]) + m.norm(x @ m.v))


def scaled_by_an_activation(m: Net, x: Tensor) -> Tensor:
    h = (x @ m.u).tanh()
    return m.out((h + x @ (m.v * h[0, 2])).sin())


def parametric_slope(m: Net, x: Tensor) -> Tensor:
    return m.out(nn.functional.prelu(x @ m.u, m.norm.weight[2:3]) + m.norm(x @ m.v))


def sum_of_scalars(m: Net, x: Tensor) -> Tensor:
    return m.out((m.alpha[0] * (x @ m.u) + m.alpha[1] * (x @ m.v)).tanh())


SCALARS = {
    "alpha": parameter(2),
    "u": parameter(4, 6),
    "v": parameter(4, 6),
    "norm": nn.LayerNorm(6),
    "out": (6, 2),
}


@pytest.mark.parametrize(
    ("function", "sizes", "rows"),
    [
        (soup, [6], 3), (scaled_by_a_norm, [5], 3), (scaled_by_an_activation, [5], 1), (parametric_slope, [5], 3),
        (sum_of_scalars, [6], 3),
    ],
)  # fmt: skip
def test_a_scalar_that_is_selected_stays_and_what_it_meets_moves(function, sizes, rows):
    used = {name: copy.deepcopy(member) for name, member in SCALARS.items() if name in function.__code__.co_names}
    spec = proved(Net(function, **used), rows, 4, draws=4)
    assert sorted(spec.groups.values()) == sizes


def rows_in_another_order(m: Net, x: Tensor) -> Tensor:
    return m.out((x @ m.w[[0, 3]].T).tanh() + (x @ m.w[[1, 2]].T).sin())


def columns_after_a_shuffle(m: Net, x: Tensor) -> Tensor:
    h = (x @ m.w.T).tanh()
    both = h[:, [0, 3]] @ m.back[:, :2].T + h[:, [2, 1]].sin() @ m.back[:, 2:].T
    return both + (h[:, [0, 3]] + h[:, [1, 2]]) @ m.back[:, :2].T


def halves_in_order(m: Net, x: Tensor) -> Tensor:
    return m.out((x @ m.w[:2].T).tanh() + (x @ m.w[2:].T).sin())


@pytest.mark.parametrize(
    ("function", "sizes"),
    [(rows_in_another_order, []), (columns_after_a_shuffle, []), (halves_in_order, [2])],
)
def test_parts_of_an_axis_keep_the_order_of_the_axis(function, sizes):
    members = {"w": parameter(4, 4), "back": parameter(2, 4), "out": (2, 3)}
    used = {name: member for name, member in members.items() if name in function.__code__.co_names}
    assert sorted(proved(Net(function, **used), 3, 4, draws=4, losses=not sizes).groups.values()) == sizes


@pytest.mark.parametrize("split", [lambda t: t.view(2, 2), lambda t: t.chunk(2), lambda t: (t[:2], t[2:])])
def test_a_part_of_something_changed_is_told_from_the_same_part_changed_otherwise(split):
    def forward(m: Net, x: Tensor) -> Tensor:
        first, second = split(m.p.exp())
        return m.out(torch.cat([first, m.p.sin(), second]) * x)

    assert sorted(proved(Net(forward, p=parameter(4), out=(8, 2)), 3, 1, draws=4).groups.values()) == [2, 2]


# ---- constants that a dimension of length 1 makes


def angles(length: int) -> Tensor:
    return torch.arange(length)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])


def rotary(m: Net, x: Tensor) -> Tensor:
    h = m.stem(x)
    return m.out(h * angles(x.shape[1]).cos())


def linear_bias(m: Net, x: Tensor) -> Tensor:
    q, k, v = (layer(x).unflatten(-1, (4, 3)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    distance = (torch.ones(x.shape[:2]).cumsum(-1) - 1)[:, None, None]
    return m.mix((q @ k.mT + distance * m.slopes).softmax(-1).matmul(v).transpose(1, 2).flatten(2))


def table(m: Net, x: Tensor) -> Tensor:
    return m.out(m.stem(x) + m.sines[: x.shape[1]])


LENGTHS = {
    rotary: ({"stem": (3, 4), "out": (4, 2)}, [2, 2]),
    table: ({"stem": (3, 4), "out": (4, 2), "sines": None}, [2, 2]),
    linear_bias: (
        {"q": (3, 12), "k": (3, 12), "v": (3, 12), "mix": (12, 2), "slopes": None}, [2, 2, 6, 6, 6, 6]
    ),
}  # fmt: skip


@pytest.mark.parametrize("function", LENGTHS)
def test_one_token_does_not_hide_what_longer_inputs_tell_apart(function):
    members, sizes = LENGTHS[function]
    net = Net(function, **{name: member for name, member in members.items() if member})
    net.register_buffer("sines", angles(8).sin(), persistent=False)
    net.register_buffer("slopes", torch.tensor([0.5, 0.5, 0.1, 0.1]).view(1, 4, 1, 1), persistent=False)
    one, five = torch.rand(2, 1, 3), torch.rand(2, 5, 3)
    with pytest.warns(UserWarning, match="dimension of length 1"):
        short = trace(net, one)
    assert verify(short, net, five) < 1e-10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = trace(net, one, other_inputs=five)
        assert trace(net, five) == both
    assert sorted(both.groups.values()) == sizes
    assert verify(both, net, one, other_inputs=five) < 1e-10
    assert sum(short.groups.values()) < sum(both.groups.values())


def test_a_proof_with_one_token_looks_at_two():
    net = Net(table, stem=(3, 4), out=(4, 2))
    net.register_buffer("sines", angles(8).sin(), persistent=False)
    free = trace(Net(lambda m, x: m.out(m.stem(x)), stem=(3, 4), out=(4, 2)), torch.rand(2, 1, 3))
    for inputs in ({}, {"other_inputs": torch.rand(2, 2, 3)}):
        with pytest.raises(ValueError, match="changes the function"):
            verify(free, net, torch.rand(2, 1, 3), **inputs)


# ---- choices among equal values


@pytest.mark.parametrize(
    ("activation", "moves"),
    [(torch.relu, False), (F.relu6, False), (F.hardsigmoid, False), (torch.round, False),
     (lambda h: h * (h > 0), False), (torch.sigmoid, True),
     (lambda h: (h / 2).softmax(-1), True), (lambda h: h.float().exp().view(h.shape), True)],
)  # fmt: skip
@pytest.mark.parametrize("by", ["one_hot", "topk"])
def test_units_that_may_have_equal_values_are_not_exchanged_by_a_choice(activation, moves, by):
    def forward(m: Net, x: Tensor) -> Tensor:
        h = activation(m.score(x))
        if by == "topk":
            return m.out(m.table[h.topk(2).indices].sum(1))
        return m.out(F.one_hot(h.argmax(-1), 6).to(x.dtype) @ m.table)

    net = Net(forward, score=(4, 6), table=parameter(6, 5), out=(5, 2))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        spec = trace(net, torch.rand(3, 4))
    assert spec.groups == ({"score": 6, "table": 5} if moves else {"table": 5})
    assert any("values that may be equal" in str(w.message) for w in seen) != moves
