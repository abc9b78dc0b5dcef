"""Blocks that are exchanged whole: heads, groups of a convolution, key-value heads with their queries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Net, attention, grouped, proved, share
from torch import Tensor, nn

from regraft.symmetry import PermutationSpec, inverse, verify


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_heads_are_exchanged_whole():
    spec = proved(attention(3), 2, 5, 3)
    assert spec.groups["q/blocks"] == 3
    assert spec.blocks == {"q": ("q/blocks",), "v": ("q/blocks",)}
    assert {("q.weight", 0), ("k.weight", 0)} <= set(spec.tensors_of("q"))
    assert spec.tensors_of("v") == (("proj.weight", 1), ("v.weight", 0), ("v.bias", 0))


def test_a_bias_for_each_head_goes_with_it():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-2, -1) * m.scale.exp() + m.table.weight[m.index].permute(2, 0, 1)
        return m.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    net = Net(
        forward, qkv=(5, 36), out=(12, 2), table=nn.Embedding(9, 3),
        scale=nn.Parameter(torch.randn(3, 1, 1)), index=(torch.arange(5)[:, None] - torch.arange(5)) + 4,
    )  # fmt: skip
    spec = proved(net, 2, 5, 5)
    (heads,) = (group for group, size in spec.groups.items() if size == 3)
    assert set(spec.tensors_of(heads)) == {("table.weight", 1), ("scale", 0)}


def test_key_value_heads_move_with_their_queries_and_queries_inside_their_group():
    spec = proved(attention(6, 3), 2, 5, 3)
    pairs, heads = ("q/blocks/blocks", "q/blocks")
    assert (spec.groups[pairs], spec.groups[heads]) == (2, 6)
    assert spec.blocks[heads] == (pairs,)
    assert spec.blocks["k"] == (pairs,)
    assert spec.blocks["q"] == (heads, "k")  # every head's units in the order of its keys


def test_attention_that_shares_keys_itself():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return m.out(y.transpose(1, 2).flatten(2))

    layers = {"q": (3, 16), "k": (3, 8), "v": (3, 8), "out": (16, 2)}
    spec = proved(Net(forward, **layers), 2, 5, 3)
    assert spec.blocks["q"] == ("q/blocks", "k")


def test_a_constant_that_differs_between_heads_keeps_them_apart():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (3, 4)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        far = -(torch.arange(5)[:, None] - torch.arange(5)).abs() * torch.tensor([1.0, 0.5, 0.5])[:, None, None]
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=far)
        return m.out(y.transpose(1, 2).flatten(2))

    layers = {name: (3, 12) for name in "qkv"}
    spec = proved(Net(forward, **layers, out=(12, 2)), 2, 5, 3)
    assert sorted(spec.groups.values()) == [2, 4, 4, 8, 8]  # two of three heads see the same


def test_one_head_of_keys_for_all_queries():
    spec = proved(attention(3, 3), 2, 5, 3)
    assert spec.blocks == {"q": ("q/blocks", "k"), "v/1": ("q/blocks", "v/0")}


def test_rotary_positions_leave_heads_to_exchange_but_not_what_is_in_them():
    spec = proved(attention(3, rotary=True), 2, 5, 3)
    assert spec.groups["q"] == 3
    assert spec.axes["q.bias"][0][0] == ("q", 0, 3, 4)
    assert spec.blocks == {"v": ("q",)}
    proved(attention(6, 2, rotary=True), 2, 5, 3)


def test_groups_of_a_convolution_are_exchanged_whole():
    spec = proved(grouped(3), 1, 2, 5, 5)
    assert (spec.groups["0/blocks"], spec.groups["2/0"]) == (3, 4)
    assert spec.blocks == {"0": ("0/blocks", "2/0"), "2/1": ("0/blocks",)}
    assert share(spec, grouped(3)) > 0.9
    spec = proved(grouped(3, transposed=True), 1, 2, 5, 5)
    assert spec.blocks == {"0": ("0/blocks",), "2/0": ("0/blocks", "2/1")}


def test_groups_of_different_sizes_after_one_another():
    layers = [nn.Conv2d(12, 24, 3, groups=3), nn.ReLU(), nn.Conv2d(24, 24, 1, groups=6), nn.GroupNorm(3, 24)]
    spec = proved(nn.Sequential(nn.Conv2d(2, 12, 1), nn.ReLU(), *layers, nn.Conv2d(24, 3, 1)), 1, 2, 5, 5)
    assert [size for size in spec.groups.values() if size == 3] == [3]  # what all of them have in common


def test_a_block_that_holds_something_fixed_stays():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(m.grouped(torch.cat([m.stem(x), x], 1))).mean((2, 3))

    net = Net(forward, stem=nn.Conv2d(2, 10, 1), grouped=nn.Conv2d(12, 9, 3, groups=3), out=nn.Conv2d(9, 2, 1))
    assert all(size != 3 for group, size in proved(net, 1, 2, 5, 5).groups.items() if "blocks" in group)


NESTED = {"groups": proved(grouped(3), 1, 2, 5, 5), "heads": proved(attention(6, 3), 2, 5, 3)}


@pytest.mark.parametrize("name", NESTED)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_permutations_keep_to_their_blocks_as_do_inverses_and_products(name, seed):
    spec = NESTED[name]
    a, b = (spec.random(torch.Generator().manual_seed(seed + i)) for i in range(2))
    for perm in (a, b, inverse(a), {group: a[group][b[group]] for group in a}, spec.identity()):
        spec.check(perm)


def test_a_permutation_that_breaks_blocks_is_refused():
    spec = NESTED["groups"]
    for group, complaint in (("2/1", "keep blocks of 8 units together"), ("2/0", "do not move alike")):
        size = spec.groups[group]
        with pytest.raises(ValueError, match=complaint):
            spec.check({**spec.identity(), group: torch.arange(size).roll(1)})


def test_specifications_with_blocks_go_through_json_and_back():
    for spec in NESTED.values():
        assert PermutationSpec.from_json(spec.to_json()) == spec
        assert "in blocks that move as" in str(spec)


@pytest.mark.parametrize(
    ("blocks", "complaint"),
    [
        ({"a": ["c"]}, "there is no group 'c'"),
        ({"a": ["b"]}, "6 units are not 4 equal blocks"),
        ({"a": ["d", "b"]}, "do not move as 4"),
        ({"a": ["d"], "d": ["a"]}, "not 6 equal blocks|in a circle"),
        ({"a": []}, "expected an outer group"),
    ],
)
def test_blocks_that_do_not_fit_are_named(blocks, complaint):
    with pytest.raises(ValueError, match=complaint):
        PermutationSpec.build({"a": 6, "b": 4, "d": 3}, {}, blocks=blocks)


def test_a_wrong_block_changes_the_function_and_is_found():
    net = grouped(3)
    spec = NESTED["groups"]
    loose = PermutationSpec(spec.groups, spec.axes, blocks={"0": ("0/blocks", "2/0")})  # 2/1 no longer in blocks
    with pytest.raises(ValueError, match="changes the function"):
        verify(loose, net, torch.rand(1, 2, 5, 5))
