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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from regraft.core.arguments import check_arguments
from regraft.core.tensors import Batch, Inputs, Loss, Tensors

# ---------------------------------------------------------------------------------------------------
# Batches


def split(batch: Batch, number: int = 0) -> tuple[Inputs, Tensor]:
    """(inputs, labels) of a batch. Raises ValueError, with its number, for a batch of another form."""
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
    return inputs, labels


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


def call(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    """The model's logits with the values ``tensors``, in the mode in which the model is.

    Raises ValueError for an output without logits, and as `run`.
    """
    return logits_of(run(model, tensors, inputs), model)


def run(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Inputs) -> Any:
    """The model's output, of any kind, with the values ``tensors``.

    In training mode BatchNorm writes its running statistics into ``tensors``, as torch does. Raises ValueError, naming
    both, for values and inputs whose dtypes or devices do not match.
    """
    args, kwargs = arguments(inputs)
    with _explain_mismatch(tensors, inputs):
        return torch.func.functional_call(model, dict(tensors), args, kwargs)


def answer(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(logits, labels) of the model with its own values, for a training step. Raises as `split` and `call`."""
    inputs, labels = split(batch)
    args, kwargs = arguments(inputs)
    with _explain_mismatch(model, inputs):
        output = model(*args, **kwargs)
    return logits_of(output, model), labels


def loss_of(loss: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    """``loss(logits, labels)``. Raises ValueError, naming both, for dtypes or devices that do not match."""
    with _explain_mismatch({"logits": logits}, {"labels": labels}, "the logits are", "the labels"):
        return loss(logits, labels)


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
def _explain_mismatch(
    ours: Mapping[str, Tensor] | nn.Module,
    theirs: Inputs,
    what: str = "the parameters are",
    other: str = "the inputs",
) -> Iterator[None]:
    """Rephrase torch's error so that it names both dtypes or devices, if they differ; models may convert inputs."""
    try:
        yield
    except RuntimeError as problem:
        if type(problem) not in (RuntimeError, NotImplementedError):  # such as too little memory
            raise
        held = dict(ours.named_parameters()) if isinstance(ours, nn.Module) else ours
        for kind in ("device", "dtype"):
            a, b = _kinds(held, kind), _kinds(name_inputs(theirs), kind)
            if a and b and not b <= a:
                said = str(problem).partition("\n")[0]
                raise ValueError(
                    f"{what} {' and '.join(sorted(a))}, {other} {' and '.join(sorted(b))}: bring both to one {kind} "
                    f"({said})"
                ) from problem
        raise


def _kinds(tensors: Mapping[str, Tensor], kind: str) -> set[str]:
    """The dtypes of the floating tensors, or the devices of all."""
    return {
        str(getattr(tensor, kind))
        for tensor in tensors.values()
        if kind == "device" or tensor.is_floating_point()
    }
