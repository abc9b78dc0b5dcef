"""What else one could do with a finished source: other permutations, other starts, and as much plain training.

Each gives a start that is judged as a transferred one is. What comes from a permutation moves the source's path by it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import chain, islice, repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.core.clock import Clock
from regraft.core.forward import call
from regraft.core.tensors import Perm, Tensors, fill_, state
from regraft.fusion.repair import hooks
from regraft.learning_transfer.trajectory import Trajectory
from regraft.matching.descent import match
from regraft.symmetry import PermutationSpec, apply
from regraft.training.evaluation import accuracy, evaluating
from regraft.training.loop import train_steps_
from regraft_bench.study import Measured, Method, first_paragraph
from regraft_bench.transfer.methods import judged, measured
from regraft_bench.transfer.setting import TransferSetting
from regraft_kernels import assign

# ---------------------------------------------------------------- other permutations

Find = Callable[[TransferSetting, PermutationSpec], Perm]


def permuted(find: Find, setting: TransferSetting) -> Measured:
    """Move the source's path by one permutation, however it was found."""
    spec, clock = setting.traced[0], Clock()
    source = setting.path
    with clock.phase("assignment", setting.device):
        perm = find(setting, spec)
    anchors = tuple(apply(spec, perm, theta) for theta in source.anchors)
    path = Trajectory(anchors, source.legs, source.metadata)
    return measured(setting, setting.transfer("naive", path=path), clock.seconds)


def random(setting: TransferSetting, spec: PermutationSpec) -> Perm:
    """A control: any network that computes the source's function is as good a source."""
    return spec.random(setting.generator("permutation"))


def end_weights(setting: TransferSetting, spec: PermutationSpec) -> Perm:
    """The finished source's weights matched to the target's start (Git Re-Basin)."""
    names = [name for name, _ in setting.model.named_parameters()]
    start, end = ({name: theta[name] for name in names} for theta in (setting.target_start, setting.path.end))
    return match(spec, start, end, generator=setting.generator("sweeps")).perm


def end_activations(setting: TransferSetting, spec: PermutationSpec) -> Perm:
    """Units of the finished source and of the target's start by the correlation of their outputs (Li et al., 2016).

    On as many batches as FGMT takes gradients on.
    """
    settings = setting.settings
    batches = list(islice(_endless(setting), settings.steps * settings.gradient_batches))
    target, source = (
        _outputs(setting, spec, theta, batches) for theta in (setting.target_start, setting.path.end)
    )
    perm = spec.identity()
    for group, units in target.items():
        perm[group] = assign(units @ source[group].T).perm
    return perm


def _outputs(
    setting: TransferSetting, spec: PermutationSpec, theta: Tensors, batches: list
) -> dict[str, Tensor]:
    """Each group's outputs, [units, images x places], every unit with mean 0 and length 1."""
    layers = {name: group for group in spec.groups for name in _layers(setting.model, spec, group)}
    seen: dict[str, list[Tensor]] = {group: [] for group in layers.values()}

    def see(name: str, _inputs: object, output: Tensor) -> None:
        last = isinstance(setting.model.get_submodule(name), nn.Linear)
        seen[layers[name]].append(F.relu(output).movedim(-1 if last else 1, 0).flatten(1))

    modules = {name: setting.model.get_submodule(name) for name in layers}
    with torch.no_grad(), evaluating(setting.model), hooks(modules, see):
        for images, _ in batches:
            call(setting.model, theta, images)
    units = {group: torch.cat(parts, 1) for group, parts in seen.items()}
    return {group: F.normalize(x - x.mean(1, keepdim=True), dim=1) for group, x in units.items()}


def _layers(model: nn.Module, spec: PermutationSpec, group: str) -> list[str]:
    """Convolutions and linear layers whose outputs are the group's units, in their order."""
    found = []
    for name, axis in spec.tensors_of(group):
        layer, _, kind = name.rpartition(".")
        whole = kind == "weight" and axis == 0 and spec.shapes[name][0] == spec.groups[group]
        if whole and isinstance(model.get_submodule(layer), nn.Linear | nn.Conv2d):
            found.append(layer)
    return found


