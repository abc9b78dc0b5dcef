"""The paper's algorithms against autograd and torch's optimisers, and the statements of its section 4."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from regraft.finetuning import fast
from regraft.reference import fast as paper

M, D, N = 12, 5, 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, D), nn.Tanh())
        self.fc = nn.Linear(D, N, bias=False)

    def forward(self, images):
        return self.fc(self.phi(images))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def batches():
    torch.manual_seed(1)
    labels = torch.arange(N).repeat(M // N)
    return [(torch.randn(M, 6).double(), labels) for _ in range(6)]


def phi(net: Net):
    return lambda theta, x: functional_call(net.phi, theta, (x,))


def theta(net: Net) -> dict:
    return {name: value.detach().clone() for name, value in net.phi.named_parameters()}


def one_hot(labels):
    return F.one_hot(labels, N).double()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_equations_4_8_and_12_are_autograds_gradients(net, batches):
    x, labels = batches[0]
    features = net.phi(x)
    features.retain_grad()
    loss = F.cross_entropy(net.fc(features), labels)
    loss.backward()
    w, a = net.fc.weight.detach(), features.detach()
    delta = paper.error(w, a, one_hot(labels))
    close(paper.loss(w, a, one_hot(labels)), loss.detach())
    close(paper.feature_gradient(delta, w) / M, features.grad)
    close(paper.velocity_w(0.3, delta, a), -0.3 * net.fc.weight.grad)
    for name, step in paper.velocity_theta(0.01, delta @ w, phi(net), theta(net), x).items():
        close(step, -0.01 * net.phi.get_parameter(name).grad)


@pytest.mark.parametrize("form", ["paper", "torch"])
@pytest.mark.parametrize("start", ["zero", "random"])
def test_the_algorithms_are_what_the_drop_in_does(net, batches, form, start):
    """Algorithm 2 with a zero head and two rates, algorithm 1 with a random one and equal rates."""
    initialise = fast.zero if start == "zero" else fast.Normal(0.5)
    head = fast.adopt(net, N, initialise=initialise, generator=torch.Generator().manual_seed(5)).head
    rates = (0.3, 0.05) if start == "zero" else (0.1, 0.1)
    hot = [(x, one_hot(labels)) for x, labels in batches]
    momentum = paper.paper_momentum if form == "paper" else paper.torch_momentum
    expected, expected_w = paper.fine_tune_by_hand(
        phi(net), theta(net), head.weight.detach().clone(), hot, rates, momentum
    )

    groups = fast.param_groups(net, *rates)
    if form == "paper":
        optimiser = torch.optim.SGD(groups, momentum=0.9, dampening=0.9)
        fast.start_momentum_at_zero_(optimiser)
    else:
        optimiser = torch.optim.SGD(groups, momentum=0.9)
    for x, labels in batches:
        optimiser.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimiser.step()
    close(head.weight.detach(), expected_w)
    for name, value in theta(net).items():
        close(value, expected[name])


# ---------------------------------------------------------------- section 4


def test_a_zero_head_predicts_uniformly_with_entropy_ln_n(net, batches):
    """Equation 16 and the one after it."""
    a = net.phi(batches[0][0]).detach()
    predicted = paper.softmax(a @ torch.zeros(N, D).double().T)
    close(predicted, torch.full((M, N), 1 / N, dtype=torch.float64))
    entropy = -(predicted * predicted.log()).sum(1)
    close(entropy, torch.full((M,), math.log(N), dtype=torch.float64))


def test_a_tiny_head_is_nearly_zero(net, batches):
    """Equation 18: N(0, 1e-8) in place of zero changes predictions in the eighth digit only."""
    a = net.phi(batches[0][0]).detach()
    w = torch.empty(N, D).double()
    fast.Normal(1e-8)(w, torch.Generator().manual_seed(0))
    assert (paper.softmax(a @ w.T) - 1 / N).abs().max() < 1e-7


def test_mean_squared_error_of_a_balanced_first_batch_is_smallest_at_zero(net, batches):
    """Section 4.1.3: 1 - 1/N for W = 0, whatever the features; on average more for a random W."""
    x, labels = batches[0]
    a = net.phi(x).detach()

    def squared(w):
        return float(paper.error(w, a, one_hot(labels)).square().sum(1).mean())

    assert squared(torch.zeros(N, D).double()) == pytest.approx(1 - 1 / N, rel=1e-12)
    generator = torch.Generator().manual_seed(0)
    draws = [squared(torch.randn(N, D, generator=generator).double()) for _ in range(200)]
    assert sum(draws) / len(draws) > 1 - 1 / N + 0.05


def test_the_softmaxs_squared_norm_is_at_least_one_over_n():
    """Lemmas 1 and 2 (the appendix says supremum; its proof bounds from below)."""
    torch.manual_seed(0)
    predicted = paper.softmax(3 * torch.randn(500, N).double())
    squares = predicted.square().sum(1)
    assert squares.min() >= 1 / N
    close(paper.softmax(torch.full((1, N), 2.0).double()).square().sum(), torch.tensor(1 / N).double())


def test_the_first_update_is_class_means_less_the_mean_of_all(net, batches):
    """Equation 20, with a balanced batch: W_n = alpha / N (mean of class n - mean of all)."""
    x, labels = batches[0]
    a = net.phi(x).detach()
    w = paper.velocity_w(0.3, paper.error(torch.zeros(N, D).double(), a, one_hot(labels)), a)
    means = fast.class_means(a, labels, N)
    close(w, 0.3 / N * (means - a.mean(0)))
    close(w.argmax(1), (means - a.mean(0)).argmax(1))


def test_the_first_gradient_of_the_features_is_zero(net, batches):
    """Section 4.1.4: back-propagation stalls at the features."""
    x, labels = batches[0]
    w = torch.zeros(N, D).double()
    delta = paper.error(w, net.phi(x).detach(), one_hot(labels))
    assert not paper.feature_gradient(delta, w).any()
    moved = paper.velocity_theta(1.0, delta @ w, phi(net), theta(net), x)
    assert not any(step.any() for step in moved.values())


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 1.0), (1.0, 2.0), (3.0, 5.0)])
def test_velocity_of_the_features_is_proportional_to_alpha_beta(net, batches, alpha, beta):
    """Equation 22: after one step from W = 0, where the error still is that of W = 0 (small alpha)."""

    def second_step(scale_alpha, scale_beta):
        small = 1e-6
        x, labels = batches[0]
        a = net.phi(x).detach()
        w = paper.velocity_w(small * scale_alpha, paper.error(torch.zeros(N, D).double(), a, one_hot(labels)), a)
        x, labels = batches[1]
        delta = paper.error(w, net.phi(x).detach(), one_hot(labels))
        return paper.velocity_theta(small * scale_beta, delta @ w, phi(net), theta(net), x)

    once, scaled = second_step(1.0, 1.0), second_step(alpha, beta)
    for name in once:
        torch.testing.assert_close(scaled[name], alpha * beta * once[name], rtol=1e-4, atol=0)


def test_a_random_head_takes_that_proportion_away(net, batches):
    """With W far from zero V_theta is proportional to beta alone (equation 14)."""
    x, labels = batches[0]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(N, D, generator=generator).double()

    def second_step(alpha):
        a = net.phi(x).detach()
        w = start + paper.velocity_w(alpha, paper.error(start, a, one_hot(labels)), a)
        delta = paper.error(w, a, one_hot(labels))
        return paper.velocity_theta(1.0, delta @ w, phi(net), theta(net), x)

    once, doubled = second_step(1e-8), second_step(2e-8)
    for name in once:
        torch.testing.assert_close(doubled[name], once[name], rtol=1e-4, atol=1e-12)


def test_nothing_that_is_handed_in_changes(net, batches):
    before = theta(net)
    w = torch.randn(N, D).double()
    kept, kept_w = copy.deepcopy(before), w.clone()
    paper.fine_tune_by_hand(phi(net), before, w, [(x, one_hot(y)) for x, y in batches], (0.1, 0.1))
    assert torch.equal(w, kept_w)
    assert all(torch.equal(before[name], kept[name]) for name in before)
