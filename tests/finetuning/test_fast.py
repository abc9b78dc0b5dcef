"""FAST as a drop-in: heads found and replaced, two rates in every optimiser, initial classifiers, batches."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models as tv

from regraft.data import Split
from regraft.finetuning import fast
from regraft.networks import heads


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Own(nn.Module):
    """A user's module: the classifier is registered first and its name says nothing."""

    def __init__(self, classes: int = 7, bias: bool = True) -> None:
        super().__init__()
        self.answer = nn.Linear(8, classes, bias=bias)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())

    def forward(self, images):
        return self.answer(self.body(images))


class Branching(Own):
    """torch.fx cannot trace it."""

    def forward(self, images):
        return super().forward(images if images.sum() > 0 else -images)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, images):
        hidden = self.body(images).relu()
        return self.left(hidden), self.right(hidden)


class TimmStyle(Two):
    """Has several outputs and says itself which one classifies."""

    num_classes = 3

    def get_classifier(self):
        return self.right

    def forward(self, images):
        return self.right(self.body(images).relu()) if self.num_classes else self.left(images)


MODELS = {
    "vit_b_16": ("heads.head", lambda: tv.vit_b_16()),
    "densenet201": ("classifier", lambda: tv.densenet201()),
    "vgg19": ("classifier.6", lambda: tv.vgg19()),
    "resnet18": ("fc", lambda: tv.resnet18()),
    "resnext101_32x8d": ("fc", lambda: tv.resnext101_32x8d()),
    "swin_t": ("head", lambda: tv.swin_t()),
    "mobilenet_v3_small": ("classifier.3", lambda: tv.mobilenet_v3_small()),
    "own": ("answer", Own),
    "branching": ("answer", Branching),
    "timm style": ("right", TimmStyle),
}


@pytest.mark.parametrize("name", MODELS)
def test_adopt_finds_and_replaces_the_head(name):
    expected, make = MODELS[name]
    with torch.device("meta"):
        model = make()
    names = [key for key, _ in model.named_parameters()]
    old = model.get_submodule(expected)
    adopted = fast.adopt(model, 11)
    assert adopted.name == expected
    assert model.get_submodule(expected) is adopted.head
    assert adopted.head.weight.shape == (11, old.in_features)
    assert adopted.head.weight.device.type == "meta"
    assert adopted.source_head.weight.shape == old.weight.shape
    assert not adopted.source_head.weight.requires_grad
    assert [key for key, _ in model.named_parameters()] == names
    assert fast.find_head(model) == expected
    assert getattr(model, "num_classes", 11) in (11, 1000)  # torchvision's note of its constructor stays
    body, head = fast.param_groups(model, head_lr=0.3, body_lr=0.01)
    assert (body["lr"], head["lr"]) == (0.01, 0.3)
    assert {id(p) for p in head["params"]} == {id(p) for p in adopted.head.parameters()}
    assert len(body["params"]) + len(head["params"]) == len(names)


def test_adopted_model_predicts_every_class_equally_and_keeps_the_source_head():
    torch.manual_seed(0)
    model = Own().double().eval()
    before = copy.deepcopy(model)
    images = torch.randn(5, 12, dtype=torch.float64)
    adopted = fast.adopt(model, 4)
    assert torch.equal(model(images), torch.zeros(5, 4, dtype=torch.float64))
    features = fast.features_of(model, adopted.head, images)
    assert torch.equal(adopted.source_head(features), before(images))
    assert not adopted.head.training


def test_adopt_keeps_to_a_head_without_bias_and_leaves_torchs_random_stream_alone():
    model, stream = Own(bias=False), torch.get_rng_state()
    assert fast.adopt(model, 4, initialise=fast.xavier, generator=seeded()).head.bias is None
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tv.squeezenet1_0, "no linear layer"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 3, 1)), r"not linear \(Conv1d\)"),
        (Two, "2 layers that could be its classifier.*left"),
        (tv.googlenet, "3 layers that could be its classifier.*aux1"),
    ],
)
def test_adopt_refuses_what_it_cannot_decide(make, message):
    with torch.device("meta"):
        model = make() if make is not tv.googlenet else make(init_weights=False)
    with pytest.raises(ValueError, match=message):
        fast.adopt(model, 3)


