"""GradFix: the literal form, what it keeps, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import regraft
from regraft.core.tensors import Tensors, state
from regraft.networks import papers as networks
from regraft.porting import gradfix
from regraft.reference import gradfix as reference
from regraft.training.evaluation import NotFinite, loss_and_accuracy
from regraft.training.gradients import gradients

NETWORKS = {
    "mlp": lambda: networks.mlp([48, 16, 16, 3]),
    "resnet": lambda: networks.cifar_resnet18(3, width=0.0625),
    "vit": lambda: networks.vit(3, size=4, patch=2, width=8, depth=1, heads=2),
}


KEY_BIAS = "blocks.0.attention.in_proj_bias"
"""Attention does not depend on the keys' bias (its middle third): the gradient is 0 but for rounding."""


def certain(theta: Tensors) -> Tensors:
    """Without the entries whose gradient only rounding decides."""
    if KEY_BIAS not in theta:
        return theta
    query, _, value = theta[KEY_BIAS].chunk(3)
    return theta | {KEY_BIAS: torch.cat([query, value])}


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(name: str) -> tuple[nn.Module, Tensors, Tensors, list]:
    """A model, a base, a task vector, and two batches of 5 and 3 images."""
    model = networks.build(NETWORKS[name], torch.Generator().manual_seed(0))
    tau = {n: 0.1 * drawn(i, *p.shape) for i, (n, p) in enumerate(model.named_parameters())}
    labels = torch.arange(8) % 3
    images = drawn(99, 8, 3, 4, 4)
    return model, state(model), tau, [(images[:5], labels[:5]), (images[5:], labels[5:])]


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_the_literal_form(name):
    model, base, tau, batches = made(name)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    found = certain(gradfix.transport(model, base, tau, batches, alpha=0.7))
    votes = reference.vote_images(model, base, images, labels)
    wanted = certain(reference.transport_masked(base, tau, votes, 0.7))
    assert found.keys() == base.keys()
    for tensor in base:
        torch.testing.assert_close(found[tensor], wanted[tensor], rtol=1e-6, atol=1e-7)


def test_the_mean_gradient_is_another_direction():
    model, base, tau, batches = made("resnet")
    found = gradfix.transport(model, base, tau, batches, direction=gradients)
    wanted = reference.transport_masked(base, tau, gradients(model, base, batches), 1.0)
    for tensor in base:
        torch.testing.assert_close(found[tensor], wanted[tensor], rtol=1e-6, atol=1e-7)


@given(seed=st.integers(0, 2**20), alpha=st.floats(1e-3, 2))
@settings(max_examples=25, deadline=None)
def test_masking_descends_to_first_order(seed, alpha):
    tau, g = ({"w": drawn(s, 7, 3).round(), "b": drawn(s + 1, 5)} for s in (seed, seed + 2))
    kept = gradfix.mask(tau, g)
    for name in tau:
        agrees = tau[name] * g[name] < 0
        assert torch.equal(kept[name] != 0, agrees), "an entry is kept whole where the product is negative"
        assert torch.equal(kept[name][agrees], tau[name][agrees])
    assert sum(float((alpha * kept[n] * g[n]).sum()) for n in tau) <= 0
    assert all(torch.equal(gradfix.mask(kept, g)[n], kept[n]) for n in tau), "twice is once"
    opposite = gradfix.mask(tau, {n: -x for n, x in g.items()})
    ties = {n: torch.where(tau[n] * g[n] == 0, tau[n], 0) for n in tau}
    for n in tau:
        assert torch.equal(kept[n] + opposite[n] + ties[n], tau[n]), "ties are in neither"


def test_ties_and_tiny_values():
    tau = {"w": torch.tensor([1.0, 1.0, 0.0, 1e-30, -1e-30])}
    kept = gradfix.mask(tau, {"w": torch.tensor([0.0, -1.0, -1.0, -1e-30, -1e-30])})["w"]
    assert kept.tolist() == torch.tensor([0.0, 1.0, 0.0, 1e-30, 0.0]).tolist()


