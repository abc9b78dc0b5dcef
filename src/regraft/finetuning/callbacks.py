"""The recorder in other people's loops: a callback for Lightning and one for transformers' Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from regraft.core.arguments import check_arguments
from regraft.core.tensors import Batch, device_of
from regraft.finetuning.record import Record
from regraft.finetuning.recorder import Recorder


@check_arguments
def make_lightning_callback(
    *, validation: Iterable[Batch], test: Iterable[Batch], model: nn.Module | None = None, **options: Any
) -> Any:
    """A callback of Lightning that records a run; its ``record`` is there when training has ended.

    Args:
        validation, test: as `Recorder` takes them; moved to where the model is.
        model: what is trained, as a function of a batch's inputs; the LightningModule itself if not given.
        options: further ones of `Recorder`, such as ``head`` or ``source``.

    Raises ImportError where neither lightning nor pytorch_lightning is installed.
    """
    try:
        from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback
        except ImportError as problem:
            raise ImportError("this callback needs lightning (pip install lightning)") from problem
    recording = _Recording(validation, test, options)

    class RecordAnytime(Callback):  # type: ignore[misc]  # of a library that need not be there
        record: Record

        def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
            recording.start(pl_module if model is None else model)

        def on_train_batch_end(self, trainer: Any, *arguments: Any, **more: Any) -> None:
            recording.reach(trainer.global_step)

        def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
            self.record = recording.recorder.finish()

    return RecordAnytime()


@check_arguments
def make_trainer_callback(*, validation: Iterable[Batch], test: Iterable[Batch], **options: Any) -> Any:
    """A callback of transformers' Trainer that records a run; its ``record`` is there when training has ended.

    Args:
        validation, test: as `Recorder` takes them, such as ``trainer.get_eval_dataloader()``; moved to where the
            model is.
        options: further ones of `Recorder`, such as ``head`` or ``source``.

    Raises ImportError where transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as problem:
        raise ImportError("this callback needs transformers (pip install transformers)") from problem
    recording = _Recording(validation, test, options)

    class RecordAnytime(TrainerCallback):  # type: ignore[misc]  # of a library that need not be there
        record: Record

        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            recording.start(more["model"])

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            recording.reach(state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.record = recording.recorder.finish()

    return RecordAnytime()


class _Recording:
    """A recorder that begins when training does, where the model is then."""

    def __init__(self, validation: Iterable[Batch], test: Iterable[Batch], options: dict[str, Any]) -> None:
        self.validation, self.test, self.options = validation, test, options

    def start(self, model: nn.Module) -> None:
        device = device_of(model)
        validation, test = (_OnDevice(batches, device) for batches in (self.validation, self.test))
        self.recorder = Recorder(model, validation=validation, test=test, **self.options)

    def reach(self, step: int) -> None:
        """Count the updates up to a step: one for several batches where gradients are accumulated."""
        while self.recorder.step < step:
            self.recorder.after_step()


@dataclass(frozen=True)
class _OnDevice(Iterable[Batch]):
    batches: Iterable[Batch]
    device: torch.device

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield tree_map(lambda x: x.to(self.device) if isinstance(x, Tensor) else x, batch)
