"""Ways of our own to find the permutation, on trial: what is not ahead of FGMT in most scenarios stays here."""

from __future__ import annotations

from functools import partial

import torch

from regraft.learning_transfer.driver import Problem, Steps, Work
from regraft.matching.descent import Descent
from regraft.matching.stacks import Stacks
from regraft_bench.study import Method
from regraft_bench.transfer.methods import moved

PAIRS = 4
"""Pairs of gradients a step, each on a sample of its own."""


def nfgmt(problem: Problem, work: Work) -> Steps:
    """FGMT with `PAIRS` pairs of gradients a step, each gradient divided by its norm: no step decides alone."""
    like = problem.parameters(problem.target_start)
    stacks = Stacks.allocate(problem.spec, like, PAIRS * problem.path.steps)
    descent = Descent.over(stacks, generator=problem.generator, backend=problem.backend)
    perm = problem.spec.identity()
    for s in range(1, problem.path.steps + 1):
        for _ in range(PAIRS):
            work.append_(descent, perm, s - 1)
            normalise_(stacks)
        perm = work.descend_(descent)
        yield s, perm


def normalise_(stacks: Stacks) -> None:
    """Divide the newest pair, each side by the norm of all its tensors together; 0 stays 0."""
    for side in (stacks.target, stacks.source):
        newest = [stack[stacks.steps - 1] for stack in side.values()]
        norm = torch.stack(torch._foreach_norm(newest)).norm()
        torch._foreach_div_(newest, norm.clamp_min(torch.finfo(norm.dtype).tiny))


LEADS = (
    Method(
        "nfgmt",
        partial(moved, nfgmt),
        about="FGMT with four pairs of gradients a step, each divided by its norm.",
    ),
)
