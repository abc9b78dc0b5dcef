"""The transfer study: scenarios are what the papers say, rows say what happened, pages show whatever rows there are."""

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch

from regraft import networks
from regraft.clock import Cost
from regraft.data import MissingData
from regraft.studies.figures import svg
from regraft.studies.rows import Code, Environment, Row, Series, digest, plain_data, read
from regraft.studies.run import run
from regraft.studies.study import TUNING_SEED, Method, Place, Scenario, Task
from regraft.studies.tables import Group, groups
from regraft.studies.transfer import STUDY
from regraft.studies.transfer.methods import METHODS, Pretraining, Settings, TransferSetting, measured
from regraft.studies.transfer.pages import COLUMNS, FIGURES, TABLES, epochs, reach, speed_up
from regraft.symmetry import apply
from regraft.training import Recipe
from regraft.trajectory import Trajectory

SCENARIOS = {scenario.name: scenario for scenario in STUDY.scenarios}

# ---------------------------------------------------------------- scenarios

# Design, section 5: epochs, learning rate, weight decay, T, gradient batches, BatchNorm batches.
PAPER = {
    "mnist-mlp-4096": (10, 0.01, 0, 10, 1, 0),
    "cifar10-conv8-paper": (60, 0.05, 1e-4, 30, 2, 0),
    "cifar100-conv8-pretrained-paper": (30, 0.05, 1e-4, 30, 1, 0),
    "imagenet-resnet18-paper": (100, 0.1, 1e-4, 30, 100, 20),
    "cars-resnet18-paper": (30, 0.1, 1e-4, 30, 10, 2),
    "cub200-resnet18-paper": (30, 0.1, 1e-4, 30, 10, 2),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(name):
    s = SCENARIOS[name].settings
    recipe = s.recipe
    found = (recipe.epochs, recipe.lr, recipe.weight_decay, s.steps, s.gradient_batches, s.bn_batches)
    assert found == PAPER[name]
    assert recipe.batch_size == 128 and recipe.momentum == 0.9 and recipe.optimizer == "sgd"
    assert recipe.warmup_epochs == (5 if name.startswith("imagenet") else 0)
    assert recipe.schedule == s.schedule.replace("uniform", "constant")
    assert s.subsequent.optimizer == "adam"
    assert s.subsequent.lr == (1e-6 if name.startswith("imagenet") else 1e-4)


def test_scenarios_are_frozen_data_and_no_two_are_the_same():
    assert len(SCENARIOS) == len(STUDY.scenarios), "names are unique"
    assert STUDY.select(STUDY.quick)
    with pytest.raises(FrozenInstanceError):
        SCENARIOS["digits-mlp"].settings.steps = 3
    written = {digest(s.config(s.method("fgmt"))) for s in STUDY.scenarios}
    assert len(written) == len(SCENARIOS)
    json.dumps([plain_data(s.settings) for s in STUDY.scenarios])


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_network_can_be_made(name):
    s = SCENARIOS[name].settings
    with torch.device("meta"):
        model = s.model(**s.arguments)
    batch_norm = any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert batch_norm == (s.bn_batches > 0), "BatchNorm statistics are estimated anew where there are any"


# ---------------------------------------------------------------- runs

BRIEF = Recipe(epochs=2, lr=0.05)
TINY = Settings(
    task=Task("digits"),
    model=networks.mlp,
    arguments={"sizes": (64, 16, 10)},
    recipe=BRIEF,
    subsequent=replace(BRIEF, epochs=1),
    steps=3,
    schedule="uniform",
)


def random_permutation(setting: TransferSetting):
    """A control: any network that computes the source's function is as good a source."""
    spec, generator = setting.traced[0], setting.generator("permutation")
    perm = {group: torch.randperm(size, generator=generator) for group, size in spec.groups.items()}
    start, end = (apply(spec, perm, theta) for theta in (setting.path.start, setting.path.end))
    path = Trajectory.linear(start, end, setting.path.steps)
    return measured(setting, setting.transfer("naive", path=path))


RANDOM = Method("random permutation", random_permutation)


def measure(folder: Path, settings: Settings, methods=METHODS, seeds=(0,), name="tiny") -> list[Row]:
    scenario = Scenario(name, methods, settings)
    place = Place(cache=folder / "cache")
    return list(run(STUDY, [scenario], place=place, rows=folder / "rows.jsonl", seeds=seeds))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("transfer")


@pytest.fixture(scope="module")
def rows(folder):
    return measure(folder, TINY, (*METHODS, RANDOM), seeds=(0, 1))


def test_every_method_gives_a_row_that_makes_sense(rows, folder):
    assert not [row.failure for row in rows if row.failure]
    assert read(folder / "rows.jsonl") == rows
    for row in rows:
        assert 0 <= row.values["accuracy"] <= 1 and 0 <= row.values["final"] <= 1
        assert row.values["peak_memory [bytes]"] > 1e6 and row.values["delta_ratio"] > 0
        trained = row.series["subsequent"]
        assert trained.at[0][0] == 0 and trained.values[-1] == row.values["final"]
        paid = row.series["subsequent cost [CPU s]"].values
        assert list(paid) == sorted(paid)
        assert paid[-1 if row.method == "plain" else 0] == pytest.approx(row.total.cpu), (
            "what was paid begins with the transfer"
        )


def test_steps_of_a_path_are_numbered_from_its_start(rows):
    for row in rows:
        if row.method != "plain":
            curve = dict(row.series["validation"].points())
            assert list(curve) == [0, 1, 2, 3]
            assert row.values["validation"] == curve[row.values["best_step"]] == max(list(curve.values())[1:])


def test_costs_are_what_the_method_took(rows):
    steps = TINY.steps
    of = {row.method: row for row in rows if row.seed == 0}
    assert of["fgmt"].values["gradients"] == 2 * steps and of["gmt"].values["gradients"] == steps * (
        steps + 1
    )
    assert of["naive"].values["gradients"] == 0 and of["naive"].values["objective"] is None
    assert {"gradients", "similarity", "assignment", "graft"} <= of["fgmt"].cost.keys()
    assert of["oracle"].cost["training"] == of["plain"].cost["training"], (
        "it pays for the training that it needs"
    )
    assert all("training" not in row.cost for name, row in of.items() if name not in ("oracle", "plain"))


def test_seeds_are_other_runs_of_the_same_thing(rows):
    first, second = ([row.values["accuracy"] for row in rows if row.seed == seed] for seed in (0, 1))
    assert len(first) == len(second) and first != second


def test_a_tuning_run_looks_at_no_test_data(tmp_path):
    found = measure(tmp_path, TINY, seeds=(TUNING_SEED,))
    for row in found:
        assert not row.failure and row.values["validation"] is not None
        assert row.values.get("accuracy") is None and row.values.get("final") is None
        assert not row.series.get("subsequent", Series.over("epoch", (), ())).points()


def test_pretrained_starts_batch_norm_and_augmentation(tmp_path):
    # The smallest network with BatchNorm, on two classes of digits after two others.
    settings = replace(
        TINY,
        task=Task("digits", (5, 6)),
        model=networks.cifar_resnet18,
        arguments={"num_classes": 2, "width": 0.04, "in_channels": 1},
        recipe=replace(BRIEF, epochs=1, augment=True),
        pretraining=Pretraining(Task("digits", (0, 1)), replace(BRIEF, epochs=1)),
        steps=1,
        bn_batches=2,
    )
    found = measure(tmp_path, settings)
    assert not [row.failure for row in found if row.failure]
    assert all("batchnorm" in row.cost for row in found if row.method != "plain")
    setting = TransferSetting(Scenario("tiny", METHODS, settings), 0, Place(cache=tmp_path / "cache"))
    assert not torch.equal(setting.source_start["conv1.weight"], setting.target_start["conv1.weight"])
    fresh = networks.build(
        lambda: settings.model(**settings.arguments), setting.generator("values", "target")
    )
    assert not torch.equal(setting.target_start["conv1.weight"], fresh.conv1.weight), "it has learned already"


def test_gradients_see_the_images_that_training_sees(tmp_path):
    def first(augment):
        settings = replace(TINY, recipe=replace(BRIEF, augment=augment))
        setting = TransferSetting(Scenario("tiny", METHODS, settings), 0, Place(cache=tmp_path))
        again, once = (next(iter(setting.stream()))[0] for _ in range(2))
        assert torch.equal(once, again), "every method sees the same ones"
        assert len(once) == settings.recipe.batch_size
        return once

    assert not torch.equal(first(True), first(False))


def test_missing_data_are_named_before_any_work(tmp_path):
    settings = replace(TINY, pretraining=Pretraining(Task("cifar10"), BRIEF))
    scenario = Scenario("absent", METHODS, settings)
    place = Place(data=tmp_path, cache=tmp_path / "cache")
    with pytest.raises(MissingData):
        list(run(STUDY, [scenario], place=place, rows=tmp_path / "rows.jsonl"))
    assert not (tmp_path / "rows.jsonl").exists() and not (tmp_path / "cache").exists()


def test_a_source_that_diverges_is_a_row_that_says_so(tmp_path):
    found = measure(tmp_path, replace(TINY, recipe=replace(BRIEF, lr=1e20)))
    assert all(row.failure and row.failure.startswith("diverged") for row in found)
    for table in TABLES:
        table.made([replace(row, scenario="digits-mlp") for row in found])


# ---------------------------------------------------------------- pages


@pytest.fixture
def shown(rows):
    """The rows as if two of the study's scenarios had been measured."""
    return [replace(row, scenario=name) for name in ("digits-mlp", "digits-mlp2") for row in rows]


def test_a_method_is_on_every_page_without_another_edit(shown):
    main, methods = (table.made(shown) for table in TABLES)
    assert [line[0] for line in main[0].lines] == ["digits-mlp", "digits-mlp2"]
    assert "random permutation" in main[0].heading and "plain" not in main[0].heading
    assert [sheet.title for sheet in methods] == ["digits-mlp", "digits-mlp2"]
    assert "random permutation" in [line[0] for line in methods[0].lines]
    assert sum("(n = 2" in note for note in methods[0].notes) == 4
    assert all("random permutation" in svg(figure, shown) for figure in FIGURES)
    assert all(len(figure.drawn(shown)) == 2 for figure in FIGURES), "scenarios without rows are left out"


def test_tables_are_whole(shown):
    for table in TABLES:
        for sheet in table.made(shown):
            assert all(len(line) == len(sheet.heading) for line in sheet.lines)
            assert all(cell for line in sheet.lines for cell in line)
            assert not any("|" in text for text in sheet.heading), "Markdown's own"


def row(method: str, seed: int, curve: list[tuple[float, float]], device: str = "cpu") -> Row:
    """Test accuracy after epoch e is curve[e][0], when curve[e][1] CPU seconds (half of it on the wall) are paid."""
    at = range(len(curve))
    series = {
        "subsequent": Series.over("epoch", at, [accuracy for accuracy, _ in curve]),
        "subsequent cost [CPU s]": Series.over("epoch", at, [paid for _, paid in curve]),
        "subsequent cost [wall s]": Series.over("epoch", at, [paid / 2 for _, paid in curve]),
    }
    environment = Environment(device, "a machine", 1, {}, "pytest bench")
    cost = {"training": Cost(curve[-1][1] / 2, curve[-1][1])}
    return Row(
        study="transfer", scenario="digits-mlp", method=method, seed=seed, config={},
        values={"accuracy": curve[-1 if method == "plain" else 0][0]}, series=series, cost=cost, notes={},
        failure=None, environment=environment, code=Code("0", "a", "b", None, None),
    )  # fmt: skip


def test_the_race_to_95_percent():
    plain = row("plain", 0, [(0.1, 0.0), (0.5, 10.0), (0.96, 20.0), (1.0, 30.0)])
    fast = row("fgmt", 0, [(0.9, 2.0), (0.97, 5.0)])
    assert reach(fast, 0.95) == (1, 5.0) and reach(fast, 0.98) is None
    assert reach(replace(fast, environment=replace(fast.environment, device="cuda:1")), 0.95) == (1, 2.5)
    group = groups([plain, fast])["fgmt"]
    assert epochs(group) == "1.0" and speed_up(group) == "4.0x"

    never = row("fgmt", 1, [(0.2, 2.0), (0.3, 5.0)])
    both = groups([plain, fast, replace(plain, seed=1), never])["fgmt"]
    assert epochs(both) == "1.0 (1 of 2)" and speed_up(both) == "4.0x (1 of 2)"
    assert speed_up(groups([replace(plain, seed=1), never])["fgmt"]) == "not reached"
    alone: Group = groups([fast])["fgmt"]
    assert speed_up(alone) == epochs(alone) == "–", "without plain training there is nothing to race"
    assert all(column.cell(alone) for column in COLUMNS)
