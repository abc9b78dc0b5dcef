"""Models and batches as people have them: dictionaries, several inputs, ModelOutput, dtypes that do not go together."""

from __future__ import annotations

import copy
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regraft
from regraft.core import forward
from regraft.core.tensors import fill_, state
from regraft.finetuning.phases import Phase, fine_tune
from regraft.fusion import grids
from regraft.training import evaluation
from regraft.training.gradients import gradients

CLASSES = 4


class Plain(nn.Module):
    """What the others compute, of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 12), nn.Linear(12, CLASSES)

    def scored(self, x):
        return self.head(F.relu(self.body(x)))

    def forward(self, x):
        return self.scored(x)


class Answering(Plain):
    """Answers with a dictionary that has logits."""

    def forward(self, x):
        return {"features": x, "logits": self.scored(x)}


class Nested(Plain):
    """Answers with something else."""

    def forward(self, x):
        return {"head": (x, self.scored(x))}


class Two(Plain):
    """Takes two inputs."""

    def forward(self, left, right):
        return self.scored(torch.cat([left, right], 1))


def data(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(16, 6, generator=generator),
            torch.arange(16).remainder(CLASSES)[torch.randperm(16, generator=generator)],
        )
        for _ in range(count)
    ]


FORMS = {
    "dictionary output": (Answering, lambda x, y: (x, y)),
    "loader's list": (Plain, lambda x, y: [x, y]),
    "keyword": (Plain, lambda x, y: {"x": x, "labels": y}),
    "keyword object": (Plain, lambda x, y: UserDict(x=x, labels=y)),
    "two, then labels": (Two, lambda x, y: (x[:, :2], x[:, 2:], y)),
    "two in a tuple": (Two, lambda x, y: ((x[:, :2], x[:, 2:]), y)),
    "two keywords": (Two, lambda x, y: ({"left": x[:, :2], "right": x[:, 2:]}, y)),
    "a function": (lambda: regraft.with_output(Nested(), lambda out: out["head"][1]), lambda x, y: (x, y)),
}


@pytest.fixture(params=FORMS, ids=str)
def form(request):
    make, wrap = FORMS[request.param]
    return make(), lambda pairs: [wrap(x, y) for x, y in pairs]


def starts(count):
    torch.manual_seed(1)
    return [state(Plain()) for _ in range(count)]


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_whatever_the_form_evaluation_gives_the_same_bits(form):
    model, wrap = form
    plain, pairs, (theta,) = Plain(), data(), starts(1)
    assert evaluation.loss_and_accuracy(model, theta, wrap(pairs)) == evaluation.loss_and_accuracy(plain, theta, pairs)
    assert evaluation.accuracy(model, theta, wrap(pairs)) == evaluation.accuracy(plain, theta, pairs)
    same(
        gradients(model, theta, wrap(pairs)),
        gradients(plain, theta, pairs),
    )


def test_whatever_the_form_a_transfer_gives_the_same_bits(form):
    model, wrap = form
    plain, pairs, (a, b, c) = Plain(), data(), starts(3)
    path = regraft.Trajectory.linear(a, b, steps=3)
    found, expected = (
        regraft.transfer(net, path, c, batches, validation=batches)
        for net, batches in ((model, wrap(pairs)), (plain, pairs))
    )
    same(found.params, expected.params)
    assert found.accuracies == expected.accuracies
    assert found.perm.keys() == expected.perm.keys()
    assert len(expected.perm) == 1, "the hidden units are a group"


def test_whatever_the_form_adopting_fine_tuning_and_recording_give_the_same(form):
    model, wrap = form
    plain, pairs, (theta,) = Plain(), data(8), starts(1)
    ends = []
    for net, batches in ((model, wrap(pairs)), (plain, pairs)):
        fill_(net, theta)
        adopted = regraft.fast.adopt(net, CLASSES, head="head")
        source = regraft.fast.Source(adopted.source_head, batches[:1])
        recorder = regraft.fast.Recorder(net, validation=batches[:2], test=batches[2:], head="head", source=source)
        outcome = fine_tune(net, adopted.head, [Phase(0.1, 0.05)], batches, 6, recorder=recorder)
        ends.append((state(net), [row.scores for row in recorder.finish().deployments], outcome.steps))
    same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_whatever_the_form_a_grid_counts_the_same(form):
    model, wrap = form
    (pair,), (a, b) = data(1), starts(2)
    inputs, labels = forward.split(wrap([pair])[0])
    points = [[1.0, 0.0], [0.5, 0.5], [0.2, 0.7]]
    found = grids.evaluate(model, [a, b], points, inputs, labels, batch_size=5)
    assert found.correct.tolist() == grids.evaluate(Plain(), [a, b], points, *pair).correct.tolist()
    assert found.images == 16


def test_features_of_a_model_with_several_inputs():
    model, x = Two(), torch.randn(5, 6)
    found = regraft.fast.features_of(model, model.head, (x[:, :2], x[:, 2:]))
    assert torch.equal(found, F.relu(model.body(x)))


def test_a_view_shares_tensors_and_modules_and_can_be_copied():
    model = Nested()
    view = regraft.with_output(model, lambda out: out["head"][1])
    x = torch.randn(2, 6)
    assert all(a is b for a, b in zip(model.parameters(), view.parameters(), strict=True))
    assert isinstance(view, Nested) and isinstance(model(x), dict)
    twin = copy.deepcopy(view)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
    assert not view(x).any() and twin(x).any(), "the view is the model, its copy is not"
    view.head = nn.Linear(12, 2)
    assert model.head is view.head
    assert regraft.with_output(Answering(), "features")(x) is x
    with pytest.raises(ValueError, match="output 'nothing' of Answering is no tensor"):
        regraft.with_output(Answering(), "nothing")(x)


def test_what_has_no_logits_is_refused_by_what_it_has():
    (theta,) = starts(1)
    with pytest.raises(ValueError, match=r"Nested answers with a dict of head, without logits.*with_output"):
        evaluation.accuracy(Nested(), theta, data(1))


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ({"x": torch.ones(2)}, "batch 1 is a mapping of x, with no tensor under 'labels'"),
        (torch.ones(2), "batch 1 is a Tensor that does not end with a tensor of labels"),
        ((torch.ones(2), [0, 1]), "batch 1 is a tuple that does not end with a tensor of labels"),
        ((torch.ones(2),), "batch 1 is a tuple that does not end"),
    ],
)
def test_what_is_no_batch_is_refused_by_its_number(batch, told):
    (theta,) = starts(1)
    with pytest.raises(ValueError, match=told):
        evaluation.accuracy(Plain(), theta, [*data(1), batch])


def test_inputs_that_are_not_finite_are_refused_by_name():
    (theta,) = starts(1)
    batch = {"left": torch.ones(2, 2), "right": torch.full((2, 4), torch.nan), "labels": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=r"right.*batch 0.*not finite"):
        evaluation.accuracy(Two(), theta, [batch])


def half(theta, dtype=torch.bfloat16):
    return {name: tensor.to(dtype) for name, tensor in theta.items()}


def test_mixed_dtypes_are_refused_with_both_names():
    (theta,) = starts(1)
    ((x, y),) = data(1)
    both = r"parameters are torch\.bfloat16, the inputs torch\.float32: bring both to one dtype"
    for work in (
        lambda: evaluation.accuracy(Plain(), half(theta), [(x, y)]),
        lambda: gradients(Plain(), half(theta), [{"x": x, "labels": y}]),
        lambda: grids.evaluate(Plain(), [half(theta)], [[1.0]], x, y),
        lambda: forward.answer(Plain().bfloat16(), (x, y)),
    ):
        with pytest.raises(ValueError, match=both):
            work()
    with pytest.raises(ValueError, match=r"the logits are torch\.float32, the labels torch\.float16"):
        targets = torch.rand(16, CLASSES).half()  # torch's own losses convert them, this one does not
        gradients(Plain(), theta, [(x, targets)], lambda logits, y: (logits @ y.T).mean())
    with pytest.raises(ValueError, match=r"the labels of batch 0 must be integers, not torch\.float16"):
        evaluation.accuracy(Plain(), theta, [(x, y.half())])
    assert evaluation.accuracy(Plain(), half(theta), [(x.bfloat16(), y)]) > 0
    assert gradients(Plain(), half(theta), [(x.bfloat16(), y)])["head.bias"].dtype == torch.bfloat16


def test_a_model_that_converts_its_inputs_itself_is_left_to_it():
    class Converting(Plain):
        def forward(self, x):
            return self.scored(x.to(self.body.weight.dtype))

    (theta,) = starts(1)
    assert evaluation.accuracy(Converting(), half(theta), data(1)) > 0


def test_other_devices_are_refused_with_both_names():
    ((x, y),) = data(1)
    with pytest.raises(ValueError, match="parameters are meta, the inputs cpu: bring both to one device"):
        forward.answer(Plain().to("meta"), (x, y))


def test_a_token_classifier_counts_every_token():
    (theta,) = starts(1)
    x, y = torch.randn(3, 5, 6), torch.randint(0, CLASSES, (3, 5))
    found = evaluation.accuracy(Plain(), theta, [(x, y)])
    assert found == evaluation.accuracy(Plain(), theta, [(x.flatten(0, 1), y.flatten())])


def test_a_trajectory_is_told_in_one_line():
    a, b = starts(2)
    for path in (
        regraft.Trajectory.linear(a, b, steps=5, schedule="cosine"),
        regraft.Trajectory.recorded([a, b, a], note="two\nlines"),
    ):
        assert len(repr(path).splitlines()) == 1 and len(repr(path)) < 120
        assert f"steps={path.steps}" in repr(path)


def test_a_bert_classifier_is_moved_adopted_and_recorded():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    a, b, c = (state(transformers.BertForSequenceClassification(config)) for _ in range(3))
    tokens, labels = torch.randint(1, 50, (12, 8)), torch.arange(12) % 3
    batch = transformers.BatchEncoding(
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    )
    moved = regraft.transfer(model, regraft.Trajectory.linear(a, b, steps=2), c, [batch], validation=[batch])
    assert len(moved.accuracies) == 3 and moved.params.keys() == c.keys()
    assert len(moved.perm) > 1
    adopted = regraft.fast.adopt(model, 2)
    assert adopted.name == "classifier" and model.config.num_labels == model.num_labels == 2
    new = {**batch, "labels": torch.arange(12) % 2}
    recorder = regraft.fast.Recorder(
        model, validation=[new], test=[new], source=regraft.fast.Source(adopted.source_head, [batch])
    )
    optimiser = torch.optim.SGD(regraft.fast.param_groups(model, head=adopted.head))
    for _ in range(2):
        optimiser.zero_grad()
        model(**new).loss.backward()
        optimiser.step()
        recorder.after_step()
    assert recorder.finish().deployments[-1].source is not None
