"""The fusion study on a few digits: every method makes a sensible row, and pages are functions of rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regraft.core.clock import EVALUATION
from regraft.data import MissingData
from regraft.training.loop import Recipe
from regraft_bench.fusion import STUDY, two_tasks
from regraft_bench.fusion.continual import STRENGTHS
from regraft_bench.fusion.nearness import measure_agreement
from regraft_bench.fusion.pages import summarise_tables
from regraft_bench.fusion.paper import load_published
from regraft_bench.fusion.scenarios import TABLE_SCENARIOS
from regraft_bench.fusion.setting import SEARCH
from regraft_bench.fusion.settings import TWO_GRADIENTS, OntoTargets, Regime, Target
from regraft_bench.report.render import markdown
from regraft_bench.rows import Code, Environment, Row, Series, read_rows
from regraft_bench.run import run
from regraft_bench.study import TUNING_SEED, RunPaths, Scenario, Task

ONCE = Recipe(epochs=1, lr=0.02, batch_size=20)
TINY = Regime(ONCE, ONCE, ONCE, width=1 / 32)
DIGITS = Task("digits", size=32, channels=3)
LOW, HIGH = (replace(DIGITS, size=16, classes=tuple(range(first, first + 5))) for first in (0, 5))
SMALL = {"images": 40, "held_out": 40, "regime": TINY}


def scenario(name: str) -> Scenario:
    return STUDY.select([name])[0]


def measured(folder: Path, one: Scenario, **how) -> list[Row]:
    place = RunPaths(data=folder / "no data", cache=folder / "cache")
    rows = list(run(STUDY, [one], place=place, rows=folder / "rows.jsonl", seeds=[0], **how))
    assert [row.failure for row in rows if row.seed != TUNING_SEED and row.failure] == []
    return rows


def by_method(rows: list[Row]) -> dict[str, Row]:
    return {row.method: row for row in rows if row.seed != TUNING_SEED}


# ---------------------------------------------------------------- scenarios


def test_scenarios_are_the_papers_tables():
    names = [one.name for one in STUDY.scenarios]
    assert max(Counter(names).values()) == 1
    assert {f"table-{number}" for number in load_published()} | {f"figure-{n}" for n in "1234"} <= set(names)
    for paper in load_published().values():
        settings = scenario(f"table-{paper.table}").settings
        if isinstance(settings, OntoTargets):
            assert (settings.formula, settings.alphas) == (paper.formula, paper.rows)
        elif paper.formula:
            assert (settings.formula, settings.betas, settings.alphas) == (
                paper.formula, paper.rows, paper.columns,
            )  # fmt: skip


def test_published_tables_are_whole():
    assert len(load_published()) == 25
    for paper in load_published().values():
        assert [len(line) for line in paper.values] == [len(paper.columns)] * len(paper.rows)
        assert all(0 <= cell <= 1 for line in paper.values for cell in line)
    assert load_published()["6"].values[0][0] == pytest.approx(0.7974)


def test_nothing_of_the_device_is_in_a_configuration():
    """Another device must not be another experiment: larger runs are scenarios of their own."""
    for one in STUDY.scenarios:
        text = str(one.config(one.methods[0]))
        assert "device" not in text and "cuda" not in text
    assert scenario("table-6-paper").settings.regime.width == 1


def test_both_tasks_and_every_table_of_a_scale_have_one_recipe():
    """Table 5, which trains many more networks, keeps to the narrow one."""
    residual = [one for one in TABLE_SCENARIOS if one.settings.network == "residual8"]
    regimes = {(one.settings.scale, one.name == "table-5"): one.settings.regime for one in residual}
    assert len(regimes) == 4
    for one in residual:
        assert one.settings.regime == regimes[one.settings.scale, one.name == "table-5"]
    assert {own.width for (scale, five), own in regimes.items() if scale != "large" or five} == {0.25}


# ---------------------------------------------------------------- methods


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fusion")


@pytest.fixture(scope="module")
def onto(folder) -> dict[str, Row]:
    choices = (Target("missing", Task("stl10")), Target("low digits", replace(LOW, size=32), "missing"))
    settings = replace(
        scenario("table-2").settings,
        task=DIGITS,
        targets=(choices,),
        alphas=(1.0, 3.0),
        target_steps=4,
        **SMALL,
    )
    return by_method(measured(folder, replace(scenario("table-2"), settings=settings)))


PAIR = replace(
    scenario("table-A18").settings, a=LOW, b=HIGH, alphas=(0.0, 0.5, 1.0), betas=(0.0, 0.5, 1.0),
    controls=(1.0,), scale="small", pretraining=HIGH, **SMALL,
)  # fmt: skip


@pytest.fixture(scope="module")
def pair(folder) -> dict[str, Row]:
    own = [m for m in (*scenario("table-A18").methods, *two_tasks.OF_GRADIENTS, *two_tasks.DIAGONAL)]
    names = {method.name for method in own}
    own += [m for m in scenario("table-5").methods if m.name not in names]
    return by_method(measured(folder, Scenario("table-A18", tuple(own), PAIR)))


def test_every_method_has_an_accuracy(onto, pair):
    assert {m.name for m in scenario("table-2").methods} == set(onto)
    for row in (*onto.values(), *pair.values()):
        assert 0 <= row.values["accuracy"] <= 1
        for name, series in row.series.items():
            cells = torch.tensor(series.values, dtype=torch.float64)
            assert list(cells.shape) == [len(positions) for positions in series.at]
            assert name == "best alpha" or bool(((cells >= 0) & (cells <= 1)).all())


def test_a_sum_with_nothing_is_the_network(pair):
    for name, at, method in (
        ("accuracy_a", (0, 2), "theta_A alone"),
        ("accuracy_b", (2, 0), "theta_B alone"),
    ):
        grid = pair["sum"].series[name]
        assert (grid.axes, grid.at[0]) == (("beta", "alpha"), PAIR.betas)
        assert grid.values[at[0]][at[1]] == pytest.approx(pair[method].series[name].values[0], abs=0.026)


def test_gradients_and_weights_agree_where_they_are_the_same_network(pair):
    """As in the paper's own tables: at alpha + beta = 1 both formulas give one network."""
    for beta, alpha in ((0, 2), (1, 1), (2, 0)):
        fused, assigned = (pair[m].series["accuracy_a"].values[beta][alpha] for m in ("sum", "assignment"))
        assert fused == pytest.approx(assigned, abs=0.051)


