"""The command: quick to start, and a faithful front of what it calls."""

import subprocess
import sys

import pytest

from regraft import cli


def test_nothing_heavy_is_imported_before_it_is_needed():
    script = (
        "import sys\n"
        "from regraft import cli\n"
        "try: cli.main(['bench', '--help'])\n"
        "except SystemExit as stop: assert stop.code in (0, None), stop.code\n"
        "heavy = {'torch', 'pandas', 'numpy', 'scipy', 'plotly', 'pytest', 'torchvision'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--scenario" in done.stdout and "--resume" in done.stdout


@pytest.mark.parametrize("verb", ["bench", "symmetry", "reproduce"])
def test_every_verb_is_in_the_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code in (0, None)
    assert verb in capsys.readouterr().out


@pytest.fixture
def handed_to_pytest(monkeypatch):
    seen = []
    monkeypatch.setattr(pytest, "main", lambda arguments: seen.append(arguments) or 3)
    return seen


def test_bench_hands_its_options_to_pytest(handed_to_pytest):
    options = "--scenario a --scenario b --seeds 2 --device cuda --resume --results out"
    assert cli.main(["bench", *options.split(), "--", "-k", "fgmt"]) == 3
    folder, *handed = handed_to_pytest[0]
    assert folder.endswith("bench")
    assert handed == [
        "--benchmark-only",
        *("--scenario", "a", "--scenario", "b"),
        *("--device", "cuda", "--seeds", "2", "--results", "out"),
        "--resume",
        *("-k", "fgmt"),
    ]


def test_bench_without_options_leaves_the_defaults_to_pytest(handed_to_pytest):
    cli.main(["bench"])
    assert handed_to_pytest[0][1:] == ["--benchmark-only"]


def test_outside_a_checkout_it_says_where_the_benches_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "lib" / "site" / "regraft" / "cli.py"))
    assert cli.main(["bench"]) == 2
    assert "checkout" in capsys.readouterr().err


def test_symmetry_describes_the_model_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr("regraft.symmetry.describe", lambda *asked: seen.append(asked))
    assert cli.main(["symmetry", "resnet18", "--shape", "2", "3", "64", "64"]) == 0
    assert seen == [("resnet18", (2, 3, 64, 64))]


def test_a_model_that_is_not_there_is_one_line_and_status_2(capsys):
    assert cli.main(["symmetry", "no_such_model"]) == 2
    assert capsys.readouterr().err.startswith("regraft: ")


@pytest.mark.parametrize(("system", "option"), [("fusion", "--table"), ("fast", "--figure")])
def test_a_study_is_reproduced_by_two_words(system, option, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", system, "--help"])
    assert stop.value.code in (0, None)
    assert option in capsys.readouterr().out
