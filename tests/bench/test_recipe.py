"""What the studies' methods do to a network, by hand: rates, shares, strengths, modes, and which batches they see."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regraft.core.clock import Clock
from regraft.finetuning.fast import NoGain, adopt
from regraft.finetuning.phases import Phase
from regraft.training.loop import Recipe
from regraft_bench.fast.methods import (
    Imprint,
    TowardsStart,
    probe_first,
    together,
    warm_up,
    warm_up_with_statistics,
)
from regraft_bench.fusion import continual, two_tasks
from regraft_bench.fusion.settings import Regime, TwoTasks
from regraft_bench.study import Method, RunPaths, Scenario, Task
from regraft_bench.transfer.methods.peers import warm_start
from regraft_bench.transfer.setting import TransferSetting

from .test_splits import TRANSFER

ONCE = Recipe(1, lr=0.1)
DIGITS = replace(TRANSFER, task=Task("digits"), arguments={"num_classes": 10}, recipe=ONCE, subsequent=ONCE)


def transfer_setting(folder, methods=(), **changes) -> TransferSetting:
    return TransferSetting(Scenario("toy", methods, replace(DIGITS, **changes)), 0, RunPaths(cache=folder))


def test_what_follows_two_transfers_sees_the_same_batches(tmp_path):
    methods = tuple(Method(name, warm_start) for name in ("one", "another"))
    setting, finals = transfer_setting(tmp_path, methods), []
    for setting.method in methods:
        measured = setting.method.run(setting)
        finals.append((measured.values["final"], measured.series["subsequent"]))
    assert finals[0] == finals[1]
    start, data = setting.target_start, setting.data
    orders = [setting.train("plain", setting.model, start, data, ONCE, order=o).tensors for o in "ab"]
    assert any(not torch.equal(orders[0][name], tensor) for name, tensor in orders[1].items())


def test_the_initial_scale_is_of_weights_alone(tmp_path):
    plain, scaled = (transfer_setting(tmp_path, init_scale=scale) for scale in (1.0, 4.0))
    for before, after in (
        (plain.target_start, scaled.target_start),
        (plain.source_start, scaled.source_start),
    ):
        for name, tensor in before.items():
            assert torch.equal(after[name], (4 if tensor.dim() > 1 else 1) * tensor), name


def test_phases_of_fine_tuning():
    assert together(0.3, 0.01) == (Phase(0.3, 0.01),)
    assert probe_first(0.3, 0.01) == (Phase(0.3, None, statistics=False, share=0.25), Phase(0.01, 0.01))
    for plan, statistics in ((warm_up, False), (warm_up_with_statistics, True)):
        assert plan(0.3, 0.01) == (Phase(0.3, None, statistics, until=NoGain), Phase(0.3, 0.01))


def test_l2_sp_adds_its_strength_times_the_distance_to_the_features_gradient():
    body, head = (nn.Parameter(torch.ones(1)) for _ in range(2))
    groups = [{"params": [p], "lr": 0.1, "name": n} for p, n in ((body, "body"), (head, "head"))]
    optimiser = TowardsStart(0.3)(groups)
    for parameter in (body, head):
        parameter.data.fill_(3.0)
        parameter.grad = torch.tensor([0.5])
    optimiser.step()
    assert float(body.detach()) == pytest.approx(3 - 0.1 * (0.5 + 0.3 * (3 - 1)))
    assert float(head.detach()) == pytest.approx(3 - 0.1 * 0.5)


def test_imprinting_takes_features_in_evaluation_mode():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).train()
    model[1].running_mean.copy_(torch.randn(5, generator=generator))
    adopted = adopt(model, 3)
    batches = [(torch.randn(9, 4, generator=generator), torch.arange(9) % 3) for _ in range(4)]
    Imprint(2)(model, adopted, SimpleNamespace(batches=lambda: batches))
    images, labels = (torch.cat(parts) for parts in zip(*batches[:2], strict=True))
    with torch.no_grad():
        features = model[:3].eval()(images)
    means = torch.stack([features[labels == label].mean(0) for label in range(3)])
    torch.testing.assert_close(adopted.head.weight.detach(), F.normalize(means, dim=1))


def test_ewc_learns_task_b_from_task_a_at_a_fifth_of_the_rate(monkeypatch):
    recipe, theta_a = Recipe(3, lr=0.5), {"w": torch.ones(2)}
    settings = TwoTasks(Task("first"), Task("second"), (), (), "mlp", Regime(recipe, recipe, recipe))
    calls = []

    def train_from(purpose, start, task, scale, recipe, penalty):
        calls.append((start, task, recipe, penalty.anchor, penalty.strength))
        return SimpleNamespace(cost=Clock().cost, tensors=start)

    monkeypatch.setattr(continual, "find_importance", lambda setting, task, tensors, clock: tensors)
    monkeypatch.setattr(continual, "_measure_network", lambda *_: None)
    continual.consolidate(7.0, SimpleNamespace(settings=settings, theta_a=theta_a, train_from=train_from))
    assert calls == [(theta_a, Task("second"), replace(recipe, lr=0.1), theta_a, 7.0)]


def test_ties_keeps_the_largest_fifth_of_each_gradient_and_elects_signs():
    first = torch.tensor([[5.0, -4, 3, 3, 3, 2, 2, 1, 1, 1]])
    second = torch.tensor([[3.0, 6, 1, 1, 1, 1, 1, 1, 1, -2]])  # keeps 3 and 6
    gradients = ({"weight": first}, {"weight": second})
    setting = SimpleNamespace(device="cpu", model=nn.Linear(10, 1, bias=False), gradients=gradients)
    merged = two_tasks._elect_signs(setting, Clock())["weight"]
    assert merged.tolist() == [[4.0, 6.0, 0, 0, 0, 0, 0, 0, 0, 0]]
