"""Fit checkpoints to a model: names, ties, heads of other classes; and check that a fine-tune comes from its base."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from regraft.core.files import BadFile
from regraft.core.tensors import is_finite, live_state, norm
from regraft.porting.checkpoint_files import CheckpointFile
from regraft.porting.stored_tensors import Entry
from regraft.symmetry import PermutationSpec, Segment
from regraft.symmetry.axes import groups_of

UNRELATED = 0.9
"""The relative distance above which a fine-tune is refused as not coming from its base. Independent weights have 1, a
change as large as the base 0.58."""


@dataclass(frozen=True)
class StateLayout:
    """What a model's state dictionary holds.

    Attributes:
        shapes: of each tensor, those that share memory once.
        aliases: other names of a shared tensor -> its name in `shapes`.
        optional: tensors that a checkpoint may lack.
        ignored: buffers that are not saved, though older files hold them.
        base_prefix: under which transformers keeps the body of a model with a head.
    """

    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    base_prefix: str = ""

    @classmethod
    def of_model(cls, model: nn.Module) -> StateLayout:
        first: dict[int, str] = {id(tensor): name for name, tensor in reversed(live_state(model).items())}
        shapes, aliases = {}, {}
        counters = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):
                continue
            if (own := first.setdefault(id(tensor), name)) != name:
                aliases[name] = own
            shapes[own] = tuple(tensor.shape)
            if not tensor.is_floating_point():
                counters.add(own)
        buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        prefix = getattr(model, "base_model_prefix", "")
        return cls(
            shapes,
            aliases,
            frozenset(counters),
            frozenset(buffers - shapes.keys() - aliases.keys()),
            f"{prefix}." if isinstance(prefix, str) and prefix else "",
        )

    @classmethod
    def of_spec(cls, spec: PermutationSpec) -> StateLayout:
        return cls(spec.shapes, optional=spec.optional)


def fit_names(checkpoint: CheckpointFile, layout: StateLayout, *, is_base: bool) -> CheckpointFile:
    """The checkpoint under the model's names, each shared tensor once.

    Parts that the model does not have at all (a loss with weights) are left out of a checkpoint that has all of the
    model's tensors, and the note says so. is_base: of any (another task's head).

    Raises BadFile, naming file and tensor, for a tensor that the model lacks, or tied tensors that differ.
    """
    tied = set(layout.aliases.values())
    required = layout.shapes.keys() - layout.optional - tied
    fitted = checkpoint.named_as({*layout.shapes, *layout.aliases}, layout.base_prefix, required)
    entries = dict(fitted.entries)
    for alias, name in layout.aliases.items():
        if alias in entries:
            entry = entries.pop(alias)
            if name in entries and not torch.equal(fitted[alias], fitted[name]):
                raise BadFile(f"{checkpoint.path}: {alias!r} and {name!r} differ, which the model shares")
            entries.setdefault(name, entry)
    fitted = replace(fitted, entries=entries)
    fitted = fitted.without(fitted.entries.keys() & layout.ignored, "the model does not save them")
    fitted = fitted.with_counters(layout.shapes)
    extra = {name for name in fitted.entries if name not in layout.shapes}
    parts = {name.partition(".")[0] for name in layout.shapes}
    other = {name for name in extra if name.partition(".")[0] not in parts}
    whole = all(name in fitted.entries for name in required)
    if (is_base or whole) and other == extra and len(extra) < len(fitted.entries):
        return fitted.without(other, "the model has no such part")
    if extra:
        raise BadFile(
            f"{checkpoint.path} has tensor {min(extra)!r}, which the model has not "
            f"({len(extra)} such): is it of another architecture?"
        )
    return fitted


def list_unfit(checkpoint: CheckpointFile, layout: StateLayout) -> list[str]:
    """The model's tensors that the checkpoint lacks, or has in another shape."""
    entries = checkpoint.entries
    return [
        name
        for name, shape in layout.shapes.items()
        if (name not in entries and name not in layout.optional) or (name in entries and entries[name].shape != shape)
    ]


def list_new_parts(checkpoint: CheckpointFile, layout: StateLayout) -> list[str]:
    """The tensors of the model's last parts, of which the checkpoint has none: what a task adds to a body, such as
    "classifier" or "bert.pooler". A numbered part ("blocks.11") is not new but a missing layer."""
    outer = {name.partition(".")[0] for name in checkpoint.entries}
    inner = {".".join(name.split(".")[:2]) for name in checkpoint.entries}
    new: list[str] = []
    for name in reversed(list(layout.shapes)):
        first, *rest = name.split(".")
        is_part = len(rest) > 1 and not rest[0].isdigit()
        if first in outer and not (is_part and f"{first}.{rest[0]}" not in inner):
            break
        new.append(name)
    return new


def find_other_head(checkpoint: CheckpointFile, layout: StateLayout, names: list[str]) -> str:
    """The module that holds the tensors ``names``, if only this module differs, and only in its number of outputs.

    Raises BadFile, naming file and tensor, otherwise.
    """
    modules = {name.rpartition(".")[0] for name in names}
    entries = checkpoint.entries
    if len(modules) == 1 and all(n in entries and entries[n].shape[1:] == layout.shapes[n][1:] for n in names):
        module = min(modules)
        of_module = [name for name in layout.shapes if name.rpartition(".")[0] == module]
        if module and len(names) == len(of_module) and all(layout.shapes[name] for name in names):
            return module
    raise BadFile(describe_unfit(checkpoint, layout, names))


