"""Training: schedules, seeds, records, resuming to the bit, and what is refused."""

import itertools
import json
import math
import os
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from regraft.core import tensors
from regraft.core.files import parse_json, write_tensors
from regraft.data import Dataset, Split, load
from regraft.networks import papers as networks
from regraft.training import state as checkpoints
from regraft.training.evaluation import accuracy
from regraft.training.loop import Diverged, Epoch, Recipe, train


def seed(number=0):
    return torch.Generator().manual_seed(number)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def little(train=50, validation=20, test=20, size=4):
    """A set small enough for dozens of runs: the class is the brighter half."""
    parts = []
    for number, count in enumerate((train, validation, test)):
        images = torch.rand(count, 1, size, size, generator=seed(number))
        labels = torch.arange(count) % 2
        images[labels == 1, :, : size // 2] += 1
        parts.append(Split(images, labels, (0.5,), (0.5,)))
    return Dataset("little", *parts, ("low", "high"), (0.5,), (0.5,))


class Network(nn.Module):
    """With everything that has state: BatchNorm and dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(64, 2)

    def forward(self, images):
        return self.fc(self.drop(F.relu(self.norm(self.conv(images)))).flatten(1))


@pytest.fixture
def network():
    model = networks.build(Network, seed())
    return model, tensors.state(model)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


RECIPE = Recipe(epochs=4, lr=0.05, weight_decay=1e-3, batch_size=16)


def run(network, recipe=RECIPE, number=0, **how):
    """Train on the little set; number: of the generator."""
    return train(*network, little(), recipe, generator=seed(number), **how)


# --- recipes


def test_the_cosine_schedule_warms_up_and_ends_near_zero():
    recipe = Recipe(epochs=10, lr=0.1, warmup_epochs=2)
    rates = [recipe.learning_rate(step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) / 10 for step in range(10)])
    assert rates[10:] == pytest.approx([0.05 * (1 + math.cos(math.pi * s / 40)) for s in range(40)])
    assert Recipe(epochs=10, lr=0.1, schedule="constant").learning_rate(49, 5) == 0.1


# --- steps


@pytest.mark.parametrize("how", [{}, {"nesterov": True}, {"augment": True}], ids=str)
def test_training_is_the_textbooks_sgd(how):
    """Against momentum, weight decay and the schedule written out, over two epochs of whole batches."""
    data, recipe = little(), Recipe(epochs=2, lr=0.1, momentum=0.8, weight_decay=0.01, batch_size=25, **how)
    model = networks.build(lambda: networks.mlp([16, 8, 2]), seed())
    trained = train(model, tensors.state(model), data, recipe, generator=seed(4))

    values = {name: value.clone().requires_grad_() for name, value in tensors.state(model).items()}
    velocity = {name: torch.zeros_like(value) for name, value in values.items()}
    generator, step = seed(4), 0
    for _ in range(2):
        torch.randint(2**62, (), generator=generator)  # the seed for dropout
        for images, labels in data.train.batches(25, generator=generator, augment=recipe.augment):
            loss = F.cross_entropy(torch.func.functional_call(model, values, images), labels)
            gradients = torch.autograd.grad(loss, list(values.values()))
            rate = 0.05 * (1 + math.cos(math.pi * step / 4))
            for (name, value), gradient in zip(values.items(), gradients, strict=True):
                slope = gradient + 0.01 * value.detach()
                velocity[name] = 0.8 * velocity[name] + slope
                step_along = slope + 0.8 * velocity[name] if recipe.nesterov else velocity[name]
                values[name] = (value.detach() - rate * step_along).requires_grad_()
            step += 1
    for name, value in values.items():
        assert torch.allclose(trained.tensors[name], value, atol=1e-6), name


def test_digits_are_learned_and_the_history_says_so(digits):
    model = networks.build(lambda: networks.mlp([64, 64, 10]), seed())
    start = tensors.state(model)
    kept = {name: value.clone() for name, value in start.items()}
    shown = []
    result = train(model, start, digits, Recipe(8, 0.05), generator=seed(), test=True, on_epoch=shown.append)
    assert equal(start, kept) and equal(tensors.state(model), kept)
    assert [row.epoch for row in result.history] == list(range(9)) and shown == list(result.history)
    first, last = result.history[0], result.history[-1]
    assert first.cost.wall == first.cost.cpu == 0 and first.train_loss is None and first.test_accuracy < 0.4
    assert last.test_accuracy > 0.93 and last.validation_accuracy > 0.9
    costs = [row.cost for row in result.history]
    assert all(a.wall < b.wall and a.cpu < b.cpu for a, b in itertools.pairwise(costs))
    assert result.cost == last.cost
    assert accuracy(model, result.tensors, digits.test.batches(100)) == last.test_accuracy


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        replace(RECIPE, augment=True, nesterov=True, warmup_epochs=1),
        replace(RECIPE, optimizer="adam", lr=1e-3, schedule="constant"),
    ],
    ids=["sgd", "augment-nesterov", "adam"],
)
def test_equal_generators_give_equal_runs(network, recipe):
    data = little(size=8) if recipe.augment else little()
    model, start = network
    if recipe.augment:
        model = networks.build(lambda: networks.digits_conv(2, width=0.25), seed())
        start = tensors.state(model)
    torch.manual_seed(1)
    first = train(model, start, data, recipe, generator=seed(1))
    before = torch.get_rng_state()
    second = train(model, start, data, recipe, generator=seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    third = train(model, start, data, recipe, generator=seed(2))
    assert equal(first.tensors, second.tensors)
    assert not equal(first.tensors, third.tensors)


def test_the_last_values_are_contiguous_and_free(network):
    result = run(network)
    assert all(value.is_contiguous() and not value.requires_grad for value in result.tensors.values())
    assert result.tensors["norm.num_batches_tracked"] == 4 * 4
    none = run(network, replace(RECIPE, epochs=0))
    assert equal(none.tensors, network[1]) and len(none.history) == 1


# --- records and stops


def test_records_at_the_ends_of_epochs(network):
    recorded = {}
    result = run(network, record=recorded.__setitem__)
    assert list(recorded) == [0, 4, 8, 12, 16]
    assert equal(recorded[0], network[1]) and equal(recorded[16], result.tensors)
    assert not equal(recorded[8], recorded[12])


def test_records_at_chosen_steps_do_not_disturb_the_run(network):
    recorded = {}
    plain = run(network)
    result = run(network, record=recorded.__setitem__, record_at={1, 2, 3, 5, 8, 13, 99})
    assert list(recorded) == [1, 2, 3, 5, 8, 13]
    assert equal(result.tensors, plain.tensors)
    assert recorded[5]["norm.num_batches_tracked"] == 5


def test_a_run_stops_when_rows(network):
    result = run(network, stop=lambda row: row.epoch == 2)
    assert result.history[-1].epoch == 2
    at_once = run(network, stop=lambda row: True)
    assert len(at_once.history) == 1


def test_rows_within_epochs_do_not_disturb_the_run(network):
    plain = run(network, test=True)
    shown = []
    result = run(network, test=True, evaluate_at={1, 2, 6, 8, 99}, on_epoch=shown.append)
    assert [row.epoch for row in result.history] == [0, 0.25, 0.5, 1, 1.5, 2, 3, 4]
    assert shown == list(result.history)
    assert equal(result.tensors, plain.tensors)
    whole = [row for row in result.history if row.epoch == round(row.epoch)]
    for ours, theirs in zip(whole, plain.history, strict=True):
        assert replace(ours, cost=theirs.cost) == theirs
    recorded = {}
    run(network, record=lambda step, values: recorded.update(values), record_at={1})
    assert accuracy(network[0], recorded, little().test.batches(50)) == result.history[1].test_accuracy


# --- what goes wrong


def test_divergence_is_reported_with_its_step(digits):
    model = networks.build(lambda: networks.mlp([64, 32, 10]), seed())
    with pytest.raises(Diverged, match=r"step \d+ \(epoch 1\).*learning rate") as caught:
        train(model, tensors.state(model), digits, Recipe(3, 1e9, schedule="constant"), generator=seed())
    assert 1 <= caught.value.step < 10 and caught.value.epoch == 1


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize("label", [2, -100])
def test_labels_without_an_output_are_refused_before_work(network, part, label):
    data = little()
    split = getattr(data, part)
    split.labels[3] = label
    with pytest.raises(ValueError, match=f"{label}.*classes 0 to 1"):
        train(*network, data, RECIPE, generator=seed(), on_epoch=pytest.fail)


def test_no_validation_split_is_no_validation_accuracy(network):
    data = little()
    data = replace(data, validation=data.validation.subset(torch.empty(0, dtype=torch.int64)))
    result = train(*network, data, RECIPE, generator=seed())
    assert result.history[-1].validation_accuracy is None


# --- checkpoints


@pytest.fixture
def every_epoch(monkeypatch):
    """Checkpoints are written after every epoch, however short."""
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)


class Interrupted(Exception):
    pass


def interrupt_at(epoch):
    def on_epoch(row):
        if row.epoch == epoch:
            raise Interrupted

    return on_epoch


@pytest.mark.parametrize("optimizer, lr", [("sgd", 0.05), ("adam", 1e-3)])
@pytest.mark.parametrize("epoch", [0, 1, 2.5, 4])
def test_an_interrupted_run_resumes_to_the_bit(network, tmp_path, every_epoch, epoch, optimizer, lr):
    """Interrupted while it tells of this epoch, it resumes from the end of the epoch before."""
    recipe = replace(RECIPE, optimizer=optimizer, lr=lr)
    how = {"evaluate_at": {10, 11}, "checkpoint": tmp_path / "run.safetensors"}
    whole = run(network, recipe, number=1, evaluate_at={10, 11})
    with pytest.raises(Interrupted):
        run(network, recipe, number=1, on_epoch=interrupt_at(epoch), **how)
    recorded, shown = [], []
    resumed = run(network, recipe, number=1, on_epoch=shown.append, record=lambda step, _: recorded.append(step), **how)
    assert equal(resumed.tensors, whole.tensors)
    assert [row.epoch for row in resumed.history] == [0, 1, 2, 2.5, 2.75, 3, 4]
    done = math.ceil(epoch) - 1 if epoch > 1 else -1  # there is no file before the first epoch is over
    assert [row.epoch for row in shown] == [n for n in (0, 1, 2, 2.5, 2.75, 3, 4) if n > done]
    assert recorded == [4 * n for n in range(done + 1, 5)]
    for ours, theirs in zip(resumed.history, whole.history, strict=True):
        assert replace(ours, cost=theirs.cost) == theirs


def test_the_cost_goes_on_from_the_checkpoint(network, tmp_path, every_epoch):
    path, rows = tmp_path / "run.safetensors", []
    with pytest.raises(Interrupted):
        run(network, number=1, checkpoint=path, on_epoch=lambda row: rows.append(row) or interrupt_at(3)(row))
    resumed = run(network, number=1, checkpoint=path)
    assert resumed.history[:3] == tuple(rows[:3])
    assert resumed.history[3].cost.wall > rows[2].cost.wall > 0


def test_short_epochs_share_a_checkpoint(network, tmp_path, monkeypatch):
    """However many they are, and the finished run is there at the end."""
    writes = []

    def counted(path, tensors, metadata):
        writes.append(path)
        write_tensors(path, tensors, metadata)

    monkeypatch.setattr(checkpoints, "write_tensors", counted)
    monkeypatch.setattr(checkpoints, "SECONDS", 1e9)
    path = tmp_path / "run.safetensors"
    recipe = replace(RECIPE, epochs=60)
    first = run(network, recipe, checkpoint=path)
    assert len(writes) == 1
    again = run(network, recipe, checkpoint=path, on_epoch=pytest.fail)
    assert first.history == again.history and equal(first.tensors, again.tensors)
    assert len(writes) == 1


def test_a_stopped_run_is_not_run_again(network, tmp_path):
    path, stop = tmp_path / "run.safetensors", lambda row: row.epoch == 2
    first = run(network, checkpoint=path, stop=stop)
    again = run(network, checkpoint=path, stop=stop, on_epoch=pytest.fail)
    assert first.history == again.history and len(first.history) == 3
    assert equal(run(network, checkpoint=path).tensors, run(network).tensors)


def test_a_finished_run_is_not_run_again(network, tmp_path):
    path = tmp_path / "deep" / "run.safetensors"
    first, again = run(network, checkpoint=path), run(network, checkpoint=path)
    assert equal(first.tensors, again.tensors) and first.history == again.history
    assert [file.name for file in path.parent.iterdir()] == ["run.safetensors"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"recipe": replace(RECIPE, lr=0.1)}, "recipe differ: lr is 0.05 there and 0.1 here"),
        ({"data": little(train=60)}, "data"),
        ({"generator": seed(9)}, "generator"),
        ({"test": True}, "rows"),
        ({"evaluate_at": {1}}, "rows"),
        ({"start": {"fc.bias": torch.ones(2)}}, "start"),
    ],
)
def test_another_runs_checkpoint_is_refused(network, tmp_path, change, words):
    path = tmp_path / "run.safetensors"
    run(network, checkpoint=path)
    kept, (model, start) = path.read_bytes(), network
    settings = {"data": little(), "recipe": RECIPE, "generator": seed(), "checkpoint": path, **change}
    with pytest.raises(ValueError, match=words):
        train(model, **{**settings, "start": {**start, **settings.get("start", {})}})
    assert path.read_bytes() == kept


def test_a_checkpoint_is_written_whole_or_not_at_all(network, tmp_path, monkeypatch, every_epoch):
    """Killed while writing, the run resumes from the checkpoint before."""
    path = tmp_path / "run.safetensors"
    whole = run(network, number=1)
    calls = []

    def dying(handle):
        calls.append(handle)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", dying)
    with pytest.raises(KeyboardInterrupt):
        run(network, number=1, checkpoint=path)
    with safe_open(path, framework="pt") as file:
        assert len(json.loads(file.metadata()["history"])) == 3
    resumed = run(network, number=1, checkpoint=path)
    assert equal(resumed.tensors, whole.tensors)
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]


def test_rows_are_plain_data(network):
    row = run(network, replace(RECIPE, epochs=1)).history[-1]
    assert parse_json(json.dumps(asdict(row)), Epoch, "a row") == row
