"""Fine-tuning runs: phases, methods, what a row says, figures and tables from rows."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from regraft import finetune, finetune_figures, results
from regraft import finetune_runs as runs
from regraft import finetune_scenarios as scenarios
from regraft.finetune_runs import Draw, Method, Origin, Phase, Scenario, Task, fine_tune
from regraft.models import state
from regraft.training import Recipe


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def endless(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    while True:
        images = torch.randn(12, 6, generator=generator)
        yield images, images[:, :3].argmax(1)


BODY = ("0.weight", "0.bias", "1.weight", "1.bias")
RUNNING = ("1.running_mean", "1.running_var")
HEAD = ("3.weight", "3.bias")


def changed(phases, steps=3, **options):
    """Which tensors a run moves, and its outcome."""
    model = network()
    before = state(model)
    outcome = fine_tune(model, model[3], phases, endless(), steps, **options)
    after = state(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    return {name for name in before if not torch.equal(before[name], after[name])} - {
        "1.num_batches_tracked"
    }, outcome


@pytest.mark.parametrize(
    ("phase", "moved"),
    [
        (Phase(0.1, 0.1), {*BODY, *RUNNING, *HEAD}),
        (Phase(0.1, None), {*RUNNING, *HEAD}),
        (Phase(0.1, None, statistics=False), {*HEAD}),
        (Phase(None, 0.1), {*BODY, *RUNNING}),
    ],
)
def test_a_phase_moves_what_it_says(phase, moved):
    found, outcome = changed([phase])
    assert found == moved
    assert outcome == runs.Outcome(3, None, (3,))


def test_what_is_not_trained_costs_no_gradient():
    seen = []

    class Spy:
        def after_step(self):
            seen.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})

    model = network()
    fine_tune(model, model[3], [Phase(0.1, None), Phase(None, 0.1, share=0.5)], endless(), 2, recorder=Spy())
    assert seen == [set(HEAD), set(HEAD)]
    fine_tune(model, model[3], [Phase(None, 0.1)], endless(), 1, recorder=Spy())
    assert seen[2] == set(BODY)


def test_phases_end_by_share_and_by_rule():
    validation = [next(endless(9))]
    _, outcome = changed([Phase(0.1, None, share=0.25), Phase(0.1, 0.1)], steps=8)
    assert outcome.phase_ends == (2, 8)
    slow = Phase(1e-9, None, statistics=False, until=finetune.NoGain)
    _, outcome = changed([slow, Phase(0.1, 0.1)], steps=20, validation=validation)
    assert outcome.phase_ends == (11, 20)
    _, outcome = changed([slow, Phase(0.1, 0.1)], steps=5, validation=validation)
    assert outcome.phase_ends == (5, 5)


def test_a_run_is_that_of_the_plain_loop():
    """Two rates, momentum 0.9, cross-entropy."""
    model, plain = network(), network()
    fine_tune(model, model[3], [Phase(0.3, 0.01)], endless(), 4)
    optimiser = torch.optim.SGD(
        [{"params": plain[:3].parameters(), "lr": 0.01}, {"params": plain[3].parameters(), "lr": 0.3}],
        momentum=0.9,
        lr=0,
    )
    for (images, labels), _ in zip(endless(), range(4), strict=False):
        optimiser.zero_grad()
        nn.functional.cross_entropy(plain(images), labels).backward()
        optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(state(model).values(), state(plain).values(), strict=True))


def test_a_diverging_loss_is_reported_with_its_step():
    def batches():
        yield next(endless())
        yield next(endless(1))
        yield torch.full((2, 6), torch.inf), torch.tensor([0, 1])

    model = network()
    outcome = fine_tune(model, model[3], [Phase(0.1, 0.1)], batches(), 5)
    assert outcome == runs.Outcome(2, 3, ())
    assert all(value.isfinite().all() for value in model.parameters())


def test_labels_must_have_a_class():
    def batches():
        yield torch.randn(2, 6), torch.tensor([0, 3])

    model = network()
    with pytest.raises(ValueError, match="labels run from 0 to 3"):
        fine_tune(model, model[3], [Phase(0.1, 0.1)], batches(), 1)


# ---------------------------------------------------------------- scenarios


def tiny(**changes) -> Scenario:
    """Digits, a very small source, few steps."""
    origin = Origin(scenarios.digits_conv, scenarios.LOW, Recipe(epochs=12, lr=0.05, batch_size=50))
    methods = (
        Method("fast", ((0.3, 0.03), (0.1, 0.01))),
        Method("fan-in", ((0.03, 0.03),), prepare=Draw(finetune.kaiming_fan_in)),
        Method("plain", ((0.1, 0.1),), prepare=runs.from_scratch),
        Method("class means", ((0.1, 0.1),), prepare=runs.imprint),
        Method("transferred", ((0.1, 0.01),), prepare=runs.transferred),
    )
    return replace(
        Scenario("tiny", origin, scenarios.HIGH, methods, steps=5, batch_size=20, seeds=2), **changes
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def environment():
    return results.environment("cpu")


def test_a_run_repeats_with_its_seed_and_its_row_is_json(cache, environment):
    scenario = tiny()
    method = scenario.method("fan-in")
    one, again = (
        runs.run(scenario, method, method.rates[0], seed=1, cache=cache, environment=environment)
        for _ in range(2)
    )
    other = runs.run(scenario, method, method.rates[0], seed=2, cache=cache, environment=environment)
    assert one.extra["validated"] == again.extra["validated"]
    assert one.extra["deployed"]["top1"] == again.extra["deployed"]["top1"]
    assert one.extra["validated"] != other.extra["validated"]
    record = json.loads(json.dumps(one.record(), allow_nan=False))
    assert record["extra"]["deployed"]["step"] == [0, 1, 2, 3, 5]
    assert 0 < record["extra"]["source_start"] <= 1
    assert record["cost"]["wall"] < one.phases["train"].wall + one.phases["prepare"].wall + 1e-9


def test_methods_differ_in_what_they_prepare(cache, environment):
    scenario = tiny()
    rows = {
        method.name: runs.run(
            scenario, method, method.rates[0], seed=0, cache=cache, environment=environment
        ).extra
        for method in scenario.methods
    }
    entropy = {name: extra["validated"]["entropy"][0] for name, extra in rows.items()}
    assert entropy["fast"] == pytest.approx(1.6094, abs=1e-4)  # ln 5
    assert entropy["fan-in"] < 1.609
    assert rows["class means"]["validated"]["head_norm"][0] == pytest.approx(5**0.5, rel=1e-4)
    assert rows["class means"]["validated"]["top1"][0] > 0.3
    assert rows["plain"]["source_start"] < rows["fast"]["source_start"]
    assert all(extra["validated"]["distance"][0] == 0 for extra in rows.values())
    chance = rows["plain"]["source_start"]
    assert rows["transferred"]["source_start"] > (chance + rows["fast"]["source_start"]) / 2
    assert rows["transferred"]["source_start"] != rows["fast"]["source_start"]


def test_all_methods_see_the_same_batches_whatever_their_preparation_took(cache, environment):
    def looks(model, adopted, setting):
        next(iter(setting.batches))

    scenario = tiny()
    blind, seeing = (
        runs.run(
            scenario,
            Method("fast", ((0.3, 0.03),), prepare=prepare),
            (0.3, 0.03),
            seed=0,
            cache=cache,
            environment=environment,
        )
        for prepare in (Draw(finetune.zero), looks)
    )
    assert blind.extra["validated"] == seeing.extra["validated"]


def test_a_cap_on_the_targets_images_holds_for_validation_and_test(cache, environment):
    scenario = tiny(target_images=7)
    method = scenario.method("fan-in")
    row = runs.run(scenario, method, method.rates[0], seed=0, cache=cache, environment=environment)
    for accuracy in (row.accuracy, *row.extra["validated"]["top1"]):
        assert 7 * accuracy == pytest.approx(round(7 * accuracy), abs=1e-3)


def test_measure_runs_what_is_missing_and_tunes_once(cache, environment, tmp_path, monkeypatch):
    rows, made = tmp_path / "rows.jsonl", []
    true_measure = runs._measure

    def counted(scenario, method, rates, seed, *arguments, **options):
        made.append((method.name, rates, seed))
        return true_measure(scenario, method, rates, seed, *arguments, **options)

    monkeypatch.setattr(runs, "_measure", counted)
    arguments = {"cache": cache, "environment": environment, "methods": ["fast"]}
    runs.measure(tiny(), rows, seeds=1, **arguments)
    assert [(rates, seed) for _, rates, seed in made[:2]] == [
        ((0.3, 0.03), runs.TUNING_SEED),
        ((0.1, 0.01), runs.TUNING_SEED),
    ]
    assert len(made) == 3 and made[2][2] == 0
    tried = runs.tuning(tiny(), tiny().method("fast"), cache=cache, device="cpu")
    assert tried[made[2][1]] == max(tried.values())
    runs.measure(tiny(), rows, **arguments)
    assert [seed for *_, seed in made[3:]] == [1]
    runs.measure(tiny(steps=3), rows, seeds=1, **arguments)
    assert len(results.records(rows)) == 3
    assert len(finetune_figures.newest(results.records(rows))) == 1


def test_a_diverged_run_keeps_its_row(cache, environment, tmp_path):
    hot = Method("fan-in", ((1e30, 1e30),), prepare=Draw(finetune.kaiming_fan_in))
    runs.measure(tiny(methods=(hot,)), tmp_path / "rows.jsonl", cache=cache, environment=environment, seeds=1)
    (row,) = results.records(tmp_path / "rows.jsonl")
    assert row["extra"]["diverged"] == 2
    assert row["extra"]["deployed"]["step"] == [0, 1, 2, 3, 5]
    text = "\n".join(finetune_figures.comparison([row], "tiny"))
    assert "fan-in (diverged)" in text


def test_scenarios_are_complete():
    for number, figure in finetune_figures.FIGURES.items():
        for paper in (False, True):
            for panel in figure.panels:
                scenario = scenarios.SCENARIOS[finetune_figures.scenario_name(panel, paper)]
                assert number in scenario.figures
                for wanted in panel.methods:
                    assert any(finetune_figures._named(method.name, wanted) for method in scenario.methods)
    for scenario in scenarios.SCENARIOS.values():
        names = [method.name for method in scenario.methods]
        assert len(set(names)) == len(names)
        json.dumps([runs.config(scenario), *(runs.own_config(m, m.rates[0]) for m in scenario.methods)])
    assert {len(m.rates) for m in scenarios.MAIN if m is not scenarios.FAST_UNTUNED} == {5}
    with pytest.raises(ValueError, match="no method 'slow'"):
        scenarios.digits_main.method("slow")


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (scenarios.conv3, 32),
        (scenarios.small_resnet, 14),
        (scenarios.small_vgg, 14),
        (scenarios.small_densenet, 14),
        (scenarios.small_resnext, 14),
    ],
)
def test_small_networks_have_a_head(make, size):
    model = make(7).eval()
    assert model(torch.zeros(2, 3 if size == 32 else 1, size, size)).shape == (2, 7)
    assert model.get_submodule(finetune.find_head(model)).out_features == 7


# ---------------------------------------------------------------- figures and tables


def made_up(method, seed, top1, distance=1.0, scenario="initial-same"):
    steps = [0, 1, 2]
    return {
        "scenario": scenario,
        "method": method,
        "seed": seed,
        "accuracy": top1,
        "config": {},
        "phases": {name: {"wall": 1.0, "cpu": 1.0} for name in ("train", "prepare")},
        "environment": {
            **{"machine": "m", "threads": 1, "device": "cpu", "versions": {}, "commit": "abc"},
            **{"dirty": False, "command": "c"},
        },
        "extra": {
            "own_config": {"rates": [0.1, None]},
            "area": top1,
            "source_start": 0.9,
            "source_area": 0.8,
            "source_end": 0.7,
            "top5": 1.0,
            "distance": distance,
            "diverged": None,
            "deployed": {"step": steps, "top1": [0.1, 0.2, top1], "source": [0.9, 0.8, 0.7]},
            "validated": {"step": steps, "top1": [0.1, 0.2, top1], "head_norm": [0.0, 1.0, 2.0]},
        },
    }  # fmt: skip


def test_band_is_students_interval():
    mean, half = finetune_figures.band([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert half == pytest.approx(3.1824 * 1.2910 / 2, rel=1e-4)
    assert finetune_figures.band([1.0]) == (1.0, 0.0)


def test_p_values_are_paired_by_seed():
    ours = [made_up("fast", seed, 0.5 + 0.01 * seed) for seed in range(4)]
    theirs = [
        made_up("fan-in", seed, value) for seed, value in zip((3, 1, 0), (0.5, 0.49, 0.47), strict=True)
    ]
    n, difference, p = finetune_figures.p_value(ours, theirs, finetune_figures.area)
    assert n == 3
    assert difference == pytest.approx((0.03 + 0.02 + 0.03) / 3)
    assert p == pytest.approx(0.015268, rel=1e-4)  # t = 8 with two degrees of freedom


def test_figures_and_tables_are_written(tmp_path):
    rows = [made_up(f"N(0, {s}²)", seed, 0.4 + 0.1 * seed) for s in ("1", "1e-08") for seed in range(2)]
    rows += [
        made_up(name, seed, 0.5 + 0.1 * seed, 3.0 + seed, scenario)
        for scenario in ("convergence-mnist", "convergence-digits", "digits")
        for name in ("fast", "baseline 0.05")
        for seed in range(2)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**row, "time": ""}) + "\n" for row in rows))
    made = finetune_figures.write(tmp_path, ["3", "4", "table", "main"])
    assert [path.name for path in made] == ["figure_3.html", "figure_4.html", "table_1.md", "main.md"]
    figure = finetune_figures.draw(finetune_figures.FIGURES["3"], rows)
    assert len(figure.data) == 2 * 2 * 2
    assert list(figure.data[1].y) == [0.2, 0.45]
    table = (tmp_path / "table_1.md").read_text()
    assert (
        "| CIFAR-100 | fast | 45.00 ± 63.53 | 12.63 ± 0.09 | 0.00 ± 0.00 | 1.62 ± 0.04 | 3.50 ± 6.35 |"
        in table
    )
    assert "| Caltech-256 | baseline 0.01 | – | 13.55 ± 0.19 |" in table
    assert "fast − baseline 0.05: area +0.000 (n = 2" in (tmp_path / "main.md").read_text()


def test_unknown_figures_are_refused():
    with pytest.raises(ValueError, match="no figure 2: there are 3, 4"):
        finetune_figures.reproduce(["2"])


def test_the_papers_table_is_whole():
    published = finetune_figures.paper_table()
    for methods in published["rows"].values():
        assert list(methods) == ["baseline 0.05", "baseline 0.01", "baseline 0.005", "fast"]
        assert all(len(values) == len(published["columns"]) for values in methods.values())
        errors = [values[0][0] for values in methods.values()]
        distances = [values[2][0] for values in methods.values()]
        assert min(errors) == errors[-1] and min(distances) == distances[-1]


def test_the_transferred_task_is_loaded_with_five_percent_held_out():
    data = Task("digits", (0, 1)).load()
    assert len(data.validation) == round(0.05 * (len(data.validation) + len(data.train)))
