"""Sums of networks against their literal form; BatchNorm and REPAIR."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

import regraft.reference.fusion as reference
from regraft.core.forward import hooks
from regraft.core.tensors import state
from regraft.fusion.repair import batch_statistics, reads_batches, repair_on, reset_on
from regraft.fusion.sums import assign_gradient, fuse, fuse_many, gradient
from regraft.networks.papers import initialise, mlp, residual8, small_cnn


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
    same(assign_gradient(target, g, 5.0), reference.assign_scaled_gradient(target, g, 5.0), 1e-5)


def test_fusions_are_the_papers(cnn):
    a, b, start = networks(cnn, 3)
    same(fuse([b, a], [1, 0.7]), reference.assign_weights(b, a, 0.7))
    same(fuse([a, b], [2.0, 3.0]), reference.fuse_pair(a, b, 2.0, 3.0))
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
        same({name: tensor[k] for name, tensor in stack.items()}, reference.fuse_pair(a, b, x, y), 1e-5)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda a, b: ([a, {**b, "extra": torch.zeros(1)}], [1, 1]), "model 0 has no tensor 'extra'"),
        (
            lambda a, b: ([a, {k: b[k] for k in list(b)[1:]}], [1, 1]),
            "model 1 has no tensor 'features.0.weight'",
        ),
        (
            lambda a, b: ([a, {**b, "features.0.bias": torch.zeros(7)}], [1, 1]),
            r"'features.0.bias': shape .*\(7,\) in model 1",
        ),
        (lambda a, b: ([a, {**b, "features.0.bias": b["features.0.bias"].double()}], [1, 1]), "float64"),
        (lambda a, b: ([a, b], [1.0]), "2 models need rows of 2 coefficients"),
        (lambda a, b: ([a, b], [1.0, float("nan")]), "coefficient 1 of row 0 is nan"),
        (lambda a, b: ([a, b], [float("inf"), 1.0]), "coefficient 0 of row 0 is inf"),
        (lambda a, b: ([], []), "no model"),
        (
            lambda a, b: ([a, {**b, "features.0.bias": b["features.0.bias"] / 0}], [1, 1]),
            "'features.0.bias' of the sum",
        ),
    ],
)
def test_what_cannot_be_summed_is_refused_by_name(cnn, break_it, message):
    with pytest.raises(ValueError, match=message):
        fuse(*break_it(*networks(cnn, 2)))


def test_another_architecture_is_named_by_the_first_tensor_that_differs():
    wide, narrow = (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, n)).state_dict() for n in (5, 2))
    with pytest.raises(ValueError, match=r"'1.weight': shape \(5, 3\) .*\(2, 3\) in model 1"):
        fuse([wide, narrow], [1, 1])


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


@pytest.mark.parametrize("sign", [1, -1])
def test_repair_in_one_pass_is_repair_layer_by_layer(cnn, sign):
    sources = [{name: tensor.double() for name, tensor in network.items()} for network in networks(cnn, 2)]
    model, x = small_cnn().double().eval(), images(16).double()
    finish = repair_on(model, sources, [(x, torch.zeros(16, dtype=torch.int64))])
    fused = fuse(sources, [0.5, sign * 1.5])
    layers = ["features.0", "features.3", "classifier.layers.0", "classifier.layers.1"]
    expected = reference.repair(model, layers, sources, [0.25, 0.75], fused, x)
    same(fuse(sources, [0.5, sign * 1.5], finish=finish), expected, 1e-9)
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


class Restless(nn.Module):
    """Everything that an evaluation may disturb: BatchNorm, dropout, and parts in different modes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(self.norm(self.conv(x)).relu()).mean((2, 3)))


def test_mending_leaves_model_sources_and_random_state_alone():
    model = Restless().train()
    model.norm.eval()
    sources = networks(model, 2)
    kept, own = [{name: t.clone() for name, t in source.items()} for source in sources], state(model)
    batches = [(images(8), torch.zeros(8, dtype=torch.int64))]
    before = torch.get_rng_state()
    for finish in (repair_on(model, sources, batches), reset_on(model, batches)):
        fuse(sources, [0.5, 0.5], finish=finish)
    batch_statistics(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and model.drop.training and not model.norm.training
    same(state(model), own, 0)
    for source, copy in zip(sources, kept, strict=True):
        same(source, copy, 0)
    assert not any(module._forward_hooks for module in model.modules())


def test_repair_takes_the_last_axis_of_a_linear_layer_for_its_channels():
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4), nn.Flatten(), nn.Linear(12, 2))
    a, b = networks(model, 2)
    tokens = torch.randn(32, 3, 6, generator=torch.Generator().manual_seed(1))
    finish = repair_on(model, [a, b], [(tokens, torch.zeros(32, dtype=torch.int64))])
    fused = fuse([a, b], [1.0, 1.0], finish=finish)

    def moments(tensors):
        outputs = []
        with hooks({"0": model[0], "2": model[2]}, lambda _name, _inputs, output: outputs.append(output)):
            functional_call(model, tensors, (tokens,))
        return [torch.cat([o.mean((0, 1)), o.std((0, 1), correction=0)]) for o in outputs]

    for found, of_a, of_b in zip(moments(fused), moments(a), moments(b), strict=True):
        torch.testing.assert_close(found, (of_a + of_b) / 2, rtol=1e-4, atol=1e-5)
    same(fuse([a, b], [3.0, 0.0], finish=finish), a | _last(a, 3.0), 1e-4)


def _last(tensors: dict, factor: float) -> dict:
    """The answer's layer is not rescaled."""
    return {name: factor * tensor for name, tensor in tensors.items() if name.startswith("4.")}


def test_repair_names_a_layer_that_is_used_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.fc = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.shared(self.shared(x)))

    model = Twice()
    with pytest.raises(ValueError, match="'shared' is used twice"):
        repair_on(model, networks(model, 2), [(torch.randn(4, 4), torch.zeros(4, dtype=torch.int64))])


@pytest.mark.parametrize(
    ("model", "reads"),
    [
        (residual8(width=1 / 32), False),
        (batch_statistics(residual8(width=1 / 32)), True),
        (nn.BatchNorm1d(3, track_running_stats=False), True),
        (mlp([3, 2]), False),
    ],
)
def test_which_models_read_their_batch(model, reads):
    assert reads_batches(model) is reads


def test_repair_survives_a_dead_channel():
    model = mlp([4, 3, 2])
    a, b = networks(model, 2)
    for tensors in (a, b):
        tensors["layers.0.weight"][1] = 0
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    finish = repair_on(model, [a, b], [(x, torch.zeros(8, dtype=torch.int64))])
    assert all(bool(t.isfinite().all()) for t in fuse([a, b], [1.0, 1.0], finish=finish).values())
