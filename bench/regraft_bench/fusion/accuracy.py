"""Accuracies of weighted sums of networks on a batch of images: what every method of this study measures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regraft.core.clock import EVALUATION, Clock, Cost
from regraft.core.files import write_text
from regraft.core.tensors import Pair, Tensors, digest_tensors, tensor_digest
from regraft.fusion.grids import evaluate
from regraft.fusion.repair import Finish
from regraft.training.evaluation import ensemble_accuracy
from regraft_bench.fusion.setting import FusionSetting
from regraft_bench.rows import digest
from regraft_bench.study import Series

A, B = "accuracy_a", "accuracy_b"


@dataclass(frozen=True, eq=False)
class Sums:
    """K weighted sums of m networks.

    rows: K lines of m coefficients. model: how BatchNorm computes; None: every batch with its own statistics.
    finish: what mends the activations of each sum.
    """

    sources: Sequence[Tensors]
    rows: Sequence[Sequence[float]]
    model: nn.Module | None = None
    finish: Finish | None = None


def measure_sums(setting: FusionSetting, sums: Sums, images: Pair, clock: Clock, phase: str = EVALUATION) -> Tensor:
    """Accuracy, float64 [K], of every sum.

    Tables share grids: without `finish` the result is kept in the cache, with what it cost.
    """
    model = sums.model or setting.own_statistics_model

    def measure() -> tuple[Tensor, Cost]:
        own = Clock()
        with own.phase(phase, setting.device):
            batch = setting.settings.batch
            grid = evaluate(model, sums.sources, sums.rows, *images, batch_size=batch, finish=sums.finish)
        return grid.accuracy, own.seconds[phase]

    if sums.finish is not None:
        accuracy, cost = measure()
    else:
        accuracy, cost = _read_or_measure(setting, _grid_name(model, sums, images), measure)
    clock.add({phase: cost})
    return accuracy


def _read_or_measure(
    setting: FusionSetting, name: str, measure: Callable[[], tuple[Tensor, Cost]]
) -> tuple[Tensor, Cost]:
    path = setting.cache_file("grid", [name, setting.settings.batch], ".json")
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        return torch.tensor(kept["accuracy"], dtype=torch.float64), Cost(**kept["cost"])
    accuracy, cost = measure()
    write_text(path, json.dumps({"accuracy": accuracy.tolist(), "cost": asdict(cost)}))
    return accuracy, cost


def _grid_name(model: nn.Module, sums: Sums, images: Pair) -> str:
    """A name for a grid: all that its accuracies depend on but the code."""
    sources = [digest_tensors(source) for source in sums.sources]
    shown = [tensor_digest(tensor) for tensor in images]
    return digest([repr(model), sources, sums.rows, shown])


def measure_ensemble(setting: FusionSetting, members: Sequence[Tensors], images: Pair, clock: Clock) -> float:
    """Accuracy of the mean of the networks' logits."""
    with clock.phase(EVALUATION, setting.device):
        parts = zip(*(t.split(setting.settings.batch) for t in images), strict=True)
        return ensemble_accuracy(setting.own_statistics_model, members, parts)


def both_tasks(a: float, b: float) -> dict[str, float]:
    """Values of a row: accuracies on tasks A and B, and their harmonic mean."""
    return {"accuracy": 2 * a * b / (a + b) if a + b else 0.0, A: a, B: b}


def grid_series(axes: Mapping[str, Sequence[Any]], values: Tensor) -> Series:
    """Numbers in any shape as a series over the axes: their positions by name, the first one outermost."""
    shaped = values.reshape([len(positions) for positions in axes.values()]).tolist()
    return Series(tuple(axes), tuple(map(tuple, axes.values())), _nested_tuple(shaped))


def _nested_tuple(values: Any) -> Any:
    return tuple(map(_nested_tuple, values)) if isinstance(values, list) else values
