"""Nobody's objects are changed: every public function that runs a model, with everything compared before and after.

And the same seed gives the same bits, whatever the global random state was.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from campaigns import subjects as s
from regraft import Trajectory, assign_gradient, fuse, match, trace, transfer, verify
from regraft.core.guard import make_deterministic, preserve_state, same_streams
from regraft.core.tensors import digest_tensors, live_state, state
from regraft.finetuning import fast
from regraft.finetuning.phases import Phase, fine_tune
from regraft.finetuning.recorder import Recorder, scores
from regraft.fusion.grids import evaluate
from regraft.fusion.repair import batch_statistics, repair_on, reset_on
from regraft.learning_transfer.methods import TRANSFER_METHODS
from regraft.networks.heads import find_head
from regraft.networks.papers import build
from regraft.training import evaluation as ev
from regraft.training import gradients, landscape, statistics
from regraft.training.loop import Diverged, Recipe, train
from regraft_bench.rows import environment


class Restless(nn.Module):
    """Changes whatever a forward pass can get at: parameters, buffers, attributes, random states."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.hidden = nn.Linear(64, 8)
        self.fc = nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(1))
        self.seen = 0
        self.notes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_exporting():
            with torch.no_grad():
                self.calls += 1
                self.fc.weight.data.clamp_(-0.2, 0.2)
                self.hidden.weight.data = torch.renorm(self.hidden.weight.data, 2, 0, 0.5)
            self.seen += 1
            self.notes.append(self.seen)
            random.random()
            np.random.rand()
            torch.rand(1)
            torch.use_deterministic_algorithms(True)
            torch.set_num_threads(1)
        x = self.drop(torch.relu(self.norm(self.conv(x)))).flatten(1)
        return self.fc(torch.relu(self.hidden(x)))


def network() -> nn.Module:
    """Training mode but for a frozen norm; a hook, a gradient, a parameter that takes none."""
    model = build(Restless, s.seed())
    model.norm.eval()
    model.conv.bias.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    model.fc.register_forward_hook(lambda module, inputs, output: output + 0)
    return model


