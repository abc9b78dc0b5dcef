"""The recorder against Anytime Deployment Performance spelled out, and what it costs the training loop."""

import math
import time
from collections.abc import Iterator
from itertools import takewhile

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regraft.core.clock import Cost
from regraft.core.tensors import state
from regraft.finetuning import fast
from regraft.finetuning import recorder as module
from regraft.finetuning.record import Record
from regraft.finetuning.recorder import (
    Recorder,
    Source,
    checkpoints_and_tenths,
    fibonacci,
    growing_gaps,
    scores,
)

STEPS = 24


def batches(seed: int, count: int = 2, classes: int = 3):
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(9, 6, generator=generator) for _ in range(count)]
    return [(images, (images[:, :classes].argmax(1))) for images in draws]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))


def train(model, steps, after, lr=0.3):
    optimiser = torch.optim.SGD(fast.param_groups(model, head_lr=lr, body_lr=lr), momentum=0.9)
    for step in range(steps):
        images, labels = batches(100 + step, 1)[0]
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()
        after()


def run(steps=STEPS, **options):
    model = network()
    source_head = fast.adopt(model, 3).source_head
    recorder = Recorder(
        model, validation=batches(1), test=batches(2), source=Source(source_head, batches(3)), **options
    )
    train(model, steps, recorder.after_step)
    return model, recorder


def test_when():
    assert fibonacci(34) == (1, 2, 3, 5, 8, 13, 21, 34)
    assert fibonacci(33)[-1] == 21
    gaps = growing_gaps()
    steps = [next(gaps) for _ in range(60)]
    assert steps[:14] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18]
    assert {b - a for a, b in zip(steps[-20:], steps[-19:], strict=False)} == {10}
    steps = list(takewhile(lambda step: step <= 60, by_default()))
    assert steps == [1, 2, 3, 5, 8, 13, 20, 21, 30, 34, 40, 50, 55, 60]


def test_the_first_steps_take_half_as_many_validations_as_the_papers():
    """What the recorder costs: images that are evaluated, by default and as often as in the paper."""
    count = {}
    for name, options in {"default": {}, "paper": {"validate_at": growing_gaps}}.items():
        record = run(steps=20, **options)[1].finish()
        count[name] = len(record.validations) - 1
    assert count == {"default": 7, "paper": 15}


def test_a_record_as_rows_and_in_a_plot():
    """One row a deployment; a plot of what is deployed, and of what is left of the source task."""
    record = run()[1].finish()
    rows = record.rows()
    assert [row["step"] for row in rows] == [row.step for row in record.deployments]
    assert rows[3]["top1"] == record.deployments[3].scores.top1
    assert rows[3]["source_top1"] == record.deployments[3].source.top1
    assert rows[3]["cpu"] == record.deployments[3].cost.cpu

    class Axes:
        def __init__(self):
            self.drawn = {}

        def step(self, steps, values, *, label, **_):
            self.drawn[label] = (list(steps), list(values))

        def __getattr__(self, name):
            return lambda *_, **__: None

    axes = record.plot(Axes())
    steps = [row.step for row in record.deployments]
    assert axes.drawn["new task"] == (steps, [row.scores.top1 for row in record.deployments])
    assert axes.drawn["source task"] == (steps, [row.source.top1 for row in record.deployments])


def test_a_record_as_a_table():
    pandas = pytest.importorskip("pandas")
    record = run()[1].finish()
    frame = record.frame()
    assert isinstance(frame, pandas.DataFrame) and list(frame["top1"]) == [r["top1"] for r in record.rows()]


def test_a_plot_by_matplotlib(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = run()[1].finish().plot()
    axes.figure.savefig(tmp_path / "record.png")
    assert axes.get_xscale() == "symlog" and len(axes.get_lines()) == 2


def by_default() -> Iterator[int]:
    return checkpoints_and_tenths(iter(fibonacci(10**6)))


@pytest.mark.parametrize("when", [growing_gaps, by_default])
@pytest.mark.parametrize("hold", [1, 2, 16])
def test_deployments_are_those_of_the_definition(hold, when):
    """Section 6.1, spelled out: at each checkpoint, the test performance of the best validated state so far."""
    model = network()
    source_head = fast.adopt(model, 3).source_head
    states = [state(model)]
    train(model, STEPS, lambda: states.append(state(model)))
    own = {f"3.{name}": value for name, value in source_head.state_dict().items()}
    validate_at = [s for s, _ in zip(when(), range(99), strict=False) if s <= STEPS]
    expected = []
    for checkpoint in [*fibonacci(STEPS), STEPS]:
        best, best_accuracy = 0, -1.0
        for step in validate_at:
            if step <= checkpoint:
                accuracy = scores(model, [states[step]], batches(1))[0].top1
                if accuracy > best_accuracy:
                    best, best_accuracy = step, accuracy
        target = scores(model, [states[best]], batches(2))[0]
        source = scores(model, [{**states[best], **own}], batches(3))[0]
        expected.append((checkpoint, best, target, source))

    _, recorder = run(hold=hold, **({} if when is by_default else {"validate_at": when}))
    record = recorder.finish()
    found = [(row.step, row.state_step, row.scores, row.source) for row in record.deployments]
    assert found[0][:2] == (0, 0)
    assert found[1:] == expected
    assert len({best for _, best, _, _ in expected}) >= (3 if when is growing_gaps else 2)
    assert [row.step for row in record.validations] == [0, *validate_at]
    assert record.area() == pytest.approx(sum(row[2].top1 for row in expected[:-1]) / len(expected[:-1]))
    assert record.source_area() == pytest.approx(sum(row[3].top1 for row in expected[:-1]) / len(expected[:-1]))


def test_the_recorder_changes_nothing_in_the_run():
    plain = network()
    fast.adopt(plain, 3)
    train(plain, STEPS, lambda: None)
    recorded, recorder = run()
    recorder.finish()
    assert recorded.training
    assert all(torch.equal(a, b) for a, b in zip(state(plain).values(), state(recorded).values(), strict=True))


def test_scores_are_those_of_plain_torch():
    torch.manual_seed(3)
    model = network().double()
    images, labels = torch.randn(40, 6).double(), torch.randint(0, 5, (40,))
    (found,) = scores(model, [{}], [(images[:15], labels[:15]), (images[15:], labels[15:])])
    model.eval()
    with torch.no_grad():
        logits = model(images)
    p = logits.softmax(1)
    assert found.top1 == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert found.top5 == 1.0
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, labels)))
    assert found.entropy == pytest.approx(float(torch.distributions.Categorical(p).entropy().mean()))
    error = F.one_hot(labels, 5) - p
    assert found.error_variance == pytest.approx(float(error.square().sum(1).mean()))
    wide = nn.Linear(6, 40)
    labels = torch.randint(0, 40, (300,))
    images = torch.randn(300, 6)
    (found,) = scores(wide, [{}], [(images, labels)])
    top5 = (wide(images).topk(5, 1).indices == labels[:, None]).any(1)
    assert found.top5 == pytest.approx(float(top5.double().mean()))


