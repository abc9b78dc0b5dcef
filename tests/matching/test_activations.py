"""Matching by what units compute on data."""

import pytest
import torch
from torch import nn

import regraft
from regraft.core.tensors import state
from regraft.matching.activations import correlate_units
from regraft.networks.papers import vit


def convolutional() -> nn.Module:
    layers = [nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(5 * 16, 3))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 9), nn.Tanh(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))


NETWORKS = {
    "convolutional": convolutional,
    "perceptron": perceptron,
    "vit": lambda: vit(3, size=6, patch=3, width=8, depth=2, heads=2, in_channels=2),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    model = NETWORKS[request.param]().eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    return model


def batches(seed: int = 1) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(20, 2, 6, 6, generator=generator), torch.zeros(20, dtype=torch.int64)) for _ in range(3)]


def test_a_planted_permutation_is_found(network):
    spec, theta = regraft.trace(network, (torch.zeros(2, 2, 6, 6),)), state(network)
    planted = spec.random(torch.Generator().manual_seed(3))
    target = regraft.apply(spec, planted, theta)
    match = regraft.match(spec, target, theta, model=network, batches=batches())
    assert all(torch.equal(match.perm[group], planted[group]) for group in spec.groups)
    assert match.objective == pytest.approx(
        sum(float((target[n].double() * target[n]).sum()) for n, _ in network.named_parameters()), rel=1e-5
    )


def test_correlations_are_those_of_all_batches_together():
    model = perceptron()
    other = perceptron()
    spec = regraft.trace(model, (torch.zeros(2, 2, 6, 6),))
    found = correlate_units(spec, model, state(model), state(other), batches())
    images = torch.cat([x for x, _ in batches()])
    hidden = [net[:3](images).double().detach().T for net in (model, other)]
    expected = torch.corrcoef(torch.cat(hidden))[:9, 9:]
    torch.testing.assert_close(found[next(iter(spec.groups))], expected, rtol=1e-6, atol=1e-6)


def test_units_that_never_vary_correlate_with_nothing():
    model = perceptron()
    spec = regraft.trace(model, (torch.zeros(2, 2, 6, 6),))
    theta = state(model)
    theta["1.weight"][2] = 0
    found = correlate_units(spec, model, theta, theta, batches())[next(iter(spec.groups))]
    assert found[2].abs().max() == 0 and found.isfinite().all()
    assert found.diagonal().sum() == pytest.approx(8, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": []}, "no batch"),
        ({"batches": None}, "takes a model and batches"),
        ({"model": None}, "takes a model and batches"),
        ({"restarts": 2}, "neither start nor restarts"),
        ({"batches": [(torch.full((2, 2, 6, 6), float("nan")), torch.zeros(2, dtype=torch.int64))]}, "finite"),
    ],
)
def test_what_does_not_go_together_is_said(arguments, message):
    model = perceptron()
    spec = regraft.trace(model, (torch.zeros(2, 2, 6, 6),))
    theta = state(model)
    with pytest.raises(ValueError, match=message):
        regraft.match(spec, theta, theta, **{"model": model, "batches": batches(), **arguments})


def test_a_specification_without_a_group_is_an_error():
    model = nn.Linear(4, 3)
    spec = regraft.trace(model, (torch.zeros(2, 4),))
    with pytest.raises(ValueError, match="no group that moves"):
        regraft.match(spec, state(model), state(model))
