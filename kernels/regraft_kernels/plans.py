"""A call of permute, graft or combine, bound to its tensors: what is decided once, and what is left to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regraft_kernels.backend import use_device, wait_for
from regraft_kernels.operators import is_readable, is_transformed
from regraft_kernels.packing import Tensors

Step = Callable[[], object]
"""A part of what a call runs: a launch, or the torch path."""


@dataclass(frozen=True, eq=False)
class Plan:
    """`plan()` computes `results` from what the bound tensors hold by then, and returns them.

    It reads and writes the memory that the tensors had when they were bound, keeps them alive, and checks nothing
    again: change values in place (`copy_`, an optimizer's step), do not resize tensors or assign to `.data`. Calls on
    any stream are allowed. A CUDA graph can capture one; keep the plan as long as the graph. `backend`: "torch" or
    "triton", what was chosen.
    """

    results: dict[str, Tensor]
    backend: str
    device: torch.device
    _steps: Sequence[Step] = field(repr=False)
    _bound: Sequence[Tensors] = field(repr=False)

    @torch.no_grad()
    def __call__(self) -> dict[str, Tensor]:
        with use_device(self.device):
            for step in self._steps:
                step()
        return self.results


def check_bindable(groups: Sequence[Tensors]) -> None:
    """Raise ValueError, naming the tensor, unless all can be read where they stand at every later call."""
    if is_transformed() or not is_readable(groups):
        raise ValueError("a plan cannot be made where gradients are wanted, PyTorch traces, or values cannot be read")
    for tensors in groups:
        for name, tensor in tensors.items():
            if not tensor.is_contiguous() or tensor.is_neg() or tensor.is_conj():
                raise ValueError(f"{name!r} is not contiguous, and a plan reads tensors where they stand")


def finish_binding(plan: Plan) -> Plan:
    """The plan, once what its tables are made of has reached the device: later calls may be on other streams."""
    wait_for(plan.device)
    return plan
