"""Packing: the segment table, and its arithmetic beyond 2^31 elements."""

import math

import pytest
import torch
from hypothesis import given, settings
from random_models import models

from regraft_kernels import Packing
from regraft_kernels.packing import Table
from regraft_kernels.tiles import MoveTile


@settings(max_examples=50)
@given(model=models())
def test_segments_and_tiles_cover_every_element_once(model):
    packing = model.packing
    offset = 0
    for name, segment in packing.segments.items():
        assert segment.offset == offset
        assert segment.size == math.prod(model.shapes[name])
        offset += segment.size
    names = list(packing.segments)
    table = packing.table(names, [1] * len(names), MoveTile(2, 4, 1), torch.device("cpu"))
    seen = {name: torch.zeros(packing.segments[name].size, dtype=torch.int64) for name in names}
    for number, row, column in table.tiles.tolist():
        rows, length = table.segments[number, :2].tolist()
        matrix = seen[names[number]].view(rows, length)
        matrix[row : row + 2, column : column + 4] += 1
    assert all(bool((count == 1).all()) for count in seen.values())
    assert packing.table(names, [1] * len(names), MoveTile(2, 4, 1), torch.device("cpu")) is table


def test_offsets_go_beyond_32_bits():
    shapes = {"embedding": (200_000, 16_384), "head": (16_384, 200_000), "bias": (3,)}
    packing = Packing.build(shapes, {"embedding": (None, "h"), "head": ("h", "v")})
    assert packing.segments["head"].offset == 200_000 * 16_384 > 2**31
    assert packing.segments["bias"].offset == 2 * 200_000 * 16_384 > 2**32
    tile = MoveTile(1024, 16_384, 4)
    table = Table.build(list(packing.segments.values()), [1, 1, 1], tile, torch.device("cpu"))
    assert table.segments.dtype == table.tiles.dtype == torch.int64
    assert table.segments[:, 5].tolist() == [s.size for s in packing.segments.values()]
    number, row, column = table.tiles[table.tiles[:, 0] == 1][-1].tolist()
    rows, length = table.segments[number, :2].tolist()
    assert row <= rows - 1 < row + 1024
    assert column <= length - 1 < column + 16_384
    last = (rows - 1) * length + length - 1
    assert last == packing.segments["head"].size - 1 > 2**31


def test_two_permuted_axes_with_fixed_ones_between():
    packing = Packing.build({"w": (4, 2, 3, 5)}, {"w": ("a", None, "b", None)})
    segment = packing.segments["w"]
    assert (segment.rows, segment.columns, segment.tail) == (8, 3, 5)
    assert packing.slots == {"a": 4, "b": 3}


def test_refuses_axes_that_do_not_fit():
    with pytest.raises(ValueError, match="axes name tensors without a shape: v"):
        Packing.build({"w": (2,)}, {"v": ("a",)})
    with pytest.raises(ValueError, match="axes of 'w': 1 entries for 2 dimensions"):
        Packing.build({"w": (2, 3)}, {"w": ("a",)})
    with pytest.raises(ValueError, match="slot 'a' has length 2, but 3 in 'w'"):
        Packing.build({"w": (2, 3)}, {"w": ("a", "a")})
    assert Packing.build({}).segments == {}
