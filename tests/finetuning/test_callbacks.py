"""The callbacks for Lightning and for transformers' Trainer record what a loop by hand records."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regraft.finetuning.callbacks import make_lightning_callback, make_trainer_callback
from regraft.finetuning.recorder import Recorder

STEPS = 8


def batches(seed: int, count: int):
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(9, 6, generator=generator) for _ in range(count)]
    return [(images, images[:, :3].argmax(1)) for images in draws]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def by_hand(accumulated: int = 1):
    model = network()
    recorder = Recorder(model, validation=batches(1, 2), test=batches(2, 2))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for number, (images, labels) in enumerate(batches(3, STEPS)):
        (F.cross_entropy(model(images), labels) / accumulated).backward()
        if (number + 1) % accumulated == 0:
            optimiser.step()
            optimiser.zero_grad()
            recorder.after_step()
    return recorder.finish()


def same(record, expected) -> None:
    assert [row.step for row in record.deployments] == [row.step for row in expected.deployments]
    for row, other in zip(record.deployments, expected.deployments, strict=True):
        assert row.state_step == other.state_step
        assert row.scores.loss == pytest.approx(other.scores.loss, rel=1e-5)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_lightning(accumulated, tmp_path):
    """Steps are updates, with gradients accumulated too."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    task = Task()
    callback = make_lightning_callback(validation=batches(1, 2), test=batches(2, 2))
    trainer = lightning.Trainer(
        max_epochs=1, callbacks=[callback], accumulate_grad_batches=accumulated, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader(batches(3, STEPS), batch_size=None))
    same(callback.record, by_hand(accumulated))


def test_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(12, (64, 5), generator=generator)
    examples = [{"input_ids": row, "labels": int(row[0]) % 2} for row in tokens]
    held = [{"input_ids": tokens[:16], "labels": tokens[:16, 0] % 2}]
    callback = make_trainer_callback(validation=held, test=held, head="classifier")
    settings = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=8, report_to=[], use_cpu=True, save_strategy="no",
        logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(model, settings, train_dataset=examples, callbacks=[callback]).train()
    record = callback.record
    assert [row.step for row in record.deployments] == [0, 1, 2, 3, 5, 6]
    assert record.validations[-1].distance > 0 and record.cost.cpu > 0
