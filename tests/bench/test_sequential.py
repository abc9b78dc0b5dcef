"""EWC, both data sets together, and the Hessian term, on networks small enough to do by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import regraft.reference.fusion as reference
from regraft.data import load
from regraft.networks.papers import initialise, mlp
from regraft.training.loop import Recipe, train
from regraft_bench.fusion.continual import Consolidation, join_datasets
from regraft_bench.fusion.theory import compare_with_hessian, hessian_vector_product


class Smooth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture
def smooth():
    generator = torch.Generator().manual_seed(0)
    model = Smooth().double()
    start = {n: t.double() for n, t in initialise(Smooth(), generator).items()}

    def batch() -> list[tuple[Tensor, Tensor]]:
        x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
        return [(x, torch.randint(0, 3, (12,), generator=generator))]

    return model, start, batch(), batch()


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def loss_of(model: nn.Module, like: dict[str, Tensor], batches):
    """The loss as a function of one flat vector."""

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([tensor.numel() for tensor in like.values()])
        values = {name: part.view(like[name].shape) for name, part in zip(like, parts, strict=True)}
        return F.cross_entropy(functional_call(model, values, (batches[0][0],)), batches[0][1])

    return loss


def test_hessian_vector_is_the_whole_hessian_times_the_vector(smooth):
    model, start, a, _ = smooth
    vector = {name: torch.randn_like(tensor) for name, tensor in start.items()}
    whole = torch.func.hessian(loss_of(model, start, a))(flat(start))
    found = hessian_vector_product(model, start, a, vector)
    torch.testing.assert_close(flat(found), whole @ flat(vector))


def test_cancellation_is_the_papers(smooth):
    model, start, a, b = smooth
    losses = loss_of(model, start, a), loss_of(model, start, b)
    trained, assigned = reference.sequential_steps(*losses, flat(start), 0.01, 0.01)
    term = reference.cancellation_term(*losses, flat(start), 0.01)
    found = compare_with_hessian(model, start, a, b, 0.01)
    assert found["difference"] == pytest.approx(float((trained - assigned).norm()))
    assert found["predicted"] == pytest.approx(float(0.01 * term.norm()))
    error = float((trained - assigned + 0.01 * term).norm() / (trained - assigned).norm())
    assert found["relative_error"] == pytest.approx(error)


def test_the_term_explains_the_difference_the_better_the_smaller_the_rate(smooth):
    errors = [compare_with_hessian(*smooth, rate)["relative_error"] for rate in (0.1, 0.01, 0.001)]
    assert errors[1] < errors[0] / 5 and errors[2] < errors[1] / 5 and errors[2] < 0.01
    assert compare_with_hessian(*smooth, 0.001, steps=5)["cosine"] > 0.999


def digits():
    data = load("digits")
    model = mlp([64, 16, 10])
    return data, model, initialise(model, torch.Generator().manual_seed(0))


def test_consolidation_without_strength_is_training():
    data, model, start = digits()
    recipe = Recipe(epochs=1, lr=0.05)
    everything = {name: torch.ones_like(tensor) for name, tensor in start.items()}
    seed = torch.Generator().manual_seed
    nothing = Consolidation(start, everything, 0.0)
    found = train(model, start, data, recipe, generator=seed(3), penalty=nothing).tensors
    expected = train(model, start, data, recipe, generator=seed(3)).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_consolidation_is_the_gradient_of_the_quadratic_term():
    _, model, start = digits()
    importance = {name: torch.rand_like(tensor) for name, tensor in start.items()}
    for name, parameter in model.named_parameters():
        parameter.data = start[name] + 1
        parameter.grad = torch.zeros_like(parameter)
    Consolidation(start, importance, 3.0)(model)
    term = sum(
        1.5 * (importance[name] * (parameter - start[name]) ** 2).sum() for name, parameter in model.named_parameters()
    )
    expected = torch.autograd.grad(term, list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_consolidation_holds_what_matters_and_nothing_else():
    data, model, start = digits()
    recipe = Recipe(epochs=1, lr=0.01, momentum=0.0)
    held = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    held["layers.0.weight"] += 1

    def moved(strength: float) -> dict[str, float]:
        generator = torch.Generator().manual_seed(0)
        penalty = Consolidation(start, held, strength)
        found = train(model, start, data, recipe, generator=generator, penalty=penalty).tensors
        return {name: float((found[name] - start[name]).norm()) for name in start}

    found, free = moved(90.0), moved(0.0)
    assert found["layers.0.weight"] < 0.3 * free["layers.0.weight"]
    assert found["layers.1.weight"] > 0.7 * free["layers.1.weight"]


def test_what_makes_no_penalty_is_refused():
    _, _, start = digits()
    with pytest.raises(ValueError, match="strength"):
        Consolidation(start, start, -1.0)
    with pytest.raises(ValueError, match=r"layers\.0\.bias"):
        Consolidation(start, start | {"layers.0.bias": torch.ones(3)}, 1.0)


def test_a_checkpoint_under_another_penalty_is_refused(tmp_path):
    data, model, start = digits()

    def run(strength: float):
        return train(
            model,
            start,
            data,
            Recipe(epochs=1, lr=0.05),
            generator=torch.Generator().manual_seed(0),
            penalty=Consolidation(start, start, strength),
            checkpoint=tmp_path / "run.safetensors",
        )

    assert run(1.0).history == run(1.0).history
    with pytest.raises(ValueError, match="penalty differ"):
        run(2.0)


def test_two_data_sets_together_keep_their_own_normalisation():
    low, high = load("digits", classes=(0, 1, 2)), load("digits", classes=(7, 8, 9))
    both = join_datasets(low, high, repeat=3)
    assert len(both.train) == len(low.train) + 3 * len(high.train)
    assert len(both.test) == len(low.test) + len(high.test)
    first = next(iter(low.train.batches(10)))
    found = next(iter(both.train.batches(10)))
    torch.testing.assert_close(found[0], first[0])
    last = next(iter(both.train.subset(torch.tensor([len(both.train) - 1])).batches(1)))
    expected = next(iter(high.train.subset(torch.tensor([len(high.train) - 1])).batches(1)))
    torch.testing.assert_close(last[0], expected[0])
    assert int(last[1]) == int(expected[1])