def test_the_chosen_cell_is_the_tables_own(pair):
    """Accuracies at the chosen coefficients are those of the grid on test images."""
    row = pair["sum"]
    beta, alpha = PAIR.betas.index(row.values["beta"]), PAIR.alphas.index(row.values["alpha"])
    assert row.values["accuracy_b"] == row.series["accuracy_b"].values[beta][alpha]


def test_scaling_a_network_with_batch_statistics_changes_nothing(pair):
    grid = pair["sum"].series["accuracy_a"].values
    assert grid[0][1] == pytest.approx(grid[0][2], abs=0.051)


def test_the_middle_of_the_line_is_the_average(pair):
    line, average = pair["line"].series["accuracy_a"], pair["average"].series["accuracy_a"]
    assert line.values[line.at[0].index(0.5)] == average.values[0]
    assert pair["Fisher merging"].cost["fisher"].cpu > 0


def test_what_is_missing_is_replaced_and_said_so(onto):
    assert onto["sum"].series["accuracy"].at[1] == ("low digits",)
    assert onto["sum"].notes["stands in for"] == {"low digits": "missing"}


def test_costs_are_what_a_method_takes_beyond_the_networks(pair):
    assert "search" in pair["sum"].cost and "train" not in pair["sum"].cost
    assert {"train", "fisher"} <= pair["EWC"].cost.keys()
    assert "match" in pair["aligned"].cost and "train" in pair["plain"].cost


def test_tuning_looks_at_validation_images_only(folder, pair):
    tried = [row for row in read_rows(folder / "rows.jsonl") if row.seed == TUNING_SEED]
    assert {row.config["method"]["strength"] for row in tried} == set(STRENGTHS)
    assert any(row.values for row in tried)
    assert all(row.values.keys() <= {"validation"} and not row.series for row in tried)


