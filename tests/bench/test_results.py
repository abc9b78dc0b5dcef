"""Every committed page is made of committed rows, and every study is well-formed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from regraft_bench.report.drawing import svg
from regraft_bench.report.render import fill_tables, load_rows, write_pages
from regraft_bench.studies import STUDIES, study

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
DOCUMENTS = sorted([ROOT / "README.md", *RESULTS.glob("*.md"), *RESULTS.glob("*/README.md"), *ROOT.glob("docs/*.md")])


@pytest.fixture(scope="module")
def studies():
    return [study(name) for name in STUDIES]


@pytest.mark.parametrize("name", STUDIES)
def test_the_committed_pages_are_what_the_rows_give(name, tmp_path):
    one = study(name)
    rows = RESULTS / name / "rows.jsonl"
    (tmp_path / name).mkdir()
    if rows.is_file():
        shutil.copy(rows, tmp_path / name)
    made = {path.relative_to(tmp_path): path for path in write_pages(tmp_path, [one])}
    committed = {
        p.relative_to(RESULTS) for p in (RESULTS / name).glob("*") if p.suffix == ".svg" or p.name == "tables.md"
    }
    assert set(made) == committed
    for relative, path in made.items():
        if path.suffix == ".md":
            assert path.read_text() == (RESULTS / relative).read_text(), relative


def test_a_figure_is_the_same_whatever_was_drawn_before():
    fusion = study("fusion")
    rows = load_rows(RESULTS, fusion)
    heat = next(figure for figure in fusion.figures if figure.name == "table-6")
    assert "gradient_0" in svg(heat, rows)
    assert svg(heat, rows) == svg(heat, rows)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_quote_the_tables_as_they_are(document, studies):
    text = document.read_text(encoding="utf-8")
    assert fill_tables(text, RESULTS, studies) == text


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_well_formed(name):
    one = study(name)
    names = [scenario.name for scenario in one.scenarios]
    assert len(set(names)) == len(names)
    assert one.name == name
    assert one.select(one.quick)
    for scenario in one.scenarios:
        assert all(method.about.rstrip("`").endswith(".") for method in scenario.methods), scenario.name
        assert scenario.seeds >= 1
        assert scenario.methods
        configs = [(method.name, str(scenario.config(method))) for method in scenario.methods]
        assert len(set(configs)) == len(configs)
    for item in (*one.tables, *one.figures):
        assert set(item.scenarios) <= set(names), item.name


@pytest.mark.parametrize("name", STUDIES)
def test_committed_rows_are_of_methods_that_there_are(name):
    one = study(name)
    known = {(scenario.name, method.name) for scenario in one.scenarios for method in scenario.methods}
    assert {(row.scenario, row.method) for row in load_rows(RESULTS, one)} <= known
