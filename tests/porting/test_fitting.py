"""How far a fine-tune is from its base, and a head of other classes."""

from pathlib import Path

import pytest
import torch
from torch import nn

import regraft
from regraft.core.files import BadFile
from regraft.porting.fitting import Distance, fit_outputs
from regraft.porting.stored_tensors import Entry


def test_the_distance_is_a_root_of_squares_over_all_tensors():
    """|a - b| = 13 of differences 5 and 12, |a| = 13, |b| = 0; then half as far as unrelated tensors."""
    distance = Distance()
    for a in (torch.tensor([3.0, 4.0]), torch.tensor([12.0])):
        distance.add(a, torch.zeros_like(a))
    assert distance.value == pytest.approx(1)
    distance = Distance()
    distance.add(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0]))
    assert distance.value == pytest.approx(4 / (25 + 9) ** 0.5)
    assert Distance().value == 0


def test_a_head_of_other_classes_fits_and_a_hidden_layer_does_not():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.rand(2, 4)
    spec = regraft.trace(model, x)
    regraft.verify(spec, model, x)
    sizes = {"2.weight": (9, 6), "2.bias": (9,), "0.weight": (8, 4)}
    entries = {name: Entry(Path("file"), name, torch.float32, shape) for name, shape in sizes.items()}
    fitted = fit_outputs(spec, entries, ["2.weight", "2.bias", "absent"])
    assert fitted.shapes["2.weight"] == (9, 6) and fitted.shapes["2.bias"] == (9,)
    assert fitted.groups == spec.groups and fitted.proven == spec.proven is not None
    assert fitted.tensors_of("0") == spec.tensors_of("0")
    with pytest.raises(BadFile, match=r"file: tensor '0.weight' has shape \(8, 4\), the model's is \(6, 4\)"):
        fit_outputs(spec, entries, ["0.weight"])
