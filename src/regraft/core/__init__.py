"""Tensors, files, the clock, guards and any model's call: what every other package stands on."""
