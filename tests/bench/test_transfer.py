"""The transfer study: scenarios are what the papers say, rows say what happened, pages show whatever rows there are."""

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch

from regraft.core.clock import Cost
from regraft.data import MissingData
from regraft.learning_transfer.trajectory import Trajectory
from regraft.networks import papers as networks
from regraft.training.loop import Recipe
from regraft_bench.report.drawing import svg
from regraft_bench.report.tables import Group, groups
from regraft_bench.rows import Code, Environment, Row, Series, digest, plain_data, read_rows
from regraft_bench.run import run
from regraft_bench.study import TUNING_SEED, RunPaths, Scenario, Task
from regraft_bench.transfer import STUDY
from regraft_bench.transfer.methods.assumption import FIRST_GRADIENTS, UPDATES, distance
from regraft_bench.transfer.methods.cost import COUNTS
from regraft_bench.transfer.methods.ensembles import (
    ENSEMBLES,
    evaluate_together,
    make_ensemble,
    train_member,
)
from regraft_bench.transfer.methods.landscape import LINES, PLANE
from regraft_bench.transfer.methods.leads import LEADS, PAIRS
from regraft_bench.transfer.methods.peers import PEERS
from regraft_bench.transfer.methods.ports import port_methods
from regraft_bench.transfer.methods.transfers import TRANSFERS, run_transfer
from regraft_bench.transfer.pages import METHOD_COLUMNS, TRANSFER_TABLES, epochs, reach, speed_up
from regraft_bench.transfer.plots import TRANSFER_FIGURES
from regraft_bench.transfer.setting import PortSettings, Pretraining, TransferSetting, TransferSettings

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
    measured = (recipe.epochs, recipe.lr, recipe.weight_decay, s.steps, s.gradient_batches, s.bn_batches)
    assert measured == PAPER[name]
    assert recipe.batch_size == 128 and recipe.momentum == 0.9 and recipe.optimizer == "sgd"
    assert recipe.warmup_epochs == (5 if name.startswith("imagenet") else 0)
    assert recipe.schedule == ("constant" if name.startswith("mnist") else "cosine") and s.schedule == "uniform"
    if not name.startswith("imagenet"):  # the second version has no figure of it
        assert replace(s.subsequent, lr=recipe.lr, epochs=recipe.epochs) == recipe
        assert s.subsequent.lr < recipe.lr


def test_scenarios_are_frozen_data_and_no_two_are_the_same():
    assert len(SCENARIOS) == len(STUDY.scenarios), "names are unique"
    assert STUDY.select(STUDY.quick)
    with pytest.raises(FrozenInstanceError):
        SCENARIOS["digits-mlp"].settings.steps = 3
    identities = {digest([s.name.split("-")[0], plain_data(s.settings)]) for s in STUDY.scenarios}
    assert len(identities) == len(SCENARIOS), "but for a second look at the same thing"
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
TINY = TransferSettings(
    task=Task("digits"),
    model=networks.mlp,
    arguments={"sizes": (64, 16, 10)},
    recipe=BRIEF,
    subsequent=replace(BRIEF, epochs=1),
    steps=3,
    schedule="uniform",
)


def measure(folder: Path, settings: TransferSettings, methods=TRANSFERS, seeds=(0,), name="tiny") -> list[Row]:
    place = RunPaths(cache=folder / "cache")
    scenarios = [Scenario(name, methods, settings)]
    return list(run(STUDY, scenarios, place=place, rows=folder / "rows.jsonl", seeds=seeds))


def setting(folder: Path, settings: TransferSettings = TINY, seed: int = 0) -> TransferSetting:
    return TransferSetting(Scenario("tiny", TRANSFERS, settings), seed, RunPaths(cache=folder / "cache"))


def failures(rows: list[Row]) -> list[str]:
    return [f"{row.scenario}, {row.method}: {row.failure}" for row in rows if row.failure]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("transfer")


@pytest.fixture(scope="module")
def rows(folder):
    return measure(folder, TINY, (*TRANSFERS, *PEERS), seeds=(0, 1))


def test_every_method_gives_a_row_that_makes_sense(rows, folder):
    assert not failures(rows)
    assert read_rows(folder / "rows.jsonl") == rows
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
        if "best_step" in row.values:
            curve = dict(row.series["validation"].points())
            assert list(curve) == [0, 1, 2, 3]
            assert row.values["validation"] == curve[row.values["best_step"]] == max(list(curve.values())[1:])


