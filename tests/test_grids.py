"""Grids against one pass a point; interruption, memory, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.func import functional_call

import regraft.reference.fusion as reference
from regraft import grids
from regraft.fusion import batch_statistics, reset_on
from regraft.grids import FirstLayer, all_at_once, evaluate, harmonic_mean, lattice, one_by_one
from regraft.models import initialise, mlp, residual8, small_cnn

ALPHAS, BETAS = [0.0, 0.1, 1.0, 5.0], [0.0, 0.5, 50.0]
POINTS = lattice(BETAS, ALPHAS, lambda beta, alpha: (alpha, beta))
COUNT = 40


def setting(model: nn.Module) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    sources = [initialise(model, generator) for _ in range(2)]
    images = torch.randn(COUNT, 3, 32, 32, generator=generator)
    return sources, images, torch.randint(0, 10, (COUNT,), generator=generator)


@pytest.mark.parametrize("strategy", [one_by_one, all_at_once])
@pytest.mark.parametrize(
    "model", [small_cnn(), residual8(width=1 / 32), batch_statistics(residual8(width=1 / 32))]
)
def test_a_grid_is_one_pass_a_point(model, strategy):
    model.eval()
    sources, images, labels = setting(model)
    found = evaluate(model, sources, POINTS, images, labels, strategies=[strategy], batch_size=COUNT)
    logits = reference.grid_logits(model, sources, POINTS.tolist(), images)
    clear = [  # a tie within rounding may go either way
        int((row.topk(2, -1).values.diff(dim=-1).abs() < 1e-4 * row.abs().amax(-1, keepdim=True)).sum())
        for row in logits
    ]
    for k, row in enumerate(logits):
        assert abs(int(found.correct[k]) - reference.correct_answers(row, labels)) <= clear[k]
    assert sum(clear[3:]) < 20


@pytest.mark.parametrize("strategy", [one_by_one, all_at_once])
def test_logits_of_the_cut_network(strategy):
    model = small_cnn().eval()
    sources, images, _ = setting(model)
    cut = FirstLayer.of(model, sources[0], images)
    stack = cut.without_first(grids.fuse_many(sources, POINTS))
    weights = POINTS.to(images)
    with torch.no_grad():
        logits = strategy(model, cut, stack, grids._firsts(cut, sources, images), weights, images)
    for found, expected in zip(
        logits, reference.grid_logits(model, sources, POINTS.tolist(), images), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max() + 1))


def test_fast_pooling_is_exact():
    model = nn.Sequential(nn.MaxPool2d(2))
    x = torch.randn(3, 4, 7, 9, generator=torch.Generator().manual_seed(0))
    x[0, 0, 1, 1] = torch.nan
    fast = grids._with_fast_pooling(nn.Sequential(nn.MaxPool2d(2)))
    assert not isinstance(fast[0], nn.MaxPool2d)
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=0, equal_nan=True)
    other = grids._with_fast_pooling(nn.Sequential(nn.MaxPool2d(2, stride=1), nn.MaxPool2d(3)))
    assert all(isinstance(module, nn.MaxPool2d) for module in other)


class ReadsTheImageTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.first(x)) + x)


class UsesTheLayerTwice(ReadsTheImageTwice):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.first(torch.relu(self.first(x))))


@pytest.mark.parametrize("kind", [ReadsTheImageTwice, UsesTheLayerTwice])
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
    assert FirstLayer.of(model, tensors, torch.randn(4, 3, 2, 2)).name == "layers.0"


@pytest.mark.parametrize("limit", [1, 300_000, 1 << 30])
def test_memory_changes_nothing_but_the_chunks(limit):
    model = small_cnn()
    sources, images, labels = setting(model)
    seen = []
    found = evaluate(
        model, sources, POINTS, images, labels, memory=limit, progress=lambda done, _: seen.append(done)
    )
    expected = evaluate(model, sources, POINTS, images, labels)
    assert found.correct.tolist() == expected.correct.tolist()
    assert len(seen) == {1: 12, 300_000: 12, 1 << 30: 1}[limit]


class Interrupted(Exception):
    pass


def test_an_interrupted_grid_goes_on(tmp_path, monkeypatch):
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
    path.write_text("{")
    with pytest.raises(ValueError, match="not the state of a grid"):
        evaluate(model, sources, POINTS, images, labels, resume=path)
    path.write_text(json.dumps({"grid": "x"}))
    with pytest.raises(ValueError, match="not the state of a grid"):
        evaluate(model, sources, POINTS, images, labels, resume=path)


def test_non_finite_answers_are_wrong_and_counted():
    model = small_cnn()
    sources, images, labels = setting(model)
    found = evaluate(model, sources, [[1.0, 0.0], [1e30, 1e30]], images, labels)
    assert found.nonfinite.tolist() == [0, COUNT]
    assert int(found.correct[1]) == 0


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
    found = evaluate(model, sources, rows, images, labels, finish=finish, strategies=[one_by_one])
    for k, row in enumerate(rows):
        tensors = finish(reference.fuse(*sources, *row), torch.tensor(row))
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
    with pytest.raises(ValueError, match="the head has 10 classes"):
        evaluate(model, sources, POINTS, images, labels + 5)
    with pytest.raises(ValueError, match="2 models need rows of 2"):
        evaluate(model, sources, [[1.0]], images, labels)
    with pytest.raises(ValueError, match="is nan"):
        evaluate(model, sources, [[1.0, float("nan")]], images, labels)


def test_lattice_and_harmonic_mean():
    assert POINTS.shape == (12, 2)
    assert POINTS[1].tolist() == [0.1, 0.0] and POINTS[4].tolist() == [0.0, 0.5]
    means = harmonic_mean(torch.tensor([0.0, 0.5, 0.0]), torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(means, torch.tensor([0.0, 2 / 3, 0.0]))


def test_the_faster_strategy_is_taken():
    def slow(*_arguments):
        import time

        time.sleep(0.02)

    def quick(*_arguments):
        pass

    def broken(*_arguments):
        raise RuntimeError

    assert grids.faster([broken, slow, quick], (), torch.device("cpu")) is quick


def test_what_is_wrong_with_every_strategy_is_raised():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, images):
            if len(images) > 2:
                raise RuntimeError("this network is broken")
            return self.fc(images)

    model = Broken()
    sources = [dict(model.named_parameters())]
    with pytest.raises(RuntimeError, match="this network is broken"):
        evaluate(model, sources, [[1.0]] * 60, torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))
