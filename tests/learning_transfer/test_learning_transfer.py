"""Learning transfer: the fast path against the algorithms' literal form, and what must hold by symmetry."""

import copy
import math
from dataclasses import replace
from itertools import cycle, islice

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import regraft
from regraft.core.clock import EVALUATION, Cost
from regraft.learning_transfer import work as work_module
from regraft.learning_transfer.methods import TRANSFER_METHODS
from regraft.matching.descent import colours
from regraft.matching.stacks import Stacks
from regraft.reference import learning_transfer as reference
from regraft.training.evaluation import accuracy
from regraft.training.statistics import reset_batchnorm

STEPS = 4


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 5, 3)
        self.leave = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x)))
        return self.leave(torch.relu(self.deep(h)).mean((2, 3)))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3)
    ).double()


def normalised() -> nn.Module:
    return Normalised().double()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def fresh(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(t.shape, generator=generator, dtype=t.dtype) / t[0].numel() ** 0.5 if t.dim() > 1 else t
        for n, t in values(model).items()
    }


def sample(seed: int, count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(16, 1, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(3, (16,), generator=generator),
        )
        for _ in range(count)
    ]


def learned(model: nn.Module, start: dict[str, Tensor], seed: int = 9) -> dict[str, Tensor]:
    """A few real steps of gradient descent."""
    theta = dict(start)
    for batch in islice(cycle(sample(seed, 3)), 12):
        g = reference.mean_gradient(model, theta, [batch])
        theta = {n: t - 0.3 * g[n] if n in g else t for n, t in theta.items()}
    return theta


def setting(factory=mlp, steps: int = STEPS):
    model = factory()
    source, target = fresh(model, 1), fresh(model, 2)
    path = regraft.Trajectory.linear(source, learned(model, source), steps, "cosine")
    spec = regraft.trace(model, (torch.zeros(2, 1, 6, 6, dtype=torch.float64),))
    return model, spec, path, target


def order(spec, model) -> list[str]:
    names = frozenset(name for name, _ in model.named_parameters())
    return [group for members in colours(spec, names) for group in members]


def close(a: dict[str, Tensor], b: dict[str, Tensor], but: str = "num_batches") -> None:
    for name in a:
        if but not in name:
            torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("factory", [mlp, normalised])
def test_fgmt_is_algorithm_2(factory):
    model, spec, path, target = setting(factory)
    batches = sample(3, STEPS)
    theta, perms = reference.algorithm_2(model, spec, list(path), target, [[b] for b in batches], order(spec, model))
    found = regraft.transfer(model, path, target, batches, "fgmt", spec=spec, bn_batches=0)
    for a, b in zip(perms, found.perms[1:], strict=True):
        assert all(torch.equal(a[group], b[group]) for group in spec.groups)
    close(theta[-1], found.params)


@pytest.mark.parametrize("factory", [mlp, normalised])
def test_gmt_is_algorithm_1(factory):
    model, spec, path, target = setting(factory)
    batches = sample(3, STEPS * (STEPS + 1))
    flat = iter(batches)
    nested = [[[next(flat), next(flat)] for _ in range(s)] for s in range(1, STEPS + 1)]
    theta, perms = reference.algorithm_1(model, spec, list(path), target, nested, order(spec, model))
    found = regraft.transfer(model, path, target, batches, "gmt", spec=spec, gradient_batches=2, bn_batches=0)
    for a, b in zip(perms, found.perms[1:], strict=True):
        assert all(torch.equal(a[group], b[group]) for group in spec.groups)
    close(theta[-1], found.params)


def test_a_recorded_path_is_followed_point_by_point():
    model, spec, path, target = setting()
    bent = [dict(theta) for theta in path]
    bent[2] = {n: t + 0.05 * torch.sin(torch.arange(t.numel()).double()).view(t.shape) for n, t in bent[2].items()}
    batches = sample(3, STEPS)
    theta, _ = reference.algorithm_2(model, spec, bent, target, [[b] for b in batches], order(spec, model))
    found = regraft.transfer(model, regraft.Trajectory.recorded(bent), target, batches, "fgmt", spec=spec)
    close(theta[-1], found.params)


@pytest.mark.parametrize("factory", [mlp, normalised])
@pytest.mark.parametrize("method", [m for m in TRANSFER_METHODS if m != "naive"])
def test_a_permuted_start_gets_the_permuted_end(method, factory):
    """Where theta_2^0 = pi theta_1^0, all methods must find pi, and the transfer is the permuted source itself."""
    model, spec, path, _ = setting(factory)
    planted = spec.random(torch.Generator().manual_seed(5))
    start, end = (regraft.apply(spec, planted, theta) for theta in (path.start, path.end))
    found = regraft.transfer(model, path, start, sample(4, 40), method, spec=spec, target_end=end, bn_batches=0)
    assert all(torch.equal(found.perm[group], planted[group]) for group in spec.groups)
    close(end, found.params)


