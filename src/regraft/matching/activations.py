"""Units compared by what they compute: the correlation of their activations on data.

(Li et al., Convergent learning, 2016; Ainsworth et al., Git Re-Basin, section 3.1.) A group's units are seen where
linear layers and convolutions read them, behind activation and normalisation; where none does, at the outputs of those
that make them. Groups that neither enter nor leave such a module, as the heads of torch's attention, are not seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from regraft.core.forward import hooks, run
from regraft.core.guard import evaluating
from regraft.core.tensors import Batch, Tensors, copies
from regraft.symmetry import PermutationSpec
from regraft.training.evaluation import check_batches

LEAST_DEVIATION = 1e-12
"""A unit that varies less correlates with nothing."""


@dataclass(eq=False)
class Place:
    """Where the units of a group are seen, and the moments of what was seen there, float64."""

    group: str
    module: str
    reads: bool  # at the module's input, not its output
    positions: Tensor  # [n, occurrences] among the channels
    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add_(self, target: Tensor, source: Tensor) -> None:
        """Two networks' values on the same inputs, [n, values]."""
        self.count += target.shape[1]
        moments = {"ab": target @ source.T, "a": target.sum(1), "b": source.sum(1)}
        moments |= {"aa": target.square().sum(1), "bb": source.square().sum(1)}
        for name, moment in moments.items():
            self.sums[name] = self.sums[name] + moment if name in self.sums else moment

    def correlation(self) -> Tensor:
        """[n, n], rows for the target's units."""
        mean = {name: total / self.count for name, total in self.sums.items()}
        a, b = ((mean[x + x] - mean[x].square()).clamp_min(0).sqrt() for x in "ab")
        scale = a[:, None] * b
        covariance = mean["ab"] - mean["a"][:, None] * mean["b"]
        return torch.where(scale > LEAST_DEVIATION**2, covariance / scale.clamp_min(LEAST_DEVIATION**2), 0)


@torch.no_grad()
def correlate_units(
    spec: PermutationSpec,
    model: nn.Module,
    target: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    batches: Iterable[Batch],
) -> Tensors:
    """group -> float64 [n, n]: the correlation of each unit of `target` with each of `source` over all batches.

    It is averaged over the modules where the group is seen. Groups that are not seen are absent.

    Models run in evaluation mode. Raises ValueError where there is no batch, or an input is not finite.
    """
    places = [place for group in spec.groups for place in _places_of(spec, model, group)]
    modules = {place.module: model.get_submodule(place.module) for place in places}
    sides = copies(model, target), copies(model, source)
    empty = True
    with evaluating(model):
        for inputs, _ in check_batches(batches):
            empty = False
            values = [_see(model, side, inputs, modules) for side in sides]
            for place in places:
                if place.module in values[0]:
                    place.add_(*(_units(place, modules[place.module], side[place.module]) for side in values))
    if empty:
        raise ValueError("there is no batch to compare activations on")
    seen: dict[str, list[Tensor]] = {}
    for place in places:
        if place.count:
            seen.setdefault(place.group, []).append(place.correlation())
    return {group: torch.stack(several).mean(0) for group, several in seen.items()}


def _places_of(spec: PermutationSpec, model: nn.Module, group: str) -> list[Place]:
    places = []
    for name, axis in spec.tensors_of(group):
        path, _, kind = name.rpartition(".")
        module = _find_module(model, path)
        if kind != "weight" or axis > 1 or not isinstance(module, nn.Linear | _ConvNd):
            continue
        if isinstance(module, _ConvTransposeNd) or (axis == 1 and getattr(module, "groups", 1) > 1):
            continue  # whose axes are not the channels
        places.append(Place(group, path, axis == 1, spec.positions(name, axis, group)))
    return [place for place in places if place.reads] or places


def _find_module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:  # a parameter of a list, or a name behind a parametrisation
        return None


def _see(
    model: nn.Module, tensors: Tensors, inputs: Any, modules: Mapping[str, nn.Module]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """module -> (input, output) of each of its calls."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(name: str, given: tuple[Any, ...], output: Any) -> None:
        if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
            calls.setdefault(name, []).append((given[0], output))

    with hooks(modules, keep):
        run(model, tensors, inputs)
    return calls


def _units(place: Place, module: nn.Module, calls: list[tuple[Tensor, Tensor]]) -> Tensor:
    """float64 [n, values] of all calls."""
    values = [given if place.reads else output for given, output in calls]
    channels = [value.movedim(-1 if isinstance(module, nn.Linear) else 1, 0) for value in values]
    return torch.cat([rows[place.positions.to(rows.device)].flatten(1) for rows in channels], 1).double()
