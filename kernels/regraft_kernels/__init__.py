"""Kernels of regraft: permute, graft, combine, similarity, assign. Importable alone.

Needs torch, numpy and scipy. Triton (GPU tensors) and lapx or lapjv (faster assignment) are optional.
"""

from regraft_kernels.assignment import Assignment, Duals, assign, assign_many, backends
from regraft_kernels.combine import combine, plan_combine
from regraft_kernels.graft import graft, plan_graft
from regraft_kernels.indices import Indices
from regraft_kernels.packing import Packing
from regraft_kernels.permute import permute, plan_permute
from regraft_kernels.plans import Plan
from regraft_kernels.similarity import similarity, similarity_many, similarity_update_
from regraft_kernels.terms import Term
from regraft_kernels.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "Assignment",
    "Duals",
    "Indices",
    "Packing",
    "Plan",
    "Term",
    "assign",
    "assign_many",
    "backends",
    "combine",
    "graft",
    "permute",
    "plan_combine",
    "plan_graft",
    "plan_permute",
    "similarity",
    "similarity_many",
    "similarity_update_",
    "tune",
]
