"""Matching against its literal reference, and the properties that must hold whatever the numbers."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import regraft
from regraft.core.clock import Cost
from regraft.matching import kept
from regraft.matching.descent import Descent, colours
from regraft.matching.joint import JOINT_GAIN, JOINT_STEPS
from regraft.matching.kept import CORRECTIONS_BEFORE_REBUILD
from regraft.matching.stacks import Stacks
from regraft.reference import matching as reference


@pytest.fixture(autouse=True)
def _corrections(monkeypatch):
    """Similarities of these small networks are corrected as those of large ones are."""
    monkeypatch.setattr(kept, "SMALL_REBUILD", 0)


class Residual(nn.Module):
    """Width d everywhere: `mix` has one group on both of its axes, so that its objective is quadratic."""

    def __init__(self, d: int = 9, hidden: int = 7) -> None:
        super().__init__()
        self.enter = nn.Linear(5, d)
        self.mix = nn.Linear(d, d)
        self.up = nn.Linear(d, hidden)
        self.down = nn.Linear(hidden, d)
        self.leave = nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.enter(x))
        h = h + torch.tanh(self.mix(h))
        h = h + self.down(torch.relu(self.up(h)))
        return self.leave(h)


class Concatenated(nn.Module):
    """Two branches meet in one axis, and a flatten repeats every unit."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(2, 4, 3, padding=1)
        self.right = nn.Conv2d(2, 5, 1)
        self.norm = nn.BatchNorm2d(9)
        self.join = nn.Conv2d(9, 6, 3)
        self.leave = nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(torch.cat([self.left(x), self.right(x)], dim=1)))
        return self.leave(torch.relu(self.join(h)).flatten(1))


MODELS = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)),
        (2, 6),
    ),
    "residual": (Residual, (2, 5)),
    "concatenated": (Concatenated, (2, 2, 4, 4)),
}


@pytest.fixture(params=MODELS)
def spec(request) -> regraft.PermutationSpec:
    factory, shape = MODELS[request.param]
    return regraft.trace(factory(), (torch.zeros(shape),))