def test_tables_share_their_trainings(folder, pair):
    before = {path.name for path in (folder / "cache").glob("*.safetensors")}
    other = replace(PAIR, formula=TWO_GRADIENTS, alphas=(0.25, 0.75))
    measured(folder, Scenario("table-A9", (two_tasks.SUM,), other))
    assert {path.name for path in (folder / "cache").glob("*.safetensors")} == before


def test_coefficients_are_chosen_on_validation_and_reported_on_test(folder, monkeypatch):
    held, test = torch.tensor([0.1, 0.9, 0.2, 0.3]).double(), torch.tensor([0.8, 0.4, 0.5, 0.6]).double()
    settings = replace(PAIR, alphas=(1.0, 2.0), betas=(3.0, 4.0))

    def measure(setting, sums, images, clock, phase=EVALUATION):
        return held if phase == SEARCH else test

    monkeypatch.setattr(two_tasks, "measure_sums", measure)
    (row,) = measured(folder, Scenario("table-A19", (two_tasks.SUM,), settings))
    assert row.values == pytest.approx(
        {"alpha": 2.0, "beta": 3.0, "accuracy": 0.4, "accuracy_a": 0.4, "accuracy_b": 0.4}
    )


def test_smaller_scales_are_among_larger_ones(folder):
    setting = STUDY.setting(Scenario("table-A18", (), PAIR), 0, RunPaths(cache=folder / "cache"))
    sets = [
        {tuple(image.flatten().tolist()) for image in setting.at_scale(LOW, scale).train.images}
        for scale in ("small", "medium", "large")
    ]
    assert [len(s) for s in sets[:2]] == [20, 500]
    assert sets[0] < sets[1] < sets[2]


def test_missing_data_are_told_before_any_work(tmp_path):
    place = RunPaths(data=tmp_path, cache=tmp_path / "cache")
    with pytest.raises(MissingData, match="cifar10"):
        list(run(STUDY, [scenario("table-6")], place=place, rows=tmp_path / "rows.jsonl", seeds=[0]))


def test_the_hessian_term_explains_small_steps_alone(folder):
    settings = replace(
        scenario("appendix-b2").settings,
        a=replace(LOW, size=32),
        b=replace(HIGH, size=32),
        rates=(0.1, 1e-6),
        steps=(1,),
        images=2,
    )
    (row,) = measured(folder, replace(scenario("appendix-b2"), settings=settings))
    (errors,), (cosines,) = (row.series[name].values for name in ("relative_error", "cosine"))
    assert errors[1] < 0.05 < errors[0] and cosines[1] > 0.99


# ---------------------------------------------------------------- pages


def row(name: str, method: str = "sum", values=None, series=None) -> Row:
    environment = Environment("cpu", "a machine", 1, {"torch": "2"}, "pytest")
    return Row(
        "fusion", name, method, 0, {}, values or {}, series or {}, {}, {}, None, environment,
        Code("0", "a", "b", None, None), time="2025-01-01T00:00:00+00:00",
    )  # fmt: skip


def shifted(number: str, points: float) -> Row:
    paper = load_published()[number]
    cells = tuple(tuple(cell + points / 100 for cell in line) for line in paper.values)
    name = "accuracy_a" if paper.task == "CIFAR-10" else "accuracy_b"
    grid = Series(("beta", "alpha"), (paper.rows, paper.columns), cells)
    return row(f"table-{number}", series={name: grid})


def test_the_overview_counts_cells():
    (sheet,) = summarise_tables([shifted("6", 5.0), shifted("A1", 11.0)])
    assert [line[0] for line in sheet.lines] == ["6", "A1", "all"]
    assert sheet.lines[0][2:] == ("100", "5.0", "5.0", "0%", "1.00", "–")
    assert sheet.lines[1][5] == "100%"
    assert sheet.lines[2][2:6] == ("200", "8.0", "11.0", "50%")


