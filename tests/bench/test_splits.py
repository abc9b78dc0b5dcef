"""Which numbers of a row come from which split: replace a split, and these numbers change, and no others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

import regraft_bench.study
from regraft.core.registry import register
from regraft.data import Dataset, Split, load
from regraft.training.loop import Recipe
from regraft_bench import fast, fusion, transfer
from regraft_bench.fast.methods import Imprint, at_rates, warm_up
from regraft_bench.fast.setting import FastSettings, Origin
from regraft_bench.fusion import continual, onto_targets, two_tasks
from regraft_bench.fusion import setting as fusion_setting
from regraft_bench.fusion.settings import GRADIENT, OntoTargets, PanelSettings, Regime, Target, TwoTasks
from regraft_bench.study import TUNING_SEED, Measured, Method, RunPaths, Scenario, Setting, Study, Task
from regraft_bench.transfer.methods import ensembles, landscape, peers, ports, transfers
from regraft_bench.transfer.setting import PortSettings, Pretraining, TransferSettings

SIZES = {"train": 50, "validation": 65, "test": 85}
A, B = Task("rows"), Task("columns")


def make_dataset(task: Task, replaced: str) -> Dataset:
    """Five classes, each with a bright row or column; in the replaced split, other images and the next label.

    So a network that has learned the task is right on its images, and wrong on those of the replaced split.
    """
    splits = {}
    for name, count in SIZES.items():
        other = name == replaced
        generator = torch.Generator().manual_seed(1000 * other + len(name))
        images, labels = torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % 5
        bright = images if task.data == A.data else images.transpose(2, 3)
        bright[torch.arange(count), :, labels] += 0.7
        splits[name] = Split(images, (labels + other) % 5, (0.5,), (0.3,))
    return Dataset(task.data, **splits, classes=tuple("abcde"), mean=(0.5,), std=(0.3,))


@register
def batchnorm_mlp(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(),
        nn.Linear(16, num_classes),
    )  # fmt: skip


# ---------------------------------------------------------------- the studies, as small as can be


@dataclass(frozen=True)
class Case:
    """of_test: what is measured on test images; every other number may not depend on them.

    trained: what training alone decides, so neither test nor validation images. tuned: its methods may choose among
    candidates.
    """

    study: Study
    scenario: Scenario
    of_test: frozenset[str]
    trained: tuple[str, ...] = ()
    tuned: bool = True


def pick(names: str, among: Iterable[Method]) -> tuple[Method, ...]:
    known = {method.name: method for method in among}
    return tuple(known[name] for name in names.split(", "))


def words(text: str) -> frozenset[str]:
    return frozenset(text.split(", "))


BRIEF = Recipe(epochs=2, lr=0.1, batch_size=10)
REGIME, FACTORS = Regime(BRIEF, BRIEF, BRIEF), (0.3, 0.6, 1.0)
PAIR = TwoTasks(A, B, FACTORS, FACTORS, "batchnorm_mlp", REGIME, controls=FACTORS)
ONTO = OntoTargets(
    GRADIENT, "trained", (PanelSettings("panel", "large", "test"),), (0.5, 1.0, 2.0), A, ((Target("b", B),),),
    "batchnorm_mlp", REGIME, target_steps=10,
)  # fmt: skip
TRANSFER = TransferSettings(
    A, batchnorm_mlp, BRIEF, BRIEF, 2, "uniform", {"num_classes": 5}, gradient_batch=10, bn_batches=2
)
PORT = PortSettings(
    A, batchnorm_mlp, BRIEF, None, 2, "uniform", {"num_classes": 5}, bn_batches=2,
    pretraining=Pretraining(B, BRIEF), images=(2,), alphas=(0.5, 1.0),
)  # fmt: skip

FINE_TUNED = (
    at_rates("fast", 0.3, 0.1),
    at_rates("warm-up", 0.1, 0.1, plan=warm_up),
    at_rates("class means", 0.1, 0.1, prepare=Imprint(2)),
)
SUMS = pick(
    "theta_A alone, fused statistics, reset statistics, Fisher merging, REPAIR, A then B, EWC",
    (*two_tasks.TWO_TASK_CONTROLS, *two_tasks.OF_NETWORKS, *continual.CONTINUAL),
)
ONTO_TARGETS = pick("sum, REPAIR, ensemble", (*onto_targets.TARGET_SUMS, *onto_targets.TARGET_CONTROLS))
TRANSFERRED = pick("plain, naive, fgmt, end-weights, brief", (*transfers.TRANSFERS, *peers.PEERS))
TOGETHER = pick("brief, source to naive", (*ensembles.ENSEMBLES, *landscape.LINES))
PORTED = pick("own base, probe, few-shot, fgmt", ports.port_methods((0.1,)))

CASES = (
    Case(
        fast.STUDY,
        Scenario("fast", FINE_TUNED, FastSettings(Origin(batchnorm_mlp, A, BRIEF), B, 5, batch_size=10)),
        words("accuracy, area, source_start, source_end, source_area, source_lowest, deployed curve, source curve"),
        ("head_norm curve",),
    ),
    Case(
        fusion.STUDY,
        Scenario("two tasks", (two_tasks.SUM, *SUMS), PAIR),
        words("accuracy, accuracy_a, accuracy_b, accuracy_a curve, accuracy_b curve"),
        ("training_a", "training_b"),
    ),
    Case(
        fusion.STUDY,
        Scenario("table of training images", (two_tasks.SUM,), replace(PAIR, evaluated_on="training")),
        words("accuracy, accuracy_a, accuracy_b"),
        ("accuracy_a curve", "accuracy_b curve"),
    ),
    Case(
        fusion.STUDY,
        Scenario("two networks", (*two_tasks.DIAGONAL, *two_tasks.AVERAGES[1:]), PAIR),
        words("accuracy, accuracy_a, accuracy_b, own_a, own_b, other_a, other_b, accuracy_a curve, accuracy_b curve"),
        ("delta_ratio", "delta_ratio_a", "delta_ratio_b"),
        tuned=False,
    ),
    Case(
        fusion.STUDY,
        Scenario("onto targets", ONTO_TARGETS, ONTO),
        words("accuracy, both_tasks, panel curve, accuracy at the best alpha curve, own task curve")
        | {"harmonic mean at the best alpha for both curve"},
        tuned=False,
    ),
    Case(
        transfer.STUDY,
        Scenario("transfer", TRANSFERRED, TRANSFER),
        words("accuracy, final, source, subsequent curve"),
        ("delta_ratio", "source", "objective"),
    ),
    Case(
        transfer.STUDY,
        Scenario("ensembles and lines", TOGETHER, TRANSFER),
        words("accuracy, nll [nats], calibration error, mean of members, worst member, disagreement, barrier")
        | words("accuracy of the first, accuracy of the second, lowest accuracy, loss curve")
        | {"accuracy curve"},
        tuned=False,
    ),
    Case(
        transfer.STUDY,
        Scenario("ports", PORTED, PORT),
        words("accuracy, accuracy by images curve") | {"accuracy, 2 a class"},
        ("delta_ratio",),
    ),
)


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Every method's numbers by name, with the data as they are or with one split replaced."""
    monkeypatch.setitem(fusion_setting.ARCHITECTURES, "batchnorm_mlp", lambda _width: batchnorm_mlp(5))

    def measure(case: Case, seed: int, replaced: str = "") -> dict[str, dict[str, Any]]:
        def load_task(task: Task, split_seed: int, root: Any) -> Dataset:
            assert split_seed == (seed if case.study is transfer.STUDY else 0)
            return make_dataset(task, replaced)

        monkeypatch.setattr(regraft_bench.study, "_load_task", load_task)
        setting = case.study.setting(case.scenario, seed, RunPaths(cache=tmp_path / (replaced or "as it is")))
        results = {}
        for setting.method in case.scenario.methods:
            results[setting.method.name] = numbers(setting.method.run(setting))
        return results

    return measure


