"""pi(theta): gather or scatter of every layer of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft_kernels.backend import resolve, tl, triton
from regraft_kernels.indices import Indices
from regraft_kernels.launch import (
    RUN_TIME,
    find_tile,
    launch_bytes,
    layout_of,
    prepare_moves,
    tensor_pointer,
    vector_pointer,
)
from regraft_kernels.memory import Scratch, as_in_memory, of_one_dtype, row_blocks, stack_named, unstack_into
from regraft_kernels.operators import (
    by_number,
    choose_route,
    define,
    flatten_axes,
    slot_vectors,
    unflatten_packing,
)
from regraft_kernels.packing import Packing, Segment, Tensors, allocate
from regraft_kernels.plans import Plan, Step, check_bindable, finish_binding

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)
SELECTABLE = (*FLOATS, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool)
"""The dtypes that torch gathers; others are moved as integers of their size."""


def permute_reference(
    tensors: Tensors, indices: Mapping[str, Tensor], packing: Packing, *, inverse: bool = False
) -> dict[str, Tensor]:
    """The definition of `permute`: one index_select per permuted axis."""
    moved = {}
    for name, tensor in tensors.items():
        lead = tensor.ndim - len(packing.shapes[name])
        moved[name] = tensor.clone()
        for axis, slot in enumerate(packing.axes[name]):
            if slot is not None:
                index = indices[slot].argsort() if inverse else indices[slot]
                moved[name] = moved[name].index_select(axis + lead, index)
    return moved


def _permute_torch(tensors: Tensors, out: Tensors, indices: Indices, packing: Packing) -> None:
    scratch = Scratch()
    stacked = set()
    for names in packing.small_groups(tuple(tensors)):
        segment, first = packing.segments[names[0]], tensors[names[0]]
        if first.shape == segment.shape and first.dtype in SELECTABLE and of_one_dtype(tensors, names):
            stack = stack_named(tensors, names)
            unstack_into(out, names, gather_stacked(stack, indices, segment))
            stacked.update(names)
    for name, tensor in tensors.items():
        segment = packing.segments[name]
        if not segment.size or name in stacked:
            continue
        result = out[name]
        if tensor.dtype not in SELECTABLE:
            integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
            tensor, result = tensor.view(integer), result.view(integer)
        rows, columns = indices.vector(segment.row_factors), indices.vector(segment.column_factors)
        shape = (segment.rows, segment.columns, segment.tail)
        if tensor.ndim == len(segment.shape):
            _gather(tensor.reshape(shape), result.view(shape), rows, columns, scratch)
            continue
        for source, target in zip(tensor.reshape(-1, *shape), result.view(-1, *shape), strict=True):
            _gather(source, target, rows, columns, scratch)


def gather_stacked(stack: Tensor, indices: Indices, segment: Segment) -> Tensor:
    """pi of tensors [N, *shape] that one segment describes."""
    moved = stack.view(len(stack), segment.rows, segment.columns, segment.tail)
    for axis, factors in ((1, segment.row_factors), (2, segment.column_factors)):
        vector = indices.vector(factors)
        moved = moved if vector is None else moved.index_select(axis, vector)
    return moved.view(stack.shape)


def _gather(source: Tensor, out: Tensor, rows: Tensor | None, columns: Tensor | None, scratch: Scratch) -> None:
    """Fill `out` with the gathered rows and columns of `source`, both [rows, columns, tail]."""
    if rows is not None and columns is not None:
        for block in row_blocks(source):
            part = source[block]
            room = scratch.empty(part.shape, part)
            torch.index_select(source, 0, rows[block], out=room)
            torch.index_select(room, 1, columns, out=out[block])
    elif rows is not None:
        torch.index_select(source, 0, rows, out=out)
    elif columns is not None:
        torch.index_select(source, 1, columns, out=out)
    else:
        out.copy_(source)


# ---------------------------------------------------------------- Triton

_LIVE_VALUES = 1
"""Values of each element that the kernel has in registers at a time."""


@triton.jit(do_not_specialize=RUN_TIME, launch_metadata=launch_bytes)
def _permute_kernel(  # type: ignore[no-untyped-def]
    addresses,  # int64 [2, N]: of the sources, of the results
    count,  # N
    segments,  # int64 [N, FIELDS]
    tiles,  # int32 [programs, TILE_FIELDS]
    tables,  # int32 [E]: source row of each row, source column of each column
    entries,  # E
    programs,  # models
    moved,  # bytes, for the profiler
    DTYPE: tl.constexpr,
    VEC: tl.constexpr,
    GATHERED: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of one tensor of every model: program (tile, model), and on to models beyond the grid."""
    number, rows, length, size, first_row, first, row_table, origin, inside_j, from_j = find_tile(
        tiles, segments, tables, VEC, GATHERED, SPAN, COLUMNS
    )
    j = tl.arange(0, COLUMNS)
    for model in range(tl.program_id(1), programs, tl.num_programs(1)):
        start = size * model
        source = tensor_pointer(addresses + number, DTYPE)
        source = vector_pointer(source, start + origin, DTYPE, 1 if GATHERED else VEC)
        result = tensor_pointer(addresses + count + number, DTYPE)
        result = vector_pointer(result, start + first, DTYPE, VEC)
        for row in range(first_row, tl.minimum(first_row + SPAN, rows), ROWS):
            i = row + tl.arange(0, ROWS)
            from_i = tl.load(row_table + i, mask=i < rows, other=0).to(tl.int64) * length
            inside = (i < rows)[:, None] & inside_j[None, :]
            value = tl.load(source + from_i[:, None] + from_j[None, :], mask=inside)
            tl.store(result + (i.to(tl.int64) * length)[:, None] + j[None, :], value, mask=inside)


