"""Evaluation: what is measured, and that neither model nor tensors are touched."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regraft.core import guard, tensors
from regraft.networks import papers as networks
from regraft.training.evaluation import accuracy, call, ensemble_accuracy, loss_and_accuracy
from regraft.training.gradients import gradients
from regraft.training.landscape import interpolate, plane
from regraft.training.statistics import reset_batchnorm


def seed(number=0):
    return torch.Generator().manual_seed(number)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6 * 16, 3)

    def forward(self, images):
        return self.fc(self.drop(F.relu(self.norm(self.conv(images)))).flatten(1))


def data(count=5, size=8):
    generator = seed(3)
    images, labels = (size, 2, 4, 4), (size,)
    draw = {"generator": generator}
    return [(torch.randn(images, **draw) * 2 + 1, torch.randint(0, 3, labels, **draw)) for _ in range(count)]


@pytest.fixture
def network():
    """A model, and values that are not its own. The model is in training mode, but for one module."""
    model = networks.build(Network, seed(1))
    model.drop.eval()
    values = tensors.state(networks.build(Network, seed(2)))
    values["norm.running_mean"] += 0.3
    return model, values


@pytest.fixture(autouse=True)
def nothing_is_touched(network):
    model, values = network
    own, given = tensors.state(model), {name: value.clone() for name, value in values.items()}
    modes = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    yield
    for name in own:
        assert torch.equal(tensors.live_state(model)[name], own[name]), f"the model's {name} changed"
        assert torch.equal(values[name], given[name]), f"the given {name} changed"
    assert [module.training for module in model.modules()] == modes
    assert model.norm.momentum == 0.1
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(parameter.grad is None for parameter in model.parameters())


def filled(values):
    """A model of its own that holds the values."""
    model = Network()
    model.load_state_dict(values)
    return model


@pytest.fixture
def reference(network):
    with torch.random.fork_rng():
        return filled(network[1])


# --- accuracy and loss


def test_accuracy_and_loss_are_means_over_images(network, reference):
    batches = [*data(3), tuple(part[:3] for part in data(1)[0])]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    logits = reference.eval()(images).detach()
    right = float((logits.argmax(1) == labels).float().mean())
    loss, found = loss_and_accuracy(*network, batches)
    assert accuracy(*network, iter(batches)) == found == pytest.approx(right)
    assert loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


def test_logits_that_are_not_finite_are_wrong_answers(network):
    """argmax takes a NaN for the largest: for class 0, of these images, it would be right every time."""
    model, values = network
    batches = [(images, torch.zeros_like(labels)) for images, labels in data()]
    broken = values | {"fc.weight": values["fc.weight"] * math.nan}
    assert accuracy(model, broken, batches) == 0
    assert ensemble_accuracy(model, [values, broken], batches) == 0
    loss, found = loss_and_accuracy(model, broken, batches)
    assert math.isnan(loss) and found == 0


def test_an_ensemble_answers_by_the_mean_of_the_logits(network):
    model, values = network
    other = tensors.state(model)
    images, labels = (torch.cat(parts) for parts in zip(*data(), strict=True))
    with guard.evaluating(model):
        each = [call(model, one, images) for one in (values, other)]
    right = float((sum(each).argmax(1) == labels).float().mean())
    assert ensemble_accuracy(model, [values, other], data()) == pytest.approx(right)
    assert ensemble_accuracy(model, [values], data()) == accuracy(model, values, data())
    with pytest.raises(ValueError, match="no network"):
        ensemble_accuracy(model, [], data())


@pytest.mark.parametrize(
    "function",
    [
        accuracy,
        loss_and_accuracy,
        gradients,
        reset_batchnorm,
    ],
)
def test_no_batch_is_an_error(network, function):
    with pytest.raises(ValueError, match="no batch"):
        function(*network, [])


@pytest.mark.parametrize(
    "function",
    [
        accuracy,
        loss_and_accuracy,
        gradients,
        reset_batchnorm,
    ],
)
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda v: {k: t for k, t in v.items() if k != "fc.weight"}, "lack fc.weight"),
        (lambda v: v | {"gain": torch.ones(1)}, "have gain"),
        (lambda v: v | {"fc.bias": torch.ones(4)}, r"fc.bias has shape \[4\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(network, function, change, words):
    model, values = network
    with pytest.raises(ValueError, match=words):
        function(model, change(values), data())


def test_buffers_that_are_absent_are_the_models_own(network):
    model, values = network
    parameters = {name: values[name] for name, _ in model.named_parameters()}
    own = tensors.state(model)
    whole = parameters | {name: own[name] for name in own if name not in parameters}
    assert accuracy(model, parameters, data()) == accuracy(model, whole, data())
    assert tensors.complete(model, parameters).keys() == own.keys()
    gradients(model, parameters, data())
    assert not torch.equal(
        reset_batchnorm(model, parameters, data())["norm.running_mean"],
        own["norm.running_mean"],
    )


# --- gradients


def test_gradients_are_those_of_training_mode_averaged_over_batches(network, reference):
    reference.train()
    reference.drop.eval()
    expected = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    for images, labels in data(3):
        reference.zero_grad()
        F.cross_entropy(reference(images), labels).backward()
        for name, parameter in reference.named_parameters():
            expected[name] += parameter.grad / 3
    found = gradients(*network, data(3))
    assert list(found) == list(expected)
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=1e-6), name
        assert found[name].is_contiguous()
    # BatchNorm's input is normalised by the batch, so that its offset has no effect.
    assert found["conv.bias"].abs().max() < 1e-6


def test_another_loss_may_be_given(network):
    doubled = gradients(*network, data(), loss=lambda logits, labels: 2 * F.cross_entropy(logits, labels))
    for name, gradient in gradients(*network, data()).items():
        assert torch.allclose(doubled[name], 2 * gradient, atol=1e-6)


def test_dropout_is_off_or_drawn_from_the_generator(network):
    plain, first, same, other = (gradients(*network, data(1), generator=g) for g in (None, seed(1), seed(1), seed(2)))
    assert torch.equal(first["fc.weight"], same["fc.weight"])
    assert not torch.equal(first["fc.weight"], other["fc.weight"])
    assert torch.equal(plain["fc.weight"], gradients(*network, data(1))["fc.weight"])


def test_an_unused_parameter_has_gradient_zero(network):
    model = networks.build(lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 3)), seed())
    model.spare = nn.Identity()
    model.spare.weight = nn.Parameter(torch.ones(5))
    model.forward = lambda images: model[1](model[0](images))
    assert gradients(model, tensors.state(model), data())["spare.weight"].equal(torch.zeros(5))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_named(network, value):
    model, values = network

    def poisoned(logits, labels):
        # Infinite only for the head: what flows back into the features is cut.
        return F.cross_entropy(logits, labels) + (logits - logits.detach()).sum() * value

    with pytest.raises(ValueError, match=r"gradient of conv\.weight is not finite"):
        gradients(model, values, data(), loss=poisoned)


def test_gradients_in_float64_stay_in_float64(network):
    model, values = network
    model = networks.build(lambda: Network().double(), seed(1))
    batches = [(images.double(), labels) for images, labels in data()]
    found = gradients(model, {k: v.double() if v.is_floating_point() else v for k, v in values.items()}, batches)
    assert all(gradient.dtype == torch.float64 for gradient in found.values())


# --- BatchNorm


def test_statistics_are_the_plain_average_over_the_first_batches(network):
    model, values = network
    found = reset_batchnorm(model, values, iter(data(5)), limit=3)
    hidden = [F.conv2d(images, values["conv.weight"], values["conv.bias"], padding=1) for images, _ in data(3)]
    mean = torch.stack([h.mean((0, 2, 3)) for h in hidden]).mean(0)
    variance = torch.stack([h.var((0, 2, 3)) for h in hidden]).mean(0)
    assert torch.allclose(found["norm.running_mean"], mean, atol=1e-5)
    assert torch.allclose(found["norm.running_var"], variance, rtol=1e-4)
    assert found["norm.num_batches_tracked"] == 3
    assert all(found[name] is values[name] for name in values if not name.startswith(("norm.r", "norm.n")))
    with pytest.raises(ValueError, match="limit must be"):
        reset_batchnorm(model, values, data(), limit=0)


def test_statistics_are_estimated_with_dropout_off():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2)).train()
    images = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    result = reset_batchnorm(model, tensors.state(model), [(images, torch.tensor([0, 1]))])
    assert result["1.running_mean"].tolist() == [2.0, 3.0] and result["1.running_var"].tolist() == [2.0, 2.0]


def test_resetting_makes_up_for_wrong_statistics(network):
    model, values = network
    wrong = values | {"norm.running_var": values["norm.running_var"] * 1e6}
    right, again = (reset_batchnorm(model, v, data()) for v in (values, wrong))
    assert torch.equal(right["norm.running_var"], again["norm.running_var"])


def test_without_batchnorm_nothing_is_read(network):
    def unread():
        raise AssertionError("a batch was read")
        yield

    model = networks.build(lambda: networks.mlp([4, 3, 2]), seed())
    values = tensors.state(model)
    assert reset_batchnorm(model, values, unread()) == values


# --- landscapes


class Bowl(nn.Module):
    """Two weights; the loss below is a bowl around (3, 1)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, images):
        return self.w.expand(len(images), 2)


