"""Kernels of regraft: permute, graft, combine, similarity, assign. Importable alone."""
