"""Specifications written by hand, and their application to tensors."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.symmetry import PermutationSpec, Segment, apply, inverse


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors_of(spec: PermutationSpec, seed: int = 0, stack: int | None = None) -> dict[str, torch.Tensor]:
    lead = () if stack is None else (stack,)
    return {name: torch.randn((*lead, *shape), generator=generator(seed)) for name, shape in spec.shapes.items()}


SMALL = PermutationSpec.build(
    {"conv": 3, "fc": 4},
    {
        "conv.weight": ["conv", 2, 1, 1],
        "conv.bias": ["conv"],
        "fc.weight": ["fc", [["conv", 0, 3, 2], [None, 0, 1, 1]]],
        "fc.bias": ["fc"],
        "square": ["fc", "fc"],
        "out.weight": [5, "fc"],
        "steps": [],
    },
)


# ---- data


def test_a_specification_reads_like_a_shape():
    assert SMALL.shapes["fc.weight"] == (4, 7)
    assert SMALL.axes["fc.weight"][1] == (Segment("conv", 0, 3, 2), Segment(None, 0, 1))
    assert SMALL.tensors_of("fc") == (
        ("fc.weight", 0),
        ("fc.bias", 0),
        ("square", 0),
        ("square", 1),
        ("out.weight", 1),
    )


def test_positions_hold_each_unit_in_rising_order():
    axis = (Segment("g", 1, 2), Segment(None, 0, 2), Segment("g", 0, 1, 2), Segment("g", 1, 2))
    spec = PermutationSpec({"g": 3}, {"w": (axis,)})
    assert spec.positions("w", 0, "g").tolist() == [[4, 5], [0, 6], [1, 7]]
    perm = {"g": torch.tensor([2, 0, 1])}
    # position 0 holds the first place of unit 1: it takes the first place of unit perm[1] = 0
    assert spec.axis_index("w", 0, perm).tolist() == [4, 0, 2, 3, 1, 7, 5, 6]


def test_json_gives_the_same_specification_back():
    assert PermutationSpec.from_json(SMALL.to_json()) == SMALL
    assert json.loads(SMALL.to_json())["axes"]["conv.weight"] == ["conv", 2, 1, 1]


def test_save_and_load(tmp_path):
    SMALL.save(tmp_path / "spec.json")
    assert PermutationSpec.load(tmp_path / "spec.json") == SMALL
    assert [path.name for path in tmp_path.iterdir()] == ["spec.json"]
    (tmp_path / "broken.json").write_text(SMALL.to_json()[:40])
    with pytest.raises(ValueError, match=r"broken\.json: not a permutation specification"):
        PermutationSpec.load(tmp_path / "broken.json")
    with pytest.raises(FileNotFoundError):
        PermutationSpec.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("axes", "complaint"),
    [
        ({"w": ["absent"]}, "axis 0 of tensor 'w': there is no group 'absent'"),
        ({"w": [3, [["g", 0, 4, 1]]]}, "axis 1 of tensor 'w': group 'g' has 3 units, not 4"),
        ({"w": [[["g", 0, 2, 1]]]}, "not every unit of group 'g' occurs, or not each equally often"),
        ({"w": [[["g", 0, 3, 0]]]}, "malformed"),
        ({"w": [2.5]}, "expected a length, a group or a list of segments"),
        ({"w": [True]}, "expected a length"),
        ({"w": [[["g", 0]]]}, "expected a length, a group or a list of segments"),
    ],
)
def test_a_wrong_axis_is_named(axes, complaint):
    with pytest.raises(ValueError, match=complaint):
        PermutationSpec.build({"g": 3}, axes)


@pytest.mark.parametrize("text", ["[]", "{}", '{"groups": {}, "axes": {"w": 3}}', '{"groups": {}, "axes": 1}'])
def test_json_of_something_else_is_refused(text):
    with pytest.raises(ValueError, match=r"permutation specification|expected a list with one entry per axis"):
        PermutationSpec.from_json(text)


def test_it_prints_as_text_and_as_a_table():
    assert "fc [4]: fc.weight:0, fc.bias:0, square:0, square:1, out.weight:1" in str(SMALL)
    table = SMALL.table()
    assert [list(column.cells) for column in table.columns][:2] == [["conv", "fc"], ["3", "4"]]


def test_simple_axes_use_their_group_as_slot():
    assert SMALL.indices(SMALL.identity()).keys() == {"conv", "fc", "fc.weight:1"}
    assert SMALL.packing().axes["square"] == ("fc", "fc")


def test_what_moves_is_counted():
    spec = PermutationSpec.build({"g": 3}, {"w": [3, [["g", 0, 3, 1], [None, 0, 4, 1]]], "v": ["g", "g"], "b": [3]})
    # the exchange of units 0 and 1 leaves five columns of w, and one scalar of v
    assert spec.count_moved({"g": torch.tensor([1, 0, 2])}) == {"w": 6, "v": 8, "b": 0}
    assert set(spec.count_moved(spec.identity()).values()) == {0}


# ---- application


def test_apply_is_an_index_select_along_each_axis():
    tensors, perm = tensors_of(SMALL), SMALL.random(generator(1))
    moved = apply(SMALL, perm, tensors)
    conv, fc = perm["conv"], perm["fc"]
    columns = torch.cat([torch.stack([2 * conv, 2 * conv + 1], 1).flatten(), torch.tensor([6])])
    assert torch.equal(moved["conv.weight"], tensors["conv.weight"][conv])
    assert torch.equal(moved["fc.weight"], tensors["fc.weight"][fc][:, columns])
    assert torch.equal(moved["square"], tensors["square"][fc][:, fc])
    assert torch.equal(moved["out.weight"], tensors["out.weight"][:, fc])
    assert torch.equal(moved["steps"], tensors["steps"])


def test_apply_takes_stacks_and_leaves_its_arguments_alone():
    stacks, perm = tensors_of(SMALL, stack=3), SMALL.random(generator(1))
    before = {name: tensor.clone() for name, tensor in stacks.items()}
    moved = apply(SMALL, perm, stacks)
    for t in range(3):
        one = apply(SMALL, perm, {name: tensor[t] for name, tensor in stacks.items()})
        assert all(torch.equal(moved[name][t], one[name]) for name in one)
    assert all(torch.equal(stacks[name], before[name]) for name in before)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_permutations_are_a_group(a, b):
    tensors = tensors_of(SMALL, seed=a)
    p, q = SMALL.random(generator(a)), SMALL.random(generator(b))
    back = apply(SMALL, inverse(p), apply(SMALL, p, tensors))
    twice = apply(SMALL, p, apply(SMALL, q, tensors))
    once = apply(SMALL, {group: q[group][p[group]] for group in p}, tensors)
    same = apply(SMALL, SMALL.identity(), tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert all(torch.equal(twice[name], once[name]) for name in tensors)
    assert all(torch.equal(same[name], tensors[name]) for name in tensors)


@st.composite
def specs(draw: st.DrawFn) -> PermutationSpec:
    groups = draw(st.dictionaries(st.text("abc./", min_size=1, max_size=4), st.integers(1, 4), max_size=3))

    def axis() -> object:
        kind = draw(st.sampled_from(["fixed", "whole", "segments"]))
        if kind == "fixed" or not groups:
            return draw(st.integers(0, 3))
        group = draw(st.sampled_from(sorted(groups)))
        if kind == "whole":
            return group
        repeats = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        segments = [[group, 0, groups[group], repeat] for repeat in repeats]
        return [*segments, [None, 0, draw(st.integers(1, 3)), 1]]

    names = draw(st.lists(st.text("xyz.", min_size=1, max_size=5), unique=True, max_size=4))
    return PermutationSpec.build(groups, {name: [axis() for _ in range(draw(st.integers(0, 3)))] for name in names})


@given(specs(), st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_any_specification_goes_through_json_and_back_and_inverts(spec, seed):
    assert PermutationSpec.from_json(spec.to_json()) == spec
    tensors, perm = tensors_of(spec, seed), spec.random(generator(seed))
    moved = apply(spec, perm, tensors)
    back = apply(spec, inverse(perm), moved)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert all(torch.equal(moved[n].flatten().sort().values, tensors[n].flatten().sort().values) for n in tensors)


def test_misfits_are_named():
    tensors, perm = tensors_of(SMALL), SMALL.identity()
    with pytest.raises(ValueError, match=r"tensor 'fc.bias' of the specification is missing"):
        apply(SMALL, perm, {name: tensor for name, tensor in tensors.items() if name != "fc.bias"})
    with pytest.raises(ValueError, match=r"lacks tensor 'more'"):
        apply(SMALL, perm, {**tensors, "more": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"'conv.weight' has shape \(3, 2, 3, 1\)"):
        apply(SMALL, perm, {**tensors, "conv.weight": torch.zeros(3, 2, 3, 1)})
    with pytest.raises(ValueError, match="leading stack dimension"):
        apply(SMALL, perm, {**tensors, "fc.bias": torch.zeros(2, 4)})
    with pytest.raises(ValueError, match="lacks group 'fc'"):
        apply(SMALL, {"conv": perm["conv"]}, tensors)
    with pytest.raises(ValueError, match="has group 'other'"):
        apply(SMALL, {**perm, "other": perm["fc"]}, tensors)
    with pytest.raises(ValueError, match="group 'fc': expected 4 int64 indices"):
        apply(SMALL, {**perm, "fc": perm["fc"][:3]}, tensors)
    with pytest.raises(ValueError, match="group 'fc': the index vector is not a permutation"):
        apply(SMALL, {**perm, "fc": torch.tensor([0, 1, 1, 3])}, tensors)