def test_costs_are_what_the_method_took(rows):
    steps = TINY.steps
    of = {row.method: row for row in rows if row.seed == 0}
    assert of["fgmt"].values["gradients"] == 2 * steps and of["gmt"].values["gradients"] == steps * (steps + 1)
    assert of["naive"].values["gradients"] == 0 and of["naive"].values["objective"] is None
    assert {"gradients", "similarity", "assignment", "graft"} <= of["fgmt"].cost.keys()
    assert of["oracle"].cost["training"] == of["plain"].cost["training"], "it pays for the training that it needs"
    trained = ("oracle", "plain", "brief", "distillation")
    assert all("training" not in row.cost for name, row in of.items() if name not in trained)
    assert of["brief"].values["gradients"] == of["fgmt"].values["gradients"], "an equal price"
    assert of["warm-start"].values["accuracy"] == of["fgmt"].values["source"], "it is the source"
    assert of["warm-start"].total.cpu == 0


def test_seeds_are_other_runs_of_the_same_thing(rows):
    first, second = ([row.values["accuracy"] for row in rows if row.seed == seed] for seed in (0, 1))
    assert len(first) == len(second) and first != second


def test_a_tuning_run_looks_at_no_test_data(tmp_path):
    measured = measure(tmp_path, TINY, (*TRANSFERS, *PEERS), seeds=(TUNING_SEED,))
    for row in measured:
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
    measured = measure(tmp_path, settings)
    assert not failures(measured)
    assert all("batchnorm" in row.cost for row in measured if row.method != "plain")
    own = setting(tmp_path, settings)
    assert not torch.equal(own.source_start["conv1.weight"], own.target_start["conv1.weight"])
    fresh = networks.build(lambda: settings.model(**settings.arguments), own.generator("values", "target"))
    assert not torch.equal(own.target_start["conv1.weight"], fresh.conv1.weight), "it has learned already"


def test_gradients_see_the_images_that_training_sees(tmp_path):
    def first(augment):
        own = setting(tmp_path, replace(TINY, recipe=replace(BRIEF, augment=augment)))
        again, once = (next(iter(own.stream()))[0] for _ in range(2))
        assert torch.equal(once, again), "every method sees the same ones"
        assert len(once) == BRIEF.batch_size
        return once

    assert not torch.equal(first(True), first(False))


def test_missing_data_are_named_before_any_work(tmp_path):
    settings = replace(TINY, pretraining=Pretraining(Task("cifar10"), BRIEF))
    scenario = Scenario("absent", TRANSFERS, settings)
    place = RunPaths(data=tmp_path, cache=tmp_path / "cache")
    with pytest.raises(MissingData):
        list(run(STUDY, [scenario], place=place, rows=tmp_path / "rows.jsonl"))
    assert not (tmp_path / "rows.jsonl").exists() and not (tmp_path / "cache").exists()


def test_a_source_that_diverges_is_a_row_that_says_so(tmp_path):
    measured = measure(tmp_path, replace(TINY, recipe=replace(BRIEF, lr=1e20)))
    assert all(row.failure and row.failure.startswith("diverged") for row in measured)
    for table in TRANSFER_TABLES:
        table.make_sheets([replace(row, scenario="digits-mlp") for row in measured])


# ---------------------------------------------------------------- pages


@pytest.fixture
def shown(rows):
    """The rows as if two of the study's scenarios had been measured."""
    return [replace(row, scenario=name) for name in ("digits-mlp", "digits-mlp2") for row in rows]


def test_a_method_is_on_every_page_without_another_edit(shown):
    table = {table.name: table.make_sheets(shown) for table in TRANSFER_TABLES}
    assert [line[0] for line in table["main"][0].lines] == ["digits-mlp", "digits-mlp2"]
    assert "random" in table["main"][0].heading and "plain" not in table["main"][0].heading
    assert [sheet.title for sheet in table["methods"]] == ["digits-mlp", "digits-mlp2"]
    assert "random" in [line[0] for line in table["methods"][0].lines]
    assert sum("(n = 2" in note for note in table["methods"][0].notes) == 4
    figures = {figure.name: figure for figure in TRANSFER_FIGURES}
    assert "random" in svg(figures["path"], shown)
    assert len(figures["path"].collect_panels(shown)) == 2, "scenarios without rows are left out"


