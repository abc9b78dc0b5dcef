"""Checkpoints made to fit a model: names, ties, heads of other classes; and whether a fine-tune comes from its base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from regraft.core.files import BadFile
from regraft.core.tensors import check_finite, live_state
from regraft.porting.checkpoint_files import CheckpointFile, Entry
from regraft.symmetry import PermutationSpec, Segment
from regraft.symmetry.spec import groups_of

UNRELATED = 0.9
"""The relative distance from which on a fine-tune is not believed to come from a base. Independent weights have 1, and
a change as large as the base itself 0.58."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Anatomy:
    """What a model's state dictionary holds.

    Attributes:
        shapes: of each tensor, those that share memory once.
        aliases: other names of a shared tensor -> its name in `shapes`.
        optional: tensors that a checkpoint may lack.
        ignored: buffers that are not saved, though older files hold them.
        base_prefix: under which transformers keeps the body of a model with a head.
    """

    shapes: Mapping[str, Shape]
    aliases: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    base_prefix: str = ""

    @classmethod
    def of_model(cls, model: nn.Module) -> Anatomy:
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
    def of_spec(cls, spec: PermutationSpec) -> Anatomy:
        return cls(spec.shapes, optional=spec.optional)


def fit(checkpoint: CheckpointFile, anatomy: Anatomy, *, is_base: bool) -> CheckpointFile:
    """The checkpoint under the model's names, each shared tensor once.

    is_base: parts that the model does not have at all (another task's head) are left out, and the note says so.

    Raises BadFile, naming file and tensor, for a tensor that the model has not, or ties that are not tied in the file.
    """
    found = checkpoint.named_as({*anatomy.shapes, *anatomy.aliases}, anatomy.base_prefix)
    entries = dict(found.entries)
    for alias, name in anatomy.aliases.items():
        if alias in entries:
            entry = entries.pop(alias)
            if name in entries and not torch.equal(found[alias], found[name]):
                raise BadFile(f"{checkpoint.path}: {alias!r} and {name!r} differ, which the model shares")
            entries.setdefault(name, entry)
    found = replace(found, entries=entries)
    found = found.without(found.entries.keys() & anatomy.ignored, "the model does not save them")
    extra = {name for name in found.entries if name not in anatomy.shapes}
    parts = {name.partition(".")[0] for name in anatomy.shapes}
    other = {name for name in extra if name.partition(".")[0] not in parts}
    if is_base and other == extra and len(extra) < len(found.entries):
        return found.without(other, "the model has no such part")
    if extra:
        raise BadFile(
            f"{checkpoint.path} has tensor {min(extra)!r}, which the model has not "
            f"({len(extra)} such): is it of another architecture?"
        )
    return found


def unfit(checkpoint: CheckpointFile, anatomy: Anatomy) -> list[str]:
    """The model's tensors that the checkpoint lacks, or has in another shape."""
    entries = checkpoint.entries
    return [
        name
        for name, shape in anatomy.shapes.items()
        if (name not in entries and name not in anatomy.optional)
        or (name in entries and entries[name].shape != shape)
    ]


def new_parts(checkpoint: CheckpointFile, anatomy: Anatomy) -> list[str]:
    """The tensors of the model's last parts, of which the checkpoint has none: what a task puts behind a body, such as
    "classifier" or "bert.pooler". A numbered part ("blocks.11") is a layer that is lacking, and no new one."""
    outer = {name.partition(".")[0] for name in checkpoint.entries}
    inner = {".".join(name.split(".")[:2]) for name in checkpoint.entries}
    found: list[str] = []
    for name in reversed(list(anatomy.shapes)):
        first, *rest = name.split(".")
        is_part = len(rest) > 1 and not rest[0].isdigit()
        if first in outer and not (is_part and f"{first}.{rest[0]}" not in inner):
            break
        found.append(name)
    return found


