"""Random programs of operators that the tracer knows, their weights tied and sliced at random: every trace is proved.

A campaign of more: `REGRAFT_PROGRAMS=1000 pytest tests/symmetry/test_random_programs.py`.
"""

from __future__ import annotations

import os
import warnings

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import Net, parameter
from torch import Tensor

from regraft.symmetry import trace, verify


def attend(h: Tensor, g: Tensor) -> Tensor:
    q, k = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in (h, g))
    return F.scaled_dot_product_attention(q, k, k.sin()).transpose(1, 2).flatten(2)


def swap(h: Tensor) -> Tensor:
    return torch.cat([h[..., 3:], h[..., :3]], -1)


STEPS = {
    "first layer": lambda m, h, g: m.first(h),
    "second layer": lambda m, h, g: m.second(h),
    "sum": lambda m, h, g: h + g,
    "product": lambda m, h, g: h * g,
    "tanh": lambda m, h, g: h.tanh(),
    "relu": lambda m, h, g: h.relu(),
    "scale": lambda m, h, g: h * m.scale,
    "scale of another place": lambda m, h, g: h * m.scale[2],
    "weighed scales": lambda m, h, g: h * m.alpha.softmax(0)[1] + g * m.alpha.softmax(0)[0],
    "soup": lambda m, h, g: F.linear(h, m.alpha[0] * m.weight + m.alpha[1] * m.first.weight),
    "rows of a weight": lambda m, h, g: F.linear(h, m.weight[[1, 0, 3, 2, 5, 4]]),
    "halves of a weight": lambda m, h, g: F.linear(h[..., :3], m.weight[:, :3]) + F.linear(g[..., 3:], m.weight[:, 3:]),
    "two parts of a weight": lambda m, h, g: torch.cat([h @ m.weight[[0, 3, 4]].T, g @ m.weight[1:4].T], -1),
    "changed scales": lambda m, h, g: h * torch.cat([m.scale.exp().view(2, 3)[1], m.scale.sin().view(2, 3)[0]]),
    "transposed weight": lambda m, h, g: h @ m.weight,
    "swap halves": lambda m, h, g: swap(h),
    "join halves": lambda m, h, g: torch.cat([h[..., :3].sin(), g[..., 3:]], -1),
    "interleave": lambda m, h, g: torch.stack([h[..., :3], g[..., :3]], -1).flatten(-2),
    "shuffle": lambda m, h, g: h[..., [2, 0, 1, 5, 4, 3]],
    "softmax": lambda m, h, g: h.softmax(-1),
    "norm": lambda m, h, g: F.layer_norm(h, (6,), m.scale),
    "norm of halves": lambda m, h, g: F.layer_norm(h.unflatten(-1, (2, 3)), (3,)).flatten(-2),
    "mean over places": lambda m, h, g: h + g.mean(1, keepdim=True),
    "largest unit": lambda m, h, g: h * g.amax(-1, keepdim=True),
    "one unit": lambda m, h, g: h + g[..., 3:4],
    "cumsum": lambda m, h, g: h.cumsum(1),
    "sort": lambda m, h, g: h.sort(1).values,
    "sorted by another": lambda m, h, g: h.gather(1, g.argsort(1)),
    "gated": lambda m, h, g: F.glu(torch.cat([h, g], -1)),
    "attention": lambda m, h, g: attend(h, g),
    "outer product": lambda m, h, g: h + (h[..., :, None] * g[..., None, :]).sum(-1),
    "winner": lambda m, h, g: F.one_hot(h.argmax(-1), 6).to(h.dtype) * g,
    "product of weights": lambda m, h, g: F.linear(h, m.weight @ m.second.weight),
    "normalised weight": lambda m, h, g: F.linear(h, F.normalize(m.weight, dim=0) * m.scale),
    "pairs": lambda m, h, g: ((h[..., :, None] - g[..., None, :]) * m.weight).sum(-1),
    "distances": lambda m, h, g: (-((h[:, :, None] - m.weight) ** 2).sum(-1)).exp(),
    "pairs of branches": lambda m, h, g: torch.stack([h[..., None] * m.scale, g[..., None] * m.scale], 1).sum((1, -1)),
    "pairs in a row": lambda m, h, g: (h[..., None] * m.scale).flatten(2)[..., 3:33:5],
    "places are mixed": lambda m, h, g: m.places(h.mT).mT,
    "stacked weights": lambda m, h, g: torch.einsum("bti,eoi->bteo", h, m.weight.view(2, 3, 6)).flatten(2),
    "quadratic": lambda m, h, g: torch.einsum("bti,ij,btj->bti", h, m.weight, g),
    "pairs along time": lambda m, h, g: (h[..., None] * m.scale).cumsum(1).amax(-1),
    "constants": lambda m, h, g: h + torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0, 1.0]),
}  # fmt: skip

PROGRAMS = st.lists(
    st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 2), st.integers(0, 2)), min_size=3, max_size=6
)


@settings(
    max_examples=int(os.environ.get("REGRAFT_PROGRAMS", "8")), deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(PROGRAMS)
def test_what_is_traced_of_a_random_program_is_proved(program):
    torch.manual_seed(0)

    def forward(m: Net, x: Tensor) -> Tensor:
        made = [m.stem(x), m.other(x).tanh()]
        for name, i, j in program:
            made.append(STEPS[name](m, made[-1 - i % len(made)], made[-1 - j % len(made)]))
        return m.out(made[-1] + made[-2])

    layers = {"stem": (4, 6), "other": (4, 6), "first": (6, 6), "second": (6, 6), "out": (6, 2), "places": (5, 5)}
    net = Net(forward, **layers, scale=parameter(6), alpha=parameter(2), weight=parameter(6, 6))
    x = torch.rand(2, 5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = trace(net, x)
    assert verify(spec, net, x, draws=3) < 1e-9
