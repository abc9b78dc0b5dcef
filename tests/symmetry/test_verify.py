"""The proof: it holds for what is traced, over every axis of small models, and for nothing else."""

from __future__ import annotations

import pytest
import torch
from nets import Net
from torch import Tensor, nn

from regraft.symmetry import PermutationSpec, Segment, trace, verify


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.second = nn.Linear(6, 6)
        self.out = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.first(x).tanh()).tanh())


class Residual(nn.Module):
    """Convolution, BatchNorm, a square residual layer, flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.inner = nn.Conv2d(4, 4, 1, bias=False)
        self.fc = nn.Linear(16, 4)
        self.out = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.inner(x)
        return self.out(self.fc(x.flatten(1)).relu())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 8)
        self.position = nn.Parameter(torch.zeros(1, 5, 8))
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.Parameter(torch.full((8,), 1e-6))
        self.head = nn.Linear(8, 2)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x) + self.position
        y = self.norm(x)
        return self.head(self.norm(x + self.scale * self.attention(y, y, y)[0]).mean(1))


PROVED = {"mlp": (Mlp, (3, 5)), "residual": (Residual, (2, 2, 2, 2)), "attention": (Attention, (2, 5, 3))}


@pytest.mark.parametrize("name", PROVED)
def test_the_proof_fails_when_any_one_axis_is_changed(name):
    """Every axis of every tensor: one that moves is tied to each other group of its size or fixed, and one that is
    fixed is tied to each group of its size."""
    make, shape = PROVED[name]
    torch.manual_seed(0)
    model, x = make(), torch.rand(shape)
    spec = trace(model, x)
    assert verify(spec, model, x) < 1e-12
    changed = 0
    for tensor, sizes in spec.shapes.items():
        for a, size in enumerate(sizes):
            right = spec.axes[tensor][a]
            wrong = [(Segment(group, 0, n),) for group, n in spec.groups.items() if n == size]
            for axis in [(Segment(None, 0, size),), *wrong]:
                if axis == right or all(s.group is None for s in (*axis, *right)):
                    continue
                changed += 1
                with pytest.raises(ValueError, match="changes the function"):
                    verify(spec.with_axis(tensor, a, axis), model, x)
    assert changed > 10


@pytest.mark.parametrize("seed", range(8))
def test_one_draw_would_not_tell_tiny_groups_apart(seed):
    """Two groups of two units have one exchange each: half of all draws move both alike, or neither."""
    net, x = (
        nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)),
        torch.rand(4, 3),
    )
    spec = trace(net, x)
    first, second = spec.groups
    for name, group in (("0.bias", second), ("2.bias", first), ("4.bias", first)):
        wrong = spec.with_axis(name, 0, (Segment(group, 0, 2),))
        with pytest.raises(ValueError, match="changes the function"):
            verify(wrong, net, x, draws=1, generator=torch.Generator().manual_seed(seed))


def test_a_failed_proof_names_the_tensor_and_the_axis():
    model, x = Mlp(), torch.rand(3, 5)
    spec = trace(model, x)
    lacking = spec.with_axis("second.bias", 0, (Segment(None, 0, 6),))
    with pytest.raises(ValueError, match=r"group 'second' .* it lacks axis 0 of tensor 'second.bias'"):
        verify(lacking, model, x)
    permuted_outputs = spec.with_axis("out.weight", 0, (Segment("first", 0, 6),))
    with pytest.raises(ValueError, match=r"group 'first' .* axis 0 of tensor 'out.weight' does not belong to it"):
        verify(permuted_outputs, model, x)


def test_the_proof_is_not_vacuous_and_leaves_the_model_alone():
    """The attention model's head is zero and its layer scale tiny: as it stands, any specification would pass."""
    model, x = Attention().train(), torch.rand(2, 5, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spec = trace(model, x)
    wrong = spec.with_axis("scale", 0, (Segment(None, 0, 8),))
    with pytest.raises(ValueError, match="'scale'"):
        verify(wrong, model, x)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_cannot_be_proved_says_why():
    class Noisy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.rand_like(x)

    spec = PermutationSpec.build({}, {"weight": [4, 4], "bias": [4]})
    with pytest.raises(ValueError, match="Noisy gives two results for the same input"):
        verify(spec, Noisy(4, 4), torch.rand(2, 4))
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, float("nan"))
    with pytest.raises(ValueError, match="tensor 'weight' of the model holds a value that is not finite"):
        verify(spec, model, torch.rand(2, 4))
    with pytest.raises(ValueError, match="lacks tensor 'bias'"):
        verify(PermutationSpec.build({}, {"weight": [4, 4]}), nn.Linear(4, 4), torch.rand(2, 4))


@pytest.mark.parametrize(
    ("name", "rows", "value"),
    [
        ("inner.weight", slice(None), 1e-10),  # a branch
        ("scale", slice(None), 1e-9),  # a layer scale
        ("gate", slice(None), -40.0),
        ("out.weight", slice(1), 1e11),  # one row of the output
    ],
)
def test_what_is_far_too_small_or_large_hides_no_wrong_axis(name, rows, value):
    torch.manual_seed(0)

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = m.stem(x).tanh()
        return m.out(h + m.scale * m.inner(h).tanh() * m.gate.sigmoid())

    layers = {"stem": (4, 6), "inner": (6, 6), "out": (6, 3)}
    net = Net(forward, **layers, scale=nn.Parameter(torch.ones(6)), gate=nn.Parameter(torch.rand(6)))
    with torch.no_grad():
        tensor = dict(net.named_parameters())[name]
        tensor[rows] = value * (0.5 + torch.rand_like(tensor[rows]))
    x = torch.rand(3, 4)
    spec = trace(net, x)
    assert verify(spec, net, x) < 1e-12
    with pytest.raises(ValueError, match="changes the function"):
        verify(spec.with_axis("inner.weight", 0, (Segment(None, 0, 6),)), net, x)


class Chooser(nn.Module):
    """The number of a class that always wins."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(4, 6), nn.Linear(6, 3)
        self.out.bias.data = torch.tensor([1.0, 2.0, 900.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.stem(x).tanh()).argmax(-1)


class Headed(nn.Module):
    """A head that runs in training mode only, and drops out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out, self.head = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.stem(x).tanh()
        extra = [nn.functional.dropout(self.head(h), 0.5)] if self.training else []
        return [self.out(h), *extra]


@pytest.mark.parametrize(("kind", "name"), [(Chooser, "out.weight"), (Headed, "head.weight")])
def test_a_wrong_axis_before_an_integer_or_in_a_training_head_is_found(kind, name):
    torch.manual_seed(0)
    model, x = kind(), torch.rand(3, 4)
    spec = trace(model, x)
    assert verify(spec, model, x) < 1e-10
    with pytest.raises(ValueError, match=f"it lacks axis 1 of tensor '{name}'"):
        verify(spec.with_axis(name, 1, (Segment(None, 0, 6),)), model, x)
