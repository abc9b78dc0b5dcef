"""What training loops and their libraries leave on disk, written by these libraries: read, or refused by name."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from checkpoints import mlp, one_line, written
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

MODULE = """
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
"""


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return mlp()


@pytest.fixture
def check(run, module, tmp_path) -> Callable[..., str]:
    """Write a checkpoint as a sum of itself alone; it must hold the network's own tensors. Returns what was printed."""

    def check(path: Path, network: nn.Module, *options: str) -> str:
        how = ["--weights", 1, "--model", f"{module(MODULE)}:mlp", "--shape", 1, 6, "--out", tmp_path / "out"]
        done = run("fuse", path, *how, *options)
        assert done.status == 0, done.text
        result, expected = written(tmp_path / "out"), network.state_dict()
        assert result.keys() == expected.keys()
        assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())
        return done.out

    return check


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch has no gloo here")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train_a_step(network: nn.Module) -> torch.optim.Optimizer:
    optimiser = torch.optim.AdamW(network.parameters())
    F.cross_entropy(network(torch.randn(4, 6)), torch.arange(4)).backward()
    optimiser.step()
    return optimiser


def test_distributed_data_parallel(model, check, tmp_path, one_process):
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimiser = train_a_step(wrapped)
    torch.save({"model": wrapped.state_dict(), "optimizer": optimiser.state_dict(), "epoch": 3}, tmp_path / "a.pt")
    check(tmp_path / "a.pt", model)


def test_a_compiled_model_within_distributed_data_parallel(model, check, tmp_path, one_process):
    wrapped = nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager"))
    torch.save(wrapped.state_dict(), tmp_path / "a.pt")
    assert "_orig_mod" in next(iter(wrapped.state_dict()))
    check(tmp_path / "a.pt", model)


def test_fully_sharded_gathered(model, check, tmp_path, one_process):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    expected = copy.deepcopy(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    torch.save(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), tmp_path / "a.pt")
    check(tmp_path / "a.pt", expected)


def test_fully_sharded_tensors_are_refused_by_name(model, run, tmp_path, one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    one_line(run("fuse", tmp_path / "a.pt", "--weights", 1, "--out", tmp_path / "out"), "a.pt", "full_state_dict")


@pytest.mark.slow
def test_fully_sharded_tensors_are_refused_where_nothing_has_imported_them(model, python, tmp_path, one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    code = "import sys; from regraft.cli import main; sys.exit(main(sys.argv[1:]))"
    done = python(code, "fuse", tmp_path / "a.pt", "--weights", "1", "--out", tmp_path / "out")
    one_line(done, "a.pt", "full_state_dict")


def test_a_distributed_checkpoint_is_refused_with_what_gathers_it(model, run, tmp_path, one_process):
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "dcp")
    one_line(run("fuse", tmp_path / "dcp", "--weights", 1, "--out", tmp_path / "out"), "dcp", "dcp_to_torch_save")


@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averages(average, model, check, tmp_path):
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if average == "ema" else None)
    for _ in range(2):
        train_a_step(model)
        averaged.update_parameters(model)
    torch.save(averaged.state_dict(), tmp_path / "average.pt")
    said = check(tmp_path / "average.pt", averaged.module)
    assert "n_averaged" in said


@pytest.mark.parametrize("key", ["model", "model_ema"])
def test_torchvisions_reference_script(key, model, run, check, tmp_path):
    """Its names: model, model_ema, optimizer, lr_scheduler, scaler, args."""
    averaged = AveragedModel(model)
    optimiser = train_a_step(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimiser, 2)
    saved = {
        "model": model.state_dict(), "model_ema": averaged.state_dict(), "optimizer": optimiser.state_dict(),
        "lr_scheduler": scheduler.state_dict(), "scaler": {}, "epoch": 1, "args": argparse.Namespace(lr=0.1),
    }  # fmt: skip
    torch.save(saved, tmp_path / "model_1.pth")
    plain = run("fuse", tmp_path / "model_1.pth", "--weights", 1, "--out", tmp_path / "out")
    one_line(plain, "'model'", "'model_ema'", "--key")
    check(tmp_path / "model_1.pth", model if key == "model" else averaged.module, "--key", key)


@pytest.mark.parametrize("sharded", [False, True])
def test_accelerate(sharded, model, check, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, _ = accelerator.prepare(model, train_a_step(model))
    if sharded:
        accelerator.save_model(prepared, tmp_path / "saved", max_shard_size="0.3KB")
        assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    else:
        accelerator.save_state(tmp_path / "saved")
    check(tmp_path / "saved", model)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("saved", ["adapter", "state", "merged"])
def test_peft(saved, model, run, check, tmp_path):
    """Adapters are refused with what merges them; merged ones are read."""
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "2"], init_lora_weights=False))
    if saved == "merged":
        merged = tuned.merge_and_unload()
        torch.save(merged.state_dict(), tmp_path / "merged.pt")
        check(tmp_path / "merged.pt", merged)
        return
    if saved == "adapter":
        tuned.save_pretrained(tmp_path / "a")
    else:
        torch.save(tuned.state_dict(), tmp_path / "a")
    path = (tmp_path / "a").rename(tmp_path / ("a" if saved == "adapter" else "a.pt"))
    one_line(run("fuse", path, "--weights", 1, "--out", tmp_path / "out"), "merge_and_unload", path.name)


@pytest.mark.parametrize("version", ["plain", "compiled"])
def test_lightning(version, model, check, tmp_path):
    """A checkpoint with hyperparameters, a loss with weights, a callback and the loops' state."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Task(lightning.LightningModule):
        def __init__(self, lr: float = 0.1):
            super().__init__()
            self.save_hyperparameters()
            self.net = torch.compile(model, backend="eager") if version == "compiled" else model
            self.loss = nn.CrossEntropyLoss(weight=torch.ones(5))

        def training_step(self, batch, _):
            return self.loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[lightning.callbacks.ModelCheckpoint(tmp_path / "checkpoints")], default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Task(), torch.utils.data.DataLoader([(torch.randn(4, 6), torch.arange(4))], batch_size=None))
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    assert "loss" in check(path, model)


@pytest.mark.parametrize("key", ["state_dict", "state_dict_ema"])
def test_timms_saver(key, tmp_path, model, check):
    timm = pytest.importorskip("timm")
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    optimiser = train_a_step(model)
    ema.update(model)
    saver = timm.utils.CheckpointSaver(
        model, optimiser, argparse.Namespace(model="own"), ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(0, 0.5)
    check(tmp_path / "last.pth.tar", model if key == "state_dict" else ema.module, "--key", key)


def test_a_trainers_folder(tmp_path, run):
    """checkpoint-N of transformers' Trainer: optimiser, scheduler, random states and arguments are passed over."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
    )
    network = transformers.BertForSequenceClassification(config)
    examples = [{"input_ids": torch.arange(4), "labels": 1}] * 4
    settings = transformers.TrainingArguments(
        str(tmp_path / "runs"), max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    transformers.Trainer(network, settings, train_dataset=examples).train()
    folder = tmp_path / "runs" / "checkpoint-2"
    assert (folder / "optimizer.pt").exists()
    done = run("fuse", folder, "--weights", 1, "--model", f"hf/{folder}", "--out", tmp_path / "out")
    assert done.status == 0, done.text
    result = written(tmp_path / "out")
    assert all(torch.equal(result[n], t) for n, t in network.state_dict().items() if t.is_floating_point())
    left = {"optimizer.pt", "training_args.bin", "trainer_state.json"}
    assert not left & {path.name for path in (tmp_path / "out").iterdir()}
