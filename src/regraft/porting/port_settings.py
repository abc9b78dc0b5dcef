"""What a port is asked for, and what that comes to once the data are known."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regraft.core.arguments import Count, NotNegative
from regraft.core.clock import Clock
from regraft.core.forward import split
from regraft.core.tensors import Inputs
from regraft.porting.auto import AUTO
from regraft.porting.data import Unlabelled
from regraft.porting.function_ports import AT_ONCE, FITTED, TRAINED, UPDATES, count_affordable
from regraft.porting.job import Job
from regraft.porting.label_free import activation_bytes, predict
from regraft.porting.methods import ANY_MODEL, PORT_METHODS, STREAMED, VOTING_BATCHES, PortWork, Weights
from regraft.porting.model_spec import Settings
from regraft.porting.output_folder import keep_tensors

BASE, TUNED, NEW_BASE = ROLES = "base", "fine-tune", "new base"


class PortSettings(Settings, total=False):
    """What `port` takes besides the checkpoints: `Settings`, and

    method: of `PORT_METHODS`; "fgmt" if not given, "auto" where the data have no labels. All but "naive" and "weights"
        need ``data``. Where there are data, with any method accuracies are measured and, where the method has not
        made its own, BatchNorm statistics estimated anew.
    steps: T of the path of "fgmt", 30 if not given; updates of what trains, 100 if not given.
    lr: the learning rate of what trains; chosen among three if not given.
    labels: "none" leaves the labels of the data for training aside: the fine-tune's predictions stand in for them, as
        where the data have none. Test data keep theirs.
    new_model: the new base's model, where it is another one than ``model``, as that is given.
    """

    method: str | None
    steps: Count | None
    lr: NotNegative | None
    labels: Literal["given", "none"]
    new_model: str | nn.Module | None


def check_settings(method: str | None, settings: PortSettings) -> None:
    if method is not None and method not in PORT_METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(PORT_METHODS)}")
    if method not in STREAMED and settings.get("data") is None:
        raise ValueError(
            f"method {method or 'fgmt'!r} looks at inputs of the task: it needs data, with labels or without (--data; "
            "--method weights and naive need none)"
        )
    if settings.get("new_model") is not None and method not in (None, *ANY_MODEL):
        raise ValueError(
            f"method {method!r} needs a new base of the fine-tune's model; for another one there are "
            f"{', '.join(sorted(ANY_MODEL))}"
        )


def settle(job: Job, method: str | None, settings: PortSettings) -> Job:
    """The job with its method and what that needs, which may depend on whether the data have labels."""
    data = job.data
    if data is not None and settings.get("labels") == "none":
        data = data.without_labels()
    labelled = data is None or "train" not in data.unlabelled
    if method is None:
        method = "fgmt" if labelled and settings.get("new_model") is None else AUTO
    if method == "few-shot" and not labelled:
        raise ValueError("method 'few-shot' trains on labels, and there are none: distil trains on the fine-tune's")
    steps = settings.get("steps") or (UPDATES if method in TRAINED else 30)
    config: dict[str, Any] = {} if method in STREAMED else {"steps": steps}
    config |= {"lr": settings["lr"]} if settings.get("lr") is not None and method in TRAINED else {}
    config |= {} if labelled else {"labels": "the fine-tune's predictions"}
    if data is not None and (method in FITTED or not labelled):
        data = data.hold_out()
    return replace(job, method=method, data=data, config=config | dict(job.config))


def count_activation_bytes(job: Job) -> int:
    """What the inputs take that the job's method runs in one batch, where it does."""
    if job.method not in AT_ONCE or job.model_spec is None:
        return 0
    named = job.model_spec.require_model()
    return count_affordable(named.model, named.inputs) * activation_bytes(named.model, named.inputs)


def prepare_work(job: Job, tuned: Weights, part: Path, clock: Clock) -> tuple[Job, PortWork, dict[str, Any]]:
    """The job with the fine-tune's predictions as labels where the data have none, what a method may use, and what is
    to be said of the data."""
    work = PortWork(
        steps=job.config.get("steps", 1), lr=job.config.get("lr"), keep=partial(keep_tensors, part), clock=clock
    )
    if job.data is None or job.model_spec is None:
        return job, work, {}
    model, raw = job.model_spec.require_model().model, job.data
    data = raw.label(partial(_predict_classes, model, tuned))
    work = replace(work, model=model, train=data.train, validation=data.validation)
    job = replace(job, data=data)
    if "train" not in raw.unlabelled:
        return job, work, {}
    work = replace(work, inputs=Unlabelled(raw.train), labelled=False)
    return job, work, _warn_of_one_class(work)


def _predict_classes(model: nn.Module, tuned: Weights, inputs: Inputs) -> Tensor:
    return predict(model, dict(tuned.items()), [inputs])[0].argmax(-1)


def _warn_of_one_class(work: PortWork) -> dict[str, Any]:
    """What is to be said where the fine-tune gives all inputs that are looked at one class."""
    assert work.train is not None
    classes = torch.cat([split(batch)[1].flatten() for batch in islice(work.train, VOTING_BATCHES)])
    if len(classes) < 10 or len(classes.unique()) > 1:
        return {}
    said = f"the fine-tune puts all of {len(classes)} inputs into class {int(classes[0])}: are these data of its task?"
    return {"warning": said}