def normal(spec: regraft.PermutationSpec, seed: int, steps: int = 3) -> dict[str, Tensor]:
    """A stack of random tensors in float64 for every tensor with an axis."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: [sum(s.count * s.repeat for s in axis) for axis in axes] for name, axes in spec.axes.items()}
    return {
        name: torch.randn(steps, *shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
        if shape
    }


def unstack(stacks: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    steps = len(next(iter(stacks.values())))
    return [{name: stack[t] for name, stack in stacks.items()} for t in range(steps)]


def order(spec: regraft.PermutationSpec, names, generator=None) -> list[str]:
    return [group for members in colours(spec, frozenset(names), generator) for group in members]


@pytest.mark.parametrize("seed", range(4))
def test_the_fast_descent_finds_what_the_literal_one_finds(spec, seed):
    target, source = normal(spec, seed), normal(spec, seed + 100)
    perm, objectives = reference.coordinate_descent(spec, unstack(target), unstack(source), order(spec, target))
    found = regraft.match(spec, target, source)
    assert found.objective == pytest.approx(objectives[-1], rel=1e-9)
    for group in perm:
        assert torch.equal(found.perm[group], perm[group])


def test_small_similarities_are_built_anew_and_the_result_is_the_same(spec, monkeypatch):
    target, source = normal(spec, 5), normal(spec, 6)
    corrected = regraft.match(spec, target, source)
    monkeypatch.setattr(kept, "SMALL_REBUILD", 1 << 30)
    rebuilt = regraft.match(spec, target, source)
    assert rebuilt.objective == pytest.approx(corrected.objective, rel=1e-12)


def test_a_group_that_stands_twice_in_a_tensor_is_solved_until_it_rests():
    spec = regraft.trace(Residual(), (torch.zeros(2, 5),))
    for seed in range(8):
        target, source = ({"mix.weight": normal(spec, s)["mix.weight"]} for s in (seed, seed + 100))
        perm, objectives = reference.coordinate_descent(spec, unstack(target), unstack(source), order(spec, target))
        found = regraft.match(spec, target, source)
        assert found.objective == pytest.approx(objectives[-1], rel=1e-9)
        assert all(torch.equal(found.perm[group], perm[group]) for group in perm)


def test_the_reported_objective_is_the_true_one(spec):
    target, source = normal(spec, 1), normal(spec, 2)
    found = regraft.match(spec, target, source, generator=torch.Generator().manual_seed(3))
    true = reference.objective(spec, unstack(target), unstack(source), found.perm)
    assert found.objective == pytest.approx(true, rel=1e-9)


def test_the_objective_never_falls_and_the_last_sweep_changes_nothing(spec):
    for seed in range(5):
        target, source = normal(spec, seed), normal(spec, seed + 50)
        ends = regraft.match(spec, target, source)
        start = reference.objective(spec, unstack(target), unstack(source), spec.identity())
        cut = [regraft.match(spec, target, source, max_sweeps=k + 1) for k in range(ends.sweeps)]
        assert all(b >= a for a, b in pairwise([start, *(found.objective for found in cut)]))
        assert [found.sweeps for found in cut] == list(range(1, ends.sweeps + 1))
        again = regraft.match(spec, target, source, start=ends.perm)
        assert again.sweeps == 1 and again.objective == pytest.approx(ends.objective, rel=1e-12)


def test_it_is_not_below_the_best_of_five_random_orders_from_the_identity():
    """Not so for every small problem, but by far on average; and never below the start."""
    spec = regraft.trace(
        nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 4)),
        (torch.zeros(2, 60),),
    )
    ratios = []
    for seed in range(4):
        target, source = normal(spec, seed, 1), normal(spec, seed + 100, 1)
        generator = torch.Generator().manual_seed(seed)
        orders = [order(spec, target, generator) for _ in range(5)]
        pair = unstack(target), unstack(source)
        best = max(reference.coordinate_descent(spec, *pair, o, start=spec.identity())[1][-1] for o in orders)
        ratios.append(regraft.match(spec, target, source).objective / best)
    assert sum(ratios) / len(ratios) > 1.01


def test_it_is_never_below_the_identity(spec):
    """Placing by the tensors at the input alone would leave the identity, which is all but right here."""
    source = normal(spec, 1, 1)
    generator = torch.Generator().manual_seed(0)
    first = next(iter(source))
    for strength in (0.0, 0.1, 10.0):
        target = {n: t + strength * (n == first) * torch.randn(t.shape, generator=generator) for n, t in source.items()}
        start = reference.objective(spec, unstack(target), unstack(source), spec.identity())
        assert regraft.match(spec, target, source).objective >= start * (1 - 1e-12)


def test_the_placing_is_the_literal_one(spec):
    for seed in range(4):
        target, source = normal(spec, seed), normal(spec, seed + 100)
        placed = reference.place(spec, unstack(target), unstack(source))
        one, two = (regraft.match(spec, target, source, start=start) for start in (None, placed))
        assert one.objective == pytest.approx(two.objective, rel=1e-12)


def test_the_joint_start_is_the_literal_one(spec):
    for seed in range(3):
        target, source = normal(spec, seed), normal(spec, seed + 100)
        literal = reference.frank_wolfe(spec, unstack(target), unstack(source), JOINT_STEPS, JOINT_GAIN)
        one, two = (regraft.match(spec, target, source, start=start) for start in ("joint", literal))
        assert one.objective == pytest.approx(two.objective, rel=1e-9)
        assert all(torch.equal(one.perm[group], two.perm[group]) for group in spec.groups)


def test_the_joint_start_finds_the_better_optimum_where_networks_have_something_in_common():
    """As trained networks do: here a permuted copy beneath noise of six times its size."""
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 4))
    spec = regraft.trace(model, (torch.zeros(2, 20),))
    gains = []
    for seed in range(6):
        source = normal(spec, seed, 1)
        copy = regraft.apply(spec, spec.random(torch.Generator().manual_seed(seed)), source)
        noise = normal(spec, seed + 100, 1)
        target = {name: tensor + 6 * noise[name] for name, tensor in copy.items()}
        placed, joint = (regraft.match(spec, target, source, start=start) for start in ("placed", "joint"))
        gains.append(joint.objective / placed.objective - 1)
    assert sum(gains) / len(gains) > 0.005


def test_restarts_never_lower_the_objective_and_are_drawn_by_the_generator(spec):
    raised = 0
    for seed in range(4):
        target, source = normal(spec, seed), normal(spec, seed + 100)
        once, *several = (
            regraft.match(spec, target, source, restarts=k, generator=torch.Generator().manual_seed(seed))
            for k in (0, 6, 6)
        )
        true = reference.objective(spec, unstack(target), unstack(source), several[0].perm)
        assert several[0].objective == pytest.approx(true, rel=1e-9) and several[0].objective >= once.objective
        assert all(torch.equal(several[0].perm[group], several[1].perm[group]) for group in spec.groups)
        raised += several[0].objective > once.objective * (1 + 1e-9)
    assert raised, "another start never led to a better end"


@pytest.mark.filterwarnings("error")  # torch warns where a graph is recorded
def test_parameters_match_as_they_are_and_alone():
    """dict(model.named_parameters()): they require gradients, and the spec knows buffers beside them."""
    factory, shape = MODELS["concatenated"]
    models = factory(), factory()
    spec = regraft.trace(models[0], (torch.zeros(shape),))
    assert {"norm.running_mean"} <= spec.axes.keys()
    live, detached = (
        [{n: change(p) for n, p in model.named_parameters()} for model in models]
        for change in (lambda p: p, lambda p: p.detach())
    )
    found, expected = regraft.match(spec, *live), regraft.match(spec, *detached)
    assert found.objective == expected.objective
    assert all(torch.equal(found.perm[g], expected.perm[g]) for g in spec.groups)


def test_the_cost_is_the_sum_over_the_phases(spec):
    found = regraft.match(spec, normal(spec, 1), normal(spec, 2))
    assert found.seconds.keys() == {"similarity", "assignment", "objective"}
    assert found.cost == sum(found.seconds.values(), Cost())


@given(seed=st.integers(0, 1000), noise=st.sampled_from([0.0, 1e-3]))
@settings(deadline=None, max_examples=20)
def test_a_planted_permutation_is_found(seed, noise):
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    spec = regraft.trace(model, (torch.zeros(2, 20),))
    source = {name: t.float() for name, t in normal(spec, seed, 2).items()}
    planted = spec.random(torch.Generator().manual_seed(seed))
    target = regraft.apply(spec, planted, source)
    generator = torch.Generator().manual_seed(seed + 1)
    target = {name: t + noise * torch.randn(t.shape, generator=generator) for name, t in target.items()}
    found = regraft.match(spec, target, source)
    for group in planted:
        assert torch.equal(found.perm[group], planted[group])


def test_one_set_of_weights_is_a_stack_of_one(spec):
    target, source = normal(spec, 1, 1), normal(spec, 2, 1)
    stacked = regraft.match(spec, target, source)
    single = regraft.match(spec, unstack(target)[0], unstack(source)[0])
    assert single.objective == stacked.objective
    assert all(torch.equal(single.perm[g], stacked.perm[g]) for g in spec.groups)


def test_steps_are_matched_step_by_step_and_not_summed():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    spec = regraft.trace(model, (torch.zeros(2, 4),))
    source = {name: t.double() for name, t in normal(spec, 0, 2).items()}
    source = {name: torch.stack([t[0], -t[0]]) for name, t in source.items()}  # the sum over the steps is zero
    (group,) = spec.groups
    planted = {group: torch.tensor([2, 0, 1])}
    found = regraft.match(spec, regraft.apply(spec, planted, source), source)
    assert torch.equal(found.perm[group], planted[group])


def test_appending_steps_equals_matching_them_all_at_once(spec):
    """FGMT's way, with kept similarities and corrections, against a descent that begins anew on the same stacks."""
    target, source = normal(spec, 5, 6), normal(spec, 6, 6)
    like = {name: stack[0] for name, stack in target.items()}
    descent = Descent.over(Stacks.allocate(spec, like, 6))
    for s in range(6):
        start = dict(descent.perm) if s else None
        descent.stacks.append_({n: t[s] for n, t in target.items()}, {n: t[s] for n, t in source.items()})
        found = descent.descend_()
        anew = regraft.match(
            spec,
            {n: t[: s + 1] for n, t in target.items()},
            {n: t[: s + 1] for n, t in source.items()},
            start=start,
        )
        assert found.objective == pytest.approx(anew.objective, rel=1e-9)
        assert all(torch.equal(found.perm[g], anew.perm[g]) for g in spec.groups)


