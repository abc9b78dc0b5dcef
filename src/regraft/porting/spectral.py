"""Spectral norm: its buffers are no weights to be added, but belong to the weight that they stand beside."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from regraft.core.files import BadFile
from regraft.porting.checkpoint_files import Lazy

VECTOR_NAMES = (("_orig", ""), ("original", "0."))
"""How the weight's name ends, and what stands there before ``_u`` and ``_v``: hooks, and parametrizations."""


def with_singular_vectors(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same, but with the vectors of spectral norm made anew: the first singular ones of their weight."""
    weight_of = {
        name.removesuffix(end) + middle + vector: name
        for name in tensors
        for end, middle in VECTOR_NAMES
        for vector in ("_u", "_v")
        if name.endswith(end) and name.removesuffix(end) + middle + vector in tensors
    }
    if not weight_of:
        return tensors

    def read(name: str) -> Tensor:
        return _singular_vector(tensors, weight_of[name], name) if name in weight_of else tensors[name]

    return Lazy(tuple(tensors), read)


def _singular_vector(tensors: Mapping[str, Tensor], weight_name: str, name: str) -> Tensor:
    """u or v, by the name's end. Raises BadFile, naming the weight, for one of zeros, which has no such norm."""
    weight, rows = tensors[weight_name].double(), len(tensors[name[:-1] + "u"])
    # Torch takes the outputs for rows, which stand second in a transposed convolution.
    matrix = (weight if weight.shape[0] == rows else weight.transpose(0, 1)).flatten(1)
    u, norms, v = torch.linalg.svd(matrix, full_matrices=False)
    if not float(norms[0]):
        raise BadFile(f"tensor {weight_name!r} of the result is zero: it has no spectral norm to divide by")
    vector: Tensor = u[:, 0] if name.endswith("u") else v[0]
    return vector.to(tensors[name].dtype)
