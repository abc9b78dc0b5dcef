"""Ports by activations, layer after layer: what they give exactly where the new base is the old one, or it permuted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from regraft import networks
from regraft.core.tensors import Tensors
from regraft.porting import PortProblem, PortWork, function_ports
from regraft.porting.label_free import activation_bytes, match_functions, predict, transport_by_activations
from regraft.porting.label_free.activations import LinearMap, align_activations, choose_rows, observe, record
from regraft.reference import label_free as reference
from regraft.symmetry import apply, trace
from regraft.training.evaluation import NotFinite

Method = Callable[..., Tensors]


def draw(model: nn.Module, seed: int) -> Tensors:
    return networks.initialise(model, torch.Generator().manual_seed(seed))


def inputs(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return list(torch.randn(shape, generator=generator).split(64))


def tune(base: Tensors, other: Tensors) -> Tensors:
    return {
        name: torch.lerp(tensor, other[name], 0.1) if tensor.is_floating_point() else tensor
        for name, tensor in base.items()
    }


def error(model: nn.Module, result: Tensors, tuned: Tensors, new_base: Tensors, batches: list[Tensor]) -> float:
    """Of the logits, relative to the new base's."""
    ours, wanted, before = (torch.cat(predict(model, tensors, batches)) for tensors in (result, tuned, new_base))
    return float((ours - wanted).norm() / (before - wanted).norm())


CASES = {
    "mlp": (networks.mlp([16, 12, 10, 5]), inputs(256, 16)),
    "resnet": (networks.residual8(5, 3, 0.125), inputs(256, 3, 16, 16)),
}
METHODS = {
    "functional": lambda *given: match_functions(*given, ridge=1e-9),
    "theseus": transport_by_activations,
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(("model", "batches"), CASES.values(), ids=CASES)
def test_same_base_gives_the_fine_tune(method: Method, model: nn.Module, batches: list[Tensor]) -> None:
    base = draw(model, 0)
    tuned = tune(base, draw(model, 1))
    result = method(model, base, tuned, base, batches)
    assert error(model, result, tuned, base, batches) < 1e-4


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(("model", "batches"), CASES.values(), ids=CASES)
def test_permuted_base_gives_the_fine_tune(method: Method, model: nn.Module, batches: list[Tensor]) -> None:
    base = draw(model, 0)
    tuned = tune(base, draw(model, 1))
    spec = trace(model, (batches[0][:2],))
    new_base = apply(spec, spec.random(torch.Generator().manual_seed(3)), base)
    result = method(model, base, tuned, new_base, batches)
    assert error(model, result, tuned, new_base, batches) < 1e-3


def test_theseus_between_widths_is_exact_where_the_new_units_are_copies() -> None:
    small, wide = networks.mlp([6, 5, 4]), networks.mlp([6, 10, 4])
    base, batches = draw(small, 0), inputs(128, 6)
    tuned = tune(base, draw(small, 1))
    new_base = {  # each unit twice, of half the weight in what follows: the same function
        "layers.0.weight": base["layers.0.weight"].repeat(2, 1),
        "layers.0.bias": base["layers.0.bias"].repeat(2),
        "layers.1.weight": base["layers.1.weight"].repeat(1, 2) / 2,
        "layers.1.bias": base["layers.1.bias"],
    }
    result = transport_by_activations(small, base, tuned, new_base, batches, new_model=wide)
    # T is an isometry: of a change of all copies together it makes 1 / sqrt(2) of it in each.
    change = (tuned["layers.0.weight"] - base["layers.0.weight"]).repeat(2, 1) / 2**0.5
    torch.testing.assert_close(result["layers.0.weight"], new_base["layers.0.weight"] + change, rtol=0, atol=1e-5)


def test_networks_of_other_layers_are_refused_by_name() -> None:
    model, deeper = networks.mlp([6, 5, 4]), networks.mlp([6, 5, 5, 4])
    base, batches = draw(model, 0), inputs(32, 6)
    with pytest.raises(ValueError, match=r"'layers\.2' is in only one of the two networks"):
        transport_by_activations(model, base, base, draw(deeper, 0), batches, new_model=deeper)


def test_activations_that_are_not_finite_are_named_by_layer() -> None:
    model = networks.mlp([6, 5, 4])
    base = draw(model, 0)
    huge = base | {"layers.1.weight": base["layers.1.weight"] * 1e38}
    with pytest.raises(NotFinite, match=r"layer 'layers\.1': its outputs are not finite"):
        record(model, huge, [batch * 1e3 for batch in inputs(32, 6)])


def test_inputs_of_two_shapes_are_refused() -> None:
    model = networks.residual8(5, 3, 0.125)
    base = draw(model, 0)
    with pytest.raises(ValueError, match="inputs of one shape are needed"):
        match_functions(model, base, base, base, [*inputs(8, 3, 16, 16), *inputs(8, 3, 8, 8)])


# ---------------------------------------------------------------- what they stand on

LAYERS = {
    "linear": (nn.Linear(6, 4), (5, 7, 6)),
    "convolution": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1)), (3, 4, 9, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding="same", padding_mode="reflect", bias=False), (3, 4, 5, 5)),
    "sequence": (nn.Conv1d(4, 4, 3, groups=4), (3, 4, 11)),
}


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_rows_times_weight_are_the_outputs_rows(layer: nn.Linear | nn.Conv2d, shape: tuple[int, ...]) -> None:
    linear = LinearMap("weight", None if layer.bias is None else "bias", layer)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    output = layer(x)
    rows = choose_rows(linear.count(output), 1, 1.0)
    assert len(rows) == linear.count(output)
    sees = linear.input_rows(x, rows)
    weight = layer.weight.flatten(1).unflatten(0, (sees.shape[1], -1))  # [groups, fan_out, fan_in]
    made = torch.einsum("rgi,goi->rgo", sees, weight).flatten(1)
    made = made if layer.bias is None else made + layer.bias
    torch.testing.assert_close(made, linear.output_rows(output, rows), rtol=0, atol=1e-5)


