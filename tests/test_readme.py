"""What the README prints runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import regraft

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def batches(count: int, classes: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(8, 3, 32, 32), torch.randint(0, classes, (8,))) for _ in range(count)]


@pytest.fixture
def names(monkeypatch) -> dict:
    """What the blocks' readers have: a model, its tensors from several starts, and batches."""
    import torchvision

    torch.manual_seed(0)

    def small(**_: object) -> nn.Module:
        from regraft.networks import small_cnn

        return small_cnn(5)

    monkeypatch.setattr(torchvision.models, "resnet18", small)
    model = small()
    starts = [regraft.tensors.state(small()) for _ in range(4)]
    return {
        "regraft": regraft,
        "torch": torch,
        "model": model,
        "images": torch.randn(8, 3, 32, 32),
        "labels": torch.randint(0, 5, (8,)),
        "batches": batches(3),
        "train_batches": batches(2),
        "validation_batches": batches(1),
        "test_batches": batches(1),
        **dict(zip(("theta_1_start", "theta_1_end", "theta_2_start", "theta_0"), starts, strict=True)),
        "theta_a": starts[1],
        "theta_b": starts[2],
        "theta_n": starts[3],
        "weights_a": {n: p.detach() for n, p in small().named_parameters()},
        "weights_b": {n: p.detach() for n, p in small().named_parameters()},
        "alpha": 0.5,
        "beta": 0.5,
        "points": [[0.5, 0.5], [1.0, 0.0]],
    }


def test_every_block_runs_after_the_one_before(names):
    assert BLOCKS
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