QUESTIONS = {
    "regime-mlp-base": TRANSFERS[:5],
    "regime-mlp-init-4": TRANSFERS[:5],
    "schedule-mlp2-recorded": TRANSFERS[1:],
    "sensitivity-mlp2-T-2": TRANSFERS[4:],
    "sensitivity-mlp2-base": TRANSFERS[4:],
    "fails-mlp2-lr-4x": TRANSFERS[:5],
    "inherits-digits": TRANSFERS,
    "assumption-mlp": UPDATES,
    "theorem-2x2-64": FIRST_GRADIENTS,
    "theorem-2x2-128": FIRST_GRADIENTS,
    "basin-digits-mlp2": (*LINES, PLANE),
    "ensemble-digits-mlp2": ENSEMBLES,
    "cost-digits-mlp": COUNTS,
    "peers-digits-mlp2": TRANSFERS[:1],
    "normalised-digits-mlp": (*TRANSFERS[4:], *LEADS),
}
PORT = PortSettings(
    **{**vars(TINY), "subsequent": None, "pretraining": Pretraining(Task("digits"), BRIEF)},
    images=(1, 2),
    alphas=(1.0,),
)


@pytest.fixture(scope="module")
def answers(folder):
    """Every question asked of the tiny setting, under the name of one of its scenarios."""
    measured = []
    for name, methods in QUESTIONS.items():
        settings = replace(TINY, schedule="recorded" if "recorded" in name else "uniform")
        settings = replace(settings, init_scale=4.0 if "init" in name else 1.0)
        measured += measure(folder, settings, methods, name=name)
    moved = [method for method in port_methods((0.1,)) if method.name in ("naive", "gradfix")]
    return measured + measure(folder, PORT, tuple(moved), name="port-resnet-cifar100")


def test_every_table_and_figure_is_made_of_rows(answers, shown):
    assert not failures(answers)
    led = [replace(row, scenario="digits-conv") for row in shown if row.scenario == "digits-mlp"]
    everything = [*answers, *shown, *led]
    for table in TRANSFER_TABLES:
        sheets = table.make_sheets(everything)
        assert sheets, table.name
        for sheet in sheets:
            assert sheet.lines and all(len(line) == len(sheet.heading) for line in sheet.lines)
            assert all(cell for line in sheet.lines for cell in line)
            assert not any("|" in text for text in sheet.heading), "Markdown's own"
    for figure in TRANSFER_FIGURES:
        assert svg(figure, everything), figure.name


@pytest.fixture(scope="module")
def of(answers):
    return {(row.scenario, row.method): row for row in answers}


def test_matching_brings_what_two_runs_learn_closer(of):
    first, best = (of["theorem-2x2-64", which].values["distance"] for which in ("identity", "gradients"))
    assert best < first, "matching brings gradients closer"
    one, each = (of["assumption-mlp", which].series["distance"] for which in ("identity", "each"))
    assert all(b <= a for a, b in zip(one.values, each.values, strict=True))
    assert one.at[0][0] == 1, "the first look is after one update"


def test_operations_are_counted_with_those_of_matching(of):
    values = {method.name: of["cost-digits-mlp", method.name].values for method in COUNTS}
    work = {name: own["work [FLOP]"] for name, own in values.items()}
    assert values["fgmt"]["gradients"] == 2 * TINY.steps
    per_gradient = work["plain"] / values["plain"]["gradients"]
    assert work["fgmt"] > values["fgmt"]["gradients"] * per_gradient, "matching counts, too"
    assert 0 < work["weights"] < per_gradient * 2 * TINY.steps


def test_an_ensemble_pays_for_its_members(of):
    alone, full = (of["ensemble-digits-mlp2", name].values for name in ("source alone", "all trained"))
    assert alone["disagreement"] == 0 and alone["members"] == 1
    assert full["total [CPU s]"] > alone["total [CPU s]"]
    once = of["ensemble-digits-mlp2", "fgmt, at once"]
    assert once.values["members"] == full["members"] and once.cost["gradients"].cpu > 0


