"""Reports say what the rows say."""

import io
import re

import pytest
from rich.console import Console

from regraft import report, results
from regraft.results import Cost, Point
from test_results import make_row, points, records


@pytest.fixture
def rows():
    made = []
    for seed in range(3):
        made.append(
            make_row("plain", seed, 0.96, curve=points(0.1, 0.9, 0.96), phases={"training": Cost(5, 10)})
        )
        made.append(make_row("naive", seed, 0.50 + seed / 100, curve=points(0.5, 0.6)))
        start = (Point(0, Cost(0.5, 0.5), 0.9), Point(1, Cost(1, 1), 0.93 + seed / 1000))
        made.append(
            make_row(
                "fgmt", seed, 0.90 + seed / 50, curve=start, accuracy_by_step=[0.1, 0.5 + seed / 10, 0.9]
            )
        )
    return records(*made)


def text_of(rows) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    for table in report.tables(rows):
        console.print(table)
    return console.export_text()


def line_of(text: str, method: str) -> list[str]:
    line = next(line for line in text.splitlines() if re.match(rf"[│|]\s*{method}\b", line))
    return [cell.strip() for cell in re.split(r"[│|]", line)[1:-1]]


def test_the_table(rows):
    cells = line_of(text_of(rows), "fgmt")
    assert cells[:3] == ["fgmt", "3", "0.920 ± 0.020"]
    assert cells[3:6] == ["1.5", "2", "20.0%"]
    assert cells[6] == "0.931 ± 0.001" and cells[7:] == ["1.0", "2.0x"]


def test_plain_training_has_no_accuracy_without_training(rows):
    cells = line_of(text_of(rows), "plain")
    assert cells[2] == "–" and cells[5] == "100.0%" and cells[6] == "0.960 ± 0.000" and cells[8] == "1.0x"


def test_what_is_not_reached_is_said(rows):
    assert line_of(text_of(rows), "naive")[7:] == ["not reached", "not reached"]
    assert report.reached(rows["seed"].where(rows["seed"] > 0), "{:.1f}") == "1.5 (6 of 9)"


def test_claims_carry_n_and_p(rows):
    text = text_of(rows)
    p = results.compare(rows, "fgmt", "naive")["p"].iloc[0]
    assert f"fgmt − naive: +0.410 (n = 3, p = {p:.2g})" in text
    assert "oracle" not in text


def test_a_single_seed_has_no_deviation(rows):
    assert line_of(text_of(rows[rows["seed"] == 1]), "fgmt")[2] == "0.920"


def test_markdown_has_the_same_cells_and_where_they_come_from(rows):
    text = report.markdown(rows)
    assert line_of(text, "fgmt") == line_of(text_of(rows), "fgmt")
    assert "`pytest bench`" in text and "torch 2.15.0" in text and "commit abc123" in text


def test_the_page_stands_alone(rows, tmp_path):
    page, text = report.write(rows, tmp_path / "new" / "transfer.jsonl")
    assert (page.name, text.name) == ("transfer.html", "transfer.md")
    source = page.read_text(encoding="utf-8")
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="', source)
    assert source.count("Plotly.newPlot(") >= 2 and "0.920 ± 0.020" in source
    assert text.read_text(encoding="utf-8") == report.markdown(rows)


def test_figures_show_the_mean_over_seeds(rows):
    lines = {line.name: line for line in report.steps_figure(rows).data if line.name}
    assert list(lines) == ["fgmt"], "methods without steps have no line"
    assert list(lines["fgmt"].x) == [0, 1, 2] and list(lines["fgmt"].y) == pytest.approx([0.1, 0.6, 0.9])
    curves = {line.name: line for line in report.curves_figure(rows).data if line.name}
    assert list(curves["plain"].y) == pytest.approx([0.1, 0.9, 0.96])


def test_fine_tuning_is_drawn_and_what_has_no_data_is_not(tmp_path):
    deployed = {"deployed": {"step": [0, 1, 2, 3], "top1": [0.1, 0.2, 0.4, 0.8]}}
    rows = records(*(make_row("fast", seed, 0.8, extra=deployed) for seed in range(2)))
    (line,) = (line for line in report.deployed_figure(rows).data if line.name)
    assert list(line.x) == [1, 2, 3] and list(line.y) == pytest.approx([0.2, 0.4, 0.8])
    page, _ = report.write(rows, tmp_path / "finetune.jsonl")
    assert page.read_text(encoding="utf-8").count("Plotly.newPlot(") == 1


def test_no_rows_no_table(rows):
    assert list(report.tables(rows.iloc[:0])) == [] and report.markdown(rows.iloc[:0]) == ""
