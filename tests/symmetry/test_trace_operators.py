"""The tracer on operators of every kind: those that move scalars, and those that compute; each is proved."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nets import Net, parameter, proved, share
from torch import Tensor, nn

from regraft.symmetry import trace


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def alternate(m: nn.Module, x: Tensor) -> Tensor:
    """a0 b0 b1 a1 ...: which of a unit's two places is relu and which is tanh differs between units."""
    h = m.stem(x)
    both = torch.stack([h.relu(), h.tanh()], dim=2)  # [B, 4, 2]
    return m.out(torch.stack([both[:, i].flip(1) if i % 2 else both[:, i] for i in range(4)], 1).flatten(1))


def alternate_tensors(m: nn.Module, x: Tensor) -> Tensor:
    """The same, where relu and tanh never were parts of one tensor."""
    a, b = m.stem(x).relu(), m.stem(x).tanh()
    order = [(a, b), (b, a), (a, b), (b, a)]
    return m.out(torch.stack([y[:, i] for i, pair in enumerate(order) for y in pair], dim=1))


def pad_alternately(m: nn.Module, x: Tensor) -> Tensor:
    h = m.stem(x)
    return m.out(torch.stack([F.pad(h[:, i : i + 1], (0, 1), value=i % 2) for i in range(4)], 1).flatten(1))


def normalise(m: nn.Module, x: Tensor) -> Tensor:
    """By what no exchange of units changes."""
    scaled = F.softmax(F.normalize(F.layer_norm(m.stem(x), (6,)), dim=-1), -1)
    return m.out(scaled * m.stem(x).logsumexp(-1, keepdim=True) - m.stem(x).mean(-1, keepdim=True))


def excite(m: nn.Module, x: Tensor) -> Tensor:
    h = m.stem(x)
    return m.out(h * m.up(m.down(h.mean((2, 3), keepdim=True)).relu()).sigmoid()).mean((2, 3))


GROUPS = {
    "the places of a unit are told apart": (alternate, {"stem": (4, 4), "out": (8, 2)}, (3, 4), [2, 2]),
    "so are places from different tensors": (alternate_tensors, {"stem": (4, 4), "out": (8, 2)}, (3, 4), [2, 2]),
    "and places beside different constants": (pad_alternately, {"stem": (4, 4), "out": (8, 2)}, (3, 4), []),
    "constants tell units apart by their values": (
        lambda m, x: m.out(m.stem(x) * torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0]) + torch.ones(5)),
        {"stem": (4, 5), "out": (5, 2)}, (3, 4), [2, 3],
    ),
    "softmax over places leaves the channels free": (
        lambda m, x: m.out((F.softmax(m.score(x), 1) * m.stem(x)).sum(1)),
        {"score": (4, 6), "stem": (4, 6), "out": (6, 2)}, (2, 5, 4), [6],
    ),
    "normalisation": (normalise, {"stem": (4, 6), "out": (6, 2)}, (3, 4), [6]),
    "squeeze and excitation": (
        excite,
        {
            "stem": nn.Conv2d(2, 8, 3), "down": nn.Conv2d(8, 4, 1), "up": nn.Conv2d(4, 8, 1),
            "out": nn.Conv2d(8, 2, 1),
        },
        (2, 2, 5, 5), [4, 8],
    ),
    "token mixing passes the channels on": (
        lambda m, x: m.out((y := m.stem(x)) + m.tokens(y.transpose(1, 2)).transpose(1, 2)),
        {"stem": (4, 6), "tokens": (5, 5), "out": (6, 2)}, (2, 5, 4), [6],
    ),
    "each half of one weight for two layers has its own units": (
        lambda m, x: m.out(torch.cat([F.linear(x, w).tanh() for w in m.both.chunk(2)], 1)),
        {"both": parameter(10, 4), "out": (10, 2)}, (3, 4), [5, 5],
    ),
    "a layer used twice is one group": (
        lambda m, x: m.out(m.cell(m.cell(m.stem(x)).tanh()).tanh()),
        {"stem": (4, 6), "cell": (6, 6), "out": (6, 2)}, (3, 4), [6],
    ),
    "a weight computed from weights has their axes": (
        lambda m, x: m.out(F.linear(m.stem(x).relu(), m.weight + m.delta)),
        {"stem": (4, 6), "weight": parameter(5, 6), "delta": parameter(5, 6), "out": (5, 2)}, (3, 4), [5, 6],
    ),
    "a weight that is read elsewhere as it stands is frozen": (
        lambda m, x: m.out(m.first(x).relu()) + (m.first.weight * x.mean()).sum() + (m.first.weight * x).sum(),
        {"first": (4, 4), "out": (4, 2)}, (4, 4), [],
    ),
    "a parameter [units, units] that is used elementwise freezes both axes": (
        lambda m, x: m.out((m.stem(x).view(-1, 4, 4) * m.table).flatten(1)),
        {"stem": (4, 16), "table": parameter(4, 4), "out": (16, 2)}, (3, 4), [],
    ),
}  # fmt: skip
"""What it shows: the network's function, its members, the shape of its input, the sizes of its groups."""