def check_head(checkpoint: CheckpointFile, anatomy: Anatomy, names: list[str]) -> str:
    """The module that holds the tensors ``names``, if it alone, and only in its number of outputs, is other.

    Raises BadFile, naming file and tensor, where it is not so.
    """
    modules = {name.rpartition(".")[0] for name in names}
    entries = checkpoint.entries
    if len(modules) == 1 and all(
        n in entries and entries[n].shape[1:] == anatomy.shapes[n][1:] for n in names
    ):
        module = min(modules)
        of_module = [name for name in anatomy.shapes if name.rpartition(".")[0] == module]
        if module and len(names) == len(of_module) and all(anatomy.shapes[name] for name in names):
            return module
    name = names[0]
    if name not in checkpoint.entries:
        raise BadFile(
            f"{checkpoint.path} has no tensor {name!r}, which the model has "
            f"({len(names)} do not fit): is it of another architecture?"
        )
    raise BadFile(
        f"{checkpoint.path}: tensor {name!r} has shape {checkpoint.entries[name].shape}, the model's is "
        f"{anatomy.shapes[name]} ({len(names)} do not fit): is it of another architecture?"
    )


def with_outputs(
    spec: PermutationSpec, entries: Mapping[str, Entry], names: Sequence[str]
) -> PermutationSpec:
    """The specification for a head, ``names``, of another number of outputs, which no permutation moves.

    Raises BadFile, naming file and tensor, where they are no head's: the outputs are units.
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
    spec.mark(proven=proven)  # of what does not move the length says nothing
    return spec


# ---------------------------------------------------------------- whether a fine-tune comes from a base


@dataclass
class _Sums:
    """Of one tensor, or many: squared norms of the fine-tune and the base, and of their difference."""

    difference: float = 0.0
    both: float = 0.0

    @property
    def distance(self) -> float:
        return math.sqrt(self.difference / self.both) if self.both else 0.0


@dataclass(frozen=True)
class Distances:
    """Relative distances ``|a - b| / sqrt(|a|^2 + |b|^2)``: 0 where equal, 1 where unrelated.

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


def distances(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    new_base: Mapping[str, Tensor],
    paths: Sequence[str],
) -> Distances:
    """Reads everything once: each value must be finite, and distances are summed. paths: what to call the three.

    Raises BadFile, naming file and tensor, for a value that is not finite.
    """
    single: dict[str, float] = {}
    total, new = _Sums(), _Sums()
    for name in tuned:
        start, tensor, there = held = base[name], tuned[name], new_base[name]
        for one, path in zip(held, paths, strict=True):
            _check_finite(name, one, path)
        if tensor.ndim < 2 or not tensor.is_floating_point() or not bool(start.any()):
            continue
        own = _Sums()
        for sums, other in ((own, start), (new, there)):
            sums.difference += _squares(tensor - other)
            sums.both += _squares(tensor) + _squares(other)
        single[name] = own.distance
        total.difference += own.difference
        total.both += own.both
    return Distances(single, total.distance, new.distance)


def check_base(found: Distances, base: str, new_base: str) -> None:
    """Raises BadFile where the fine-tune has nothing to do with its base, or nothing was learned."""
    if not found.tensors:
        return
    exchanged = found.new_base < found.base / 2
    if found.base > UNRELATED or exchanged:
        far = ", ".join(f"{name} {distance:.2f}" for name, distance in found.farthest())
        raise BadFile(
            f"the fine-tune does not come from {base}: relative distance {found.base:.2f} (1: unrelated), such as {far}"
            + (f"; it is nearer to {new_base} ({found.new_base:.2f})" if exchanged else "")
        )
    if found.base == 0:
        raise BadFile(f"the fine-tune equals {base}: there is nothing to port")


def _check_finite(name: str, tensor: Tensor, path: str) -> None:
    try:
        check_finite({name: tensor}, path)
    except ValueError as problem:
        raise BadFile(str(problem)) from problem


def _squares(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64).square())
