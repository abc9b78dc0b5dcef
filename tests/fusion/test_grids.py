"""Grids against one pass a point; interruption, memory, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.func import functional_call

import regraft.reference.fusion as reference
from regraft.core.files import write_sealed
from regraft.fusion import grids
from regraft.fusion.grids import GRID_FORMAT, FirstLayer, evaluate, harmonic_mean, lattice
from regraft.fusion.repair import batch_statistics, reset_on
from regraft.networks.papers import initialise, mlp, residual8, small_cnn

ALPHAS, BETAS = [0.0, 0.1, 1.0, 5.0], [0.0, 0.5, 50.0]
POINTS = lattice(BETAS, ALPHAS, lambda beta, alpha: (alpha, beta))
COUNT = 40


def setting(model: nn.Module) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    sources = [initialise(model, generator) for _ in range(2)]
    images = torch.randn(COUNT, 3, 32, 32, generator=generator)
    return sources, images, torch.randint(0, 10, (COUNT,), generator=generator)


@pytest.mark.parametrize("model", [small_cnn(), residual8(width=1 / 32), batch_statistics(residual8(width=1 / 32))])
def test_a_grid_is_one_pass_a_point(model):
    model.eval()
    sources, images, labels = setting(model)
    found = evaluate(model, sources, POINTS, images, labels, batch_size=COUNT)
    logits = reference.grid_logits(model, sources, POINTS.tolist(), images)
    clear = [  # a tie within rounding may go either way
        int((row.topk(2, -1).values.diff(dim=-1).abs() < 1e-4 * row.abs().amax(-1, keepdim=True)).sum())
        for row in logits
    ]
    for k, row in enumerate(logits):
        assert abs(int(found.correct[k]) - reference.correct_answers(row, labels)) <= clear[k]
    assert sum(clear[3:]) < 20


class LargeIsUnknown(nn.Module):
    def forward(self, x):
        return torch.where(x.abs() > 1e3, torch.nan, x)


def test_fast_pooling_is_exact():
    """Odd sizes, NaN, and poolings that look alike: a grid's answers are those of the plain network."""
    pools = [
        nn.MaxPool2d(2),
        nn.MaxPool2d(2, stride=1),
        nn.MaxPool2d(3),
        nn.MaxPool2d((2, 2), ceil_mode=True),
    ]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), LargeIsUnknown(), *pools, nn.Flatten(), nn.LazyLinear(10)).eval()
    x = torch.randn(COUNT, 3, 33, 31, generator=torch.Generator().manual_seed(0))
    x[0, 0, 4, 4] = 1e6
    model(x)
    sources, _, labels = setting(model)
    found = evaluate(model, sources, [[1.0, 0.0]], x, labels)
    (logits,) = reference.grid_logits(model, sources, [[1.0, 0.0]], x)
    assert int(found.correct[0]) == reference.correct_answers(logits, labels)
    assert int(found.nonfinite[0]) == 1


class ReadsTheImageTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.first(x)) + x)


class UsesTheLayerTwice(ReadsTheImageTwice):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.first(torch.relu(self.first(x))))


class LearnsBeforeTheLayer(ReadsTheImageTwice):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(12)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.first(self.norm(x))))


@pytest.mark.parametrize("kind", [ReadsTheImageTwice, UsesTheLayerTwice, LearnsBeforeTheLayer])
def test_a_network_that_cannot_be_cut_still_runs(kind):
    model, generator = kind().eval(), torch.Generator().manual_seed(0)
    sources = [initialise(model, generator) for _ in range(2)]
    x, y = torch.randn(30, 12, generator=generator), torch.randint(0, 3, (30,), generator=generator)
    assert FirstLayer.of(model, sources[0], x) is None
    found = evaluate(model, sources, [[0.5, 0.5], [2.0, -1.0]], x, y)
    logits = reference.grid_logits(model, sources, [[0.5, 0.5], [2.0, -1.0]], x)
    assert found.correct.tolist() == [reference.correct_answers(row, y) for row in logits]


def test_a_single_layer_is_not_cut():
    model = nn.Linear(4, 3)
    x = torch.randn(2, 4)
    tensors = initialise(model, torch.Generator().manual_seed(0))
    assert FirstLayer.of(model, tensors, x) is None


def test_an_mlp_is_cut_behind_its_first_layer():
    model = mlp([12, 5, 3])
    (tensors,) = [initialise(model, torch.Generator().manual_seed(0))]
    assert FirstLayer.of(model, tensors, torch.randn(4, 3, 2, 2)).prefix == "layers.0."


@pytest.mark.parametrize("limit", [1, 300_000, 1 << 30])
def test_memory_changes_nothing_but_the_chunks(limit):
    model = small_cnn()
    sources, images, labels = setting(model)
    seen = []
    found = evaluate(model, sources, POINTS, images, labels, memory=limit, progress=lambda done, _: seen.append(done))
    expected = evaluate(model, sources, POINTS, images, labels)
    assert found.correct.tolist() == expected.correct.tolist()
    assert len(seen) == {1: 12, 300_000: 12, 1 << 30: 1}[limit]


class Interrupted(Exception):
    pass


def test_an_interrupted_grid_resumes(tmp_path, monkeypatch):
    model = small_cnn()
    sources, images, labels = setting(model)
    expected = evaluate(model, sources, POINTS, images, labels)
    path, calls = tmp_path / "grid.json", []
    monkeypatch.setattr(grids, "CHUNK", 5)

    def stop(done: int, _total: int) -> None:
        calls.append(done)
        if len(calls) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        evaluate(model, sources, POINTS, images, labels, resume=path, progress=stop)
    found = evaluate(model, sources, POINTS, images, labels, resume=path, progress=stop)
    assert calls == [5, 10, 12]
    assert found.correct.tolist() == expected.correct.tolist()
    assert found.nonfinite.tolist() == expected.nonfinite.tolist()
    evaluate(model, sources, POINTS, images, labels, resume=path, progress=stop)
    assert calls == [5, 10, 12]

    with pytest.raises(ValueError, match="belongs to a grid with other networks"):
        evaluate(model, sources, POINTS + 1, images, labels, resume=path)


