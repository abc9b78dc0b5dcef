"""What a fine-tune does to any input, given to a new base: ports that need inputs of the task, but no labels."""

from regraft.porting.label_free.activations import activation_bytes
from regraft.porting.label_free.distillation import distil, train_on_targets
from regraft.porting.label_free.functional import match_functions
from regraft.porting.label_free.head import fit_head
from regraft.porting.label_free.outputs import predict
from regraft.porting.label_free.theseus import transport_by_activations

__all__ = [
    "activation_bytes", "distil", "fit_head", "match_functions", "predict", "train_on_targets",
    "transport_by_activations"
]  # fmt: skip
