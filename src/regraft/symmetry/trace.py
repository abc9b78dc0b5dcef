"""Finding a model's symmetry: export it, let unit labels flow through the graph, and group what may trade places.

The labels are those of :mod:`regraft.symmetry.labels`, each operator has a rule for them
(:mod:`regraft.symmetry.rules`), and :mod:`regraft.symmetry.groups` makes the specification.
"""

from __future__ import annotations

import contextlib
import operator
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from regraft.core.arguments import check_arguments
from regraft.core.forward import cause
from regraft.core.tensors import live_state
from regraft.core.text import clean_text
from regraft.symmetry import lines, products  # noqa: F401 (register their rules)
from regraft.symmetry.axes import Segment
from regraft.symmetry.calls import Call, Forward, Output, check_placed
from regraft.symmetry.copies import all_tensors, memory_key, overlapping, shadow
from regraft.symmetry.exports import (
    Exported,
    export,
    graph_inputs,
    graph_tensors,
    measure_sizes,
    quiet,
    unused_parameters,
)
from regraft.symmetry.groups import specify
from regraft.symmetry.labels import Choice, Event, Flow, Leaf, Value
from regraft.symmetry.pointwise import UNARY, pointwise
from regraft.symmetry.reasons import find_reasons, format_losses, reason_texts
from regraft.symmetry.rules import RULES, Operation, each_size, freeze_operands, operator_name
from regraft.symmetry.spec import PermutationSpec
from regraft.symmetry.verify import is_cheap, prove
from regraft.symmetry.views import ALIASES, VIEWS, apply_choice

EXPORTS = 3
"""A proof is made unasked where it costs less than so many exports."""


@check_arguments
def trace(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    forward: Forward = None,
    output: Output = None,
    other_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    verify: bool | None = None,
) -> PermutationSpec:
    """Finds which axes of a model's parameters and buffers share a permutation.

    The model is exported in evaluation mode (its own mode is left as it is) with ``example_inputs``: one tensor,
    the tuple of positional arguments, or a mapping of keyword arguments (``kwargs`` adds to them); small images and
    a small batch make it fast. ``forward``: what is called instead of the model, one of its methods by name or a
    function ``forward(model, *args, **kwargs)``. ``output``: the key or place of the output that must not change
    (or several); ``logits`` if not given, else the first tensor. By-products may be permuted. Caches are switched
    off. ``other_inputs``: a second example in which dimensions that may vary have another length, for the symmetry
    of both. It is needed where an input has a dimension of length 1 (one token): constants such as rotary angles
    agree there, and without it what meets them stays fixed, with a warning. Operators that the tracer does not know
    freeze what they touch, with one warning for each kind of operator.

    The specification names everything in the model's state dictionary, shared tensors under all of their names;
    what ``load_state_dict`` does not restore is a constant. ``verify``: also prove it
    (:func:`regraft.symmetry.verify`), and mark it as proven; if not given, where that costs less than three exports and
    the model can be proved. The printed specification says whether it was.

    Raises ValueError, naming the model's class, the module and the cause, where ``torch.export`` cannot trace the
    model, or where its tensors are without values or on several devices.
    """
    calls = Call.examples(example_inputs, other_inputs, kwargs, forward, output)
    check_placed(model, calls[0])
    shadowed = shadow(model)
    start = time.thread_time()
    programs = [program for call in calls for program in export(shadowed, call)]
    cost = time.thread_time() - start
    alone = len(calls) == 1 and calls[0].has_length_one
    try:
        flow, leaves = propagate_labels(programs, shadowed, length_one=alone)
    except Entangled:  # the functional form is slower to make: only where writing in place matters
        with quiet():
            functional = [p._replace(program=p.program.run_decompositions({})) for p in programs]
        flow, leaves = propagate_labels(functional, shadowed, length_one=alone)
    found = specify(flow, list(leaves.values()))
    reasons = find_reasons(flow, found, leaves.values())
    spec = replace(_name_everything(found, model, leaves), reasons=reason_texts(reasons))
    for note in flow.notes:
        _warn(note)
    for name, module in flow.lengths.distrusted.items():
        where = f" (in {module})" if module else ""
        _warn(
            f"operator {name}{where} meets constants that depend on a dimension of length 1 of the inputs: what it "
            "touches stays fixed; give a second example with another length (other_inputs) to see what may move"
        )
    for name, why in flow.frozen.items():
        _warn(f"operator {name}{why}: what it touches stays fixed")
    for loss in format_losses(reasons):
        _warn(loss)
    if idle := unused_parameters(programs, shadowed):
        name = type(model).__name__
        _warn(f"{len(idle)} parameters of {name} are not used and stay fixed, such as {idle[0]!r}")
    if verify or (verify is None and is_cheap(shadowed, calls, EXPORTS * cost)):
        try:
            prove(spec, model, calls, torch.Generator().manual_seed(0))
        except ValueError as error:
            if verify or not str(error).startswith("cannot verify"):
                raise
            _warn(f"not proved: {error}")
    return spec


