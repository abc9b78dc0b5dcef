"""A fine-tune on a new base: what a port must do to a base that is known, and what its rows say."""

from dataclasses import replace

import pytest
import torch

from regraft.core.clock import Clock
from regraft.data import DIGITS_HIGH, DIGITS_LOW
from regraft.networks import papers as networks
from regraft.symmetry import apply
from regraft.training.loop import Recipe
from regraft_bench.run import run
from regraft_bench.study import TUNING_SEED, RunPaths, Scenario, Task
from regraft_bench.transfer import STUDY
from regraft_bench.transfer.methods import ports
from regraft_bench.transfer.pages import PORT_QUESTIONS, compare_ports, list_ports
from regraft_bench.transfer.setting import PortSettings, Pretraining, TransferSetting

RECIPE = Recipe(epochs=1, lr=0.05)
TINY = PortSettings(
    task=Task("digits", DIGITS_HIGH),
    model=networks.residual8,
    arguments={"num_classes": 5, "width": 0.0625, "in_channels": 1},
    recipe=RECIPE,
    subsequent=None,
    steps=2,
    schedule="uniform",
    bn_batches=5,
    pretraining=Pretraining(Task("digits", DIGITS_LOW), RECIPE),
    images=(2,),
    alphas=(0.0, 1.0),
)
SCENARIO = Scenario("port-tiny", ports.port_methods((0.01, 0.05)), TINY, seeds=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return RunPaths(cache=tmp_path_factory.mktemp("ports"))


@pytest.fixture(scope="module")
def rows(place):
    return list(run(STUDY, [SCENARIO], place=place, rows=place.cache / "rows.jsonl"))


def setting(place: RunPaths, **changes) -> TransferSetting:
    return TransferSetting(replace(SCENARIO, settings=replace(TINY, **changes)), 0, place)


def alike(one: dict, other: dict, names) -> bool:
    return all(torch.allclose(one[name], other[name], atol=1e-6) for name in names)


def test_every_method_says_what_it_comes_to(rows):
    assert not [row.failure for row in rows if row.failure]
    reported = [row for row in rows if row.seed != TUNING_SEED]
    assert {row.method for row in reported} == {method.name for method in SCENARIO.methods}
    for row in reported:
        accuracies = dict(row.series["accuracy by images"].points())
        assert accuracies == {count: row.values[ports.metric_name(count)] for count in TINY.images}
        assert all(0 <= value <= 1 for value in accuracies.values())
    tuning = [row for row in rows if row.seed == TUNING_SEED]
    assert len(tuning) == 6 and all(set(row.values) == {"validation"} for row in tuning)
    (sheet,) = list_ports(reported)
    assert len(sheet.lines) == len(SCENARIO.methods)
    (sheet,) = compare_ports(reported)
    assert len(sheet.lines) == len(PORT_QUESTIONS) and all(line[1] == "2" for line in sheet.lines)


@pytest.mark.parametrize("find", [ports.leave_in_place, ports.match_base_weights, ports.match_gradients])
def test_on_its_own_base_a_port_is_the_fine_tune(place, find):
    own = setting(place, alphas=(1.0,))
    own.target_start = own.source_start
    names = dict(own.model.named_parameters())
    moved = ports.add_task_vector(find, ports.full_task_vector, own, ports.few_shot_data(own, 4), Clock())
    assert alike(moved, ports.fine_tune_base(own).tensors, names)


def test_on_a_permuted_base_it_is_the_permuted_fine_tune(place):
    own = setting(place, alphas=(1.0,))
    spec = own.spec
    perm = spec.random(torch.Generator().manual_seed(1))
    own.target_start = apply(spec, perm, own.source_start)
    wanted = apply(spec, perm, ports.fine_tune_base(own).tensors)
    names = dict(own.model.named_parameters())
    seen = ports.few_shot_data(own, 4)
    assert alike(
        ports.add_task_vector(ports.match_base_weights, ports.full_task_vector, own, seen, Clock()),
        wanted,
        names,
    )
    assert not alike(
        ports.add_task_vector(ports.leave_in_place, ports.full_task_vector, own, seen, Clock()), wanted, names
    )


def test_the_command_moves_what_the_method_moves(place):
    """On a permuted base: from files without heads, back with the permuted fine-tune's."""
    own = setting(place, steps=1)
    spec = own.spec
    own.target_start = apply(spec, spec.random(torch.Generator().manual_seed(1)), own.source_start)
    clock, seen = Clock(), ports.few_shot_data(own, 4)
    result = ports.port_by_command(own, seen, clock)
    perm = ports.match_gradients(own, seen, Clock())
    wanted = ports.new_base(own)
    start, end = (apply(spec, perm, theta) for theta in (ports.base(own), ports.fine_tune_base(own).tensors))
    names = [name for name, _ in own.model.named_parameters()]
    assert alike(result, {n: wanted[n] + end[n] - start[n] for n in names}, names)
    assert set(result) == set(wanted) and clock.seconds["gradients"].cpu > 0


def test_the_mask_keeps_a_part_and_the_head_whole(place):
    own = setting(place, alphas=(1.0,))
    seen, start = ports.few_shot_data(own, 4), ports.new_base(own)
    whole, part, none = (
        ports.add_task_vector(ports.leave_in_place, keep, own, seen, Clock())
        for keep in (ports.full_task_vector, ports.keep_by_majority, ports.head_only)
    )
    head = ports.head_names(own.model)
    for name, _ in own.model.named_parameters():
        if name in head:
            assert torch.equal(part[name], whole[name]) and torch.equal(part[name], none[name])
        else:
            kept = part[name] != start[name]
            assert torch.equal(part[name][kept], whole[name][kept])
            assert torch.equal(none[name], start[name])
    moved = [n for n, _ in own.model.named_parameters() if n not in head]
    shares = torch.cat([(part[n] != start[n]).flatten() for n in moved]).float().mean()
    assert 0.1 < shares < 0.9


def test_few_images_are_nested_and_no_others_are_seen(place):
    own = setting(place)
    one, four = ({tuple(x.flatten().tolist()) for x in ports.few_shot_data(own, n).split.images} for n in (1, 4))
    assert len(one) == 5 and len(four) == 20 and one <= four
    stream = ports.few_shot_data(own, 4).stream()
    passes = [next(stream)[1] for _ in range(3)]
    assert all(labels.bincount().tolist() == [4] * 5 for labels in passes)
    assert not all(torch.equal(passes[0], labels) for labels in passes)
    judged = ports.eval_batches(own)
    assert sum(len(labels) for _, labels in judged) <= len(own.data.test)
