"""The networks' shapes and sizes, and initial values that come from a generator alone."""

import pytest
import torch
from torch import nn

from regraft import models


def seed(number=0):
    return torch.Generator().manual_seed(number)


NETWORKS = {
    "mlp": (lambda: models.mlp([64, 32, 10]), (1, 8, 8)),
    "mlp-no-bias": (lambda: models.mlp([64, 32, 32, 10], bias=False), (1, 8, 8)),
    "lenet": (models.lenet, (1, 28, 28)),
    "small_cnn": (models.small_cnn, (3, 32, 32)),
    "digits_conv": (models.digits_conv, (1, 8, 8)),
    "conv8": (lambda: models.conv8(10, 0.125), (3, 32, 32)),
    "cifar_resnet18": (lambda: models.cifar_resnet18(10, 0.125), (3, 32, 32)),
    "residual8": (lambda: models.residual8(10, 3, 0.125), (3, 32, 32)),
}
every_network = pytest.mark.parametrize("factory, shape", NETWORKS.values(), ids=NETWORKS.keys())


@every_network
def test_networks_classify_and_export(factory, shape):
    model = models.build(factory, seed()).eval()
    images = torch.randn(2, *shape, generator=seed())
    logits = model(images)
    assert logits.shape == (2, 10)
    exported = torch.export.export(model, (images,)).module()
    assert torch.allclose(exported(images), logits, atol=1e-5)


@pytest.mark.parametrize(
    "model, parameters",
    [
        # The papers' tables, counted by hand: weights and biases.
        (lambda: models.mlp([784, 4096, 10]), 784 * 4096 + 4096 + 4096 * 10 + 10),
        (lambda: models.mlp([784, 4096, 10], bias=False), 784 * 4096 + 4096 * 10),
        (
            models.conv8,
            9 * (3 * 64 + 64 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 2 * 512 * 512)
            + 2 * (64 + 128 + 256 + 512)
            + 512
            + (512 * 256 + 256)
            + (256 * 256 + 256)
            + (256 * 10 + 10),
        ),
        (
            models.small_cnn,
            (25 * 3 * 6 + 6) + (25 * 6 * 16 + 16) + (400 * 120 + 120) + (120 * 84 + 84) + (84 * 10 + 10),
        ),
        (models.cifar_resnet18, 11_173_962),  # as in the public CIFAR ResNet-18s
    ],
)
def test_networks_have_the_published_number_of_parameters(model, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in model().parameters()) == parameters


def test_a_quarter_of_the_width_is_a_quarter_of_every_layer():
    full, narrow = (dict(models.conv8(10, width).named_parameters()) for width in (1.0, 0.25))
    for name in full:
        expected = list(full[name].shape)
        expected[0] //= 1 if expected[0] == 10 else 4
        if len(expected) > 1 and expected[1] != 3:
            expected[1] //= 4
        assert list(narrow[name].shape) == expected
    with pytest.raises(ValueError, match="width"):
        models.conv8(10, 0)


def test_residual8_has_its_two_shortcuts():
    """With blocks 4 and 8 silenced, what they would add to still comes through."""
    model = models.residual8(10, 3, 0.125).eval()
    images = torch.randn(2, 3, 32, 32, generator=seed())
    reached = {}
    for block in range(8):
        model.blocks[block].register_forward_hook(lambda _, __, out, b=block: reached.update({b: out}))
    for silent in (3, 7):
        nn.init.zeros_(model.blocks[silent][1].weight)
    logits = model(images)
    assert not reached[3].any() and not reached[7].any()
    pool = torch.nn.functional.max_pool2d
    fifth = model.blocks[4](pool(reached[1], 2))
    sixth = model.blocks[5](pool(fifth, 2))
    assert torch.allclose(logits, model.fc(pool(sixth, 8).flatten(1)), atol=1e-6)


def test_an_mlp_needs_two_sizes():
    with pytest.raises(ValueError, match="sizes"):
        models.mlp([10])


@every_network
def test_initial_values_come_from_the_generator_alone(factory, shape):
    model = models.build(factory, seed(1))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = models.initialise(model, seed(2))
    built = models.state(models.build(factory, seed(2)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = models.initialise(model, seed(2))
    other = models.initialise(model, seed(3))
    assert first.keys() == built.keys() == models.live_state(model).keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        assert tensor.shape == built[name].shape
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert any(not torch.equal(first[name], models.live_state(model)[name]) for name in first)


def test_generators_advance_so_that_two_networks_differ():
    generator = seed()
    first, second = (models.state(models.build(NETWORKS["mlp"][0], generator)) for _ in range(2))
    assert not torch.equal(first["layers.0.weight"], second["layers.0.weight"])


def test_linear_layers_get_pytorchs_default():
    values = models.initialise(models.mlp([400, 500, 10]), seed())
    bound = 1 / 400**0.5
    weight = values["layers.0.weight"]
    assert weight.abs().max() <= bound and float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.02)


def test_conv8_keeps_the_scale_of_its_signal():
    """He et al.: without normalisation, and yet logits depend on the image from the first step."""
    model = models.conv8(10, 0.5)
    images = torch.randn(32, 3, 32, 32, generator=seed())
    for values in (
        models.initialise(model, seed(1)),
        models.state(models.build(lambda: models.conv8(10, 0.5), seed(2))),
    ):
        assert float(values["features.10.weight"].std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
        assert not values["features.10.bias"].any()
        with torch.no_grad():
            assert torch.func.functional_call(model, values, images).std(0).mean() > 0.1


def test_initialise_resets_running_statistics_and_keeps_the_model():
    model = models.residual8(10, 3, 0.125)
    model(torch.randn(4, 3, 32, 32))
    kept = models.state(model)
    values = models.initialise(model, seed())
    assert values["blocks.0.1.running_mean"].eq(0).all() and values["blocks.0.1.num_batches_tracked"] == 0
    for name, tensor in models.live_state(model).items():
        assert torch.equal(tensor, kept[name])


def test_a_parameter_that_cannot_be_reset_is_named():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.scale = nn.Parameter(torch.ones(2))

    with pytest.raises(ValueError, match=r"'body\.scale'.*build"):
        models.initialise(nn.ModuleDict({"body": Scaled()}), seed())


def test_state_is_a_copy():
    model = models.mlp([4, 3, 2])
    values = models.state(model)
    values["layers.0.weight"].zero_()
    assert model.layers[0].weight.any() and not values["layers.0.weight"].requires_grad


def test_a_new_head_replaces_the_last_linear_layer_only():
    model = models.build(NETWORKS["conv8"][0], seed())
    tensors = models.initialise(model, seed(1))
    adopted, values = models.new_head(model, tensors, 5, seed(2))
    name = models.head(model)
    assert name == "classifier.layers.2"
    assert torch.func.functional_call(adopted, values, torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    for key, tensor in values.items():
        if key.startswith(name):
            assert tensor.shape[0] == 5 and tensors[key].shape[0] == 10
        else:
            assert torch.equal(tensor, tensors[key])
    again = models.new_head(model, tensors, 5, seed(2))[1]
    assert torch.equal(again[f"{name}.weight"], values[f"{name}.weight"])


def test_a_model_without_a_linear_layer_has_no_head():
    with pytest.raises(ValueError, match="no linear layer"):
        models.head(nn.Sequential(nn.Conv2d(1, 2, 1)))
