"""One convention of labels for loss and accuracy; and batches, labels and losses that are refused by name."""

from __future__ import annotations

import copy
import traceback

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regraft
from regraft.core.tensors import state
from regraft.training.evaluation import accuracy, loss_and_accuracy
from regraft.training.gradients import gradients
from regraft.training.statistics import reset_batchnorm

RAW = (
    "mat1 and mat2", "multi-target", "expected target", "0-d tensor", "has no attribute", "implicitly created",
    "does not require grad", "Expected floating point type",
)  # fmt: skip
"""What torch and Python say; only in brackets behind a sentence of our own."""


def setting(*more: nn.Module):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), *more, nn.ReLU(), nn.Linear(8, 5))
    return model, state(model), (torch.randn(4, 6), torch.tensor([0, 1, 2, 3]))


def transfer(model, tensors, batches, loss=F.cross_entropy, **options):
    end = {name: value + 0.1 if value.is_floating_point() else value for name, value in tensors.items()}
    path = regraft.Trajectory.linear(tensors, end, 2)
    return regraft.transfer(model, path, tensors, batches, loss=loss, **options)


USES = {
    "accuracy": accuracy,
    "loss_and_accuracy": loss_and_accuracy,
    "gradients": gradients,
    "majority": regraft.gradfix.majority,
    "transfer": transfer,
}


