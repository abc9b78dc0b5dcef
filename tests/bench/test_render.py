from dataclasses import replace
from functools import partial

import pytest

from regraft_bench.report.drawing import svg
from regraft_bench.report.page import page
from regraft_bench.report.render import (
    fill_tables,
    for_papers,
    glossary,
    load_rows,
    markdown,
    summary,
    write_pages,
)
from regraft_bench.report.tables import compare_methods, current, escape_latex, spread
from regraft_bench.run import run
from regraft_bench.study import TUNING_SEED, Method, Scenario

from .conftest import Toy


@pytest.fixture
def results(toy, place, tmp_path):
    path = tmp_path / "results" / toy.name / "rows.jsonl"
    list(run(toy, toy.scenarios, place=place, rows=path))
    return tmp_path / "results"


def test_the_table_has_means_deviations_shares_and_answers(toy, results):
    text = markdown(toy, load_rows(results, toy))
    line = next(line for line in text.splitlines() if line.startswith("| cheap"))
    assert "66.7%" in line, "the charge is joined with plain training's when it is read"
    assert "±" in line
    assert "cheap − plain: -0.300 (n = 3" in text
    assert "measured on" in text


def test_pages_are_made_of_rows_and_of_nothing_else(toy, results):
    made = write_pages(results, [toy])
    before = {path: path.read_bytes() for path in made}
    assert {path.name for path in made} == {"tables.md", "curves.svg"}
    for path in made:
        path.unlink()
    write_pages(results, [toy])
    assert {path: path.read_bytes() for path in made} == before


def test_one_entry_adds_a_scenario_and_every_page_shows_it(toy, results, place):
    more = Scenario("another", toy.scenarios[0].methods, Toy(0.3), seeds=1)
    wider = replace(
        toy,
        scenarios=(*toy.scenarios, more),
        tables=(replace(toy.tables[0], scenarios=("toy", "another")),),
    )
    list(run(wider, [more], place=place, rows=results / toy.name / "rows.jsonl"))
    rows = load_rows(results, wider)
    assert "### another" in markdown(wider, rows)
    assert "another" in page(results, [wider])
    assert any("another" in sheet.title for sheet in summary(wider, rows))


def test_a_document_quotes_the_current_table(toy, results):
    document = "Before\n\n<!-- table toys/main toy -->\nold\n<!-- end -->\n\nafter\n"
    new = fill_tables(document, results, [toy])
    assert "old" not in new
    assert "| cheap" in new
    assert fill_tables(new, results, [toy]) == new
    with pytest.raises(ValueError, match="toys/other"):
        fill_tables(document.replace("toys/main", "toys/other"), results, [toy])


def test_rows_of_an_older_configuration_and_tuning_runs_are_not_quoted(toy, results, place):
    rows = load_rows(results, toy)
    older = [replace(row, config={"settings": "older", "method": {}}, seed=7) for row in rows]
    tuning = [replace(row, seed=TUNING_SEED) for row in rows]
    assert current([*older, *tuning, *rows]) == current(rows)
    assert {row.seed for row in current(rows)} == {0, 1, 2}


def test_for_papers_there_are_latex_and_pixels(toy, results):
    write_pages(results, [toy])
    made = for_papers(results, [toy])
    assert [path.name for path in made] == ["tables.tex", "curves.png"]
    text = made[0].read_text()
    assert r"\caption{toy}" in text
    assert "66.7\\%" in text
    assert made[1].read_bytes().startswith(b"\x89PNG")
    assert escape_latex(
        r"a_b & 5 % of {x}^~\\"
    ) == r"a\_b \& 5 \% of \{x\}\textasciicircum{}\textasciitilde{}\textbackslash{}" + (r"\textbackslash{}")


def test_what_methods_do_stands_below_the_tables_and_on_the_page(toy, results):
    methods = tuple(replace(method, about=f"It is <{method.name}>.") for method in toy.scenarios[0].methods)
    told = replace(toy, scenarios=(replace(toy.scenarios[0], methods=(*methods, Method("other", print))),))
    assert glossary(told, load_rows(results, toy)) == {"It is <plain>.": "plain", "It is <cheap>.": "cheap"}
    assert "- **cheap**: It is <cheap>." in markdown(told, load_rows(results, toy))
    assert "<li><b>cheap</b>: It is &lt;cheap&gt;.</li>" in page(results, [told])


def test_a_method_says_what_it_does_in_its_own_words_or_its_functions():
    def run(setting):
        """Nothing at
        all.

        More of it."""

    assert Method("a", run).about == "Nothing at all."
    assert Method("a", partial(run, None)).about == "Nothing at all."
    assert Method("a", run, about="Something.").about == "Something."


def test_the_newest_of_two_rows_is_quoted(toy, results):
    rows = load_rows(results, toy)
    newer = replace(rows[0], values={"accuracy": 0.123})
    assert newer in current([*rows, newer])
    assert rows[0] not in current([*rows, newer])


def test_equal_differences_have_no_p(toy, results):
    rows = load_rows(results, toy)
    same = [replace(row, values={"accuracy": 0.5 + 0.1 * (row.method == "cheap")}) for row in rows]
    found = compare_methods(same, "cheap", "plain")
    assert str(found) == "+0.100 (n = 3)"
    assert compare_methods(rows, "cheap", "absent") is None


def test_spread_is_mean_and_standard_deviation():
    assert spread([0.1, 0.3]) == "0.200 ± 0.141"
    assert spread([0.1, None]) == "0.100"
    assert spread([]) == "–"


def test_failures_are_told_with_the_table(toy, results):
    rows = load_rows(results, toy)
    failed = replace(rows[0], values={}, failure="diverged: at step 3")
    text = markdown(toy, [failed, *rows[1:]])
    assert "plain, seed 0: diverged: at step 3" in text
    assert "3 (1 failed)" in text


def test_the_figure_draws_every_method_from_step_0(toy, results):
    drawing = svg(toy.figures[0], load_rows(results, toy))
    assert drawing.startswith("<svg")
    for word in ("plain", "cheap", "step", "validation accuracy"):
        assert word in drawing
    lines = toy.figures[0].panels[0].lines(current(load_rows(results, toy)))
    assert [line.x for line in lines] == [(0, 1, 2)] * 2


def test_a_figure_without_rows_is_none(toy):
    assert svg(toy.figures[0], []) is None
