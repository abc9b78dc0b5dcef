"""The tracer: what it finds in modules of every kind, each proved; and that it stays correct on what it does not
know. torchvision's families at the end; `make test-models` runs all of its models."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from regraft import models
from regraft.symmetry import PermutationSpec, Segment, trace, verify


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def proved(model: nn.Module, *shape: int, draws: int = 2) -> PermutationSpec:
    """Traced without a warning, and proved."""
    x = torch.rand(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = trace(model, x)
    assert verify(spec, model, x, draws=draws) < 1e-10
    return spec


def share(spec: PermutationSpec, model: nn.Module) -> float:
    """The share of parameters that may move."""
    moved = spec.moved()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(moved[name] for name in sizes) / sum(sizes.values())


class Net(nn.Module):
    """A module from its layers and a function of them."""

    def __init__(self, forward: Callable[..., Tensor], **members: nn.Module | nn.Parameter | Tensor) -> None:
        super().__init__()
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.3)


# ---------------------------------------------------------------------------------------------------
# The project's networks


@pytest.mark.parametrize("bias", [True, False])
def test_an_mlp(bias):
    spec = proved(models.mlp([6, 8, 8, 3], bias=bias), 2, 6)
    assert sorted(spec.groups.values()) == [8, 8]
    weights = [axes for name, axes in spec.axes.items() if name.endswith("weight")]
    hand = PermutationSpec.build({"a": 8, "b": 8}, {"1": ["a", 6], "2": ["b", "a"], "3": [3, "b"]})
    names = dict(zip(spec.groups, "ab", strict=True))
    renamed = [
        tuple(tuple(s._replace(group=names.get(s.group)) for s in axis) for axis in axes) for axes in weights
    ]
    assert renamed == list(hand.axes.values())
    assert len(spec.axes) == (6 if bias else 3)


@pytest.mark.parametrize(
    ("model", "shape", "groups"),
    [
        (lambda: models.lenet(), (1, 1, 28, 28), [20, 50, 500]),
        (lambda: models.small_cnn(), (1, 3, 32, 32), None),
        (lambda: models.digits_conv(), (2, 1, 8, 8), None),
        (lambda: models.conv8(width=0.125), (1, 3, 32, 32), [8, 8, 16, 16, 32, 32, 32, 32, 64, 64, 64]),
        (
            lambda: models.cifar_resnet18(width=0.125),
            (1, 3, 16, 16),
            [8] * 3 + [16] * 3 + [32] * 3 + [64] * 3,
        ),
        (lambda: models.residual8(width=0.0625), (1, 3, 16, 16), None),
    ],
    ids=["lenet", "small_cnn", "digits_conv", "conv8", "cifar_resnet18", "residual8"],
)
def test_the_papers_networks(model, shape, groups):
    model = model()
    spec = proved(model, *shape)
    if groups is not None:
        assert sorted(spec.groups.values()) == groups
    assert share(spec, model) > 0.98


def test_names_follow_the_parameters_that_make_the_units():
    spec = proved(models.cifar_resnet18(width=0.0625), 1, 3, 16, 16)
    assert next(iter(spec.groups)) == "conv1"
    assert all(name.endswith(("conv1", "conv2")) for name in spec.groups)
    again = trace(models.cifar_resnet18(width=0.0625), torch.rand(2, 3, 16, 16))
    assert again == spec
    assert list(again.groups) == list(spec.groups)


# ---------------------------------------------------------------------------------------------------
# Joining: residuals, shared and elementwise parameters


def test_a_square_residual_ties_both_axes_of_one_tensor():
    net = Net(
        lambda m, x: m.out((y := m.stem(x).relu()) + m.inner(y)),
        stem=nn.Linear(4, 6),
        inner=nn.Linear(6, 6, bias=False),
        out=nn.Linear(6, 2),
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


def test_a_layer_used_twice_is_one_group():
    net = Net(
        lambda m, x: m.out(m.cell(m.cell(m.stem(x)).tanh()).tanh()),
        stem=nn.Linear(4, 6),
        cell=nn.Linear(6, 6),
        out=nn.Linear(6, 2),
    )
    assert proved(net, 3, 4).groups == {"stem": 6}


def test_tied_weights_have_one_name():
    embedding, head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
    head.weight = embedding.weight
    net = Net(
        lambda m, x: m.head(m.fc(m.embedding(x)).relu()), embedding=embedding, fc=nn.Linear(6, 6), head=head
    )
    tokens = torch.tensor([[0, 3, 6]])
    spec = trace(net, tokens)
    assert verify(spec, net, tokens) < 1e-12
    assert list(spec.axes) == ["embedding.weight", "fc.weight", "fc.bias"]
    assert spec.groups == {"embedding": 6}  # the head reads what the embedding writes
    assert spec.tensors_of("embedding") == (
        ("embedding.weight", 1),
        ("fc.weight", 0),
        ("fc.weight", 1),
        ("fc.bias", 0),
    )


def test_rows_that_are_looked_up_stay():
    """The head shares the embedding's rows, and what reads the head would follow them; the tokens do not."""
    embedding, head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
    head.weight = embedding.weight
    net = Net(
        lambda m, x: m.out(m.head(m.embedding(x)).relu()), embedding=embedding, head=head, out=nn.Linear(7, 2)
    )
    tokens = torch.tensor([[0, 3, 6]])
    spec = trace(net, tokens)
    assert verify(spec, net, tokens) < 1e-12
    assert spec.groups == {"embedding": 6}


