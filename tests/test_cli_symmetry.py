"""What the command prints about a model, and says of one that it cannot find."""

from __future__ import annotations

import json

import pytest
from torch import nn

from regraft.cli import describe


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_describe_prints_the_groups_and_the_proof(capsys):
    spec = describe(f"{__name__}:small", (2, 3))
    printed = capsys.readouterr().out
    assert all(group in printed for group in spec.groups)
    assert "proved" in printed


def test_describe_takes_a_model_of_timm(capsys):
    pytest.importorskip("timm", reason="timm is not installed: pip install '.[models]'")
    spec = describe("timm/test_vit", (1, 3, 160, 160))
    assert "proved" in capsys.readouterr().out
    assert spec.proven
    with pytest.raises(ValueError, match="timm has no model 'absent'"):
        describe("timm/absent")


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", None])
def test_describe_takes_a_folder_with_a_configuration(architecture, tmp_path, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[models]'")
    config = {
        "model_type": "gpt2",
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 16,
        "vocab_size": 30,
    }
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"architectures": [architecture]} if architecture else config)
    )
    spec = describe(f"hf/{tmp_path}", (1, 5))
    assert "proved" in capsys.readouterr().out
    assert spec.proven
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot make a model of"):
        describe(f"hf/{tmp_path}")


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
