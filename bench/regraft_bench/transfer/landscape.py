"""Lines and planes of loss between the source, the transferred networks and the really trained target.

A method is one line or plane. Networks with BatchNorm have their statistics estimated anew at every place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice

from regraft.core.clock import Clock
from regraft.core.tensors import Tensors
from regraft.learning_transfer.driver import Transfer
from regraft.matching.descent import match
from regraft.symmetry import apply
from regraft.training.evaluation import batch_norms, interpolate, plane
from regraft_bench.study import Measured, Method, Series, first_paragraph
from regraft_bench.transfer.setting import TransferSetting

Ends = tuple[Tensors, Tensors]
POINTS = 11


def line(ends: Callable[[TransferSetting], Ends], setting: TransferSetting) -> Measured:
    """Loss and accuracy on the test split from the first end to the second, and how high the loss rises between."""
    a, b = ends(setting)
    clock = Clock()
    with clock.phase("evaluation", setting.device):
        found = interpolate(setting.model, a, b, setting.tests(), POINTS, statistics=_statistics(setting))
    accuracies = found.accuracy.tolist()
    at = found.points.tolist()
    return Measured(
        values={
            "barrier": found.barrier,
            "accuracy of the first": accuracies[0],
            "accuracy of the second": accuracies[-1],
            "lowest accuracy": min(accuracies),
        },
        series={
            "loss": Series.over("share of the second", at, found.loss.tolist()),
            "accuracy": Series.over("share of the second", at, accuracies),
        },
        cost=clock.seconds,
    )


def _statistics(setting: TransferSetting) -> list | None:
    """Batches for BatchNorm, where there is any."""
    wanted = setting.settings.bn_batches or 20
    return list(islice(setting.stream(), wanted)) if batch_norms(setting.model) else None


def _whole_path(setting: TransferSetting, method: str) -> Transfer:
    """theta_2^T and its permutation, whichever step is the best."""
    end = setting.plain.tensors if method == "oracle" else None
    return setting.transfer(method, target_end=end, evaluate=False)


def _tuned(setting: TransferSetting, method: str) -> Tensors:
    """Transferred up to the best step, and trained on as the scenario says."""
    best = setting.transfer(method).params
    return setting.learn(f"after {method}", best, setting.settings.subsequent, "subsequent").tensors


def source_and(method: str, setting: TransferSetting) -> Ends:
    """pi theta_1^T, and theta_2 transferred by the same pi (first version, figure 6a)."""
    found = _whole_path(setting, method)
    return apply(setting.traced[0], found.perm, setting.source.tensors), found.params


def target_and(method: str, setting: TransferSetting) -> Ends:
    """The trained target, and the transferred one (figure 6b)."""
    return setting.plain.tensors, _whole_path(setting, method).params


def target_and_tuned(method: str, setting: TransferSetting) -> Ends:
    """The trained target, and the transferred one trained on (second version, figure 7)."""
    return setting.plain.tensors, _tuned(setting, method)


def target_and_source(setting: TransferSetting) -> Ends:
    """The trained target, and the source permuted by weight matching of the two (Git Re-Basin; figure 7)."""
    spec, target, source = setting.traced[0], setting.plain.tensors, setting.source.tensors
    names = [name for name, _ in setting.model.named_parameters()]
    perm = match(spec, *({name: theta[name] for name in names} for theta in (target, source))).perm
    return target, apply(spec, perm, source)


def target_and_another(setting: TransferSetting) -> Ends:
    """Two trainings of one start that differ in the order of the images: what one basin looks like."""
    other = setting.learn("another target", setting.target_start, setting.settings.recipe)
    return setting.plain.tensors, other.tensors


def target_and_source_as_it_is(setting: TransferSetting) -> Ends:
    """The trained target and the source, nothing permuted."""
    return setting.plain.tensors, setting.source.tensors


LINES = (
    *(
        Method(
            f"source to {name}",
            partial(line, partial(source_and, name)),
            about=f"The line from the source, permuted alike, to the network that {name} makes of it.",
        )
        for name in ("naive", "oracle", "fgmt")
    ),
    *(
        Method(
            f"target to {name}",
            partial(line, partial(target_and, name)),
            about=f"The line from the trained target to the network that {name} gives its start.",
        )
        for name in ("naive", "oracle", "fgmt", "gmt")
    ),
    Method(
        "target to fgmt, trained on",
        partial(line, partial(target_and_tuned, "fgmt")),
        about=first_paragraph(target_and_tuned),
    ),
    Method(
        "target to source, permuted",
        partial(line, target_and_source),
        about=first_paragraph(target_and_source),
    ),
    Method(
        "target to source",
        partial(line, target_and_source_as_it_is),
        about=first_paragraph(target_and_source_as_it_is),
    ),
    Method(
        "target to another order",
        partial(line, target_and_another),
        about=first_paragraph(target_and_another),
    ),
)


def around_the_target(setting: TransferSetting) -> Measured:
    """The plane through the trained target, the oracle's and FGMT's network (first version, figure 6c)."""
    corners = setting.plain.tensors, *(_whole_path(setting, name).params for name in ("oracle", "fgmt"))
    clock = Clock()
    with clock.phase("evaluation", setting.device):
        found = plane(setting.model, *corners, setting.tests(), 9, statistics=_statistics(setting))
    at = tuple(tuple(round(v, 2) for v in axis.tolist()) for axis in (found.y, found.x))
    places = {
        f"{name} {axis}": float(found.corners[row, column])
        for row, name in enumerate(("target", "oracle", "fgmt"))
        for column, axis in enumerate("xy")
    }
    loss, accuracy = (
        Series(("y", "x"), at, tuple(map(tuple, grid.tolist()))) for grid in (found.loss, found.accuracy)
    )
    return Measured(places, {"loss": loss, "accuracy": accuracy}, clock.seconds)


PLANE = (Method("plane", around_the_target),)
