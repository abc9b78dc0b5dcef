"""The network that checkpoints are of: its names, its proven symmetry, and how it is run."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from regraft.core.arguments import Device
from regraft.core.files import BadFile
from regraft.core.forward import map_inputs
from regraft.core.tensors import Perm, Tensors, digest_tensors
from regraft.networks.heads import adopt, find_head, linear_of
from regraft.porting.checkpoint_files import CheckpointFile
from regraft.porting.data import Data, data_by_name, data_of, to_place
from regraft.porting.fitting import (
    StateLayout,
    describe_unfit,
    find_other_head,
    fit_names,
    fit_outputs,
    list_new_parts,
    list_unfit,
)
from regraft.porting.models import NamedModel, by_name
from regraft.symmetry import PermutationSpec, apply, trace, verify
from regraft.symmetry.calls import Call, Caller, ready

SAME_FUNCTION = 1e-3
"""The largest relative difference between a network's outputs and a permuted one's, in float32."""

Example = Tensor | Mapping[str, Tensor] | Sequence[int] | None
"""Example inputs, or the shape of a named model's, or its usual ones."""


class Settings(TypedDict, total=False):
    """What every job on checkpoints takes besides their paths.

    model: a name as `regraft.porting.models.by_name` takes it, or the module itself, which is not changed; streamed
        jobs need none where ``spec`` is proven.
    inputs: example inputs of the model, batch first, or for a named model their shape; its usual ones if not given.
    spec: its proven permutation groups, or their file; traced and proven on the model if not given.
    data: a folder of images or ``module:function`` (`data_by_name`), or batches (`data_of`), to measure on.
    key: which network of a file that holds several, such as "ema"; needed for those alone.
    max_memory: bytes that the process may hold; what the machine has if not given.
    device: where to compute; the CPU if not given.
    """

    model: str | nn.Module | None
    inputs: Example
    spec: PermutationSpec | Path | str | None
    data: object
    key: str | None
    max_memory: int | None
    device: Device


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """What all checkpoints of one job must fit.

    Attributes:
        spec: proven permutation groups, of the names in `layout`.
        named: the model with its inputs; None where a specification stands for it.
    """

    spec: PermutationSpec
    layout: StateLayout
    named: NamedModel | None = None

    @property
    def model(self) -> nn.Module | None:
        return None if self.named is None else self.named.model

    @property
    def head(self) -> str:
        """The name of the layer that makes the output. Raises ValueError where there is none, or no model."""
        return find_head(self.require_model().model)

    @property
    def device(self) -> str:
        return "cpu" if self.model is None else str(next(self.model.parameters()).device)

    @property
    def parameters(self) -> set[str]:
        """The names of the parameters; without a model, of all that no buffer is known to be."""
        if self.model is None:
            return set(self.spec.axes.keys() - self.spec.optional)
        return {name for name, _ in self.model.named_parameters()}

    def fit_base(self, checkpoint: CheckpointFile) -> CheckpointFile:
        """A base under the model's names, without the tensors of another head.

        Raises BadFile, naming file and tensor, where anything but a head does not fit.
        """
        base = fit_names(checkpoint, self.layout, is_base=True)
        new = set(list_new_parts(base, self.layout))
        tables = self._list_tables(base)
        odd = [name for name in list_unfit(base, self.layout) if name not in new and name not in tables]
        if odd:
            head = find_other_head(base, self.layout, odd)
            if not self._makes_output(head):
                raise BadFile(f"{describe_unfit(base, self.layout, odd)} It is no classifier's.")
            fit_outputs(self.spec, base.entries, odd)
        base = replace(base, notes=(*base.notes, *tables.values()))
        return base.without(base.entries.keys() & set(odd), "its head is of other classes")

    def _list_tables(self, base: CheckpointFile) -> dict[str, str]:
        """The embeddings of which a base has more or fewer rows -> a note that says so."""
        if self.model is None:
            return {}
        tables = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        notes = {}
        for name in (name for name, tensor in self.model.named_parameters() if id(tensor) in tables):
            shape = self.layout.shapes[name]
            own = base.entries[name].shape if name in base else shape
            if own != shape and own[1:] == shape[1:]:
                what = "the fine-tune's own" if own[0] < shape[0] else "left out"
                notes[name] = (
                    f"{name} has {own[0]} rows, the fine-tune's {shape[0]}: those that both have are moved, the others "
                    f"are {what}"
                )
        return notes

    def _makes_output(self, head: str) -> bool:
        """Whether a module makes the model's output; without a model, whether it has a bias, as no table has."""
        if self.model is None:
            return f"{head}.bias" in self.layout.shapes
        return makes_output(self.require_model(), head)

    def identity(self) -> dict[str, str]:
        """Digests of all that decides results besides the checkpoints, by what it is called."""
        identity = {
            "specification": hashlib.sha256(self.spec.to_json().encode()).hexdigest(),
            "device": self.device,
        }
        if self.named is None:
            return identity
        inputs = self.named.inputs
        shown = repr(self.named.model)
        for kind in dict.fromkeys(type(module) for module in self.named.model.modules()):
            with suppress(OSError, TypeError):  # of a class that was typed in, there is no source
                shown += inspect.getsource(kind)
        return identity | {
            "code of the model": hashlib.sha256(shown.encode()).hexdigest(),
            "shape or values of the example inputs": digest_tensors(
                inputs if isinstance(inputs, Mapping) else {"": inputs}
            ),
        }

    def require_model(self) -> NamedModel:
        """The model, to run on data. Raises ValueError where there is none."""
        if self.named is None:
            raise ValueError("data are given, but no model to run on them")
        return self.named

    def load_data(self, settings: Settings) -> Data | None:
        """Data as `data_by_name` or `data_of` take them. Raises BadFile where their classes are not the head's."""
        data, device = settings.get("data"), settings.get("device", "cpu")
        if data is None:
            return None
        named = self.require_model()
        loaded = data_by_name(str(data), named) if isinstance(data, str | Path) else data_of(data)
        outputs = self.outputs(dict(named.model.named_parameters())).shape[-1]
        if loaded.classes is not None and loaded.classes != outputs:
            raise BadFile(f"{data} has images of {loaded.classes} classes, and the head {outputs} outputs")
        dtype = next(p.dtype for p in named.model.parameters() if p.is_floating_point())
        return loaded if device == "cpu" and dtype != torch.float64 else loaded.to(device, dtype)

    def outputs(self, theta: Mapping[str, Tensor]) -> Tensor:
        """Of the model with these values, on its example inputs. Needs a model."""
        named = self.require_model()
        device = next(iter(theta.values())).device
        call = Call.of(map_inputs(lambda x: x.to(device), named.inputs))
        caller = Caller(named.model, call)
        with torch.inference_mode(), ready(caller):
            values = {f"model.{name}": tensor for name, tensor in theta.items()}
            first: Tensor = torch.func.functional_call(caller, values, call.args, call.kwargs)[0][0]
            return first

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


