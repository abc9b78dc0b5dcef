"""What a fine-tune does to any input, given to a new base: ports that need inputs of the task, but no labels."""

from regraft.porting.label_free.distil import distil
from regraft.porting.label_free.head import fit_head
from regraft.porting.label_free.outputs import predict

__all__ = ["distil", "fit_head", "predict"]
