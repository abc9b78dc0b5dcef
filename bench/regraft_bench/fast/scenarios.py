"""The experiments of the FAST paper (Varno et al., sections 6.2 to 6.7) as frozen data, in two sizes.

Those whose names end in ``-paper`` have the paper's models (torchvision's weights), data, batches and rates, and want
a GPU. The others are made for two cores: small networks of the same families, pre-trained by us on CIFAR-10,
Fashion-MNIST or the digits 0 to 4, and shorter runs. All rates are those of torch's form of momentum (V <- M V +
step): the paper's own form, ``(1 - M) step``, moves a tenth as far at the same rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from regraft.data import CIFAR100_FUSION, CIFAR100_TRANSFER, DIGITS_HIGH, DIGITS_LOW
from regraft.finetuning.fast import Normal
from regraft.finetuning.phases import adam, nesterov, radam
from regraft.networks.papers import Torchvision, digits_conv
from regraft.training.loop import Recipe
from regraft_bench.fast import networks
from regraft_bench.fast.methods import (
    COMPARISON_METHODS,
    FAN_IN,
    FAN_OUT,
    FIXED,
    PRETRAINED,
    DrawHead,
    FineTuning,
    at_each,
    at_rates,
    best_of,
    warm_up,
    warm_up_with_statistics,
)
from regraft_bench.fast.setting import FastSettings, Origin
from regraft_bench.study import Method, Scenario, Task

_task = partial(Task, validation=0.05)  # section 6.2.1: five percent, stratified

# ---------------------------------------------------------------- data and source networks

CIFAR10, CIFAR10_SMALL = _task("cifar10"), _task("cifar10", size=16)
CIFAR100_TEN, CIFAR100_TEN_SMALL = _task("cifar100", CIFAR100_FUSION), _task("cifar100", CIFAR100_FUSION, 16)
CIFAR100_TEN_LARGE = _task("cifar100", CIFAR100_FUSION, 64)
CIFAR100_OTHER_SMALL = _task("cifar100", CIFAR100_TRANSFER, 16)
FASHION, MNIST, MNIST_SMALL = _task("fashion-mnist"), _task("mnist"), _task("mnist", size=16, channels=3)
FASHION_SMALL, MNIST_GREY, DIGITS_GREY = (_task(d, size=14) for d in ("fashion-mnist", "mnist", "digits"))
LOW, HIGH = _task("digits", DIGITS_LOW), _task("digits", DIGITS_HIGH)

SOURCE_RECIPE = Recipe(epochs=4, lr=0.1, weight_decay=5e-4, batch_size=100, nesterov=True)

CONV3 = Origin(networks.conv3, CIFAR10, SOURCE_RECIPE)
CONV3_SMALL = Origin(networks.conv3, CIFAR10_SMALL, replace(SOURCE_RECIPE, epochs=12))
RESNET, DENSENET, RESNEXT = (
    Origin(network, FASHION_SMALL, replace(SOURCE_RECIPE, epochs=2))
    for network in (networks.small_resnet, networks.small_densenet, networks.small_resnext)
)
VGG = Origin(networks.small_vgg, FASHION_SMALL, replace(SOURCE_RECIPE, lr=0.03, epochs=3))
FASHION_CONV3 = Origin(networks.grey_conv3, FASHION, replace(SOURCE_RECIPE, epochs=2))
EFFICIENTNET = Origin(networks.efficientnet_lite0, None, None, "imagenet")
DIGITS_CONV = Origin(digits_conv, LOW, Recipe(epochs=30, lr=0.05, batch_size=50))

# ---------------------------------------------------------------- FAST beside every baseline

_digits = FastSettings(DIGITS_CONV, HIGH, steps=89, batch_size=50)
_imagenet = FastSettings(EFFICIENTNET, CIFAR100_TEN_LARGE, steps=89, batch_size=50, flip=True, target_images=250)

COMPARISON = (
    Scenario("digits", COMPARISON_METHODS, _digits, seeds=5),
    Scenario(
        "fashion-mnist",
        COMPARISON_METHODS,
        FastSettings(FASHION_CONV3, MNIST, steps=89, source_images=1000, target_images=1000),
        seeds=5,
    ),
    Scenario(
        "cifar10-cifar100",
        COMPARISON_METHODS,
        FastSettings(CONV3, CIFAR100_TEN, steps=200, source_images=2000),
        seeds=5,
    ),
    Scenario(  # ten other classes, at half the resolution
        "cifar10-cifar100-other",
        COMPARISON_METHODS,
        FastSettings(CONV3_SMALL, CIFAR100_OTHER_SMALL, steps=200, source_images=2000),
        seeds=5,
    ),
    # a deeper network with the features of ImageNet, as in the paper; what it forgets of that is not measured
    Scenario("imagenet-cifar100", PRETRAINED, _imagenet, seeds=5),
)
QUICK_DIGITS = Scenario("digits-fixed", FIXED, _digits, seeds=2)
QUICK_BATCHNORM = Scenario(  # a network that computes otherwise in training mode than in evaluation mode
    "digits-fixed-batchnorm",
    tuple(method for method in FIXED if method.name in ("plain", "fast")),
    replace(_digits, origin=Origin(networks.grey_conv3, LOW, replace(SOURCE_RECIPE, batch_size=50)), steps=21),
    seeds=2,
)

# ---------------------------------------------------------------- the arms of the paper's experiments

_TINY = DrawHead(Normal(1e-8))


def _scales(rate: float) -> tuple[Method, ...]:
    """Section 6.2: equal rates, heads from N(0, 1) down to zero."""
    return tuple(
        at_rates(f"N(0, {std:g}²)", rate, rate, prepare=DrawHead(Normal(std))) for std in (1.0, 0.1, 0.01, 1e-4, 1e-8)
    )


def _frozen(rate: float) -> tuple[Method, ...]:
    """Section 6.3: a random head that stays as it is, and one that learns."""
    drawn = DrawHead(Normal(0.01))
    return at_rates("alpha = 0", None, rate, prepare=drawn), at_rates("alpha = beta", rate, rate, prepare=drawn)


def _warm_ups(rate: float) -> tuple[Method, ...]:
    """Section 6.4."""
    return (
        at_rates("fan-out", rate, rate, plan=warm_up, prepare=FAN_OUT),
        at_rates("fan-in", rate, rate, plan=warm_up, prepare=FAN_IN),
        at_rates("fan-in, statistics", rate, rate, plan=warm_up_with_statistics, prepare=FAN_IN),
        at_rates("N(0, 1e-08²), statistics", rate, rate, plan=warm_up_with_statistics, prepare=_TINY),
        at_rates("no warm-up: N(0, 1e-08²)", rate, rate, prepare=_TINY),
    )


def _unequal(c: float) -> tuple[Method, ...]:
    """Section 6.5: a tiny random head; both rates scaled, or one of them."""
    pairs = {
        "c, c": (c, c),
        "c/10, c/10": (c / 10, c / 10),
        "10c, 10c": (10 * c, 10 * c),
        "c, c/10": (c, c / 10),
        "10c, c": (10 * c, c),
        "c, 10c": (c, 10 * c),
    }
    return tuple(at_rates(name, *rates, prepare=_TINY) for name, rates in pairs.items())


def _baselines(name: str, rates: Sequence[float], **how: Any) -> tuple[Method, ...]:
    """A head drawn by fan-in, head and features at the same rate: a method for each rate, which its name ends in."""
    return tuple(at_rates(f"{name} {rate:g}", rate, rate, prepare=FAN_IN, **how) for rate in rates)


def _around(alpha: float, beta: float, **how: Any) -> list[FineTuning]:
    """FAST's five trials: both rates, and each of them three times larger and smaller."""
    pairs = [(alpha, beta), (alpha / 3, beta), (alpha * 3, beta), (alpha, beta / 3), (alpha, beta * 3)]
    return at_each([(float(f"{a:.4g}"), float(f"{b:.4g}")) for a, b in pairs], **how)


