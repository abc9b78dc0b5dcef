"""Packing: the segment table, and its arithmetic beyond 2^31 elements."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from random_models import models

from regraft_kernels import Packing
from regraft_kernels import packing as packing_module
from regraft_kernels.launch import FAMILIES, INTERPRETER
from regraft_kernels.memory import LRUCache
from regraft_kernels.packing import Piece, lay_out

CPU = torch.device("cpu")


def float_pieces(segments):
    """The segments as float32 tensors that stand at multiples of 16 bytes."""
    return [Piece(segment, torch.float32) for segment in segments]


def spans(packing):
    """Where the index vector of each slot starts and ends, one after the other."""
    ends = list(itertools.accumulate(packing.slots.values()))
    return {slot: (end - n, end) for (slot, n), end in zip(packing.slots.items(), ends, strict=True)}


@settings(max_examples=50)
@given(model=models())
def test_segments_and_tiles_cover_every_element_once(model):
    packing = model.packing
    offset = 0
    for name, segment in packing.segments.items():
        assert segment.offset == offset
        assert segment.size == math.prod(model.shapes[name])
        offset += segment.size
    segments = list(packing.segments.values())
    layout = lay_out(float_pieces(segments), 1, lambda kind, longest: (2, 4), spans(packing), CPU)
    seen = {segment.name: torch.zeros(segment.size, dtype=torch.int64) for segment in segments}
    for launch in layout.launches:
        numbers = layout.order[launch.start : launch.end]
        for segment, row, column in launch.tiles.tolist():
            rows, length = launch.segments[segment, :2].tolist()
            matrix = seen[segments[numbers[segment]].name].view(rows, length)
            matrix[2 * row : 2 * row + 2, 4 * column : 4 * column + 4] += 1
    assert all(bool((count == 1).all()) for count in seen.values())


def test_offsets_go_beyond_32_bits():
    shapes = {"embedding": (200_000, 16_384), "head": (16_384, 200_000), "bias": (3,)}
    packing = Packing.build(shapes, {"embedding": ("v", None), "head": ("h", "v")})
    assert packing.segments["head"].offset == 200_000 * 16_384 > 2**31
    assert packing.segments["bias"].offset == 2 * 200_000 * 16_384 > 2**32
    segments = list(packing.segments.values())
    layout = lay_out(float_pieces(segments), 1, lambda kind, longest: (1024, 16_384), spans(packing), CPU)
    launch = next(launch for launch in layout.launches if launch.kind.gathered)
    assert launch.segments[:, 2].tolist() == [packing.segments["head"].size]
    number, row, column = launch.tiles[-1].tolist()
    rows, length = launch.segments[number, :2].tolist()
    assert 1024 * row <= rows - 1 < 1024 * (row + 1)
    assert 16_384 * column <= length - 1 < 16_384 * (column + 1)
    assert (rows - 1) * length + length - 1 == packing.segments["head"].size - 1 > 2**31
    huge = Packing.build({"w": (2, 2**31)}, {"w": ("a", "b")})
    with pytest.raises(ValueError, match="'w' has 2 rows of 2147483648"):
        lay_out(float_pieces(huge.segments.values()), 1, lambda kind, longest: (1, 1), {}, CPU)


def test_rows_that_a_tile_would_count_beyond_32_bits_are_refused():
    packing = Packing.build({"w": (2**31 - 32, 4)}, {"w": (None, "a")})
    with pytest.raises(ValueError, match="'w' has 2147483616 rows of 4, beyond what a kernel counts"):
        packing_module._segment_row(Piece(packing.segments["w"], torch.int32), {})
    tiles = [tile for family in (*FAMILIES.values(), INTERPRETER) for tile in (family.move, *family.gather)]
    assert max(tile.rows * tile.repeat for tile in tiles) <= 2**31 - packing_module.MOST_ROWS


def test_kinds_follow_addresses_and_lengths():
    shapes = {"a": (8, 8), "b": (8, 8), "c": (7, 5), "d": (8, 2048), "e": (4096,)}
    axes = {"a": ("x", "x"), "b": ("x", "x"), "c": ("y", None), "d": ("x", None)}
    segments = list(Packing.build(shapes, axes).segments.values())
    pieces = [Piece(segment, torch.float32, aligned16=segment.name != "b") for segment in segments]
    layout = lay_out(pieces, 2, lambda kind, longest: (4, 64), {"x": (0, 8), "y": (8, 15)}, CPU)
    names = {}
    for launch in layout.launches:
        assert launch.start % 2 == 0
        block = layout.order[launch.start : launch.end].reshape(2, -1)
        assert (block[1] - block[0] == 5).all()
        names[launch.kind.label] = [segments[number].name for number in block[0]]
    assert names == {
        "float32 columns aligned": ["a"],
        "float32 columns general": ["b", "c"],
        "float32 rows aligned": ["d", "e"],
    }


def test_the_least_recently_used_is_dropped():
    cache = LRUCache(2)
    for key in "abac":
        cache.get(key, lambda key=key: key.upper())
    assert (len(cache), "b" in cache, cache.get("a", lambda: "made again")) == (2, False, "A")


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
