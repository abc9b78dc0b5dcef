"""What README, docs and examples print runs as it stands."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import regraft

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(path for path in (ROOT / "docs").glob("*.md") if "```python" in path.read_text("utf-8"))


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def batches(count: int, classes: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(8, 3, 32, 32), torch.randint(0, classes, (8,))) for _ in range(count)]


@pytest.fixture
def names(monkeypatch) -> dict:
    """What the README's readers have: a model, its tensors from several starts, and batches."""
    import torchvision

    from regraft.core.tensors import state
    from regraft.networks.papers import small_cnn

    def small(**_: object) -> nn.Module:
        return small_cnn(5)

    monkeypatch.setattr(torchvision.models, "resnet18", small)
    torch.manual_seed(0)
    starts = [state(small()) for _ in range(4)]
    weights = [{n: p.detach() for n, p in small().named_parameters()} for _ in range(2)]
    return {
        "regraft": regraft,
        "model": small(),
        "images": torch.randn(8, 3, 32, 32),
        "labels": torch.randint(0, 5, (8,)),
        "batches": batches(3),
        "train_batches": batches(2),
        "validation_batches": batches(1),
        "test_batches": batches(1),
        "theta_1_start": starts[0],
        "theta_1_end": starts[1],
        "theta_2_start": starts[2],
        "theta_0": starts[3],
        "theta_a": starts[0],
        "theta_b": starts[1],
        "theta_n": starts[2],
        "weights_a": weights[0],
        "weights_b": weights[1],
        "alpha": 0.5,
        "beta": 0.5,
        "points": [[0.5, 0.5], [1.0, 0.0]],
    }


def test_every_block_of_the_readme_runs_after_the_one_before(names):
    for block in blocks(ROOT / "README.md"):
        exec(compile(block, "README.md", "exec"), names)


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