def bowl(logits, labels):
    return ((logits - torch.tensor([3.0, 1.0])) ** 2).sum(1).mean()


def at(x, y):
    return {"w": torch.tensor([x, y])}


POINT = [(torch.zeros(1, 1), torch.tensor([0]))]


def test_a_line_has_its_ends_and_its_barrier(network):
    line = interpolate(Bowl(), at(0.0, 1.0), at(4.0, 1.0), POINT, 5, loss=bowl)
    assert line.points.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert line.loss.tolist() == pytest.approx([9, 4, 1, 0, 1])
    assert line.accuracy.tolist() == [0, 1, 1, 1, 1]
    assert line.barrier == 0
    hill = interpolate(Bowl(), at(0.0, 1.0), at(4.0, 1.0), POINT, loss=lambda a, b: 10 - bowl(a, b))
    # At place p the hill is 10 - (4p - 3)^2 high and the straight line 1 + 8p: they differ by 16p(1 - p).
    assert hill.barrier == pytest.approx(4, abs=1e-5)
    assert interpolate(Bowl(), at(0.0, 1.0), at(4.0, 1.0), POINT, [0.5], loss=bowl).loss.tolist() == [1]
    with pytest.raises(ValueError, match="points must be a whole number from 2"):
        interpolate(Bowl(), at(0.0, 1.0), at(4.0, 1.0), POINT, 1)


