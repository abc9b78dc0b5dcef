"""What is traced and proved: a model, what it is called with, and which of its outputs counts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from regraft.core.forward import arguments, part
from regraft.core.guard import evaluating
from regraft.symmetry.copies import to_double

Forward = str | Callable[..., Any] | None
"""A method of the model by name, or a function ``forward(model, *args, **kwargs)``; None: the model itself."""

Output = str | int | Sequence[str | int] | None
"""The key, attribute or place of the output that counts, or several; None: ``logits``, else the first tensor."""


@dataclass(frozen=True)
class Call:
    """One call of a model: positional and keyword inputs, what is called, and the output that counts."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    forward: Forward = None
    output: Output = None

    @classmethod
    def of(
        cls,
        inputs: Any,
        kwargs: Mapping[str, Any] | None = None,
        forward: Forward = None,
        output: Output = None,
    ) -> Call:
        """``inputs``: one tensor, a tuple of positional inputs, or a mapping of keyword inputs."""
        args, keywords = arguments(inputs)
        return cls(args, {**keywords, **(kwargs or {})}, forward, output)

    @classmethod
    def examples(cls, inputs: Any, other: Any, kwargs: Mapping[str, Any] | None, *options: Any) -> list[Call]:
        """One call, or two where there is a second example: it has the first one's ``kwargs``, but for its own."""
        if other is None:
            return [cls.of(inputs, kwargs, *options)]
        args, own = arguments(other)
        return [cls.of(inputs, kwargs, *options), cls.of(args, {**(kwargs or {}), **own}, *options)]

    @property
    def has_length_one(self) -> bool:
        """Whether a tensor that goes in has a dimension of length 1."""
        return any(1 in x.shape for x in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor))

    def lengthen(self) -> Call | None:
        """With the dimensions of length 1, but for the first, of length 2; None where there are none."""

        def is_short(x: Any) -> bool:
            return isinstance(x, Tensor) and 1 in x.shape[1:]

        def twice(x: Any) -> Any:
            return x.repeat([2 if d and n == 1 else 1 for d, n in enumerate(x.shape)]) if is_short(x) else x

        if not any(map(is_short, pytree.tree_leaves((self.args, self.kwargs)))):
            return None
        args, kwargs = pytree.tree_map(twice, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def double(self) -> Call:
        """With floating inputs in float64."""
        args, kwargs = pytree.tree_map(lambda x: to_double(x) if isinstance(x, Tensor) else x, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def run(self, model: nn.Module, *, heads: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs that count, and by-products. With auxiliary ``heads`` every output counts."""
        return Caller(model, self, heads).forward(*self.args, **self.kwargs)


class Caller(nn.Module):
    """The call as a module: its result is what counts and by-products, in two lists."""

    def __init__(self, model: nn.Module, call: Call, heads: bool = False) -> None:
        super().__init__()
        self.model, self.call, self.heads = model, call, heads

    def forward(self, *args: Any, **kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
        forward = self.call.forward
        if forward is None:
            result = self.model(*args, **kwargs)
        elif isinstance(forward, str):
            result = getattr(self.model, forward)(*args, **kwargs)
        elif getattr(forward, "__self__", None) is not None:  # bound: of a copy it is the copy's own method
            result = getattr(self.model, forward.__name__)(*args, **kwargs)
        else:
            result = forward(self.model, *args, **kwargs)
        tensors = _tensors(result)
        chosen = tensors if self.heads else _choose_outputs(result, self.call.output, type(self.model).__name__)
        counts = {id(tensor) for tensor in chosen}
        return chosen, [tensor for tensor in tensors if id(tensor) not in counts]


@contextlib.contextmanager
def ready(model: nn.Module, *, heads: bool = False) -> Iterator[None]:
    """Inside, the model is in evaluation mode (`regraft.core.guard.evaluating`) and keeps no caches. With ``heads`` its
    own modules are in training mode, but nothing drops out."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    caching = [c for c in configs.values() if getattr(c, "use_cache", None) is True]
    for config in caching:
        config.use_cache = False
    try:
        with evaluating(model, heads=heads), _WithoutDropout() if heads else contextlib.nullcontext():
            yield
    finally:
        for config in caching:
            config.use_cache = True


class _WithoutDropout(TorchFunctionMode):
    """Inside, dropout gives back what it is given."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "dropout" in getattr(function, "__name__", ""):
            return args[0] if args else (kwargs or {})["input"]
        return function(*args, **(kwargs or {}))


def check_placed(model: nn.Module, call: Call) -> None:
    """Raises ValueError for a model without values, on several devices, or elsewhere than its inputs."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    inputs = [x for x in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor)]
    name = type(model).__name__
    for tensor_name, tensor in named.items():
        if tensor.is_meta:
            raise ValueError(
                f"tensor {tensor_name!r} of {name} is on the meta device, without values: "
                "give it some first (model.to_empty and its initialisation, or a checkpoint)"
            )
        if is_lazy(tensor):
            raise ValueError(f"tensor {tensor_name!r} of {name} has no shape yet: call the model once first")
        if tensor.ndim > 1 and tensor.numel() == 0:
            raise ValueError(f"tensor {tensor_name!r} of {name} holds nothing: its shape is {list(tensor.shape)}")
    devices = {t.device: f"tensor {n!r}" for n, t in reversed(named.items())}
    devices |= {t.device: "an input" for t in inputs if t.device not in devices}
    if len(devices) > 1:
        places = ", ".join(f"{what} on {device}" for device, what in devices.items())
        raise ValueError(f"{name} is on several devices ({places}): move model and inputs to one")


# ---- outputs


def _choose_outputs(result: Any, output: Output, name: str) -> list[Tensor]:
    if isinstance(output, Sequence) and not isinstance(output, str):
        return [tensor for one in output for tensor in _choose_outputs(result, one, name)]
    if output is None:
        logits = part(result, "logits")
        chosen = logits if isinstance(logits, Tensor) else next(iter(_tensors(result)), None)
        if chosen is None:
            raise ValueError(
                f"the output of {name} is no tensor and holds none (it is of type {type(result).__name__}); "
                "choose a forward that gives one"
            )
        return [chosen]
    chosen = part(result, output)
    if not isinstance(chosen, Tensor):
        kind = "there is none" if chosen is None else f"it is of type {type(chosen).__name__}"
        raise ValueError(f"output {output!r} of {name} is no tensor: {kind}")
    return [chosen]


def _tensors(result: Any) -> list[Tensor]:
    """The tensors of a result, in order, those of caches left out."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Mapping):
        parts = [part for key, part in result.items() if key != "past_key_values"]
    elif isinstance(result, list | tuple):
        parts = list(result)
    elif is_dataclass(result):
        parts = [getattr(result, f.name) for f in fields(result)]
    else:
        parts = []
    return list({id(t): t for part in parts if "Cache" not in type(part).__name__ for t in _tensors(part)}.values())