def test_rounding_does_not_pile_up_over_many_corrections():
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5))
    spec = regraft.trace(model, (torch.zeros(2, 30),))
    target = {n: t.float() for n, t in normal(spec, 1, 60).items()}
    source = {n: t.float() for n, t in normal(spec, 2, 60).items()}
    descent = Descent.over(Stacks.allocate(spec, {n: t[0] for n, t in target.items()}, 60))
    for s in range(60):
        descent.stacks.append_({n: t[s] for n, t in target.items()}, {n: t[s] for n, t in source.items()})
        found = descent.descend_()
    true = reference.objective(spec, unstack(target), unstack(source), found.perm)
    assert found.objective == pytest.approx(true, rel=1e-5)
    assert any(cached.corrections for cached in descent.kept.entries.values())
    for group, cached in descent.kept.entries.items():
        exact = reference.similarity(spec, group, unstack(target), unstack(source), found.perm)
        error = (cached.similarity.double() - exact).abs().max() / exact.abs().max()
        assert error < 1e-5


def test_dead_units_are_ties_and_the_objective_decides(spec):
    target, source = normal(spec, 1), normal(spec, 2)
    group = next(iter(spec.groups))
    for name, axis in spec.tensors_of(group):
        dead = spec.positions(name, axis, group)[:3].reshape(-1)
        target[name].index_fill_(axis + 1, dead, 0.0)
        source[name].index_fill_(axis + 1, dead, 0.0)
    _, objectives = reference.coordinate_descent(spec, unstack(target), unstack(source), order(spec, target))
    assert regraft.match(spec, target, source).objective == pytest.approx(objectives[-1], rel=1e-9)


