"""Frozen tile configurations per GPU family, and how one is chosen."""
