"""Grids against a loop over their points, and what the recorder adds to a training step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from regraft.core.tensors import Tensors, state
from regraft.finetuning.recorder import Recorder
from regraft.fusion.grids import Grid, evaluate, lattice
from regraft.fusion.sums import fuse_many
from regraft.networks.papers import initialise, residual8, small_cnn
from regraft_bench.contests import Contest, MicroSetting
from regraft_bench.timing import BY_HAND, OURS, Contender, alternate

VALUES = (0.0, 0.01, 0.1, 0.5, 1.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0)
LOOP_BATCHES = (250, 1000, 2500)


def _loop(model: nn.Module, sources: list[Tensors], rows: Tensor, images: Tensor, labels: Tensor, size: int) -> int:
    """What one would write: the data in memory, one parameter set and one pass at a time. Right answers of all."""
    stack, right = fuse_many(sources, rows), 0
    with torch.inference_mode():
        for k in range(len(rows)):
            point = {name: tensor[k] for name, tensor in stack.items()}
            for x, y in zip(images.split(size), labels.split(size), strict=True):
                right += int((functional_call(model, point, (x,)).argmax(1) == y).sum())
    return right


def _make_grid(images: int, network: Callable[[], nn.Module], setting: MicroSetting) -> dict[str, Contender]:
    """121 sums of two networks; the loop has the batch size that is best for it of three."""
    model = network().to(setting.device).eval()
    g = setting.generator("grid")
    sources = [{n: t.to(setting.device) for n, t in initialise(model, g).items()} for _ in range(2)]
    x = torch.randn(images, 3, 32, 32, generator=g).to(setting.device)
    y = torch.randint(0, 10, (images,), generator=g).to(setting.device)
    rows = lattice(VALUES, VALUES, lambda beta, alpha: (alpha, beta))

    def loop(size: int, points: Tensor) -> Callable[[], int]:
        return lambda: _loop(model, sources, points, x, y, size)

    few = {str(size): Contender(loop(size, rows[:8])) for size in LOOP_BATCHES}
    tried = alternate(few, rounds=1, device=setting.device)
    size = min(LOOP_BATCHES, key=lambda size: tried[str(size)].seconds)

    return {
        # The size that won is not among the values: it depends on the moment, and a run is compared with the next.
        BY_HAND: Contender(loop(size, rows), lambda right: {"right answers": right}),
        OURS: Contender(lambda: evaluate(model, sources, rows, x, y), _count_right),
    }


def _count_right(found: Grid) -> dict[str, float]:
    return {"right answers": int(found.correct.sum())}


def residual() -> nn.Module:
    """The fusion study's network, at the width that it has there."""
    return residual8(width=0.25)


def grid(images: int, network: Callable[[], nn.Module] = small_cnn) -> Contest:
    """121 points on so many images."""
    return Contest("121 points", (BY_HAND, OURS), partial(_make_grid, images, network))


AFTER_STEP, COPY_OF_STATE = "after_step, nothing due", "a copy of the state"


def _make_recorder(setting: MicroSetting) -> dict[str, Contender]:
    model = small_cnn().to(setting.device)
    model.load_state_dict(initialise(model, setting.generator("start")))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(100, 3, 32, 32, generator=setting.generator("images")).to(setting.device)
    labels = torch.arange(10, device=setting.device).repeat(10)
    few = [(images[:10], labels[:10])]
    recorder = Recorder(model, validation=few, test=few, checkpoints=(1,), validate_at=lambda: iter((1,)))
    recorder.after_step()  # nothing is due from here on

    def step() -> None:
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()

    return {
        BY_HAND: Contender(step),
        AFTER_STEP: Contender(recorder.after_step),
        COPY_OF_STATE: Contender(lambda: state(model)),
    }


RECORDER = Contest("recorder", (BY_HAND, AFTER_STEP, COPY_OF_STATE), _make_recorder)
"""By hand is one training step; a validation that finds a better state adds a copy of it."""