def test_adopt_can_be_told_the_name():
    model = Two()
    adopted = fast.adopt(model, 5, head="left")
    assert model.left is adopted.head
    assert len(fast.param_groups(model, head="left")[1]["params"]) == 2
    assert fast.param_groups(model, head=adopted.head)[1]["params"] == list(adopted.head.parameters())
    with pytest.raises(ValueError, match="no layer 'centre'; the linear layers are body, left, right"):
        fast.adopt(model, 5, head="centre")
    with pytest.raises(ValueError, match="is not linear but a Sequential"):
        fast.adopt(Own(), 5, head="body")
    with pytest.raises(ValueError, match="no part of the model"):
        fast.param_groups(model, head=nn.Linear(6, 5))


def test_adopt_refuses_a_shared_weight_and_no_classes():
    weight, whole = Own(8), Own(8)
    weight.twin, whole.twin = nn.Linear(8, 8), whole.answer
    weight.twin.weight = weight.answer.weight
    for model in (weight, whole):
        with pytest.raises(ValueError, match=r"(twin|answer)\.weight is shared with (answer|twin)\.weight"):
            fast.adopt(model, 3)
    with pytest.raises(ValueError, match="num_classes must be a whole number from 1"):
        fast.adopt(Own(), 0)


@pytest.mark.parametrize("rate", [0, -1, math.nan, math.inf])
@pytest.mark.parametrize("part", ["head_lr", "body_lr"])
def test_a_learning_rate_of_nothing_is_refused(rate, part):
    with pytest.raises(ValueError, match=f"{part} must be positive and finite.*{part}=None"):
        fast.param_groups(Own(), **{part: rate})


def test_groups_without_a_rate_or_a_gradient_are_left_out():
    model = Own()
    assert [group["name"] for group in fast.param_groups(model, body_lr=None)] == ["head"]
    assert [group["name"] for group in fast.param_groups(model, head_lr=None)] == ["body"]
    model.body.requires_grad_(False)
    assert [group["name"] for group in fast.param_groups(model)] == ["head"]
    with pytest.raises(ValueError, match="nothing is left to train"):
        fast.param_groups(model, head_lr=None)


MOMENTUM, OPTIMISERS = {"momentum": 0.9}, torch.optim


@pytest.mark.parametrize(
    ("optimiser", "options"),
    [(OPTIMISERS.SGD, MOMENTUM | more) for more in ({}, {"foreach": True}, {"fused": True}, {"nesterov": True})]
    + [(OPTIMISERS.Adam, more) for more in ({}, {"fused": True})]
    + [(kind, more) for kind in (OPTIMISERS.AdamW, OPTIMISERS.RAdam) for more in ({}, {"foreach": True})],
)
def test_every_optimiser_and_a_scheduler_take_the_groups(optimiser, options):
    torch.manual_seed(0)
    model = Own()
    fast.adopt(model, 3)
    start = copy.deepcopy(model)
    groups = fast.param_groups(model, head_lr=0.02, body_lr=0.001, weight_decay=0.0)
    optimiser = optimiser(groups, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5**step)
    for _ in range(2):
        images, labels = torch.randn(6, 12), torch.tensor([0, 1, 2, 0, 1, 2])
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()
        scheduler.step()
    assert [group["lr"] for group in optimiser.param_groups] == [0.00025, 0.005]
    assert [group["name"] for group in optimiser.param_groups] == ["body", "head"]
    for key, value in model.named_parameters():
        assert not torch.equal(value, start.get_parameter(key)), key


