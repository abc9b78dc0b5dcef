"""Constants that agree only because the example has a dimension of length 1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


class Lengths:
    """Constants that a dimension of length 1 of the example makes: at position 0 all rotary angles agree, at others
    they do not. They are told apart by place, not by value, unless a second example of another length says which
    agree."""

    def __init__(self) -> None:
        self.one = False  # whether an input has such a dimension, and there is no second example
        self.distrusted: dict[str, str] = {}  # operator -> module, where units met such a constant
        self._constants: dict[int, Tensor] = {}

    def trusts(self, tensor: Tensor) -> bool:
        """Whether a constant's values tell all units apart that other lengths would."""
        return id(tensor) not in self._constants or tensor.numel() == 1

    def record(self, name: str, operands: Iterable[Any], result: Any) -> None:
        """What an operator made of constants alone; ``name``: the operator's."""
        if not self.one:
            return
        operands = list(operands)
        known = any(id(x) in self._constants for x in operands)
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and (known or _is_of_length_one(name, operands, made)):
                self._constants[id(made)] = made


def _is_of_length_one(name: str, operands: Sequence[Any], made: Tensor) -> bool:
    """Whether a constant holds the first of what would be a sequence."""
    if name in ("arange", "linspace", "logspace", "range", "eye"):
        return made.numel() == 1
    if name in ("tril", "triu"):
        return 1 in made.shape[-2:]
    if name in ("cumsum", "cumprod"):
        return bool(made.ndim) and made.shape[next(x for x in operands if isinstance(x, int))] == 1
    return name in ("slice", "narrow") and any(n == 1 < m for n, m in zip(made.shape, operands[0].shape, strict=True))