def test_lines_leads_and_paths_say_what_they_should(of):
    line = of["basin-digits-mlp2", "source to naive"]
    assert line.values["barrier"] >= 0 and len(line.series["loss"].values) == 11
    assert of["normalised-digits-mlp", "nfgmt"].values["gradients"] == 2 * PAIRS * TINY.steps
    distances = of["schedule-mlp2-recorded", "fgmt"].series["unsettled"]
    assert distances.values[-1] == 0, "the last permutation is the last one"


def test_the_distance_is_one_minus_the_cosine_of_vectors_of_equal_length():
    v, w = {"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([4.0, -3.0])}
    assert distance(v, w) == pytest.approx(1) and distance(v, v) == 0


def test_calibration_by_hand():
    labels = torch.tensor([0, 0, 1, 1])
    sure = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])  # 3 right of 4, all at 100 %
    measured = evaluate_together(sure, labels)
    assert measured["accuracy"] == 0.75 and measured["calibration error"] == pytest.approx(0.25)
    assert measured["disagreement"] == 0 and measured["worst member"] == 0.75
    both = evaluate_together(torch.cat([sure, 1 - sure]), labels)
    assert both["disagreement"] == 1 and both["nll [nats]"] == pytest.approx(torch.tensor(2.0).log().item())


# ---------------------------------------------------------------- bad input


def test_an_ensemble_of_one_is_one_network_and_of_none_is_refused(folder):
    one = make_ensemble(train_member, 1, setting(folder))
    assert one.values["accuracy"] == one.values["mean of members"] and list(one.cost) == ["source"]
    with pytest.raises(ValueError, match="at least one member"):
        make_ensemble(train_member, 0, setting(folder))


def test_paths_of_other_lengths_and_spacings_transfer(folder):
    own = setting(folder)
    path = Trajectory(own.path.anchors, ((0, 0.0), (1, 0.05), (1, 1.0)), {})
    assert len(run_transfer(own, "fgmt", path=path).accuracies) == 3


def test_a_source_that_is_not_finite_is_named_with_its_step(folder):
    own = setting(folder)
    broken = {name: tensor.clone() for name, tensor in own.path[2].items()}
    broken["layers.0.weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"checkpoint 1.*layers\.0\.weight|layers\.0\.weight.*checkpoint 1"):
        Trajectory.recorded([own.path.start, broken, own.path.end])


def test_starts_of_other_label_sets_are_matched_where_the_network_has_room_for_them(tmp_path):
    earlier = Pretraining(Task("digits", (0, 1, 2)), replace(BRIEF, epochs=1), source_task=Task("digits", (3, 4)))
    settings = replace(TINY, task=Task("digits", (5, 6)), arguments={"sizes": (64, 16, 3)}, pretraining=earlier)
    assert not failures(measure(tmp_path, settings, TRANSFERS[:2]))
    narrow = measure(tmp_path, replace(settings, arguments={"sizes": (64, 16, 2)}), TRANSFERS[:2])
    assert all(row.failure and "label" in row.failure for row in narrow), "no output for the third class"


def test_chance_is_shown_and_not_hidden_behind_the_best_step(tmp_path):
    measured = measure(tmp_path, replace(TINY, recipe=replace(BRIEF, lr=0.0)), TRANSFERS[:2], name="digits-mlp")
    assert measured[1].notes["at chance"] and measured[1].values["accuracy"] is not None
    table = next(table for table in TRANSFER_TABLES if table.name == "main")
    assert "(chance)" in table.make_sheets(measured)[0].lines[0][1]


def test_a_tuning_run_is_refused_test_data(tmp_path):
    with pytest.raises(ValueError, match="test data"):
        setting(tmp_path, seed=TUNING_SEED).tests()


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
    assert epochs(group) == "1.00" and speed_up(group) == "4x"

    never = row("fgmt", 1, [(0.2, 2.0), (0.3, 5.0)])
    both = groups([plain, fast, replace(plain, seed=1), never])["fgmt"]
    assert epochs(both) == "1.00 (1 of 2)" and speed_up(both) == "4x (1 of 2)"
    assert speed_up(groups([replace(plain, seed=1), never])["fgmt"]) == "not reached"
    alone: Group = groups([fast])["fgmt"]
    assert speed_up(alone) == epochs(alone) == "–", "without plain training there is nothing to race"
    assert all(column.cell(alone) for column in METHOD_COLUMNS)
