"""Weighted sums of networks, grids of them, and the repair of their activations."""

from regraft.fusion import grids, repair, sums
from regraft.fusion.sums import assign_gradient, fuse

__all__ = ["assign_gradient", "fuse", "grids", "repair", "sums"]