def _warn(message: str) -> None:
    """A warning that points at the caller of :func:`trace`."""
    warnings.warn(clean_text(message), stacklevel=4)


def _name_everything(spec: PermutationSpec, model: nn.Module, leaves: Mapping[Hashable, Leaf]) -> PermutationSpec:
    """Adds the rest of the state dictionary: other names of shared tensors, and tensors that the graph lacks."""
    axes = dict(spec.axes)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or name in axes:
            continue
        leaf = leaves.get(memory_key(tensor))
        fixed = tuple((Segment(None, 0, length),) for length in tensor.shape)
        axes[name] = fixed if leaf is None else spec.axes[leaf.name]
    own = {name for name, _ in model.named_parameters()}
    return replace(spec, axes=axes, optional=frozenset(axes.keys() - own))


# ---- the walk


def propagate_labels(
    programs: Sequence[Exported], model: nn.Module, *, length_one: bool = False
) -> tuple[Flow, dict[Hashable, Leaf]]:
    """One pass of labels; every parameter and buffer that is saved is a leaf (by memory), which the graphs share."""
    flow = Flow()
    flow.lengths.one = length_one
    learned = set(map(memory_key, model.parameters()))
    saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    leaves: dict[Hashable, Leaf] = {}
    for name, tensor in live_state(model).items():
        key = memory_key(tensor)
        if id(tensor) in saved:
            leaves.setdefault(key, Leaf(name, tuple(tensor.shape), learned=key in learned))
    _freeze_shared(flow, model, leaves)
    for exported in programs:
        program = exported.program
        tensors = {**program.constants, **graph_tensors(model)}
        flow.sizes = measure_sizes(program)
        results = walk(flow, program.graph_module, _placeholder_values(flow, program, leaves, tensors))
        _finish(flow, exported, results, lambda name: _leaf_of(leaves, tensors.get(name)))  # noqa: B023
    return flow, leaves


def _leaf_of(leaves: Mapping[Hashable, Leaf], tensor: Any) -> Leaf | None:
    return leaves.get(memory_key(tensor)) if isinstance(tensor, Tensor) else None


def _freeze_shared(flow: Flow, model: nn.Module, leaves: Mapping[Hashable, Leaf]) -> None:
    """Of memory that is seen in several ways nothing moves: loading one tensor would write into the others."""
    names = {id(x): name for name, x in live_state(model).items()}
    tensors = list(all_tensors(model))
    for places in overlapping(tensors):
        cluster = [tensors[i] for i in places]
        keys = dict.fromkeys(map(memory_key, cluster))
        shared = [leaves[key] for key in keys if key in leaves]
        if len(keys) == 1 or not shared:
            continue
        for leaf in shared:
            flow.freeze(Value(leaf, leaf.shape))
        named = sorted({repr(names[id(x)]) for x in cluster if id(x) in names})
        flow.notes.append(f"{', '.join(named)} show the same memory in different layouts: they stay fixed")


def _write_to(flow: Flow, result: Value, leaf: Leaf) -> None:
    """What is written to a parameter or a buffer has its units: of every axis, where it is a function of a weight."""
    weight = flow.weight(result)
    if weight is None or result.shape != weight.shape:
        flow.join(flow.labels(result), flow.scalars(leaf))
        return
    for a in range(len(leaf.shape)):
        flow.join(flow.axis(weight, a), flow.axis(leaf, a))


