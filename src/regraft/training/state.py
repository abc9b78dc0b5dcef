"""The state of a training run in one file, so that an interrupted run resumes to the bit.

A safetensors file whose metadata hold the run's identity, its history and a hash of everything: a file that is
damaged, incomplete, or that belongs to another run, is refused.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from regraft.core.files import check_file, clean, parse_json, write_tensors
from regraft.core.tensors import Tensors, check_alike, check_finite, fill_, state, tensor_digest

_T = TypeVar("_T")

UNUSED = "unused"
"""Marks a parameter for which the optimiser keeps nothing."""

SECONDS = 2.0
"""The shortest time between two writes, so that writing costs little in short epochs."""


@dataclass
class TrainingState:
    """The file that holds network, optimiser, generator and history, written at ends of epochs.

    identity: JSON data that is equal exactly for the same run.
    """

    path: Path
    identity: Mapping[str, Any]
    network: nn.Module
    optimiser: torch.optim.Optimizer
    generator: torch.Generator
    _rows: int = 0  # of the history that is in the file
    _written: float = field(default_factory=time.monotonic)

    def save(self, history: Sequence[Any], *, last: bool = False) -> None:
        """Write the state and the history (dataclasses), if there is a new one and it is time; ``last``: it is."""
        if len(history) == self._rows or not (last or time.monotonic() - self._written >= SECONDS):
            return
        tensors = self._tensors()
        rows, identity = json.dumps([asdict(row) for row in history]), json.dumps(self.identity)
        metadata = {"identity": identity, "history": rows, "sha256": _hashes(tensors, identity, rows)}
        write_tensors(self.path, tensors, metadata)
        self._rows, self._written = len(history), time.monotonic()

    def resume_(self, read: Callable[[str], list[_T]]) -> list[_T]:
        """Put the file's state into network, optimiser and generator; the history, empty where there is no file.

        read: parses the history's JSON text; raises ValueError, naming the file, if that is invalid.

        Raises ValueError, naming the file, if it is damaged, incomplete or another run's, and OSError if it is not a
        plain file; then nothing was changed.
        """
        clean(self.path)
        if not self.path.exists():
            return []
        metadata, tensors = self._read()
        saved = parse_json(metadata["identity"], dict[str, Any], f"{self.path}: identity")
        different = [key for key in self.identity if saved.get(key) != self.identity[key]]
        if different:
            raise ValueError(
                f"{self.path} belongs to another run, whose {' and '.join(different)} differ"
                f"{_details(saved, self.identity, different)}; choose another file or delete it"
            )
        history = read(metadata["history"])
        model, slots = _under("model/", tensors), self._slots(tensors)
        check_finite(tensors, str(self.path))
        own = {"generator": self.generator.get_state(), **_on_cpu(state(self.network))}
        held = {"generator": tensors["generator"]} if "generator" in tensors else {}
        check_alike(own, held | model, f"the run that {self.path} is read for", str(self.path))
        fill_(self.network, model)
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": slots})
        self.generator.set_state(tensors["generator"])
        self._rows = len(history)
        return history

    def _slots(self, tensors: Tensors) -> dict[int, Tensors]:
        """The optimiser's state by parameter. Raises ValueError unless it has what a step makes for each of them."""
        left = _under("optimiser/", tensors)
        slots: dict[int, Tensors] = {}
        for index, wanted in self._after_a_step().items():
            own = {name: left.pop(f"{index}/{name}") for name in wanted if f"{index}/{name}" in left}
            if left.pop(f"{index}/{UNUSED}", None) is not None and not own:
                continue
            check_alike(wanted, own, "an optimiser's step", f"optimiser/{index} of {self.path}")
            slots[index] = own
        if left:
            raise ValueError(f"{self.path} has optimiser/{min(left)}, which this run's optimiser has not")
        return slots

    def _after_a_step(self) -> dict[int, Tensors]:
        """What the optimiser keeps for each parameter once it has made a step, on a copy."""
        parameters = [p.detach().clone().requires_grad_() for p in self.network.parameters()]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        twin = type(self.optimiser)(parameters, **self.optimiser.defaults)
        twin.step()
        made = twin.state_dict()["state"]
        return {i: _on_cpu(made.get(i, {})) for i in range(len(parameters))}

    def _tensors(self) -> Tensors:
        tensors = {f"model/{name}": tensor for name, tensor in state(self.network).items()}
        kept = self.optimiser.state_dict()["state"]
        for index in range(len(list(self.network.parameters()))):
            slots = {key: value for key, value in kept.get(index, {}).items() if value is not None}
            slots = slots or {UNUSED: torch.zeros(0)}  # so that nothing can be missing without being missed
            tensors |= {f"optimiser/{index}/{key}": value for key, value in slots.items()}
        tensors["generator"] = self.generator.get_state()
        return _on_cpu(tensors)

    def _read(self) -> tuple[dict[str, str], Tensors]:
        from safetensors import SafetensorError, safe_open

        check_file(self.path)
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            written = json.loads(metadata["sha256"])
            read = json.loads(_hashes(tensors, metadata["identity"], metadata["history"]))
        except (SafetensorError, OSError, KeyError, ValueError) as cause:
            raise ValueError(f"{self.path} is no training checkpoint, or a damaged one: {cause!r}") from cause
        damaged = [key for key in written.keys() | read.keys() if written.get(key) != read.get(key)]
        if damaged:
            raise ValueError(f"{self.path} is damaged: {min(damaged)} is not what was written")
        return metadata, tensors


def _on_cpu(tensors: Mapping[str, Any]) -> Tensors:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items() if t is not None}


def _hashes(tensors: Mapping[str, Tensor], identity: str, history: str) -> str:
    texts = {"identity": identity, "history": history}
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    return json.dumps(hashes | {name: tensor_digest(tensor) for name, tensor in tensors.items()})


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _details(saved: Mapping[str, Any], wanted: Mapping[str, Any], different: Sequence[str]) -> str:
    """What differs in the recipe, which people change most."""
    if "recipe" not in different:
        return ""
    ours, theirs = wanted["recipe"], saved["recipe"]
    keys = [key for key in ours if theirs.get(key) != ours[key]]
    return ": " + ", ".join(f"{key} is {theirs.get(key)!r} there and {ours[key]!r} here" for key in keys)
