"""From checkpoints to a checkpoint: a fine-tune onto a new base, networks aligned, networks summed."""

from regraft.porting.alignment import match_checkpoints
from regraft.porting.data import Data, data_by_name, data_of
from regraft.porting.fuse import fuse_checkpoints
from regraft.porting.job import Job
from regraft.porting.methods import PORT_METHODS, Ported, PortProblem, PortWork, port_method
from regraft.porting.model_spec import Settings
from regraft.porting.port_settings import PortSettings
from regraft.porting.ports import plan, port
from regraft.porting.recipe import FuseSettings, MergeRecipe
from regraft.porting.result import Result

__all__ = [
    "PORT_METHODS",
    "Data",
    "FuseSettings",
    "Job",
    "MergeRecipe",
    "PortProblem",
    "PortSettings",
    "PortWork",
    "Ported",
    "Result",
    "Settings",
    "data_by_name",
    "data_of",
    "fuse_checkpoints",
    "match_checkpoints",
    "plan",
    "port",
    "port_method"
]  # fmt: skip
