"""Finding a model's symmetry: export it, let unit labels flow through the graph, and group what may trade places.

The labels are those of :mod:`regraft.symmetry.labels`; what an operator does to them is its rule's affair
(:mod:`regraft.symmetry.rules`); :mod:`regraft.symmetry.groups` makes the specification.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from regraft.evaluation import evaluating
from regraft.symmetry import products  # noqa: F401 (its rules register themselves)
from regraft.symmetry.groups import specify
from regraft.symmetry.labels import Flow, Leaf, Value
from regraft.symmetry.pointwise import UNARY, pointwise
from regraft.symmetry.rules import RULES, Operation, freeze, operator_name
from regraft.symmetry.spec import PermutationSpec
from regraft.symmetry.views import ALIASES, VIEWS


def trace(model: nn.Module, example_inputs: Tensor | tuple[Any, ...]) -> PermutationSpec:
    """Finds which axes of a model's parameters and buffers share a permutation.

    The model is exported in evaluation mode (its own mode is left as it is) with ``example_inputs``: one tensor,
    or the tuple of positional arguments; small images and a small batch make it fast. Operators that the tracer
    does not know freeze what they touch, with one warning for each kind of operator.

    Raises ValueError, naming the model's class and the cause, where ``torch.export`` cannot trace the model.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    programs = export(model, inputs)
    try:
        flow, leaves = run(programs, model)
    except Entangled:  # the functional form is slower to make: only where writing in place matters
        flow, leaves = run([program.run_decompositions({}) for program in programs], model)
    spec = specify(flow, leaves)
    for name in flow.unknown:
        _warn(f"operator {name} is not known to the tracer: what it touches stays fixed")
    if idle := _unused(programs, model):
        name = type(model).__name__
        _warn(f"{len(idle)} parameters of {name} are not used and stay fixed, such as {idle[0]!r}")
    return spec


def _warn(message: str) -> None:
    """A warning that points at the caller of :func:`trace`."""
    warnings.warn(message, stacklevel=3)


# ---- export


def export(model: nn.Module, example_inputs: tuple[Any, ...]) -> list[ExportedProgram]:
    """The model's graph in evaluation mode; and, where that leaves parameters unused, the one with its auxiliary
    heads. Raises ValueError where torch.export cannot trace the model."""
    try:
        programs = [_export(model, example_inputs, heads=False)]
    except Exception as error:
        cause = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"torch.export cannot trace {type(model).__name__} ({type(error).__name__}: {cause}); trace it "
            "without data-dependent control flow, or write its specification by hand (PermutationSpec.build)"
        ) from error
    if _unused(programs, model):
        with contextlib.suppress(Exception):  # heads may need larger inputs
            programs.append(_export(model, example_inputs, heads=True))
    return programs


def _export(model: nn.Module, example_inputs: tuple[Any, ...], *, heads: bool) -> ExportedProgram:
    with evaluating(model, heads=heads), _quiet("torch._subclasses.fake_tensor"):
        return torch.export.export(model, example_inputs, strict=False)


@contextlib.contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """What fails inside is reported by an exception, not by a log."""
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _unused(programs: Sequence[ExportedProgram], model: nn.Module) -> list[str]:
    """The parameters that occur in no graph."""
    every = dict(model.named_parameters(remove_duplicate=False))
    used = {
        id(every[spec.target])
        for program in programs
        for spec, node in _inputs(program)
        if spec.target in every and node.users
    }
    return [name for name, parameter in model.named_parameters() if id(parameter) not in used]


def _inputs(program: ExportedProgram) -> Iterable[tuple[Any, Node]]:
    """What every placeholder of a graph stands for."""
    return zip(program.graph_signature.input_specs, program.graph.find_nodes(op="placeholder"), strict=True)


# ---- the walk


