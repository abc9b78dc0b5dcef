"""Assumption (P): two runs learn the same up to one permutation; and theorem A.1, which says so of their first step.

The distance of v and w is |v - w|^2 / (2 |v| |w|): one minus their cosine where they are of equal length. 1 is what
unrelated vectors of equal length have.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch

from regraft.core.clock import Clock
from regraft.core.tensors import Perm, Tensors
from regraft.matching.descent import match
from regraft.symmetry import apply
from regraft.training import evaluation
from regraft_bench.study import Measured, Method, Series
from regraft_bench.transfer.methods import delta_ratio, norm
from regraft_bench.transfer.setting import TransferSetting


def distance(v: Tensors, w: Tensors) -> float:
    """|v - w|^2 / (2 |v| |w|), over all tensors together. Raises ZeroDivisionError where one of them is zero."""
    apart = norm(v[name] - w[name] for name in v)
    return apart**2 / (2 * norm(v.values()) * norm(w.values()))


class Runs:
    """Both trainings on the same batches, and what each learned from one look to the next."""

    def __init__(self, setting: TransferSetting) -> None:
        data, recipe = setting.data, setting.settings.recipe
        end = recipe.epochs * -(-len(data.train) // recipe.batch_size)
        self.at = [0, *(2**k for k in range(20) if 2**k < end), end]
        starts = setting.source_start, setting.target_start
        runs = [setting.recorded("both", start, data, recipe, self.at) for start in starts]
        names = [name for name, _ in setting.model.named_parameters()]
        self.source, self.target = (
            {name: torch.stack([b[name] - a[name] for a, b in pairwise(run)]) for name in names}
            for run in runs
        )
        self.ratio = delta_ratio(setting.model, runs[0][0], runs[0][-1])

    def step(self, t: int) -> tuple[Tensors, Tensors]:
        """What (target, source) learned between looks t and t + 1."""
        return tuple({n: x[t] for n, x in side.items()} for side in (self.target, self.source))


def _runs(setting: TransferSetting) -> Runs:
    """Made once for all methods of the setting."""
    if not hasattr(setting, "runs"):
        setting.runs = Runs(setting)
    return setting.runs


def updates(which: str, setting: TransferSetting) -> Measured:
    """The distance of pi(theta_1^t - theta_1^(t-1)) and theta_2^t - theta_2^(t-1) between looks, 1, 2, 4, ... updates.

    which: "identity", "one" (pi of eq. 4, from the whole run) or "each" (every step has its own).
    """
    spec, runs, clock = setting.traced[0], _runs(setting), Clock()
    steps = range(len(runs.at) - 1)
    with clock.phase("assignment", setting.device):
        if which == "identity":
            perms = [spec.identity()] * len(steps)
        elif which == "one":
            perms = [match(spec, runs.target, runs.source).perm] * len(steps)
        else:
            perms = [match(spec, *runs.step(t)).perm for t in steps]
    found = []
    for t, perm in zip(steps, perms, strict=True):
        target, source = runs.step(t)
        found.append(distance(apply(spec, perm, source), target))
    series = {"distance": Series.over("updates", runs.at[1:], found)}
    values = {"distance": sum(found) / len(found), "first": found[0], "last": found[-1]}
    return Measured({**values, "delta_ratio": runs.ratio}, series, clock.seconds)


UNDER = {
    "identity": "How far apart both runs go, unit by unit as they are.",
    "one": "How far apart they go under one permutation for all looks, that which matches them best.",
    "each": "How far apart they go under a permutation of its own for every look.",
    "weights": "How far apart they go under the permutation that matches the starts' weights.",
    "gradients": "How far apart they go under the permutation that matches the gradients themselves.",
}
UPDATES = tuple(
    Method(which, partial(updates, which), about=UNDER[which]) for which in ("identity", "one", "each")
)

# ---------------------------------------------------------------- theorem A.1


def first_gradients(which: str, setting: TransferSetting) -> Measured:
    """The distance of the expected gradients (over all training images) at the two starts, under pi.

    which: "identity", "weights" (pi of the starts' weights) or "gradients" (the best pi that matching finds).
    """
    spec, clock = setting.traced[0], Clock()
    starts = setting.target_start, setting.source_start
    names = [name for name, _ in setting.model.named_parameters()]
    target, source = (
        evaluation.gradients(setting.model, theta, setting.data.train.batches(500)) for theta in starts
    )
    with clock.phase("assignment", setting.device):
        perm: Perm = spec.identity()
        if which == "weights":
            perm = match(spec, *({name: theta[name] for name in names} for theta in starts)).perm
        elif which == "gradients":
            perm = match(spec, target, source).perm
    return Measured({"distance": distance(apply(spec, perm, source), target)}, cost=clock.seconds)


FIRST_GRADIENTS = tuple(
    Method(which, partial(first_gradients, which), about=UNDER[which])
    for which in ("identity", "weights", "gradients")
)
