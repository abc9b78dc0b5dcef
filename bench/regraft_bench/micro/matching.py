"""Matching and FGMT against straightforward and literal implementations: objectives and times."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from regraft.core.clock import Clock, Cost, total_charge
from regraft.core.tensors import Perm, Tensors
from regraft.learning_transfer.driver import transfer
from regraft.learning_transfer.trajectory import Trajectory
from regraft.matching.descent import match
from regraft.networks.papers import initialise, mlp
from regraft.reference import learning_transfer as literal_transfer
from regraft.reference import matching as literal
from regraft.symmetry import PermutationSpec, trace
from regraft_bench.baselines import match_like_git_rebasin
from regraft_bench.contests import Contest, MicroSetting
from regraft_bench.study import Task
from regraft_bench.timing import BY_HAND, OURS, Contender


def _make(factory: Callable[[], nn.Module], shape: tuple[int, ...], setting: MicroSetting) -> dict[str, Contender]:
    """Two independent initialisations' parameters. By hand draws other orders in every call; its objective is the best
    of them all."""
    model = factory()
    spec = trace(model, (torch.zeros(shape),))
    names = [name for name, _ in model.named_parameters()]
    starts = [initialise(model, setting.generator("start", number)) for number in range(2)]
    target, source = ({name: start[name] for name in names} for start in starts)

    def objective(perm: Perm) -> dict[str, float]:
        return {"objective": literal.objective(spec, [target], [source], perm)}

    orders = setting.generator("orders")
    found: list[Perm] = []

    def by_hand() -> Perm:
        found.append(match_like_git_rebasin(spec, target, source, orders))
        return found[-1]

    def best(_: Perm) -> dict[str, float]:
        """Of all the orders that were drawn while it was timed."""
        return max((objective(perm) for perm in found), key=lambda values: values["objective"])

    return {
        BY_HAND: Contender(by_hand, best),
        OURS: Contender(lambda: match(spec, target, source).perm, objective),
    }


def _resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18()


def _mlp(width: int) -> nn.Module:
    return mlp((784, width, width, width, 10))


def mlp_contest(width: int) -> Contest:
    """An MLP of three hidden layers of this width."""
    make = partial(_make, partial(_mlp, width), (2, 1, 28, 28))
    return Contest(f"MLP 784-{width}-{width}-{width}-10", (BY_HAND, OURS), make)


RESNET18 = Contest("resnet18", (BY_HAND, OURS), partial(_make, _resnet18, (2, 3, 64, 64)))


# ---------------------------------------------------------------- within a transfer


def _make_fgmt(setting: MicroSetting) -> dict[str, Contender]:
    """784-512-10 on MNIST, T = 10, one batch of 128 a gradient: everything but the gradients is charged."""
    images = setting.dataset(Task("mnist")).train
    model = mlp((784, 512, 10))
    spec = trace(model, (torch.zeros(2, 1, 28, 28),))
    start, target = (initialise(model, setting.generator("start", number)) for number in range(2))
    batches = images.batches(128, generator=setting.generator("batches"))
    end = dict(start)
    for _, batch in zip(range(300), batches, strict=False):
        g = literal_transfer.mean_gradient(model, end, [batch])
        end = {name: tensor - 0.1 * g[name] for name, tensor in end.items()}
    path = Trajectory.linear(start, end, 10)
    sample = [batch for _, batch in zip(range(path.steps), batches, strict=False)]

    def ours() -> Any:
        return transfer(model, path, target, sample, "fgmt", spec=spec)

    def without_gradients(found: Any) -> Cost:
        return total_charge({phase: cost for phase, cost in found.seconds.items() if phase != "gradients"})

    return {
        BY_HAND: Contender(
            lambda: _literal_fgmt(model, spec, path, target, sample),
            lambda found: {"objective": found[1]},
            lambda found: found[0],
        ),
        OURS: Contender(ours, lambda found: {"objective": found.objectives[-1]}, without_gradients),
    }


def _literal_fgmt(
    model: nn.Module, spec: PermutationSpec, path: Trajectory, target: Tensors, sample: list
) -> tuple[Cost, float]:
    """Algorithm 2 line by line: its cost without the gradients, and the last objective."""
    clock, order = Clock(), list(spec.groups)
    sources: list[Tensors] = []
    targets: list[Tensors] = []
    perm, theta, found = spec.identity(), [target], [0.0]
    for s in range(1, path.steps + 1):
        sources.append(literal_transfer.mean_gradient(model, path[s - 1], [sample[s - 1]]))
        targets.append(literal_transfer.mean_gradient(model, theta[s - 1], [sample[s - 1]]))
        with clock.phase("matching"):
            perm, found = literal.coordinate_descent(spec, targets, sources, order, start=perm)
            theta = literal_transfer.rebuild(spec, list(path), target, perm, s)
    return clock.cost, found[-1]


FGMT = Contest("FGMT on MNIST, 784-512-10", (BY_HAND, OURS), _make_fgmt)
"""By hand is the paper's algorithm line by line."""
