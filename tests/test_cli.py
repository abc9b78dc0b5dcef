import subprocess
import sys

from regraft import cli


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "regraft", *words], capture_output=True, text=True)


def test_help_names_every_verb_and_needs_no_torch():
    done = run("--help")
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in cli.verbs())
    words = """
import sys
from regraft import cli
try:
    cli.main(["--help"])
except SystemExit:
    assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", words], check=True, capture_output=True)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("regraft 0.")


def test_a_model_that_there_is_not_is_one_line_with_the_nearest_names(capsys):
    assert cli.main(["symmetry", "resnet19"]) == 2
    text = capsys.readouterr().err
    assert "resnet1" in text and text.count("\n") == 1
