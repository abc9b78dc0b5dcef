"""Anytime Deployment Performance: what a training run is worth whenever it is stopped (FAST, section 6.1).

    recorder = Recorder(model, validation=validation_batches, test=test_batches)
    for images, labels in batches:
        ...                                  # one's own training step
        recorder.after_step()
    record = recorder.finish()
    record.area(), record.steps_to_reach(0.9), record.deployments

Validations come one step apart at first and ten later; the state that is best on validation is kept; at the
Fibonacci numbers 1, 2, 3, 5, 8, ... the best state so far is deployed: tested. Tests are put off and done for
several states in one pass over the data. Evaluation is timed apart from training.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.clock import synchronise
from regraft.evaluation import mode
from regraft.files import write_beside
from regraft.heads import find_head
from regraft.models import Tensors, live_state

Batch = tuple[Tensor, Tensor]


# ---------------------------------------------------------------------------------------------------
# When


def fibonacci(steps: int) -> tuple[int, ...]:
    """1, 2, 3, 5, 8, ... up to ``steps``: the paper's checkpoints."""
    return tuple(takewhile(lambda step: step <= steps, _all_fibonacci()))


def _all_fibonacci() -> Iterator[int]:
    a, b = 1, 2
    while True:
        yield a
        a, b = b, a + b


def growing_gaps() -> Iterator[int]:
    """Validation steps: 1 apart at first, 2 apart after step 10, 3 after step 20, ..., never more than 10.

    (The paper says that the gap grows gradually from 1 to 10; how, it does not say.)
    """
    step = 0
    while True:
        step += min(10, 1 + step // 10)
        yield step


# ---------------------------------------------------------------------------------------------------
# What is measured


@dataclass(frozen=True)
class Scores:
    """Of one network on some images.

    top1, top5: shares of right answers (top5: 1 where there are five classes or fewer). loss: cross-entropy.
    entropy: of the predictions, in nats. error_variance: mean squared length of the error y - y_hat (equation 19).
    All are means over images.
    """

    top1: float
    top5: float
    loss: float
    entropy: float
    error_variance: float


@dataclass(frozen=True)
class Validation:
    """The current state at one step (0: before training).

    seconds, cpu_seconds: of training so far, evaluation apart. head_norm: ||W||_F. distance:
    ||theta - theta_source||_2, over all parameters but the head's.
    """

    step: int
    seconds: float
    cpu_seconds: float
    scores: Scores
    head_norm: float
    distance: float


@dataclass(frozen=True)
class Deployment:
    """The state that is deployed at a checkpoint: the best on validation up to ``step``, reached at ``state_step``.

    scores: on the target's test images. source: on the source's, through the source's head; None where that is not
    measured. seconds, cpu_seconds: of training until the checkpoint. head_norm, distance: of the deployed state.
    """

    step: int
    state_step: int
    seconds: float
    cpu_seconds: float
    scores: Scores
    source: Scores | None
    head_norm: float
    distance: float


@dataclass(frozen=True)
class Record:
    """A run. ``deployments`` begin with step 0, the state before training, and end with the last step."""

    validations: tuple[Validation, ...]
    deployments: tuple[Deployment, ...]
    seconds: float
    cpu_seconds: float
    evaluation_seconds: float
    evaluation_cpu_seconds: float
    checkpoints: tuple[int, ...]

    def at_checkpoints(self) -> tuple[Deployment, ...]:
        """The deployments at the checkpoints proper."""
        return tuple(row for row in self.deployments if row.step in self.checkpoints)

    def area(self) -> float:
        """Area under the ADP curve, from 0 to 1: the mean top-1 over the checkpoints.

        That is the area over the checkpoint's number, nearly the logarithm of the step: early steps count much.
        """
        return _mean(row.scores.top1 for row in self.at_checkpoints())

    def source_area(self) -> float:
        """The same of the source task. Raises ValueError where that was not measured."""
        rows = self.at_checkpoints()
        if any(row.source is None for row in rows):
            raise ValueError("the source task was not measured: give the recorder a source")
        return _mean(row.source.top1 for row in rows)  # type: ignore[union-attr]

    def validation_area(self) -> float:
        """The same of validation: what rates may be chosen by. At each checkpoint, the best accuracy so far."""
        return _mean(
            max(row.scores.top1 for row in self.validations if 0 < row.step <= checkpoint)
            for checkpoint in self.checkpoints
        )

    def steps_to_reach(self, accuracy: float) -> int | None:
        """The first checkpoint whose deployment has this target accuracy; None if none has."""
        return next((row.step for row in self.deployments if row.scores.top1 >= accuracy), None)

    def seconds_to_reach(self, accuracy: float) -> float | None:
        """Training seconds until that checkpoint."""
        return next((row.seconds for row in self.deployments if row.scores.top1 >= accuracy), None)

    def steps_until_source_below(self, accuracy: float) -> int | None:
        """The first checkpoint where less than this is left of the source task; None if it never fell so low."""
        rows = (row for row in self.deployments if row.source is not None)
        return next((row.step for row in rows if row.source.top1 < accuracy), None)  # type: ignore[union-attr]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        return cls(
            tuple(_validation(row) for row in data["validations"]),
            tuple(_deployment(row) for row in data["deployments"]),
            *(data[f.name] for f in fields(cls)[2:-1]),
            tuple(data["checkpoints"]),
        )


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    if not found:
        raise ValueError("the run ended before its first checkpoint")
    return sum(found) / len(found)


