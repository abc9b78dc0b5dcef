"""Matching of groups that are nested in one another."""

from __future__ import annotations

import itertools

import pytest
import torch
from nets import attention, grouped, proved
from torch import Tensor

import regraft
from regraft.core.tensors import state
from regraft.matching.nested import BlockAssignment
from regraft.reference import matching as reference

MODELS = {"groups": lambda: grouped(3), "heads": lambda: attention(6, 3)}
NESTED = {"groups": proved(grouped(3), 1, 2, 5, 5), "heads": proved(attention(6, 3), 2, 5, 3)}


def planted(
    name: str, seed: int, noise: float = 0.0
) -> tuple[regraft.PermutationSpec, regraft.core.tensors.Perm, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(seed)
    spec, source = NESTED[name], state(MODELS[name]())
    perm = spec.random(torch.Generator().manual_seed(seed))
    target = regraft.apply(spec, perm, source)
    target = {n: t + noise * torch.randn(t.shape) if t.is_floating_point() else t for n, t in target.items()}
    return spec, perm, target, source


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(4))
def test_a_planted_permutation_of_blocks_is_found(name, seed):
    spec, perm, target, source = planted(name, seed, 1e-3)
    found = regraft.match(spec, target, source)
    spec.check(found.perm)
    assert all(torch.equal(found.perm[group], perm[group]) for group in perm)


@pytest.mark.parametrize("name", MODELS)
def test_the_literal_descent_finds_the_same(name):
    spec, _, target, source = planted(name, 0, 0.3)
    order = [groups[0] for groups in spec.families if len(groups) == 1 and spec.tensors_of(groups[0])]
    stacked = ([{n: t for n, t in side.items() if t.is_floating_point()}] for side in (target, source))
    perm, objectives = reference.coordinate_descent(spec, *stacked, order)
    spec.check(perm)
    assert regraft.match(spec, target, source).objective == pytest.approx(objectives[-1], rel=1e-5)


def test_blocks_are_assigned_as_well_as_trying_all_of_them():
    spec = regraft.PermutationSpec.build({"blocks": 3, "units": 9}, {}, blocks={"units": ["blocks"]})
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        scores = {group: torch.randn(n, n, generator=generator) for group, n in spec.groups.items()}

        def worth(perm, scores=scores):
            return sum(float(s[torch.arange(len(s)), perm[group]].sum()) for group, s in scores.items())

        best, current = BlockAssignment(spec, ("blocks", "units"), scores).candidates(spec.identity())
        every = [
            worth(
                {
                    "blocks": torch.tensor(outer),
                    "units": torch.cat([3 * o + torch.tensor(i) for o, i in zip(outer, inner, strict=True)]),
                }
            )
            for outer in itertools.permutations(range(3))
            for inner in itertools.product(itertools.permutations(range(3)), repeat=3)
        ]
        assert worth(best) == pytest.approx(max(every))
        assert worth(current) <= worth(best) and torch.equal(current["blocks"], torch.arange(3))
