"""Merging methods against their definitions, and what each refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from regraft.core.tensors import state
from regraft.fusion.fisher import estimate_fisher
from regraft.fusion.merging import MERGE_METHODS, MergeProblem, choose_soup, find_magnitude, merge, merge_ties, trim
from regraft.networks.papers import initialise, mlp
from regraft.training.evaluation import accuracy


def drawn(seed: int, count: int = 1, scale: float = 1.0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "w": torch.randn(7, 5, generator=generator) * scale,
            "n.running_var": torch.rand(5, generator=generator),
            "n.num_batches_tracked": torch.tensor(number + 3),
            "mask": torch.tensor([0.0, -math.inf]),
        }
        for number in range(count)
    ]


def add(base: dict, change: dict) -> dict:
    return base | {"w": base["w"] + change["w"]}


def test_ties_keeps_the_largest_values_and_the_elected_sign():
    first = {"w": torch.tensor([4.0, -3.0, 0.1, 2.0]), "statistic": torch.tensor([9.0])}
    second = {"w": torch.tensor([2.0, 1.0, 0.2, -5.0]), "statistic": torch.tensor([1.0])}
    kept = [trim(g, ["w"], 0.75) for g in (first, second)]
    assert kept[0]["w"].tolist() == [4.0, -3.0, 0.0, 2.0] and kept[1]["w"].tolist() == [2.0, 1.0, 0.0, -5.0]
    found = merge_ties(kept)
    assert found["w"].tolist() == [3.0, -3.0, 0.0, -5.0]
    assert found["statistic"].tolist() == [5.0]


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    st.floats(0.01, 1),
    st.integers(0, 40),
)
def test_a_magnitude_is_found_as_by_sorting(values, share, cut):
    """Equal values, zeros, denormals; in one tensor or two."""
    whole = torch.tensor(values)
    parts = [whole[:cut], whole[cut:]]
    expected = whole.abs().sort().values[-max(1, round(share * len(values)))]
    assert find_magnitude(lambda: parts, share) == expected


def test_ties_of_a_problem_is_the_base_and_the_trimmed_elected_changes():
    (base,), changes = drawn(0), drawn(1, 3, 0.1)
    networks = [add(base, change) for change in changes]
    trimmed = [trim({"w": network["w"] - base["w"]}, ["w"], 0.4) for network in networks]
    expected = base["w"] + merge_ties([{"w": 0.5 * part["w"]} for part in trimmed])["w"]
    problem = MergeProblem(networks, weights=[0.5] * 3, base=base, density=0.4)
    torch.testing.assert_close(merge("ties", problem)["w"], expected)


def test_dare_keeps_a_share_of_each_change_scaled_so_that_its_mean_stays():
    base = {"w": torch.zeros(400, 300)}
    ones = [{"w": torch.ones(400, 300)}, {"w": torch.full((400, 300), 10.0)}]
    merged = merge("dare", MergeProblem(ones, weights=[1.0, 1.0], base=base, density=0.25))["w"]
    values = merged.unique().tolist()
    assert values == [0.0, 4.0, 40.0, 44.0]  # the two draw apart
    assert float(merged.mean()) == pytest.approx(11, rel=0.02)
    again = merge("dare", MergeProblem(ones, weights=[1.0, 1.0], base=base, density=0.25))["w"]
    other = merge("dare", MergeProblem(ones, weights=[1.0, 1.0], base=base, density=0.25, seed=1))["w"]
    assert torch.equal(again, merged) and not torch.equal(other, merged)


def test_slerp_keeps_the_length_and_divides_the_angle():
    first, second = {"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}
    merged = merge("slerp", MergeProblem([first, second], weights=[2.0, 1.0]))["w"]
    torch.testing.assert_close(merged, torch.tensor([2 * math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)]))
    straight = merge("slerp", MergeProblem([first, {"w": torch.tensor([6.0, 0.0])}]))["w"]
    torch.testing.assert_close(straight, torch.tensor([4.0, 0.0]))
    zero = merge("slerp", MergeProblem([first, {"w": torch.zeros(2)}]))["w"]
    torch.testing.assert_close(zero, torch.tensor([1.0, 0.0]))


def data():
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(5))
    return [(x, (x[:, 0] > 0).long())]


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_equal_networks_stay_what_they_are(method):
    """Every method but a sum of other weights: weights, statistics, counters, and infinities of a mask."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    network = state(model)
    needs = MERGE_METHODS[method].needs
    problem = MergeProblem(
        [network, {name: tensor.clone() for name, tensor in network.items()}],
        weights=[0.5, 0.5] if "weights" in needs else None,
        base=network if "base" in needs else None,
        model=model,
        batches=data(),
    )
    merged = merge(method, problem)
    assert merged.keys() == network.keys()
    for name, tensor in network.items():
        torch.testing.assert_close(merged[name], tensor, msg=name)