def walk(flow: Flow, module: GraphModule, values: dict[Node, Any]) -> Any:
    """What comes out of a graph; ``values``: what goes in, at its placeholders."""
    for node in module.graph.nodes:
        if node.op == "call_function":
            flow.module, flow.node = _module(node), node
            plain = [n in flow.plain for n in node.all_input_nodes]
            flow.begin(Event(str(node.target), flow.module, any(plain)))
            if all(plain):
                flow.plain.add(node)
            flow.wanted = {user.args[1] for user in node.users if user.target is operator.getitem}
            try:
                values[node] = pass_through(flow, node, values)
            except (Entangled, ValueError):
                raise
            except Exception as error:
                where = f" in {flow.module}" if flow.module else ""
                raise ValueError(
                    f"operator {node.target}{where} cannot be traced ({cause(error, module)}); write the specification "
                    "by hand (PermutationSpec.build)"
                ) from error
        elif node.op == "get_attr":
            flow.plain.add(node)
            values[node] = getattr(module, node.target)
    return map_arg(module.graph.output_node().args[0], values.__getitem__)


def _module(node: Node) -> str:
    """The innermost module in which a node was made, and its class."""
    path, kind = next(reversed((node.meta.get("nn_module_stack") or {"": ("", "")}).values()))
    path = path.removeprefix("model").removeprefix(".")
    kind = (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
    return f"{path!r} ({kind})" if path else f"the model ({kind})" if kind not in ("", "Caller") else "the model"


def _placeholder_values(
    flow: Flow, program: ExportedProgram, leaves: Mapping[Hashable, Leaf], tensors: Mapping[str, Any]
) -> dict[Node, Any]:
    """The value of every placeholder: a leaf, a constant, or an input of the model, which is fixed."""
    values: dict[Node, Any] = {}
    for spec, node in graph_inputs(program):
        tensor = tensors.get(spec.target)
        leaf = _leaf_of(leaves, tensor)
        if leaf is not None and isinstance(tensor, Tensor) and (_is_floating(tensor) or _is_quantised(tensor, node)):
            values[node] = Value(leaf, leaf.shape)
        elif isinstance(tensor, Tensor):
            flow.plain.add(node)
            values[node] = tensor.detach().cpu().clone()  # operators may write into it
        else:
            flow.plain.add(node)
            content = node.meta.get("val")
            values[node] = flow.fixed_value(content.shape) if isinstance(content, Tensor) else content
    return values


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _is_quantised(tensor: Tensor, node: Node) -> bool:
    """Whether a small integer or a mask stands for a weight: nothing is done with it but casts and products."""
    targets = [user.target for user in node.users if isinstance(user.target, OpOverload)]
    used = {operator_name(target) for target in targets if target._schema.returns}
    return (
        tensor.ndim > 1 and tensor.dtype in (torch.int8, torch.uint8, torch.bool) and used <= {"to", "_to_copy", "mul"}
    )


def _finish(flow: Flow, exported: Exported, results: Sequence[Any], leaf_of: Callable[[Any], Leaf | None]) -> None:
    """The outputs that count never move; what is written to a buffer has the buffer's units."""
    outputs = 0
    flow.begin(Event("an output"))
    for spec, result in zip(exported.program.graph_signature.output_specs, results, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            outputs += 1
            if outputs > exported.counts:  # a by-product
                continue
        result, leaf = resolve(flow, result), leaf_of(spec.target)
        if isinstance(result, Value) and leaf is not None and tuple(leaf.shape) == result.shape:
            _write_to(flow, result, leaf)
        elif isinstance(result, Value):
            flow.freeze(result)


REGIONS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")
"""Parts of a graph that are computed at another precision, or without gradients: they are walked like the rest."""


def pass_through(flow: Flow, node: Node, values: dict[Node, Any]) -> Any:
    """The result of one operator: its rule on labels, the operator itself on constants."""
    target = node.target
    args: Any
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    if target is operator.getitem:
        return args[0][args[1]]
    leaves = pytree.tree_leaves((args, kwargs))
    if not isinstance(target, str) and target.__module__ == "_operator":  # an assertion about a size
        return target(*args)
    if target is torch.ops.aten.sym_size.int:
        return args[0].shape[args[1]]
    out = pytree.tree_map(lambda x: _size(flow, node, x) if isinstance(x, Tensor) else None, node.meta.get("val"))
    if str(target) in REGIONS:
        part = next(i for i, x in enumerate(args) if isinstance(x, GraphModule))
        inputs = args[part].graph.find_nodes(op="placeholder")
        return walk(flow, args[part], dict(zip(inputs, args[part + 1 :], strict=True)))
    if not isinstance(target, OpOverload):
        for x in leaves:
            resolve(flow, x)
        return unknown(flow, str(target), leaves, out)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": "cpu"}
    if any(isinstance(x, Choice) for x in leaves):
        result = _choices(flow, Operation.bind(target, args, kwargs, out))
        if result is not NotImplemented:
            return result
        args, kwargs = pytree.tree_map(lambda x: resolve(flow, x), (args, kwargs))
        leaves = pytree.tree_leaves((args, kwargs))
    if not target._schema.returns:  # an assertion
        return None
    if not any(isinstance(x, Value) for x in leaves) and torch.Tag.nondeterministic_seeded not in target.tags:
        result = target(*args, **kwargs)
        flow.lengths.record(operator_name(target), leaves, result)
        return result
    operation = Operation.bind(target, args, kwargs, out)
    if not target._schema.is_mutable:
        return operate(flow, operation)
    if not (operation.name in UNARY or operation.is_pointwise) or not _is_alone(node):
        raise Entangled
    result = operate(flow, operation)
    for same in _written_tensors(node):
        values[same] = result
    return result


def _size(flow: Flow, node: Node, result: Tensor) -> torch.Size:
    """The shape of a result, for the example inputs. Raises ValueError where it is not known."""
    known = [n.node.expr.subs(flow.sizes) if isinstance(n, torch.SymInt) else n for n in result.shape]
    if not all(isinstance(n, int) or n.is_Integer for n in known):
        where = f" in {flow.module}" if flow.module else ""
        raise ValueError(
            f"the size of the result of {node.target}{where} depends on the values of the inputs, and the tracer "
            "knows fixed sizes only; call the model in a form without it (a mask that multiplies), or write its "
            "specification by hand (PermutationSpec.build)"
        )
    return torch.Size(map(int, known))


def _choices(flow: Flow, operation: Operation) -> Any:
    """The result of an operator on a choice of units; NotImplemented, and the units frozen, where it is not known."""
    flow.operator = str(operation.target)
    mutable = operation.target._schema.is_mutable or not operation.target._schema.returns
    result = NotImplemented if mutable else apply_choice(flow, operation)
    if result is NotImplemented and operation.target._schema.returns:
        lines = [flow.new(x.line) for x in operation.leaves if isinstance(x, Choice)]
        freeze_operands(flow, lines, " of what was chosen")
    return result


def resolve(flow: Flow, x: Any) -> Any:
    """A choice among units that do not move is a value like any other."""
    if not isinstance(x, Choice):
        return x
    flow.freeze(x.line)
    return flow.fixed_value(x.shape)


def operate(flow: Flow, operation: Operation) -> Any:
    """By the operator's own rule, else as torch tags it."""
    flow.operator = str(operation.target)
    result: Any = NotImplemented
    if operation.name in RULES:
        with contextlib.suppress(AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # frozen below
            result = RULES[operation.name](flow, operation, *operation.arguments.values())
    if result is NotImplemented and operation.is_pointwise:
        result = pointwise(flow, operation)
    if result is NotImplemented:
        result = unknown(flow, flow.operator, operation.values, operation.out)
    return result


def unknown(flow: Flow, name: str, operands: Iterable[Any], out: Any) -> Any:
    """Freezes what an operator touches, and records a warning."""
    flow.operator = name
    freeze_operands(flow, operands, "")
    return each_size(flow.fixed_value, out)


# ---- writing in place


class Entangled(Exception):
    """An operator writes into a tensor that others may be views of."""


def _written_tensors(node: Node) -> list[Node]:
    """The tensors that a node writes in place: its own, and those that were written to give that one."""
    tensor = node.args[0]
    if not isinstance(tensor, Node):
        raise Entangled
    mutable = isinstance(tensor.target, OpOverload) and tensor.target._schema.is_mutable
    return [tensor, *(_written_tensors(tensor) if mutable else [])]


def _is_alone(node: Node) -> bool:
    """Whether the tensor that a node writes in place is new, and no view of it was made before."""
    *later, first = _written_tensors(node)
    before = {user for tensor in (*later, first) for user in tensor.users if user < node}
    return all(map(_is_new, [first, *(before - set(later))]))


def _is_new(node: Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return False
    return operator_name(node.target) not in ALIASES | UNARY | VIEWS and not node.target._schema.is_mutable
