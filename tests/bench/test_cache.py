"""The cache of trainings: the same code reads what it kept, and other code reads nothing of it."""

from dataclasses import replace

import pytest
import torch

from regraft.core.clock import Clock
from regraft.training.loop import Recipe
from regraft_bench import study as study_module
from regraft_bench.fast.scenarios import DIGITS_CONV, HIGH
from regraft_bench.fast.setting import FastSetting, FastSettings
from regraft_bench.fusion.accuracy import Sums, measure_sums
from regraft_bench.fusion.setting import FusionSetting
from regraft_bench.rows import code
from regraft_bench.run import run
from regraft_bench.study import Measured, Method, RunPaths, Scenario, Setting, Study, Task
from regraft_bench.transfer.bases import BASES
from regraft_bench.transfer.setting import TransferSetting

from .test_fusion import PAIR

BRIEF = Recipe(epochs=2, lr=0.1)
TRANSFER = replace(BASES["digits-mlp"], recipe=BRIEF, subsequent=None, eval_steps=())


def keep_training(place: RunPaths) -> None:
    assert TransferSetting(Scenario("t", (), TRANSFER), 0, place).source is not None


def keep_fast_source(place: RunPaths) -> None:
    settings = FastSettings(replace(DIGITS_CONV, recipe=BRIEF), HIGH, steps=1)
    assert FastSetting(Scenario("t", (), settings), 0, place).source.values


def keep_grid(place: RunPaths) -> None:
    setting = FusionSetting(Scenario("t", (), PAIR), 0, place)
    start, images = setting.start(), setting.images(PAIR.a, "test")
    measure_sums(setting, Sums([start], [[1.0], [2.0]]), images, Clock())


@pytest.mark.parametrize("keep", [keep_training, keep_fast_source, keep_grid])
def test_what_is_kept_is_read_by_the_same_code_alone(keep, place, monkeypatch):
    def files() -> set[str]:
        return {path.name for path in place.cache.iterdir() if path.suffix in (".safetensors", ".json")}

    keep(place)
    first = files()
    assert first
    keep(place)
    assert files() == first
    monkeypatch.setattr(study_module, "code", lambda: replace(code(), regraft="another tree"))
    keep(place)
    assert files() > first and len(files()) == 2 * len(first)


def test_a_row_of_changed_code_has_the_accuracy_of_changed_code(place, tmp_path, monkeypatch):
    def learn(setting: Setting) -> Measured:
        data, model = setting.dataset(setting.settings), torch.nn.Linear(64, 10)
        network = torch.nn.Sequential(torch.nn.Flatten(), model)
        start = {name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()}
        trained = setting.train("plain", network, start, data, BRIEF, test=True)
        return Measured({"accuracy": trained.history[-1].test_accuracy})

    scenario = Scenario("toy", (Method("plain", learn),), Task("digits"), seeds=1)
    study = Study("toys", "Toys", Setting, (scenario,), ("toy",))

    def accuracy() -> float:
        (row,) = run(study, [scenario], place=place, rows=tmp_path / "rows.jsonl")
        return row.values["accuracy"]

    before = accuracy()
    assert accuracy() == before
    rate = Recipe.learning_rate
    monkeypatch.setattr(Recipe, "learning_rate", lambda *at, **how: rate(*at, **how) / 1000)
    monkeypatch.setattr(study_module, "code", lambda: replace(code(), regraft="another tree"))
    assert accuracy() < before - 0.05