@pytest.mark.parametrize("method", ["ties", "dare", "slerp", "mean"])
def test_statistics_are_averaged_by_shares_and_integers_are_the_firsts(method):
    networks, (base,) = drawn(3, 2), drawn(4)
    merged = merge(method, MergeProblem(networks, base=base if MERGE_METHODS[method].needs else None))
    expected = (networks[0]["n.running_var"] + networks[1]["n.running_var"]) / 2
    torch.testing.assert_close(merged["n.running_var"], expected)
    assert merged["n.num_batches_tracked"] == 3 and torch.equal(merged["mask"], base["mask"])


def test_a_greedy_soup_is_no_worse_than_its_best_network_and_leaves_out_what_harms():
    model, batches = mlp([3, 2]), data()
    good = {"layers.0.weight": torch.tensor([[-1.0, 0, 0], [1, 0, 0]]), "layers.0.bias": torch.zeros(2)}
    bad = good | {"layers.0.weight": torch.tensor([[9.0, 0, 0], [-9, 0, 0]])}
    noisy = good | {"layers.0.weight": good["layers.0.weight"] + 0.5}
    problem = MergeProblem([bad, noisy, good], model=model, batches=batches)
    chosen = choose_soup(problem)
    assert 0 not in chosen
    best = max(accuracy(model, network, batches) for network in problem.networks)
    assert accuracy(model, merge("greedy-soup", problem), batches) >= best


def test_fisher_of_a_linear_model():
    """For softmax regression the squared gradient of a drawn label is (p - y)^2 x^2."""
    model = mlp([3, 2], bias=False)
    tensors = {"layers.0.weight": torch.zeros(2, 3)}
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(1))
    batches = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in x.split(150)]
    found = estimate_fisher(model, tensors, batches, generator=torch.Generator().manual_seed(2))
    expected = 0.25 * x.square().mean(0).expand(2, 3)  # p = 1/2, so (p - y)^2 = 1/4 whatever is drawn
    torch.testing.assert_close(found["layers.0.weight"], expected)
    with pytest.raises(ValueError, match="no images"):
        estimate_fisher(model, tensors, [], generator=torch.Generator())


def test_fisher_is_over_labels_that_are_drawn():
    """Of answers with chances 3/4 and 1/4: p (1 - p). The likelier label alone would give 1/16."""
    model, batch = mlp([1, 2]), (torch.ones(4000, 1), torch.zeros(4000, dtype=torch.int64))
    tensors = {"layers.0.weight": torch.zeros(2, 1), "layers.0.bias": torch.tensor([3.0, 1.0]).log()}
    result = estimate_fisher(model, tensors, [batch], generator=torch.Generator().manual_seed(0))
    assert result["layers.0.bias"].tolist() == pytest.approx([3 / 16] * 2, rel=0.05)


def test_fisher_merging_follows_the_network_that_needs_a_parameter():
    """A bias that drives one network's answers, and none of the other's, whose weights are far larger."""
    model, batches = mlp([3, 2]), data()
    first, second = (initialise(model, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    second = {name: tensor * 1e3 for name, tensor in second.items()}  # saturated: nothing matters to it
    merged = merge("fisher", MergeProblem([first, second], model=model, batches=batches))
    far = float((merged["layers.0.weight"] - first["layers.0.weight"]).norm())
    assert far < 0.1 * float((second["layers.0.weight"] - first["layers.0.weight"]).norm())


REFUSED = [
    ("dare", {}, r"base of the networks \(--base\)"),
    ("ties", {"density": 0.5}, r"base of the networks \(--base\)"),
    ("fisher", {}, r"a model and data \(--model, --data\)"),
    ("greedy-soup", {}, r"a model and data \(--model, --data\)"),
    ("sum", {}, "one number for each network"),
    ("mean", {"weights": [1.0, 1.0]}, "does not use weights"),
    ("mean", {"density": 0.5}, "does not use density"),
    ("slerp", {"weights": [1.0]}, "2 networks need as many weights, not 1"),
    ("slerp", {"weights": [0.0, 0.0]}, "not all 0"),
    ("slerp", {"weights": [2.0, -1.0]}, "at least 0"),
    ("breadcrumbs", {}, "unknown method 'breadcrumbs'; there are sum, mean"),
]


@pytest.mark.parametrize(("method", "options", "said"), REFUSED)
def test_what_a_method_cannot_do_is_refused(method, options, said):
    with pytest.raises(ValueError, match=said):
        merge(method, MergeProblem(drawn(0, 2), **options))


@pytest.mark.parametrize("density", [0.0, 1.1, math.nan])
def test_a_density_that_is_no_share_is_refused(density):
    with pytest.raises(ValueError, match="density must be"):
        MergeProblem(drawn(0, 2), density=density)


def test_slerp_is_between_two():
    with pytest.raises(ValueError, match="two networks, not 3"):
        merge("slerp", MergeProblem(drawn(0, 3)))


def test_networks_that_differ_are_named():
    a, b = drawn(0, 2)
    with pytest.raises(ValueError, match="'w': shape"):
        merge("mean", MergeProblem([a, b | {"w": b["w"][:3]}]))
    with pytest.raises(ValueError, match="the base has no tensor 'mask'"):
        merge("dare", MergeProblem([a], base={name: t for name, t in b.items() if name != "mask"}))
