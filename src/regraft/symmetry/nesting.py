"""Which units move inside which: blocks (heads, groups of channels), and the groups that they make.

A unit may be *within* a block, a unit too, and go where its block goes; and it may have a *twin*: units of one twin
stand in different blocks and move alike. Both are forests or grids only after some joining, which is always correct:
what moves together has less freedom. Equal colours (:func:`_refine`) then mean that units may trade places, blocks
with all that is in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from regraft.symmetry.labels import Flow
from regraft.symmetry.units import unexpand

COLOURING_ROUNDS = 6
"""Of colouring: a colour hears of blocks in blocks so deep."""


@dataclass(frozen=True)
class Nesting:
    """For every label that is a root: its colour, uint64, its block and its twin (roots; 0: none that moves)."""

    colour: np.ndarray
    block: np.ndarray
    twin: np.ndarray


def nest(flow: Flow, signatures: Callable[[], np.ndarray]) -> Nesting:
    """Joins units until blocks and twins are such that a permutation of blocks is one of all that is in them.

    ``signatures()``: uint64 for every root, equal where units may trade places but for their blocks and twins.
    """
    while True:
        block, twin = _merge_relations(flow)
        twin[twin == block] = 0  # that says nothing new
        colour = _refine(signatures(), block, twin)
        size = _class_sizes(colour, flow)
        nesting = Nesting(colour, np.where(size[block] > 1, block, 0), np.where(size[twin] > 1, twin, 0))
        together = (
            _pairs_of_unordered(flow, nesting)
            or _pairs_with_twin(nesting, twin)
            or _pairs_of_ragged(nesting, size)
            or _pairs_of_lone(nesting, size)
        )
        if not together:
            return nesting
        a, b = torch.tensor(together, dtype=torch.int32).unbind(1)
        flow.join(a, b)


def _merge_relations(flow: Flow) -> tuple[np.ndarray, np.ndarray]:
    """The block and the twin of every root: one each, as several become one."""
    while True:
        relations, joined = [], False
        for pairs in flow.related.values():
            other = np.zeros(flow.units.count, dtype=np.int64)
            if pairs:
                mine, theirs = (flow.units.roots(torch.cat(side)).numpy() for side in zip(*pairs, strict=True))
                other_than_itself = mine != theirs
                mine, theirs = mine[other_than_itself], theirs[other_than_itself]
                other[mine] = theirs
                other[0] = 0
                differ = other[mine] != theirs
                joined |= bool(differ.any())
                flow.join(torch.from_numpy(other[mine][differ]).int(), torch.from_numpy(theirs[differ]).int())
            relations.append(other)
        if not joined:
            return relations[0], relations[1]


def _refine(signature: np.ndarray, block: np.ndarray, twin: np.ndarray) -> np.ndarray:
    """Signatures that know of those of the unit's block and twin, and of those of whose block or twin it is."""
    colour = signature.copy()
    relations = [(np.flatnonzero(other), other, 2 * n + 1) for n, other in enumerate((block, twin))]
    for _ in range(COLOURING_ROUNDS if block.any() or twin.any() else 0):
        new = mix(colour)
        for members, other, salt in relations:
            new[members] += mix(colour[other[members]] + np.uint64(salt))
            np.add.at(new, other[members], mix(colour[members] + np.uint64(salt + 1)))
        colour = new
    return colour


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, on uint64."""
    x = np.atleast_1d(x)  # numpy warns where a single number wraps around
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def _class_sizes(colour: np.ndarray, flow: Flow) -> np.ndarray:
    """How many roots have the colour of each."""
    own = np.arange(flow.units.count)
    roots = flow.units.roots(torch.from_numpy(own).int()).numpy() == own
    _, which, counts = np.unique(colour[roots], return_inverse=True, return_counts=True)
    sizes = np.zeros(len(own), dtype=np.int64)
    sizes[roots] = counts[which]
    return sizes


# ---- what does not nest, and who is joined with whom for it

Pairs = list[tuple[int, int]]


def _pairs_of_unordered(flow: Flow, nesting: Nesting) -> Pairs:
    """Blocks and twins of something that no parameter gives an order, and blocks that are in themselves: they are
    fixed."""
    ordered = np.zeros(flow.units.count, dtype=bool)
    for _, labels in flow.made:
        ordered[flow.units.roots(labels).flatten().numpy()] = True
    ordered[np.unique(nesting.block)] = True  # as what is in them is, or else they are found below
    ordered[(nesting.block > 0) & (nesting.twin > 0)] = True
    alone = np.flatnonzero((nesting.block > 0) & ~ordered)
    stuck = {*nesting.block[alone].tolist(), *(t for t in np.unique(nesting.twin).tolist() if not ordered[t])}
    around = nesting.block
    for _ in range(COLOURING_ROUNDS):
        around = nesting.block[around]
    stuck |= set(around.tolist())
    return [(0, unit) for unit in stuck - {0}]


def _pairs_with_twin(nesting: Nesting, twin: np.ndarray) -> Pairs:
    """Units whose block stays move as their twin does."""
    units = np.flatnonzero((twin > 0) & (nesting.block == 0))
    return list(zip(units.tolist(), twin[units].tolist(), strict=True))


def _pairs_of_ragged(nesting: Nesting, size: np.ndarray) -> Pairs:
    """Blocks of units that do not make a grid, every block of one with every twin: they are fixed."""
    both = np.flatnonzero((nesting.block > 0) & (nesting.twin > 0))
    stuck: set[int] = set()
    for units in _classes(nesting.colour, both):
        block, twin = nesting.block[units], nesting.twin[units]
        around = nesting.block[block]
        grid = size[block[0]] * size[twin[0]] // len(np.unique(around))
        if (
            np.any(around != nesting.block[twin])
            or len(units) != grid
            or len(np.unique(np.stack([block, twin]), axis=1).T) != grid
        ):
            stuck |= set(block.tolist())
    return [(0, unit) for unit in stuck]


def _pairs_of_lone(nesting: Nesting, size: np.ndarray) -> Pairs:
    """The only one of its kind in its block, or of its twin, is one with it."""
    pairs: Pairs = []
    for other in (nesting.block, nesting.twin):
        units = np.flatnonzero(other)
        units = units[size[units] == size[other[units]]]
        pairs += zip(units.tolist(), other[units].tolist(), strict=True)
    return pairs


def _classes(colour: np.ndarray, units: np.ndarray) -> list[np.ndarray]:
    order = units[np.argsort(colour[units], kind="stable")]
    edges = np.flatnonzero(np.diff(colour[order])) + 1
    return np.split(order, edges) if len(order) else []


# ---- groups


def arrange(flow: Flow, nesting: Nesting) -> tuple[dict[str, list[int]], dict[str, tuple[str, ...]]]:
    """name -> roots of the units that may trade places, and the groups that these are nested in: of their blocks, and
    of their twins where they have any.

    Named after the parameter that first makes them, in its order; where a parameter makes several groups, they are
    numbered. Units of a nested group stand block by block.
    """
    stems: dict[int, str] = {}
    members: dict[int, list[int]] = {}
    added = np.zeros(flow.units.count, dtype=bool)
    added[0] = True

    def add(root: int, stem: str) -> None:
        if added[root]:
            return
        added[root] = True
        add(int(nesting.block[root]), f"{stem}/blocks")
        stems.setdefault(int(nesting.colour[root]), stem)
        members.setdefault(int(nesting.colour[root]), []).append(root)

    for leaf, labels in flow.made:
        stem = leaf.name.removesuffix(".weight").removesuffix(".bias")
        roots = flow.units.roots(unexpand(labels)).flatten().numpy()
        for root in roots[~added[roots]].tolist():
            add(root, stem)
    for root in np.flatnonzero((nesting.block > 0) & (nesting.twin > 0)).tolist():  # in their blocks' and twins' order
        add(root, stems[int(nesting.colour[nesting.twin[root]])])
    movable = {colour: units for colour, units in members.items() if len(units) > 1}
    names = _number_names({colour: stems[colour] for colour in movable})
    place: dict[int, int] = {}
    groups: dict[str, list[int]] = {}
    blocks: dict[str, tuple[str, ...]] = {}
    waiting = dict(movable)
    while waiting:
        for colour, units in list(waiting.items()):
            around = [int(other[units[0]]) for other in (nesting.block, nesting.twin) if other[units[0]]]
            if any(other not in place for other in around):
                continue
            if around:
                units.sort(key=lambda u: [place[int(o[u])] for o in (nesting.block, nesting.twin) if o[u]])
                blocks[names[colour]] = tuple(names[int(nesting.colour[other])] for other in around)
            place.update({unit: i for i, unit in enumerate(units)})
            del waiting[colour]
    groups = {names[colour]: units for colour, units in movable.items()}
    return groups, {name: blocks[name] for name in groups if name in blocks}


def _number_names(stems: dict[int, str]) -> dict[int, str]:
    made, seen = Counter(stems.values()), Counter[str]()
    names = {}
    for colour, stem in stems.items():
        names[colour] = stem if made[stem] == 1 else f"{stem}/{seen[stem]}"
        seen[stem] += 1
    return names
