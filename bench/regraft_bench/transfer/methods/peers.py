"""What else one could do with a finished source: other permutations, other starts, and as much plain training.

Each gives a start, measured as a transferred one is. What comes from a permutation moves the source's path by it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.core.clock import Clock
from regraft.core.extras import describe_install
from regraft.core.forward import call, hooks
from regraft.core.guard import evaluating
from regraft.core.tensors import Pair, Perm, Tensors, fill_, state
from regraft.learning_transfer.trajectory import Trajectory
from regraft.matching.descent import match
from regraft.symmetry import PermutationSpec, apply
from regraft.training.evaluation import accuracy
from regraft.training.loop import train_steps_
from regraft_bench.study import Measured, Method, first_paragraph
from regraft_bench.transfer.methods.transfers import measure_start, measure_transfer, run_transfer
from regraft_bench.transfer.setting import TransferSetting
from regraft_kernels import assign

# ---------------------------------------------------------------- other permutations


def permute_source(find: Callable[[TransferSetting], Perm], setting: TransferSetting) -> Measured:
    """Move the source's path by one permutation, however it was found."""
    spec, source, clock = setting.spec, setting.path, Clock()
    with clock.phase("assignment", setting.device):
        perm = find(setting)
    anchors = tuple(apply(spec, perm, theta) for theta in source.anchors)
    path = Trajectory(anchors, source.legs, source.metadata)
    return measure_transfer(setting, run_transfer(setting, "naive", path=path), clock.seconds)


def random(setting: TransferSetting) -> Perm:
    """A control: any network that computes the source's function is as good a source."""
    return setting.spec.random(setting.generator("permutation"))


def match_end_weights(setting: TransferSetting) -> Perm:
    """The finished source's weights matched to the target's start (Git Re-Basin)."""
    start, end = map(setting.parameters, (setting.target_start, setting.path.end))
    return match(setting.spec, start, end, generator=setting.generator("sweeps")).perm


def match_end_activations(setting: TransferSetting) -> Perm:
    """Units of the finished source and of the target's start by the correlation of their outputs (Li et al., 2016).

    On as many batches as FGMT takes gradients on.
    """
    count = setting.settings.steps * setting.settings.gradient_batches
    batches = list(islice(setting.endless_stream(), count))
    target, source = (_outputs(setting, theta, batches) for theta in (setting.target_start, setting.path.end))
    perm = setting.spec.identity()
    for group, units in target.items():
        perm[group] = assign(units @ source[group].T).perm
    return perm


def _outputs(setting: TransferSetting, theta: Tensors, batches: Sequence[Pair]) -> dict[str, Tensor]:
    """Each group's outputs, [units, images x places], every unit with mean 0 and length 1."""
    model, spec = setting.model, setting.spec
    layers = {name: group for group in spec.groups for name in _layers(model, spec, group)}
    seen: dict[str, list[Tensor]] = {group: [] for group in layers.values()}

    def see(name: str, _inputs: object, output: Tensor) -> None:
        last = isinstance(model.get_submodule(name), nn.Linear)
        seen[layers[name]].append(F.relu(output).movedim(-1 if last else 1, 0).flatten(1))

    modules = {name: model.get_submodule(name) for name in layers}
    with torch.no_grad(), evaluating(model), hooks(modules, see):
        for images, _ in batches:
            call(model, theta, images)
    units = {group: torch.cat(parts, 1) for group, parts in seen.items()}
    return {group: F.normalize(x - x.mean(1, keepdim=True), dim=1) for group, x in units.items()}


def _layers(model: nn.Module, spec: PermutationSpec, group: str) -> list[str]:
    """Convolutions and linear layers whose outputs are the group's units, in their order."""
    layers = []
    for name, axis in spec.tensors_of(group):
        layer, _, kind = name.rpartition(".")
        whole = kind == "weight" and axis == 0 and spec.shapes[name][0] == spec.groups[group]
        if whole and isinstance(model.get_submodule(layer), nn.Linear | nn.Conv2d):
            layers.append(layer)
    return layers