def test_naive_adds_the_change_as_it_is():
    model, spec, path, target = setting()
    found = regraft.transfer(model, path, target, sample(3, 1), "naive", spec=spec)
    close({n: target[n] + path.end[n] - path.start[n] for n in target}, found.params)
    assert found.gradients == 0


@pytest.mark.parametrize(("method", "expected"), [("fgmt", 2 * STEPS), ("gmt", STEPS * (STEPS + 1))])
def test_the_gradients_that_a_method_computes_are_counted(method, expected):
    model, spec, path, target = setting()
    losses = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        losses.append(len(labels))
        return cross_entropy(logits, labels)

    found = regraft.transfer(model, path, target, sample(3, 2), method, spec=spec, gradient_batches=3, loss=loss)
    assert len(losses) == found.gradients == 3 * expected


def test_both_networks_see_the_same_batches():
    model, spec, path, target = setting()
    batches, seen = sample(3, STEPS), []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(next(i for i, batch in enumerate(batches) if batch[1] is labels))
        return cross_entropy(logits, labels)

    regraft.transfer(model, path, target, batches, "fgmt", spec=spec, loss=loss)
    assert seen == [i for t in range(STEPS) for i in (t, t)]


@pytest.mark.parametrize("factory", [mlp, normalised])
@pytest.mark.parametrize("method", TRANSFER_METHODS)
def test_every_step_from_the_start_on_has_its_accuracy_and_the_best_is_kept(method, factory):
    model, spec, path, target = setting(factory)
    batches, validation, told = sample(3, 4), sample(8, 4), []
    found = regraft.transfer(
        model,
        path,
        target,
        batches,
        method,
        spec=spec,
        target_end=learned(model, target),
        validation=validation,
        bn_batches=2,
        on_step=lambda t, accuracy: told.append((t, accuracy)),
    )
    for t, (perm, found_accuracy) in enumerate(zip(found.perms, found.accuracies, strict=True)):
        moved = regraft.apply(spec, perm, {n: path[t][n] - path.start[n] for n in target})
        theta = reset_batchnorm(model, {n: target[n] + moved[n] for n in target}, batches, 2)
        assert found_accuracy == accuracy(model, theta, validation)
        if t == found.best_step:
            close(theta, found.params)
    assert len(found.accuracies) == path.steps + 1
    assert found.best_step == max(range(1, STEPS + 1), key=lambda t: (found.accuracies[t], -t))
    assert found.best_accuracy == found.accuracies[found.best_step]
    assert found.perm is found.perms[found.best_step]
    assert all(torch.equal(found.perms[0][g], index) for g, index in spec.identity().items())
    assert told == list(enumerate(found.accuracies))


def test_a_start_that_is_better_than_every_step_is_no_transfer():
    model, spec, path, target = setting()
    good = learned(model, target)
    worse = regraft.Trajectory.linear(path.end, {n: -9 * t for n, t in path.end.items()}, 2)
    found = regraft.transfer(model, worse, good, sample(9, 3), "naive", spec=spec, validation=sample(9, 3))
    assert found.accuracies[0] > max(found.accuracies[1:])
    assert found.best_step >= 1 and found.best_accuracy == found.accuracies[found.best_step]


@pytest.mark.parametrize("method", TRANSFER_METHODS)
def test_without_validation_the_last_step_is_the_result(method):
    model, spec, path, target = setting()
    end, told = learned(model, target), []
    found = regraft.transfer(
        model,
        path,
        target,
        sample(3, 4),
        method,
        spec=spec,
        target_end=end,
        on_step=lambda *a: told.append(a),
    )
    assert found.best_step == STEPS and found.best_accuracy is None and found.accuracies == ()
    assert len(found.perms) == STEPS + 1 and EVALUATION not in found.seconds
    assert told == [(t, None) for t in range(STEPS + 1)]
    moved = regraft.apply(spec, found.perm, {n: path.end[n] - path.start[n] for n in target})
    close({n: target[n] + moved[n] for n in target}, found.params)


@pytest.mark.parametrize(("method", "grafts"), [("naive", STEPS), ("fgmt", STEPS)])
def test_no_step_is_made_twice(method, grafts, monkeypatch):
    model, spec, path, target = setting()
    scales = []

    def counting(base, start, end, scale, *rest, **options):
        scales.extend(scale)
        return original(base, start, end, scale, *rest, **options)

    original = work_module.graft
    monkeypatch.setattr(work_module, "graft", counting)
    regraft.transfer(model, path, target, sample(3, 4), method, spec=spec, validation=sample(8, 1))
    assert scales == [scale for _, scale in path.legs[1:]] and len(scales) == grafts


