"""What the command lists, prints and writes of committed rows: names, tables, figures, a table of all runs."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console

import regraft
from regraft_bench import cli
from regraft_bench.catalogue import find_data, list_study
from regraft_bench.report.tables import LONGEST_NAME, Sheet
from regraft_bench.studies import STUDIES, all_rows, study

RESULTS = Path(__file__).parents[2] / "results"


def render(sheet: Sheet, width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, markup=False, width=width).print(sheet)
    return stream.getvalue()


@pytest.mark.parametrize("name", STUDIES)
def test_a_list_names_every_scenario_table_and_figure_in_80_columns(name):
    one = study(name)
    text = "".join(render(sheet, 80) for sheet in list_study(one, RESULTS))
    assert all(len(line) <= 80 for line in text.splitlines())
    words = text.replace("*", " ").split()
    short = [item.name for item in (*one.scenarios, *one.tables, *one.figures) if len(item.name) <= LONGEST_NAME]
    assert [name for name in short if name not in words] == []


def test_a_table_that_does_not_fit_becomes_paragraphs_and_no_word_is_broken():
    line = ("transfer, a-long-name-of-a-scenario, method", *("number-of-letters",) * 6)
    sheet = Sheet("Wide", ("name", *(f"heading{number}" for number in range(6))), (line,), ("A note.",))
    for width in (60, 80, 200):
        text = render(sheet, width)
        assert all(len(row) <= width for row in text.splitlines())
        assert text.split().count("number-of-letters") + text.split().count("number-of-letters;") == 6
        assert "A note." in text
    assert "┃" in render(sheet, 200) and "┃" not in render(sheet, 80)


def test_the_list_of_all_names_the_studies_and_what_data_they_need(capsys):
    assert cli.list_all(results=RESULTS) == 0
    words = capsys.readouterr().out.split()
    assert set(STUDIES) <= set(words)
    assert {"digits", "cifar10", "yes"} <= set(words)
    assert find_data({"a": [{"data": "x"}, {"task": {"data": "y"}}], "data": "z"}) == ["z", "x", "y"]


@pytest.mark.parametrize("form", ["markdown", "latex", "csv"])
def test_tables_are_printed_for_papers_and_programs(form, capsys):
    assert cli.tables("fusion", table=("table-6",), format=form, results=RESULTS) == 0
    text = capsys.readouterr().out
    assert {"markdown": "| ", "latex": r"\begin{tabular}", "csv": ","}[form] in text
    if form == "csv":
        lines = list(csv.reader(line for line in text.splitlines() if line and not line.startswith("#")))
        assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(("form", "start"), [("svg", b"<svg"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_figures_are_written_in_three_formats(form, start, tmp_path, capsys):
    assert cli.figures("fusion", figure=("recipes",), format=form, results=RESULTS, out=tmp_path) == 0
    path = tmp_path / f"recipes.{form}"
    assert capsys.readouterr().out.split() == [str(path)]
    assert path.read_bytes().startswith(start)


def test_a_table_or_folder_that_there_is_not_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="no 'table-66'; did you mean table-6"):
        cli.tables("fusion", table=("table-66",), results=RESULTS)
    with pytest.raises(ValueError, match=r"no rows in .*fusion"):
        cli.figures("fusion", results=tmp_path)


def test_all_rows_are_one_table():
    frame = regraft.load_results(RESULTS)
    rows = all_rows(RESULTS)
    assert len(frame) == len(rows)
    assert {"study", "scenario", "method", "seed", "accuracy", "seconds", "failure", "commit"} <= set(frame)
    assert frame["accuracy"].dropna().between(0, 1).all()
    with pytest.raises(ValueError, match="no rows"):
        regraft.load_results(RESULTS / "nowhere")
