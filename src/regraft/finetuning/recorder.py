"""Anytime Deployment Performance: the performance of a run if it is stopped at any time (FAST, section 6.1).

    recorder = Recorder(model, validation=validation_batches, test=test_batches)
    for batch in batches:
        ...                                  # your training step
        recorder.after_step()
    record = recorder.finish()
    record.area(), record.steps_to_reach(0.9), record.deployments

The Fibonacci numbers 1, 2, 3, 5, 8, ... are the checkpoints. There, and later at every tenth step, the state is
validated, and the best one so far is kept and deployed, that is, tested. Tests of several states are done in one pass
over the data. Evaluation is timed apart from training.

Forgetting is the score of the features, through the detached source head, on the source's test set.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import merge
from itertools import count, groupby, takewhile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.core.arguments import check_arguments
from regraft.core.clock import EVALUATION, Clock, Cost, synchronise
from regraft.core.forward import call, split
from regraft.core.guard import evaluating, same_streams
from regraft.core.labels import rows_that_count
from regraft.core.tensors import Batch, Tensors, live_state, norm
from regraft.finetuning.record import Deployment, Record, Scores, Validation
from regraft.networks.heads import check_head, find_head, linear_of
from regraft.training.evaluation import check_batches

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

    (The paper says that the gap grows gradually from 1 to 10, but not how.) In the first 20 steps these are 15
    validations, which can take longer than the training itself.
    """
    step = 0
    while True:
        step += min(10, 1 + step // 10)
        yield step


def checkpoints_and_tenths(checkpoints: Iterator[int]) -> Iterator[int]:
    """Each checkpoint, and from step 20 on every tenth step: what is deployed is chosen among these states."""
    return (step for step, _ in groupby(merge(checkpoints, count(20, 10))))


# ---------------------------------------------------------------------------------------------------
# What is measured


def _check_classes(validation: Iterable[Batch], num_classes: int) -> None:
    """Raise ValueError for images of one class alone; as a rule the first batch answers."""
    seen: set[int] = set()
    for number, batch in enumerate(validation):
        _, labels = split(batch, number)
        seen.update(labels.tolist())
        if len(seen) > 1:
            return
    if seen and num_classes > 1:
        raise ValueError(
            f"all validation images are of class {seen.pop()}: a constant answer is always right, and no state is best"
        )


@check_arguments
def scores(model: nn.Module, states: Sequence[Mapping[str, Tensor]], batches: Iterable[Batch]) -> list[Scores]:
    """Scores of several states of one model, in evaluation mode, reading each batch once.

    Tensors absent from a state are the model's own. The last layer's tensors may have another number of classes
    than the model's. Raises ValueError where there is no batch, and as `regraft.training.evaluation.accuracy`
    for batches.
    """
    own = live_state(model)
    copies = [{name: value.detach().clone() for name, value in {**own, **s}.items()} for s in states]
    return _scores(model, copies, batches)


def _scores(model: nn.Module, states: Sequence[Tensors], batches: Iterable[Batch]) -> list[Scores]:
    """`scores` of complete states, without copying them."""
    count = 0
    totals: list[Tensor] = [torch.zeros((), dtype=torch.float64) for _ in states]
    with torch.inference_mode(), evaluating(model):
        for number, (inputs, labels) in enumerate(check_batches(batches)):
            count += len(labels)
            for k, tensors in enumerate(states):
                logits = call(model, tensors, inputs, where := f"batch {number}")
                logits, labels = rows_that_count(logits, labels, where)
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
    return torch.stack([right.sum().double(), (top5 & finite).sum().double(), -own.sum(), entropy.sum(), error.sum()])


# ---------------------------------------------------------------------------------------------------
# Forgetting


@dataclass(frozen=True, eq=False)
class Source:
    """To measure forgetting: the detached source head (`Adoption.source_head`), and the source's test batches."""

    head: nn.Linear
    test: Iterable[Batch]


# ---------------------------------------------------------------------------------------------------
# The recorder


class Recorder:
    """Records a run of any training loop: call `after_step` after every update, `finish` at the end.

    Args:
        model: as it is about to be trained. Its values are read, never changed; its mode is put back.
        validation, test: re-iterable batches of the target task, on the model's device.
        head: the name of the classifier; looked for (`regraft.networks.heads.find_head`) when not given.
        source: to measure forgetting too.
        origin: theta_source, to measure distances from; the model's values as they are now when not given.
        checkpoints: steps at which to deploy; the Fibonacci numbers when not given.
        validate_at: increasing steps at which to validate; `checkpoints_and_tenths` when not given. The paper's are
            `growing_gaps`: twice as many at first.
        hold: states kept for testing before a test pass is made; a pass tests them all.

    Deployed states are kept as copies. A call at which nothing is due is one comparison.

    Raises ValueError for checkpoints that do not increase from 1 on, for ``hold`` below 1, for validation images of one
    class alone, and as `regraft.networks.heads.find_head`.
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
        validate_at: Callable[[], Iterator[int]] | None = None,
        hold: int = 16,
    ) -> None:
        if hold < 1:
            raise ValueError(f"hold: at least one state must be held, not {hold}")
        self.model, self.validation, self.test, self.source = model, validation, test, source
        self.head = find_head(model) if head is None else check_head(model, head)
        with same_streams():  # a shuffled loader draws from the global state
            _check_classes(validation, linear_of(model, self.head).out_features)
        self.checkpoints = None if checkpoints is None else _increasing(checkpoints)
        self.step = 0
        self._hold = hold
        parameters = dict(model.named_parameters())
        self._device = next(iter(parameters.values())).device
        self._origin = {
            name: (parameters if origin is None else origin)[name].detach().clone()
            for name in parameters
            if not name.startswith(f"{self.head}.")
        }
        self._deploy_at = _Cursor(self._all_checkpoints())
        self._validate_at = _Cursor(
            checkpoints_and_tenths(self._all_checkpoints()) if validate_at is None else validate_at()
        )
        self._states: dict[int, Tensors] = {}  # by step: the best so far, and those that wait for their test
        self._best, self._best_accuracy = 0, -math.inf
        self._validations: list[Validation] = []
        self._deployments: list[Deployment] = []
        self._pending: list[tuple[int, int, Cost]] = []  # step, step of its state, cost until then
        self._clock, self._since = Clock(), _now()
        self._next: float = 0
        self._look()

    def after_step(self) -> Validation | None:
        """Count one more update; validate and deploy what is due. Returns the validation, if one was made."""
        self.step += 1
        return None if self.step < self._next else self._look()

    def finish(self, until: int | None = None) -> Record:
        """Deploy at the last step, if that is no checkpoint, test what is left, and return the record.

        until: the planned number of steps. If the run ended earlier (it diverged, or was stopped), its best state
        counts at the remaining checkpoints.
        """
        last = max(self.step, until or 0)
        checkpoints = fibonacci(last) if self.checkpoints is None else self.checkpoints
        with self._evaluation():
            known = {step for step, *_ in self._pending} | {row.step for row in self._deployments}
            left = {step for step in checkpoints if self.step < step <= last} | {last}
            for step in sorted(left - known):
                self._deploy(step)
            self._test()
        return Record(
            tuple(self._validations),
            tuple(self._deployments),
            tuple(step for step in checkpoints if step <= last),
            dict(self._clock.seconds),
        )

    def _all_checkpoints(self) -> Iterator[int]:
        return _all_fibonacci() if self.checkpoints is None else iter(self.checkpoints)

    def _look(self) -> Validation | None:
        """Validate and deploy what is due at this step; at step 0, both."""
        row = None
        with self._evaluation():
            if self.step in (0, self._validate_at.next):
                row = self._validate()
            if self.step in (0, self._deploy_at.next):
                self._deploy(self.step)
                if len({state for _, state, _ in self._pending}) >= self._hold:
                    self._test()
            self._next = min(cursor.beyond(self.step) for cursor in (self._validate_at, self._deploy_at))
        return row

    def _validate(self) -> Validation:
        live = live_state(self.model)
        (own,) = scores(self.model, [{}], self.validation)
        row = Validation(self.step, self._clock.cost, own, *self._geometry(live))
        self._validations.append(row)
        # The loss is not finite where a logit is not: such a state is never deployed.
        if self.step == 0 or (math.isfinite(own.loss) and own.top1 > self._best_accuracy):
            self._states[self.step] = {name: tensor.detach().clone() for name, tensor in live.items()}
            # The first step replaces the start in any case (the paper deploys trained states).
            self._best, self._best_accuracy = self.step, own.top1 if self.step else -math.inf
            self._drop_unneeded()
        return row

    def _deploy(self, step: int) -> None:
        self._pending.append((step, self._best, self._clock.cost))

    def _test(self) -> None:
        """Test the pending states in one pass, each once however many checkpoints deploy it."""
        wanted = sorted({state for _, state, _ in self._pending})
        if not wanted:
            return
        states = [self._states[step] for step in wanted]
        target = dict(zip(wanted, _scores(self.model, states, self.test), strict=True))
        source: dict[int, Scores] = {}
        if self.source is not None:
            own = {
                f"{self.head}.{name}": value.to(self._device) for name, value in self.source.head.state_dict().items()
            }
            back = [{**tensors, **own} for tensors in states]
            source = dict(zip(wanted, _scores(self.model, back, self.source.test), strict=True))
        geometry = {step: self._geometry(tensors) for step, tensors in zip(wanted, states, strict=True)}
        for step, state, cost in self._pending:
            self._deployments.append(Deployment(step, state, cost, target[state], source.get(state), *geometry[state]))
        self._pending.clear()
        self._drop_unneeded()

    def _geometry(self, tensors: Mapping[str, Tensor]) -> tuple[float, float]:
        """(||W||_F, ||theta - theta_source||_2)."""
        distance = norm(tensors[name].detach() - start for name, start in self._origin.items())
        return norm([tensors[f"{self.head}.weight"]]), distance

    def _drop_unneeded(self) -> None:
        needed = {state for _, state, _ in self._pending} | {self._best}
        self._states = {step: tensors for step, tensors in self._states.items() if step in needed}

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Charge the time so far to training, and the body to evaluation."""
        self._charge("train")
        try:
            with same_streams(self._device):  # loaders draw from them, and training must not see the difference
                yield
        finally:
            self._charge(EVALUATION)

    def _charge(self, phase: str) -> None:
        synchronise(self._device)
        now = _now()
        self._clock.add({phase: Cost(now.wall - self._since.wall, now.cpu - self._since.cpu)})
        self._since = now


def _now() -> Cost:
    return Cost(time.perf_counter(), time.process_time())


def _increasing(checkpoints: Sequence[int]) -> tuple[int, ...]:
    if list(checkpoints) != sorted(set(checkpoints)) or not checkpoints or checkpoints[0] < 1:
        raise ValueError(f"checkpoints must increase, from 1 on, not {list(checkpoints)}")
    return tuple(checkpoints)


class _Cursor:
    """The next of increasing steps; infinity after the last."""

    def __init__(self, steps: Iterator[int]) -> None:
        self._steps = steps
        self.next: float = next(steps, math.inf)

    def beyond(self, step: int) -> float:
        """Advance to the first step after ``step``."""
        while self.next <= step:
            self.next = next(self._steps, math.inf)
        return self.next
