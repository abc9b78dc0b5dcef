"""What the command prints about a model, and says of one that it cannot find."""

from __future__ import annotations

import pytest
from torch import nn

from regraft.symmetry import describe


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_describe_prints_the_groups_and_the_proof(capsys):
    spec = describe(f"{__name__}:small", (2, 3))
    printed = capsys.readouterr().out
    assert all(group in printed for group in spec.groups)
    assert "proved" in printed


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("resnet", "no classification model 'resnet' .*do you mean .*resnet"),
        ("no_such_module:make", "cannot find 'no_such_module:make'"),
        (f"{__name__}:absent", "AttributeError"),
        ("builtins:dict", "gives a dict, not a torch.nn.Module"),
    ],
)
def test_describe_says_what_it_cannot_find(name, complaint):
    with pytest.raises(ValueError, match=complaint):
        describe(name)