def test_first_step_moves_the_head_only():
    """Section 4.1.4: a zero head sends no gradient back."""
    torch.manual_seed(0)
    model = Own()
    fast.adopt(model, 3)
    start = copy.deepcopy(model)
    optimiser = torch.optim.SGD(fast.param_groups(model), momentum=0.9)
    F.cross_entropy(model(torch.randn(6, 12)), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    optimiser.step()
    assert all(torch.equal(value, start.body.get_parameter(key)) for key, value in model.body.named_parameters())
    assert model.answer.weight.norm() > 0


def test_momentum_from_zero_is_the_papers_form():
    """V <- M V + (1 - M) step, from V = 0; and in that form ten times the rate is torch's own form."""
    torch.manual_seed(0)
    steps = [torch.randn(3) for _ in range(4)]
    ours, plain = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimiser = torch.optim.SGD([ours], lr=0.1, momentum=0.9, dampening=0.9)
    fast.start_momentum_at_zero_(optimiser)
    torch_form = torch.optim.SGD([plain], lr=0.01, momentum=0.9)
    value, velocity = torch.ones(3), torch.zeros(3)
    for gradient in steps:
        ours.grad, plain.grad = gradient.clone(), gradient.clone()
        optimiser.step()
        torch_form.step()
        velocity = 0.9 * velocity + 0.1 * (-0.1 * gradient)
        value = value + velocity
    torch.testing.assert_close(ours.detach(), value)
    torch.testing.assert_close(plain.detach(), value)
    with pytest.raises(ValueError, match="made a step already"):
        fast.start_momentum_at_zero_(optimiser)
    with pytest.raises(ValueError, match="dampening=M"):
        fast.start_momentum_at_zero_(torch_form)


# ---------------------------------------------------------------- initial classifiers


@pytest.mark.parametrize(
    ("initialise", "variance"),
    [
        (fast.kaiming_fan_in, 2 / 400),
        (fast.kaiming_fan_out, 2 / 100),
        (fast.xavier, 2 / 500),
        (heads.torch_default, 1 / 1200),
        (fast.Normal(1.0), 1.0),
        (fast.Normal(1e-8), 1e-16),
        (fast.Normal(0.0), 0.0),
        (fast.zero, 0.0),
    ],
)
def test_initial_classifiers(initialise, variance):
    weight, again = torch.empty(100, 400), torch.empty(100, 400)
    initialise(weight, seeded(1))
    initialise(again, seeded(1))
    assert torch.equal(weight, again)
    assert float(weight.var()) == pytest.approx(variance, rel=0.05)
    assert abs(float(weight.mean())) <= 4 * math.sqrt(variance / weight.numel())


def test_class_means_are_the_rows_of_an_imprinted_head():
    features = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 5.0]])
    means = fast.class_means(features, torch.tensor([1, 1, 0]), 2)
    assert torch.equal(means, torch.tensor([[0.0, 5.0], [2.0, 0.0]]))
    weight = torch.empty(2, 2)
    fast.ClassMeans(means)(weight)
    assert torch.equal(weight, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    with pytest.raises(ValueError, match="class 2 has no example"):
        fast.class_means(features, torch.tensor([1, 1, 0]), 3)
    with pytest.raises(ValueError, match=r"class means \[2, 2\] for a weight \[3, 2\]"):
        fast.ClassMeans(means)(torch.empty(3, 2))


# ---------------------------------------------------------------- batches and the warm-up's end


def split(counts: list[int]) -> Split:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    return Split(torch.arange(len(labels)).float()[:, None, None, None].expand(-1, 1, 2, 2), labels)


def test_stratified_batches_hold_every_class_equally_and_pass_through_all_images():
    batches = iter(fast.Stratified(split([6, 4]), 4, 2, seeded()))
    seen = [next(batches) for _ in range(6)]
    for images, labels in seen:
        assert images.shape == (4, 1, 2, 2)
        assert torch.bincount(labels).tolist() == [2, 2]
    first = torch.cat([images[labels == 0][:, 0, 0, 0] for images, labels in seen])
    second = torch.cat([images[labels == 1][:, 0, 0, 0] for images, labels in seen])
    assert sorted(first[:6].tolist()) == sorted(first[6:].tolist()) == [0, 1, 2, 3, 4, 5]
    assert all(sorted(part.tolist()) == [6, 7, 8, 9] for part in second.split(4))


def test_stratified_batches_shuffle_within_a_class_and_anew_in_each_pass():
    stream = iter(fast.Stratified(split([12]), 12, 1, seeded()))
    first, second = (next(stream)[0][:, 0, 0, 0].tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != sorted(first) and second not in (first, sorted(second))


def test_stratified_batches_repeat_with_their_seed():
    one, other = (next(iter(fast.Stratified(split([9, 9, 9]), 6, 3, seeded(3), flip=True)))[0] for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("counts", "size", "classes", "message"),
    [
        ([3, 3], 3, 2, "must be a multiple of 2, not 3"),
        ([3, 3], 0, 2, "must be a multiple of 2, not 0"),
        ([3, 3], 3, 3, r"none of \[2\]"),
        ([3, 0, 3], 3, 3, r"none of \[1\]"),
        ([3, 3], 2, 1, "labels of the data run from 0 to 1.*classes 0 to 0"),
    ],
)
def test_stratified_batches_refuse(counts, size, classes, message):
    with pytest.raises(ValueError, match=message):
        fast.Stratified(split(counts), size, classes, seeded())


def test_warm_up_ends_after_ten_steps_without_a_point():
    rule = fast.NoGain()
    accuracies = [0.1, 0.2, 0.205, 0.209, 0.211] + [0.211 + 0.0005 * k for k in range(20)]
    ended = [step for step, accuracy in enumerate(accuracies, 1) if rule(accuracy)]
    assert ended[0] == 15  # the last gain of a point came at step 5