def snapshot(model: nn.Module) -> list:
    """All that must be the same, in a form that compares exactly."""
    tables = [(name, table) for module in model.modules() for name, table in vars(module).items()]
    hooks = {name: len(table) for name, table in tables if "hook" in name and hasattr(table, "__len__")}
    python, arrays = random.getstate(), np.random.get_state()
    return [
        [(name, tensor.detach().clone().numpy().tobytes()) for name, tensor in live_state(model).items()],
        [(name, id(tensor), tensor.data_ptr()) for name, tensor in live_state(model).items()],
        [(name, module.training) for name, module in model.named_modules()],
        [(p.requires_grad, p.grad if p.grad is None else p.grad.numpy().tobytes()) for p in model.parameters()],
        [hooks, list(dict(model.named_modules())), model.seen, list(model.notes), model.norm.momentum],
        [python, arrays[1].tobytes(), arrays[2:], torch.get_rng_state().numpy().tobytes()],
        [torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()],
        [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
    ]


@pytest.fixture
def given():
    """The model, two sets of values, batches; after the test all of them must be what they were."""
    torch.manual_seed(3)
    threads = torch.get_num_threads()
    model = network()
    a, b = (state(build(Restless, s.seed(n))) for n in (1, 2))
    tensors = {"a": a, "b": b, "data": {"x": s.IMAGES, "y": s.LABELS}}
    kept, before = copy.deepcopy(tensors), snapshot(model)
    yield model, a, b, s.BATCHES
    after = snapshot(model)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    for one, other in zip(before, after, strict=True):
        assert one == other
    for name, values in kept.items():
        assert values.keys() == tensors[name].keys()
        assert all(torch.equal(values[key], tensors[name][key]) for key in values), name


def spec_of(model):
    return trace(model, torch.zeros(2, 1, 6, 6))


def trained(model, a, batches):
    recipe = Recipe(epochs=1, lr=0.01, batch_size=4)
    return train(model, a, s.dataset(*batches[0]), recipe, generator=s.seed())


def recorded(model, batches):
    recorder = Recorder(model, validation=batches, test=batches, head="fc")
    recorder.after_step()
    return recorder.finish()


def moved(method: str) -> Callable:
    def run(model, a, b, batches):
        path = Trajectory.linear(a, b, 2)
        spec = spec_of(model)
        return transfer(model, path, b, batches, method, spec=spec, target_end=a, validation=batches)

    return run


CALLS: dict[str, Callable] = {
    "trace": lambda m, a, b, d: spec_of(m),
    "verify": lambda m, a, b, d: verify(spec_of(m), m, d[0][0][:2], tolerance=1.0),
    "match": lambda m, a, b, d: match(spec_of(m), a, b),
    **{f"transfer {method}": moved(method) for method in TRANSFER_METHODS},
    "transfer, traced": lambda m, a, b, d: transfer(m, Trajectory.linear(a, b, 1), a, d),
    "accuracy": lambda m, a, b, d: ev.accuracy(m, a, d),
    "loss_and_accuracy": lambda m, a, b, d: ev.loss_and_accuracy(m, a, d),
    "ensemble_accuracy": lambda m, a, b, d: ev.ensemble_accuracy(m, [a, b], d),
    "gradients": lambda m, a, b, d: gradients.gradients(m, a, d),
    "gradients with dropout": lambda m, a, b, d: gradients.gradients(m, a, d, generator=s.seed()),
    "reset_batchnorm": lambda m, a, b, d: statistics.reset_batchnorm(m, a, d),
    "interpolate": lambda m, a, b, d: landscape.interpolate(m, a, b, d, 3, statistics=d),
    "plane": lambda m, a, b, d: landscape.plane(m, a, b, state(m), d, 2),
    "fuse": lambda m, a, b, d: fuse([a, b], [0.5, 0.5]),
    "assign_gradient": lambda m, a, b, d: assign_gradient(a, b, 0.1),
    "reset_on": lambda m, a, b, d: fuse([a, b], [0.5, 0.5], finish=reset_on(m, d)),
    "repair_on": lambda m, a, b, d: fuse([a, b], [0.5, 0.5], finish=repair_on(m, [a, b], d)),
    "batch_statistics": lambda m, a, b, d: ev.accuracy(batch_statistics(m), a, d),
    "evaluate": lambda m, a, b, d: evaluate(m, [a, b], [[1.0, 0.5]], *d[0]),
    "evaluate, repaired": lambda m, a, b, d: evaluate(m, [a, b], [[1.0, 0.5]], *d[0], finish=repair_on(m, [a, b], d)),
    "scores": lambda m, a, b, d: scores(m, [a, {}], d),
    "Recorder": lambda m, a, b, d: recorded(m, d),
    "param_groups": lambda m, a, b, d: fast.param_groups(m, head="fc"),
    "find_head": lambda m, a, b, d: find_head(m),
    "features_of": lambda m, a, b, d: fast.features_of(m, m.fc, d[0][0]),
    "train": lambda m, a, b, d: trained(m, a, d),
    "Trajectory": lambda m, a, b, d: list(Trajectory.linear(a, b, 3)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_everything_is_as_it_was(given, call):
    assert CALLS[call](*given) is not None


@pytest.mark.parametrize("call", ["accuracy", "gradients", "reset_batchnorm", "repair_on", "scores", "features_of"])
def test_everything_is_as_it_was_after_an_error(given, call):
    model, a, b, _ = given
    with pytest.raises((RuntimeError, ValueError)):
        CALLS[call](model, a, b, [(torch.zeros(2, 5, 6, 6), torch.zeros(2, dtype=torch.int64))])


@pytest.mark.parametrize("initialise", [fast.zero, fast.xavier, fast.kaiming_fan_in, lambda w, g: w.normal_()])
def test_adopting_changes_the_head_alone_and_draws_from_no_global_stream(initialise):
    model, before = build(Restless, s.seed()), torch.get_rng_state()
    kept = {name: value for name, value in state(model).items() if not name.startswith("fc.")}
    adopted = fast.adopt(model, 5, head="fc", initialise=initialise)
    assert torch.equal(torch.get_rng_state(), before)
    assert adopted.head.weight.shape == (5, 8)
    assert all(torch.equal(live_state(model)[name], value) for name, value in kept.items())


def test_a_recorder_leaves_no_trace_in_training():
    """A shuffled loader draws from the global state; with and without a recorder, training draws the same."""
    data = torch.utils.data.TensorDataset(torch.randn(8, 1, 6, 6, generator=s.seed()), torch.arange(8) % 3)
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    model = build(Restless, s.seed())
    torch.manual_seed(0)
    alone = torch.rand(3)
    torch.manual_seed(0)
    recorder = Recorder(model, validation=loader, test=loader, head="fc")
    recorder.after_step()
    recorder.finish()
    assert torch.equal(torch.rand(3), alone)
    torch.use_deterministic_algorithms(False)


def test_a_loader_goes_on_from_batch_to_batch():
    """Random states are kept around the model alone: what a user's loader draws is different each time."""
    model, values = build(Restless, s.seed()), state(build(Restless, s.seed(1)))
    data = torch.utils.data.TensorDataset(torch.randn(32, 1, 6, 6, generator=s.seed()), torch.arange(32) % 3)
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    one, other = (gradients.gradients(model, values, [next(iter(loader))]) for _ in range(2))
    assert not torch.equal(one["conv.weight"], other["conv.weight"])
    torch.use_deterministic_algorithms(False)


def test_the_guard_restores_what_was_added_taken_and_replaced():
    model = network()
    with preserve_state(model), same_streams():
        model.extra = nn.Linear(2, 2)
        model.hook = model.fc.register_forward_hook(lambda *_: None)
        del model.norm
        model.zero_grad()
        model.fc.weight = nn.Parameter(torch.zeros(3, 8))
        model.train()
        model.requires_grad_(True)
    assert list(dict(model.named_children())) == ["conv", "norm", "drop", "hidden", "fc"]
    assert not hasattr(model, "hook") and len(model.fc._forward_hooks) == 1
    assert not model.norm.training and not model.conv.bias.requires_grad
    assert torch.equal(model.fc.weight.grad, torch.ones(3, 8)) and model.fc.weight.abs().sum() > 0


# ---------------------------------------------------------------- the same bits, and divergence


def everything(noise: int) -> list:
    """Numbers of all three systems, from the same seeds; ``noise`` is what must not matter."""
    torch.manual_seed(noise)
    random.seed(noise)
    np.random.seed(noise)
    trained = train(s.MODEL, s.weights(1), s.dataset(), s.RECIPE, generator=s.seed(2))
    moved = transfer(s.MODEL, s.path(), trained.tensors, s.BATCHES, spec=s.spec(), validation=s.BATCHES)
    network = build(s.layers, s.seed(3))
    adopted = fast.adopt(network, 3, initialise=fast.xavier)
    recorder = Recorder(network, validation=s.BATCHES, test=s.BATCHES)
    fine_tune(network, adopted.head, [Phase(0.1, 0.01)], s.BATCHES, 2, recorder=recorder)
    record = recorder.finish()
    return [
        digest_tensors(trained.tensors),
        [row.train_loss for row in trained.history],
        digest_tensors(moved.params),
        moved.accuracies,
        moved.objectives,
        digest_tensors(fuse([moved.params, trained.tensors], [0.3, 0.7])),
        [row.scores for row in record.validations],
        [row.distance for row in record.deployments],
    ]


def test_the_same_seed_gives_the_same_bits():
    assert everything(1) == everything(2)


def test_a_row_says_whether_it_was_deterministic_and_with_how_many_threads():
    try:
        make_deterministic()
        assert everything(1) == everything(2)
        found = environment()
        assert found.deterministic and found.threads == torch.get_num_threads()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not environment().deterministic


@pytest.mark.parametrize("lr", [1e30, 1e38])
def test_divergence_is_named_by_its_step(lr):
    with pytest.raises(Diverged, match=r"of step \d+ \(epoch \d\) is not finite") as caught:
        recipe = Recipe(epochs=3, lr=lr, batch_size=8, schedule="constant")
        train(s.MODEL, s.weights(1), s.dataset(), recipe, generator=s.seed())
    assert 0 <= caught.value.step < 6


def test_weights_that_are_not_finite_at_the_end_are_a_divergence():
    """The last loss was finite; the last update was not."""
    recipe = Recipe(epochs=1, lr=1e38, batch_size=16, momentum=0.0, weight_decay=1e10)
    with pytest.raises(Diverged, match=r"tensor '.*' of step 0") as caught:
        train(s.MODEL, s.weights(1), s.dataset(), recipe, generator=s.seed())
    assert caught.value.what.startswith("tensor")


def test_fine_tuning_that_diverges_says_when():
    network = build(s.layers, s.seed())
    found = fine_tune(network, network[-1], [Phase(1e30, 1e30)], s.BATCHES * 4, 8)
    assert found.diverged is not None and found.steps == found.diverged - 1
