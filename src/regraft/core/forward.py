"""Running a model on a batch: which part is input and which labels, and which part of the output the logits are.

A batch (`regraft.core.tensors.Batch`) is

- ``(images, labels)``, two tensors, or ``(inputs, labels)``, where the inputs are a tuple or list of positional
  arguments or a mapping of keyword arguments;
- ``(first, second, ..., labels)``: positional arguments, the labels last;
- ``{"input_ids": ..., "attention_mask": ..., "labels": ...}``: keyword arguments, and the labels, which are not passed.

The logits are the model's output, or its ``logits`` if the output is a mapping or an object (transformers'
``ModelOutput``); `with_output` selects them for any other model.
"""

from __future__ import annotations

import copy
import linecache
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from regraft.core.arguments import check_arguments
from regraft.core.labels import align_labels, are_integers
from regraft.core.tensors import Batch, Inputs, Loss, Tensors

# ---------------------------------------------------------------------------------------------------
# Batches


def split(batch: Batch, number: int = 0) -> tuple[Inputs, Tensor]:
    """(inputs, labels) of a batch; labels that are integers come as int64.

    Raises ValueError, with its number, for a batch of another form.
    """
    if isinstance(batch, Mapping):
        inputs: Inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels = batch.get("labels")
        lacking = f"a mapping of {', '.join(map(str, batch)) or 'nothing'}, with no tensor under 'labels'"
    else:
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        several = isinstance(batch, tuple | list) and len(batch) > 2
        inputs, labels = batch if pair else (tuple(batch[:-1]), batch[-1]) if several else ((), None)
        lacking = f"a {type(batch).__name__} that does not end with a tensor of labels"
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"batch {number} is {lacking}: give (inputs, labels), or a mapping of keyword arguments and 'labels'"
        )
    if labels.ndim == 0:
        raise ValueError(f"batch {number} has a single number as its labels: give a vector, one label an example")
    return inputs, labels.long() if are_integers(labels) else labels


def is_labelled(batch: Any) -> bool:
    """Whether a batch has labels. One of inputs alone is a tensor, a mapping without "labels", or one tensor in a
    tuple or list."""
    if isinstance(batch, Mapping):
        return "labels" in batch
    return not isinstance(batch, Tensor) and not (isinstance(batch, tuple | list) and len(batch) == 1)


def inputs_of(batch: Any, number: int = 0) -> Inputs:
    """The inputs of a batch with or without labels. Raises as `split`."""
    if is_labelled(batch):
        return split(batch, number)[0]
    inputs: Inputs = batch[0] if isinstance(batch, tuple | list) else batch
    return inputs


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: one tensor, a sequence of positional ones, or a mapping of keyword ones."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def map_inputs(change: Callable[[Tensor], Tensor], inputs: Inputs) -> Any:
    """The inputs with every tensor changed."""
    plain = dict(inputs) if isinstance(inputs, Mapping) else inputs
    return pytree.tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, plain)


