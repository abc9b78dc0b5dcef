"""Permutation symmetries of a network: found by tracing, proved by computing, applied to tensors.

:func:`trace` finds the groups of a model's units, :func:`verify` proves them, :func:`apply` moves tensors;
a :class:`PermutationSpec` is plain data and can be written by hand (:mod:`regraft.symmetry.spec`).
"""

from regraft.symmetry.axes import Axis, Segment
from regraft.symmetry.spec import PermutationSpec, apply, inverse, parameters_moved
from regraft.symmetry.trace import trace
from regraft.symmetry.verify import verify

__all__ = ["Axis", "PermutationSpec", "Segment", "apply", "inverse", "parameters_moved", "trace", "verify"]