def _optimisers(baselines: Mapping[str, Sequence[float]], runs: Mapping[str, list[FineTuning]]) -> tuple[Method, ...]:
    """Section 6.6, for each optimiser: fan-in baselines at several rates, and FAST at the best of its runs."""
    methods: list[Method] = []
    for name, trials in runs.items():
        methods += _baselines(f"{name}: fan-in", baselines.get(name, ()), optimiser=trials[0].optimiser)
        methods.append(best_of(f"{name}: fast", trials))
    return tuple(methods)


OPTIMISERS = _optimisers(
    {
        "sgd": (0.01, 0.03, 0.1, 0.3, 1.0),
        "adam": (1e-3, 3e-3, 0.01, 0.03, 0.1),
        "radam": (3e-3, 0.01, 0.03, 0.1, 0.3),
    },
    {
        "sgd": _around(0.6, 0.03),
        "nesterov": _around(0.3, 0.03, optimiser=nesterov),
        "adam": _around(0.03, 0.003, optimiser=adam),
        "radam": _around(0.1, 0.01, optimiser=radam),
    },
)
# The plots that state the paper's rates are not in the text; these are ours.
OPTIMISERS_PAPER = _optimisers(
    {"sgd": (0.005, 0.01, 0.05), "adam": (1e-4, 5e-4, 1e-3), "radam": (1e-4, 5e-4, 1e-3)},
    {
        "sgd": at_each([(0.05, 0.005)]),
        "nesterov": at_each([(0.05, 0.005)], optimiser=nesterov),
        "adam": at_each([(1e-3, 1e-4)], optimiser=adam),
        "radam": at_each([(1e-3, 1e-4)], optimiser=radam),
    },
)