def numbers(measured: Measured) -> dict[str, Any]:
    named = {**measured.values, **{f"{name} curve": series for name, series in measured.series.items()}}
    return {name: value for name, value in named.items() if not name.endswith((" s]", " s] curve", "[bytes]"))}


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize("case", CASES, ids=[case.scenario.name for case in CASES])
def test_each_number_comes_from_its_split(measure, case):
    first, test, validation = (measure(case, 0, replaced) for replaced in ("", "test", "validation"))
    for method, before in first.items():
        assert changed(before, test[method]) == case.of_test & before.keys(), method
        assert changed(before, validation[method]).isdisjoint(case.trained), method
        if "validation" in before:
            assert before["validation"] != validation[method]["validation"], method
    if case.tuned:
        first, test, validation = (measure(case, TUNING_SEED, replaced) for replaced in ("", "test", "validation"))
        assert first == test, "a tuning run looks at no test data"
        for method, before in first.items():
            assert before["validation"] != validation[method]["validation"], method


def test_a_task_is_split_by_the_seed_and_by_its_share(tmp_path):
    setting = Setting(Scenario("any", (), None), 3, RunPaths(cache=tmp_path))
    task = Task("digits", validation=0.25, per_class=7)
    sets = [setting.dataset(task, seed) for seed in (0, 1)]
    for seed, data in enumerate(sets):
        whole = load("digits", validation=0.25, seed=seed)
        assert len(data.validation) == len(whole.validation) == 350 and len(data.train) == 70
        assert torch.equal(data.validation.images, whole.validation.images)
        assert torch.equal(data.test.images, whole.test.images)
        assert images(data.train) < images(whole.train)
    assert images(sets[0].validation) != images(sets[1].validation)
    assert images(sets[0].test) == images(sets[1].test)


def images(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}
