"""Sums of networks against their literal form, BatchNorm and REPAIR, and the paper's tables as data."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

import regraft.reference.fusion as reference
from regraft.fusion import (
    assign_gradient,
    batch_statistics,
    fuse,
    fuse_many,
    gradient,
    repair_on,
    reset_on,
)
from regraft.fusion_tables import compare, paper_table, paper_tables, side_by_side
from regraft.models import initialise, mlp, residual8, small_cnn


def networks(model: nn.Module, count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = [initialise(model, generator) for _ in range(count)]
    for tensors in found:  # BatchNorm statistics of an untrained network are all alike
        for name, tensor in tensors.items():
            if name.endswith("running_mean"):
                tensor.normal_(generator=generator)
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
    return found


def same(found: dict, expected: dict, tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def cnn():
    return small_cnn()


def images(count: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- sums


def test_gradient_assignment_is_the_papers(cnn):
    start, end, target = networks(cnn, 3)
    g = gradient(start, end)
    same(g, reference.cumulative_gradient(start, end))
    same(assign_gradient(target, g, 5.0), reference.assign_gradient(target, g, 5.0), 1e-5)


def test_fusions_are_the_papers(cnn):
    a, b, start = networks(cnn, 3)
    same(fuse([b, a], [1, 0.7]), reference.assign_weights(b, a, 0.7))
    same(fuse([a, b], [2.0, 3.0]), reference.fuse(a, b, 2.0, 3.0))
    two = fuse([start, gradient(start, a), gradient(start, b)], [1, 0.6, 1.0])
    same(two, reference.assign_two_gradients(start, gradient(start, a), gradient(start, b), 0.6, 1.0))


def test_assigning_a_networks_own_gradient_gives_the_trained_network(cnn):
    start, end = networks(cnn, 2)
    same(assign_gradient(start, gradient(start, end), 1.0), end)


def test_any_number_of_models_and_integer_buffers():
    model = residual8(width=1 / 32)
    first, *others = networks(model, 4)
    first["blocks.0.1.num_batches_tracked"] += 7
    fused = fuse([first, *others], [0.1, 0.2, 0.3, 0.4])
    expected = sum(c * m["fc.weight"] for c, m in zip([0.1, 0.2, 0.3, 0.4], [first, *others], strict=True))
    torch.testing.assert_close(fused["fc.weight"], expected)
    assert int(fused["blocks.0.1.num_batches_tracked"]) == 7


def test_nothing_given_is_changed_or_shared(cnn):
    a, b = networks(cnn, 2)
    before = {name: tensor.clone() for name, tensor in a.items()}
    fused = fuse([a, b], [1.0, 0.0])
    for tensor in fused.values():
        tensor.zero_()
    same(a, before, 0)


def test_many_at_once(cnn):
    a, b = networks(cnn, 2)
    rows = torch.tensor([[1.0, 0.0], [0.3, -2.0], [50.0, 40.0]])
    stack = fuse_many([a, b], rows)
    for k, (x, y) in enumerate(rows.tolist()):
        same({name: tensor[k] for name, tensor in stack.items()}, reference.fuse(a, b, x, y), 1e-5)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda a, b: ([a, {**b, "extra": torch.zeros(1)}], [1, 1]), "model 1 has a tensor 'extra'"),
        (lambda a, b: ([a, {k: b[k] for k in list(b)[1:]}], [1, 1]), "lacks tensor 'features.0.weight'"),
        (lambda a, b: ([a, {**b, "features.0.bias": torch.zeros(7)}], [1, 1]), r"shape \(7,\) in model 1"),
        (lambda a, b: ([a, {**b, "features.0.bias": b["features.0.bias"].double()}], [1, 1]), "float64"),
        (lambda a, b: ([a, b], [1.0]), "2 models need rows of 2 coefficients"),
        (lambda a, b: ([a, b], [1.0, float("nan")]), "coefficient 1 of row 0 is nan"),
        (lambda a, b: ([a, b], [float("inf"), 1.0]), "coefficient 0 of row 0 is inf"),
        (lambda a, b: ([], []), "no model"),
    ],
)
def test_bad_input(cnn, break_it, message):
    with pytest.raises(ValueError, match=message):
        fuse(*break_it(*networks(cnn, 2)))


# ---------------------------------------------------------------- activations


def test_batch_statistics_do_not_see_running_ones():
    model = residual8(width=1 / 32)
    (tensors,) = networks(model, 1)
    x = images(8)
    own = functional_call(batch_statistics(model), tensors, (x,))
    model.train()
    copy = {name: tensor.clone() for name, tensor in tensors.items()}
    torch.testing.assert_close(own, functional_call(model, copy, (x,)))
    model.eval()
    assert not torch.allclose(own, functional_call(model, tensors, (x,)), atol=1e-3)


def test_with_batch_statistics_only_the_ratio_of_the_coefficients_counts():
    """What the paper's tables 12 to 19 show, and fused statistics cannot give."""
    model = residual8(width=1 / 16)
    a, b = networks(model, 2)
    a["fc.bias"].zero_(), b["fc.bias"].zero_()
    x, own = images(16), batch_statistics(model.eval())

    def direction(network, scale):
        logits = functional_call(network, fuse([a, b], [scale, scale]), (x,))
        return logits / logits.norm()

    torch.testing.assert_close(direction(own, 1.0), direction(own, 10.0), rtol=1e-2, atol=1e-3)
    assert (direction(model, 1.0) - direction(model, 10.0)).norm() > 0.05


