"""The classifier of a model: which of its linear layers makes the logits, and how to replace it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from regraft.core.arguments import Count, check_arguments
from regraft.core.guard import same_settings, same_streams
from regraft.core.registry import register

# ---------------------------------------------------------------------------------------------------
# Finding it


@check_arguments
def find_head(model: nn.Module) -> str:
    """The name of the model's classifier: the linear layer that makes its output.

    A model's own answer (timm's ``get_classifier``) is taken. Otherwise the model is traced by torch.fx, without
    running it, and the last layer before the output is taken. If tracing fails, it is the linear layer whose output
    width differs from all inputs of linear layers.

    Raises ValueError, listing the candidates, if this is not exactly one linear layer.
    """
    modules = model.named_modules()
    linear: dict[nn.Module, str] = {module: name for name, module in modules if isinstance(module, nn.Linear)}
    if not linear:
        raise ValueError(f"{type(model).__name__} has no linear layer that could be its classifier")
    if hasattr(model, "get_classifier"):
        classifier = cast(Any, model).get_classifier()
        last: list[nn.Module] = list(classifier) if isinstance(classifier, tuple | list) else [classifier]
    else:
        traced = _trace_last_layers(model)
        last = _last_by_width(model) if traced is None else traced
    names = [linear.get(module) for module in last]
    if len(names) == 1 and names[0]:
        return names[0]
    what = type(model).__name__
    if len(names) > 1 and all(names):
        raise ValueError(
            f"{what} has {len(names)} layers that could be its classifier: {', '.join(map(str, names))}; "
            "name the one to use with head=..."
        )
    kinds = ", ".join(sorted({type(module).__name__ for module in last})) or "not one that could be found"
    raise ValueError(
        f"the last layer of {what} is not linear ({kinds}); if one of its linear layers makes the logits, "
        f"name it with head=... (it has {', '.join(list(linear.values())[-5:])})"
    )


def check_head(model: nn.Module, head: str) -> str:
    """The name, if it is that of a linear layer."""
    modules = dict(model.named_modules())
    if head not in modules:
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        raise ValueError(f"no layer {head!r}; the linear layers are {', '.join(linear[-5:]) or 'none'}")
    if not isinstance(modules[head], nn.Linear):
        raise ValueError(f"{head} is not linear but a {type(modules[head]).__name__}")
    return head


def linear_of(model: nn.Module, head: str) -> nn.Linear:
    """The layer of a name that was found or checked."""
    return cast(nn.Linear, model.get_submodule(head))


def _trace_last_layers(model: nn.Module) -> list[nn.Module] | None:
    """The last modules with parameters on every way to the output; None where fx cannot trace the model."""
    tracer = fx.Tracer()
    try:
        # A copy, but for its parameters, which are symbols here: what runs may write to buffers and attributes.
        symbolic = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        with same_settings(), same_streams():
            graph = tracer.trace(symbolic)
    except Exception:  # fx raises whatever the model raises when run on a symbol
        return None
    modules = dict(model.named_modules())
    last: dict[nn.Module, None] = {}
    seen: set[fx.Node] = set()
    waiting = list(next(node for node in graph.nodes if node.op == "output").all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        module = modules[node.target] if node.op == "call_module" else None
        if module is not None and next(module.parameters(), None) is not None:
            last[module] = None
        else:
            waiting.extend(node.all_input_nodes)
    return list(last)


def _last_by_width(model: nn.Module) -> list[nn.Module]:
    """The linear layers that feed no other, going by their widths."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = {module.in_features for module in linear}
    return [module for module in linear if module.out_features not in inputs]


# ---------------------------------------------------------------------------------------------------
# Replacing it

Initialiser = Callable[[Tensor, torch.Generator | None], object]
"""Fills a classifier's weight [classes, features] in place; draws from the generator where it is random."""


@register
def zero(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """Zero, as FAST has it: every class equally probable whatever the image (section 4.1.2, equation 15)."""
    nn.init.zeros_(weight)


def torch_default(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """What torch's own constructor draws: uniform within 1 / sqrt(features)."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)


@dataclass(frozen=True, eq=False)
class Adoption:
    """What `adopt` did: the classifier's name in the model, the new one, and the source's, detached.

    ``source_head`` has left the model and takes no gradient; `regraft.finetuning.recorder` uses it to measure
    forgetting.
    """

    name: str
    head: nn.Linear
    source_head: nn.Linear


@check_arguments
def adopt(
    model: nn.Module,
    num_classes: Count,
    *,
    head: str | None = None,
    initialise: Initialiser = zero,
    generator: torch.Generator | None = None,
) -> Adoption:
    """Give the model a new classifier for another task, in place, and keep the one that it had.

    Args:
        model: a classifier whose last layer is linear, of torchvision, timm or your own. Only that layer is replaced;
            the new one has the old one's width, device and dtype, and a bias (zero) where that had one.
        num_classes: of the new task.
        head: the name of the last layer, such as "fc" or "classifier.6"; found by `find_head` when not given.
        initialise: of the new weight; `zero` unless a baseline is wanted. Global random states stay as they are.
        generator: for an initialisation that is random; without one it draws from seed 0.

    Raises ValueError if there is no linear last layer, or several candidates (which the message names), if `head` is
    not a linear layer, or if the layer's weight is shared with another one.
    """
    name = find_head(model) if head is None else check_head(model, head)
    old = linear_of(model, name)
    for other, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is old.weight and other != f"{name}.weight":
            raise ValueError(f"{name}.weight is shared with {other}: replacing it would separate the two")
    like = {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}
    # Not the constructor: it draws initial values from torch's global random stream.
    fresh = torch.nn.utils.skip_init(nn.Linear, old.in_features, num_classes, **like).train(old.training)
    if generator is None and not fresh.weight.is_meta:
        generator = torch.Generator(device=fresh.weight.device).manual_seed(0)
    with torch.no_grad(), same_streams(fresh.weight.device):
        initialise(fresh.weight, generator)
        if fresh.bias is not None:
            fresh.bias.zero_()
    model.set_submodule(name, fresh)
    _say_classes(model, num_classes)
    source = copy.deepcopy(old).requires_grad_(False).eval()
    return Adoption(name, fresh, source)


def _say_classes(model: nn.Module, num_classes: int) -> None:
    """Update the number of classes where timm and transformers keep it, as their own functions do."""
    own: Any = model  # plain attributes, which torch does not know
    if hasattr(own, "get_classifier") and isinstance(getattr(own, "num_classes", None), int):
        own.num_classes = num_classes
    holder: Any
    for holder in (own, getattr(own, "config", None)):
        if isinstance(getattr(holder, "num_labels", None), int):
            holder.num_labels = num_classes
