"""Operators that act along one dimension: units pass where theirs is another one; each case is proved."""

from __future__ import annotations

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


def first_of_data(x: Tensor) -> Tensor:
    """int64 [5]: indices that depend on the input."""
    return (x[0, :, 0] > 0.5).long()


def zeros(h: Tensor) -> Tensor:
    return torch.zeros(h.shape[0], 4, h.shape[2], dtype=h.dtype)


ALONG = {
    "cumsum": lambda h, x: h.cumsum(1),
    "cummax": lambda h, x: h.cummax(1).values,
    "logcumsumexp": lambda h, x: h.logcumsumexp(1),
    "diff": lambda h, x: h.diff(dim=1),
    "median": lambda h, x: h.median(1).values,
    "sort": lambda h, x: h.sort(1).values,
    "topk": lambda h, x: h.topk(2, 1).values,
    "argmax": lambda h, x: h.argmax(1).to(h.dtype),
    "gather by the places of a sort": lambda h, x: h.sin().gather(1, h.argsort(1)),
    "gather by data": lambda h, x: h.gather(1, first_of_data(x).view(1, 5, 1).expand(h.shape)),
    "index_select": lambda h, x: h.index_select(1, first_of_data(x)),
    "index_add": lambda h, x: zeros(h).index_add(1, first_of_data(x), h),
    "scatter_add": lambda h, x: zeros(h).scatter_add(1, first_of_data(x).view(1, 5, 1).expand(h.shape), h),
    "rfft": lambda h, x: torch.fft.rfft(h, dim=1).abs(),
    "fft2": lambda h, x: torch.view_as_real(torch.fft.fft2(h, dim=(0, 1))).sum(-1),
}


@pytest.mark.parametrize("case", ALONG)
def test_units_pass_along_another_dimension(case):
    net = Net(lambda m, x: m.out(ALONG[case](m.stem(x).tanh(), x)), stem=(4, 6), out=(6, 2))
    assert proved(net, 3, 5, 4).groups == {"stem": 6}


@pytest.mark.parametrize(
    "operator",
    [
        lambda h: h.cumsum(2), lambda h: h.flip(2).sort(2).values,
        lambda h: h.gather(2, torch.tensor([5, 0, 2, 1, 4, 3]).expand(h.shape)),
        lambda h: h.gather(1, torch.arange(6).clamp(max=4).expand(h.shape)),
        lambda h: h.flatten(1).cumsum(1).view(h.shape),
    ],
)  # fmt: skip
def test_units_along_the_dimension_itself_stay_apart(operator):
    net = Net(lambda m, x: m.out(operator(m.stem(x).tanh()) + m.stem(x)), stem=(4, 6), out=(6, 2))
    x = torch.rand(3, 5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = trace(net, x)
    assert verify(spec, net, x, draws=4) < 1e-10
    assert sum(spec.groups.values()) < 6


KNOWN = {
    "glu": (lambda m, x: m.out(F.glu(m.stem(x))), {"stem": (4, 12), "out": (6, 2)}, [6]),
    "constants of a value's type and shape": (
        lambda m, x: m.out((h := m.stem(x)) + torch.ones(6).type_as(h).expand_as(h)),
        {"stem": (4, 6), "out": (6, 2)}, [6],
    ),
    "einsum with an ellipsis": (
        lambda m, x: m.out(torch.einsum("...i,oi->...o", m.stem(x), m.w)),
        {"stem": (4, 6), "w": parameter(5, 6), "out": (5, 2)}, [5, 6],
    ),
    "einsum without a result": (
        lambda m, x: m.out(torch.einsum("bti,iz", m.stem(x), m.w)),
        {"stem": (4, 6), "w": parameter(6, 5), "out": (5, 2)}, [5, 6],
    ),
    "cosine similarity": (
        lambda m, x: m.out(m.stem(x) * F.cosine_similarity(m.stem(x), m.other(x), dim=-1)[..., None]),
        {"stem": (4, 6), "other": (4, 6), "out": (6, 2)}, [6],
    ),
    "complex numbers of two units": (
        lambda m, x: m.out(
            torch.view_as_real(torch.view_as_complex(m.stem(x).unflatten(-1, (3, 2))) * 1j).flatten(-2)
        ),
        {"stem": (4, 6), "out": (6, 2)}, [3],
    ),
    "complex parameters": (
        lambda m, x: m.out((m.stem(x) * m.scale).abs()),
        {"stem": (4, 6), "scale": nn.Parameter(torch.randn(6, dtype=torch.complex64)), "out": (6, 2)}, [6],
    ),
    "a mask": (
        lambda m, x: m.out(m.stem(x)[..., torch.tensor([True, False, True, True, False, True])].tanh()),
        {"stem": (4, 6), "out": (4, 2)}, [2, 4],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KNOWN)
def test_operators_that_were_not_known(case):
    function, members, sizes = KNOWN[case]
    assert sorted(proved(Net(function, **members), 3, 5, 4, draws=4).groups.values()) == sizes


def test_sizes_that_depend_on_data_are_those_of_the_example():
    net = Net(lambda m, x: m.out(m.stem(x)[x[..., 0] > 0.5].tanh()), stem=(4, 6), out=(6, 2))
    assert proved(net, 3, 5, 4).groups == {"stem": 6}
