"""Kernels of regraft: permute, graft, combine, similarity, assign. Importable alone.

Needs torch, numpy and scipy. Triton (GPU tensors) and lapx or lapjv (faster assignment) are optional.
"""

from regraft_kernels.assignment import Assignment, Duals, assign, assign_many, backends
from regraft_kernels.combine import combine
from regraft_kernels.graft import graft
from regraft_kernels.indices import Indices
from regraft_kernels.packing import Packing
from regraft_kernels.permute import permute
from regraft_kernels.similarity import similarity, similarity_many, similarity_update_
from regraft_kernels.terms import Term

__version__ = "0.1.0"

__all__ = [
    "Assignment",
    "Duals",
    "Indices",
    "Packing",
    "Term",
    "assign",
    "assign_many",
    "backends",
    "combine",
    "graft",
    "permute",
    "similarity",
    "similarity_many",
    "similarity_update_",
]
