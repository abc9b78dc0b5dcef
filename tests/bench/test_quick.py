"""The quick scenarios of each study notice an accuracy that is computed in training mode."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from regraft.finetuning import recorder
from regraft.training import evaluation
from regraft_bench.run import run
from regraft_bench.studies import study
from regraft_bench.tracking.compare import Limits, find_changes


@contextmanager
def in_training_mode(model, **how):
    was = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was)


@pytest.mark.parametrize(("name", "method"), [("transfer", "plain"), ("fusion", "ensemble"), ("fast", "plain")])
def test_an_accuracy_in_training_mode_is_found(name, method, place, tmp_path, monkeypatch):
    one = study(name)
    scenario = one.select(one.quick)[-1]
    scenario = replace(scenario, methods=(scenario.method(method),))

    def measure(file: str):
        folder = replace(place, cache=place.cache / file)
        return list(run(one, [scenario], place=folder, rows=tmp_path / file, seeds=[0]))

    before = measure("before")
    for module in (evaluation, recorder):
        monkeypatch.setattr(module, "evaluating", in_training_mode)
    beyond = filter(Limits().is_exceeded_by, find_changes(before, measure("after"), one_machine=True))
    assert "error" in {change.quantity for change in beyond}
