"""What a run was worth at any time: the record that `regraft.finetuning.recorder.Recorder` makes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from regraft.core.clock import Cost, total_charge

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes


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

    cost: of training so far, evaluation apart. head_norm: ||W||_F. distance: ||theta - theta_source||_2, over all
    parameters but the head's.
    """

    step: int
    cost: Cost
    scores: Scores
    head_norm: float
    distance: float


@dataclass(frozen=True)
class Deployment:
    """The state that is deployed at a checkpoint: the best on validation up to ``step``, reached at ``state_step``.

    cost: of training until the checkpoint. scores: on the target's test images. source: on the source's, through the
    source's head (what is not forgotten); None where that is not measured. head_norm, distance: of the deployed state.
    """

    step: int
    state_step: int
    cost: Cost
    scores: Scores
    source: Scores | None
    head_norm: float
    distance: float


@dataclass(frozen=True)
class Record:
    """A run. ``deployments`` begin with step 0, the state before training, and end with the last step.

    seconds: by phase, "train" and "evaluation".
    """

    validations: tuple[Validation, ...]
    deployments: tuple[Deployment, ...]
    checkpoints: tuple[int, ...]
    seconds: dict[str, Cost]

    @property
    def cost(self) -> Cost:
        """Of training, evaluation apart."""
        return total_charge(self.seconds)

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
        checkpoints = self.at_checkpoints()
        rows = [row.source for row in checkpoints if row.source is not None]
        if len(rows) < len(checkpoints):
            raise ValueError("the source task was not measured: give the recorder a source")
        return _mean(row.top1 for row in rows)

    def validation_area(self) -> float:
        """The same of validation: what rates may be chosen by. At each checkpoint, the best accuracy so far."""
        return _mean(
            max(row.scores.top1 for row in self.validations if 0 < row.step <= checkpoint)
            for checkpoint in self.checkpoints
        )

    def steps_to_reach(self, accuracy: float) -> int | None:
        """The first checkpoint whose deployment has this target accuracy; None if none has."""
        return next((row.step for row in self.deployments if row.scores.top1 >= accuracy), None)

    def rows(self) -> list[dict[str, float]]:
        """The deployments, one flat dictionary each: step, state_step, wall and cpu seconds of training, the scores by
        name, those of the source task as source_top1 ..., head_norm, distance."""
        return [_flatten(row) for row in self.deployments]

    def frame(self) -> pandas.DataFrame:
        """`rows` as a table. Raises ImportError where pandas is not installed."""
        try:
            import pandas
        except ImportError as problem:
            raise ImportError("record.frame() needs pandas (pip install pandas); record.rows() does not") from problem
        return pandas.DataFrame(self.rows())

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the accuracy that is deployed over the steps of training, and what is left of the source task.

        axes: of matplotlib, where to draw; new ones if not given. Raises ImportError where matplotlib is not installed.
        """
        if axes is None:
            try:
                from matplotlib import pyplot
            except ImportError as problem:
                raise ImportError("record.plot() needs matplotlib (pip install matplotlib)") from problem
            _, axes = pyplot.subplots()
        rows = self.rows()
        for name, label in (("top1", "new task"), ("source_top1", "source task")):
            if name in rows[0]:
                steps, values = zip(*((row["step"], row[name]) for row in rows), strict=True)
                axes.step(steps, values, where="post", marker=".", label=label)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlabel("training step")
        axes.set_ylabel("accuracy if stopped here")
        axes.set_ylim(0, 1)
        axes.legend()
        return axes


def _flatten(row: Deployment) -> dict[str, float]:
    flat: dict[str, Any] = {"step": row.step, "state_step": row.state_step, **asdict(row.cost), **asdict(row.scores)}
    if row.source is not None:
        flat |= {f"source_{name}": value for name, value in asdict(row.source).items()}
    return flat | {"head_norm": row.head_norm, "distance": row.distance}


def _mean(values: Iterable[float]) -> float:
    areas = list(values)
    if not areas:
        raise ValueError("the run ended before its first checkpoint")
    return sum(areas) / len(areas)