def run(programs: Sequence[ExportedProgram], model: nn.Module) -> tuple[Flow, list[Leaf]]:
    """One pass of labels; every parameter and buffer is a leaf that the graphs share."""
    flow = Flow()
    leaves = {
        id(tensor): Leaf(name, tuple(tensor.shape), learned=learned)
        for pairs, learned in ((model.named_parameters(), True), (model.named_buffers(), False))
        for name, tensor in pairs
    }
    for program in programs:
        held = {
            **program.constants,
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        values = _placed(flow, program, leaves, held)
        for node in program.graph.nodes:
            if node.op == "call_function":
                values[node] = call(flow, node, values)
            elif node.op == "get_attr":
                values[node] = getattr(program.graph_module, node.target)
            elif node.op == "output":
                results = map_arg(node.args[0], values.__getitem__)
                _finish(flow, program, results, leaves, held)
    return flow, list(leaves.values())


def _placed(
    flow: Flow, program: ExportedProgram, leaves: dict[int, Leaf], held: dict[str, Any]
) -> dict[Node, Any]:
    """The value of every placeholder: a leaf, a constant, or an input of the model, which is fixed."""
    values: dict[Node, Any] = {}
    for spec, node in _inputs(program):
        tensor = held.get(spec.target)
        if isinstance(tensor, Tensor) and id(tensor) in leaves and tensor.is_floating_point():
            values[node] = Value(leaves[id(tensor)], tuple(tensor.shape))
        elif isinstance(tensor, Tensor):
            values[node] = tensor.detach().cpu().clone()  # operators may write into it
        else:
            content = node.meta.get("val")
            values[node] = flow.fixed(content.shape) if isinstance(content, Tensor) else content
    return values


def _finish(
    flow: Flow,
    program: ExportedProgram,
    results: Sequence[Any],
    leaves: dict[int, Leaf],
    held: dict[str, Any],
) -> None:
    """Results never move; what is written to a buffer has the buffer's units."""
    for spec, result in zip(program.graph_signature.output_specs, results, strict=True):
        leaf = leaves.get(id(held.get(spec.target)))
        if not isinstance(result, Value):
            continue
        if leaf is None or tuple(leaf.shape) != result.shape:
            flow.freeze(result)
        else:
            flow.join(flow.labels(result), flow.scalars(leaf))


def call(flow: Flow, node: Node, values: dict[Node, Any]) -> Any:
    """What one operator does to labels; to constants it does what it always does."""
    target = node.target
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    if target is operator.getitem:
        return args[0][args[1]]
    given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Value)]
    out = pytree.tree_map(lambda x: x.shape if isinstance(x, Tensor) else None, node.meta.get("val"))
    if not isinstance(target, OpOverload):
        return unknown(flow, str(target), given, out)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": "cpu"}
    if not given and torch.Tag.nondeterministic_seeded not in target.tags:
        return target(*args, **kwargs)
    if not target._schema.returns:  # an assertion
        return None
    operation = Operation.bind(target, args, kwargs, out)
    if not target._schema.is_mutable:
        return operate(flow, operation)
    if not (operation.name in UNARY or operation.is_pointwise) or not _is_alone(node):
        raise Entangled
    result = operate(flow, operation)
    for same in _written(node):
        values[same] = result
    return result


def operate(flow: Flow, operation: Operation) -> Any:
    """By the operator's own rule, else as torch tags it."""
    result = NotImplemented
    if operation.name in RULES:
        result = RULES[operation.name](flow, operation, *operation.arguments.values())
    if result is NotImplemented and operation.is_pointwise:
        result = pointwise(flow, operation)
    if result is NotImplemented:
        result = unknown(flow, str(operation.target), operation.values, operation.out)
    return result


def unknown(flow: Flow, name: str, given: Iterable[Value], out: Any) -> Any:
    """Freezes what an operator touches, and remembers to say so."""
    flow.unknown[name] = None
    return freeze(flow, out, given)


# ---- writing in place


class Entangled(Exception):
    """An operator writes into a tensor that others may be views of."""


def _written(node: Node) -> list[Node]:
    """The tensors that a node writes in place: its own, and those that were written to give that one."""
    tensor = node.args[0]
    if not isinstance(tensor, Node):
        raise Entangled
    mutable = isinstance(tensor.target, OpOverload) and tensor.target._schema.is_mutable
    return [tensor, *(_written(tensor) if mutable else [])]


def _is_alone(node: Node) -> bool:
    """Whether the tensor that a node writes in place is new, and no view of it was made before."""
    *later, first = _written(node)
    before = {user for tensor in (*later, first) for user in tensor.users if user < node}
    return all(map(_is_new, [first, *(before - set(later))]))


def _is_new(node: Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return False
    return operator_name(node.target) not in ALIASES | UNARY | VIEWS and not node.target._schema.is_mutable