def find_model_spec(
    checkpoint: CheckpointFile, settings: Settings, dtype: torch.dtype = torch.float32
) -> tuple[ModelSpec, CheckpointFile]:
    """The network of a checkpoint, with a head of its classes, and the checkpoint under its names.

    dtype: float64 where that is computed in, too.
    Raises ValueError for a model that is not found, traced or proven, BadFile where the checkpoint is not the model's.
    """
    model, spec = settings.get("model"), settings.get("spec")
    if isinstance(spec, str | Path):
        spec = PermutationSpec.load(spec)
    if model is None:
        if spec is None:
            raise ValueError("a model is needed: a name, or a proven specification in its place")
        return _fit_spec(checkpoint, spec)
    named = _name_model(model, settings.get("inputs"))
    if named.model is model:
        named = replace(named, model=copy.deepcopy(model))
    layout = StateLayout.of_model(named.model)
    checkpoint = fit_names(checkpoint, layout, is_base=False)
    if odd := list_unfit(checkpoint, layout):
        head = find_other_head(checkpoint, layout, odd)
        if not makes_output(named, head):
            raise BadFile(f"{describe_unfit(checkpoint, layout, odd)} It is no classifier's.")
        outputs = {checkpoint.entries[name].shape[0] for name in odd}
        if len(outputs) != 1:
            raise BadFile(f"{checkpoint.path}: the tensors of {head} have {sorted(outputs)} outputs")
        adopt(named.model, min(outputs), head=head)
        layout = StateLayout.of_model(named.model)
    device = settings.get("device", "cpu")
    named.model.to(device).requires_grad_(False)
    if dtype == torch.float64:
        named.model.double()
    example = map_inputs(partial(to_place, device=device, dtype=dtype), named.inputs)
    named = replace(named, inputs=example)
    if spec is None:
        spec = trace(named.model, example, verify=False)
    if not spec.proven:
        verify(spec, named.model, example)
    return ModelSpec(spec, layout, named), checkpoint


