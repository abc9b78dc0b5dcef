"""THESEUS: a task vector carried by maps between the activations of two bases, which may differ in width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from regraft.core.arguments import Finite, check_arguments
from regraft.core.tensors import Inputs, Tensors, complete
from regraft.porting.label_free.activations import LinearMap, MapRecord, align_activations, record


@check_arguments
def transport_by_activations(
    model: nn.Module,
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    new_base: Mapping[str, Tensor],
    batches: Iterable[Inputs],
    *,
    alpha: Finite = 1.0,
    new_model: nn.Module | None = None,
) -> Tensors:
    """``new_base + alpha T_out tau T_in^T`` for every linear map, tau being ``tuned - base`` (Rinaldi et al.,
    Transporting Task Vectors across Different Architectures without Training, arXiv 2602.12952).

    T_out and T_in are the orthogonal Procrustes maps from the base's outputs and inputs of a map to the new base's; of
    a convolution they act on channels, tap by tap. Outputs of the network keep their meaning: T_out of the head is the
    identity. Scales and biases of a norm that follows a map are carried by the same T_out. Everything else stays the
    new base's; estimate BatchNorm statistics anew afterwards.

    Args:
        model: the fine-tune's network.
        base, tuned: its parameters and buffers.
        new_base: those of the new base, with a head of the fine-tune's classes.
        batches: unlabelled inputs; held in memory.
        alpha: a scale.
        new_model: the new base's network, where it has other widths: layers of the same names that see as many places.

    Raises ValueError, naming the layer, where the two networks have not the same layers, or layers see other places;
    `NotFinite` for activations that are not.
    """
    own_model = model if new_model is None else new_model
    batches = list(batches)
    before = record(model, base, batches, with_inputs=True)
    own = record(own_model, new_base, batches, with_inputs=True)
    _check_layers(before, own)
    result = complete(own_model, {name: tensor.clone() for name, tensor in new_base.items()})
    outputs = list(before)[-1]
    for name, old in before.items():
        new = own[name]
        assert old.inputs is not None and new.inputs is not None
        into = align_activations(old.inputs, new.inputs)
        out = (
            align_activations(old.outputs, new.outputs) if name != outputs else torch.eye(old.outputs.shape[1]).to(into)
        )
        moved: list[tuple[str | None, str | None, Callable[[Tensor], Tensor]]] = [
            (old.map.weight, new.map.weight, partial(_transport, out, into, new.map)),
            (old.map.bias, new.map.bias, out.matmul),
        ]
        if old.norm is not None and new.norm is not None:
            kinds = {"bias": out.matmul, "weight": out.square().matmul}
            moved += [(f"{old.norm.name}.{kind}", f"{new.norm.name}.{kind}", how) for kind, how in kinds.items()]
        for source, target, carry in moved:
            if source is not None and target is not None and source in base and target in result:
                change = old.map.of_tensor(tuned[source] - base[source])
                part = new.map.of_tensor(result[target])
                part += alpha * carry(change.double()).to(part)
    return result


def _transport(out: Tensor, into: Tensor, linear: LinearMap, change: Tensor) -> Tensor:
    """T_out change T_in^T, of a convolution for each of its taps; of a grouped one, the blocks on the diagonal."""
    groups = getattr(linear.module, "groups", 1)
    outs, intos = out.chunk(groups), into.chunk(groups)
    blocks = change.unflatten(0, (groups, -1))
    rows, columns = len(blocks[0]), blocks.shape[2]
    moved = []
    for own_out, own_into in zip(outs, intos, strict=True):
        parts = [
            torch.einsum(
                "po,oi...,qi->pq...",
                own_out[:, number * rows : (number + 1) * rows],
                block,
                own_into[:, number * columns : (number + 1) * columns],
            )
            for number, block in enumerate(blocks)
        ]
        moved.append(torch.stack(parts).sum(0))
    return torch.cat(moved)


def _check_layers(before: Mapping[str, MapRecord], own: Mapping[str, MapRecord]) -> None:
    if odd := before.keys() ^ own.keys():
        raise ValueError(
            f"layer {min(odd).removesuffix('.weight')!r} is in only one of the two networks: a change is carried "
            "between layers of one name (head and distil need no equal layers)"
        )
    for name, old in before.items():
        new, layer = own[name], name.removesuffix(".weight")
        shapes = [getattr(x.map.module, "kernel_size", None) for x in (old, new)]
        groups = [getattr(x.map.module, "groups", 1) for x in (old, new)]
        if shapes[0] != shapes[1] or groups[0] != groups[1]:
            raise ValueError(
                f"layer {layer!r}: kernels {shapes[0]} and {shapes[1]}, groups {groups[0]} and {groups[1]}"
            )
        if len(old.outputs) != len(new.outputs):
            raise ValueError(f"layer {layer!r} is applied at other places in the new base than in the fine-tune's")