def test_attention_is_seen_as_its_projections_and_computes_the_same() -> None:
    model = networks.vit(5, size=8, width=16, depth=1, heads=2).eval()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    names: list[str] = []
    with torch.no_grad():
        wanted = model(x)
        with observe(model, lambda linear, _x, _y: names.append(linear.name)):
            torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-5)
        assert [name for name in names if "attention" in name] == [
            *(f"blocks.0.attention.in_proj_weight[{number}]" for number in range(3)),
            "blocks.0.attention.out_proj.weight",
        ]
        names.clear()
        model(x)
    assert not names


def test_align_finds_a_rotation_and_leaves_what_it_does_not_see() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    torch.testing.assert_close(align_activations(x, x @ rotation.T), rotation, rtol=0, atol=1e-4)
    dead = x * torch.tensor([1, 1, 1, 1, 0, 0])
    torch.testing.assert_close(align_activations(dead, dead), torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-6)
    wider = torch.linalg.qr(torch.randn(9, 6, generator=generator, dtype=torch.float64))[0]
    torch.testing.assert_close(align_activations(x, x @ wider.T), wider, rtol=0, atol=1e-9)


def test_of_large_activations_fewer_inputs_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = networks.mlp([6, 5, 4]), inputs(150, 6)
    assert activation_bytes(model, batches[0]) == 6 * 5 * 4  # six times five float32
    assert function_ports.count_affordable(model, batches[0]) == 1024
    monkeypatch.setattr(function_ports, "ACTIVATIONS", 100 * 6 * 5 * 4)
    base, seen = draw(model, 0), []
    monkeypatch.setattr(function_ports, "match_functions", lambda *given: seen.extend(given[-1]) or base)
    spec = trace(model, (batches[0][:2],))
    problem = PortProblem(spec, base, tune(base, draw(model, 1)), draw(model, 2))
    function_ports.port_functions(problem, PortWork(model, inputs=batches))
    assert [len(batch) for batch in seen] == [64, 36]


def test_layers_are_those_of_the_literal_reference() -> None:
    model = networks.mlp([8, 7, 6, 4]).double()
    (x,) = inputs(60, 8)
    x = x.double()
    base, other, new_base = ({n: t.double() for n, t in draw(model, seed).items()} for seed in (3, 4, 5))
    tuned = tune(base, other)

    def layers(tensors: Tensors) -> reference.Layers:
        return [(tensors[f"layers.{k}.weight"], tensors[f"layers.{k}.bias"]) for k in range(3)]

    given = (layers(base), layers(tuned), layers(new_base), x)
    # these have no dead unit, of which the literal one says nothing; ours leans on the identity by a millionth
    solved = layers(match_functions(model, base, tuned, new_base, [x], ridge=0.1))[:2]
    carried = layers(transport_by_activations(model, base, tuned, new_base, [x]))
    for ours, wanted in ((solved, reference.solve_layers(*given, 0.1)), (carried, reference.carry_change(*given))):
        for pair, other_pair in zip(ours, wanted, strict=True):
            for tensor, literal in zip(pair, other_pair, strict=True):
                torch.testing.assert_close(tensor, literal, rtol=0, atol=1e-4)