def test_colours_share_no_tensor(spec):
    names = frozenset(spec.axes)
    for members in colours(spec, names, torch.Generator().manual_seed(0)):
        seen = [name for group in members for name in {n for n, _ in spec.tensors_of(group)}]
        assert len(seen) == len(set(seen))
    assert sorted(order(spec, names)) == sorted(spec.groups)


def test_the_seed_decides_the_order(spec):
    target, source = normal(spec, 1), normal(spec, 2)
    one, two = (regraft.match(spec, target, source, generator=torch.Generator().manual_seed(9)) for _ in range(2))
    assert one.objective == two.objective
    assert all(torch.equal(one.perm[g], two.perm[g]) for g in spec.groups)


def test_the_generator_draws_the_order_of_the_groups():
    layers = [nn.Linear(8, 8) for _ in range(6)]
    spec = regraft.trace(
        nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU()))), (torch.zeros(2, 8),)
    )
    target, source = normal(spec, 1), normal(spec, 2)
    orders = {tuple(order(spec, target, torch.Generator().manual_seed(seed))) for seed in range(8)}
    assert len(orders) > 4 and len({frozenset(names) for names in orders}) == 1
    ends = {
        regraft.match(spec, target, source, start=spec.identity(), generator=torch.Generator().manual_seed(s)).objective
        for s in range(8)
    }
    assert len(ends) > 1, "where a descent ends depends on the order"