@pytest.mark.parametrize("case", GROUPS)
def test_which_units_form_a_group(case):
    function, members, shape, sizes = GROUPS[case]
    assert sorted(proved(Net(function, **members), *shape, losses=not sizes).groups.values()) == sizes


# ---- shapes


def test_flatten_and_its_transpose():
    for order, segments in (((0, 1, 2, 3), [("stem", 0, 4, 9)]), ((0, 2, 3, 1), [("stem", 0, 4, 1)] * 9)):
        net = Net(
            lambda m, x, order=order: m.out(m.stem(x).permute(order).flatten(1)),
            stem=nn.Conv2d(2, 4, 3),
            out=(36, 2),
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


@pytest.mark.parametrize("change", ["relu", "fill", "add"])
def test_a_changed_part_is_told_from_an_unchanged_one(change):
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.stem(x)
        if change == "fill":
            h[:, :2] = 0.5
            return m.out(h)
        first = h[:, :2].relu() if change == "relu" else h[:, :2] + h[:, :2]
        return m.out(torch.cat([first, h[:, 2:]], 1))

    net = Net(forward, stem=(4, 5), out=(5, 2))
    assert sorted(proved(net, 3, 4).groups.values()) == [2, 3]


def test_padded_channels():
    """The parameter-free shortcut of CIFAR residual networks."""
    net = Net(
        lambda m, x: m.out((F.pad(m.stem(x)[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + m.wide(m.stem(x))).mean((2, 3))),
        stem=nn.Conv2d(2, 4, 3, padding=1),
        wide=nn.Conv2d(4, 8, 3, stride=2, padding=1),
        out=(8, 2),
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

    net = Net(forward, stem=(4, 8), out=(8, 2))
    spec = proved(net, 3, 4)
    assert sorted(spec.groups.values()) == [2, 2, 2]
    assert spec.axes["out.weight"][1][0].group is None


def test_inputs_and_outputs_are_fixed():
    net = Net(lambda m, x: m.back(m.up(x).relu()) + x, up=(6, 8), back=(8, 6))
    spec = proved(net, 3, 6)
    assert spec.groups == {"up": 8}
    outputs = Net(lambda m, x: torch.cat([m.fc(x), x], 1), fc=(6, 8))
    assert proved(outputs, 3, 6).groups == {}


# ---- weights that are used through views, products and convolutions of all kinds


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
    assert spec.blocks["stem"][0] == spec.blocks["up/0"][0]  # the halves of all layers are exchanged at once
    assert spec.groups[spec.blocks["stem"][1]] == 4  # the input axis of the grouped weights has four places
    assert spec.groups[spec.blocks["up/0"][1]] == 3
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
    assert spec.groups == {"stem/blocks": 2, "stem": 8}  # units stay together in a half of GroupNorm
    assert {name for name, _ in spec.tensors_of("stem")} >= {
        "plain.running_var",
        "prelu.weight",
        "batch.bias",
    }


def test_windows_taken_apart_and_added_up():
    """im2col and col2im."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        columns = F.unfold(m.stem(x), 3, padding=1)  # [B, 4 * 9, 25]
        folded = F.fold(columns.tanh(), (5, 5), 3, padding=1)
        return m.out(folded).mean((2, 3)) + m.flat(columns.mT).mean(1)

    net = Net(forward, stem=nn.Conv2d(2, 4, 1), out=nn.Conv2d(4, 2, 1), flat=(36, 2))
    spec = proved(net, 1, 2, 5, 5)
    assert spec.groups == {"stem": 4}
    assert [tuple(s) for s in spec.axes["flat.weight"][1]] == [("stem", 0, 4, 9)]


def test_the_largest_and_either_of_two():
    """max over places, over units (which of them does not matter, its place would) and of two; where."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.stem(x)  # [B, 5, 6]
        best = h.max(1).values
        either = torch.where(best > 0, torch.maximum(best, m.gain), 0.5 * best)
        return m.out(either) * h.max(2).values.amax(1, keepdim=True)

    net = Net(forward, stem=(3, 6), gain=parameter(6), out=(6, 2))
    assert proved(net, 2, 5, 3).groups == {"stem": 6}

    def placed(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(m.stem(x)) * m.stem(x).max(1, keepdim=True).indices

    told = Net(placed, stem=(3, 6), out=(6, 2))
    with pytest.warns(UserWarning, match="max"):
        assert trace(told, torch.rand(2, 3), verify=True).groups == {}


def test_biased_products_and_shared_keys():
    """baddbmm, and one head of keys and values that is broadcast to all queries."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = m.stem(x).tanh().split([12, 4, 4], -1)
        q, k, v = q.unflatten(-1, (3, 4)).transpose(1, 2), k[:, None], v[:, None]
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        scores = torch.baddbmm(torch.ones(2, 1, 1), q[:, 0], k[:, 0].mT, beta=0.5)
        return m.out(mixed) + (scores.softmax(-1) @ v[:, 0]).mean(-1, keepdim=True)

    net = Net(forward, stem=(3, 20), out=(12, 2))
    assert share(proved(net, 2, 5, 3), net) > 0.4


@pytest.mark.parametrize("kind", ["fused", "matmul", "einsum"])
def test_attention_keeps_units_in_their_head(kind):
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(2, 5, 2, 4).transpose(1, 2) for layer in (m.q, m.k, m.v))
        if kind == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        elif kind == "matmul":
            y = F.softmax(q @ k.transpose(-2, -1) + m.bias, -1) @ v
        else:
            y = torch.einsum("bhij,bhjd->bhid", F.softmax(torch.einsum("bhid,bhjd->bhij", q, k) + m.bias, -1), v)
        return m.out(y.transpose(1, 2).flatten(2))

    layers = {name: (4, 8) for name in "qkv"}
    net = Net(forward, **layers, out=(8, 2), bias=parameter(2, 5, 5))
    if kind == "fused":
        del net.bias
    spec = proved(net, 2, 5, 4)
    assert spec.groups == {"q/blocks": 2, "q": 8, "v": 8}
    assert ("k.weight", 0) in spec.tensors_of("q")
    assert (("bias", 0) in spec.tensors_of("q/blocks")) == (kind != "fused")


@pytest.mark.parametrize("batch_first", [True, False])
def test_multi_head_attention(batch_first):
    net = Net(
        lambda m, x: m.out(m.norm((y := m.stem(x)) + m.attention(y, y, y)[0]).mean(1)),
        stem=(4, 8),
        attention=nn.MultiheadAttention(8, 2, batch_first=batch_first),
        norm=nn.LayerNorm(8),
        out=(8, 2),
    )
    spec = proved(net, 2, 5, 4)
    assert sorted(spec.groups.values()) == [
        2,
        8,
        8,
        8,
    ]  # heads; stem; queries with keys, and values, in heads
    assert share(spec, net) > 0.95


def test_a_transformer_encoder_with_token_and_positions():
    net = Net(
        lambda m, x: m.out(m.encoder(torch.cat([m.token.expand(2, 1, 8), m.stem(x)], 1) + m.position)[:, 0]),
        stem=(4, 8),
        token=parameter(1, 1, 8),
        position=parameter(1, 6, 8),
        encoder=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        ),
        out=(8, 2),
    )
    spec = proved(net, 2, 5, 4)
    assert share(spec, net) > 0.95
    (stream,) = {s.group for axis in spec.axes["token"] for s in axis if s.group}
    assert {name for name, _ in spec.tensors_of(stream)} >= {"token", "position", "stem.weight", "out.weight"}
