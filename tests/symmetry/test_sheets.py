"""Values with units along several dimensions, and weights that are computed: one case a kind, each is proved."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nets import Net, parameter, proved
from torch import Tensor, nn

from regraft.symmetry.spec import PermutationSpec


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


ENDS = {"stem": (4, 6), "out": (6, 2)}
WEIGHT = {**ENDS, "w": parameter(6, 6)}


def experts(m: Net, x: Tensor) -> Tensor:
    h = m.stem(x)
    hidden = torch.einsum("btd,edh->bteh", h, m.w).relu()
    return m.out(torch.einsum("bteh,ehd,bte->btd", hidden, m.v, m.router(h).softmax(-1)))


def stacked(m: Net, x: Tensor) -> Tensor:
    h = m.stem(x[0]).expand(3, -1, -1)
    return m.out(torch.bmm(torch.bmm(h, m.w).relu(), m.v).sum(0))


def basis_of_distances(m: Net, x: Tensor) -> Tensor:
    return m.out(torch.exp(-((m.stem(x)[:, :, None] - m.centres) ** 2).sum(-1) * m.width))


def splines(m: Net, x: Tensor) -> Tensor:
    h = m.stem(x)[..., None]
    basis = ((h >= m.grid[:-1]) & (h < m.grid[1:])) * h
    return m.out(F.linear(basis.flatten(-2), m.c.view(5, -1)) + F.linear(m.stem(x), m.w))


def state_space(m: Net, x: Tensor) -> Tensor:
    h = m.enter(m.stem(x))
    step, into, out = m.select(h).split([2, 3, 3], -1)
    step = F.softplus(m.step(step))
    decay = torch.exp(step[..., None] * -m.a.exp())
    wave = step[..., None] * F.normalize(into, dim=-1)[:, :, None] * h[..., None]
    state = torch.zeros(3, 8, 3)
    made = []
    for t in range(x.shape[1]):
        state = decay[:, t] * state + wave[:, t]
        made.append((state @ out[:, t, :, None])[..., 0])
    return m.out(torch.stack(made, 1) + h * m.d)


def heads_by_einsum(m: Net, x: Tensor) -> Tensor:
    q, k, v = (torch.einsum("btd,dhk->bhtk", m.stem(x), w) for w in (m.q, m.k, m.v))
    return m.out(torch.einsum("bhtk,hkd->btd", F.scaled_dot_product_attention(q, k, v), m.o))


def token_mixer(m: Net, x: Tensor) -> Tensor:
    h = m.stem(x)
    return m.out(h + m.back(m.mix(h.transpose(1, 2)).relu()).transpose(1, 2))


def codebook(m: Net, x: Tensor) -> Tensor:
    h = m.stem(x)
    return m.out(F.embedding(((h[:, :, None] - m.codes) ** 2).sum(-1).argmin(-1), m.codes))


KINDS = {
    "low-rank update": (
        lambda m, x: m.out(F.linear(m.stem(x), m.w + 0.5 * m.b @ m.a).relu()),
        {**WEIGHT, "a": parameter(3, 6), "b": parameter(6, 3)}, [3, 6, 6],
    ),
    "rounded weight": (
        lambda m, x: m.out(F.linear(m.stem(x), m.w + ((m.w / m.w.abs().max()).round() - m.w).detach()).relu()),
        WEIGHT, [6, 6],
    ),
    "normalised rows": (
        lambda m, x: m.out(F.linear(m.stem(x), F.normalize(m.w, dim=1).softmax(0)).relu()), WEIGHT, [6, 6],
    ),
    "integer weight": (
        lambda m, x: m.out(F.linear(m.stem(x), (m.q.float() - m.zero) * m.scale).relu()),
        {**ENDS, "q": torch.randint(-8, 8, (6, 6), dtype=torch.int8), "zero": torch.zeros(6, 1),
         "scale": parameter(6, 1)}, [6, 6],
    ),
    "mask of a weight": (
        lambda m, x: m.out(F.linear(m.stem(x), m.w * m.mask).relu()),
        {**WEIGHT, "mask": torch.rand(6, 6) > 0.5}, [6, 6],
    ),
    "outer product of vectors": (
        lambda m, x: m.out(F.linear(m.stem(x), torch.outer(m.u, m.v))),
        {**ENDS, "u": parameter(6), "v": parameter(6)}, [6, 6],
    ),
    "reparameterised convolution": (
        lambda m, x: m.out(F.conv1d(m.stem(x).mT, m.w3 + F.pad(m.w1, (1, 1)), padding=1).mT),
        {**ENDS, "w3": parameter(6, 6, 3), "w1": parameter(6, 6, 1)}, [6, 6],
    ),
    "experts by einsum": (
        experts, {**ENDS, "w": parameter(3, 6, 5), "v": parameter(3, 5, 6), "router": (6, 3)}, [3, 5, 6, 6],
    ),
    "stacked products": (stacked, {**ENDS, "w": parameter(3, 6, 5), "v": parameter(3, 5, 6)}, [3, 5, 6, 6]),
    "bilinear layer": (
        lambda m, x: m.out(m.two(m.stem(x), m.other(x)).relu()),
        {"stem": (4, 6), "other": (4, 5), "two": nn.Bilinear(6, 5, 7), "out": (7, 2)}, [5, 6, 7],
    ),
    "quadratic form": (
        lambda m, x: m.out(torch.einsum("bti,oij,btj->bto", m.stem(x), m.w, m.stem(x)).tanh()),
        {"stem": (4, 6), "w": parameter(5, 6, 6), "out": (5, 2)}, [5, 6],
    ),
    "radial basis": (
        basis_of_distances, {"stem": (4, 6), "centres": parameter(5, 6), "width": parameter(5), "out": (5, 2)}, [5, 6],
    ),
    "distances": (
        lambda m, x: m.out(torch.exp(-torch.cdist(m.stem(x), m.centres))),
        {"stem": (4, 6), "centres": parameter(5, 6), "out": (5, 2)}, [5, 6],
    ),
    "splines on a grid": (
        splines, {"stem": (4, 6), "c": parameter(5, 6, 3), "w": parameter(5, 6), "out": (5, 2),
                  "grid": torch.linspace(-1, 1, 4)}, [5, 6],
    ),
    "selective state space": (
        state_space, {"stem": (4, 6), "enter": (6, 8), "select": (8, 8), "step": (2, 8), "a": parameter(8, 3),
                      "d": parameter(8), "out": (8, 2)}, [2, 3, 6, 8],
    ),
    "heads by einsum": (
        heads_by_einsum,
        {**ENDS, "q": parameter(6, 2, 3), "k": parameter(6, 2, 3), "v": parameter(6, 2, 3), "o": parameter(2, 3, 6)},
        [2, 3, 3, 6, 6],
    ),
    "learned queries": (
        lambda m, x: m.out((m.queries @ m.stem(x).mT).softmax(-1) @ m.other(x)).mean(1),
        {**ENDS, "other": (4, 6), "queries": parameter(3, 6)}, [3, 6, 6],
    ),
    "tokens are mixed": (token_mixer, {**ENDS, "mix": (5, 8), "back": (8, 5)}, [6, 8]),
    "codebook": (codebook, {**ENDS, "codes": parameter(7, 6)}, [6, 7]),
    "attention to a vector": (
        lambda m, x: m.out(((m.stem(x) @ m.v).softmax(1)[..., None] * m.stem(x)).sum(1)),
        {**ENDS, "v": parameter(6)}, [6],
    ),
    "scalars of a column": (
        lambda m, x: m.out(m.stem(x) * m.s[0] + m.stem(x).tanh() * m.s[1]), {**ENDS, "s": parameter(2, 1)}, [6],
    ),
    "scalars of no dimension": (
        lambda m, x: m.out(m.stem(x) * m.a + m.b * x.new_ones(6)),
        {**ENDS, "a": nn.Parameter(torch.tensor(0.3)), "b": nn.Parameter(torch.tensor(0.2))}, [6],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_units_along_several_dimensions_move(kind):
    function, members, sizes = KINDS[kind]
    assert sorted(proved(Net(function, **members), 3, 5, 4, draws=3).groups.values()) == sizes


def stays(spec: PermutationSpec, name: str) -> list[int]:
    return [a for a, axis in enumerate(spec.axes[name]) if all(s.group is None for s in axis)]


@pytest.mark.parametrize(
    ("function", "weight", "fixed"),
    [
        (lambda m, x: m.out(torch.einsum("bti,tio->bto", m.stem(x), m.w)), parameter(5, 6, 6), [0]),
        (lambda m, x: m.out(torch.einsum("bti,tio,t->bo", m.stem(x), m.w, torch.arange(5.0))), parameter(5, 6, 6), [0]),
        (lambda m, x: m.out(F.linear(m.stem(x), m.w[2] + m.w[0])), parameter(5, 6, 6), [0]),
        (lambda m, x: m.out(F.linear(m.stem(x), m.w * torch.arange(36.0).view(6, 6))), parameter(6, 6), [0, 1]),
        (lambda m, x: m.out(F.linear(m.stem(x), (m.w @ m.w).cumsum(0))), parameter(6, 6), [0, 1]),
    ],
    ids=["a place of its own", "constants", "single slices", "a random mask", "along an axis itself"],
)  # fmt: skip
def test_what_is_told_apart_along_a_dimension_stays(function, weight, fixed):
    net = Net(function, **ENDS, w=weight)
    assert stays(proved(net, 3, 5, 4, draws=3, losses=True), "w") == fixed
