"""Kernels of regraft: permute, graft, combine, similarity, assign. Importable alone.

Needs torch, numpy and scipy. Triton (GPU tensors) and lapx or lapjv (faster assignment) are loaded only
when they are used, and are optional.
"""

from regraft_kernels.assignment import Assignment, Duals, assign, assign_many
from regraft_kernels.combine import combine
from regraft_kernels.graft import graft
from regraft_kernels.packing import Packing
from regraft_kernels.permute import permute
from regraft_kernels.similarity import Term, similarity, similarity_many, similarity_update_

__all__ = [
    "Assignment",
    "Duals",
    "Packing",
    "Term",
    "assign",
    "assign_many",
    "combine",
    "graft",
    "permute",
    "similarity",
    "similarity_many",
    "similarity_update_",
]
