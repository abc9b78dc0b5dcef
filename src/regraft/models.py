"""The networks of the papers and small ones for two cores, as plain modules, and their initial values.

A model is only the description of a function; its values travel beside it as a dictionary
name -> tensor (`Tensors`). All initial values are PyTorch's defaults, drawn from a generator that is
handed in: `build` and `initialise` neither read nor change torch's global random state. (Conv8 alone has
another distribution; it says why.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tensors = dict[str, Tensor]


# ---------------------------------------------------------------------------------------------------
# Values of a model


def state(model: nn.Module) -> Tensors:
    """The model's parameters and buffers by name, as detached copies."""
    return {name: tensor.detach().clone() for name, tensor in live_state(model).items()}


def live_state(model: nn.Module) -> Tensors:
    """The model's own parameters and buffers by name: not copies."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@contextmanager
def seeded(generator: torch.Generator, device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside, torch's global random state is one that the generator chose; afterwards it is as before.

    For code that can only draw from the global state: module constructors, dropout. Takes one number
    from the generator. Not for several threads at once: the global state is one for all of them.
    """
    device = torch.device(device)
    accelerators = [device] if device.type == "cuda" else []
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=accelerators):
        # Not torch.manual_seed, which reseeds every accelerator, those that are not restored included.
        torch.default_generator.manual_seed(seed)
        for accelerator in accelerators:
            with torch.cuda.device(accelerator):
                torch.cuda.manual_seed(seed)
        yield


def build(factory: Callable[[], nn.Module], generator: torch.Generator) -> nn.Module:
    """The module that ``factory`` makes, its initial values drawn from the generator.

    For any constructor, torchvision's included: ``build(lambda: resnet18(num_classes=10), generator)``.
    """
    with seeded(generator):
        return factory()


def initialise(model: nn.Module, generator: torch.Generator) -> Tensors:
    """Fresh initial values for the model, drawn from the generator; the model itself keeps its own.

    Every module is reset as its constructor would (``reset_parameters``). Raises ValueError naming a
    parameter that belongs to a module without that method: use `build` for such a model.
    """
    fresh = copy.deepcopy(model).cpu()
    with seeded(generator):
        # Parts before wholes: a module that resets what it is made of has the last word.
        for name, module in reversed(list(fresh.named_modules())):
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
            if reset is not None:
                reset()
            elif own:
                raise ValueError(
                    f"parameter {'.'.join(filter(None, [name, own[0]]))!r} has no reset_parameters: "
                    "draw this model's initial values with regraft.models.build"
                )
    return {name: tensor.to(live_state(model)[name].device) for name, tensor in state(fresh).items()}