def test_a_new_method_is_one_function(monkeypatch):
    def shuffled(problem, work):
        perm = problem.spec.random(problem.generator)
        return ((t, perm) for t in range(1, problem.path.steps + 1))

    monkeypatch.setitem(TRANSFER_METHODS, "mine", shuffled)
    model, spec, path, target = setting()
    named, found = (
        regraft.transfer(
            model, path, target, sample(3, 1), method, spec=spec, generator=torch.Generator().manual_seed(7)
        )
        for method in ("mine", shuffled)
    )
    assert (named.method, found.method) == ("mine", "shuffled")
    close(named.params, found.params)
    expected = spec.random(torch.Generator().manual_seed(7))
    assert all(torch.equal(found.perm[g], expected[g]) for g in spec.groups)


def test_the_start_is_charged_to_evaluation_and_the_cost_leaves_evaluation_out(monkeypatch):
    model, spec, path, target = setting(normalised)
    monkeypatch.setitem(TRANSFER_METHODS, "nothing", lambda problem, work: iter(()))
    found = regraft.transfer(model, path, target, sample(3, 4), "nothing", spec=spec, validation=sample(8, 1))
    assert len(found.accuracies) == 1 and found.seconds.keys() == {EVALUATION} and found.cost == Cost()
    found = regraft.transfer(model, path, target, sample(3, 4), "fgmt", spec=spec, validation=sample(8, 1))
    method = {phase: cost for phase, cost in found.seconds.items() if phase != EVALUATION}
    assert found.seconds.keys() - method.keys() == {EVALUATION}
    assert found.cost == sum(method.values(), Cost())


def test_statistics_are_those_of_the_transferred_network():
    model, spec, path, target = setting(normalised)
    batches = sample(3, 6)
    found = regraft.transfer(model, path, target, batches, "naive", spec=spec, bn_batches=2)
    filters = found.params["conv.weight"], found.params["conv.bias"]
    seen = torch.stack([nn.functional.conv2d(images, *filters).mean((0, 2, 3)) for images, _ in batches[:2]])
    torch.testing.assert_close(found.params["norm.running_mean"], seen.mean(0))


def test_nothing_that_was_handed_in_changes():
    model, spec, path, target = setting(normalised)
    before = copy.deepcopy((values(model), dict(path.start), dict(path.end), target))
    training = model.training
    for method in ("fgmt", "gmt", "weights"):
        regraft.transfer(model, path, target, sample(3, 4), method, spec=spec, validation=sample(5, 1))
    after = (values(model), dict(path.start), dict(path.end), target)
    assert all(torch.equal(x[n], y[n]) for x, y in zip(before, after, strict=True) for n in x)
    assert model.training == training


def test_the_fast_path_holds_one_stack_a_side():
    model, spec, _, target = setting(normalised)
    like = {name: target[name] for name, _ in model.named_parameters()}
    stacks = Stacks.allocate(spec, like, 7)
    held = sum(t.untyped_storage().nbytes() for side in (stacks.target, stacks.source) for t in side.values())
    assert held == 2 * 7 * sum(t.numel() * t.element_size() for t in like.values())


def test_a_users_own_module_needs_no_spec():
    model, _, path, target = setting(normalised)
    found = regraft.transfer(model, path, target, iter(sample(3, 30)), "fgmt", bn_batches=0)
    assert found.params.keys() == target.keys()
    assert set(found.seconds) >= {"gradients", "similarity", "assignment", "graft"}
    assert found.cost.wall > 0 and found.cost.cpu > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"batches": []}, "no batch"),
        ({"batches": iter(sample(0, 2))}, "exhausted"),
        ({"gradient_batches": 0}, "gradient_batches"),
        ({"method": "oracle"}, "target_end"),
        ({"drop": "1.bias"}, "'1.bias'"),
        ({"reshape": "3.weight"}, "'3.weight': shape"),
        ({"retype": "3.weight"}, "'3.weight': dtype"),
        ({"poison": "5.bias"}, "'5.bias' of the target's start"),
    ],
)
def test_bad_input_is_named_before_any_work(change, message):
    model, spec, path, target = setting()
    arguments = {"batches": sample(3, 4), "method": "fgmt", "spec": spec}
    for key, value in change.items():
        if key == "drop":
            del target[value]
        elif key == "reshape":
            target[value] = target[value].T
        elif key == "retype":
            target[value] = target[value].float()
        elif key == "poison":
            target[value] = target[value] * float("nan")
        else:
            arguments[key] = value
    with pytest.raises(ValueError, match=message):
        regraft.transfer(model, path, target, **arguments)