def check_refusal(call, *words):
    with pytest.raises(ValueError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said and not any(raw in said.partition("(")[0] for raw in RAW), said
    assert not words or any(word in said for word in words), said


# ---------------------------------------------------------------- a label a place


class Places(nn.Module):
    """Logits for every place: [B, T, C] of tokens, or [B, C, H, W] of pixels."""

    def __init__(self, classes, last):
        super().__init__()
        self.layer = nn.Linear(4, classes) if last else nn.Conv2d(4, classes, 1)

    def forward(self, x):
        return self.layer(x)


def by_hand(logits, labels):
    """Loss and accuracy; classes last, -100 ignored."""
    flat, wanted = logits.flatten(0, -2), labels.flatten().long()
    counts = wanted != -100
    right = (flat.argmax(-1) == wanted)[counts].float().mean()
    return float(F.cross_entropy(flat, wanted, ignore_index=-100)), float(right)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize(("shape", "last"), [((3, 7), True), ((2, 3, 4), True), ((2, 4, 6), False), ((2, 3, 3), False)])
def test_a_label_for_every_token_or_pixel(shape, last, dtype, ignored):
    torch.manual_seed(0)
    model = Places(5, last).eval()
    inputs = torch.randn(*shape, 4) if last else torch.randn(shape[0], 4, *shape[1:])
    labels = torch.randint(5, shape).to(dtype)
    if ignored:
        labels.view(-1)[::3] = -100
    logits = model(inputs)
    expected = by_hand(logits.detach() if last else logits.detach().movedim(1, -1), labels)
    nothing = (inputs, torch.full_like(labels, -100))
    for batches in ([(inputs, labels)], [nothing, (inputs, labels)]):
        assert loss_and_accuracy(model, model.state_dict(), batches) == pytest.approx(expected, abs=1e-6)
    assert accuracy(model, model.state_dict(), [(inputs, labels)]) == pytest.approx(expected[1])
    slope = gradients(model, model.state_dict(), [(inputs, labels)])["layer.bias"]
    wanted = torch.autograd.grad(F.cross_entropy(
        (logits if last else logits.movedim(1, -1)).flatten(0, -2), labels.flatten().long()
    ), model.layer.bias)[0]  # fmt: skip
    torch.testing.assert_close(slope, wanted)
    for use in (accuracy, gradients):
        check_refusal(lambda use=use: use(model, model.state_dict(), [nothing]), "no label")


@pytest.mark.parametrize("use", [accuracy, loss_and_accuracy, gradients])
@pytest.mark.parametrize("shape", [(5, 5), (2, 5)])
def test_a_shape_with_two_readings_is_refused(shape, use):
    model = Places(5, last=True)
    batch = torch.randn(*shape, 4), torch.zeros(shape, dtype=torch.int64)
    check_refusal(lambda: use(model, model.state_dict(), [batch]), "batch 0 has labels")


# ---------------------------------------------------------------- labels, batches and losses that are none

LABELS = {
    "one-hot": F.one_hot(torch.tensor([0, 1, 2, 3]), 5),
    "a column": torch.tensor([[0], [1], [2], [3]]),
    "a number": torch.tensor(3),
    "too many": torch.tensor([0, 1, 2, 3, 4]),
    "too large": torch.tensor([0, 1, 2, 9]),
    "ignored": torch.tensor([0, 1, 2, -100]),
    "floating": torch.tensor([0.0, 1.0, 2.0, 3.0]),
    "boolean": torch.tensor([True, False, True, True]),
}


@pytest.mark.parametrize("use", USES)
def test_labels_that_are_none_are_refused_and_small_integers_taken(use):
    model, tensors, (inputs, labels) = setting()
    for odd in LABELS.values():
        check_refusal(lambda odd=odd: USES[use](model, tensors, [(inputs, odd)]), "labels")
    expected = USES[use](model, tensors, [(inputs, labels)])
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        result = USES[use](model, tensors, [(inputs, labels.to(dtype))])
        if use in ("accuracy", "loss_and_accuracy"):
            assert result == expected


@pytest.mark.parametrize("use", USES)
def test_batches_that_the_model_cannot_take_are_named(use):
    model, tensors, (inputs, labels) = setting()
    odd = {
        "no image": (inputs[:0], labels[:0]),
        "an image without axes": (torch.tensor(1.0), labels),
        "a number": 3,
        "numbers": (3, 4),
        "two inputs": (inputs, inputs, labels),
        "bytes": (torch.ones(4, 6, dtype=torch.uint8), labels),
        "whole numbers": (torch.ones(4, 6, dtype=torch.int64), labels),
        "another width": (torch.randn(4, 7), labels),
    }
    spec = {"spec": regraft.trace(model, inputs)} if use == "transfer" else {}
    for batch in odd.values():
        check_refusal(lambda batch=batch: USES[use](model, tensors, [batch], **spec), "batch 0")


@pytest.mark.parametrize("at", [0, 2])
def test_a_batch_of_one_for_batchnorm_is_named(at):
    model, tensors, whole = setting(nn.BatchNorm1d(8))
    batches = [*[whole] * at, (whole[0][:1], whole[1][:1])]
    check_refusal(lambda: gradients(model, tensors, batches), f"batch {at}")
    check_refusal(lambda: reset_batchnorm(model, tensors, batches, 5), f"batch {at}")
    check_refusal(lambda: transfer(model, copy.deepcopy(tensors), batches, gradient_batches=3), f"batch {at}")


LOSSES = {
    "a vector": lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"),
    "a number of Python": lambda logits, labels: F.cross_entropy(logits, labels).item(),
    "nothing": lambda logits, labels: None,
    "two things": lambda logits, labels: (F.cross_entropy(logits, labels), 3),
    "a constant": lambda logits, labels: torch.tensor(1.0),
    "an integer": lambda logits, labels: (logits.argmax(1) == labels).sum(),
    "NaN": lambda logits, labels: F.cross_entropy(logits, labels) * float("nan"),
}


@pytest.mark.parametrize("use", list(USES)[1:])
def test_a_loss_is_one_number_that_depends_on_the_logits(use):
    model, tensors, batch = setting()
    for kind, loss in LOSSES.items():
        if use == "loss_and_accuracy" and kind in ("a constant", "an integer", "NaN"):
            USES[use](model, tensors, [batch], loss)  # numbers all the same
        else:
            check_refusal(lambda loss=loss: USES[use](model, tensors, [batch], loss), "loss", "gradient of")


class Own(Exception):
    pass


def test_what_a_users_function_raises_passes_through_with_where_it_was_called():
    model, tensors, batch = setting()

    def loss(logits, labels):
        raise Own("mine")

    class Raises(nn.Module):
        def forward(self, x):
            raise Own("mine")

    broken = nn.Sequential(model, Raises())
    calls = [
        (lambda u=u: u(model, tensors, [batch], loss), "by the loss on batch 0") for u in (gradients, loss_and_accuracy)
    ]
    calls.append((lambda: accuracy(broken, state(broken), [batch]), "by Sequential on batch 0"))
    for call, note in calls:
        with pytest.raises(Own, match="mine") as caught:
            call()
        assert note in "".join(traceback.format_exception(caught.value))


MODELS = {
    "without parameters": nn.ReLU,
    "empty": nn.Sequential,
    "of width zero": lambda: nn.Sequential(nn.Linear(6, 0), nn.ReLU(), nn.Linear(0, 5)),
    "on meta": lambda: nn.Linear(6, 5, device="meta"),
    "lazy": lambda: nn.LazyLinear(5),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODELS)
def test_models_that_have_nothing_give_an_answer_or_one_sentence(kind):
    model, batch = MODELS[kind](), (torch.ones(2, 6), torch.tensor([0, 1]))
    values = dict(model.state_dict())
    for call in (
        lambda: regraft.trace(model, batch[0]),
        lambda: transfer(model, values, [batch]),
        *(lambda use=use: use(model, values, [batch]) for use in (accuracy, gradients, regraft.gradfix.majority)),
    ):
        try:
            call()
        except ValueError as problem:
            assert "\n" not in str(problem) and not any(raw in str(problem).partition("(")[0] for raw in RAW), problem
