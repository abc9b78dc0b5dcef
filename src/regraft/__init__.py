"""regraft: move learning from one neural network into another, and measure what that is worth.

The names below are the public interface. They are resolved on first use, so that
``import regraft`` (and with it ``regraft --help``) does not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = {
    "PermutationSpec": "symmetry:PermutationSpec",
    "trace": "symmetry:trace",
    "verify": "symmetry:verify",
    "apply": "symmetry:apply",
    "inverse": "symmetry:inverse",
    "with_output": "core.forward:with_output",
    "Match": "matching:Match",
    "match": "matching:match",
    "Trajectory": "learning_transfer:Trajectory",
    "Transfer": "learning_transfer:Transfer",
    "Transfers": "learning_transfer:Transfers",
    "transfer": "learning_transfer:transfer",
    "transfer_to_many": "learning_transfer:transfer_to_many",
    "assign_gradient": "fusion:assign_gradient",
    "fuse": "fusion:fuse",
    "port": "porting:port",
    "match_checkpoints": "porting:match_checkpoints",
    "fuse_checkpoints": "porting:fuse_checkpoints",
    "activations": "fusion.repair",
    "fast": "finetuning.fast",
    "fusion": "fusion",
    "gradfix": "porting.gradfix",
    "grids": "fusion.grids",
    "porting": "porting",
}
"""Public name -> the module that it is, or module:name."""

_OF_THE_SUITE = ("load_results",)
"""Functions that the benchmark suite brings, by the entry points ``regraft.functions``."""

if TYPE_CHECKING:  # the same for type checkers, which read no table: a test compares the two
    from regraft import fusion as fusion
    from regraft import porting as porting
    from regraft.core.forward import with_output as with_output
    from regraft.finetuning import fast as fast
    from regraft.fusion import assign_gradient as assign_gradient
    from regraft.fusion import fuse as fuse
    from regraft.fusion import grids as grids
    from regraft.fusion import repair
    from regraft.learning_transfer import Trajectory as Trajectory
    from regraft.learning_transfer import Transfer as Transfer
    from regraft.learning_transfer import Transfers as Transfers
    from regraft.learning_transfer import transfer as transfer
    from regraft.learning_transfer import transfer_to_many as transfer_to_many
    from regraft.matching import Match as Match
    from regraft.matching import match as match
    from regraft.porting import fuse_checkpoints as fuse_checkpoints
    from regraft.porting import gradfix as gradfix
    from regraft.porting import match_checkpoints as match_checkpoints
    from regraft.porting import port as port
    from regraft.symmetry import PermutationSpec as PermutationSpec
    from regraft.symmetry import apply as apply
    from regraft.symmetry import inverse as inverse
    from regraft.symmetry import trace as trace
    from regraft.symmetry import verify as verify
    from regraft_bench.studies import load_results as load_results

    activations = repair
else:
    __all__ = ["__version__", *_PUBLIC, *_OF_THE_SUITE]

    def __getattr__(name: str) -> object:
        if name in _OF_THE_SUITE:
            from importlib.metadata import entry_points

            for entry in entry_points(group="regraft.functions", name=name):
                return entry.load()
            raise AttributeError(f"regraft.{name} belongs to the benchmark suite: pip install '.[bench]'")
        if name not in _PUBLIC:
            raise AttributeError(f"module 'regraft' has no attribute {name!r}")
        module, _, attribute = _PUBLIC[name].partition(":")
        value = import_module(f"regraft.{module}")
        globals()[name] = value = getattr(value, attribute) if attribute else value
        return value

    def __dir__() -> list[str]:
        return sorted(__all__)
