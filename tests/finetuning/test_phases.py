"""Fine-tuning in phases: what each moves, when it ends, and that it is the plain loop."""

import pytest
import torch
from torch import nn

from regraft.core.tensors import state
from regraft.finetuning import phases
from regraft.finetuning.fast import NoGain
from regraft.finetuning.phases import Outcome, Phase, fine_tune
from regraft.finetuning.recorder import Recorder


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def endless(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    while True:
        images = torch.randn(12, 6, generator=generator)
        yield images, images[:, :3].argmax(1)


BODY = ("0.weight", "0.bias", "1.weight", "1.bias")
RUNNING = ("1.running_mean", "1.running_var")
HEAD = ("3.weight", "3.bias")


def changed(phases, steps=3, **options):
    """Which tensors a run moves, and its outcome."""
    model = network()
    before = state(model)
    outcome = fine_tune(model, model[3], phases, endless(), steps, **options)
    after = state(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    return {name for name in before if not torch.equal(before[name], after[name])} - {"1.num_batches_tracked"}, outcome


@pytest.mark.parametrize(
    ("phase", "moved"),
    [
        (Phase(0.1, 0.1), {*BODY, *RUNNING, *HEAD}),
        (Phase(0.1, None), {*RUNNING, *HEAD}),
        (Phase(0.1, None, statistics=False), {*HEAD}),
        (Phase(None, 0.1), {*BODY, *RUNNING}),
    ],
)
def test_a_phase_moves_what_it_says(phase, moved):
    found, outcome = changed([phase])
    assert found == moved
    assert outcome == Outcome(3, None, (3,))


def test_what_is_not_trained_costs_no_gradient():
    seen = []

    class Spy(Recorder):
        def __init__(self):
            pass

        def after_step(self):
            seen.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})

    model = network()
    fine_tune(model, model[3], [Phase(0.1, None), Phase(None, 0.1, share=0.5)], endless(), 2, recorder=Spy())
    assert seen == [set(HEAD), set(HEAD)]
    fine_tune(model, model[3], [Phase(None, 0.1)], endless(), 1, recorder=Spy())
    assert seen[2] == set(BODY)


def test_phases_end_by_share_and_by_rule():
    validation = [next(endless(9))]
    _, outcome = changed([Phase(0.1, None, share=0.25), Phase(0.1, 0.1)], steps=8)
    assert outcome.phase_ends == (2, 8)
    slow = Phase(1e-9, None, statistics=False, until=NoGain)
    _, outcome = changed([slow, Phase(0.1, 0.1)], steps=20, validation=validation)
    assert outcome.phase_ends == (11, 20)
    _, outcome = changed([slow, Phase(0.1, 0.1)], steps=5, validation=validation)
    assert outcome.phase_ends == (5, 5)


def test_a_run_is_that_of_the_plain_loop():
    """Two rates, momentum 0.9, cross-entropy."""
    model, plain = network(), network()
    fine_tune(model, model[3], [Phase(0.3, 0.01)], endless(), 4)
    optimiser = torch.optim.SGD(
        [{"params": plain[:3].parameters(), "lr": 0.01}, {"params": plain[3].parameters(), "lr": 0.3}],
        momentum=0.9,
        lr=0,
    )
    for (images, labels), _ in zip(endless(), range(4), strict=False):
        optimiser.zero_grad()
        nn.functional.cross_entropy(plain(images), labels).backward()
        optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(state(model).values(), state(plain).values(), strict=True))


@pytest.mark.parametrize(
    ("optimiser", "moved"),
    [
        (phases.sgd, 0.5 * (1 + 1.9)),
        (phases.sgd_as_in_the_paper, 0.5 * (0.1 + 0.19)),
        (phases.nesterov, 0.5 * (1 + 0.9) + 0.5 * (1 + 0.9 * 1.9)),
        (phases.adam, 1 + 1),
        (phases.radam, 0.5 + 0.5),
    ],
)
def test_two_steps_by_hand(optimiser, moved):
    """Along a gradient of 1/2, in units of the rate; RAdam's first steps are not adapted."""
    weight = nn.Parameter(torch.zeros(1))
    steps = optimiser([{"params": [weight], "lr": 0.01, "name": "body"}])
    for _ in range(2):
        weight.grad = torch.full((1,), 0.5)
        steps.step()
    assert float(weight.detach()) == pytest.approx(-0.01 * moved)


def test_a_diverging_loss_is_reported_with_its_step():
    def batches():
        yield next(endless())
        yield next(endless(1))
        yield torch.full((2, 6), 3e38), torch.tensor([0, 1])  # finite, but what comes of it is not

    model = network()
    outcome = fine_tune(model, model[3], [Phase(0.1, 0.1)], batches(), 5)
    assert outcome == Outcome(2, 3, ())
    assert all(value.isfinite().all() for value in model.parameters())


@pytest.mark.parametrize(
    ("batches", "phase", "message"),
    [
        ([(torch.randn(2, 6), torch.tensor([0, 3]))], Phase(0.1, 0.1), "labels of batch 0 run from 0 to 3"),
        ([next(endless())] * 2, Phase(0.1, 0.1), "no batch for step 2"),
        (endless(), Phase(0.1, None, until=NoGain), "needs validation batches"),
    ],
)
def test_runs_that_cannot_be_are_refused(batches, phase, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        fine_tune(model, model[3], [phase], batches, 5)


@pytest.mark.parametrize(
    "optimiser", [phases.sgd, phases.sgd_as_in_the_paper, phases.nesterov, phases.adam, phases.radam]
)
def test_every_optimiser_learns(optimiser):
    model, batch = network(), next(endless(7))
    scale = 10 if optimiser is phases.sgd_as_in_the_paper else 1

    def loss():
        return float(nn.functional.cross_entropy(model.eval()(batch[0]), batch[1]).detach())

    before = loss()
    fine_tune(model, model[3], [Phase(0.03 * scale, 0.01 * scale)], endless(), 100, optimiser=optimiser)
    assert loss() < 0.8 * before
