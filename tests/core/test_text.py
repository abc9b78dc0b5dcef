"""Names from outside are text wherever they are shown: a terminal, Markdown, LaTeX, a page, a figure."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console
from torch import nn

import regraft
from regraft.cli import main
from regraft.core.text import clean_html, clean_markdown, clean_text
from regraft_bench.report.tables import Sheet

NASTY = {
    "title of the terminal": "a\x1b]0;owned\x07b", "one-byte escape": "a\x9b31mb", "heading": "a\n\n# Free money\n\nb",
    "carriage return": "a\rb", "line separator": "a\u2028b", "right to left": "a\u202eb", "tab": "a\tb",
    "NUL": "a\0b", "surrogate": "a\ud800b", "bar": "a|b|c", "markup": "a[/red]b", "opened markup": "a[bold red]b",
    "link": "a](http://evil)b", "HTML": "a<script>alert(1)</script>b", "braces": "a{b}c", "bare braces": "{}",
    "attributes": "a{0.__class__}c", "LaTeX": "a\\input{/etc/passwd}b_c%d", "nothing": "",
}  # fmt: skip


@pytest.mark.parametrize("name", NASTY.values(), ids=NASTY)
def test_a_name_is_one_line_of_printable_text_in_each_medium(name):
    for clean in (clean_text, clean_markdown, clean_html):
        assert clean(name).isprintable()
    sheet = Sheet(name, (name, "other"), ((name, name),), (name,))
    stream = io.StringIO()
    Console(file=stream, markup=False, width=200).print(sheet)
    page = sheet.markdown()
    for text in (stream.getvalue(), page, sheet.latex()):
        assert all(line.isprintable() for line in text.split("\n"))
        assert "\n# Free money" not in text
    assert "[/red]" not in name or "[/red]" in stream.getvalue()
    assert "<script>" not in page and "\\input" not in sheet.latex()
    assert not re.search(r"(?<!\\)\]\(http", page)
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in page.split("\n") if line.startswith("|")}
    assert widths == {3}


@pytest.mark.parametrize("text", ["übergang.层.weight", "p < 0.05", "time [ms]", "a_b*c", "[1, 2]"])
def test_ordinary_names_stay(text):
    assert clean_text(text) == clean_markdown(text) == text


@pytest.mark.parametrize("kind", ["title of the terminal", "markup", "opened markup", "heading"])
def test_layers_in_the_table_of_groups(kind, capsys):
    model = nn.Sequential()
    for name, layer in ((NASTY[kind], nn.Linear(6, 8)), ("relu", nn.ReLU()), ("last", nn.Linear(8, 5))):
        model.add_module(name, layer)
    stream = io.StringIO()
    Console(file=stream, markup=False, width=200).print(regraft.trace(model, torch.ones(1, 6)).table())
    assert all(line.isprintable() for line in stream.getvalue().split("\n"))
    assert "\x1b" in NASTY[kind] or "\n" in NASTY[kind] or NASTY[kind] in stream.getvalue()


@pytest.mark.parametrize("name", [n for n in NASTY.values() if "\0" not in n and "\ud800" not in n and n])
def test_a_refusal_is_one_line_without_a_number(name, tmp_path, capsys):
    out = str(tmp_path / "out")
    for words in (
        ["port", "a", "b", "c", "--method", name, "--out", out],
        ["symmetry", f"{name}:factory"],
        ["fuse", str(tmp_path / f"{name.replace('/', '')}.pt"), "--weights", "1", "--out", out],
    ):
        assert main(words) in (1, 2)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said[:-1].isprintable() and "Errno" not in said
