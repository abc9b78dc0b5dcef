"""Scenarios are what the paper says they are, and the harness runs them."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import pytest

from regraft import results

BENCH = Path(__file__).parents[1] / "bench"


def load(file: str, name: str):
    """A module of the bench under a name of our own: the tests have a conftest too."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


scenarios = load("scenarios", "bench_scenarios")


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
    s = scenarios.SCENARIOS[name]
    recipe = s.recipe
    found = (recipe.epochs, recipe.lr, recipe.weight_decay, s.steps, s.gradient_batches, s.bn_batches)
    assert found == PAPER[name]
    assert recipe.batch_size == 128 and recipe.momentum == 0.9 and recipe.optimizer == "sgd"
    assert recipe.warmup_epochs == (5 if name.startswith("imagenet") else 0)
    constant = name.startswith("mnist")
    assert (recipe.schedule, s.schedule) == (("constant", "uniform") if constant else ("cosine", "cosine"))
    assert s.subsequent.optimizer == "adam" and s.subsequent.epochs == (2 if constant else 10)
    assert s.subsequent.lr == (1e-6 if name.startswith("imagenet") else 1e-4)


def test_the_small_ones_are_there_and_the_default_is_embedded():
    small = {"digits-mlp", "digits-mlp2", "digits-conv", "digits-pretrained", "digits-pretrained2"}
    small |= {"mnist-mlp-512", "cifar10-conv8", "cifar100-conv8-pretrained"}
    assert small <= scenarios.SCENARIOS.keys()
    assert scenarios.DEFAULT == ("digits-mlp",)
    digits = [s for name, s in scenarios.SCENARIOS.items() if name.startswith("digits")]
    assert all(s.seeds == 5 and s.steps == 10 for s in digits)


def test_scenarios_are_frozen_data():
    assert all(name == s.name for name, s in scenarios.SCENARIOS.items())
    with pytest.raises(FrozenInstanceError):
        scenarios.digits_mlp.steps = 3
    written = [results.digest(s) for s in scenarios.SCENARIOS.values()]
    assert len(set(written)) == len(written), "no two have the same settings"
    json.dumps(results.plain_data(scenarios.digits_pretrained))


@pytest.mark.parametrize("name", [name for name in scenarios.SCENARIOS if "paper" not in name])
def test_every_network_can_be_made(name):
    s = scenarios.SCENARIOS[name]
    model = s.model(**s.arguments)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1000


# ---------------------------------------------------------------- the harness, in a process of its own

# A bench of one second: the default scenario's network and recipe made tiny.
TINY = """
from dataclasses import replace
import scenarios
tiny = replace(
    scenarios.digits_mlp, name="tiny", arguments={"sizes": (64, 16, 10)}, steps=2, seeds=1,
    recipe=replace(scenarios.DIGITS_RECIPE, epochs=2), subsequent=replace(scenarios.DIGITS_RECIPE, epochs=1),
)
scenarios.SCENARIOS = {"tiny": tiny, "absent": replace(tiny, name="absent", task=scenarios.Task("mnist"))}
scenarios.DEFAULT = ("tiny",)
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Runs pytest on a copy of the bench with tiny scenarios; gives (exit status, output)."""
    folder = tmp_path_factory.mktemp("checkout") / "bench"
    folder.mkdir()
    for name in ("conftest.py", "scenarios.py", "bench_transfer.py"):
        (folder / name).write_text((BENCH / name).read_text())
    (folder / "conftest.py").write_text((BENCH / "conftest.py").read_text() + "\nimport tiny\n")
    (folder / "tiny.py").write_text(TINY)
    (folder / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\naddopts = -ra\n")

    def run(*options):
        environment = {**os.environ, "COLUMNS": "200"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", ".", "--benchmark-only", "-p", "no:cacheprovider", *options],
            cwd=folder, capture_output=True, text=True, env=environment,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def measured(bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    status, output = bench("--results", str(folder))
    assert status == 0, output
    return folder, output


def test_one_row_a_method_and_the_table(measured):
    folder, output = measured
    rows = results.read(folder / "transfer.jsonl")
    assert list(rows["method"]) == ["plain", "naive", "weights", "oracle", "fgmt", "gmt"]
    assert set(rows["scenario"]) == {"tiny"} and set(rows["seed"]) == {0}
    assert rows["accuracy"].between(0, 1).all() and rows["error"].equals(1 - rows["accuracy"])
    assert (rows["peak_memory"] > 0).all() and (rows["plain.cpu"] > 0).all()
    assert all(name in output for name in ("accuracy, no training", "speed-up to 95 %", "share of plain"))
    by_method = rows.set_index("method")
    assert by_method["extra.gradients"]["fgmt"] == 4 and by_method["extra.gradients"]["gmt"] == 6
    assert [len(steps) for steps in rows["accuracy_by_step"]] == [0, 2, 2, 2, 2, 2]
    assert [len(curve) for curve in rows["curve"]] == [3, 2, 2, 2, 2, 2]


def test_costs_add_up(measured):
    for record in results.records(measured[0] / "transfer.jsonl"):
        charged = [cost for phase, cost in record["phases"].items() if phase != "evaluation"]
        assert record["cost"]["cpu"] == pytest.approx(sum(cost["cpu"] for cost in charged))
        assert record["curve"][-1]["cost"]["wall"] >= record["cost"]["wall"]
        if record["method"] == "oracle":
            assert record["cost"]["wall"] > record["plain"]["wall"], (
                "the oracle pays for the training it needs"
            )
        if record["method"] == "fgmt":
            assert {"gradients", "similarity", "assignment"} <= record["phases"].keys()


def test_the_benchmarks_own_json_lies_beside_the_rows(measured):
    folder, _ = measured
    entries = json.loads((folder / "benchmark.json").read_text())["benchmarks"]
    assert len(entries) == 6 and "accuracy" in entries[0]["extra_info"]
    assert (folder / "transfer.html").is_file() and (folder / "transfer.md").is_file()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_resume_measures_only_what_is_missing(measured, bench):
    folder, _ = measured
    path = folder / "transfer.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))  # as if the run had been interrupted before its last method
    status, output = bench("--results", str(folder), "--resume")
    assert status == 0 and "1 passed, 5 skipped" in output, output
    again = results.read(path)
    assert list(again["method"]) == ["plain", "naive", "weights", "oracle", "fgmt", "gmt"]
    assert again["accuracy"].iloc[-1] == json.loads(lines[-1])["accuracy"], "the same seed, the same result"
    assert "oracle" in output.split("share of plain")[1], "resumed rows are in the table"


def test_a_missing_data_set_is_named(bench, tmp_path):
    status, output = bench("--scenario", "absent", "--data", str(tmp_path), "--results", str(tmp_path / "r"))
    assert status == 0 and "6 skipped" in output and "MNIST" in output and str(tmp_path) in output
    assert not (tmp_path / "r" / "transfer.jsonl").exists()


def test_an_unknown_scenario_is_refused_with_the_known_ones(bench, tmp_path):
    status, output = bench("--scenario", "nonsense", "--results", str(tmp_path))
    assert status != 0 and "unknown scenario nonsense; there are absent, tiny" in output


def test_no_seed_is_refused():
    options = {"seeds": 0}
    config = SimpleNamespace(addinivalue_line=lambda *line: None, getoption=options.get)
    with pytest.raises(pytest.UsageError, match="--seeds"):
        load("conftest", "bench_conftest").pytest_configure(config)
