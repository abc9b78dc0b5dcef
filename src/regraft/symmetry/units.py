"""Disjoint sets of labels, and the history of their unions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

How = Literal["fixed", "held", "apart"]
"""How units are fixed: they meet values that do not move, an operator holds them, or tells each from all others."""

HOW: tuple[How, ...] = ("fixed", "held", "apart")


class Units:
    """Disjoint sets over labels 0..n-1, all in arrays. Label 0 is fixed, and so is what is joined with it.

    A label's entry is a smaller label of its set, or itself where it is the smallest. Every union is remembered, with
    the ``event`` that demanded it, so that it can be told why units became one.
    """

    def __init__(self) -> None:
        self._root = torch.zeros(1 << 16, dtype=torch.int32)
        self._above = self._root.clone()  # as the unions were made, never shortened
        self._when = torch.full_like(self._root, -1)
        self._how = torch.zeros_like(self._root, dtype=torch.int8)  # a place in HOW
        self.count = 1
        self.event = -1

    def fresh(self, *shape: int) -> Tensor:
        """New labels, int32, each a unit of its own."""
        n = math.prod(shape)
        if self.count + n > len(self._root):
            spare = torch.zeros(max(len(self._root), n), dtype=torch.int32)
            self._root, self._above = torch.cat([self._root, spare]), torch.cat([self._above, spare])
            self._when, self._how = torch.cat([self._when, spare - 1]), torch.cat([self._how, spare.to(torch.int8)])
        new = torch.arange(self.count, self.count + n, dtype=torch.int32)
        self._root[self.count : self.count + n] = new
        self._above[self.count : self.count + n] = new
        self.count += n
        return new.view(shape)

    def roots(self, labels: Tensor) -> Tensor:
        """The smallest label of each label's set; expanded where the labels are."""
        return self._find(unexpand(labels)).expand(labels.shape)

    def _find(self, labels: Tensor) -> Tensor:
        root = self._root[labels]
        above = self._root[root]
        if torch.equal(root, above):
            return root
        while not torch.equal(root, above):
            root, above = above, self._root[above]
        self._root[labels] = root  # the next look is a short one
        return root

    def join(self, a: Tensor, b: Tensor, how: How = "fixed") -> None:
        """Makes one unit of ``a`` and ``b``, element by element, after broadcasting; ``how``: if that fixes them."""
        a, b = (x.flatten() for x in compact(a, b))
        differ = a != b
        a, b = self._find(a[differ]), self._find(b[differ])
        while (differ := a != b).any():
            a, b = a[differ], b[differ]
            high, low = torch.maximum(a, b), torch.minimum(a, b)
            self._root[high] = low  # one of several, where a root meets several: another round takes the others
            self._above[high], self._when[high], self._how[high] = self._root[high], self.event, HOW.index(how)
            a, b = self._find(high), self._find(low)

    def _unions(self, label: int) -> list[tuple[int, int]]:
        """What a label came under, from itself up, and when."""
        steps = [(label, -1)]
        while (above := int(self._above[label])) != label:
            steps.append((above, int(self._when[label])))
            label = above
        return steps

    def when_joined(self, a: int, b: int) -> int:
        """The event at which two labels became one; -1 where they did not."""
        first, second = dict(self._unions(a)), dict(self._unions(b))
        common = next((label for label in first if label in second), None)
        if common is None:
            return -1
        on_the_way = (list(unions)[: list(unions).index(common) + 1] for unions in (first, second))
        return max(unions[x] for unions, labels in zip((first, second), on_the_way, strict=True) for x in labels)

    def when_fixed(self, label: int) -> tuple[int, How]:
        """The event at which a label was fixed, and how; -1 where it always was."""
        steps = self._unions(label)
        return (steps[-1][1], HOW[int(self._how[steps[-2][0]])]) if len(steps) > 1 else (-1, "fixed")


def compact(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """After broadcasting, of length 1 along the dimensions that are expanded in both: they say the same again."""
    a, b = torch.broadcast_tensors(a, b)
    again = [d for d in expanded_dims(a) if b.stride(d) == 0]
    return first(a, again), first(b, again)


def unexpand(tensor: Tensor) -> Tensor:
    """Of length 1 along the dimensions in which it is expanded: what it holds, without the repetitions."""
    return first(tensor, expanded_dims(tensor))


def first(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """The first slice along some dimensions, which stay, of length 1."""
    for d in dims:
        tensor = tensor.narrow(d, 0, min(1, tensor.shape[d]))
    return tensor


def expanded_dims(tensor: Tensor) -> list[int]:
    return [d for d, n in enumerate(tensor.shape) if n > 1 and tensor.stride(d) == 0]