def name_inputs(inputs: Inputs) -> Tensors:
    """The tensors among the inputs by a name for messages; one alone is "images"."""
    if isinstance(inputs, Tensor):
        return {"images": inputs}
    leaves, _ = pytree.tree_flatten_with_path(map_inputs(lambda x: x, inputs))
    return {pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def examples(inputs: Inputs) -> int:
    """The number of examples: the length of the first tensor. Raises ValueError if there is none."""
    first = next((tensor for tensor in name_inputs(inputs).values() if tensor.ndim), None)
    if first is None:
        raise ValueError("the inputs hold no tensor of examples")
    return len(first)


def portion(inputs: Inputs, begin: int, end: int) -> Any:
    """The inputs of the examples begin .. end - 1; tensors of another length are shared by all examples."""
    count = examples(inputs)
    return map_inputs(lambda x: x[begin:end] if x.ndim and len(x) == count else x, inputs)


# ---------------------------------------------------------------------------------------------------
# Answers


def call(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Inputs, where: str = "the batch") -> Tensor:
    """The model's logits with the values ``tensors``, in the mode in which the model is.

    Raises ValueError for an output without logits, and as `run`.
    """
    return logits_of(run(model, tensors, inputs, where), model)


def run(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Inputs, where: str = "the batch") -> Any:
    """The model's output, of any kind, with the values ``tensors``.

    In training mode BatchNorm writes its running statistics into ``tensors``, as torch does. Raises ValueError, saying
    where and what the inputs are, if the model cannot be run on them.
    """
    args, kwargs = arguments(inputs)
    with _explain(model, tensors, inputs, where):
        return torch.func.functional_call(model, dict(tensors), args, kwargs)


def answer(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(logits, labels) of the model with its own values, for a training step. Raises as `split` and `call`."""
    inputs, labels = split(batch)
    args, kwargs = arguments(inputs)
    with _explain(model, dict(model.named_parameters()), inputs, "the batch"):
        output = model(*args, **kwargs)
    return logits_of(output, model), labels


def loss_of(loss: Loss, logits: Tensor, labels: Tensor, where: str = "the batch") -> Tensor:
    """``loss(logits, labels)``: one number. Cross-entropy takes labels as `regraft.core.labels` has them, or
    probabilities of the classes, floating and of the logits' shape.

    Raises ValueError, saying where, for dtypes or devices that do not match, and for a loss that is no single number;
    what the loss itself raises passes through.
    """
    if takes_classes(loss, logits, labels):
        logits, labels = align_labels(logits, labels, where)
    try:
        value = loss(logits, labels)
    except Exception as problem:
        if type(problem) in PLAIN_ERRORS:
            _name_mismatch(problem, {"logits": logits}, {"labels": labels}, "the logits are", "the labels")
        problem.add_note(f"raised by the loss on {where}: logits {_form(logits)}, labels {_form(labels)}")
        raise
    if not isinstance(value, Tensor) or value.ndim:
        kind = _form(value) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{where}: the loss must be one number in a tensor, the mean over the batch, not {kind}")
    return value


def takes_classes(loss: Loss, logits: Tensor, labels: Tensor) -> bool:
    """Whether the loss is cross-entropy of classes; another loss checks its labels itself."""
    return loss is F.cross_entropy and not (labels.shape == logits.shape and labels.is_floating_point())


def part(result: Any, key: str | int) -> Any:
    """result[key] or result.key; None if there is neither."""
    if isinstance(result, Tensor):
        return result if key == 0 else None
    if isinstance(key, str) and not isinstance(result, Mapping):
        return getattr(result, key, None)
    try:
        return result[key]
    except (KeyError, IndexError, TypeError):
        return None


def logits_of(output: Any, model: nn.Module) -> Tensor:
    """The logits in a model's output. Raises ValueError, describing the output, if it has none."""
    if isinstance(output, Tensor):
        return output
    logits = part(output, "logits")
    if isinstance(logits, Tensor):
        return logits
    held = f" of {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
    raise ValueError(
        f"{type(model).__name__} answers with a {type(output).__name__}{held}, without logits: say which part they are "
        "by regraft.with_output(model, part)"
    )


@check_arguments
def with_output(model: nn.Module, output: str | int | Callable[[Any], Tensor]) -> nn.Module:
    """A view of the model (the same tensors and submodules, under the same names) that returns only the logits.

    output: the key, attribute or index of the logits in the model's output, or a function of the output. The view works
    wherever regraft takes a model, and shares all changes with it. Calling it raises ValueError if the output has no
    such part.
    """
    kind = type(model)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        result = kind.forward(self, *args, **kwargs)
        chosen = output(result) if callable(output) else part(result, output)
        if not isinstance(chosen, Tensor):
            raise ValueError(f"output {output!r} of {kind.__name__} is no tensor but {type(chosen).__name__}")
        return chosen

    view = copy.copy(model)
    view.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return view


@contextmanager
def _explain(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Inputs, where: str) -> Iterator[None]:
    """Say what the model was called with when it fails: torch's errors as a ValueError, all others with a note."""
    try:
        yield
    except Exception as problem:
        if type(problem) not in PLAIN_ERRORS:  # such as too little memory
            problem.add_note(f"raised by {type(model).__name__} on {where}")
            raise
        _name_mismatch(problem, tensors, inputs, "the parameters are", "the inputs")
        held = ", ".join(f"{name} {_form(tensor)}" for name, tensor in name_inputs(inputs).items()) or "no tensor"
        raise ValueError(
            f"{where}: {type(model).__name__} cannot be run on {held} ({cause(problem, model)})"
        ) from problem


PLAIN_ERRORS = (RuntimeError, NotImplementedError, IndexError, TypeError, ValueError)
"""What torch raises for inputs that do not fit a model."""


def _name_mismatch(problem: Exception, ours: Mapping[str, Tensor], theirs: Inputs, what: str, other: str) -> None:
    """Raise ValueError that names both dtypes or devices, if they differ; models may convert inputs."""
    for kind in ("device", "dtype"):
        a, b = _kinds(ours, kind), _kinds(name_inputs(theirs), kind)
        if a and b and not b <= a:
            said = str(problem).partition("\n")[0]
            raise ValueError(
                f"{what} {' and '.join(sorted(a))}, {other} {' and '.join(sorted(b))}: bring both to one {kind} "
                f"({said})"
            ) from problem


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def cause(error: BaseException, model: nn.Module) -> str:
    """One line: the module that raised an error, the line of its source, and the error's message."""
    names = {id(module): name for name, module in model.named_modules()}
    where = ""
    trail = error.__traceback__
    while trail is not None:
        module = trail.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in names and trail.tb_frame.f_code.co_name != "_call_impl":
            code = trail.tb_frame.f_code
            source = linecache.getline(code.co_filename, trail.tb_lineno).strip()
            if "torch/nn/modules/module.py" not in code.co_filename:
                named = f"module {names[id(module)]!r}" if names[id(module)] else "its own forward"
                where = f" in {named} ({type(module).__name__}) at `{source[:120]}`"
        trail = trail.tb_next
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}{where}: {message[:200]}"


def _kinds(tensors: Mapping[str, Tensor], kind: str) -> set[str]:
    """The dtypes of the floating tensors, or the devices of all."""
    return {str(getattr(tensor, kind)) for tensor in tensors.values() if kind == "device" or tensor.is_floating_point()}


# ---------------------------------------------------------------------------------------------------
# What happens inside


See = Callable[[str, tuple[Any, ...], Any], Any]
"""(module's name, its inputs, its output) -> None, or what replaces the output."""


@contextmanager
def hooks(modules: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Call `see` after every call of one of the modules; what it returns replaces the output."""
    handles = [
        module.register_forward_hook(lambda _module, inputs, output, name=name: see(name, inputs, output))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
