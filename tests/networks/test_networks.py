"""The networks' shapes and sizes, and initial values that come from a generator alone."""

import pytest
import torch
from torch import nn

import regraft
from regraft.core import tensors
from regraft.networks import papers as networks


def seed(number=0):
    return torch.Generator().manual_seed(number)


NETWORKS = {
    "mlp": (lambda: networks.mlp([64, 32, 10]), (1, 8, 8)),
    "mlp-no-bias": (lambda: networks.mlp([64, 32, 32, 10], bias=False), (1, 8, 8)),
    "small_cnn": (networks.small_cnn, (3, 32, 32)),
    "digits_conv": (networks.digits_conv, (1, 8, 8)),
    "conv8": (lambda: networks.conv8(10, 0.125), (3, 32, 32)),
    "conv6": (lambda: networks.conv6(10, 0.25), (3, 16, 16)),
    "conv6-24": (lambda: networks.conv6(10, 0.25, 1, 24), (1, 24, 24)),
    "vit": (lambda: networks.vit(10, size=16, width=16, depth=2), (3, 16, 16)),
    "cifar_resnet18": (lambda: networks.cifar_resnet18(10, 0.125), (3, 32, 32)),
    "residual8": (lambda: networks.residual8(10, 3, 0.125), (3, 32, 32)),
}
every_network = pytest.mark.parametrize("factory, shape", NETWORKS.values(), ids=NETWORKS.keys())


@every_network
def test_networks_classify_and_export(factory, shape):
    model = networks.build(factory, seed()).eval()
    images = torch.randn(2, *shape, generator=seed())
    logits = model(images)
    assert logits.shape == (2, 10)
    exported = torch.export.export(model, (images,)).module()
    assert torch.allclose(exported(images), logits, atol=1e-5)


@pytest.mark.parametrize(
    "model, parameters",
    [
        # The papers' tables, counted by hand: weights and biases.
        (lambda: networks.mlp([784, 4096, 10]), 784 * 4096 + 4096 + 4096 * 10 + 10),
        (lambda: networks.mlp([784, 4096, 10], bias=False), 784 * 4096 + 4096 * 10),
        (
            networks.conv8,
            9 * (3 * 64 + 64 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 512 * 512)
            + 2 * (64 + 128 + 256 + 512)
            + (512 * 256 + 256)
            + (256 * 256 + 256)
            + (256 * 10 + 10),
        ),
        (
            networks.small_cnn,
            (25 * 3 * 6 + 6) + (25 * 6 * 16 + 16) + (400 * 120 + 120) + (120 * 84 + 84) + (84 * 10 + 10),
        ),
        (
            networks.conv6,
            9 * (3 * 64 + 64 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 256 * 256)
            + 2 * (64 + 128 + 256)
            + (4 * 256 * 256 + 256)
            + (256 * 10 + 10),
        ),
        (networks.cifar_resnet18, 11_173_962),  # as in the public CIFAR ResNet-18s
    ],
)
def test_networks_have_the_published_number_of_parameters(model, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in model().parameters()) == parameters


def test_a_quarter_of_the_width_is_a_quarter_of_every_layer():
    full, narrow = (dict(networks.conv8(10, width).named_parameters()) for width in (1.0, 0.25))
    for name in full:
        expected = list(full[name].shape)
        expected[0] //= 1 if expected[0] == 10 else 4
        if len(expected) > 1 and expected[1] != 3:
            expected[1] //= 4
        assert list(narrow[name].shape) == expected
    with pytest.raises(ValueError, match="width"):
        networks.conv8(10, 0)


def test_residual8_has_its_two_shortcuts():
    """With blocks 4 and 8 silenced, what they would add to still comes through."""
    model = networks.residual8(10, 3, 0.125).eval()
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
        networks.mlp([10])


@every_network
def test_initial_values_come_from_the_generator_alone(factory, shape):
    model = networks.build(factory, seed(1))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = networks.initialise(model, seed(2))
    built = tensors.state(networks.build(factory, seed(2)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = networks.initialise(model, seed(2))
    other = networks.initialise(model, seed(3))
    assert first.keys() == built.keys() == tensors.live_state(model).keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        assert tensor.shape == built[name].shape
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert any(not torch.equal(first[name], tensors.live_state(model)[name]) for name in first)


def test_generators_advance_so_that_two_networks_differ():
    generator = seed()
    first, second = (tensors.state(networks.build(NETWORKS["mlp"][0], generator)) for _ in range(2))
    assert not torch.equal(first["layers.0.weight"], second["layers.0.weight"])


@every_network
def test_every_layer_gets_pytorchs_default(factory, shape):
    """Weights and biases of convolutions and linear layers are uniform in +- 1 / sqrt(fan_in)."""
    model = networks.build(factory, seed())
    for values in (tensors.state(model), networks.initialise(model, seed(1))):
        for name, module in model.named_modules():
            if type(module) not in (nn.Conv2d, nn.Linear):
                continue
            bound = module.weight[0].numel() ** -0.5
            weight = values[f"{name}.weight"]
            assert weight.abs().max() <= bound, name
            if weight.numel() > 1000:
                assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.1), name
            if module.bias is not None:
                assert 0 < values[f"{name}.bias"].abs().max() <= bound, name


def test_conv8_has_eight_convolutions():
    convolutions = [m for m in networks.conv8().modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [64, 64, 128, 128, 256, 256, 512, 512]


@every_network
def test_networks_are_traced_and_verified(factory, shape):
    model = networks.build(factory, seed()).eval()
    images = torch.randn(2, *shape, generator=seed())
    spec = regraft.trace(model, images)
    regraft.verify(spec, model, images)
    moved = {name for name, axes in spec.axes.items() if any(axes)}
    assert moved >= {name for name, p in model.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize("make", [lambda: networks.vit(size=30, patch=4), lambda: networks.vit(width=30, heads=4)])
def test_a_transformer_that_cannot_be_is_refused(make):
    with pytest.raises(ValueError, match="must be a multiple"):
        make()


def test_conv6_needs_eight_pixels():
    with pytest.raises(ValueError, match="at least 8 pixels"):
        networks.conv6(size=7)


def test_initialise_resets_running_statistics_and_keeps_the_model():
    model = networks.residual8(10, 3, 0.125)
    model(torch.randn(4, 3, 32, 32))
    kept = tensors.state(model)
    values = networks.initialise(model, seed())
    assert values["blocks.0.1.running_mean"].eq(0).all() and values["blocks.0.1.num_batches_tracked"] == 0
    for name, tensor in tensors.live_state(model).items():
        assert torch.equal(tensor, kept[name])


def test_a_parameter_that_cannot_be_reset_is_named():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.scale = nn.Parameter(torch.ones(2))

    with pytest.raises(ValueError, match=r"'body\.scale'.*build"):
        networks.initialise(nn.ModuleDict({"body": Scaled()}), seed())


def test_state_is_a_copy():
    model = networks.mlp([4, 3, 2])
    values = tensors.state(model)
    values["layers.0.weight"].zero_()
    assert model.layers[0].weight.any() and not values["layers.0.weight"].requires_grad
