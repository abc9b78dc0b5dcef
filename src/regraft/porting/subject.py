"""The network that checkpoints are of: its names, its proven symmetry, and how it is run."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from regraft.core.files import BadFile
from regraft.core.forward import map_inputs
from regraft.core.tensors import Perm, Tensors
from regraft.networks.heads import adopt
from regraft.porting.checkpoint_files import CheckpointFile, Lazy
from regraft.porting.data import Data, data_by_name, data_of
from regraft.porting.fitting import Anatomy, check_head, fit, new_parts, unfit, with_outputs
from regraft.porting.models import Named, by_name
from regraft.symmetry import PermutationSpec, apply, trace, verify
from regraft.symmetry.calls import Call, Caller, ready

SAME_FUNCTION = 1e-3
"""The largest relative difference between a network's outputs and a permuted one's, in float32."""

Model = str | nn.Module
Spec = PermutationSpec | Path | str
Example = Tensor | Mapping[str, Tensor] | Sequence[int] | None
"""Example inputs, or the shape of a named model's, or its usual ones."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What all checkpoints of one call must fit.

    Attributes:
        spec: proven permutation groups, of the names in `anatomy`.
        named: the model with its inputs; None where a specification stands for it.
        head: the module whose tensors another checkpoint may have for other classes, or not at all.
    """

    spec: PermutationSpec
    anatomy: Anatomy
    named: Named | None = None
    head: str | None = None

    @property
    def model(self) -> nn.Module | None:
        return None if self.named is None else self.named.model

    def fitted(self, checkpoint: CheckpointFile) -> CheckpointFile:
        """A base under the model's names, without the tensors of another head.

        Raises BadFile, naming file and tensor, where anything but a head does not fit.
        """
        found = fit(checkpoint, self.anatomy, is_base=True)
        new = set(new_parts(found, self.anatomy))
        odd = [name for name in unfit(found, self.anatomy) if name not in new]
        if odd:
            check_head(found, self.anatomy, odd)
            with_outputs(self.spec, found.entries, odd)
        return found.without(found.entries.keys() & set(odd), "its head is of other classes")

    def classifier(self) -> nn.Module:
        """The model, for data. Raises ValueError where there is none."""
        if self.model is None:
            raise ValueError("data are given, but no model to run on them")
        return self.model

    def data(self, given: object, device: str) -> Data | None:
        """Data as `data_by_name` or `data_of` take them. Raises BadFile where their classes are not the head's."""
        if given is None:
            return None
        model = self.classifier()
        assert self.named is not None
        found = data_by_name(str(given), self.named) if isinstance(given, str | Path) else data_of(given)
        outputs = self.outputs(dict(model.named_parameters())).shape[-1]
        if found.classes is not None and found.classes != outputs:
            raise BadFile(f"{given} has images of {found.classes} classes, and the head {outputs} outputs")
        return found if device == "cpu" else found.to(device)

    def outputs(self, theta: Mapping[str, Tensor]) -> Tensor:
        """Of the model with these values, on its example inputs. Needs a model."""
        assert self.named is not None
        device = next(iter(theta.values())).device
        call = Call.of(map_inputs(lambda x: x.to(device), self.named.inputs))
        caller = Caller(self.named.model, call)
        with torch.inference_mode(), ready(caller):
            values = {f"model.{name}": tensor for name, tensor in theta.items()}
            return torch.func.functional_call(caller, values, call.args, call.kwargs)[0][0]

    def check_function(self, theta: Tensors, perm: Perm) -> float:
        """The relative difference that a permutation makes to the outputs with the values ``theta``.

        Raises BadFile where it is more than `SAME_FUNCTION`.
        """
        before, after = self.outputs(theta), self.outputs(apply(self.spec, perm, theta))
        error = float((after - before).abs().max() / before.abs().max().clamp(min=1e-30))
        if not error <= SAME_FUNCTION:
            raise BadFile(
                f"the permuted network does not compute what the network computes: relative difference {error:.1e}"
            )
        return error


def subject(
    checkpoint: CheckpointFile,
    model: Model | None,
    inputs: Example = None,
    spec: Spec | None = None,
    device: str = "cpu",
) -> tuple[Subject, CheckpointFile]:
    """The network of a checkpoint, with a head of its classes, and the checkpoint under its names.

    Args:
        model: a name as `regraft.porting.models.by_name` takes it, or the module itself, which is not changed;
            None where ``spec`` is proven.
        inputs: of the model, batch first, or for a name their shape; its usual ones if not given.
        spec: its permutation groups, or their file; traced and proven on the model if not given.

    Raises ValueError for a model that is not found, traced or proven, BadFile where the checkpoint is not the model's.
    """
    if isinstance(spec, str | Path):
        spec = PermutationSpec.load(spec)
    if model is None:
        if spec is None:
            raise ValueError("a model is needed: a name, or a proven specification in its place")
        return _of_spec(checkpoint, spec)
    named = _named(model, inputs)
    if named.model is model:
        named = replace(named, model=copy.deepcopy(model))
    anatomy = Anatomy.of_model(named.model)
    found = fit(checkpoint, anatomy, is_base=False)
    if odd := unfit(found, anatomy):
        head = check_head(found, anatomy, odd)
        outputs = {found.entries[name].shape[0] for name in odd}
        if len(outputs) != 1:
            raise BadFile(f"{found.path}: the tensors of {head} have {sorted(outputs)} outputs")
        adopt(named.model, min(outputs), head=head)
        anatomy = Anatomy.of_model(named.model)
    named.model.to(device).requires_grad_(False)
    at = map_inputs(lambda x: x.to(device), named.inputs)
    if spec is None:
        spec = trace(named.model, at)
    if not spec.proven:
        verify(spec, named.model, at)
    return Subject(spec, anatomy, named), found


def _of_spec(checkpoint: CheckpointFile, spec: PermutationSpec) -> tuple[Subject, CheckpointFile]:
    if not spec.proven:
        raise ValueError(
            "the specification is not proven: give the model too, or make it with `regraft symmetry NAME --save FILE`"
        )
    anatomy = Anatomy.of_spec(spec)
    found = fit(checkpoint, anatomy, is_base=False)
    if odd := unfit(found, anatomy):
        check_head(found, anatomy, odd)
        spec = with_outputs(spec, found.entries, odd)
    return Subject(spec, Anatomy.of_spec(spec)), found


def _named(model: Model, inputs: Example) -> Named:
    if isinstance(inputs, Tensor | Mapping):
        example = inputs if isinstance(inputs, Tensor) else dict(inputs)
        named = by_name(model) if isinstance(model, str) else Named(model, example)
        return replace(named, inputs=example)
    if not isinstance(model, str):
        raise ValueError("a module needs example inputs: inputs=..., a tensor or keyword inputs")
    return by_name(model, inputs)


# ---------------------------------------------------------------- tensors of checkpoints, as methods take them


def lazy(checkpoint: CheckpointFile, like: CheckpointFile, device: str) -> Lazy:
    """The names of ``like``, floating in float32 on a device; what the checkpoint lacks is zero there."""

    def read(name: str) -> Tensor:
        if name not in checkpoint:
            return torch.zeros(like.entries[name].shape, device=device)
        tensor = checkpoint[name].to(device)
        return tensor.float() if tensor.is_floating_point() else tensor

    return Lazy(tuple(like.entries), read)


def numel(checkpoint: CheckpointFile) -> int:
    """Of all tensors together."""
    return sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