def test_a_line_can_have_its_statistics_estimated_anew(network, reference):
    model, values = network
    other = tensors.state(model)
    line = interpolate(model, values, other, data(), [0.0, 0.5, 1.0], statistics=data())
    middle = {name: (value + other[name]) / 2 if value.is_floating_point() else value for name, value in values.items()}
    expected = loss_and_accuracy(model, reset_batchnorm(model, middle, data()), data())
    assert (float(line.loss[1]), float(line.accuracy[1])) == pytest.approx(expected, rel=1e-5)
    plain = interpolate(model, values, other, data(), [0.0, 0.5, 1.0])
    assert float(plain.loss[1]) == pytest.approx(loss_and_accuracy(model, middle, data())[0], rel=1e-5)
    assert float(plain.loss[1]) != pytest.approx(float(line.loss[1]), rel=1e-5)


def test_a_plane_holds_its_three_corners(network):
    a, b, c = at(1.0, 1.0), at(4.0, 5.0), at(5.0, -1.0)
    found = plane(Bowl(), a, b, c, POINT, 7, margin=0.25, loss=bowl)
    assert found.corners[1].tolist() == pytest.approx([5, 0])
    assert found.loss.shape == found.accuracy.shape == (7, 7)
    assert float(found.x[0]) == pytest.approx(-1.25) and float(found.x[-1]) == pytest.approx(6.25)
    # Distances are those of parameter space: the corner c, and the bowl's value at every grid point.
    assert float(found.corners[2].norm()) == pytest.approx(math.hypot(4, 2))
    u, v = torch.tensor([3.0, 4.0]) / 5, torch.tensor([4.0, -3.0]) / 5
    for row, y in enumerate(found.y.tolist()):
        for column, x in enumerate(found.x.tolist()):
            place = torch.tensor([1.0, 1.0]) + x * u + y * v
            assert float(found.loss[row, column]) == pytest.approx(float(bowl(place[None], None)), rel=1e-4)


def test_three_points_on_a_line_span_no_plane(network):
    for middle in (1.0, 0.0):
        with pytest.raises(ValueError, match="one line"):
            plane(Bowl(), at(0.0, 0.0), at(middle, middle), at(2.0, 2.0), POINT)


def test_call_runs_the_given_values(network, reference):
    model, values = network
    reference.eval()
    model.eval()
    found = call(model, values, data()[0][0])
    model.train()
    model.drop.eval()
    assert torch.allclose(found, reference(data()[0][0]), atol=1e-6)


def test_evaluation_mode_is_for_all_modules_unless_heads_are_asked_for(network):
    model, _ = network
    before = {name: module.training for name, module in model.named_modules()}
    with guard.evaluating(model):
        assert not any(module.training for module in model.modules())
    with guard.evaluating(model, heads=True):
        assert [name for name, module in model.named_modules() if module.training] == [""]
    assert {name: module.training for name, module in model.named_modules()} == before
