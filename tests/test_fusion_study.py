"""The whole study on noise: every kind of table has the paper's shape, its controls, and adds up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regraft import fusion_forgetting, fusion_study
from regraft.data import Dataset, MissingData, Split
from regraft.fusion_pages import reproduce, table_document
from regraft.fusion_study import CIFAR10, Study, Task, targets
from regraft.fusion_tables import paper_table
from regraft.training import Recipe


def noise(_study: Study, task: Task) -> Dataset:
    generator = torch.Generator().manual_seed(len(task.label))
    if task.data == "stl10":
        raise MissingData("not here")

    def split(each: int) -> Split:
        labels = torch.arange(10).repeat(each)
        images = torch.randn(len(labels), 3, 32, 32, generator=generator) + labels[:, None, None, None] / 5
        return Split(images, labels)

    parts = {"train": split(8), "validation": split(2), "test": split(2)}
    return Dataset(task.label, **parts, classes=tuple("0123456789"), mean=(0.0,) * 3, std=(1.0,) * 3)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    once = Recipe(epochs=1, lr=0.02, batch_size=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusion_study, "dataset", noise)
        patch.setattr(fusion_forgetting, "dataset", noise)
        patch.setitem(fusion_study.PER_CLASS, "medium", 6)
        yield replace(
            Study(None, tmp_path_factory.mktemp("cache"), width=1 / 32, target_steps=4, images=10),
            cnn=tuple((scale, once) for scale in ("small", "medium", "large")),
            residual=tuple((scale, once) for scale in ("small", "medium", "large")),
        )


@pytest.mark.parametrize("number", ["1", "4", "5", "6", "A5"])
def test_a_table_has_the_papers_shape_and_its_controls(study, number):
    document, record, _ = table_document(study, number)
    paper = paper_table(number)
    assert [len(row) for row in record["ours"]] == [len(row) for row in paper.values]
    assert all(0 <= value <= 1 for row in record["ours"] for value in row)
    assert document.count(" / ") >= len(paper.rows) * len(paper.columns)
    text = json.dumps(record["controls"])
    for word in {
        "1": ("alpha g alone", "alpha theta_A alone", "average", "ensemble", "alignment", "REPAIR"),
        "4": ("own task", "harmonic mean", "chosen on validation"),
        "5": ("consolidation", "upper bound", "task arithmetic", "share of training"),
        "6": ("fused like weights", "reset on data", "other initial values", "chosen on validation"),
        "A5": ("zero target", "harmonic mean"),
    }[number]:
        assert word in text
    json.dumps(record, allow_nan=False)


def test_gradients_and_weights_agree_where_they_are_the_same_network(study):
    """As in the paper's own tables: at alpha + beta = 1 both formulas give one network."""
    fused, assigned = (table_document(study, number)[1]["ours"] for number in ("A14", "A4"))
    paper = paper_table("A4")
    for alpha, beta in ((0.0, 1.0), (0.5, 0.5), (1.0, 0.0)):
        row, column = paper.rows.index(beta), paper.columns.index(alpha)
        assert fused[row][column] == pytest.approx(assigned[row][column], abs=0.04)


def test_what_is_missing_is_replaced_and_said_so(study):
    assert targets(study)[4].instead_of == "STL-10"
    assert any("STL-10" in note for note in table_document(study, "4")[1]["notes"])


def test_smaller_scales_are_among_larger_ones(study):
    sets = [
        {
            tuple(image.flatten()[:3].tolist())
            for image in fusion_study.at_scale(study, CIFAR10, scale).train.images
        }
        for scale in ("small", "medium", "large")
    ]
    assert [len(s) for s in sets] == [40, 60, 80]
    assert sets[0] < sets[1] < sets[2]


def test_reproduce_writes_what_it_prints(study, tmp_path: Path, capsys):
    reproduce(study, ["F1", "1"], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "figure_1.html", "figure_1.json", "figure_1.md", "main_01.json", "main_01.md",
    }  # fmt: skip
    assert "Table 1" in capsys.readouterr().out
    lines = json.loads((tmp_path / "figure_1.json").read_text())["lines"]
    table = json.loads((tmp_path / "main_01.json").read_text())
    assert lines["a"]["theta_3"][-1] == pytest.approx(table["ours"][-1][2])
    with pytest.raises(ValueError, match="no table or figure 'A77'"):
        reproduce(study, ["A77"])


def test_theory_on_the_studys_network(study):
    rows = fusion_forgetting.theory(study, rates=(0.1, 1e-6))
    assert list(rows) == [f"{n} a task at rate {r}" for n in ("1 step", "5 steps") for r in ("0.1", "1e-06")]
    coarse, fine, *_ = rows.values()
    assert fine["relative error"] < 0.05 < coarse["relative error"]
    assert fine["cosine"] > 0.99


def test_coefficients_are_chosen_on_validation_and_reported_on_test(study, monkeypatch):
    held, test = torch.tensor([[0.1, 0.9], [0.2, 0.3]]), torch.tensor([[0.8, 0.4], [0.5, 0.6]])
    monkeypatch.setattr(
        fusion_study, "pair_grid", lambda *asked: {"validation": held, "test": test}[asked[4]].double()
    )
    (found,) = fusion_study.chosen_on_validation(study, "", "large", (1.0, 2.0), (3.0, 4.0)).values()
    assert found == pytest.approx({"alpha": 2.0, "beta": 3.0, "CIFAR-10": 0.4, "CIFAR-100": 0.4})
