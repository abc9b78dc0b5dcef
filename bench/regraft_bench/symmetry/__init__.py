"""Proofs of the symmetry of common models."""
