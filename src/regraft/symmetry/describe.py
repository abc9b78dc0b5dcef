"""What the command says about a model's symmetry."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

import torch
from torch import nn

from regraft.symmetry.spec import PermutationSpec, parameters_moved
from regraft.symmetry.trace import trace
from regraft.symmetry.verify import verify


def describe(name: str, shape: Sequence[int] | None = None) -> PermutationSpec:
    """What ``regraft symmetry NAME`` does: traces a model, prints its groups, and proves them.

    ``name``: a classification model of torchvision; ``timm/NAME``, one of timm; ``hf/FOLDER``, one of transformers,
    by a folder with its config.json; or ``module:factory``, where the factory (a class, a function or a model)
    needs no arguments. ``shape``: of one input, batch first; the model's usual one if not given.
    Raises ValueError for a model that cannot be found, called, traced or proved.
    """
    from rich.console import Console

    generator = torch.Generator().manual_seed(0)
    if name.startswith("hf/"):
        model, inputs = _from_transformers(name.removeprefix("hf/"), shape, generator)
    else:
        if name.startswith("timm/"):
            model, usual = _from_timm(name.removeprefix("timm/"))
        else:
            model, usual = (
                _from_torchvision(name) if ":" not in name else (_from_module(name), (1, 3, 224, 224))
            )
        inputs = torch.rand(tuple(shape or usual), generator=generator)
    console = Console()
    with console.status(f"tracing {name}"):
        spec = trace(model, inputs)
    console.print(spec.table())
    with console.status(f"proving {name}"):
        error = verify(spec, model, inputs)
    console.print(
        f"{name}: proved, relative error {error:.1e} in float64; "
        f"a random permutation moves {parameters_moved(spec, model):.1%} of the parameters"
    )
    return spec


def _from_torchvision(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The untrained model, and the shape of its usual input."""
    import torchvision.models as zoo

    known = zoo.list_models(module=zoo)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        raise ValueError(
            f"torchvision has no classification model {name!r}"
            + (f" (do you mean {' or '.join(close)}?)" if close else "")
            + "; your own model is given as module:factory"
        )
    (crop,) = zoo.get_model_weights(name).DEFAULT.transforms().crop_size
    return zoo.get_model(name), (1, 3, crop, crop)


def _from_timm(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The untrained model, and the shape of its usual input."""
    try:
        import timm
    except ImportError:
        raise ValueError("models of timm need the package timm") from None
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}")
    model = timm.create_model(name, pretrained=False)
    return model, (1, *model.pretrained_cfg.get("input_size", (3, 224, 224)))


def _from_transformers(
    folder: str, shape: Sequence[int] | None, generator: torch.Generator
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The untrained model that a folder's config.json describes, and its inputs: tokens or pixels by its main input."""
    try:
        import transformers
    except ImportError:
        raise ValueError("models of transformers need the package transformers") from None
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = (config.architectures or [None])[0]
        model = getattr(transformers, kind)(config) if kind else transformers.AutoModel.from_config(config)
    except Exception as error:
        said = str(error).partition("\n")[0]
        raise ValueError(f"cannot make a model of {folder!r}: {type(error).__name__}: {said}") from error
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        return model, {"pixel_values": torch.rand(tuple(shape or (1, 3, size, size)), generator=generator)}
    if model.main_input_name == "input_values":
        return model, {"input_values": torch.rand(tuple(shape or (1, 4000)), generator=generator)}
    tokens = torch.randint(config.vocab_size, tuple(shape or (1, 8)), generator=generator)
    both = {"decoder_input_ids": tokens} if config.is_encoder_decoder else {}
    return model, {"input_ids": tokens, **both}


def _from_module(name: str) -> nn.Module:
    module, _, factory = name.partition(":")
    sys.path.insert(0, os.getcwd())  # as `python -m` does: the user's own module stands where the user does
    try:
        made = getattr(importlib.import_module(module), factory)
        model = made if isinstance(made, nn.Module) else made()
    except Exception as error:
        raise ValueError(f"cannot make a model of {name!r}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name!r} gives a {type(model).__name__}, not a torch.nn.Module")
    return model
