"""Ports that need inputs of the task, but no labels: what each must give exactly, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from regraft import networks
from regraft.core.tensors import Tensors
from regraft.porting.label_free import distil, fit_head, predict
from regraft.porting.label_free.head import Sums
from regraft.training.evaluation import NotFinite


def draw(model: nn.Module, seed: int) -> Tensors:
    return networks.initialise(model, torch.Generator().manual_seed(seed))


def inputs(*shape: int, batches: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for _ in range(batches)]


MLP = networks.mlp([16, 24, 5])
BATCHES = inputs(32, 16)


def agreement(model: nn.Module, a: Tensors, b: Tensors, batches: list[Tensor]) -> float:
    answers = (torch.cat(predict(model, tensors, batches)).argmax(-1) for tensors in (a, b))
    return float(torch.eq(*answers).float().mean())


# ---------------------------------------------------------------- head


def test_head_is_the_fine_tunes_where_that_is_linear_in_the_features() -> None:
    base, other = draw(MLP, 0), draw(MLP, 1)
    tuned = base | {name: other[name] for name in ("layers.1.weight", "layers.1.bias")}
    fitted = fit_head(MLP, tuned, base, BATCHES)
    for name, tensor in tuned.items():
        torch.testing.assert_close(fitted[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [12, 60])  # fewer than features, and more
@pytest.mark.parametrize("bias", [True, False])
def test_ridge_is_that_of_the_normal_equations(rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, width, generator=generator, dtype=torch.float64) + 1 for width in (20, 3))
    sums = Sums(20, bias=bias)
    for part in (slice(0, 5), slice(5, None)):
        sums.add(x[part], y[part])
    weight, free = sums.solve(0.1)
    if bias:
        x, y = x - x.mean(0), y - y.mean(0)
    penalty = 0.1 * x.square().sum() / 20 * torch.eye(20, dtype=torch.float64)
    torch.testing.assert_close(weight.T, torch.linalg.solve(x.T @ x + penalty, x.T @ y))
    assert bias or not free.any()


def test_chosen_ridge_has_the_least_score_of_generalised_cross_validation() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 20, generator=generator, dtype=torch.float64)
    y = x[:, :3] + 2 * torch.randn(40, 3, generator=generator, dtype=torch.float64)
    sums = Sums(20, bias=False)
    sums.add(x, y)
    weight, _ = sums.solve()

    def score(ridge: float) -> float:
        penalty = ridge * x.square().sum() / 20 * torch.eye(20, dtype=torch.float64)
        hat = x @ torch.linalg.solve(x.T @ x + penalty, x.T)
        return float((y - hat @ y).square().sum() / (40 - hat.trace()) ** 2)

    ridges = torch.logspace(-9, 2, 45, dtype=torch.float64).tolist()
    best = min(ridges, key=score)
    torch.testing.assert_close(weight, sums.solve(best)[0])
    assert ridges[0] < best < ridges[-1]


def test_too_few_inputs_other_classes_and_bad_values_are_refused() -> None:
    base, tuned = draw(MLP, 0), draw(MLP, 1)
    with pytest.raises(ValueError, match="4 inputs are too few to fit a head of 5 classes"):
        fit_head(MLP, tuned, base, [BATCHES[0][:4]])
    wider = networks.mlp([16, 24, 7])
    with pytest.raises(ValueError, match=r"'layers.1' has 7 outputs, the fine-tune has 5 classes"):
        fit_head(MLP, tuned, draw(wider, 0), BATCHES, new_model=wider)
    with pytest.raises(ValueError, match="batch 1 holds a value that is not finite"):
        fit_head(MLP, tuned, base, [BATCHES[0], BATCHES[1] / 0])
    huge = base | {"layers.0.weight": base["layers.0.weight"] * 1e38}
    with pytest.raises(NotFinite, match=r"input of layer 'layers.1', are not finite"):
        fit_head(MLP, tuned, huge, [batch * 1e3 for batch in BATCHES])
    with pytest.raises(NotFinite, match="logits of batch 0 are not finite"):
        fit_head(MLP, huge, base, [batch * 1e3 for batch in BATCHES])


def test_head_of_a_network_of_another_width() -> None:
    wider = networks.mlp([16, 64, 5])
    tuned, new_base = draw(MLP, 0), draw(wider, 1)
    fitted = fit_head(MLP, tuned, new_base, BATCHES, new_model=wider)
    answers = torch.cat(predict(wider, fitted, BATCHES)), torch.cat(predict(MLP, tuned, BATCHES))
    assert float((answers[0].argmax(-1) == answers[1].argmax(-1)).float().mean()) > 0.8


# ---------------------------------------------------------------- distil


def test_distilling_agrees_more_than_its_start_and_changes_nothing_it_is_given() -> None:
    base, tuned = draw(MLP, 0), draw(MLP, 1)
    before = {name: tensor.clone() for name, tensor in base.items()}
    trained = distil(MLP, tuned, base, BATCHES, steps=400, lr=1e-2)
    assert agreement(MLP, trained, tuned, BATCHES) > max(0.9, agreement(MLP, base, tuned, BATCHES))
    assert all(torch.equal(base[name], tensor) for name, tensor in before.items())


def test_distilling_the_fine_tune_itself_leaves_it() -> None:
    tuned = draw(MLP, 1)
    trained = distil(MLP, tuned, tuned, BATCHES, steps=1, lr=0.0)
    assert all(torch.equal(trained[name], tensor) for name, tensor in tuned.items())
