"""regraft: move learning from one neural network into another, and measure what that is worth.

The names below are the public interface. They are resolved on first use, so that
``import regraft`` (and with it ``regraft --help``) does not pay for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "trace": "symmetry",
    "with_output": "core.forward",
    "verify": "symmetry",
    "apply": "symmetry",
    "inverse": "symmetry",
    "PermutationSpec": "symmetry",
    "match": "matching",
    "Match": "matching",
    "Trajectory": "learning_transfer",
    "transfer": "learning_transfer",
    "Transfer": "learning_transfer",
    "transfer_to_many": "learning_transfer",
    "Transfers": "learning_transfer",
    "fuse": "fusion",
    "assign_gradient": "fusion",
    "port": "porting",
    "match_checkpoints": "porting",
    "fuse_checkpoints": "porting",
}

_MODULES = {
    "activations": "fusion.repair",
    "fast": "finetuning.fast",
    "fusion": "fusion",
    "gradfix": "porting.gradfix",
    "grids": "fusion.grids",
    "porting": "porting",
}

__all__ = [
    "Match",
    "PermutationSpec",
    "Trajectory",
    "Transfer",
    "Transfers",
    "__version__",
    "activations",
    "apply",
    "assign_gradient",
    "fast",
    "fuse",
    "fuse_checkpoints",
    "fusion",
    "gradfix",
    "grids",
    "inverse",
    "match",
    "match_checkpoints",
    "port",
    "porting",
    "trace",
    "transfer",
    "transfer_to_many",
    "verify",
    "with_output",
]

if TYPE_CHECKING:
    from regraft import porting
    from regraft.core.forward import with_output
    from regraft.finetuning import fast
    from regraft.fusion import grids
    from regraft.fusion import repair as activations
    from regraft.fusion import sums as fusion
    from regraft.fusion.sums import assign_gradient, fuse
    from regraft.learning_transfer.driver import Transfer, Transfers, transfer, transfer_to_many
    from regraft.learning_transfer.trajectory import Trajectory
    from regraft.matching.descent import Match, match
    from regraft.porting import fuse_checkpoints, gradfix, match_checkpoints, port
    from regraft.symmetry import PermutationSpec, apply, inverse, trace, verify


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = import_module(f"regraft.{_MODULES[name]}")
    elif name in _PUBLIC:
        value = getattr(import_module(f"regraft.{_PUBLIC[name]}"), name)
    else:
        raise AttributeError(f"module 'regraft' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