@pytest.mark.parametrize(
    ("dtype", "corrections", "rebuilt"),
    [
        (torch.float32, CORRECTIONS_BEFORE_REBUILD, True),
        (torch.float32, CORRECTIONS_BEFORE_REBUILD - 1, False),
        (torch.float64, CORRECTIONS_BEFORE_REBUILD, False),
    ],
)
def test_a_similarity_is_built_anew_after_many_corrections(dtype, corrections, rebuilt):
    """Whether an error that was planted in the kept similarity is still there after the next step."""
    spec = regraft.trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (torch.zeros(2, 6),))
    target, source = ({n: t.to(dtype) for n, t in normal(spec, seed, 4).items()} for seed in (1, 2))
    descent = Descent.over(Stacks.allocate(spec, {n: t[0] for n, t in target.items()}, 4))
    for step in range(4):
        descent.stacks.append_({n: t[step] for n, t in target.items()}, {n: t[step] for n, t in source.items()})
        result = descent.descend_()
        ((group, cached),) = descent.kept.entries.items()
        if step == 2:
            cached.similarity += 1000
            cached.corrections = corrections
    exact = reference.similarity(spec, group, unstack(target), unstack(source), result.perm)
    error = float((descent.kept.entries[group].similarity.double() - exact).abs().max())
    assert error == pytest.approx(0 if rebuilt else 1000, abs=0.01)


def test_inputs_are_left_alone(spec):
    target, source = normal(spec, 1), normal(spec, 2)
    before = {name: (target[name].clone(), source[name].clone()) for name in target}
    regraft.match(spec, target, source)
    assert all(torch.equal(target[n], a) and torch.equal(source[n], b) for n, (a, b) in before.items())


def both(target, source, change) -> None:
    target.update(change(target))
    source.update(change(source))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, s: s.pop("0.bias"), "'0.bias'"),
        (lambda t, s: s.update({"0.weight": s["0.weight"].float()}), "'0.weight': dtype"),
        (lambda t, s: s.update({"0.weight": s["0.weight"][:, :, :-1]}), "'0.weight': shape"),
        (lambda t, s: both(t, s, lambda x: {"2.bias": x["2.bias"][:, :4]}), "'2.bias' has shape"),
        (lambda t, s: both(t, s, lambda x: {"2.bias": x["2.bias"][:2]}), "'2.bias' has 2 steps"),
        (lambda t, s: both(t, s, lambda x: {"9.bias": x["2.bias"]}), "no tensor '9.bias'"),
        (lambda t, s: both(t, s, lambda x: {n: v[:0] for n, v in x.items()}), "zero steps"),
        (lambda t, s: t["2.weight"][1, 2].fill_(float("nan")), "'2.weight' of the target"),
        (lambda t, s: s["2.bias"][0].fill_(float("inf")), "'2.bias' of the source"),
    ],
)
def test_bad_input_is_named(change, message):
    factory, shape = MODELS["mlp"]
    spec = regraft.trace(factory(), (torch.zeros(shape),))
    target, source = normal(spec, 1), normal(spec, 2)
    change(target, source)
    with pytest.raises(ValueError, match=message):
        regraft.match(spec, target, source)


def test_a_start_must_be_a_permutation():
    factory, shape = MODELS["mlp"]
    spec = regraft.trace(factory(), (torch.zeros(shape),))
    start = spec.identity()
    group = next(iter(start))
    start[group] = torch.zeros_like(start[group])
    with pytest.raises(ValueError, match=group):
        regraft.match(spec, normal(spec, 1), normal(spec, 2), start=start)
