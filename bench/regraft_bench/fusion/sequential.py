"""Two tasks in one network: what training them one after the other forgets, and the term that the paper explains it by.

Elastic weight consolidation (Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks",
2017) and training on both data sets together are the peers of fusion and gradient assignment;
:func:`cancellation` measures the gradient-of-gradient term of "Rethinking the Dependence Between Gradients
and the Initial Point in Deep Learning", appendix B.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regraft.core.forward import call
from regraft.core.tensors import Batch, Tensors, check_alike, digest_tensors
from regraft.data import Dataset, Split, normalise
from regraft.training.evaluation import complete, evaluating, gradients, mode


def together(first: Dataset, second: Dataset, *, repeat: int = 1) -> Dataset:
    """Both data sets as one, with the labels that they have: class k of either is output k.

    Each keeps its own normalisation. The second's training images stand `repeat` times.
    """

    def join(a: Split, b: Split, times: int) -> Split:
        images = [normalise(part.images, part.mean, part.std) for part in (a, *[b] * times)]
        return Split(torch.cat(images), torch.cat([a.labels, *[b.labels] * times]))

    return replace(
        first,
        name=f"{first.name}+{second.name}",
        train=join(first.train, second.train, repeat),
        validation=join(first.validation, second.validation, 1),
        test=join(first.test, second.test, 1),
        mean=(0.0,) * len(first.mean),
        std=(1.0,) * len(first.std),
    )


def fisher(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    images: Tensor,
    *,
    generator: torch.Generator,
    batch_size: int = 100,
) -> Tensors:
    """The diagonal of the Fisher information at `tensors`, one tensor per parameter.

    Mean over `images` [N, ...] of the squared gradient of the log-likelihood, image by image, of a label
    that is drawn from the model's own prediction; in evaluation mode. Raises ValueError for no images.
    """
    if len(images) == 0:
        raise ValueError("there are no images to estimate the Fisher information on")
    parameters = {name: tensors[name].detach() for name, _ in model.named_parameters()}
    buffers = {name: value for name, value in complete(model, tensors).items() if name not in parameters}

    def loss(values: Tensors, image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(call(model, {**values, **buffers}, image[None]), label[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    with evaluating(model):
        for part in images.split(batch_size):
            with torch.no_grad():
                chances = call(model, {**parameters, **buffers}, part).softmax(-1).cpu()
            labels = torch.multinomial(chances, 1, generator=generator)[:, 0].to(part.device)
            for name, squares in each(parameters, part, labels).items():
                total[name] += squares.square().sum(0)
    return {name: value / len(images) for name, value in total.items()}


@dataclass(frozen=True, eq=False)
class Consolidation:
    """Elastic weight consolidation, a penalty for :func:`regraft.training.loop.train` from ``anchor`` on.

    The loss is cross-entropy + strength / 2 * sum_i importance_i (theta_i - anchor_i)^2 (equation 3 of Kirkpatrick et
    al.). anchor: the values after the first task. importance: by parameter, as :func:`fisher` finds it. Raises
    ValueError for a negative strength and for an importance that does not fit the anchor.
    """

    anchor: Tensors
    importance: Tensors
    strength: float

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise ValueError(f"the strength must be at least 0, not {self.strength}")
        check_alike(
            self.importance,
            {name: self.anchor[name] for name in self.importance if name in self.anchor},
            "the importance",
            "the anchor",
        )

    @property
    def identity(self) -> str:
        return f"{self.strength} {digest_tensors(self.anchor)} {digest_tensors(self.importance)}"

    def __call__(self, network: nn.Module) -> None:
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                moved = parameter - self.anchor[name]
                parameter.grad.addcmul_(self.importance[name], moved, value=self.strength)


# ---------------------------------------------------------------- the theory


@dataclass(frozen=True)
class Cancellation:
    """How well - beta_B H_A g_B explains what sequential training does and assignment does not.

    Attributes:
        rate: the learning rate of both tasks; steps: how many of each.
        difference: norm of theta_BA - theta'_BA (trained one after the other, minus assigned).
        predicted: norm of (steps * rate)^2 H_A g_B, the difference to first order.
        relative_error: norm of (difference - prediction) over the norm of the difference.
        cosine: between the two.
    """

    rate: float
    steps: int
    difference: float
    predicted: float
    relative_error: float
    cosine: float


def cancellation(
    model: nn.Module,
    start: Tensors,
    first: Sequence[Batch],
    second: Sequence[Batch],
    rate: float,
    *,
    steps: int = 1,
) -> Cancellation:
    """Train task B (`second`) and then task A (`first`) from `start`, and compare with assigning A's gradient.

    Both by full-batch gradient descent, `steps` steps at `rate`. With theta_B = start - sum of B's steps,
    theta_BA is A's training from theta_B, theta'_BA = theta_B + (A's training from start - start). To first
    order they differ by (steps * rate)^2 H_A g_B at `start`, here by a Hessian-vector product (appendix
    B.2 has the term with the sign that it has in the gradient).
    """
    names = [name for name, _ in model.named_parameters()]

    def descend(begin: Tensors, batches: Sequence[Batch]) -> Tensors:
        values = dict(begin)
        for _ in range(steps):
            found = gradients(model, values, batches)
            values.update({name: values[name] - rate * found[name] for name in names})
        return values

    def flat(tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].flatten() for name in names])

    theta_b = descend(start, second)
    sequential = flat(descend(theta_b, first))
    assigned = flat(theta_b) + flat(descend(start, first)) - flat(start)
    difference = sequential - assigned
    g_b = gradients(model, start, second)
    predicted = (steps * rate) ** 2 * flat(hessian_vector(model, start, first, g_b))
    return Cancellation(
        rate=rate,
        steps=steps,
        difference=float(difference.norm()),
        predicted=float(predicted.norm()),
        relative_error=float((difference - predicted).norm() / difference.norm()),
        cosine=float(difference @ predicted / (difference.norm() * predicted.norm())),
    )


def hessian_vector(
    model: nn.Module, tensors: Tensors, batches: Iterable[Batch], vector: Mapping[str, Tensor]
) -> Tensors:
    """H v: the Hessian of the mean loss over `batches` at `tensors`, times `vector`, by parameter name.

    One forward-over-reverse pass a batch; in training mode, as :func:`regraft.training.evaluation.gradients` is.
    Raises ValueError for no batches.
    """
    values = complete(model, tensors)
    names = [name for name, _ in model.named_parameters()]
    parameters = {name: values[name].detach() for name in names}
    along = {name: vector[name] for name in names}

    def gradient_of(images: Tensor, labels: Tensor) -> Callable[[Tensors], Tensors]:
        buffers = {name: value.clone() for name, value in values.items() if name not in parameters}
        return torch.func.grad(lambda p: F.cross_entropy(call(model, {**p, **buffers}, images), labels))

    total, count = {name: torch.zeros_like(along[name]) for name in names}, 0
    with mode(model, lambda module: not isinstance(module, nn.modules.dropout._DropoutNd)):
        for images, labels in batches:
            _, product = torch.func.jvp(gradient_of(images, labels), (parameters,), (along,))
            for name in names:
                total[name] += product[name]
            count += 1
    if count == 0:
        raise ValueError("there is no batch to take a Hessian on")
    return {name: value / count for name, value in total.items()}
