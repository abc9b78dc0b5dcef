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
    "with_output": "forward",
    "verify": "symmetry",
    "apply": "symmetry",
    "inverse": "symmetry",
    "PermutationSpec": "symmetry",
    "match": "matching",
    "Match": "matching",
    "Trajectory": "trajectory",
    "transfer": "learning_transfer",
    "Transfer": "learning_transfer",
    "transfer_to_many": "many_targets",
    "Transfers": "many_targets",
    "fuse": "fusion",
    "assign_gradient": "fusion",
    "port": "porting",
    "match_checkpoints": "porting",
    "fuse_checkpoints": "porting",
}

_MODULES = ("activations", "fast", "fusion", "gradfix", "grids", "porting")

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
    from regraft import activations, fast, fusion, gradfix, grids, porting
    from regraft.forward import with_output
    from regraft.fusion import assign_gradient, fuse
    from regraft.learning_transfer import Transfer, transfer
    from regraft.many_targets import Transfers, transfer_to_many
    from regraft.matching import Match, match
    from regraft.porting import fuse_checkpoints, match_checkpoints, port
    from regraft.symmetry import PermutationSpec, apply, inverse, trace, verify
    from regraft.trajectory import Trajectory


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = import_module(f"regraft.{name}")
    elif name in _PUBLIC:
        value = getattr(import_module(f"regraft.{_PUBLIC[name]}"), name)
    else:
        raise AttributeError(f"module 'regraft' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
