"""Assumption (P): two runs learn the same up to one permutation; and theorem A.1, which says so of their first step.

The distance of v and w is |v - w|^2 / (2 |v| |w|): one minus their cosine where they are of equal length. 1 is what
unrelated vectors of equal length have.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch

from regraft.core.clock import Clock
from regraft.core.tensors import Tensors, norm
from regraft.matching.descent import match
from regraft.symmetry import apply
from regraft.training.gradients import gradients
from regraft_bench.study import Measured, Method, Series
from regraft_bench.transfer.methods.transfers import delta_ratio
from regraft_bench.transfer.setting import TransferSetting


def distance(v: Tensors, w: Tensors) -> float:
    """|v - w|^2 / (2 |v| |w|), over all tensors together. Raises ZeroDivisionError where one of them is zero."""
    apart = norm(v[name] - w[name] for name in v)
    return apart**2 / (2 * norm(v.values()) * norm(w.values()))


# ---------------------------------------------------------------- assumption (P)


def measure_updates(which: str, setting: TransferSetting) -> Measured:
    """The distance of pi(theta_1^t - theta_1^(t-1)) and theta_2^t - theta_2^(t-1) between looks, 1, 2, 4, ... updates.

    which: "identity", "one" (pi of eq. 4, from the whole run) or "each" (every step has its own).
    """
    spec, clock = setting.spec, Clock()
    at, *runs = setting.two_runs
    targets, sources = (_stack_changes(setting, run) for run in runs)
    steps = [tuple({n: x[t] for n, x in side.items()} for side in (targets, sources)) for t in range(len(at) - 1)]
    with clock.phase("assignment", setting.device):
        if which == "each":
            perms = [match(spec, target, source).perm for target, source in steps]
        else:
            perm = spec.identity() if which == "identity" else match(spec, targets, sources).perm
            perms = [perm] * len(steps)
    distances = [
        distance(apply(spec, perm, source), target) for (target, source), perm in zip(steps, perms, strict=True)
    ]
    values = {
        "distance": sum(distances) / len(distances),
        "first": distances[0],
        "last": distances[-1],
        "delta_ratio": delta_ratio(setting, runs[1][0], runs[1][-1]),
    }
    return Measured(values, {"distance": Series.over("updates", at[1:], distances)}, clock.seconds)


def _stack_changes(setting: TransferSetting, run: list[Tensors]) -> Tensors:
    """[steps, ...] of each parameter: what it learned from one look to the next."""
    return {name: torch.stack([b[name] - a[name] for a, b in pairwise(run)]) for name in setting.parameters(run[0])}


# ---------------------------------------------------------------- theorem A.1


def measure_first_gradients(which: str, setting: TransferSetting) -> Measured:
    """The distance of the expected gradients (over all training images) at the two starts, under pi.

    which: "identity", "weights" (pi of the starts' weights) or "gradients" (the best pi that matching finds).
    """
    spec, clock = setting.spec, Clock()
    starts = setting.target_start, setting.source_start
    target, source = (gradients(setting.model, theta, setting.data.train.batches(500)) for theta in starts)
    with clock.phase("assignment", setting.device):
        perm = spec.identity()
        if which == "weights":
            perm = match(spec, *map(setting.parameters, starts)).perm
        elif which == "gradients":
            perm = match(spec, target, source).perm
    return Measured({"distance": distance(apply(spec, perm, source), target)}, cost=clock.seconds)


_ABOUT = {
    "identity": "How far apart both runs go, unit by unit as they are.",
    "one": "How far apart they go under one permutation for all looks, that which matches them best.",
    "each": "How far apart they go under a permutation of its own for every look.",
    "weights": "How far apart they go under the permutation that matches the starts' weights.",
    "gradients": "How far apart they go under the permutation that matches the gradients themselves.",
}
UPDATES = tuple(
    Method(which, partial(measure_updates, which), about=_ABOUT[which]) for which in ("identity", "one", "each")
)
FIRST_GRADIENTS = tuple(
    Method(which, partial(measure_first_gradients, which), about=_ABOUT[which])
    for which in ("identity", "weights", "gradients")
)