def match_end_transport(setting: TransferSetting) -> Perm:
    """OT fusion (Singh and Jaggi, 2020), hardened: layer after layer, the finished source's incoming weights to those
    of the target's start by an entropic plan, of which the assignment is taken.
    """
    try:
        import ot
    except ModuleNotFoundError:
        raise ValueError(f"end-sinkhorn needs optimal transport: {describe_install('peers')}") from None
    spec = setting.spec
    perm = spec.identity()
    for group, size in spec.groups.items():
        permuted = apply(spec, perm, setting.path.end)
        names = [f"{layer}.weight" for layer in _layers(setting.model, spec, group)]
        if not names:
            continue
        pairs = [(setting.target_start[name].flatten(1), permuted[name].flatten(1)) for name in names]
        cost = reduce(torch.add, (torch.cdist(target, source).square() for target, source in pairs))
        share = torch.full((size,), 1 / size, dtype=torch.float64)
        plan = ot.sinkhorn(share, share, (cost / cost.max()).double(), reg=0.01, numItermax=500, warn=False)
        perm[group] = assign(plan).perm
    return perm


# ---------------------------------------------------------------- other starts


def warm_start(setting: TransferSetting) -> Measured:
    """The finished source itself: nothing of the target is in it."""
    return measure_peer(setting, setting.path.end, Clock())


def shrink_and_perturb(setting: TransferSetting) -> Measured:
    """Ash and Adams, 2020: 0.4 times the source, plus 0.1 times fresh initial values, which are the target's start."""
    clock = Clock()
    with clock.phase("graft", setting.device):
        end, start = setting.path.end, setting.target_start
        mixed = {n: 0.4 * x + 0.1 * start[n] if x.is_floating_point() else x for n, x in end.items()}
    return measure_peer(setting, mixed, clock)


def measure_peer(setting: TransferSetting, params: Tensors, clock: Clock, gradients: int = 0) -> Measured:
    """What a start is worth that took so many gradients."""
    values = {
        "validation": accuracy(setting.model, params, setting.validation()),
        "gradients": gradients,
        "gradient work [FLOP]": gradients * setting.gradient_flop,
    }
    return measure_start(setting, params, clock.seconds, values)


# ---------------------------------------------------------------- as much plain training


def train_briefly(setting: TransferSetting) -> Measured:
    """Plain training of the target's start with as many gradients as FGMT takes, its rate falling to 0."""
    return _train_for(setting, 2 * setting.settings.steps * setting.settings.gradient_batches, None)


def distil(setting: TransferSetting) -> Measured:
    """The target's start learns the source's outputs (Hinton et al., 2015) at FGMT's price.

    Temperature 2. An update takes a gradient of the target and a pass of the source: 4/3 of a gradient.
    """
    updates = round(1.5 * setting.settings.steps * setting.settings.gradient_batches)
    return _train_for(setting, updates, setting.path.end)


def _train_for(setting: TransferSetting, updates: int, teacher: Tensors | None) -> Measured:
    recipe, clock = setting.settings.recipe, Clock()
    network = copy.deepcopy(setting.model)
    fill_(network, setting.target_start)
    optimiser = recipe.optimiser(network.train())
    batches = islice(setting.endless_stream(), updates)

    def rate(step: int) -> float:
        return recipe.lr * (1 - step / updates)

    with clock.phase("training", setting.device):
        if teacher is None:
            train_steps_(network, optimiser, batches, range(updates), learning_rate=rate)
        else:
            for step, (images, _) in enumerate(batches):
                optimiser.param_groups[0]["lr"] = rate(step)
                with torch.no_grad(), evaluating(setting.model):
                    taught = F.softmax(call(setting.model, teacher, images) / 2, -1)
                optimiser.zero_grad(set_to_none=True)
                own = F.log_softmax(network(images) / 2, -1)
                (4 * F.kl_div(own, taught, reduction="batchmean")).backward()
                optimiser.step()
    return measure_peer(setting, state(network), clock, gradients=updates)


FINDERS = {
    "random": random,
    "end-weights": match_end_weights,
    "end-activations": match_end_activations,
    "end-sinkhorn": match_end_transport,
}
PEERS = (
    *(Method(name, partial(permute_source, find), about=first_paragraph(find)) for name, find in FINDERS.items()),
    Method("warm-start", warm_start),
    Method("shrink-and-perturb", shrink_and_perturb),
    Method("brief", train_briefly),
    Method("distillation", distil),
)