def find_untraced(model: str | nn.Module, settings: Settings, outputs: int, dtype: torch.dtype) -> ModelSpec:
    """A network with a head of so many outputs, of which no unit moves: neither traced nor proven.

    Raises ValueError for a model that is not found, or whose head is not (`regraft.networks.heads.find_head`).
    """
    named = _name_model(model, settings.get("inputs"))
    named = replace(named, model=copy.deepcopy(named.model) if named.model is model else named.model)
    head = linear_of(named.model, find_head(named.model))
    if head.out_features != outputs:
        adopt(named.model, outputs)
    device = settings.get("device", "cpu")
    named.model.to(device, dtype).requires_grad_(False)
    named = replace(named, inputs=map_inputs(partial(to_place, device=device, dtype=dtype), named.inputs))
    layout = StateLayout.of_model(named.model)
    spec = PermutationSpec.build({}, layout.shapes, layout.optional)
    return ModelSpec(spec, layout, named)


def makes_output(named: NamedModel, module: str) -> bool:
    """Whether a module is linear and as wide as the model's output: a head."""
    head = named.model.get_submodule(module)
    if not isinstance(head, nn.Linear):
        return False
    model_spec = ModelSpec(PermutationSpec({}, {}), StateLayout({}), named)
    return model_spec.outputs(dict(named.model.named_parameters())).shape[-1] == head.out_features


def _fit_spec(checkpoint: CheckpointFile, spec: PermutationSpec) -> tuple[ModelSpec, CheckpointFile]:
    if not spec.proven:
        raise ValueError(
            "the specification is not proven: give the model too, or make it with `regraft symmetry NAME --save FILE`"
        )
    layout = StateLayout.of_spec(spec)
    checkpoint = fit_names(checkpoint, layout, is_base=False)
    if odd := list_unfit(checkpoint, layout):
        if not ModelSpec(spec, layout)._makes_output(find_other_head(checkpoint, layout, odd)):
            raise BadFile(f"{describe_unfit(checkpoint, layout, odd)} Whether it is a head only a model tells.")
        spec = fit_outputs(spec, checkpoint.entries, odd)
    return ModelSpec(spec, StateLayout.of_spec(spec)), checkpoint


def _name_model(model: str | nn.Module, inputs: Example) -> NamedModel:
    if isinstance(inputs, Tensor | Mapping):
        example = inputs if isinstance(inputs, Tensor) else dict(inputs)
        named = by_name(model) if isinstance(model, str) else NamedModel(model, example)
        return replace(named, inputs=example)
    if not isinstance(model, str):
        raise ValueError("a module needs example inputs: inputs=..., a tensor or keyword inputs")
    return by_name(model, inputs)