def test_a_path_that_is_not_finite_is_refused_by_its_step():
    model, spec, path, target = setting()
    points = [dict(theta) for theta in path]
    recorded = regraft.Trajectory.recorded(points)
    points[2]["3.bias"] = points[2]["3.bias"] * float("nan")
    broken = (
        (replace(recorded, anchors=points), "'3.bias' of step 2 of the path"),
        (replace(path, anchors=(path.start, points[2])), f"'3.bias' of step {STEPS} of the path"),
    )
    for bad, message in broken:
        with pytest.raises(ValueError, match=message):
            regraft.transfer(model, bad, target, sample(3, 1), "naive", spec=spec)


def test_a_start_with_another_label_set_is_refused():
    model, spec, path, target = setting()
    target["5.bias"] = target["5.bias"].new_zeros(7)
    with pytest.raises(ValueError, match=r"'5\.bias': shape"):
        regraft.transfer(model, path, target, sample(3, 1), spec=spec)
    with pytest.raises(ValueError, match=r"'5\.bias': shape"):
        start, end = ({**theta, "5.bias": target["5.bias"]} for theta in (path.start, path.end))
        regraft.transfer(model, regraft.Trajectory.linear(start, end, 2), path.start, sample(3, 1), spec=spec)


@pytest.mark.parametrize("known", [True, False])
def test_an_empty_batch_is_named_with_and_without_a_spec(known):
    model, spec, path, target = setting()
    empty = torch.zeros(0, 1, 6, 6, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="batch 0 has 0 images"):
        regraft.transfer(model, path, target, [empty], spec=spec if known else None)


def test_an_exploding_gradient_is_named():
    model, spec, path, target = setting()

    def loss(logits, labels):
        return math.inf * cross_entropy(logits, labels)

    with pytest.raises(ValueError, match=r"the gradient of 1\.weight is not finite"):
        regraft.transfer(model, path, target, sample(3, 4), "fgmt", spec=spec, loss=loss)


@pytest.mark.parametrize("method", ["fgmt", "gmt"])
@pytest.mark.parametrize("odd", [1, 2])
def test_a_batch_that_no_gradient_can_be_taken_on_is_named_by_its_number(method, odd):
    """BatchNorm has no statistics of a single image (its number counts all batches, not those of one gradient)."""
    batches = sample(3, 3)
    batches[odd] = tuple(part[:1] for part in batches[odd])
    small = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    ends = fresh(small, 1), fresh(small, 2)
    with pytest.raises(ValueError, match=rf"batch {odd}: Sequential cannot be run on images float64 \[1, 1, 6, 6\]"):
        regraft.transfer(small, regraft.Trajectory.linear(*ends, 3), ends[1], batches, method, bn_batches=0)


# ---- many targets: what each gets is what it would get alone

TARGETS = 3


def flattened() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()


def line(model: nn.Module) -> regraft.Trajectory:
    return regraft.Trajectory.linear(fresh(model, 0), fresh(model, 1), steps=STEPS)


@pytest.mark.parametrize("factory", [mlp, normalised, flattened])
def test_each_target_gets_what_it_gets_alone(factory):
    model, batches = factory(), sample(3, STEPS)
    starts = [fresh(model, 10 + number) for number in range(TARGETS)]
    many = regraft.transfer_to_many(model, line(model), starts, batches)
    assert many.gradients == STEPS * (1 + TARGETS)
    for number, start in enumerate(starts):
        alone = regraft.transfer(model, line(model), start, batches)
        for group, index in alone.perm.items():
            assert torch.equal(many.perms[number][group], index)
        for name, tensor in alone.params.items():
            torch.testing.assert_close(many.target(number)[name], tensor)


def test_permuted_targets_get_the_permuted_end():
    model = mlp()
    spec = regraft.trace(model, sample(3, 1)[0][0])
    start, path = fresh(model, 0), line(model)
    perms = [spec.random(torch.Generator().manual_seed(seed)) for seed in range(TARGETS)]
    many = regraft.transfer_to_many(
        model, path, [regraft.apply(spec, perm, start) for perm in perms], sample(4, STEPS), spec=spec
    )
    for number, perm in enumerate(perms):
        for name, tensor in regraft.apply(spec, perm, path.end).items():
            torch.testing.assert_close(many.target(number)[name], tensor)


def test_what_does_not_fit_is_named_with_its_target():
    model = mlp()
    with pytest.raises(ValueError, match="there is no target"):
        regraft.transfer_to_many(model, line(model), [], sample(3, 1))
    good, bad = values(model), values(model)
    bad["1.weight"] = bad["1.weight"][:3]
    with pytest.raises(ValueError, match=r"target 1: tensor '1.weight': shape \(3, 36\)"):
        regraft.transfer_to_many(model, line(model), [good, bad], sample(3, 1))
    with pytest.raises(ValueError, match="no batch"):
        regraft.transfer_to_many(model, line(model), [good], [])
