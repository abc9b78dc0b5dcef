"""The contract of every study: what is measured, by which methods, and what a method may ask for.

    Scenario(name, methods, seeds, settings)     frozen data: a comparison, or a paper's table or figure
    Method(name, run)                            run(setting) -> Measured; plain training, controls and peers too
    Measured(values, series, cost, notes)        what one run found; the runner makes a row of it

A study is a list of scenarios, the class of its settings, and the tables and figures that are made of its rows.
`regraft_bench.run` runs it, `regraft_bench.rows` keeps what it found, `regraft_bench.report.render` shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regraft.core import tensors
from regraft.core.clock import Cost
from regraft.core.files import alone
from regraft.data import Dataset, draw_per_class, load
from regraft.training.loop import Recipe, Training, train
from regraft_bench.rows import Environment, Series, code, digest, environment, plain_data
from regraft_bench.text import STANDARD_LIBRARY, load_text

if TYPE_CHECKING:
    from regraft_bench.report.figures import Figure
    from regraft_bench.report.tables import Column, Table

__all__ = ["TUNING_SEED", "Measured", "Method", "RunPaths", "Scenario", "Series", "Setting", "Study", "Task"]

TUNING_SEED = 1000
"""The seed of runs that only choose among a method's candidates: no reported run has it."""


@dataclass(frozen=True)
class Task:
    """A data set, or some classes of one: names for :func:`regraft.data.load`.

    size, channels: images are brought to these. per_class: so many training images of each class, drawn once for
    each seed; a smaller number's are among a larger one's. validation: share of the training images held out.
    """

    data: str
    classes: tuple[int | str, ...] | None = None
    size: int | None = None
    channels: int | None = None
    per_class: int | None = None
    validation: float = 0.1


@dataclass(frozen=True)
class RunPaths:
    """Where a run finds and leaves things. It does not affect results, except the kind of device.

    data: folder of the data sets (None: the library's default). cache: finished and interrupted trainings.
    begun: since when rows of other runners on the same file need not be measured again (UTC, as in rows; None: since
        the call of the runner).
    tell: is called with (what, done, total) during work that takes long.
    """

    data: Path | None = None
    cache: Path = field(kw_only=True)
    begun: str | None = None
    device: str = "cpu"
    tell: Callable[[str, int, int], None] = lambda what, done, total: None