def _convergence(alpha: float, beta: float) -> tuple[Method, ...]:
    """Section 6.7: five baselines and FAST at the best of five pairs of rates around these."""
    return (*_baselines("baseline", (0.2, 0.1, 0.05, 0.01, 0.005)), best_of("fast", _around(alpha, beta)))


# ---------------------------------------------------------------- the paper's experiments, for two cores

_same = FastSettings(CONV3_SMALL, CIFAR10_SMALL, 144, flip=True, source_images=1000, target_images=1000)
_grey = FastSettings(RESNET, MNIST_GREY, 144, source_images=1000, target_images=1000)
_long = replace(_grey, origin=RESNEXT, steps=987, batch_size=10)
_ten = replace(_same, target=CIFAR100_TEN_SMALL)
_vgg, _densenet = replace(_grey, origin=VGG), replace(_grey, origin=DENSENET)


TWO_CORES = (
    Scenario("initial-same", _scales(0.02), _same, seeds=5),
    Scenario("initial-other", _scales(0.02), replace(_same, target=MNIST_SMALL), seeds=5),
    Scenario("frozen-head", _frozen(0.03), _ten, seeds=5),
    Scenario("warm-up", _warm_ups(0.03), _ten, seeds=5),
    Scenario("rates-resnet", _unequal(0.03), _grey, seeds=5),
    Scenario("rates-vgg", _unequal(0.01), _vgg, seeds=5),
    Scenario("optimisers-densenet", OPTIMISERS, _densenet, seeds=5),
    Scenario("optimisers-vgg", OPTIMISERS, _vgg, seeds=5),
    Scenario("convergence-mnist", _convergence(0.3, 0.01), _long, seeds=5),
    Scenario("convergence-digits", _convergence(0.1, 0.01), replace(_long, target=DIGITS_GREY), seeds=5),
)  # fmt: skip

# ---------------------------------------------------------------- the paper's own: 128x128 pixels, 15 seeds

_cifar100, _mnist, _caltech = (
    _task("cifar100", size=128),
    _task("mnist", size=128, channels=3),
    _task("caltech256", size=148),
)
_resnet18, _vgg19, _densenet201, _resnext101 = (
    Origin(Torchvision(name), None, None, "IMAGENET1K_V1")
    for name in ("resnet18", "vgg19", "densenet201", "resnext101_32x8d")
)
# Section 6.2.1: CIFAR-100 for 120 epochs, from ImageNet, with a fan-in head.
_resnet18_cifar100 = Origin(
    Torchvision("resnet18"),
    _cifar100,
    Recipe(epochs=120, lr=0.01, batch_size=100, schedule="constant"),
    "IMAGENET1K_V1",
)
_same_paper = FastSettings(_resnet18_cifar100, _cifar100, steps=1000, flip=True)
_resnet_paper = replace(_same_paper, origin=_resnet18)
_vgg_paper, _densenet_paper = (
    replace(_resnet_paper, origin=_vgg19),
    replace(_resnet_paper, origin=_densenet201),
)
# 250 and 330 epochs with one image a class in every batch; FAST's rates are not in the text.
_cifar100_paper = replace(_resnet_paper, origin=_resnext101, steps=250 * 475)
_caltech_paper = replace(_cifar100_paper, target=_caltech, batch_size=256, steps=330 * 91)
_convergence_paper = (*_baselines("baseline", (0.05, 0.01, 0.005)), at_rates("fast", 0.01, 0.001))

PAPER = (
    Scenario("initial-same-paper", _scales(0.01), _same_paper, seeds=15),
    Scenario("initial-other-paper", _scales(0.01), replace(_same_paper, target=_mnist), seeds=15),
    Scenario("frozen-head-paper", _frozen(0.01), _resnet_paper, seeds=15),
    Scenario("warm-up-paper", _warm_ups(0.01), _resnet_paper, seeds=15),
    Scenario("rates-resnet-paper", _unequal(0.01), _resnet_paper, seeds=15),
    Scenario("rates-vgg-paper", _unequal(0.05), _vgg_paper, seeds=15),
    Scenario("optimisers-densenet-paper", OPTIMISERS_PAPER, _densenet_paper, seeds=15),
    Scenario("optimisers-vgg-paper", OPTIMISERS_PAPER, _vgg_paper, seeds=15),
    Scenario("convergence-cifar100-paper", _convergence_paper, _cifar100_paper, seeds=15),
    Scenario("convergence-caltech-paper", _convergence_paper, _caltech_paper, seeds=15),
)

FAST_SCENARIOS = (QUICK_DIGITS, QUICK_BATCHNORM, *COMPARISON, *TWO_CORES, *PAPER)
