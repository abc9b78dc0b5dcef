"""The permutation symmetry of the models that people have, traced and proved: one method a model.

Every model has a process of its own, with a time limit: the largest take gigabytes, which it gives back. The check
does what a user would do, and none of what `verify` does: perturb every parameter, permute the state dictionary, load
it into a model that is built anew, and compare what both compute.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from regraft.core.clock import Clock, Cost
from regraft.core.tensors import Tensors
from regraft.symmetry import PermutationSpec, apply, parameters_moved, trace, verify
from regraft.symmetry.spec import like_state
from regraft_bench.study import Measured, Method, Setting
from regraft_bench.symmetry import zoo
from regraft_bench.timing import peak_resident

TOLERANCE = 1e-9
"""Of the largest difference of any output, over the largest output, in float64."""


@dataclass(frozen=True)
class Proof:
    """How a model is proved. limit: seconds after which it is given up. threads: torch's."""

    limit: float = 1200.0
    threads: int = 1


PROOF = "Random permutations of all groups; the function must stay as it was, in float64."


def proof_methods(*families: str) -> tuple[Method, ...]:
    """One a model of these families (:mod:`regraft_bench.symmetry.zoo`); torchvision's have their bare names."""
    return tuple(
        Method(name.removeprefix("torchvision/"), partial(_measure, name), about=PROOF)
        for name in zoo.list_models(*families)
    )


def _measure(name: str, setting: Setting) -> Measured:
    proof: Proof = setting.settings
    command = [sys.executable, "-m", __name__, name, str(proof.threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=proof.limit)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{name} was not proved within {proof.limit:g} seconds") from None
    if done.returncode < 0:
        raise RuntimeError(f"{name}: the process was ended by signal {-done.returncode}; is there memory enough?")
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}")
    found = json.loads(done.stdout.strip().rpartition("\n")[2])
    cost = {phase: Cost(**seconds) for phase, seconds in found["cost"].items()}
    return Measured(found["values"], cost=cost, notes={"warnings": found["warnings"]})


def prove(name: str, threads: int) -> dict[str, Any]:
    """Trace, verify and check one model in this process; raises what they raise, ValueError for a wrong function."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, inputs = zoo.make_model(name)
    clock = Clock()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with clock.phase("trace"):
            spec = trace(model, inputs)
        with clock.phase("verify"):
            verified = verify(spec, model, inputs)
    with clock.phase("check"):
        error, control = loaded_error(spec, lambda: zoo.make_model(name)[0], inputs)
    if not error < TOLERANCE:
        raise ValueError(f"the permuted state dictionary computes another function (relative error {error:.1e})")
    values = {
        "error": error,
        "verify's error": verified,
        "error with one axis left out": control,
        "moved": parameters_moved(spec, model),
        "weights moved on both axes": weights_on_both_axes(spec, model),
        "groups": len(spec.groups),
        "blocks": sum(spec.groups[outer] for outer in {around[0] for around in spec.blocks.values()}),
        "units": sum(spec.groups.values()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "peak_memory [bytes]": peak_resident(),
    }
    cost = {phase: {"wall": c.wall, "cpu": c.cpu} for phase, c in clock.seconds.items()}
    texts = sorted({str(w.message) for w in caught if w.category is UserWarning})
    return {"values": values, "cost": cost, "warnings": texts}


# ---- the check


def loaded_error(spec: PermutationSpec, build: Callable[[], nn.Module], inputs: zoo.Inputs) -> tuple[float, float]:
    """The relative error of a model that loads another's permuted state dictionary, in float64; and, as a control, of
    one that loads it with the largest tensor that moves left as it was."""
    generator = torch.Generator().manual_seed(1)
    inputs = pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)
    model = build().double()
    perturb_(model, inputs, generator)
    with in_double():
        before = main_output(model(*inputs))
    if not bool(before.isfinite().all()) or float(before.std()) == 0:
        raise ValueError("the check says nothing: the perturbed model's output is not finite, or constant")
    held = model.state_dict()
    state = like_state({name: tensor.detach().clone() for name, tensor in held.items()}, held)
    perm = spec.random(generator)
    moved = apply(spec, perm, state)

    def error(tensors: Tensors) -> float:
        other = build().double()
        other.load_state_dict(tensors)
        with in_double():
            after = main_output(other(*inputs))
        return float((after - before).abs().max() / before.abs().max())

    changed = [name for name, tensor in state.items() if not torch.equal(tensor, moved[name])]
    largest = max(changed, key=lambda name: state[name].numel(), default=None)
    if largest is None:
        return error(moved), 0.0
    left = {name: tensor for name, tensor in state.items() if torch.equal(tensor, state[largest])}
    return error(moved), error(like_state({**moved, **left}, held))  # under all of its names


@torch.no_grad()
def perturb_(model: nn.Module, inputs: zoo.Inputs, generator: torch.Generator) -> None:
    """Every parameter times 0.5 to 1.5, and a little more, in place; BatchNorm's statistics near what it sees."""

    def random(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=like.dtype)

    for parameter in model.parameters():
        noise = (random(parameter) - 0.5) / math.prod(parameter.shape[1:]) ** 0.5
        parameter.mul_(random(parameter) + 0.5).add_(0.1 * noise)

    def observe(norm: Any, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0]
        norm.running_mean.copy_(x.mean() * (random(norm.running_mean) + 0.5))
        norm.running_var.copy_(x.square().mean() * (random(norm.running_var) + 0.5) + 1e-6)

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    hooks = [norm.register_forward_pre_hook(observe) for norm in norms]
    with in_double():
        model(*inputs)
    for hook in hooks:
        hook.remove()


def main_output(result: Any) -> Tensor:
    """What a model is used for: its logits, or else the first of its tensors."""
    tensors = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
    return getattr(result, "logits", tensors[0])


class _Lifted(TorchDispatchMode):
    """Casts to a smaller floating type are casts to float64."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in (torch.float32, torch.float16, torch.bfloat16):
            kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)


@contextmanager
def in_double() -> Iterator[None]:
    """Inside, what a model computes in float32 (norms, rotary angles) is computed in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), _Lifted():
            yield
    finally:
        torch.set_default_dtype(before)


def weights_on_both_axes(spec: PermutationSpec, model: nn.Module) -> float:
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
