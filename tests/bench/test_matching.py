"""The matching study: its baselines, ReLU's normal form, and a pair measured from end to end."""

from dataclasses import replace

import pytest
import torch

import regraft
from regraft.core.forward import call
from regraft.networks.papers import initialise
from regraft.reference import matching as literal
from regraft_bench.baselines import match_like_git_rebasin
from regraft_bench.matching import STUDY
from regraft_bench.matching.scaling import normalise_scales
from regraft_bench.matching.setting import PAIR_NETWORKS
from regraft_bench.run import run

IMAGES = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["mlp", "cnn", "resnet"])
def network(request):
    model = PAIR_NETWORKS[request.param]().eval()
    theta = initialise(model, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    for name, tensor in theta.items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif name.endswith("bias"):
            tensor.normal_(0, 0.1, generator=generator)
    return model, theta, regraft.trace(model, (IMAGES[:2],))


def test_the_normal_form_computes_the_same_and_undoes_a_units_scale(network):
    model, theta, spec = network
    normal = normalise_scales(spec, model, theta, IMAGES)
    torch.testing.assert_close(call(model, normal, IMAGES), call(model, theta, IMAGES), rtol=1e-3, atol=1e-3)
    first = next(name for name, tensor in theta.items() if tensor.dim() > 1)
    scaled = dict(theta)
    scaled[first] = theta[first].clone()
    scaled[first][0] *= 3
    if any(name.endswith("running_var") for name in theta):  # the BatchNorm behind the first filter takes it back
        norm = next(name for name in theta if name.endswith("running_var")).removesuffix(".running_var")
        for kind, factor in (("running_mean", 3), ("running_var", 9)):
            scaled[f"{norm}.{kind}"] = theta[f"{norm}.{kind}"].clone()
            scaled[f"{norm}.{kind}"][0] *= factor
    else:
        bias, reader = first.replace("weight", "bias"), [name for name in theta if theta[name].dim() > 1][1]
        scaled |= {bias: theta[bias].clone(), reader: theta[reader].clone()}
        scaled[bias][0] *= 3
        scaled[reader][:, 0] /= 3
    again = normalise_scales(spec, model, scaled, IMAGES)
    torch.testing.assert_close(again[first], normal[first], rtol=1e-4, atol=1e-5)
    assert normal[first].flatten(1).norm(dim=1).std() < 0.2 * theta[first].flatten(1).norm(dim=1).std() + 0.05


def test_the_public_algorithm_ends_where_no_group_alone_improves(network):
    model, theta, spec = network
    weights = [name for name, _ in model.named_parameters()]
    target = {name: theta[name].double() for name in weights}
    other = initialise(model, torch.Generator().manual_seed(3))
    source = {name: other[name].double() for name in weights}
    perm = match_like_git_rebasin(spec, target, source, torch.Generator().manual_seed(0))
    end = literal.objective(spec, [target], [source], perm)
    assert end > literal.objective(spec, [target], [source], spec.identity())
    assert regraft.match(spec, target, source, start=perm).objective == pytest.approx(end, rel=1e-5)


def test_a_pair_is_measured_from_end_to_end(place, tmp_path):
    scenario = STUDY.select(STUDY.quick)[0]
    settings = replace(scenario.settings, recipe=replace(scenario.settings.recipe, epochs=1))
    methods = tuple(scenario.method(name) for name in ("none", "regraft", "activations"))
    short = replace(scenario, settings=settings, methods=methods)
    rows = {row.method: row for row in run(STUDY, [short], place=place, rows=tmp_path / "rows", seeds=[0])}
    assert not any(row.failure for row in rows.values())
    assert rows["regraft"].values["objective"] > rows["none"].values["objective"]
    assert rows["regraft"].values["barrier"] < rows["none"].values["barrier"]
    assert set(rows["activations"].cost) == {"match", "evaluation"}