def test_parameters_used_element_by_element():
    net = Net(
        lambda m, x: m.out(m.gain * (m.stem(x) + m.position) * m.scalar + m.shift.exp()),
        stem=nn.Linear(4, 6),
        position=parameter(1, 5, 6),
        gain=parameter(6),
        shift=parameter(1, 1, 6),
        scalar=parameter(1),
        out=nn.Linear(6, 2),
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


def test_a_parameter_with_a_value_for_each_place_freezes_the_units_it_tells_apart():
    """[tokens, units] moves along the units; [units, units] used elementwise would have to move along both."""
    net = Net(
        lambda m, x: m.out((m.stem(x).view(-1, 4, 4) * m.table).flatten(1)),
        stem=nn.Linear(4, 16),
        table=parameter(4, 4),
        out=nn.Linear(16, 2),
    )
    assert proved(net, 3, 4).groups == {}


def test_buffers_that_hold_a_value_for_each_unit_move_with_it():
    net = Net(
        lambda m, x: m.out(m.stem(x) * m.level),
        stem=nn.Linear(4, 6),
        level=torch.rand(6),
        out=nn.Linear(6, 2),
    )
    assert ("level", 0) in proved(net, 3, 4).tensors_of("stem")


def test_a_buffer_gives_no_order_of_its_own():
    """Coordinates through a small network, as in Swin v2: x and y may not trade places."""
    net = Net(
        lambda m, x: x + m.second(m.first(m.coordinates).relu()).sum(),
        coordinates=torch.rand(5, 2),
        first=nn.Linear(2, 6),
        second=nn.Linear(6, 1),
    )
    spec = proved(net, 3, 4)
    assert spec.groups == {"first": 6}
    assert "coordinates" not in {name for name, _ in spec.tensors_of("first")}


def test_integer_buffers_stay():
    net = Net(
        lambda m, x: m.out(m.stem(x)[:, m.order]),
        stem=nn.Linear(4, 6),
        order=torch.tensor([5, 0, 1, 2, 4, 3, 3]),
        out=nn.Linear(7, 2),
    )
    spec = proved(net, 3, 4)
    assert all(segment.group is None for segment in spec.axes["order"][0])
    assert sorted(spec.groups.values()) == [5]  # unit 3 is read twice: it is alone


# ---------------------------------------------------------------------------------------------------
# Shapes


def test_flatten_and_its_transpose():
    for order, segments in (
        ((0, 1, 2, 3), [("stem", 0, 4, 9)]),
        ((0, 2, 3, 1), [("stem", 0, 4, 1)] * 9),
    ):
        net = Net(
            lambda m, x, order=order: m.out(m.stem(x).permute(order).flatten(1)),
            stem=nn.Conv2d(2, 4, 3),
            out=nn.Linear(36, 2),
        )
        assert [tuple(s) for s in proved(net, 1, 2, 5, 5).axes["out.weight"][1]] == segments


def test_concatenation_chunks_and_shuffles():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        a, b = m.left(x), m.right(x)
        c = F.channel_shuffle(torch.cat([a, b.relu()], 1), 2)
        first, second = c.chunk(2, dim=1)
        return m.out(torch.cat([first, second.roll(1, 1), a], 1)).mean((2, 3))

    net = Net(forward, left=nn.Conv2d(2, 4, 1), right=nn.Conv2d(2, 4, 1), out=nn.Conv2d(12, 2, 1))
    spec = proved(net, 1, 2, 3, 3)
    # rolled across the halves' border, or read a second time: every unit that differs is in a group of its own kind
    assert sum(spec.groups.values()) >= 4


def test_occurrences_of_a_unit_are_told_apart():
    """a0 b0 b1 a1 ...: which of a unit's two places is relu and which is tanh differs between units."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.stem(x)
        both = torch.stack([h.relu(), h.tanh()], dim=2)  # [B, 4, 2]
        mixed = torch.stack([both[:, 0], both[:, 1].flip(1), both[:, 2], both[:, 3].flip(1)], dim=1)
        return m.out(mixed.flatten(1))

    net = Net(forward, stem=nn.Linear(4, 4), out=nn.Linear(8, 2))
    assert proved(net, 3, 4).groups == {"stem/0": 2, "stem/1": 2}


def test_occurrences_that_come_from_different_tensors_are_told_apart():
    """The same, where relu and tanh never were parts of one tensor."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        a, b = m.stem(x).relu(), m.stem(x).tanh()
        order = [(a, b), (b, a), (a, b), (b, a)]
        return m.out(torch.stack([y[:, i] for i, pair in enumerate(order) for y in pair], dim=1))

    net = Net(forward, stem=nn.Linear(4, 4), out=nn.Linear(8, 2))
    assert proved(net, 3, 4).groups == {"stem/0": 2, "stem/1": 2}


@pytest.mark.parametrize("change", ["relu", "fill", "add"])
def test_a_changed_part_is_told_from_an_unchanged_one(change):
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.stem(x)
        if change == "fill":
            h[:, :2] = 0.5
            return m.out(h)
        first = h[:, :2].relu() if change == "relu" else h[:, :2] + h[:, :2]
        return m.out(torch.cat([first, h[:, 2:]], 1))

    net = Net(forward, stem=nn.Linear(4, 5), out=nn.Linear(5, 2))
    assert sorted(proved(net, 3, 4).groups.values()) == [2, 3]


def test_different_constants_beside_each_other_are_told_apart():
    net = Net(
        lambda m, x: m.out(
            torch.stack(
                [F.pad(m.stem(x)[:, i : i + 1], (0, 1), value=float(i % 2)) for i in range(4)], 1
            ).flatten(1)
        ),
        stem=nn.Linear(4, 4),
        out=nn.Linear(8, 2),
    )
    proved(net, 3, 4)


def test_softmax_over_places_leaves_the_channels_free():
    net = Net(
        lambda m, x: m.out((F.softmax(m.score(x), 1) * m.stem(x)).sum(1)),
        score=nn.Linear(4, 6),
        stem=nn.Linear(4, 6),
        out=nn.Linear(6, 2),
    )
    assert proved(net, 2, 5, 4).groups == {"score": 6}


def test_padded_channels():
    """The parameter-free shortcut of CIFAR residual networks."""
    net = Net(
        lambda m, x: m.out(
            (F.pad(m.stem(x)[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + m.wide(m.stem(x))).mean((2, 3))
        ),
        stem=nn.Conv2d(2, 4, 3, padding=1),
        wide=nn.Conv2d(4, 8, 3, stride=2, padding=1),
        out=nn.Linear(8, 2),
    )
    spec = proved(net, 1, 2, 6, 6)
    assert spec.groups == {"stem": 4, "wide": 4}
    assert [tuple(s) for s in spec.axes["out.weight"][1]] == [
        ("wide", 0, 2, 1),
        ("stem", 0, 4, 1),
        ("wide", 2, 2, 1),
    ]


def test_reflections_windows_and_writing_in_place():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = F.pad(m.stem(x), (1, 1, 1, 1), mode="reflect")
        x[:, :, :2].zero_()
        x = x.roll((1, 1), (2, 3)).unfold(2, 2, 2).amax(-1)
        x += x.sigmoid()
        x.mul_(2.0).relu_()
        return m.out(F.interpolate(x, scale_factor=2.0)).mean((2, 3))

    net = Net(forward, stem=nn.Conv2d(2, 4, 3, padding=1), out=nn.Conv2d(4, 2, 3))
    assert proved(net, 1, 2, 6, 6).groups == {"stem": 4}


def test_views_that_are_overwritten_in_place():
    """Half of the units end where the inputs are written over them: they are free, and what reads that half is not."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.stem(x).tanh()
        h[:, :2] = x[:, :2]
        h[:, 2:4] += h[:, 4:6].relu()
        return m.out(h)

    net = Net(forward, stem=nn.Linear(4, 8), out=nn.Linear(8, 2))
    spec = proved(net, 3, 4)
    assert sorted(spec.groups.values()) == [2, 2, 2]
    assert spec.axes["out.weight"][1][0].group is None


def test_constants_tell_units_apart_by_their_values():
    net = Net(
        lambda m, x: m.out(m.stem(x) * torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0]) + torch.ones(5)),
        stem=nn.Linear(4, 5),
        out=nn.Linear(5, 2),
    )
    assert proved(net, 3, 4).groups == {"stem/0": 3, "stem/1": 2}


def test_inputs_and_outputs_are_fixed():
    net = Net(lambda m, x: m.back(m.up(x).relu()) + x, up=nn.Linear(6, 8), back=nn.Linear(8, 6))
    spec = proved(net, 3, 6)
    assert spec.groups == {"up": 8}
    outputs = Net(lambda m, x: torch.cat([m.fc(x), x], 1), fc=nn.Linear(6, 8))
    assert proved(outputs, 3, 6).groups == {}


# ---------------------------------------------------------------------------------------------------
# Weights that are used through views, products and convolutions of all kinds


def test_weights_without_layers():
    net = Net(
        lambda m, x: (m.c @ (x @ m.a + m.bias).relu().unsqueeze(-1)).squeeze(-1) @ m.d[:, 1:4].t(),
        a=parameter(4, 6),
        bias=parameter(6),
        c=parameter(3, 6),
        d=parameter(2, 5),
    )
    spec = proved(net, 3, 4)
    assert spec.groups == {"a": 6, "c": 3}
    assert [tuple(s) for s in spec.axes["d"][1]] == [(None, 0, 1, 1), ("c", 0, 3, 1), (None, 0, 1, 1)]


def test_one_weight_for_several_layers():
    net = Net(
        lambda m, x: m.out(torch.cat([w for w in map(lambda w: F.linear(x, w).tanh(), m.both.chunk(2))], 1)),
        both=parameter(10, 4),
        out=nn.Linear(10, 2),
    )
    assert proved(net, 3, 4).groups == {"both/0": 5, "both/1": 5}  # each half is a tensor of its own


def test_grouped_depthwise_and_transposed_convolutions():
    net = Net(
        lambda m, x: m.out(m.up(m.multiplied(m.depth(m.grouped(m.stem(x)).relu())))).mean((2, 3)),
        stem=nn.Conv2d(2, 8, 1),
        grouped=nn.Conv2d(8, 12, 3, groups=2),
        depth=nn.Conv2d(12, 12, 3, groups=12, padding=1),
        multiplied=nn.Conv2d(12, 24, 1, groups=12),
        up=nn.ConvTranspose2d(24, 6, 2, groups=2),
        out=nn.Conv2d(6, 2, 1),
    )
    spec = proved(net, 1, 2, 5, 5)
    assert spec.groups["stem"] == 4  # the input axis of the grouped weights has four places
    assert spec.groups["up"] == 3
    assert share(spec, net) > 0.95


def test_norms_and_activations_with_parameters():
    net = Net(
        lambda m, x: m.out(m.prelu(m.group(m.instance(m.batch(m.plain(m.stem(x)))).relu()))).mean((2, 3)),
        stem=nn.Conv2d(2, 8, 1),
        plain=nn.BatchNorm2d(8, affine=False),
        batch=nn.BatchNorm2d(8, track_running_stats=False),
        instance=nn.InstanceNorm2d(8, affine=True),
        group=nn.GroupNorm(2, 8),
        prelu=nn.PReLU(8),
        out=nn.Conv2d(8, 2, 1),
    )
    spec = proved(net, 2, 2, 4, 4)
    assert spec.groups == {"stem/0": 4, "stem/1": 4}  # units stay in their half of GroupNorm
    assert {name for name, _ in spec.tensors_of("stem/0")} >= {
        "plain.running_var",
        "prelu.weight",
        "batch.bias",
    }


def test_normalisation_by_what_no_exchange_changes():
    net = Net(
        lambda m, x: m.out(
            F.softmax(F.normalize(F.layer_norm(m.stem(x), (6,)), dim=-1), -1)
            * m.stem(x).logsumexp(-1, keepdim=True)
            - m.stem(x).mean(-1, keepdim=True)
        ),
        stem=nn.Linear(4, 6),
        out=nn.Linear(6, 2),
    )
    assert proved(net, 3, 4).groups == {"stem": 6}


def test_squeeze_and_excitation():
    net = Net(
        lambda m, x: m.out(
            (h := m.stem(x)) * m.up(m.down(h.mean((2, 3), keepdim=True)).relu()).sigmoid()
        ).mean((2, 3)),
        stem=nn.Conv2d(2, 8, 3),
        down=nn.Conv2d(8, 4, 1),
        up=nn.Conv2d(4, 8, 1),
        out=nn.Conv2d(8, 2, 1),
    )
    assert proved(net, 2, 2, 5, 5).groups == {"stem": 8, "down": 4}


def test_token_mixing_passes_the_channels_on():
    net = Net(
        lambda m, x: m.out((y := m.stem(x)) + m.tokens(y.transpose(1, 2)).transpose(1, 2)),
        stem=nn.Linear(4, 6),
        tokens=nn.Linear(5, 5),
        out=nn.Linear(6, 2),
    )
    assert proved(net, 2, 5, 4).groups == {"stem": 6}


@pytest.mark.parametrize("kind", ["fused", "matmul", "einsum"])
def test_attention_keeps_units_in_their_head(kind):
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(2, 5, 2, 4).transpose(1, 2) for layer in (m.q, m.k, m.v))
        if kind == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        elif kind == "matmul":
            y = F.softmax(q @ k.transpose(-2, -1) + m.bias, -1) @ v
        else:
            y = torch.einsum(
                "bhij,bhjd->bhid", F.softmax(torch.einsum("bhid,bhjd->bhij", q, k) + m.bias, -1), v
            )
        return m.out(y.transpose(1, 2).flatten(2))

    layers = {name: nn.Linear(4, 8) for name in "qkv"}
    net = Net(forward, **layers, out=nn.Linear(8, 2), bias=parameter(2, 5, 5))
    if kind == "fused":
        del net.bias
    spec = proved(net, 2, 5, 4)
    assert spec.groups == {"q/0": 4, "q/1": 4, "v/0": 4, "v/1": 4}
    assert ("k.weight", 0) in spec.tensors_of("q/0")


@pytest.mark.parametrize("batch_first", [True, False])
def test_multi_head_attention(batch_first):
    net = Net(
        lambda m, x: m.out(m.norm((y := m.stem(x)) + m.attention(y, y, y)[0]).mean(1)),
        stem=nn.Linear(4, 8),
        attention=nn.MultiheadAttention(8, 2, batch_first=batch_first),
        norm=nn.LayerNorm(8),
        out=nn.Linear(8, 2),
    )
    spec = proved(net, 2, 5, 4)
    assert sorted(spec.groups.values()) == [4, 4, 4, 4, 8]
    assert share(spec, net) > 0.95


def test_a_transformer_encoder_with_token_and_positions():
    net = Net(
        lambda m, x: m.out(m.encoder(torch.cat([m.token.expand(2, 1, 8), m.stem(x)], 1) + m.position)[:, 0]),
        stem=nn.Linear(4, 8),
        token=parameter(1, 1, 8),
        position=parameter(1, 6, 8),
        encoder=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        ),
        out=nn.Linear(8, 2),
    )
    spec = proved(net, 2, 5, 4)
    assert share(spec, net) > 0.95
    (stream,) = {s.group for axis in spec.axes["token"] for s in axis if s.group}
    assert {name for name, _ in spec.tensors_of(stream)} >= {"token", "position", "stem.weight", "out.weight"}


# ---------------------------------------------------------------------------------------------------
# What is not known


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("cumsum", lambda x: x.cumsum(-1)),
        ("fft", lambda x: torch.fft.rfft(x, dim=-1).abs()),
        ("inv", lambda x: torch.linalg.inv(torch.eye(6) + 0.1 * x.unsqueeze(-1) * x.unsqueeze(-2)).sum(-1)),
        ("sort", lambda x: x.sort(-1).values),
    ],
)
def test_an_unknown_operator_freezes_what_it_touches_and_nothing_else(name, operator):
    net = Net(
        lambda m, x: m.out(operator(m.middle(m.stem(x).relu()))),
        stem=nn.Linear(4, 5),
        middle=nn.Linear(5, 6),
        out=nn.Linear(4 if name == "fft" else 6, 2),
    )
    x = torch.rand(3, 4)
    with pytest.warns(UserWarning, match=f"operator .*{name}.* is not known") as caught:
        spec = trace(net, x)
    assert len([w for w in caught if name in str(w.message)]) == 1
    assert spec.groups == {"stem": 5}
    assert verify(spec, net, x) < 1e-10


def test_a_recurrent_layer_freezes():
    net = Net(
        lambda m, x: m.out(m.lstm(m.stem(x))[0]),
        stem=nn.Linear(4, 5),
        lstm=nn.LSTM(5, 6),
        out=nn.Linear(6, 2),
    )
    x = torch.rand(3, 4)
    with pytest.warns(UserWarning, match="lstm"):
        spec = trace(net, x)
    assert verify(spec, net, x) < 1e-10


def test_a_computed_weight_freezes_only_its_layer():
    net = Net(
        lambda m, x: m.out(F.linear(m.stem(x).relu(), m.weight + m.delta)),
        stem=nn.Linear(4, 6),
        weight=parameter(5, 6),
        delta=parameter(5, 6),
        out=nn.Linear(5, 2),
    )
    assert proved(net, 3, 4).groups == {}


def test_a_weight_that_is_read_elsewhere_as_it_stands_is_frozen():
    net = Net(
        lambda m, x: (
            m.out(m.first(x).relu()) + (m.first.weight * x.mean()).sum() + (m.first.weight * x).sum()
        ),
        first=nn.Linear(4, 4),
        out=nn.Linear(4, 2),
    )
    assert proved(net, 4, 4).groups == {}


def test_unused_parameters_stay_and_are_named():
    net = Net(lambda m, x: m.out(m.stem(x)), stem=nn.Linear(4, 6), spare=nn.Linear(6, 6), out=nn.Linear(6, 2))
    with pytest.warns(
        UserWarning, match=r"2 parameters of Net are not used and stay fixed, such as 'spare.weight'"
    ):
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


# ---------------------------------------------------------------------------------------------------
# Random architectures


@st.composite
def architectures(draw: st.DrawFn) -> list[tuple[str, int]]:
    kinds = ["conv", "norm", "relu", "residual", "dense", "depthwise", "shuffle", "pool", "gate"]
    return draw(st.lists(st.tuples(st.sampled_from(kinds), st.integers(0, 3)), min_size=1, max_size=6))


ACTIVATIONS = (F.relu, F.gelu, torch.tanh, F.silu)
SHUFFLES = (
    lambda x: F.channel_shuffle(x, 2),
    lambda x: x.flip(1),
    lambda x: x.roll(1, 1),
    lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
)
POOLS = (
    lambda x: F.avg_pool2d(x, 3, 1, 1),
    lambda x: F.max_pool2d(x, 3, 1, 1),
    lambda x: x.transpose(2, 3),
    lambda x: x.flip(2),
)


class Random(nn.Module):
    """Channels-first blocks on a 4x4 image; each kind with a variant."""

    def __init__(self, blocks: list[tuple[str, int]]) -> None:
        super().__init__()
        self.blocks, count = blocks, 4
        self.stem, self.layers = nn.Conv2d(2, 4, 1), nn.ModuleList()
        for kind, variant in blocks:
            layer: nn.Module = nn.Identity()
            if kind == "conv":
                layer = nn.Conv2d(count, 4 + 2 * variant, 3, padding=1, groups=2 if variant % 2 else 1)
                count = 4 + 2 * variant
            elif kind == "norm":
                layer = (
                    nn.BatchNorm2d(count),
                    nn.GroupNorm(2, count),
                    nn.InstanceNorm2d(count, affine=True),
                )[variant % 3]
            elif kind in ("residual", "gate"):
                layer = nn.Conv2d(count, count, 1, bias=variant > 1)
            elif kind == "depthwise":
                layer = nn.Conv2d(count, count, 3, padding=1, groups=count)
            elif kind == "dense":
                layer, count = nn.Conv2d(count, 2, 1), count + 2
            self.layers.append(layer)
        self.out = nn.Linear(count * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for (kind, variant), layer in zip(self.blocks, self.layers, strict=True):
            if kind in ("conv", "norm", "depthwise"):
                x = layer(x)
            elif kind == "residual":
                x = x + layer(x)
            elif kind == "gate":
                x = x * layer(x.mean((2, 3), keepdim=True)).sigmoid()
            elif kind == "dense":
                x = torch.cat([x, layer(x)] if variant % 2 else [layer(x), x], 1)
            else:
                x = {"relu": ACTIVATIONS, "shuffle": SHUFFLES, "pool": POOLS}[kind][variant](x)
        return self.out(x.flatten(1))


@given(architectures())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_random_architectures_compute_the_same_function(blocks):
    proved(Random(blocks), 1, 2, 4, 4)


# ---------------------------------------------------------------------------------------------------
# torchvision's families, by their smallest member or a narrow one


def vgg() -> nn.Module:
    model = zoo.vgg11_bn(num_classes=10, init_weights=False)
    model.classifier = nn.Sequential(nn.Linear(512 * 49, 16), nn.ReLU(True), nn.Linear(16, 10))
    return model


def vision_transformer() -> nn.Module:
    return zoo.VisionTransformer(32, 16, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10)


def maxvit() -> nn.Module:
    return zoo.MaxVit((32, 32), 16, 4, [16, 32], [1, 1], 8, 0.2, num_classes=10)


FAMILIES = {
    "alexnet": (lambda: zoo.alexnet(num_classes=10), 64, 0.99),
    "vgg": (vgg, 32, 0.99),
    "resnet18": (lambda: zoo.resnet18(num_classes=10), 32, 0.99),
    "squeezenet1_1": (lambda: zoo.squeezenet1_1(num_classes=10), 32, 0.99),
    "shufflenet_v2_x0_5": (lambda: zoo.shufflenet_v2_x0_5(num_classes=10), 32, 0.98),
    "mobilenet_v2": (lambda: zoo.mobilenet_v2(num_classes=10), 32, 0.99),
    "mobilenet_v3_small": (lambda: zoo.mobilenet_v3_small(num_classes=10), 32, 0.99),
    "mnasnet0_5": (lambda: zoo.mnasnet0_5(num_classes=10), 32, 0.99),
    "regnet_x_400mf": (lambda: zoo.regnet_x_400mf(num_classes=10), 32, 0.99),
    "efficientnet_b0": (lambda: zoo.efficientnet_b0(num_classes=10), 32, 0.99),
    "densenet121": (lambda: zoo.densenet121(num_classes=10), 32, 0.99),
    "googlenet": (lambda: zoo.googlenet(num_classes=10, init_weights=False), 64, 0.99),
    "inception_v3": (
        lambda: zoo.inception_v3(num_classes=10, init_weights=False, aux_logits=False),
        75,
        0.99,
    ),
    "convnext_tiny": (lambda: zoo.convnext_tiny(num_classes=10), 32, 0.99),
    "vision_transformer": (vision_transformer, 32, 0.98),
    "swin_t": (lambda: zoo.swin_t(num_classes=10), 32, 0.99),
    "swin_v2_t": (lambda: zoo.swin_v2_t(num_classes=10), 32, 0.99),
    "maxvit": (maxvit, 32, 0.95),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_torchvision(family):
    make, size, at_least = FAMILIES[family]
    model = make()
    spec = proved(model, 1, 3, size, size, draws=1)
    assert share(spec, model) >= at_least