def end_sinkhorn(setting: TransferSetting, spec: PermutationSpec) -> Perm:
    """OT fusion (Singh and Jaggi, 2020), hardened: layer after layer, the finished source's incoming weights to those
    of the target's start by an entropic plan, of which the assignment is taken.
    """
    try:
        import ot
    except ModuleNotFoundError:
        raise ValueError("end-sinkhorn wants optimal transport: pip install 'regraft[peers]'") from None
    perm = spec.identity()
    for group, size in spec.groups.items():
        moved = apply(spec, perm, setting.path.end)
        names = [f"{layer}.weight" for layer in _layers(setting.model, spec, group)]
        if not names:
            continue
        cost = sum(
            torch.cdist(setting.target_start[name].flatten(1), moved[name].flatten(1)).square()
            for name in names
        )
        share = torch.full((size,), 1 / size, dtype=torch.float64)
        plan = ot.sinkhorn(share, share, (cost / cost.max()).double(), reg=0.01, numItermax=500, warn=False)
        perm[group] = assign(plan).perm
    return perm


# ---------------------------------------------------------------- other starts


def warm_start(setting: TransferSetting) -> Measured:
    """The finished source itself: nothing of the target is in it."""
    return _as_start(setting, setting.path.end, Clock())


def shrink_and_perturb(setting: TransferSetting) -> Measured:
    """Ash and Adams, 2020: 0.4 times the source, plus 0.1 times fresh initial values, which are the target's start."""
    clock = Clock()
    with clock.phase("graft", setting.device):
        end, start = setting.path.end, setting.target_start
        mixed = {
            name: 0.4 * end[name] + 0.1 * start[name] if end[name].is_floating_point() else end[name]
            for name in end
        }
    return _as_start(setting, mixed, clock)


# ---------------------------------------------------------------- as much plain training


def brief(setting: TransferSetting) -> Measured:
    """Plain training of the target's start with as many gradients as FGMT takes, its rate falling to 0."""
    return _trained(setting, 2 * setting.settings.steps * setting.settings.gradient_batches, None)


def distillation(setting: TransferSetting) -> Measured:
    """The target's start learns the source's outputs (Hinton et al., 2015) at FGMT's price.

    Temperature 2. An update takes a gradient of the target and a pass of the source: 4/3 of a gradient.
    """
    updates = round(1.5 * setting.settings.steps * setting.settings.gradient_batches)
    return _trained(setting, updates, setting.path.end)


def _trained(setting: TransferSetting, updates: int, teacher: Tensors | None) -> Measured:
    recipe, clock = setting.settings.recipe, Clock()
    network = copy.deepcopy(setting.model)
    fill_(network, setting.target_start)
    optimiser = recipe.optimiser(network.train())
    batches = islice(_endless(setting), updates)
    with clock.phase("training", setting.device):
        if teacher is None:
            train_steps_(
                network,
                optimiser,
                batches,
                range(updates),
                learning_rate=lambda step: recipe.lr * (1 - step / updates),
            )
        else:
            for step, (images, _) in enumerate(batches):
                optimiser.param_groups[0]["lr"] = recipe.lr * (1 - step / updates)
                with torch.no_grad(), evaluating(setting.model):
                    wanted = F.softmax(call(setting.model, teacher, images) / 2, -1)
                optimiser.zero_grad(set_to_none=True)
                found = F.log_softmax(network(images) / 2, -1)
                (4 * F.kl_div(found, wanted, reduction="batchmean")).backward()
                optimiser.step()
    return _as_start(setting, state(network), clock, gradients=updates)


def _endless(setting: TransferSetting):
    stream = setting.stream()
    return chain.from_iterable(repeat(stream))


def _as_start(setting: TransferSetting, params: Tensors, clock: Clock, gradients: int = 0) -> Measured:
    values = {
        "validation": accuracy(setting.model, params, setting.validation()),
        "gradients": gradients,
        "gradient work [FLOP]": gradients * setting.gradient_flop,
    }
    return judged(setting, params, clock.seconds, values)


PEERS = (
    Method("random", partial(permuted, random), about=first_paragraph(random)),
    Method("end-weights", partial(permuted, end_weights), about=first_paragraph(end_weights)),
    Method("end-activations", partial(permuted, end_activations), about=first_paragraph(end_activations)),
    Method("end-sinkhorn", partial(permuted, end_sinkhorn), about=first_paragraph(end_sinkhorn)),
    Method("warm-start", warm_start),
    Method("shrink-and-perturb", shrink_and_perturb),
    Method("brief", brief),
    Method("distillation", distillation),
)