def test_step_zero_is_the_start_with_entropy_ln_n():
    _, recorder = run(steps=0)
    record = recorder.finish()
    assert record.validations[0].scores.entropy == pytest.approx(math.log(3))
    assert record.validations[0].scores.error_variance == pytest.approx(1 - 1 / 3)
    assert record.validations[0].head_norm == record.validations[0].distance == 0.0
    assert [row.step for row in record.deployments] == [0]


def test_distances_are_of_the_features_and_norms_of_the_head():
    start = state(network())
    model, recorder = run(steps=20)
    record = recorder.finish()
    end = state(model)
    body = ["0.weight", "0.bias", "1.weight", "1.bias"]
    distance = math.sqrt(sum(float((end[n] - start[n]).square().sum()) for n in body))
    last = record.validations[-1]
    assert last.step == 20
    assert last.distance == pytest.approx(distance, rel=1e-5)
    assert last.head_norm == pytest.approx(float(end["3.weight"].norm()), rel=1e-5)
    from_zero = Recorder(
        model, validation=batches(1), test=batches(2), origin={n: torch.zeros_like(end[n]) for n in body}
    ).finish()
    whole = math.sqrt(sum(float(end[n].square().sum()) for n in body))
    assert from_zero.deployments[0].distance == pytest.approx(whole, rel=1e-5)
    assert from_zero.deployments[0].source is None
    with pytest.raises(ValueError, match="give the recorder a source"):
        Record((), from_zero.deployments, (0,), {}).source_area()


def test_reaching():
    record = run()[1].finish()
    curve = [(row.step, row.scores.top1) for row in record.deployments]
    goal = curve[-1][1]
    first = next(step for step, accuracy in curve if accuracy >= goal)
    assert record.steps_to_reach(goal) == first
    assert record.steps_to_reach(1.01) is None


def test_evaluation_is_timed_apart(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: 2 * now[0])
    true_scores = module._scores

    def slow(*arguments):
        now[0] += 1000.0
        return true_scores(*arguments)

    monkeypatch.setattr(module, "_scores", slow)

    model = network()
    fast.adopt(model, 3)
    recorder = Recorder(model, validation=batches(1), test=batches(2))
    for _ in range(7):
        now[0] += 2.0
        recorder.after_step()
    record = recorder.finish()
    assert record.seconds == {"train": Cost(14.0, 28.0), "evaluation": Cost(6000.0, 12000.0)}
    assert record.cost == Cost(14.0, 28.0)
    assert [row.cost.wall for row in record.deployments] == [0.0, 2.0, 4.0, 6.0, 10.0, 14.0]
    assert [row.cost.wall for row in record.validations] == [2.0 * step for step in (0, 1, 2, 3, 5)]


def test_a_run_that_ended_early_is_judged_at_every_checkpoint():
    record = run(steps=6)[1].finish(until=STEPS)
    assert [row.step for row in record.deployments] == [0, 1, 2, 3, 5, 8, 13, 21, 24]
    assert len({row.state_step for row in record.deployments[-4:]}) == 1
    assert record.checkpoints == fibonacci(STEPS)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"checkpoints": wrong}, "checkpoints must increase") for wrong in ([], [0, 1], [2, 1], [1, 1])]
    + [({"hold": 0}, "at least one state")],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Recorder(network(), validation=batches(1), test=batches(2), **options)


def test_validation_images_of_one_class_are_refused():
    images = torch.randn(4, 6)
    one = [(images, torch.full((4,), 2))]
    with pytest.raises(ValueError, match="all validation images are of class 2"):
        Recorder(network(), validation=one, test=one)
    Recorder(network(), validation=[*one, (images[:1], torch.tensor([0]))], test=one)


def test_a_model_that_is_not_finite_is_always_wrong():
    model = network()
    with torch.no_grad():
        model[3].weight.fill_(math.nan)
    assert scores(model, [{}], batches(1))[0].top1 == 0.0


def test_a_state_that_is_not_finite_is_never_deployed():
    model = network()
    fast.adopt(model, 3, initialise=fast.Normal(1.0), generator=torch.Generator().manual_seed(0))
    recorder = Recorder(model, validation=batches(1), test=batches(2))
    with torch.no_grad():
        model[3].weight.fill_(math.nan)
    recorder.after_step()
    start, last = recorder.finish().deployments
    assert (last.step, last.state_step) == (1, 0)
    assert last.scores == start.scores
