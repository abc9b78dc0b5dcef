"""Learning transfer: a training run's changes, permuted by matched gradients, added to another start."""

from regraft.learning_transfer.driver import Transfer, Transfers, transfer, transfer_to_many
from regraft.learning_transfer.trajectory import Trajectory

__all__ = ["Trajectory", "Transfer", "Transfers", "transfer", "transfer_to_many"]