def test_images_that_disagree_evenly_keep_nothing():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    base = {"1.weight": torch.zeros(2, 4)}
    images = torch.ones(2, 1, 2, 2)
    votes = gradfix.majority(model, base, [(images, torch.tensor([0, 1]))])
    assert votes["1.weight"].abs().max() == 0
    moved = gradfix.transport(model, base, {"1.weight": torch.ones(2, 4)}, [(images, torch.tensor([0, 1]))])
    assert torch.equal(moved["1.weight"], base["1.weight"])


def test_inputs_by_name_vote_as_images_do():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, pixels: torch.Tensor, scale: torch.Tensor) -> dict:
            return {"logits": self.layer(pixels * scale)}

    model, pixels, labels = Named(), drawn(1, 5, 4), torch.arange(5) % 2
    named = [{"pixels": pixels, "scale": torch.tensor(2.0), "labels": labels}]
    plain = gradfix.majority(model.layer, state(model.layer), [(2 * pixels, labels)])
    votes = gradfix.majority(model, state(model), named)
    assert all(torch.equal(votes[f"layer.{name}"], plain[name]) for name in plain)


def test_a_small_step_lowers_the_loss():
    model, base, tau, batches = made("mlp")
    before = loss_and_accuracy(model, base, batches)[0]
    moved = gradfix.transport(model, base, tau, batches, alpha=1e-2, direction=gradients)
    assert loss_and_accuracy(model, moved, batches)[0] < before


def test_nothing_given_is_changed():
    model, base, tau, batches = made("resnet")
    copies = [{n: x.clone() for n, x in given.items()} for given in (base, tau, state(model))]
    model.train()
    torch.manual_seed(3)
    stream = torch.get_rng_state()
    found = gradfix.transport(model, base, tau, batches)
    assert model.training and torch.equal(torch.get_rng_state(), stream)
    for given_now, before in zip((base, tau, state(model)), copies, strict=True):
        assert all(torch.equal(given_now[n], before[n]) for n in before)
    assert not any(found[n].data_ptr() == base[n].data_ptr() for n in base)
    assert all(torch.equal(found[n], base[n]) for n, _ in model.named_buffers())
    part = gradfix.transport(model, base, {"fc.bias": tau["fc.bias"]}, batches)
    assert all(torch.equal(part[n], base[n]) for n in base if n != "fc.bias")
    assert torch.equal(part["fc.bias"], found["fc.bias"])


def test_permuting_everything_permutes_the_result():
    model, base, tau, batches = made("vit")
    spec = regraft.trace(model, (batches[0][0],))
    perm = spec.random(torch.Generator().manual_seed(5))
    moved = gradfix.transport(model, base, tau, batches)
    there = gradfix.transport(model, regraft.apply(spec, perm, base), regraft.apply(spec, perm, tau), batches)
    there, wanted = certain(there), certain(regraft.apply(spec, perm, moved))
    for name in wanted:
        torch.testing.assert_close(there[name], wanted[name], rtol=1e-6, atol=1e-7)


def test_what_is_refused():
    model, base, tau, batches = made("mlp")
    name = "layers.0.weight"

    def refused(kind: type[Exception], match: str, **changed):
        given = {"new_base": base, "task_vector": tau, "batches": batches} | changed
        with pytest.raises(kind, match=match):
            gradfix.transport(model, **given)

    refused(ValueError, "no parameter", task_vector={"other": torch.zeros(1)})
    refused(ValueError, "layers.0.weight.*shape", task_vector={name: torch.zeros(2)})
    refused(ValueError, "layers.0.weight.*task vector", task_vector={name: tau[name] / 0})
    refused(ValueError, "layers.0.weight.*new base", new_base=base | {name: base[name] * torch.nan})
    refused(ValueError, "no image", batches=[])
    refused(ValueError, "labels of batch 1", batches=[batches[0], (batches[1][0], batches[1][1] + 3)])
    overflows = base | {n: base[n] * 1e30 for n in base if n.endswith("weight")}
    refused(NotFinite, "gradient", new_base=overflows)
    with pytest.raises(ValueError, match="no direction"):
        gradfix.mask(tau, {})
