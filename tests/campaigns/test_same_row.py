"""The same seed gives the same bits, whatever the global random state was."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from campaigns import subjects as s
from regraft import fuse, transfer
from regraft.core.guard import make_deterministic
from regraft.core.tensors import digest_tensors
from regraft.finetuning import fast
from regraft.finetuning.phases import Phase, fine_tune
from regraft.finetuning.recorder import Recorder
from regraft.training.loop import Diverged, train
from regraft_bench.rows import environment


def everything(noise: int) -> list:
    """Numbers of all three systems, from the same seeds; ``noise`` is what must not matter."""
    torch.manual_seed(noise)
    random.seed(noise)
    np.random.seed(noise)
    trained = train(s.MODEL, s.weights(1), s.dataset(), s.RECIPE, generator=s.seed(2))
    moved = transfer(s.MODEL, s.path(), trained.tensors, s.BATCHES, spec=s.spec(), validation=s.BATCHES)
    network = s.build(s.layers, s.seed(3))
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
        recipe = s.Recipe(epochs=3, lr=lr, batch_size=8, schedule="constant")
        train(s.MODEL, s.weights(1), s.dataset(), recipe, generator=s.seed())
    assert 0 <= caught.value.step < 6


def test_weights_that_are_not_finite_at_the_end_are_a_divergence():
    """The last loss was finite; the last update was not."""
    recipe = s.Recipe(epochs=1, lr=1e38, batch_size=16, momentum=0.0, weight_decay=1e10)
    with pytest.raises(Diverged, match=r"tensor '.*' of step 0") as caught:
        train(s.MODEL, s.weights(1), s.dataset(), recipe, generator=s.seed())
    assert caught.value.what.startswith("tensor")


def test_fine_tuning_that_diverges_says_when():
    network = s.build(s.layers, s.seed())
    found = fine_tune(network, network[-1], [Phase(1e30, 1e30)], s.BATCHES * 4, 8)
    assert found.diverged is not None and found.steps == found.diverged - 1