@dataclass(frozen=True)
class Measured:
    """What one run of a method found.

    values: numbers by name; a name without a unit in brackets is a pure number, as accuracies from 0 to 1 are; others
        say theirs ("peak_memory [bytes]"). None: was not measured, or is not finite.
    series: curves and grids by name.
    cost: seconds by phase, wall clock and CPU; "evaluation" is shown and not charged.
    notes: whatever else belongs to the run (JSON data), such as which data set stood in for another.
    """

    values: Mapping[str, float | None]
    series: Mapping[str, Series] = field(default_factory=dict)
    cost: Mapping[str, Cost] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A way to do a scenario's task.

    run: does it, with what the setting has. config: what sets this method apart from others of the same name (part of
    a row's identity). candidates: variants (rates, strengths) of which the one with the largest `tuned_by` on
    `TUNING_SEED` is run and reported under this method's name; what was tried is kept as rows, and nothing else is.
    about: what it does, in a sentence or two for the page; where it is not given, how the docstring of ``run`` begins.
    """

    name: str
    run: Callable[[Any], Measured]
    config: Mapping[str, Any] = field(default_factory=dict)
    candidates: tuple[Method, ...] = ()
    tuned_by: str = "validation"
    about: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "about", self.about or first_paragraph(self.run))


@dataclass(frozen=True)
class Scenario:
    """One comparison: every method, with seeds 0 .. seeds - 1, under the same settings (a frozen dataclass)."""

    name: str
    methods: tuple[Method, ...]
    settings: Any
    seeds: int = 3

    def method(self, name: str) -> Method:
        """Raises ValueError, with the names that there are, for an unknown one."""
        known = {method.name: method for method in self.methods}
        if name not in known:
            raise ValueError(f"scenario {self.name} has no method {name!r}: there are {', '.join(known)}")
        return known[name]

    def config(self, method: Method) -> dict[str, Any]:
        """What all rows of a method have in common, as JSON data."""
        return {"settings": plain_data(self.settings), "method": plain_data(method.config)}


@dataclass(eq=False)
class Setting:
    """What a method may ask for, in one scenario with one seed. What a study's subclass computes, it keeps in
    ``cached_property``s: methods of the same scenario and seed share it, and it goes when they are done.
    """

    scenario: Scenario
    seed: int
    place: RunPaths
    method: Method | None = None  # the one that is running

    @property
    def tuning(self) -> bool:
        """Whether this run only chooses among candidates: it must not look at test data."""
        return self.seed == TUNING_SEED

    @property
    def settings(self) -> Any:
        return self.scenario.settings

    @property
    def device(self) -> str:
        return self.place.device

    def environment(self) -> Environment:
        """What a run of this setting runs on, for its row."""
        return environment(self.device)

    def generator(self, *purpose: Any) -> torch.Generator:
        """Random numbers of their own for every purpose, the same in every run of this seed."""
        return seeded_generator(self.seed, *purpose)

    def dataset(self, task: Task, seed: int = 0) -> Dataset:
        """A task's data, in memory, split with ``seed``. Raises MissingData where they are not there."""
        data = _load_task(replace(task, per_class=None), seed, self.place.data)
        if task.per_class is None:
            return data
        generator = self.generator("per class", task.data, task.classes)
        few = draw_per_class(data.train.labels, task.per_class, generator)
        return replace(data, train=data.train.subset(few))

    def cache_file(self, kind: str, asked: Any, suffix: str) -> Path:
        """Where the cache keeps what this code computed from ``asked`` (JSON data). Other code does not read it."""
        return self.place.cache / f"{kind}-{digest([code().trees, asked])}{suffix}"

    def train(
        self,
        purpose: str,
        model: nn.Module,
        start: Mapping[str, Tensor],
        data: Dataset,
        recipe: Recipe,
        *,
        order: str | None = None,
        **how: Any,
    ) -> Training:
        """Train as :func:`regraft.training.loop.train` does; interrupted, it goes on, and finished, it is read.

        purpose: names the training within this seed. order: names the order of the images, where several trainings
        are to see the same one. Scenarios share a training of the same purpose, start, data, recipe and code.
        """
        asked: list[Any] = [purpose, order, self.seed, recipe, repr(model), tensors.digest_tensors(start)]
        asked += [_describe_data(data), None if (penalty := how.get("penalty")) is None else penalty.identity]
        if looks := sorted(how.get("evaluate_at", ())):
            asked.append(looks)
        file = self.cache_file("training", asked, ".safetensors")

        def report_epoch(row: Any) -> None:
            self.place.tell(f"{self.scenario.name}: {purpose}", round(row.epoch), recipe.epochs)

        with alone(file.with_suffix(".lock")):  # who wants the same training waits, and reads it
            return train(
                model,
                start,
                data,
                recipe,
                generator=self.generator("order", order or purpose),
                device=self.device,
                checkpoint=file,
                on_epoch=report_epoch,
                **how,
            )


@dataclass(frozen=True)
class Study:
    """A paper's experiments, or a set of measurements: scenarios, and what is made of their rows.

    setting: the class that its methods are handed. quick: the scenarios of the default bench.
    tables, figures: the pages, made of rows and of nothing else. summary: the columns that the bench shows at its end.
    headlines: the figures that say most, first on the page.
    """

    name: str
    title: str
    setting: type[Setting]
    scenarios: tuple[Scenario, ...]
    quick: tuple[str, ...]
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    summary: tuple[Column, ...] = ()
    headlines: tuple[str, ...] = ()

    def select(self, names: Sequence[str]) -> list[Scenario]:
        """The scenarios of these names. Raises ValueError, with the nearest ones there are, for an unknown name."""
        known = {scenario.name: scenario for scenario in self.scenarios}
        for name in names:
            if name not in known:
                raise ValueError(f"study {self.name} has no scenario {name!r}{nearest(name, known)}")
        return [known[name] for name in names]


def first_paragraph(part: Any) -> str:
    """How the docstring of a function, or of a class or object, begins: its first paragraph, in one line."""
    while isinstance(part, partial):
        part = part.func
    paragraph, _, _ = (getattr(part, "__doc__", None) or "").strip().partition("\n\n")
    return " ".join(paragraph.split())


def nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """ "; did you mean ...?" with the closest of the known names, or all of a few."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4) or list(known)[:8]
    return f"; did you mean {', '.join(close)}?" if close else ""


def seeded_generator(*purpose: Any) -> torch.Generator:
    """A generator whose numbers depend on the purpose alone (JSON data)."""
    return torch.Generator().manual_seed(int(digest(list(purpose))[:15], 16))


def _describe_data(data: Dataset) -> list[Any]:
    """What sets the data of two trainings apart."""
    sizes = [len(data.train), len(data.validation), len(data.test)]
    return [data.name, data.classes, data.shape, sizes, tensors.tensor_digest(data.train.labels)]


@lru_cache(maxsize=4)
def _load_task(task: Task, seed: int, root: Path | None) -> Dataset:
    if task.data == STANDARD_LIBRARY:
        return load_text([str(module) for module in task.classes or ()], seed, task.validation)
    return load(
        task.data,
        root=root,
        classes=task.classes,
        seed=seed,
        validation=task.validation,
        image_size=task.size,
        channels=task.channels,
    ).in_memory()
