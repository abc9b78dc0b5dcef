"""What rows of the fusion study depend on, as frozen data: two kinds of settings.

:class:`OntoTargets` (theta_n + alpha g, theta_n + alpha theta_A: tables 1 to 4 and the figures) and :class:`TwoTasks`
(theta_A and theta_B from one theta_0: tables 5, 6 and A1 to A19); :class:`Theory` is appendix B.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from regraft.training.loop import Recipe
from regraft_bench.study import Task

GRADIENT, WEIGHTS = "theta_n + alpha g", "theta_n + alpha theta_A"
TWO_GRADIENTS, TWO_NETWORKS = "theta_0 + alpha g_1 + beta g_2", "alpha theta_A + beta theta_B"


@dataclass(frozen=True)
class Regime:
    """How a scenario's networks are trained, the same for every task: all that a search for the recipe may vary.

    small, medium, large: the recipe of each scale. width: factor of the channels. precision: of a training step's
    activations; "bfloat16" takes half the CPU time where the processor knows it. Values and evaluation are float32.
    """

    small: Recipe
    medium: Recipe
    large: Recipe
    width: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"

    def recipe(self, scale: str) -> Recipe:
        return {"small": self.small, "medium": self.medium, "large": self.large}[scale]


@dataclass(frozen=True)
class Target:
    """A task that a target theta_n was trained on; ``instead_of``: the paper's own, where that is missing."""

    label: str
    task: Task
    instead_of: str = ""


@dataclass(frozen=True)
class PanelSettings:
    """One question of a figure: theta_A learned at which scale, evaluated on "test" or the "small" training images."""

    name: str
    scale: str
    evaluated_on: str


@dataclass(frozen=True)
class OntoTargets:
    """Tables 1 to 4 and figures 1 to 4: one source, added to five targets from other initial values.

    onto: "random" or "trained" targets. targets: for each, the paper's task and what stands in where it is missing.
    target_steps: small data sets get as many epochs as give so many steps, so that targets are well trained.
    images: at most so many images for each accuracy (None: all); held_out: of the validation images.
    """

    formula: str
    onto: str
    panels: tuple[PanelSettings, ...]
    alphas: tuple[float, ...]
    task: Task
    targets: tuple[tuple[Target, ...], ...]
    network: str
    regime: Regime
    target_steps: int = 1500
    images: int | None = None
    held_out: int = 1000
    batch: int = 250


@dataclass(frozen=True)
class TwoTasks:
    """Tables 5, 6 and A1 to A19: theta_A and theta_B, trained on two tasks from one theta_0, share their outputs.

    formula: what is summed over the grid of alphas and betas. evaluated_on: "test" or "training" images of the scale.
    controls: values of alpha = beta at which other ways of summing are measured. pretraining: what task arithmetic
    starts from, where it is asked for.
    images: at most so many images for each accuracy (None: all); held_out: of the validation images. batch: images
    that are normalised together. b_epochs: of theta_B's training, where it is not as many as theta_A's.
    """

    a: Task
    b: Task
    alphas: tuple[float, ...]
    betas: tuple[float, ...]
    network: str
    regime: Regime
    formula: str = TWO_NETWORKS
    scale: str = "large"
    evaluated_on: str = "test"
    controls: tuple[float, ...] = (0.1, 0.5, 1.0, 5.0)
    pretraining: Task | None = None
    images: int | None = None
    held_out: int = 1000
    batch: int = 250
    b_epochs: int | None = None


@dataclass(frozen=True)
class Theory:
    """Full-batch steps on both tasks at some learning rates: how much of sequential training's difference from
    assignment is the Hessian term.

    images: training images a class of each task.
    """

    a: Task
    b: Task
    network: str
    regime: Regime
    steps: tuple[int, ...] = (1, 5)
    rates: tuple[float, ...] = (0.1, 0.01, 1e-3, 1e-4, 1e-5)
    images: int = 10
