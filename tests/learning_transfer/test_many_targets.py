"""One training, many targets: what each gets is what it would get alone."""

import pytest
import torch
from test_learning_transfer import fresh, mlp, normalised, sample, values
from torch import nn

import regraft
from regraft.learning_transfer.driver import transfer, transfer_to_many
from regraft.symmetry import apply

STEPS, TARGETS = 3, 3


def flattened() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()


def path(model: nn.Module) -> regraft.Trajectory:
    return regraft.Trajectory.linear(fresh(model, 0), fresh(model, 1), steps=STEPS)


@pytest.mark.parametrize("factory", [mlp, normalised, flattened])
def test_each_target_gets_what_it_gets_alone(factory):
    model, batches = factory(), sample(3, STEPS)
    starts = [fresh(model, 10 + number) for number in range(TARGETS)]
    many = transfer_to_many(model, path(model), starts, batches)
    assert many.gradients == STEPS * (1 + TARGETS)
    for number, start in enumerate(starts):
        alone = transfer(model, path(model), start, batches)
        for group, index in alone.perm.items():
            assert torch.equal(many.perms[number][group], index)
        for name, tensor in alone.params.items():
            torch.testing.assert_close(many.target(number)[name], tensor)


def test_permuted_targets_get_the_permuted_end():
    model = mlp()
    spec = regraft.trace(model, sample(3, 1)[0][0])
    start, line = fresh(model, 0), path(model)
    perms = [spec.random(torch.Generator().manual_seed(seed)) for seed in range(TARGETS)]
    many = regraft.transfer_to_many(
        model, line, [apply(spec, perm, start) for perm in perms], sample(4, STEPS), spec=spec
    )
    for number, perm in enumerate(perms):
        for name, tensor in apply(spec, perm, line.end).items():
            torch.testing.assert_close(many.target(number)[name], tensor)


def test_what_does_not_fit_is_named_with_its_target():
    model = mlp()
    with pytest.raises(ValueError, match="there is no target"):
        transfer_to_many(model, path(model), [], sample(3, 1))
    good, bad = values(model), values(model)
    bad["1.weight"] = bad["1.weight"][:3]
    with pytest.raises(ValueError, match=r"target 1: tensor '1.weight': shape \(3, 36\)"):
        transfer_to_many(model, path(model), [good, bad], sample(3, 1))
    with pytest.raises(ValueError, match="no batch"):
        transfer_to_many(model, path(model), [good], [])