def head(model: nn.Module) -> str:
    """The name of the model's last linear layer, its classifier. Raises ValueError where there is none."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layer that could be its classifier")
    return names[-1]


def new_head(
    model: nn.Module, tensors: Tensors, num_classes: int, generator: torch.Generator
) -> tuple[nn.Module, Tensors]:
    """A model and values for another task: a fresh last linear layer for ``num_classes`` classes.

    Every other value is that of ``tensors``. Neither the model nor ``tensors`` is changed.
    """
    name = head(model)
    adopted = copy.deepcopy(model)
    old = adopted.get_submodule(name)
    fresh = build(lambda: nn.Linear(old.in_features, num_classes, bias=old.bias is not None), generator)
    adopted.set_submodule(name, fresh.to(old.weight))
    values = dict(tensors)
    values.update({f"{name}.{key}": value for key, value in state(fresh).items()})
    return adopted, values


# ---------------------------------------------------------------------------------------------------
# Networks


def _scaled(width: float, *channels: int) -> list[int]:
    """Numbers of channels times a width factor, at least one each."""
    if width <= 0:
        raise ValueError(f"the width factor must be positive, not {width}")
    return [max(1, round(width * count)) for count in channels]


class MLP(nn.Module):
    """Linear layers with ReLU between; images are flattened first."""

    def __init__(self, sizes: Sequence[int], bias: bool = True) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"an MLP needs the sizes of its input and output at least, not {list(sizes)}")
        self.layers = nn.ModuleList(
            nn.Linear(fan_in, fan_out, bias=bias) for fan_in, fan_out in pairwise(sizes)
        )

    def forward(self, images: Tensor) -> Tensor:
        hidden = images.flatten(1)
        for layer in self.layers[:-1]:
            hidden = F.relu(layer(hidden))
        return self.layers[-1](hidden)


def mlp(sizes: Sequence[int], bias: bool = True) -> nn.Module:
    """An MLP: ``mlp([784, 4096, 10])`` is the 2-MLP of "Transferring Learning Trajectories", table 1."""
    return MLP(sizes, bias)


class ConvNet(nn.Module):
    """Convolutional features, then an MLP on their flattened output."""

    def __init__(self, features: Sequence[nn.Module], classifier: Sequence[int]) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        self.classifier = MLP(classifier)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


def _conv(channels_in: int, channels_out: int, kernel: int = 3, padding: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, kernel, padding=padding), nn.ReLU()]


def lenet(num_classes: int = 10, in_channels: int = 1, size: int = 28) -> nn.Module:
    """LeNet with ReLU and max-pooling: two 5x5 convolutions (20, 50) and linear 500-classes."""
    side = ((size - 4) // 2 - 4) // 2
    features = [*_conv(in_channels, 20, 5, 0), nn.MaxPool2d(2), *_conv(20, 50, 5, 0), nn.MaxPool2d(2)]
    return ConvNet(features, [50 * side * side, 500, num_classes])


def small_cnn(num_classes: int = 10, in_channels: int = 3, size: int = 32) -> nn.Module:
    """The network of "Rethinking the Dependence", sections 3 and 4 (its appendix A.2).

    Two 5x5 convolutions (6, 16), each with ReLU and max-pooling, and linear 400-120-84-classes.
    """
    side = ((size - 4) // 2 - 4) // 2
    features = [*_conv(in_channels, 6, 5, 0), nn.MaxPool2d(2), *_conv(6, 16, 5, 0), nn.MaxPool2d(2)]
    return ConvNet(features, [16 * side * side, 120, 84, num_classes])


def digits_conv(num_classes: int = 10, in_channels: int = 1, width: float = 1.0) -> nn.Module:
    """A small convolutional network for 8x8 images: 3x3 convolutions 32, 64, 64 and linear 256-64-classes."""
    a, b, c = _scaled(width, 32, 64, 64)
    features = [
        *_conv(in_channels, a), *_conv(a, b), nn.MaxPool2d(2), *_conv(b, c), nn.MaxPool2d(2),
    ]  # fmt: skip
    return ConvNet(features, [4 * c, c, num_classes])


class Conv8(ConvNet):
    """A convolutional network of eleven layers without normalisation.

    Its initial values are those of He et al. (2015), as the paper says: weights N(0, 2 / fan_in), biases 0.
    torch's own default, variance 1 / (3 fan_in), keeps a sixth of the signal per layer, which is next to
    nothing after eleven: in our runs (widths 0.125 and 0.25, learning rates 0.05 and 0.2, batches of 32 and
    128) the loss stayed at ln 10 as long as we looked, three to six epochs.
    """

    def __init__(self, num_classes: int, width: float, in_channels: int) -> None:
        a, b, c, d, e = _scaled(width, 64, 128, 256, 512, 256)
        features = [
            *_conv(in_channels, a), *_conv(a, a), nn.MaxPool2d(2),
            *_conv(a, b), *_conv(b, b), nn.MaxPool2d(2),
            *_conv(b, c), *_conv(c, c), nn.MaxPool2d(2),
            *_conv(c, d), *_conv(d, d), nn.MaxPool2d(4),
            *_conv(d, d),
        ]  # fmt: skip
        super().__init__(features, [d, e, e, num_classes])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)


def conv8(num_classes: int = 10, width: float = 1.0, in_channels: int = 3) -> nn.Module:
    """Conv8 of "Transferring Learning Trajectories", table 2, for 32x32 images; all layers times ``width``.

    (The table's last layer has 512 inputs, but what flows into it are the 256 outputs of the one before.)
    """
    return Conv8(num_classes, width, in_channels)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut (a 1x1 convolution where shapes change)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(images)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(images))


class CifarResNet18(nn.Module):
    """ResNet-18 for small images: a 3x3 stem without pooling, four stages of two blocks."""

    def __init__(self, num_classes: int, width: float, in_channels: int) -> None:
        super().__init__()
        stages = _scaled(width, 64, 128, 256, 512)
        self.conv1 = nn.Conv2d(in_channels, stages[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stages[0])
        blocks, channels = [], stages[0]
        for stage, count in enumerate(stages):
            blocks += [
                BasicBlock(channels, count, stride=2 if stage else 1),
                BasicBlock(count, count, stride=1),
            ]
            channels = count
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.blocks(F.relu(self.bn1(self.conv1(images))))
        return self.fc(F.adaptive_avg_pool2d(hidden, 1).flatten(1))


def cifar_resnet18(num_classes: int = 10, width: float = 1.0, in_channels: int = 3) -> nn.Module:
    """ResNet-18 (He et al., 2016) in its usual form for 32x32 images; all layers times ``width``."""
    return CifarResNet18(num_classes, width, in_channels)


class Residual8(nn.Module):
    """Eight blocks (3x3 convolution, BatchNorm, ReLU), with shortcuts from 2 to 4 and from 6 to 8."""

    def __init__(self, num_classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        counts = [in_channels, *_scaled(width, 64, 128, 128, 128, 256, 512, 512, 512)]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.BatchNorm2d(fan_out), nn.ReLU())
            for fan_in, fan_out in pairwise(counts)
        )
        self.fc = nn.Linear(counts[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        block = self.blocks
        hidden = F.max_pool2d(block[1](block[0](images)), 2)
        hidden = hidden + block[3](block[2](hidden))
        hidden = F.max_pool2d(block[4](hidden), 2)
        hidden = F.max_pool2d(block[5](hidden), 2)
        hidden = hidden + block[7](block[6](hidden))
        return self.fc(F.adaptive_max_pool2d(hidden, 1).flatten(1))


def residual8(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> nn.Module:
    """The residual network of "Rethinking the Dependence", section 5 (its appendix A.2).

    The paper gives neither the numbers of channels nor the place of the poolings. These are the ones of
    the widely used network of that form: 64, 128, 128, 128, 256, 512, 512, 512, with pooling by two
    after blocks 2, 5 and 6 (a shortcut starts at the pooled output), and max-pooling over what is left.
    """
    return Residual8(num_classes, in_channels, width)
