"""Groups nested in groups: blocks that are exchanged whole, and what may move in them.

A nested group of n units consists of m blocks of n / m consecutive ones, and m is the size of its outer group: block b
of the permuted order holds units of block ``outer[b]``. Where the nested group has an inner group too, the units of all
blocks (of all that are in one block of a third group, which outer and inner are both nested in) move as that does:
``perm[b s + i] = outer[b] s + inner[b // a s + i] % s``, with s units in a block, and a blocks to each s of inner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Blocks = Mapping[str, Sequence[str]]
"""Nested group -> (outer,) or (outer, inner)."""


def check_blocks(groups: Mapping[str, int], blocks: Blocks) -> None:
    """Raises ValueError, naming the group, where sizes do not fit, a group is unknown, or nested in itself."""
    for group, around in blocks.items():
        where = f"blocks of group {group!r}"
        if len(around) not in (1, 2):
            raise ValueError(f"{where}: expected an outer group, and perhaps an inner one, found {list(around)}")
        for name in (group, *around):
            if name not in groups:
                raise ValueError(f"{where}: there is no group {name!r}")
        size, outer = groups[group], groups[around[0]]
        if outer == 0 or size % outer:
            raise ValueError(f"{where}: {size} units are not {outer} equal blocks")
        if len(around) == 2:
            inner, inside = groups[around[1]], size // outer
            if inner % inside or outer % (inner // inside):
                raise ValueError(f"{where}: blocks of {inside} units do not move as {inner} of {around[1]!r}")
    if len(outermost_first(groups, blocks)) < len(groups):
        raise ValueError(f"blocks: {sorted(blocks)} are nested in one another in a circle")


def outermost_first(groups: Mapping[str, int], blocks: Blocks) -> list[str]:
    """The groups' names, each after those that it is nested in; without those nested in a circle."""
    order = dict.fromkeys(group for group in groups if group not in blocks)
    while more := [g for g in blocks if g not in order and all(name in order for name in blocks[g])]:
        order.update(dict.fromkeys(more))
    return list(order)


def families(groups: Mapping[str, int], blocks: Blocks) -> tuple[tuple[str, ...], ...]:
    """The groups, nested ones with those that they are nested in; in a family the outermost first."""
    head = {group: group for group in groups}
    for group in outermost_first(groups, blocks):
        for name in blocks.get(group, ()):
            old, new = head[group], head[name]
            head = {g: new if h == old else h for g, h in head.items()}
    members: dict[str, list[str]] = {}
    for group in outermost_first(groups, blocks):
        members.setdefault(head[group], []).append(group)
    return tuple(map(tuple, members.values()))


def random_inside(size: int, around: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """int64 [size]: a uniformly random permutation of a group, given those of the groups that it is nested in."""
    if len(around) == 2:
        return alike(around[0], around[1], size)
    outer = around[0] if around else torch.zeros(1, dtype=torch.int64)
    inside = size // max(len(outer), 1)
    inner = [torch.randperm(inside, generator=generator) for _ in outer]
    return torch.cat([b * inside + order for b, order in zip(outer.tolist(), inner, strict=True)])


def alike(outer: Tensor, inner: Tensor, size: int) -> Tensor:
    """int64 [size]: the permutation of a group whose blocks move as ``outer`` and the units in each as ``inner``."""
    inside = size // len(outer)
    per_block = inner.view(-1, inside) % inside  # of each block of the third group
    per_block = per_block.repeat_interleave(len(outer) // len(per_block), 0)
    return (outer[:, None] * inside + per_block).flatten()


def check_inside(group: str, index: Tensor, around: Sequence[Tensor]) -> None:
    """Raises ValueError, naming the group, where its permutation does not keep to its blocks."""
    outer = around[0]
    inside = len(index) // len(outer)
    if not torch.equal(index.view(-1, inside) // inside, outer[:, None].expand(-1, inside)):
        raise ValueError(f"group {group!r}: its permutation does not keep blocks of {inside} units together")
    if len(around) == 2 and not torch.equal(index, alike(around[0], around[1], len(index))):
        raise ValueError(f"group {group!r}: the units in its blocks do not move alike")
