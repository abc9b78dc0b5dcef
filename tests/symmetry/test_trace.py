"""The tracer: what is joined, what stays, and that it stays correct on what it does not know; each is proved."""

from __future__ import annotations

import pytest
import torch
from nets import Net, parameter, proved
from torch import Tensor, nn

from regraft.symmetry import PermutationSpec, Segment, apply, trace, verify


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- joining: residuals, shared and elementwise parameters


def test_a_square_residual_ties_both_axes_of_one_tensor():
    net = Net(
        lambda m, x: m.out((y := m.stem(x).relu()) + m.inner(y)),
        stem=(4, 6),
        inner=nn.Linear(6, 6, bias=False),
        out=(6, 2),
    )
    spec = proved(net, 3, 4)
    assert spec.groups == {"stem": 6}
    assert spec.tensors_of("stem") == (
        ("stem.weight", 0),
        ("stem.bias", 0),
        ("inner.weight", 0),
        ("inner.weight", 1),
        ("out.weight", 1),
    )


def test_tied_weights_are_named_twice_and_count_once():
    embedding, head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
    head.weight = embedding.weight
    net = Net(lambda m, x: m.head(m.fc(m.embedding(x)).relu()), embedding=embedding, fc=(6, 6), head=head)
    tokens = torch.tensor([[0, 3, 6]])
    spec = trace(net, tokens)
    assert verify(spec, net, tokens) < 1e-12
    assert list(spec.axes) == ["embedding.weight", "fc.weight", "fc.bias", "head.weight"]
    assert spec.groups == {"embedding": 6}  # the head reads what the embedding writes
    assert spec.axes["head.weight"] == spec.axes["embedding.weight"]
    assert spec.optional == {"head.weight"}
    perm = spec.random(torch.Generator().manual_seed(1))
    own, whole = dict(net.named_parameters()), net.state_dict()
    assert apply(spec, perm, own).keys() == own.keys()
    assert apply(spec, perm, whole).keys() == whole.keys()


def test_rows_that_are_looked_up_stay():
    """The head shares the embedding's rows, and what reads the head would follow them; the tokens do not."""
    embedding, head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
    head.weight = embedding.weight
    net = Net(lambda m, x: m.out(m.head(m.embedding(x)).relu()), embedding=embedding, head=head, out=(7, 2))
    tokens = torch.tensor([[0, 3, 6]])
    spec = trace(net, tokens)
    assert verify(spec, net, tokens) < 1e-12
    assert spec.groups == {"embedding": 6}


def test_parameters_used_element_by_element():
    net = Net(
        lambda m, x: m.out(m.gain * (m.stem(x) + m.position) * m.scalar + m.shift.exp()),
        stem=(4, 6),
        position=parameter(1, 5, 6),
        gain=parameter(6),
        shift=parameter(1, 1, 6),
        scalar=parameter(1),
        out=(6, 2),
    )
    spec = proved(net, 2, 5, 4)
    assert spec.groups == {"stem": 6}
    assert {name for name, _ in spec.tensors_of("stem")} == {
        "stem.weight",
        "stem.bias",
        "position",
        "gain",
        "shift",
        "out.weight",
    }


def test_buffers_that_hold_a_value_for_each_unit_move_with_it():
    net = Net(lambda m, x: m.out(m.stem(x) * m.level), stem=(4, 6), level=torch.rand(6), out=(6, 2))
    assert ("level", 0) in proved(net, 3, 4).tensors_of("stem")


def test_a_buffer_gives_no_order_of_its_own():
    """Coordinates through a small network, as in Swin v2: x and y may not trade places."""
    net = Net(
        lambda m, x: x + m.second(m.first(m.coordinates).relu()).sum(),
        coordinates=torch.rand(5, 2),
        first=(2, 6),
        second=(6, 1),
    )
    spec = proved(net, 3, 4)
    assert spec.groups == {"first": 6}
    assert "coordinates" not in {name for name, _ in spec.tensors_of("first")}


def test_integer_buffers_stay():
    net = Net(
        lambda m, x: m.out(m.stem(x)[:, m.order]),
        stem=(4, 6),
        order=torch.tensor([5, 0, 1, 2, 4, 3, 3]),
        out=(7, 2),
    )
    spec = proved(net, 3, 4)
    assert all(segment.group is None for segment in spec.axes["order"][0])
    assert sorted(spec.groups.values()) == [5]  # unit 3 is read twice: it is alone


