"""The tracer on whole networks, each proved: the papers', random ones, and torchvision's families (`make test-models`
runs all of its models)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import proved, share
from torch import Tensor, nn

from regraft.networks import papers as networks
from regraft.symmetry import PermutationSpec, trace


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- the project's networks


@pytest.mark.parametrize("bias", [True, False])
def test_an_mlp(bias):
    spec = proved(networks.mlp([6, 8, 8, 3], bias=bias), 2, 6)
    assert sorted(spec.groups.values()) == [8, 8]
    weights = [axes for name, axes in spec.axes.items() if name.endswith("weight")]
    hand = PermutationSpec.build({"a": 8, "b": 8}, {"1": ["a", 6], "2": ["b", "a"], "3": [3, "b"]})
    names = dict(zip(spec.groups, "ab", strict=True))
    renamed = [tuple(tuple(s._replace(group=names.get(s.group)) for s in axis) for axis in axes) for axes in weights]
    assert renamed == list(hand.axes.values())
    assert len(spec.axes) == (6 if bias else 3)


@pytest.mark.parametrize(
    ("model", "shape", "groups"),
    [
        (lambda: networks.small_cnn(), (1, 3, 32, 32), None),
        (lambda: networks.digits_conv(), (2, 1, 8, 8), None),
        (lambda: networks.conv8(width=0.125), (1, 3, 32, 32), [8, 8, 16, 16, 32, 32, 32, 32, 64, 64]),
        (
            lambda: networks.cifar_resnet18(width=0.125),
            (1, 3, 16, 16),
            [8] * 3 + [16] * 3 + [32] * 3 + [64] * 3,
        ),
        (lambda: networks.residual8(width=0.0625), (1, 3, 16, 16), None),
    ],
    ids=["small_cnn", "digits_conv", "conv8", "cifar_resnet18", "residual8"],
)
def test_the_papers_networks(model, shape, groups):
    model = model()
    spec = proved(model, *shape)
    if groups is not None:
        assert sorted(spec.groups.values()) == groups
    assert share(spec, model) > 0.98


def test_names_follow_the_parameters_that_make_the_units():
    spec = proved(networks.cifar_resnet18(width=0.0625), 1, 3, 16, 16)
    assert next(iter(spec.groups)) == "conv1"
    assert all(name.endswith(("conv1", "conv2")) for name in spec.groups)
    again = trace(networks.cifar_resnet18(width=0.0625), torch.rand(2, 3, 16, 16))
    assert again == spec
    assert list(again.groups) == list(spec.groups)


# ---- random architectures


@st.composite
def architectures(draw: st.DrawFn) -> list[tuple[str, int]]:
    kinds = ["conv", "norm", "relu", "residual", "dense", "depthwise", "shuffle", "pool", "gate"]
    return draw(st.lists(st.tuples(st.sampled_from(kinds), st.integers(0, 3)), min_size=1, max_size=6))


ACTIVATIONS = (F.relu, F.gelu, torch.tanh, F.silu)
SHUFFLES = (
    lambda x: F.channel_shuffle(x, 2),
    lambda x: x.flip(1),
    lambda x: x.roll(1, 1),
    lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
)
POOLS = (
    lambda x: F.avg_pool2d(x, 3, 1, 1),
    lambda x: F.max_pool2d(x, 3, 1, 1),
    lambda x: x.transpose(2, 3),
    lambda x: x.flip(2),
)


class Random(nn.Module):
    """Channels-first blocks on a 4x4 image; each kind with a variant."""

    def __init__(self, blocks: list[tuple[str, int]]) -> None:
        super().__init__()
        self.blocks, count = blocks, 4
        self.stem, self.layers = nn.Conv2d(2, 4, 1), nn.ModuleList()
        for kind, variant in blocks:
            layer: nn.Module = nn.Identity()
            if kind == "conv":
                layer = nn.Conv2d(count, 4 + 2 * variant, 3, padding=1, groups=2 if variant % 2 else 1)
                count = 4 + 2 * variant
            elif kind == "norm":
                layer = (
                    nn.BatchNorm2d(count),
                    nn.GroupNorm(2, count),
                    nn.InstanceNorm2d(count, affine=True),
                )[variant % 3]
            elif kind in ("residual", "gate"):
                layer = nn.Conv2d(count, count, 1, bias=variant > 1)
            elif kind == "depthwise":
                layer = nn.Conv2d(count, count, 3, padding=1, groups=count)
            elif kind == "dense":
                layer, count = nn.Conv2d(count, 2, 1), count + 2
            self.layers.append(layer)
        self.out = nn.Linear(count * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for (kind, variant), layer in zip(self.blocks, self.layers, strict=True):
            if kind in ("conv", "norm", "depthwise"):
                x = layer(x)
            elif kind == "residual":
                x = x + layer(x)
            elif kind == "gate":
                x = x * layer(x.mean((2, 3), keepdim=True)).sigmoid()
            elif kind == "dense":
                x = torch.cat([x, layer(x)] if variant % 2 else [layer(x), x], 1)
            else:
                x = {"relu": ACTIVATIONS, "shuffle": SHUFFLES, "pool": POOLS}[kind][variant](x)
        return self.out(x.flatten(1))


@given(architectures())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_random_architectures_compute_the_same_function(blocks):
    proved(Random(blocks), 1, 2, 4, 4)


# ---- torchvision's families, by their smallest member or a narrow one


def narrow(model: nn.Module, features: int) -> nn.Module:
    """A classifier with 16 hidden units instead of two times 4096."""
    model.classifier = nn.Sequential(nn.Linear(features, 16), nn.ReLU(True), nn.Linear(16, 10))
    return model


def swin(**version: object) -> nn.Module:
    sizes = {
        "patch_size": [4, 4],
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": [4, 4],
    }
    return zoo.SwinTransformer(**sizes, **version, num_classes=10)


def convnext() -> nn.Module:
    stages = [(16, 32, 2), (32, 48, 1), (48, None, 1)]
    return zoo.ConvNeXt([zoo.convnext.CNBlockConfig(*stage) for stage in stages], num_classes=10)


FAMILIES = {
    "alexnet": (lambda: narrow(zoo.alexnet(), 256 * 36), 64, 0.99),
    "vgg11_bn": (lambda: narrow(zoo.vgg11_bn(init_weights=False), 512 * 49), 32, 0.99),
    "resnet18": (lambda: zoo.resnet18(num_classes=10), 32, 0.99),
    "squeezenet1_1": (lambda: zoo.squeezenet1_1(num_classes=10), 32, 0.99),
    "shufflenet_v2_x0_5": (lambda: zoo.shufflenet_v2_x0_5(num_classes=10), 32, 0.98),
    "mobilenet_v2": (lambda: zoo.mobilenet_v2(num_classes=10, width_mult=0.25), 32, 0.99),
    "mobilenet_v3_small": (lambda: zoo.mobilenet_v3_small(num_classes=10), 32, 0.99),
    "mnasnet0_5": (lambda: zoo.mnasnet0_5(num_classes=10), 32, 0.99),
    "regnet_x_400mf": (lambda: zoo.regnet_x_400mf(num_classes=10), 32, 0.99),
    "efficientnet_b0": (lambda: zoo.efficientnet_b0(num_classes=10), 32, 0.99),
    "densenet": (lambda: zoo.DenseNet(8, (2, 2, 2, 2), 16, num_classes=10), 32, 0.99),
    "googlenet": (lambda: zoo.googlenet(num_classes=10, init_weights=False), 64, 0.99),
    "inception_v3": (
        lambda: zoo.inception_v3(num_classes=10, init_weights=False, aux_logits=False),
        75,
        0.99,
    ),
    "convnext": (convnext, 32, 0.99),
    "vision_transformer": (
        lambda: zoo.VisionTransformer(32, 16, 2, 4, hidden_dim=32, mlp_dim=64, num_classes=10),
        32,
        0.98,
    ),
    "swin": (swin, 32, 0.98),
    "swin_v2": (lambda: swin(**V2), 32, 0.99),
    "maxvit": (lambda: zoo.MaxVit((32, 32), 16, 4, [16, 32], [1, 1], 8, 0.2, num_classes=10), 32, 0.95),
}
V2 = {
    "block": zoo.swin_transformer.SwinTransformerBlockV2,
    "downsample_layer": zoo.swin_transformer.PatchMergingV2,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_torchvision(family):
    make, size, at_least = FAMILIES[family]
    model = make()
    spec = proved(model, 1, 3, size, size, draws=1)
    assert share(spec, model) >= at_least
