"""Ports without labels, of a perceptron with ReLU: each layer as one least-squares problem, on all rows at once.

A network is a list of (weight [out, in], bias [out]), float64; inputs are [N, in].
"""

from __future__ import annotations

import torch
from torch import Tensor

Layers = list[tuple[Tensor, Tensor]]


def list_outputs(layers: Layers, x: Tensor) -> list[Tensor]:
    """What each layer makes, before its ReLU."""
    outputs = []
    for weight, bias in layers:
        outputs.append(x @ weight.T + bias)
        x = outputs[-1].relu()
    return outputs


def rotate_onto(source: Tensor, target: Tensor) -> Tensor:
    """The orthogonal T with the least |target - source T^T|, both centred; of equal widths and full rank."""
    left, _, right = torch.linalg.svd((target - target.mean(0)).T @ (source - source.mean(0)))
    rotation: Tensor = left @ right
    return rotation


def solve_layers(base: Layers, tuned: Layers, new_base: Layers, x: Tensor, ridge: float) -> Layers:
    """The hidden layers of `regraft.porting.label_free.match_functions`, one after the other."""
    before, after, own = (list_outputs(layers, x) for layers in (base, tuned, new_base))
    solved: Layers = []
    for number, (weight, bias) in enumerate(new_base[:-1]):
        target = own[number] + (after[number] - before[number]) @ rotate_onto(before[number], own[number]).T
        centred, missing = x - x.mean(0), target - (x @ weight.T + bias)
        penalty = (ridge * centred.square().sum() / x.shape[1]).sqrt() * torch.eye(x.shape[1]).to(x)
        stacked = torch.cat([centred, penalty])
        zeros = missing.new_zeros(x.shape[1], len(weight))
        change = torch.linalg.lstsq(stacked, torch.cat([missing - missing.mean(0), zeros])).solution.T
        bias = bias + missing.mean(0) - change @ x.mean(0)
        solved.append((weight + change, bias))
        x = (x @ solved[-1][0].T + bias).relu()
    return solved


def carry_change(base: Layers, tuned: Layers, new_base: Layers, x: Tensor) -> Layers:
    """``new_base + T_out tau T_in^T`` (THESEUS); the last layer's outputs keep their meaning."""
    old, new = list_outputs(base, x), list_outputs(new_base, x)
    into, carried = torch.eye(x.shape[1]).to(x), []
    for number, ((weight, bias), (own, own_bias)) in enumerate(zip(base, new_base, strict=True)):
        last = number == len(base) - 1
        out = torch.eye(len(own)).to(x) if last else rotate_onto(old[number], new[number])
        change, change_of_bias = tuned[number][0] - weight, tuned[number][1] - bias
        carried.append((own + out @ change @ into.T, own_bias + out @ change_of_bias))
        into = rotate_onto(old[number].relu(), new[number].relu())
    return carried
