"""A model's graph, by torch.export."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from regraft.core.forward import cause
from regraft.symmetry.calls import Call, Caller, ready


class Exported(NamedTuple):
    """A graph, and how many of its first outputs must not change."""

    program: ExportedProgram
    counts: int


def export(model: nn.Module, call: Call) -> list[Exported]:
    """The model's graph in evaluation mode; and, where that leaves parameters unused, the one with its auxiliary
    heads. Raises ValueError where torch.export cannot trace the model."""
    try:
        programs = [_export(model, call)]
    except Exception as error:
        raise ValueError(
            f"torch.export cannot trace {type(model).__name__} ({cause(error, model)}); trace it without "
            "data-dependent control flow, or write its specification by hand (PermutationSpec.build)"
        ) from None
    if idle := unused_parameters(programs, model):
        with contextlib.suppress(Exception):  # heads may need larger inputs
            more = _export(model, call, heads=True)
            if not any(map(_is_random, more.program.graph.nodes)) and len(unused_parameters([more], model)) < len(idle):
                programs.append(more)
    return programs


def _export(model: nn.Module, call: Call, *, heads: bool = False) -> Exported:
    with ready(model, heads=heads), quiet():
        caller = Caller(model, call, heads)
        program = torch.export.export(caller, call.args, call.kwargs, strict=False)
    program.graph.eliminate_dead_code()
    spec = program.call_spec.out_spec
    counts, _ = pytree.tree_unflatten(range(spec.num_leaves), spec)
    return Exported(program, len(counts))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Failures inside are reported by exceptions alone: no logs, graphs or warnings of torch's own."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        streams = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with streams[0], streams[1], warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _is_random(node: Node) -> bool:
    """Whether it draws random numbers; a dropout that is off does not."""
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    return False not in node.args


def unused_parameters(programs: Sequence[Exported], model: nn.Module) -> list[str]:
    """The parameters that occur in no graph."""
    tensors = graph_tensors(model)
    used = {
        id(tensors[spec.target])
        for program, _ in programs
        for spec, node in graph_inputs(program)
        if spec.target in tensors and node.users
    }
    return [name for name, parameter in model.named_parameters() if id(parameter) not in used]


def graph_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by the names that they have in a graph of :class:`Caller`."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {f"model.{name}": tensor for name, tensor in named}


def graph_inputs(program: ExportedProgram) -> Iterable[tuple[Any, Node]]:
    """What every placeholder of a graph stands for."""
    return zip(program.graph_signature.input_specs, program.graph.find_nodes(op="placeholder"), strict=True)


# ---- sizes that depend on data


class _Measuring(Interpreter):
    """Runs a graph, and notes what the symbols in shapes are that the values of inputs decide."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.sizes: dict[Any, int] = {}

    def run_node(self, n: Node) -> Any:
        """The node's result."""
        result, expected = super().run_node(n), n.meta.get("val")
        pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(result), strict=False)
        for symbolic, real in pairs:
            shapes = (symbolic.shape, real.shape) if isinstance(symbolic, Tensor) else ((symbolic,), (real,))
            for symbol, size in zip(*shapes, strict=True):
                if isinstance(symbol, torch.SymInt) and symbol.node.expr.is_Symbol:
                    self.sizes[symbol.node.expr] = int(size)
        return result


def measure_sizes(program: ExportedProgram) -> dict[Any, int]:
    """For the example inputs: symbol -> length, of lengths that depend on their values."""
    made = [node.meta.get("val") for node in program.graph.nodes]
    shapes = [x.shape for x in pytree.tree_leaves(made) if isinstance(x, Tensor)]
    if not any(map(free_unbacked_symbols, shapes)) or program.example_inputs is None:
        return {}
    inputs = program._graph_module_flat_inputs(*program.example_inputs)
    measuring = _Measuring(program.graph_module)
    with torch.no_grad():
        measuring.run(*(x.clone() if isinstance(x, Tensor) else x for x in inputs))
    return measuring.sizes
