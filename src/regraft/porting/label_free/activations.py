"""The linear maps of a network (linear layers, convolutions, the projections of attention): what goes in and comes out.

A map is known by its weight's name. Its *rows* are the places where it is applied (images, tokens, pixels), of which so
many are looked at; all networks that are given the same inputs are looked at in the same places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from regraft.core.forward import call, hooks, name_inputs, portion
from regraft.core.guard import evaluating
from regraft.core.tensors import Inputs, check_finite, copies, live_state
from regraft.training.evaluation import NotFinite
from regraft.training.statistics import batch_norms

ROWS = 8192
"""Of each map that are looked at, at most; or eight times its fan-in, where that is more."""


@dataclass(frozen=True, eq=False)
class LinearMap:
    """One linear map: y = W x + b at every row, W a matrix or the weight of a convolution.

    Attributes:
        weight, bias: names of the tensors; of no bias None.
        module: of which it is.
        part: which of the equal parts of the weight's rows is meant, of how many (attention has three in one weight).
    """

    weight: str
    bias: str | None
    module: nn.Module
    part: tuple[int, int] = (0, 1)

    @property
    def name(self) -> str:
        number, parts = self.part
        return self.weight if parts == 1 else f"{self.weight}[{number}]"

    @property
    def is_convolution(self) -> bool:
        return isinstance(self.module, _ConvNd)

    def of_tensor(self, tensor: Tensor) -> Tensor:
        """The part of the weight or the bias that belongs to this map: a view."""
        number, parts = self.part
        return tensor.chunk(parts)[number]

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What it makes of its inputs with these values."""
        if isinstance(self.module, _ConvNd):
            result: Tensor = self.module._conv_forward(x, weight, bias)  # type: ignore[operator]
            return result
        return F.linear(x, weight, bias)

    def output_rows(self, output: Tensor, rows: Tensor) -> Tensor:
        """[R, fan_out]."""
        if self.is_convolution:
            output = output.movedim(1, -1)
        return output.reshape(-1, output.shape[-1])[rows]

    def count(self, output: Tensor) -> int:
        """The number of its rows."""
        return output.numel() // output.shape[1 if self.is_convolution else -1]

    def input_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """[R, groups, fan_in]: a convolution's are the patches, in the order of its weight."""
        module = self.module
        if not isinstance(module, _ConvNd):
            return x.reshape(-1, x.shape[-1])[rows][:, None]
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode)
        axes = range(len(module.kernel_size))
        for axis in axes:
            length = (module.kernel_size[axis] - 1) * module.dilation[axis] + 1
            x = x.unfold(2 + axis, length, module.stride[axis])[..., :: module.dilation[axis]]
        places = torch.unravel_index(rows, (x.shape[0], *x.shape[2 : 2 + len(axes)]))
        images, *within = places
        patches: Tensor = x.movedim(1, 1 + len(axes))[(images, *within)]  # [R, channels, kernel...]
        return patches.reshape(len(rows), module.groups, -1)

    def input_channels(self, x: Tensor, rows: Tensor) -> Tensor:
        """[R, channels]: of a convolution the middle of each patch."""
        patches = self.input_rows(x, rows)
        if not isinstance(self.module, _ConvNd):
            return patches.flatten(1)
        taps = self.module.weight[0, 0].numel()
        middle = torch.tensor([size // 2 for size in self.module.kernel_size])
        sizes = torch.tensor([*self.module.kernel_size[1:], 1]).flip(0).cumprod(0).flip(0)
        return patches.reshape(len(rows), -1, taps)[..., int(middle @ sizes)]


SeeMap = Callable[[LinearMap, Tensor, Tensor], Tensor | None]
"""(map, its inputs, its output) -> None, or what replaces the output."""


@contextmanager
def observe(model: nn.Module, see: SeeMap) -> Iterator[None]:
    """Call ``see`` after every linear map of the model that is run.

    Attention of torch (`nn.MultiheadAttention`) is seen as its projections where query, key and value are one tensor;
    elsewhere it is left alone.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | _ConvNd)}
    layers = {name: module for name, module in layers.items() if not getattr(module, "transposed", False)}

    def pass_on(name: str, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        module = layers[name]
        bias = None if module.bias is None else f"{name}.bias".removeprefix(".")
        return see(LinearMap(f"{name}.weight".removeprefix("."), bias, module), inputs[0], output)

    with ExitStack() as stack:
        stack.enter_context(hooks(layers, pass_on))
        for name, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                stack.enter_context(unfold_attention(module, name, see))
        yield


@contextmanager
def unfold_attention(module: nn.MultiheadAttention, name: str, see: SeeMap) -> Iterator[None]:
    """The attention computed step by step, its projections seen."""
    folded, prefix = module.forward, f"{name}." if name else ""
    bias = module.in_proj_bias is not None

    def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        masks = [kwargs.get("key_padding_mask"), kwargs.get("attn_mask")]
        plain = not args and query is key is value and query.ndim == 3 and all(mask is None for mask in masks)
        if not plain or module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
            return folded(query, key, value, *args, **kwargs)
        ways = []
        for number in range(3):
            one = LinearMap(f"{prefix}in_proj_weight", f"{prefix}in_proj_bias" if bias else None, module, (number, 3))
            own_bias = one.of_tensor(module.in_proj_bias) if bias else None
            output = F.linear(query, one.of_tensor(module.in_proj_weight), own_bias)
            changed = see(one, query, output)
            ways.append(output if changed is None else changed)
        heads = [x if module.batch_first else x.transpose(0, 1) for x in ways]
        q, k, v = (x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in heads)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        mixed = mixed if module.batch_first else mixed.transpose(0, 1)
        return module.out_proj(mixed), None  # whose own hook sees it

    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward


def choose_rows(count: int, fan_in: int, share: float) -> Tensor:
    """int64 [R], evenly spread: at most so many of a map's rows, times the share of all inputs that the batch has."""
    wanted = max(1, round(max(ROWS, 8 * fan_in) * share))
    return torch.arange(count) if count <= wanted else torch.linspace(0, count - 1, wanted).round().long()


@dataclass(frozen=True, eq=False)
class Norm:
    """A BatchNorm behind a map, in evaluation mode: an affine function of each channel."""

    name: str
    module: _BatchNorm

    def affine(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(scale, shift) [channels], of these values."""
        mean, variance = (tensors[f"{self.name}.running_{kind}"] for kind in ("mean", "var"))
        scale = (variance + self.module.eps).rsqrt() * tensors.get(f"{self.name}.weight", 1)
        return scale, tensors.get(f"{self.name}.bias", 0) - mean * scale


@dataclass(frozen=True)
class MapRecord:
    """What was seen of one map.

    Attributes:
        map: it.
        inputs: [R, channels], where they were wanted.
        outputs: [R, fan_out], behind the BatchNorm that follows where one does.
        norm: that BatchNorm.
    """

    map: LinearMap
    inputs: Tensor | None
    outputs: Tensor
    norm: Norm | None


def record(
    model: nn.Module, tensors: Mapping[str, Tensor], batches: Sequence[Inputs], *, with_inputs: bool = False
) -> dict[str, MapRecord]:
    """By name, in the order in which they are run, what goes through the maps that are run once a call.

    Raises ValueError for inputs that are not finite, `NotFinite` for outputs that are not, naming the layer.
    """
    values = copies(model, tensors)
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}
    maps: dict[str, LinearMap] = {}
    norms: dict[str, Norm] = {}
    calls: dict[str, int] = {}
    last: list[Any] = [None, None]  # the output that was made last, and its map

    def see(linear: LinearMap, x: Tensor, output: Tensor) -> None:
        name = linear.name
        calls[name] = calls.get(name, 0) + 1
        if not bool(output.isfinite().all()):
            raise NotFinite(f"layer {name.removesuffix('.weight')!r}: its outputs are not finite")
        maps[name] = linear
        fan_in = linear.module.weight[0].numel() if linear.is_convolution else x.shape[-1]  # type: ignore[index]
        rows = choose_rows(linear.count(output), fan_in, 1 / len(batches)).to(x.device)
        if with_inputs:
            inputs.setdefault(name, []).append(linear.input_channels(x, rows))
        outputs.setdefault(name, []).append(linear.output_rows(output, rows))
        last[:] = [output, (linear, rows)]

    def see_norm(name: str, given: tuple[Any, ...], output: Tensor) -> None:
        if given[0] is last[0]:
            linear, rows = last[1]
            norms[linear.name] = Norm(name, batch_norms(model)[name])
            outputs[linear.name][-1] = linear.output_rows(output, rows)

    with torch.no_grad(), evaluating(model), observe(model, see), hooks(dict(batch_norms(model)), see_norm):
        for number, batch in enumerate(batches):
            check_finite(name_inputs(batch), f"batch {number}")
            call(model, values, batch, f"batch {number}")
    return {
        name: MapRecord(
            linear, torch.cat(inputs[name]) if with_inputs else None, torch.cat(outputs[name]), norms.get(name)
        )
        for name, linear in maps.items()
        if calls[name] == len(batches)
    }


def activation_bytes(model: nn.Module, inputs: Inputs) -> int:
    """What one example takes at the peak of a forward pass, about: six times the largest output of a linear map."""
    sizes: list[int] = []

    def see(_linear: LinearMap, _x: Tensor, output: Tensor) -> None:
        sizes.append(output.numel() * output.element_size())

    first = portion(inputs, 0, 1)
    with torch.no_grad(), evaluating(model), observe(model, see):
        call(model, copies(model, live_state(model)), first)
    return 6 * max(sizes, default=0)


def join(batches: Sequence[Inputs]) -> Any:
    """All inputs in one batch. Raises ValueError where their shapes differ."""
    first = batches[0]
    if isinstance(first, Tensor):
        _check_shapes([batch for batch in batches if isinstance(batch, Tensor)])
        return torch.cat(list(batches))  # type: ignore[arg-type]
    keys = list(first) if isinstance(first, Mapping) else range(len(first))
    parts = {key: [batch[key] for batch in batches] for key in keys}  # type: ignore[index]
    joined = {key: _join_argument(values) for key, values in parts.items()}
    return joined if isinstance(first, Mapping) else tuple(joined.values())


def _join_argument(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Tensor) and values[0].ndim:
        _check_shapes(values)
        return torch.cat(list(values))
    return values[0]


def _check_shapes(tensors: Sequence[Tensor]) -> None:
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(f"inputs of one shape are needed, not of {sorted(shapes)[:3]}: pad them to one length")


def align_activations(source: Tensor, target: Tensor) -> Tensor:
    """T [d_target, d_source] with orthonormal rows or columns, ``target ~ source T^T``: orthogonal Procrustes.

    source: [R, d_source], target: [R, d_target], centred here. Of equal widths, what the rows do not determine is as in
    the identity; of others it is 0 (Schoenemann, 1966).
    """
    source, target = (x.double() - x.double().mean(0) for x in (source, target))
    covariance = target.T @ source
    own = covariance.shape[0] == covariance.shape[1]
    if own:
        weight = 1e-6 * torch.linalg.matrix_norm(covariance, 2)
        covariance = covariance + weight.clamp(min=1e-300) * torch.eye(len(covariance)).to(covariance)
    left, sizes, right = torch.linalg.svd(covariance, full_matrices=False)
    kept = sizes > 1e-10 * sizes[0] if not own else slice(None)
    result: Tensor = left[:, kept] @ right[kept]
    return result
