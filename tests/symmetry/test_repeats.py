"""What is repeated is labelled, tied and compared once: the specification is the one of comparing all of it."""

from __future__ import annotations

import pytest
import torch
from nets import attention, grouped
from torch import nn
from torchvision.models import VisionTransformer

from regraft.symmetry import labels, trace, units

MODELS = {
    "attention": (lambda: attention(4, 2), (2, 5, 3)),
    "grouped": (lambda: grouped(3), (1, 2, 5, 5)),
    "transposed": (lambda: grouped(3, transposed=True), (1, 2, 5, 5)),
    "vision transformer": (lambda: VisionTransformer(16, 4, 2, 2, 8, 12, num_classes=3), (1, 3, 16, 16)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), (2, 5, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_repetitions_say_nothing_new(name, monkeypatch):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = make(), torch.rand(shape)
    once = trace(model, x)
    for module in (labels, units):
        monkeypatch.setattr(module, "expanded_dims", lambda tensor: [])
    assert trace(model, x) == once


def test_the_work_of_a_trace_hardly_grows_with_the_number_of_places(monkeypatch):
    """Labels that are looked up, for 4 and for 64 windows of tokens."""
    counted = [0]
    find = units.Units._find
    monkeypatch.setattr(
        units.Units, "_find", lambda self, x: counted.__setitem__(0, counted[0] + x.numel()) or find(self, x)
    )
    seen = []
    for tokens in (16, 256):
        counted[0] = 0
        trace(attention(4), torch.rand(2, tokens, 3))
        seen.append(counted[0])
    assert seen[1] < 1.5 * seen[0]