# ---- what is not known


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("cumsum", lambda x: x.cumsum(-1)),
        ("fft", lambda x: torch.fft.rfft(x, dim=-1).abs()),
        ("inv", lambda x: torch.linalg.inv(0.1 * x.unsqueeze(-1) * x.unsqueeze(-2) + x.mean() + 1).sum(-1)),
        ("cumprod", lambda x: x.cumprod(-1)),
    ],
)
def test_an_unknown_operator_freezes_what_it_touches_and_nothing_else(name, operator):
    net = Net(
        lambda m, x: m.out(operator(m.middle(m.stem(x).relu()))),
        stem=(4, 5),
        middle=(5, 6),
        out=nn.Linear(4 if name == "fft" else 6, 2),
    )
    x = torch.rand(3, 4)
    with pytest.warns(UserWarning, match=f"operator .*{name}.* is not known") as caught:
        spec = trace(net, x)
    assert len([w for w in caught if name in str(w.message)]) == 1
    assert spec.groups == {"stem": 5}
    assert verify(spec, net, x) < 1e-10


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind):
    net = Net(
        lambda m, x: m.out(m.cell(m.stem(x))[0]),
        stem=(4, 5),
        cell=kind(5, 6, num_layers=2, bidirectional=True),
        out=(12, 2),
    )
    spec = proved(net, 3, 2, 4)
    assert sorted(spec.groups.values()) == [5, 6, 6, 6, 6]
    assert spec.shares()[0] > 0.98


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells(kind):
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        state = m.cell(x)
        state = m.cell(x, state)
        return m.out(state[0] if isinstance(state, tuple) else state)

    assert list(proved(Net(forward, cell=kind(4, 6), out=(6, 2)), 3, 4).groups.values()) == [6]


def test_units_that_meet_different_fixed_values_do_not_trade_places():
    """Each unit gets the mean of another input, the same for all samples."""
    net = Net(lambda m, x: m.out((m.stem(x) + x.mean(0)).relu()), stem=(6, 6), out=(6, 2))
    assert proved(net, 4, 6, losses=True).groups == {}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_learned_initial_state_moves_with_the_units(kind):
    """Of an LSTM the cell's as well as the output's."""
    names = ("h", "c") if kind in (nn.LSTM, nn.LSTMCell) else ("h",)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        size = (1, 2, 6) if kind in (nn.LSTM, nn.GRU, nn.RNN) else (2, 6)
        states = tuple(getattr(m, name).expand(size).contiguous() for name in names)
        made = m.cell(x if len(size) == 3 else x[0], states if len(names) == 2 else states[0])
        return m.out(made[0] if isinstance(made, tuple) else made)

    net = Net(forward, cell=kind(4, 6), out=(6, 2), **{name: parameter(6) for name in names})
    spec = proved(net, 3, 2, 4)
    (group,) = spec.groups
    assert spec.groups[group] == 6 and {(name, 0) for name in names} < set(spec.tensors_of(group))


def test_an_einsum_with_a_diagonal_is_frozen():
    net = Net(lambda m, x: torch.einsum("bii->bi", m.stem(m.front(x).relu()).view(3, 2, 2)), stem=(4, 4), front=(4, 4))
    with pytest.warns(UserWarning, match="operator .*einsum.* such operands is not known"):
        spec = trace(net, torch.rand(3, 4))
    assert spec.groups == {"front": 4}
    assert verify(spec, net, torch.rand(3, 4)) < 1e-10


def test_unused_parameters_stay_and_are_named():
    net = Net(lambda m, x: m.out(m.stem(x)), stem=(4, 6), spare=(6, 6), out=(6, 2))
    with pytest.warns(UserWarning, match=r"2 parameters of Net are not used and stay fixed, such as 'spare.weight'"):
        spec = trace(net, torch.rand(3, 4))
    assert spec.groups == {"stem": 6}
    assert spec.shapes["spare.weight"] == (6, 6)


def test_auxiliary_heads_move_with_the_trunk():
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head, self.extra = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            y = self.trunk(x).relu()
            return (self.head(y), self.extra(y)) if self.training else self.head(y)

    net, x = Auxiliary().eval(), torch.rand(3, 4)
    spec = proved(net, 3, 4)
    assert ("extra.weight", 1) in spec.tensors_of("trunk")
    backwards = tuple(Segment("trunk", 5 - i, 1) for i in range(6))
    wrong = {**spec.axes, "extra.weight": (spec.axes["extra.weight"][0], backwards)}
    with pytest.raises(ValueError, match=r"extra\.weight"):
        verify(PermutationSpec(spec.groups, wrong), net, x)


def test_a_model_that_cannot_be_exported_says_so():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match=r"torch.export cannot trace Branching .*PermutationSpec.build"):
        trace(Branching(), torch.rand(2, 4))
    with pytest.raises(ValueError, match="cannot trace Linear"):
        trace(nn.Linear(4, 4), torch.rand(2, 5))


def test_the_model_is_left_as_it_is():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 2))
    net[1].eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    trace(net, torch.rand(3, 4))
    assert [module.training for module in net] == [True, False, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
