"""The permutation symmetry of torchvision's classification models, traced and proved: one method a model.

Every model has a process of its own, with a time limit: the largest take gigabytes, which it gives back.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from regraft.clock import Clock, Cost
from regraft.studies.study import Measured, Method, Setting
from regraft.symmetry import PermutationSpec, parameters_moved, trace, verify

PIXELS = {"inception_v3": 299, "maxvit_t": 224}
"""Where the auxiliary head, or the windows, need more than 64; vision transformers take 224 alone."""


@dataclass(frozen=True)
class Proof:
    """How a model is proved. limit: seconds after which it is given up. threads: torch's."""

    limit: float = 1200.0
    threads: int = 1


def methods() -> tuple[Method, ...]:
    """One a model; what it computes with is the same at any size that it takes, and small images are fast."""
    from torchvision import models

    return tuple(
        Method(name, partial(_measure, name), {"pixels": _pixels(name)})
        for name in models.list_models(module=models)
    )


def _pixels(name: str) -> int:
    return PIXELS.get(name, 224 if name.startswith("vit_") else 64)


def _measure(name: str, setting: Setting) -> Measured:
    proof: Proof = setting.settings
    command = [sys.executable, "-m", __name__, name, str(proof.threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=proof.limit)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{name} was not proved within {proof.limit:g} seconds") from None
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}")
    found = json.loads(done.stdout)
    cost = {phase: Cost(**seconds) for phase, seconds in found["cost"].items()}
    return Measured(found["values"], cost=cost, notes={"warnings": found["warnings"]})


def prove(name: str, threads: int) -> dict[str, Any]:
    """Trace and verify one model in this process; raises what they raise.

    Without the slow initialisation that two of the models have: the proof draws its own values.
    """
    from torchvision import models

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model, pixels = models.get_model(name, **slow), _pixels(name)
    image = torch.rand(1, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    clock = Clock()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with clock.phase("trace"):
            spec = trace(model, image)
        with clock.phase("verify"):
            error = verify(spec, model, image)
    unit = 1 if sys.platform == "darwin" else 1024
    values = {
        "error": error,
        "moved": parameters_moved(spec, model),
        "weights moved on both axes": weights_on_both_axes(spec, model),
        "groups": len(spec.groups),
        "units": sum(spec.groups.values()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "peak_memory [bytes]": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }
    cost = {phase: {"wall": c.wall, "cpu": c.cpu} for phase, c in clock.seconds.items()}
    told = sorted({str(w.message) for w in caught if w.category is UserWarning})
    return {"values": values, "cost": cost, "warnings": told}


def weights_on_both_axes(spec: PermutationSpec, model: torch.nn.Module) -> float:
    """The share of the weights (parameters of two axes or more) whose first two axes both move, by elements."""
    perm = spec.random(torch.Generator().manual_seed(0))
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    moved = sum(
        p.numel()
        for name, p in weights.items()
        if all(spec.axis_index(name, axis, perm) is not None for axis in (0, 1))
    )
    return moved / max(sum(p.numel() for p in weights.values()), 1)


if __name__ == "__main__":
    print(json.dumps(prove(sys.argv[1], int(sys.argv[2]))))
