"""What README, docs and examples print runs as it stands."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(path for path in (ROOT / "docs").glob("*.md") if "```python" in path.read_text("utf-8"))


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def test_every_block_of_the_readme_runs_when_pasted(monkeypatch):
    import torchvision

    from regraft.networks.papers import small_cnn

    monkeypatch.setattr(torchvision.models, "resnet18", lambda num_classes: small_cnn(num_classes))  # in a second
    for block in blocks(ROOT / "README.md"):
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_blocks_of_a_document_run_one_after_the_other(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    names: dict = {"__name__": document.stem}
    for block in blocks(document):
        exec(compile(block, document.name, "exec"), names)


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs(example, capsys):
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out
