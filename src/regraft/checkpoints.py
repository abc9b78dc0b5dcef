"""The state of a training run in one file, so that an interrupted run resumes to the bit.

A safetensors file whose metadata hold the run's identity, its history and a hash of everything: a file that is
damaged, or that belongs to another run, is refused.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regraft.files import write_beside
from regraft.tensors import Tensors, fill_, state, tensor_digest

SECONDS = 2.0
"""At least so many pass between two writes: short epochs do not pay for the file."""


@dataclass
class Checkpoint:
    """Where a run keeps network, optimiser, generator and history, at ends of epochs.

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
        from safetensors.torch import save_file

        tensors = self._tensors()
        rows, identity = json.dumps([asdict(row) for row in history]), json.dumps(self.identity)
        metadata = {"identity": identity, "history": rows, "sha256": _hashes(tensors, identity, rows)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_beside(self.path, lambda part: save_file(tensors, part, metadata))
        self._rows, self._written = len(history), time.monotonic()

    def resume_(self) -> list[dict[str, Any]]:
        """Put the file's state into network, optimiser and generator; the history, empty where there is no file.

        Raises ValueError, naming the file, where it is damaged or another run's.
        """
        if not self.path.exists():
            return []
        metadata, tensors = self._read()
        saved = json.loads(metadata["identity"])
        different = [key for key in self.identity if saved.get(key) != self.identity[key]]
        if different:
            raise ValueError(
                f"{self.path} belongs to another run, whose {' and '.join(different)} differ"
                f"{_details(saved, self.identity, different)}; choose another file or delete it"
            )
        fill_(self.network, _under("model/", tensors))
        slots: dict[int, Tensors] = {}
        for name, tensor in _under("optimiser/", tensors).items():
            index, key = name.split("/")
            slots.setdefault(int(index), {})[key] = tensor
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": slots})
        self.generator.set_state(tensors["generator"])
        history = json.loads(metadata["history"])
        self._rows = len(history)
        return history

    def _tensors(self) -> Tensors:
        found = {f"model/{name}": tensor for name, tensor in state(self.network).items()}
        for index, slots in self.optimiser.state_dict()["state"].items():
            found |= {f"optimiser/{index}/{key}": value for key, value in slots.items() if value is not None}
        found["generator"] = self.generator.get_state()
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def _read(self) -> tuple[dict[str, str], Tensors]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            written = json.loads(metadata["sha256"])
            found = json.loads(_hashes(tensors, metadata["identity"], metadata["history"]))
        except (SafetensorError, OSError, KeyError, ValueError) as cause:
            raise ValueError(f"{self.path} is no training checkpoint, or a damaged one: {cause!r}") from cause
        damaged = [key for key in written.keys() | found.keys() if written.get(key) != found.get(key)]
        if damaged:
            raise ValueError(f"{self.path} is damaged: {min(damaged)} is not what was written")
        return metadata, tensors


def _hashes(tensors: Mapping[str, Tensor], identity: str, history: str) -> str:
    texts = {"identity": identity, "history": history}
    found = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    return json.dumps(found | {name: tensor_digest(tensor) for name, tensor in tensors.items()})


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _details(saved: Mapping[str, Any], wanted: Mapping[str, Any], different: Sequence[str]) -> str:
    """What differs in the recipe, which people change most."""
    if "recipe" not in different:
        return ""
    ours, theirs = wanted["recipe"], saved["recipe"]
    keys = [key for key in ours if theirs.get(key) != ours[key]]
    return ": " + ", ".join(f"{key} is {theirs.get(key)!r} there and {ours[key]!r} here" for key in keys)
