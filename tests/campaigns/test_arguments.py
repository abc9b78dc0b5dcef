"""Arguments of another kind for every public function: one sentence that names the argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regraft
from campaigns import subjects as s
from regraft.core.arguments import WrongArgument
from regraft.data import load
from regraft.finetuning import fast
from regraft.fusion.grids import evaluate
from regraft.training.evaluation import accuracy, loss_and_accuracy
from regraft.training.gradients import gradients
from regraft.training.landscape import interpolate
from regraft.training.loop import Recipe, train
from regraft.training.statistics import reset_batchnorm

pytestmark = pytest.mark.filterwarnings("ignore")
Arguments = dict[str, Any]

NO_WHOLE_NUMBER = (
    None, "3", 2.5, [3], math.nan, -1, torch.tensor([1, 2]), torch.tensor(1.5), 1j, True, 10**9, 10**20,
)  # fmt: skip
NO_NUMBER = (None, "1", [1.0], math.nan, math.inf, -math.inf, torch.ones(2), 1j)
NO_MODEL = (None, "mlp", nn.Linear, {}, 3)
NO_TENSORS = (None, "start", 3, [], [3], math.nan, {"1.weight": [1.0]}, {"1.weight": 3})
NO_BATCHES = (None, 3, math.nan, "batches")
NO_FUNCTION = (None, "cross_entropy", 3)
NO_SPEC = ("spec.json", 3, {}, [])


def given() -> dict[str, tuple[Callable[..., object], Arguments]]:
    """Functions by name, with arguments of which all are right."""
    weights, spec = s.weights(1), s.spec()
    evaluated = {"model": s.MODEL, "tensors": weights, "batches": s.BATCHES}
    transferred = {"model": s.MODEL, "path": s.path(), "batches": s.BATCHES, "spec": spec}
    return {
        "transfer": (regraft.transfer, transferred | {"target_start": s.weights(3)}),
        "transfer_to_many": (regraft.transfer_to_many, transferred | {"target_starts": [s.weights(3)]}),
        "linear": (regraft.Trajectory.linear, {"start": weights, "end": s.weights(2)}),
        "recorded": (regraft.Trajectory.recorded, {}),
        "trace": (regraft.trace, {"model": s.MODEL, "example_inputs": s.IMAGES[:2]}),
        "verify": (regraft.verify, {"spec": spec, "model": s.MODEL, "example_inputs": s.IMAGES[:2]}),
        "match": (regraft.match, {"spec": spec, "target": weights, "source": s.weights(2)}),
        "apply": (regraft.apply, {"spec": spec, "perm": spec.identity(), "tensors": weights}),
        "inverse": (regraft.inverse, {}),
        "with_output": (regraft.with_output, {"output": 0}),
        "fuse": (regraft.fuse, {"models": [weights], "coefficients": [1.0]}),
        "assign_gradient": (regraft.assign_gradient, {"target": weights, "gradient": weights, "alpha": 1.0}),
        "evaluate": (
            evaluate,
            {
                "model": s.MODEL,
                "sources": [weights],
                "coefficients": [[1.0]],
                "images": s.IMAGES,
                "labels": s.LABELS,
            },
        ),
        "accuracy": (accuracy, evaluated),
        "loss_and_accuracy": (loss_and_accuracy, evaluated),
        "gradients": (gradients, evaluated),
        "reset_batchnorm": (reset_batchnorm, evaluated),
        "interpolate": (interpolate, {"model": s.MODEL, "a": weights, "b": weights, "batches": s.BATCHES}),
        "majority": (regraft.gradfix.majority, {"model": s.MODEL, "theta": weights, "batches": s.BATCHES}),
        "transport": (
            regraft.gradfix.transport,
            {"model": s.MODEL, "new_base": weights, "task_vector": {}, "batches": s.BATCHES},
        ),
        "port": (
            regraft.port,
            dict.fromkeys(("base", "tuned", "new_base", "out"), "nowhere") | {"method": "naive"},
        ),
        "Recipe": (Recipe, {"epochs": 1, "lr": 0.1}),
        "train": (
            train,
            {
                "model": s.MODEL,
                "start": weights,
                "data": s.dataset(),
                "recipe": s.RECIPE,
                "generator": s.seed(),
            },
        ),
        "load": (load, {"name": "digits"}),
        "class_means": (
            fast.class_means,
            {"features": s.IMAGES.flatten(1), "labels": s.LABELS, "num_classes": 3},
        ),
        "param_groups": (fast.param_groups, {"model": s.MODEL}),
    }


WRONG: dict[str, dict[str, tuple[Any, ...]]] = {
    "transfer": {
        "model": NO_MODEL, "path": (None, [], {}, "path", 3), "target_start": NO_TENSORS, "batches": NO_BATCHES,
        "method": (None, 3, ["fgmt"]), "loss": NO_FUNCTION, "spec": NO_SPEC, "validation": NO_BATCHES[1:],
        "generator": (3, "seed"), "backend": (None, 3), "on_step": (3, "print"), "target_end": NO_TENSORS[1:],
        "gradient_batches": (*NO_WHOLE_NUMBER, 0), "bn_batches": NO_WHOLE_NUMBER,
    },
    "transfer_to_many": {
        "target_starts": (None, 3, "starts", {}, [3], [None]), "gradient_batches": (*NO_WHOLE_NUMBER, 0),
        "bn_batches": NO_WHOLE_NUMBER,
    },
    "linear": {"start": NO_TENSORS, "end": NO_TENSORS, "steps": (*NO_WHOLE_NUMBER, 0), "schedule": (None, 3)},
    "recorded": {"checkpoints": (None, 3, "text", {}, [3, 3], math.nan)},
    "trace": {"model": NO_MODEL, "forward": (3,)},
    "verify": {"spec": NO_SPEC, "model": NO_MODEL, "draws": NO_WHOLE_NUMBER, "generator": (3,)},
    "match": {"spec": NO_SPEC, "target": NO_TENSORS, "source": NO_TENSORS, "max_sweeps": NO_WHOLE_NUMBER},
    "apply": {"spec": NO_SPEC, "perm": (None, 3, "text", [], {"1": 3}), "tensors": (None, 3, "text", [])},
    "inverse": {"perm": (None, 3, "text", [], [3], {"w": 3}, math.nan)},
    "with_output": {"model": NO_MODEL, "output": (None, 1.5, [])},
    "fuse": {
        "models": (None, 3, "text", {}, [3], [None]), "finish": (3, "reset"),
        "coefficients": (None, 2.5, "1", {}, ["1"], [None], [1j], [[1.0]]),
    },
    "assign_gradient": {"alpha": (None, "1", [1.0])},
    "evaluate": {
        "sources": (None, [3]), "coefficients": (None, 3, "text"), "images": (None, 3), "labels": (None, [1], "labels"),
        "batch_size": NO_WHOLE_NUMBER,
    },
    "accuracy": {"model": NO_MODEL, "tensors": NO_TENSORS, "batches": NO_BATCHES},
    "loss_and_accuracy": {"batches": NO_BATCHES, "loss": NO_FUNCTION},
    "gradients": {"tensors": NO_TENSORS, "batches": NO_BATCHES, "loss": NO_FUNCTION, "generator": (3,)},
    "reset_batchnorm": {"batches": NO_BATCHES, "limit": (*NO_WHOLE_NUMBER[1:], 0)},
    "interpolate": {"a": NO_TENSORS, "batches": NO_BATCHES, "points": (None, 2.5, "3", True, 1, 10**9)},
    "majority": {"model": NO_MODEL, "theta": NO_TENSORS, "batches": NO_BATCHES, "loss": NO_FUNCTION},
    "transport": {"alpha": NO_NUMBER, "task_vector": NO_TENSORS, "direction": (None, "majority")},
    "port": {"steps": (*NO_WHOLE_NUMBER[1:], 0), "method": (None, 3, [])},
    "Recipe": {
        "epochs": NO_WHOLE_NUMBER, "batch_size": (*NO_WHOLE_NUMBER, 0), "lr": NO_NUMBER, "momentum": NO_NUMBER,
        "schedule": (None, 3, []), "optimizer": (None, 3),
    },
    "train": {"model": NO_MODEL, "start": NO_TENSORS, "data": (None, []), "recipe": (None, {}), "generator": (None, 3)},
    "load": {"name": (None, 3), "seed": (None, "1"), "validation": (None, ".1"), "image_size": (2.5, "8", 0)},
    "class_means": {"features": (None, [1.0]), "labels": (None, [1]), "num_classes": NO_WHOLE_NUMBER},
    "param_groups": {"model": NO_MODEL, "head_lr": ("1", [1.0]), "head": (3,)},
}  # fmt: skip


@pytest.mark.parametrize("function", WRONG)
def test_arguments_of_another_kind(refuse, function):
    call, right = given()[function]
    for name, values in WRONG[function].items():
        for value in values:
            arguments = right | {name: value}
            refuse(f"{function}({name}={value!r})", lambda of=arguments: call(**of), (name, "1.weight"))


def test_a_wrong_argument_is_both_of_pythons_errors_on_one_line():
    with pytest.raises(WrongArgument) as caught:
        regraft.fuse([{"w": torch.ones(2)}], [torch.ones(2)])
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, TypeError)
    assert str(caught.value) == "coefficients[0] must be a number, not a tensor of shape [2]"


KINDS: dict[str, Callable[[], Tensor]] = {
    "sparse": lambda: torch.eye(8).to_sparse(),
    "sparse rows": lambda: torch.eye(8).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.eye(8), 0.1, 0, torch.qint8),
    "meta": lambda: torch.eye(8, device="meta"),
    "no shape": lambda: nn.LazyLinear(8).weight,
}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_without_plain_values(refuse, kind):
    value = KINDS[kind]()
    for function, name in (("fuse", "models"), ("accuracy", "tensors"), ("linear", "start")):
        call, right = given()[function]
        odd = {"w": value}
        arguments = right | {name: [odd] if name == "models" else odd}
        refuse(f"{function} of {kind}", lambda call=call, of=arguments: call(**of), ("['w'] is a",))


def test_numbers_of_other_libraries_are_numbers():
    numpy = pytest.importorskip("numpy")
    path = regraft.Trajectory.linear(s.weights(1), s.weights(2), numpy.int64(2))
    assert path.steps == 2 and regraft.Trajectory.linear(s.weights(1), s.weights(2), torch.tensor(2)).steps == 2
    whole = regraft.fuse([s.weights(1)], numpy.array([1.0]))
    for row in ([torch.tensor(1.0)], torch.ones(1), (numpy.float32(1),), [1]):
        assert all(torch.equal(value, whole[name]) for name, value in regraft.fuse([s.weights(1)], row).items())
