"""What operators do to labels: one rule for each, in views.py, pointwise.py and products.py.

To teach the tracer an operator, write one function in one of these files and register it with ``@rule``, or add
the operator's name to a rule that fits. Nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from regraft.symmetry.labels import Flow, Value


@dataclass(frozen=True)
class Operation:
    """One call of an operator in a graph.

    ``arguments``: all of them by name, in the order of the operator's schema, defaults filled in. Tensors are
    :class:`Value`, or tensors where they are constants. ``out``: the shape of the result, or of each of several.
    """

    target: OpOverload
    arguments: dict[str, Any]
    out: Any

    @classmethod
    def bind(cls, target: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Operation:
        """From the arguments of a call, by place and by name."""
        arguments = {
            argument.name: args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            for i, argument in enumerate(target._schema.arguments)
        }
        return cls(target, arguments, out)

    @property
    def name(self) -> str:
        return operator_name(self.target)

    @property
    def is_pointwise(self) -> bool:
        """Whether torch says that every scalar of the result is computed from those at its place."""
        return torch.Tag.pointwise in self.target.tags

    @cached_property
    def values(self) -> list[Value]:
        """The arguments that are no constants, those in lists included."""
        return [x for x in self.leaves if isinstance(x, Value)]

    @cached_property
    def leaves(self) -> list[Any]:
        """All arguments, lists taken apart."""
        return pytree.tree_leaves(list(self.arguments.values()))

    def run(self, arguments: Sequence[Any]) -> Any:
        """The operator itself, on arguments in the order of the schema."""
        pairs = list(zip(self.target._schema.arguments, arguments, strict=True))
        keywords = {argument.name: x for argument, x in pairs if argument.kwarg_only}
        return self.target(*[x for argument, x in pairs if not argument.kwarg_only], **keywords)


def operator_name(target: OpOverload) -> str:
    """The operator's name, that of its functional form where it works in place."""
    return target._schema.name.partition("::")[2].rstrip("_")


Rule = Callable[..., Any]
"""``rule(flow, operation, *arguments)`` -> a :class:`Value` (or a constant) for every result; NotImplemented where
it does not know such arguments."""

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for operators of these names (all their overloads, in place or not)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def each_size(make: Callable[[torch.Size], Any], out: Any) -> Any:
    """``make`` of the shape of every result."""
    return pytree.tree_map(make, out, is_leaf=is_size)


def first_of(flow: Flow, out: Any, value: Value) -> Any:
    """The result alone, or the first of several (the others are saved for a backward pass)."""
    return value if is_size(out) else [value, *(flow.fixed_value(size) for size in out[1:])]


def is_size(x: Any) -> bool:
    return isinstance(x, torch.Size)


def freeze(flow: Flow, out: torch.Size, values: Iterable[Any], why: str = " with such operands") -> Value:
    """Always correct: nothing that goes in moves, and nothing that comes out. A warning says ``why``."""
    freeze_operands(flow, values, why)
    return flow.fixed_value(out)


def freeze_operator(flow: Flow, op: Operation, values: Iterable[Any]) -> Any:
    """The same for an operator with any number of results."""
    freeze_operands(flow, values)
    return each_size(flow.fixed_value, op.out)


def freeze_operands(flow: Flow, values: Iterable[Any], why: str = " with such operands") -> None:
    """Nothing that goes in moves."""
    moving = [value for value in values if isinstance(value, Value) and not flow.stays(value)]
    if moving:
        where = f" (in {flow.module})" if flow.module else ""
        flow.frozen.setdefault(flow.operator, f"{why} is not known to the tracer{where}")
    for value in moving:
        flow.freeze(value)