def _permute_triton(tensors: Tensors, out: Tensors, indices: Indices, packing: Packing) -> Sequence[Step]:
    """A launch for each kind among the tensors: mostly one or two."""
    names = tuple(tensors)
    sources = list(tensors.values())
    pointers = np.array([[t.data_ptr() for t in sources], [out[name].data_ptr() for name in names]])
    units = _units(tuple([t.element_size() for t in sources]))
    layout = layout_of(packing, names, units, pointers, indices)
    full = next((n for n, source in enumerate(sources) if source.numel()), None)
    if full is None:
        return ()
    models = sources[full].numel() // packing.segments[names[full]].size
    return prepare_moves(_permute_kernel, layout, pointers, indices, models, _LIVE_VALUES, lambda dtype: ((), {}))


@lru_cache(maxsize=32)
def _units(sizes: tuple[int, ...]) -> tuple[tuple[torch.dtype, int], ...]:
    """What moves elements of these sizes, and how many of it make one: elements of more than four bytes, mostly a few
    counters, move in the launch of smaller ones, where there is one."""
    units = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    shared = max((size for size in sizes if size in (2, 4)), default=8)
    return tuple((units[size], 1) if size <= 4 else (units[shared], size // shared) for size in sizes)


# ---------------------------------------------------------------- the function, and the operator


def permute(
    tensors: Tensors,
    indices: Mapping[str, Tensor] | Indices,
    packing: Packing,
    *,
    inverse: bool = False,
    backend: str = "auto",
    out: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Gather (or scatter, where `inverse`) every axis of every tensor: out[i, j, ...] = x[p[i], q[j], ...].

    `tensors` is name -> [*shape], or [B, *shape] for all, any dtype, and may lack tensors of the packing;
    `indices` slot -> int64 [length] on the same device, or what `packing.prepare` made of that. Returns contiguous
    tensors, exact to the bit: new ones, or those of `out`, which must share no memory with what is read.

    Differentiable in `tensors`, and an operator of PyTorch (`torch.ops.regraft.permute`): torch.compile, export,
    meta tensors, torch.func. Raises ValueError for names, shapes or devices that do not fit `packing`, for index
    vectors that are missing or no permutations (on a GPU: a device-side assertion, see `Packing.prepare`), for
    tensors without memory (DTensor), and for `out` where gradients or a compiler are at work.
    """
    route = choose_route([tensors], out)
    batch = packing.check(tensors)
    if not tensors:
        return {}
    chosen = resolve(backend, next(iter(tensors.values())).device)
    if route == "launch":
        return _bind(tensors, indices, packing, inverse, chosen, out)()
    vectors = slot_vectors(packing, tensors, indices, route, inverse)
    if route == "definition":
        return permute_reference(tensors, vectors, packing, inverse=inverse)
    flat = list(tensors.values()), list(vectors.values()), flatten_axes(packing, tensors, vectors)
    return dict(zip(tensors, torch.ops.regraft.permute(*flat, bool(batch), inverse, backend), strict=True))


def plan_permute(
    tensors: Tensors,
    indices: Mapping[str, Tensor] | Indices,
    packing: Packing,
    *,
    inverse: bool = False,
    backend: str = "auto",
    out: dict[str, Tensor] | None = None,
) -> Plan:
    """`permute` with the same arguments, to be called many times: `plan()` does what is left, on a GPU the launches.

    Waits for the device. Raises ValueError as `permute` does, and for tensors that are not contiguous or that gradients
    are wanted of.
    """
    check_bindable([tensors])
    packing.check(tensors)
    if not tensors:
        return Plan({}, "torch", torch.device("cpu"), (), ())
    chosen = resolve(backend, next(iter(tensors.values())).device)
    return finish_binding(_bind(tensors, indices, packing, inverse, chosen, out))


@torch.no_grad()
def _bind(
    tensors: Tensors,
    indices: Mapping[str, Tensor] | Indices,
    packing: Packing,
    inverse: bool,
    chosen: str,
    out: dict[str, Tensor] | None = None,
) -> Plan:
    results = allocate(None, tensors, out, [tensors])
    device = next(iter(tensors.values())).device
    vectors = packing.indices_for(tuple(tensors), indices, device, None, inverse, chosen)
    tensors = as_in_memory(tensors) if chosen == "triton" else tensors
    given = tensors, results, vectors, packing
    steps = _permute_triton(*given) if chosen == "triton" else [partial(_permute_torch, *given)]
    return Plan(results, chosen, device, steps, (tensors,))


def _operator(
    tensors: list[Tensor], indices: list[Tensor], axes: list[int], batched: bool, inverse: bool, backend: str
) -> list[Tensor]:
    """`axes`: for each tensor the place of each axis's vector in `indices`, -1 for none."""
    packing, chosen = unflatten_packing(tensors, axes, batched), resolve(backend, tensors[0].device)
    return list(_bind(by_number(tensors), by_number(indices), packing, inverse, chosen)().values())


def _fake(tensors: list[Tensor], *_: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in tensors]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, indices, *ctx.rest = inputs
    ctx.save_for_backward(*indices)


def _backward(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    """A permutation's transpose is its inverse."""
    axes, batched, inverse, backend = ctx.rest
    results = torch.ops.regraft.permute(gradients, ctx.saved_tensors, axes, batched, not inverse, backend)
    return results, [None] * len(ctx.saved_tensors), None, None, None, None


define(
    "permute(Tensor[] tensors, Tensor[] indices, int[] axes, bool batched, bool inverse, str backend) -> Tensor[]",
    _operator,
    fake=_fake,
    save=_save,
    backward=_backward,
    flops=lambda *_, **__: 0,
)