def describe_unfit(checkpoint: CheckpointFile, layout: StateLayout, names: list[str]) -> str:
    """Why a checkpoint is not the model's: the first of the tensors ``names``."""
    name = names[0]
    if name not in checkpoint.entries:
        return (
            f"{checkpoint.path} has no tensor {name!r}, which the model has "
            f"({len(names)} do not fit): is it of another architecture?"
        )
    return (
        f"{checkpoint.path}: tensor {name!r} has shape {checkpoint.entries[name].shape}, the model's is "
        f"{layout.shapes[name]} ({len(names)} do not fit): is it of another architecture?"
    )


def fit_outputs(spec: PermutationSpec, entries: Mapping[str, Entry], names: Sequence[str]) -> PermutationSpec:
    """The specification for a head, ``names``, of another number of outputs, which no permutation moves.

    Raises BadFile, naming file and tensor, if they are not a head's: a permutation moves their outputs.
    """
    proven = spec.proven
    for name in [name for name in names if name in entries]:
        entry = entries[name]
        if groups_of(spec.axes[name][0]):
            raise BadFile(
                f"{entry.file}: tensor {name!r} has shape {entry.shape}, the model's is {spec.shapes[name]}, and it is "
                "no classifier's: is it of another architecture?"
            )
        spec = spec.with_axis(name, 0, (Segment(None, 0, entry.shape[0]),))
    spec.mark(proven=proven)  # the length of an axis that does not move is not part of the proof
    return spec


# ---------------------------------------------------------------- whether a fine-tune comes from a base


@dataclass
class Distance:
    """``|a - b| / sqrt(|a|^2 + |b|^2)`` over the pairs of tensors that are added: 0 where equal, 1 where unrelated."""

    differences: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def add(self, a: Tensor, b: Tensor) -> None:
        self.differences.append(norm([a - b]))
        self.norms += [norm([a]), norm([b])]

    @property
    def value(self) -> float:
        whole = math.hypot(*self.norms)
        return math.hypot(*self.differences) / whole if whole else 0.0


@dataclass(frozen=True)
class Distances:
    """Relative distances (see `Distance`).

    Attributes:
        tensors: of the fine-tune from its base, by weight (two axes or more; a head that is carried over left out).
        base: in total.
        new_base: the fine-tune's from the new base, in total.
    """

    tensors: Mapping[str, float]
    base: float
    new_base: float

    def farthest(self, count: int = 3) -> list[tuple[str, float]]:
        """The weights that changed most."""
        return sorted(self.tensors.items(), key=lambda pair: -pair[1])[:count]


@dataclass
class ValueCheck:
    """Looks at a tensor of all networks of a job as it is read.

    Attributes:
        paths: what to call the networks.
        parameters: the names that are known to be parameters'.
        summed: how many of the networks, from the first on, are added or subtracted.
        infinite: the buffers that were seen to have infinities, the same ones everywhere.
    """

    paths: Sequence[str]
    parameters: Collection[str]
    summed: int
    infinite: set[str] = field(default_factory=set)

    def __call__(self, name: str, values: Sequence[Tensor]) -> None:
        """Raises BadFile, naming tensor and file, for a NaN; an infinity in a parameter, or not in all networks; and
        integers of several entries, such as packed weights, that differ where they are to be summed."""
        if not values[0].is_floating_point():
            for other, path in zip(values[1 : self.summed], self.paths[1:], strict=False):
                if other.numel() > 1 and not torch.equal(other, values[0]):
                    raise BadFile(
                        f"tensor {name!r}: integers of {self.paths[0]} and {path} differ, which have no sum (packed or "
                        "quantised weights?)"
                    )
            return
        odd = [path for value, path in zip(values, self.paths, strict=True) if not is_finite(value)]
        if not odd:
            return
        infinities = [value.masked_fill(value.isfinite(), 0) for value in values]
        same = all(torch.equal(value, infinities[0]) for value in infinities)  # a NaN does not equal itself
        if name in self.parameters or not same:
            where = "" if same else f" (nor as in {self.paths[0]})"
            raise BadFile(f"tensor {name!r} of {odd[-1]} holds a value that is not finite{where}")
        self.infinite.add(name)


def measure_distances(networks: Sequence[Mapping[str, Tensor]], check: ValueCheck) -> Distances:
    """The distances of (base, fine-tune, new base), of which everything is read once, and checked.

    Raises BadFile, naming file and tensor, as the check does, where the fine-tune has nothing to do with its base, or
    where nothing was learned.
    """
    tensors: dict[str, float] = {}
    from_base, from_new_base, changed = Distance(), Distance(), False
    for name in networks[1]:
        base, tuned, new_base = values = [network[name] for network in networks]
        check(name, values)
        changed = changed or (tuned.is_floating_point() and not torch.equal(tuned, base))
        if tuned.ndim < 2 or not tuned.is_floating_point() or not bool(base.any()) or name in check.infinite:
            continue
        own = Distance()
        own.add(tuned, base)
        tensors[name] = own.value
        from_base.differences += own.differences
        from_base.norms += own.norms
        from_new_base.add(tuned, new_base)
    distances = Distances(tensors, from_base.value, from_new_base.value)
    if not changed:
        raise BadFile(f"the fine-tune equals {check.paths[0]}: there is nothing to port")
    _check_origin(distances, check.paths[0], check.paths[2])
    return distances


def _check_origin(distances: Distances, base: str, new_base: str) -> None:
    if not distances.tensors:
        return
    exchanged = distances.new_base < distances.base / 2
    if distances.base > UNRELATED or exchanged:
        far = ", ".join(f"{name} {distance:.2f}" for name, distance in distances.farthest())
        nearer = f"; it is nearer to {new_base} ({distances.new_base:.2f})" if exchanged else ""
        raise BadFile(
            f"the fine-tune does not come from {base}: relative distance {distances.base:.2f} (1: unrelated), "
            f"such as {far}{nearer}"
        )
