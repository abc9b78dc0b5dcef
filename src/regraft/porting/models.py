"""A model by what one would call it on a command line, with the inputs that it usually takes."""

from __future__ import annotations

import difflib
import importlib
import math
import os
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PIXELS = (1, 3, 224, 224)
LARGEST_INPUT = 2**30
"""Numbers."""


@dataclass(frozen=True, eq=False)
class NamedModel:
    """An untrained model, one batch of random inputs, and how its images are normalised, where that is known.

    inputs: a tensor, or keyword inputs. mean, std: one number a channel, pixels counted from 0 to 1.
    """

    model: nn.Module
    inputs: Tensor | dict[str, Tensor]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def by_name(name: str, shape: Sequence[int] | None = None) -> NamedModel:
    """The model of this name.

    Args:
        name: a classification model of torchvision; ``timm/NAME``, one of timm; ``hf/FOLDER``, one of transformers, by
            a folder with its config.json; or ``module:factory``, where the factory (a class, a function or a model)
            needs no arguments.
        shape: of one input, batch first; the model's usual one if not given.

    Raises ValueError, with the nearest names, for a model that cannot be found or made.
    """
    if shape is not None and not (shape and min(shape) > 0 and math.prod(shape) <= LARGEST_INPUT):
        raise ValueError(f"no shape of an input: {tuple(shape)}")
    if name.startswith("hf/"):
        return _from_transformers(name.removeprefix("hf/"), shape)
    if name.startswith("timm/"):
        return _from_timm(name.removeprefix("timm/"), shape)
    if ":" in name:
        return NamedModel(_call_factory(name), _pixels(shape or PIXELS))
    return _from_torchvision(name, shape)


def from_module(name: str) -> Any:
    """What ``module:name`` names; the module may stand where the user does.

    Raises ValueError where it cannot be imported, or has no such name.
    """
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)  # as `python -m` does
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ValueError(f"cannot find {name!r}: {type(error).__name__}: {error}") from error
    finally:
        os.chdir(here)  # paths of the command mean where it was started, whatever a module does
        with suppress(ValueError):
            sys.path.remove(here)


def _pixels(shape: Sequence[int]) -> Tensor:
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(0))


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f" (do you mean {' or '.join(close)}?)" if close else ""


def _from_torchvision(name: str, shape: Sequence[int] | None) -> NamedModel:
    import torchvision.models as zoo

    known = zoo.list_models(module=zoo)
    if name not in known:
        raise ValueError(
            f"torchvision has no classification model {name!r}{_nearest(name, known)}"
            "; your own model is given as module:factory"
        )
    usual = zoo.get_model_weights(name).DEFAULT.transforms()
    (crop,) = usual.crop_size
    inputs = _pixels(shape or (1, 3, crop, crop))
    return NamedModel(zoo.get_model(name), inputs, tuple(usual.mean), tuple(usual.std))


def _from_timm(name: str, shape: Sequence[int] | None) -> NamedModel:
    try:
        import timm
    except ImportError:
        raise ValueError("models of timm need the package timm") from None
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}{_nearest(name, timm.list_models())}")
    model = timm.create_model(name, pretrained=False)
    usual = model.pretrained_cfg
    inputs = _pixels(shape or (1, *usual.get("input_size", PIXELS[1:])))
    return NamedModel(model, inputs, usual.get("mean"), usual.get("std"))


def _from_transformers(folder: str, shape: Sequence[int] | None) -> NamedModel:
    """By config.json; inputs are tokens, pixels or sound, by the model's main input."""
    try:
        import transformers
    except ImportError:
        raise ValueError("models of transformers need the package transformers") from None
    try:
        # Left out, trust_remote_code makes transformers ask on stdin whether to run code of the folder.
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind = (config.architectures or [None])[0]
        model = (
            getattr(transformers, kind)(config)
            if kind
            else transformers.AutoModel.from_config(config, trust_remote_code=False)
        )
    except Exception as error:
        said = str(error).partition("\n")[0]
        raise ValueError(f"cannot make a model of {folder!r}: {type(error).__name__}: {said}") from error
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        return NamedModel(model, {"pixel_values": _pixels(shape or (1, 3, size, size))})
    if model.main_input_name == "input_values":
        return NamedModel(model, {"input_values": _pixels(shape or (1, 4000))})
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, tuple(shape or (1, 8)), generator=generator)
    both = {"decoder_input_ids": tokens} if config.is_encoder_decoder else {}
    return NamedModel(model, {"input_ids": tokens, **both})


def _call_factory(name: str) -> nn.Module:
    made, here = from_module(name), os.getcwd()
    try:
        model = made if isinstance(made, nn.Module) else made()
    except Exception as error:
        raise ValueError(f"cannot make a model of {name!r}: {type(error).__name__}: {error}") from error
    finally:
        os.chdir(here)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name!r} gives a {type(model).__name__}, not a torch.nn.Module")
    return model
