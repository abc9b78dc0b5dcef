"""What README, docs and examples print runs as it stands."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from regraft_bench.kernels import variants

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(path for path in (ROOT / "docs").glob("*.md") if "```python" in path.read_text("utf-8"))


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def test_the_documents_stay_short():
    """At most 13,000 words; code, and tables that are made of rows, not counted."""
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "results").glob("*/README.md")]
    made = re.compile(r"^ *```.*?^ *```$|<!-- table.*?<!-- end -->", re.S | re.M)
    texts = (made.sub("", page.read_text(encoding="utf-8")) for page in pages)
    assert sum(bool(re.search(r"\w", word)) for text in texts for word in text.split()) <= 13_000


def test_every_block_of_the_readme_runs_when_pasted(monkeypatch):
    import torchvision

    from regraft.networks.papers import small_cnn

    monkeypatch.setattr(torchvision.models, "resnet18", lambda num_classes: small_cnn(num_classes))  # in a second
    for block in blocks(ROOT / "README.md"):
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_blocks_of_a_document_run_one_after_the_other(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    names: dict = {"__name__": document.stem}
    for block in blocks(document):
        exec(compile(block, document.name, "exec"), names)


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs(example, capsys):
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out


def test_the_files_to_copy_for_a_kernel_and_a_study_work(monkeypatch):
    """As docs/extend.md says, without copying: the kernel is registered under the name that it would have."""
    folder, name = ROOT / "examples" / "adding", "regraft_kernels.scale"
    monkeypatch.setattr(variants, "_OPERATORS", {})
    specification = importlib.util.spec_from_file_location(name, folder / "scale.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, name, module)
    tensor = torch.randn(3, 5)
    assert torch.equal(module.scale(tensor, 0.5, backend="torch"), module.scale_reference(tensor, 0.5))
    study = runpy.run_path(str(folder / "rounding.py"), run_name="rounding")["STUDY"]
    assert study.select(study.quick)
    for file in ("scale_contest.py", "test_scale.py"):
        runpy.run_path(str(folder / file), run_name=file)
    assert list(variants._OPERATORS) == ["scale"]