def _validation(row: Mapping[str, Any]) -> Validation:
    return Validation(**{**row, "scores": Scores(**row["scores"])})


def _deployment(row: Mapping[str, Any]) -> Deployment:
    source = None if row["source"] is None else Scores(**row["source"])
    return Deployment(**{**row, "scores": Scores(**row["scores"]), "source": source})


def scores(
    model: nn.Module, states: Sequence[Mapping[str, Tensor]], batches: Iterable[Batch]
) -> list[Scores]:
    """Scores of several states of one model, in evaluation mode, reading each batch once.

    Tensors absent from a state are the model's own. The last layer's tensors may have another number of classes
    than the model's. Raises ValueError where there is no batch.
    """
    count = 0
    totals: list[Tensor | float] = [0.0 for _ in states]
    with torch.inference_mode(), mode(model, lambda _: False):
        for images, labels in batches:
            count += len(labels)
            for k, tensors in enumerate(states):
                logits = torch.func.functional_call(model, dict(tensors), (images,))
                totals[k] = totals[k] + _sums(logits, labels)
    if count == 0:
        raise ValueError("there is no batch to evaluate on")
    return [Scores(*(total / count).tolist()) for total in totals]


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over a batch, float64 [5], in the order of Scores."""
    log_p = F.log_softmax(logits.double(), dim=1)
    p = log_p.exp()
    own = log_p.gather(1, labels[:, None])[:, 0]
    top5 = (log_p.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]).any(1)
    finite = logits.isfinite().all(1)
    error = p.square().sum(1) - 2 * own.exp() + 1
    entropy = -(p * log_p.clamp(min=-1e30)).sum(1)
    right = (logits.argmax(1) == labels) & finite
    return torch.stack(
        [right.sum().double(), (top5 & finite).sum().double(), -own.sum(), entropy.sum(), error.sum()]
    )


# ---------------------------------------------------------------------------------------------------
# Source: what the features still know


@dataclass(frozen=True, eq=False)
class Source:
    """The source task: its detached head (`regraft.finetune.Adoption.source_head`) and test batches."""

    head: nn.Linear
    test: Iterable[Batch]


# ---------------------------------------------------------------------------------------------------
# The recorder


class Recorder:
    """Records a run of any training loop: call `after_step` after every update, `finish` at the end.

    Args:
        model: as it is about to be trained. Its values are read, never changed; its mode is put back.
        validation, test: re-iterable batches of the target task, on the model's device.
        head: the name of the classifier; looked for (`regraft.heads.find_head`) when not given.
        source: to measure forgetting too.
        origin: theta_source, to measure distances from; the model's values as they are now when not given.
        checkpoints: steps at which to deploy; the Fibonacci numbers when not given.
        validate_at: increasing steps at which to validate.
        hold: states kept for testing before a test pass is made; a pass tests them all.
        folder: keep them there (safetensors) in place of memory.
        config: whatever tells this run from another; a saved recorder is only taken up by a run with the same.

    Deployed states are kept as copies. Between its calls the recorder does nothing at all; a call at which nothing is
    due is one comparison. Raises ValueError for checkpoints that are not increasing from 1 on.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        validation: Iterable[Batch],
        test: Iterable[Batch],
        head: str | None = None,
        source: Source | None = None,
        origin: Mapping[str, Tensor] | None = None,
        checkpoints: Sequence[int] | None = None,
        validate_at: Callable[[], Iterator[int]] = growing_gaps,
        hold: int = 16,
        folder: Path | str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.validation, self.test, self.source = model, validation, test, source
        self.head = find_head(model) if head is None else head
        self.checkpoints = None if checkpoints is None else tuple(checkpoints)
        if self.checkpoints is not None and (
            list(self.checkpoints) != sorted(set(self.checkpoints)) or self.checkpoints[:1] < (1,)
        ):
            raise ValueError(f"checkpoints must increase, from 1 on, not {list(self.checkpoints)}")
        self._deploy_at = _Cursor(
            iter(self.checkpoints) if self.checkpoints is not None else _all_fibonacci()
        )
        self._validate_at = _Cursor(validate_at())
        self._kept = _Kept(None if folder is None else Path(folder))
        self._hold = hold
        self._body = [name for name, _ in model.named_parameters() if not name.startswith(f"{self.head}.")]
        parameters = dict(model.named_parameters())
        self._origin = {n: (parameters if origin is None else origin)[n].detach().clone() for n in self._body}
        self._device = next(iter(parameters.values())).device
        self._config = json.loads(json.dumps(dict(config or {}), sort_keys=True, default=str))
        self.step = 0
        self._best, self._best_accuracy = 0, -math.inf
        self._validations: list[Validation] = []
        self._deployments: list[Deployment] = []
        self._pending: list[tuple[int, int, float, float]] = []  # step, state's step, seconds, CPU seconds
        self._seconds = self._cpu = self._evaluation = self._evaluation_cpu = 0.0
        self._wall0, self._cpu0 = time.perf_counter(), time.process_time()
        self._next = 0
        self._look()

    # -- called by the loop

    def after_step(self) -> Validation | None:
        """Count one more update; validate and deploy what is due. Returns the validation, if one was made."""
        self.step += 1
        if self.step < self._next:
            return None
        return self._look()

    def finish(self, until: int | None = None) -> Record:
        """Deploy at the last step, if that is no checkpoint, test what is left, and return the record.

        until: the steps that were planned. A run that ended before (it diverged, or was stopped) is judged at the
        checkpoints that are left by the best state that it had.
        """
        last = max(self.step, until or 0)
        checkpoints = fibonacci(last) if self.checkpoints is None else self.checkpoints
        self._pause()
        try:
            done = {row[0] for row in self._pending} | {row.step for row in self._deployments}
            for step in [*(s for s in checkpoints if self.step < s <= last), last]:
                if step not in done:
                    self._pending.append((step, self._best, self._seconds, self._cpu))
                    done.add(step)
            self._test()
        finally:
            self._go_on()
        return Record(
            tuple(self._validations),
            tuple(self._deployments),
            self._seconds,
            self._cpu,
            self._evaluation,
            self._evaluation_cpu,
            tuple(step for step in checkpoints if step <= last),
        )

    # -- the run, to be saved beside the model and the optimiser

    def state_dict(self) -> dict[str, Any]:
        """Everything that going on later needs, for torch.save; kept states are read from disk where they lie there."""
        return {
            "identity": self._identity(),
            "step": self.step,
            "best": self._best,
            "best_accuracy": self._best_accuracy,
            "validations": [asdict(row) for row in self._validations],
            "deployments": [asdict(row) for row in self._deployments],
            "pending": list(self._pending),
            "seconds": [self._seconds, self._cpu, self._evaluation, self._evaluation_cpu],
            "origin": dict(self._origin),
            "states": {step: self._kept[step] for step in self._kept.steps()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a recorded run. Raises ValueError, naming what differs, where it is another run's."""
        own, other = self._identity(), state["identity"]
        differing = sorted(key for key in own.keys() | other.keys() if own.get(key) != other.get(key))
        if differing:
            details = "; ".join(f"{key}: {other.get(key)!r} saved, {own.get(key)!r} now" for key in differing)
            raise ValueError(
                f"the saved record belongs to another run ({details}): "
                "go on with the configuration it was made with, or begin anew"
            )
        self.step, self._best, self._best_accuracy = state["step"], state["best"], state["best_accuracy"]
        self._validations = [_validation(row) for row in state["validations"]]
        self._deployments = [_deployment(row) for row in state["deployments"]]
        self._pending = [tuple(row) for row in state["pending"]]
        self._seconds, self._cpu, self._evaluation, self._evaluation_cpu = state["seconds"]
        self._origin = {name: value.to(self._device) for name, value in state["origin"].items()}
        self._kept.clear()
        for step, tensors in state["states"].items():
            self._kept[step] = {name: value.to(self._device) for name, value in tensors.items()}
        self._validate_at.pass_by(self.step)
        self._deploy_at.pass_by(self.step)
        self._next = min(self._validate_at.next, self._deploy_at.next)
        self._wall0, self._cpu0 = time.perf_counter(), time.process_time()

    def _identity(self) -> dict[str, Any]:
        shapes = [(name, list(tensor.shape)) for name, tensor in sorted(live_state(self.model).items())]
        return {
            "model": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16],
            "head": self.head,
            "checkpoints": None if self.checkpoints is None else list(self.checkpoints),
            "source": self.source is not None,
            **self._config,
        }

    # -- what is due

    def _look(self) -> Validation | None:
        """Validate and deploy what is due at this step; at step 0, both."""
        self._pause()
        row = None
        try:
            if self.step in (0, self._validate_at.next):
                row = self._validate()
            if self.step in (0, self._deploy_at.next):
                self._pending.append((self.step, self._best, self._seconds, self._cpu))
                if len({state for _, state, _, _ in self._pending}) >= self._hold:
                    self._test()
            self._validate_at.pass_by(self.step)
            self._deploy_at.pass_by(self.step)
            self._next = min(self._validate_at.next, self._deploy_at.next)
        finally:
            self._go_on()
        return row

    def _validate(self) -> Validation:
        live = live_state(self.model)
        (found,) = scores(self.model, [{}], self.validation)
        row = Validation(self.step, self._seconds, self._cpu, found, *self._geometry(live))
        self._validations.append(row)
        if self.step == 0 or found.top1 > self._best_accuracy:
            self._kept[self.step] = {name: tensor.detach().clone() for name, tensor in live.items()}
            # Whatever the start is worth, the first step is the first candidate (the paper deploys trained states).
            self._best, self._best_accuracy = self.step, found.top1 if self.step else -math.inf
            self._forget()
        return row

    def _geometry(self, tensors: Mapping[str, Tensor]) -> tuple[float, float]:
        """(||W||_F, ||theta - theta_source||_2)."""
        moved = torch._foreach_sub([tensors[n].detach() for n in self._body], list(self._origin.values()))
        norms = torch.stack(torch._foreach_norm(moved)) if moved else torch.zeros(1)
        weight = tensors[f"{self.head}.weight"].detach()
        return float(weight.norm()), float(norms.norm())

    def _test(self) -> None:
        """Test the pending states in one pass, each once however many checkpoints deploy it."""
        wanted = sorted({state for _, state, _, _ in self._pending})
        states = [self._kept[step] for step in wanted]
        target = dict(zip(wanted, scores(self.model, states, self.test), strict=True)) if wanted else {}
        source: dict[int, Scores] = {}
        if self.source is not None and wanted:
            own = {f"{self.head}.{name}": value for name, value in self.source.head.state_dict().items()}
            own = {name: value.to(self._device) for name, value in own.items()}
            back = [{**tensors, **own} for tensors in states]
            source = dict(zip(wanted, scores(self.model, back, self.source.test), strict=True))
        geometry = {step: self._geometry(tensors) for step, tensors in zip(wanted, states, strict=True)}
        for step, state, seconds, cpu in self._pending:
            self._deployments.append(
                Deployment(step, state, seconds, cpu, target[state], source.get(state), *geometry[state])
            )
        self._pending.clear()
        self._forget()

    def _forget(self) -> None:
        needed = {state for _, state, _, _ in self._pending} | {self._best}
        for step in self._kept.steps() - needed:
            del self._kept[step]

    # -- time

    def _pause(self) -> None:
        """Training stops here."""
        synchronise(self._device)
        now, cpu = time.perf_counter(), time.process_time()
        self._seconds += now - self._wall0
        self._cpu += cpu - self._cpu0
        self._wall0, self._cpu0 = now, cpu

    def _go_on(self) -> None:
        synchronise(self._device)
        now, cpu = time.perf_counter(), time.process_time()
        self._evaluation += now - self._wall0
        self._evaluation_cpu += cpu - self._cpu0
        self._wall0, self._cpu0 = now, cpu


class _Cursor:
    """The next of increasing steps; a number that is never reached once they are over."""

    def __init__(self, steps: Iterator[int]) -> None:
        self._steps = steps
        self.next: float = next(steps, math.inf)

    def pass_by(self, step: int) -> None:
        while self.next <= step:
            self.next = next(self._steps, math.inf)


class _Kept:
    """States by step, in memory or as files of a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._states: dict[int, Tensors] = {}
        self._files: dict[int, tuple[Path, torch.device]] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def steps(self) -> set[int]:
        return set(self._states) | set(self._files)

    def __setitem__(self, step: int, tensors: Tensors) -> None:
        if self._folder is None:
            self._states[step] = tensors
            return
        from safetensors.torch import save_file

        path = self._folder / f"state-{step}.safetensors"
        on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_beside(path, lambda part: save_file(on_cpu, part))
        self._files[step] = path, next(iter(tensors.values())).device

    def __getitem__(self, step: int) -> Tensors:
        if self._folder is None:
            return self._states[step]
        from safetensors.torch import load_file

        path, device = self._files[step]
        return load_file(path, device=str(device))

    def __delitem__(self, step: int) -> None:
        if self._folder is None:
            del self._states[step]
        else:
            self._files.pop(step)[0].unlink(missing_ok=True)

    def clear(self) -> None:
        for step in self.steps():
            del self[step]
