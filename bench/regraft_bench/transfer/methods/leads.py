"""Ways of our own to find the permutation, on trial: what is not ahead of FGMT in most scenarios stays here."""

from __future__ import annotations

from functools import partial

import torch

from regraft.learning_transfer.methods import Steps
from regraft.learning_transfer.work import Problem, Work
from regraft.matching.stacks import Stacks
from regraft_bench.study import Method
from regraft_bench.transfer.methods.transfers import move_source

PAIRS = 4
"""Pairs of gradients a step, each on a sample of its own."""


def nfgmt(problem: Problem, work: Work) -> Steps:
    """FGMT with `PAIRS` pairs of gradients a step, each gradient divided by its norm: no step decides alone."""
    descents = work.descents(PAIRS * problem.path.steps)
    perms = [problem.identity()] * len(descents)
    for s in range(1, problem.path.steps + 1):
        for _ in range(PAIRS):
            work.append_(descents, perms, s - 1)
            for descent in descents:
                normalise_(descent.stacks)
        perms = work.descend_(descents)
        yield s, perms


def normalise_(stacks: Stacks) -> None:
    """Divide the newest pair, each side by the norm of all its tensors together; 0 stays 0."""
    for side in (stacks.target, stacks.source):
        newest = [stack[stacks.steps - 1] for stack in side.values()]
        length = torch.stack(torch._foreach_norm(newest)).norm()
        torch._foreach_div_(newest, length.clamp_min(torch.finfo(length.dtype).tiny))


LEADS = (
    Method(
        "nfgmt",
        partial(move_source, nfgmt),
        about="FGMT with four pairs of gradients a step, each divided by its norm.",
    ),
)
