"""Labels: integers of any size, one for each example, or one for each token or pixel.

Of a label for each place, the classes of the logits stand last ([B, T, C], tokens) or second ([B, C, H, W], pixels, as
torch has it), and places of label `IGNORED` do not count: neither in a loss nor in an accuracy.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token or pixel that does not count, as torch's cross-entropy has it."""


def are_integers(labels: Tensor) -> bool:
    """Whether labels can be classes: integers, no truth values."""
    return not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)


def check_labels(labels: Tensor, num_classes: int, where: str = "the data") -> None:
    """Raise ValueError, saying where, unless labels are integers from 0 to num_classes - 1."""
    if not are_integers(labels):
        raise ValueError(f"the labels of {where} must be integers, not {labels.dtype}")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"the labels of {where} run from {int(labels.min())} to {int(labels.max())}, "
            f"but the classifier has classes 0 to {num_classes - 1}"
        )


def align_labels(logits: Tensor, labels: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Logits [M, C] and labels [M] of all examples or places; views where there is one label an example.

    Raises ValueError, saying where, for labels on another device, and for shapes that fit in no way or in two.
    """
    if labels.device != logits.device:
        raise ValueError(f"{where} has labels on {labels.device} for an output on {logits.device}")
    axes = {
        axis
        for axis in (1, logits.ndim - 1)
        if logits.ndim > 1 and labels.shape == logits.shape[:axis] + logits.shape[axis + 1 :]
    }
    if len(axes) != 1:
        why = "the classes may stand second or last" if axes else "give one label for each row of logits, or each place"
        raise ValueError(f"{where} has labels {list(labels.shape)} for an output {list(logits.shape)}: {why}")
    if logits.ndim == 2:
        return logits, labels
    return logits.movedim(axes.pop(), -1).flatten(0, -2), labels.flatten()


def rows_that_count(logits: Tensor, labels: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """`align_labels` without the places to be ignored; the labels are checked by `check_labels`."""
    rows, flat = align_labels(logits, labels, where)
    if labels.ndim > 1:
        counts = flat != IGNORED
        rows, flat = rows[counts], flat[counts]
    check_labels(flat, rows.shape[-1], where)
    return rows, flat
