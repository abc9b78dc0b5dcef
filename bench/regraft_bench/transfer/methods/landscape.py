"""Lines and planes of loss between the source, the transferred networks and the really trained target.

A method is one line or plane. Networks with BatchNorm have their statistics estimated anew at every place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice

from regraft.core.clock import Clock
from regraft.core.tensors import Batch, Tensors
from regraft.matching.descent import match
from regraft.symmetry import apply
from regraft.training.landscape import interpolate, plane
from regraft.training.statistics import batch_norms
from regraft_bench.study import Measured, Method, Series, first_paragraph
from regraft_bench.transfer.methods.transfers import run_transfer
from regraft_bench.transfer.setting import TransferSetting

Ends = tuple[Tensors, Tensors]
LINE_POINTS, PLANE_POINTS = 11, 9


def measure_line(find_ends: Callable[[TransferSetting], Ends], setting: TransferSetting) -> Measured:
    """Loss and accuracy on the test split from the first end to the second, and how high the loss rises between."""
    first, second = find_ends(setting)
    clock, batches = Clock(), _statistics(setting)
    with clock.phase("evaluation", setting.device):
        line = interpolate(setting.model, first, second, setting.tests(), LINE_POINTS, statistics=batches)
    at, accuracies = line.points.tolist(), line.accuracy.tolist()
    return Measured(
        values={
            "barrier": line.barrier,
            "accuracy of the first": accuracies[0],
            "accuracy of the second": accuracies[-1],
            "lowest accuracy": min(accuracies),
        },
        series={
            "loss": Series.over("share of the second", at, line.loss.tolist()),
            "accuracy": Series.over("share of the second", at, accuracies),
        },
        cost=clock.seconds,
    )


def measure_plane(setting: TransferSetting) -> Measured:
    """The plane through the trained target, the oracle's and FGMT's network (first version, figure 6c)."""
    target = setting.plain.tensors
    oracle, fgmt = (run_transfer(setting, name, evaluate=False).params for name in ("oracle", "fgmt"))
    clock, batches = Clock(), _statistics(setting)
    with clock.phase("evaluation", setting.device):
        grid = plane(setting.model, target, oracle, fgmt, setting.tests(), PLANE_POINTS, statistics=batches)
    at = tuple(tuple(round(v, 2) for v in axis.tolist()) for axis in (grid.y, grid.x))
    places = {
        f"{name} {axis}": float(grid.corners[row, column])
        for row, name in enumerate(("target", "oracle", "fgmt"))
        for column, axis in enumerate("xy")
    }
    series = {
        name: Series(("y", "x"), at, tuple(map(tuple, values.tolist())))
        for name, values in (("loss", grid.loss), ("accuracy", grid.accuracy))
    }
    return Measured(places, series, clock.seconds)


def _statistics(setting: TransferSetting) -> list[Batch] | None:
    """Batches for BatchNorm, where there is any."""
    count = setting.settings.bn_batches or 20
    return list(islice(setting.stream(), count)) if batch_norms(setting.model) else None


# ---------------------------------------------------------------- ends of lines


def source_and_transferred(method: str, setting: TransferSetting) -> Ends:
    """pi theta_1^T, and theta_2 transferred by the same pi (first version, figure 6a)."""
    last = run_transfer(setting, method, evaluate=False)
    return apply(setting.spec, last.perm, setting.source.tensors), last.params


def target_and_transferred(method: str, setting: TransferSetting) -> Ends:
    """The trained target, and the transferred one (figure 6b)."""
    return setting.plain.tensors, run_transfer(setting, method, evaluate=False).params


def target_and_trained_on(method: str, setting: TransferSetting) -> Ends:
    """The trained target, and the transferred one trained on (second version, figure 7)."""
    best, recipe = run_transfer(setting, method).params, setting.settings.subsequent
    assert recipe is not None
    return setting.plain.tensors, setting.learn(f"after {method}", best, recipe, "subsequent").tensors


def target_and_permuted_source(setting: TransferSetting) -> Ends:
    """The trained target, and the source permuted by weight matching of the two (Git Re-Basin; figure 7)."""
    target, source = setting.plain.tensors, setting.source.tensors
    perm = match(setting.spec, setting.parameters(target), setting.parameters(source)).perm
    return target, apply(setting.spec, perm, source)


def target_and_source(setting: TransferSetting) -> Ends:
    """The trained target and the source, nothing permuted."""
    return setting.plain.tensors, setting.source.tensors


def target_and_another_order(setting: TransferSetting) -> Ends:
    """Two trainings of one start that differ in the order of the images: what one basin looks like."""
    other = setting.learn("another target", setting.target_start, setting.settings.recipe)
    return setting.plain.tensors, other.tensors


def _line(name: str, find_ends: Callable[[TransferSetting], Ends], about: str = "") -> Method:
    return Method(name, partial(measure_line, find_ends), about=about or first_paragraph(find_ends))


LINES = (
    *(
        _line(
            f"source to {name}",
            partial(source_and_transferred, name),
            f"The line from the source, permuted alike, to the network that {name} makes of it.",
        )
        for name in ("naive", "oracle", "fgmt")
    ),
    *(
        _line(
            f"target to {name}",
            partial(target_and_transferred, name),
            f"The line from the trained target to the network that {name} gives its start.",
        )
        for name in ("naive", "oracle", "fgmt", "gmt")
    ),
    _line("target to fgmt, trained on", partial(target_and_trained_on, "fgmt")),
    _line("target to source, permuted", target_and_permuted_source),
    _line("target to source", target_and_source),
    _line("target to another order", target_and_another_order),
)
PLANE = Method("plane", measure_plane)