def test_reset_gives_every_channel_its_own_mean():
    model = residual8(width=1 / 32)
    a, b = networks(model, 2)
    x = images(32)
    finish = reset_on(model, [(x, torch.zeros(32, dtype=torch.int64))])
    fused = fuse([a, b], [1.0, 1.0], finish=finish)
    conv = torch.nn.functional.conv2d(x, fused["blocks.0.0.weight"], fused["blocks.0.0.bias"], padding=1)
    torch.testing.assert_close(fused["blocks.0.1.running_mean"], conv.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_repair_in_one_pass_is_repair_layer_by_layer(cnn):
    sources = [{name: tensor.double() for name, tensor in network.items()} for network in networks(cnn, 2)]
    model, x = small_cnn().double().eval(), images(16).double()
    finish = repair_on(model, sources, [(x, torch.zeros(16, dtype=torch.int64))])
    fused = fuse(sources, [0.5, 1.5])
    layers = ["features.0", "features.3", "classifier.layers.0", "classifier.layers.1"]
    expected = reference.repair(model, layers, sources, [0.25, 0.75], fused, x)
    same(fuse(sources, [0.5, 1.5], finish=finish), expected, 1e-9)
    assert not torch.allclose(expected["features.3.weight"], fused["features.3.weight"])


def test_repair_leaves_a_network_alone_and_undoes_a_scale(cnn):
    a, b = networks(cnn, 2)
    x = images(16)
    finish = repair_on(cnn.eval(), [a, b], [(x, torch.zeros(16, dtype=torch.int64))])
    same(fuse([a, b], [1.0, 0.0], finish=finish), a, 1e-4)
    expected = functional_call(cnn, a, (x,)) - a["classifier.layers.2.bias"]
    scaled = fuse([a, b], [10.0, 0.0], finish=finish)
    logits = functional_call(cnn, scaled, (x,)) - scaled["classifier.layers.2.bias"]
    torch.testing.assert_close(logits, 10 * expected, rtol=1e-3, atol=1e-3)


def test_repair_refuses_what_it_cannot_do(cnn):
    a, b = networks(cnn, 2)
    batches = [(images(4), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(ValueError, match="no batches"):
        repair_on(cnn, [a, b], [])
    with pytest.raises(ValueError, match="all coefficients are 0"):
        fuse([a, b], [0.0, 0.0], finish=repair_on(cnn, [a, b], batches))


def test_repair_survives_a_dead_channel():
    model = mlp([4, 3, 2])
    a, b = networks(model, 2)
    for tensors in (a, b):
        tensors["layers.0.weight"][1] = 0
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    finish = repair_on(model, [a, b], [(x, torch.zeros(8, dtype=torch.int64))])
    assert all(bool(t.isfinite().all()) for t in fuse([a, b], [1.0, 1.0], finish=finish).values())


# ---------------------------------------------------------------- the paper's tables


def test_there_are_twenty_five_tables():
    assert list(paper_tables()) == [*map(str, range(1, 7)), *(f"A{n}" for n in range(1, 20))]
    assert all(0 <= v <= 1 for t in paper_tables().values() for row in t.values for v in row)
    assert all(
        len(row) == len(t.columns) and len(t.values) == len(t.rows)
        for t in paper_tables().values()
        for row in t.values
    )


@pytest.mark.parametrize(("fine", "coarse"), [("6", "A18"), ("A1", "A19"), ("A10", "A8"), ("A11", "A9")])
def test_the_fine_tables_agree_with_the_coarse_ones(fine, coarse):
    """Nine cells of each pair are the same networks on the same images."""
    fine, coarse = paper_tables()[fine], paper_tables()[coarse]
    rows, columns = set(fine.rows) & set(coarse.rows), set(fine.columns) & set(coarse.columns)
    assert len(rows) * len(columns) == 9
    for row in rows:
        for column in columns:
            assert fine.cell(row, column) == pytest.approx(coarse.cell(row, column), abs=6e-4)


@pytest.mark.parametrize("number", range(2, 10))
def test_gradients_and_weights_agree_where_they_are_the_same_network(number):
    """theta_0 + alpha g_1 + beta g_2 is alpha theta_1 + beta theta_2 where alpha + beta = 1."""
    gradients, weights = paper_tables()[f"A{number}"], paper_tables()[f"A{number + 10}"]
    for alpha, beta in ((0.0, 1.0), (0.5, 0.5), (1.0, 0.0)):
        assert gradients.cell(beta, alpha) == pytest.approx(weights.cell(beta, alpha), abs=1e-9)


def test_a_comparison():
    paper = paper_table("4")
    ours = [[value + 0.02 for value in row] for row in paper.values]
    found = compare(paper, ours)
    assert found.median == pytest.approx(0.02) and found.largest == pytest.approx(0.02)
    assert found.trend == pytest.approx(1.0)
    assert compare(paper, ours[::-1]).trend < 0
    with pytest.raises(ValueError, match="8 by 5"):
        compare(paper, ours[1:])
    with pytest.raises(ValueError, match="no table 'A20'"):
        paper_table("A20")
    assert "18.0 / 18.0" not in side_by_side(paper, ours)
    assert "20.0 / 18.0 (+2.0)" in side_by_side(paper, ours)