def test_agreement_refuses_other_shapes():
    with pytest.raises(ValueError):
        measure_agreement([(((0.1, 0.2),), ((0.1,),))])


def test_pages_are_made_of_rows():
    series = {n: Series.over("alpha", (0.5, 1.0), (0.25, 0.5)) for n in ("accuracy_a", "accuracy_b")}
    rows = [shifted("6", -5.0), row("table-6", "aligned", series=series)]
    text = markdown(STUDY, rows)
    assert text.index("All of the paper's cells") < text.index("### table-6")
    assert "74.7 / 79.7 (-5.0)" in text
    assert "50.0 / 50.0" in next(line for line in text.splitlines() if line.startswith("| aligned"))
    heat = next(figure for figure in STUDY.figures if figure.name == "table-6")
    ours, paper, difference = (cells for _, cells in heat.collect_panels(rows))
    assert difference.values[0][0] == pytest.approx(ours.values[0][0] - paper.values[0][0])
    assert STUDY.figures[0].collect_panels(rows) == []


def test_retained_accuracy_is_drawn_over_how_far_training_moved():
    rows = [
        row(f"recipe-small-{name}", "diagonal", {"accuracy_a": a, "accuracy_b": a / 2, "delta_ratio_a": r,
            "delta_ratio_b": 2 * r})
        for name, a, r in (("sgd-0.02", 0.4, 0.5), ("sgd-0.002", 0.9, 0.1))
    ]  # fmt: skip
    figure = next(figure for figure in STUDY.figures if figure.name == "recipes")
    ((_, lines),) = figure.collect_panels(rows)
    assert [(line.x, line.y) for line in lines] == [((0.1, 0.5), (0.9, 0.4)), ((0.2, 1.0), (0.45, 0.2))]


def sheets(name: str, rows: list[Row]):
    return next(table for table in STUDY.tables if table.name == name).make_sheets(rows)


def test_other_recipes_are_held_against_whole_tables():
    near, far = (replace(shifted(n, by), scenario="gradients-small-adam-1e-3") for n, by in (("A2", 2.0), ("A3", 12.0)))
    both = replace(near, series={**near.series, **far.series})
    (sheet,) = sheets("whole-tables", [row("recipe-small-adam-1e-3", "diagonal", {"delta_ratio": 0.152}), both])
    assert sheet.lines == (("small-adam-1e-3", "0.152", "7.0", "50%", "1.00", "–", "–", "–"),)
    assert sheets("whole-tables", [row("recipe-small-adam-1e-3", "diagonal")]) == []


def test_starts_are_compared_at_widths_that_have_all_three():
    own = {"accuracy_a": 0.8, "accuracy_b": 0.2}
    rows = [
        row("starts-width-0.25", "diagonal", {**own, "own_a": 0.85, "own_b": 0.75}),
        row("starts-width-0.25", "other start", {name: value / 2 for name, value in own.items()}),
        row("starts-width-0.25", "other start, aligned", own),
        row("starts-width-0.5", "diagonal", own),
    ]
    (sheet,) = sheets("widths", rows)
    assert sheet.lines == (("0.25", "1", "85.0", "75.0", "80.0", "20.0", "40.0", "10.0", "80.0", "20.0"),)


def test_a_claim_is_judged_by_its_margin_and_stands_beside_its_control():
    rows = [
        row("table-6", values={"accuracy": 0.4}),
        row("table-6", "ensemble", {"accuracy": 0.5}),
        row("table-5", "A then B", {"accuracy": 0.2, "accuracy_a": 0.12, "accuracy_b": 0.8}),
    ]

    def line(rows: list[Row], where: str) -> tuple[str, ...]:
        return next(line for line in sheets("claims", rows)[0].lines if line[1] == where)

    assert line(rows, "5.2, table 6")[3:] == ("40.0 against 20.0", "both networks' logits: 50.0", "supported")
    assert line(rows, "5.2, table 5")[-1] == "supported"
    assert line([row("table-6", values={"accuracy": 0.21}), *rows[1:]], "5.2, table 6")[-1] == "not supported"
    assert line(rows, "3.2, table 1")[-1] == "not measured"
