"""The classifier of a model: which of its linear layers makes the logits."""

from __future__ import annotations

from torch import fx, nn


def find_head(model: nn.Module) -> str:
    """The name of the model's classifier: the linear layer that makes its output.

    A model that says so itself (timm's ``get_classifier``) is believed. Otherwise the model is traced by torch.fx,
    without running it, and the last layer on the way to the output is taken. Where it cannot be traced, it is the one
    linear layer whose output is no other linear layer's width.

    Raises ValueError where this is not exactly one linear layer; the message says what there is instead.
    """
    linear = {module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not linear:
        raise ValueError(f"{type(model).__name__} has no linear layer that could be its classifier")
    if hasattr(model, "get_classifier"):
        found = model.get_classifier()
        last = list(found) if isinstance(found, tuple | list) else [found]
    else:
        last = _by_tracing(model)
        if last is None:
            last = _by_width(list(linear))
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


def checked_head(model: nn.Module, head: str) -> str:
    """The name, if it is that of a linear layer."""
    modules = dict(model.named_modules())
    if head not in modules:
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        raise ValueError(f"no layer {head!r}; the linear layers are {', '.join(linear[-5:]) or 'none'}")
    if not isinstance(modules[head], nn.Linear):
        raise ValueError(f"{head} is not linear but a {type(modules[head]).__name__}")
    return head


def _by_tracing(model: nn.Module) -> list[nn.Module] | None:
    """The last modules with parameters on every way to the output; None where fx cannot trace the model."""
    tracer = fx.Tracer()
    try:
        graph = tracer.trace(model)
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


def _by_width(linear: list[nn.Linear]) -> list[nn.Module]:
    """The linear layers that feed no other, going by their widths."""
    inputs = {module.in_features for module in linear}
    return [module for module in linear if module.out_features not in inputs]
