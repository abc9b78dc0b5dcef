"""Nothing that lies in a folder of weights is run, and no script can agree to it for a person."""

from __future__ import annotations

import sys
import types

import pytest
from safetensors.torch import save_file
from torch import nn

from regraft.cli import main


@pytest.mark.parametrize("verb", ["symmetry", "port", "match", "fuse"])
def test_transformers_is_told_never_to_run_code_of_a_folder(verb, tmp_path, monkeypatch, capsys):
    """In each call that may load code of the folder; left out, transformers asks on stdin."""
    seen: list[tuple[str, dict]] = []

    class Loader:
        def from_pretrained(self, *_, **options):
            seen.append(("from_pretrained", options))
            return types.SimpleNamespace(architectures=None)

        def from_config(self, *_, **options):
            seen.append(("from_config", options))
            raise ValueError("no model is made here")

    stub = types.SimpleNamespace(AutoConfig=Loader(), AutoModel=Loader())
    monkeypatch.setitem(sys.modules, "transformers", stub)
    file, model = str(tmp_path / "a.safetensors"), f"hf/{tmp_path}"
    save_file(nn.Linear(2, 2).state_dict(), file)
    paths, how = [file] * 3, ["--model", model, "--out", str(tmp_path / "out")]
    words = {
        "symmetry": ["symmetry", model],
        "port": ["port", *paths, "--method", "weights", *how],
        "match": ["match", *paths[:2], *how],
        "fuse": ["fuse", *paths[:2], "--weights", ".5", ".5", "--align", *how],
    }
    assert main(words[verb]) == 2
    assert "no model is made here" in capsys.readouterr().err
    assert [name for name, _ in seen] == ["from_pretrained", "from_config"]
    assert all(options["trust_remote_code"] is False for _, options in seen)
