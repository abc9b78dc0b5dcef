"""From checkpoints to a checkpoint: a fine-tune onto a new base, networks aligned, networks summed."""

from regraft.porting.aligning import Aligned, fuse_checkpoints, match_checkpoints
from regraft.porting.data import Data, data_by_name, data_of
from regraft.porting.methods import METHODS, Ported, Work
from regraft.porting.plans import Plan
from regraft.porting.ports import Port, plan, port

__all__ = [
    "METHODS",
    "Aligned",
    "Data",
    "Plan",
    "Port",
    "Ported",
    "Work",
    "data_by_name",
    "data_of",
    "fuse_checkpoints",
    "match_checkpoints",
    "plan",
    "port",
]