@pytest.mark.parametrize(
    "change",
    [
        {"correct": [COUNT + 1]},
        {"correct": [-1]},
        {"correct": [30], "nonfinite": [30]},
        {"correct": [0.5]},
        {"correct": [True]},
        {"correct": ["1"]},
        {"correct": [1, 2]},
        {"correct": [0] * 13, "nonfinite": [0] * 13},
        {"correct": None},
        "{",
        "[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_a_state_that_no_grid_can_have_is_refused(tmp_path, change):
    model, path = mlp([12, 5, 10]), tmp_path / "grid.json"
    sources, images, labels = setting(model)
    images = images[:, :, :2, :2]
    evaluate(model, sources, POINTS, images, labels, resume=path)
    state = json.loads(path.read_text())
    if isinstance(change, dict):
        write_sealed(path, GRID_FORMAT, {**state["content"], "correct": [0], "nonfinite": [0], **change})
    else:
        path.write_bytes(change if isinstance(change, bytes) else change.encode())
    with pytest.raises(ValueError, match=r"grid\.json: not a regraft-grid-1 file"):
        evaluate(model, sources, POINTS, images, labels, resume=path)


def test_the_batch_size_belongs_to_a_grid_only_where_batches_are_read(tmp_path):
    plain, own = residual8(width=1 / 32), batch_statistics(residual8(width=1 / 32))
    sources, images, labels = setting(plain)
    for model, path in ((plain, tmp_path / "plain.json"), (own, tmp_path / "own.json")):
        evaluate(model, sources, [[1.0, 0.0]], images, labels, resume=path, batch_size=20)
    evaluate(plain, sources, [[1.0, 0.0]], images, labels, resume=tmp_path / "plain.json", batch_size=10)
    with pytest.raises(ValueError, match="images or batches"):
        evaluate(own, sources, [[1.0, 0.0]], images, labels, resume=tmp_path / "own.json", batch_size=10)


def test_non_finite_answers_are_wrong_and_counted():
    model = small_cnn()
    sources, images, labels = setting(model)
    found = evaluate(model, sources, [[1.0, 0.0], [1e30, 1e30]], images, labels)
    assert found.nonfinite.tolist() == [0, COUNT]
    assert int(found.correct[1]) == 0


def test_nan_logits_are_never_right():
    """argmax takes the first NaN for the largest: class 0."""
    model = mlp([12, 10])
    sources, images, labels = setting(model)
    images = images[:, :, :2, :2]
    sources[1]["layers.0.bias"][0] = torch.nan
    found = evaluate(model, sources, [[1.0, 1.0]], images, torch.zeros_like(labels))
    assert found.correct.tolist() == [0] and found.nonfinite.tolist() == [COUNT]


def test_mending_that_moves_the_first_layer_is_respected():
    model = small_cnn().eval()
    sources, images, labels = setting(model)

    def double_first(tensors, _row):
        return {**tensors, "features.0.weight": -2 * tensors["features.0.weight"]}

    found = evaluate(model, sources, POINTS, images, labels, finish=double_first)
    moved = [{**s, "features.0.weight": -2 * s["features.0.weight"]} for s in sources]
    assert found.correct.tolist() == evaluate(model, moved, POINTS, images, labels).correct.tolist()


def test_resetting_statistics_point_by_point():
    model = residual8(width=1 / 32)
    sources, images, labels = setting(model)
    finish = reset_on(model, [(images, labels)])
    rows = [[1.0, 0.0], [0.5, 0.5]]
    found = evaluate(model, sources, rows, images, labels, finish=finish)
    for k, row in enumerate(rows):
        tensors = finish(reference.fuse_pair(*sources, *row), torch.tensor(row))
        with torch.no_grad():
            logits = functional_call(model.eval(), tensors, (images,))
        assert abs(int(found.correct[k]) - reference.correct_answers(logits, labels)) <= 1


def test_bad_input():
    model = small_cnn()
    sources, images, labels = setting(model)
    with pytest.raises(ValueError, match="empty"):
        evaluate(model, sources, POINTS, images[:0], labels[:0])
    with pytest.raises(ValueError, match="40 images need 40 labels"):
        evaluate(model, sources, POINTS, images, labels[:7])
    with pytest.raises(ValueError, match="the labels of the data set run from 5 to 14"):
        evaluate(model, sources, POINTS, images, labels + 5)
    with pytest.raises(ValueError, match="2 models need rows of 2"):
        evaluate(model, sources, [[1.0]], images, labels)
    with pytest.raises(ValueError, match=r"features\.0\.bias"):
        evaluate(
            model,
            [{n: t for n, t in s.items() if n != "features.0.bias"} for s in sources],
            POINTS,
            images,
            labels,
        )
    with pytest.raises(ValueError, match="is nan"):
        evaluate(model, sources, [[1.0, float("nan")]], images, labels)


def test_lattice_and_harmonic_mean():
    assert POINTS.shape == (12, 2)
    assert POINTS[1].tolist() == [0.1, 0.0] and POINTS[4].tolist() == [0.0, 0.5]
    means = harmonic_mean(torch.tensor([0.0, 0.5, 0.0]), torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(means, torch.tensor([0.0, 2 / 3, 0.0]))
