"""Matching: similarity -> assignment -> permutation, by coordinate descent over stacks of tensors."""

from regraft.matching.descent import Match, match

__all__ = ["Match", "match"]
