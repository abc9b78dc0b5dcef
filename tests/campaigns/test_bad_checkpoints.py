"""Checkpoints of kinds that no sum can take, in every wrapper that training loops put around them, for every verb."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regraft import porting

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
State = dict[str, Any]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


class Unknown:
    """No tensor, and not to be unpickled."""


def drawn(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value if name == "mask" or value.dtype == torch.int64 else torch.rand(value.shape, generator=generator)
        for name, value in Network().state_dict().items()
    }


def change(by: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    return lambda state: state | {"first.weight": by(state["first.weight"])}


def contain_itself(state: State) -> State:
    holder: State = {"epoch": 1}
    holder["again"] = [holder]
    return state | {"holder": holder}


BAD: dict[str, tuple[Callable[[State], Any], tuple[str, ...]]] = {
    "8-bit floats": (change(lambda w: w.to(torch.float8_e4m3fn)), ("first.weight",)),
    "complex numbers": (change(lambda w: w.to(torch.complex64)), ("first.weight",)),
    "unsigned integers of 16 bits": (change(lambda w: w.to(torch.uint16)), ("first.weight",)),
    "a sparse tensor": (change(Tensor.to_sparse), ("first.weight", "sparse")),
    "a quantised tensor": (change(lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)), ("first.weight",)),
    "a tensor without values": (change(lambda w: w.to("meta")), ("first.weight",)),
    "NaN": (change(lambda w: w.index_fill(0, torch.tensor([0]), torch.nan)), ("first.weight",)),
    "an infinite parameter": (change(lambda w: w.index_fill(0, torch.tensor([0]), torch.inf)), ("first.weight",)),
    "an infinity elsewhere in a mask": (lambda s: s | {"mask": s["mask"].flip(0)}, ("mask",)),
    "another shape": (change(Tensor.t), ("first.weight",)),
    "a tensor less": (lambda s: {n: t for n, t in s.items() if n != "last.bias"}, ("last.bias",)),
    "a tensor more": (lambda s: s | {"first.more": torch.ones(3)}, ("first.more",)),
    "an adapter": (lambda s: s | {"first.lora_A.weight": torch.ones(2, 6)}, ("merge_and_unload",)),
    "two networks": (lambda s: {"student": s, "teacher": s}, ("--key",)),
    "no network": (lambda s: {"epoch": 3, "losses": [0.1]}, ("checkpoint.pt",)),
    "an object": (lambda s: s | {"config": Unknown()}, ("Unknown",)),
    "a list": (lambda s: list(s.values()), ("checkpoint.pt",)),
}

GOOD: dict[str, Callable[[State], State]] = {
    "float64": lambda s: {n: t.double() if n != "mask" and t.is_floating_point() else t for n, t in s.items()},
    "no counter": lambda s: {n: t for n, t in s.items() if "batches" not in n},
    "the same mask": lambda s: s,
    "beside containers that contain themselves": contain_itself,
}

WRAPPERS: dict[str, Callable[[Any, Path], None]] = {
    "alone": torch.save,
    "of Lightning": lambda held, path: torch.save({"state_dict": held, "epoch": 1, "optimizer_states": [{}]}, path),
    "of torchvision": lambda held, path: torch.save({"model": held, "optimizer": {"state": {}}, "epoch": 1}, path),
    "of DDP": lambda held, path: torch.save(add_prefix(held), path),
    "in the old format": lambda held, path: torch.save(held, path, _use_new_zipfile_serialization=False),
}


def add_prefix(held: Any) -> Any:
    is_state = isinstance(held, dict) and any(isinstance(value, Tensor) for value in held.values())
    return {f"module.{name}": value for name, value in held.items()} if is_state else held


def run(verb: str, folder: Path, bad: Path, good: list[Path]) -> None:
    how: dict[str, Any] = {"model": Network(), "inputs": torch.rand(2, 6)}
    if verb == "port":
        porting.port(good[0], good[1], bad, folder / "out", method="weights", **how)
    elif verb == "match":
        porting.match_checkpoints(good[0], bad, folder / "out", **how)
    elif verb == "ties":
        porting.fuse_checkpoints([good[1], bad], None, folder / "out", method="ties", base=good[0])
    else:
        porting.fuse_checkpoints([good[0], bad], [0.5, 0.5], folder / "out", align=verb == "fuse --align", **how)


NEW_DTYPES = ("8-bit floats", "unsigned integers of 16 bits")
"""Which torch does not write in its old format."""

VERBS = ("port", "match", "fuse", "fuse --align", "ties")


@pytest.fixture
def good(tmp_path) -> list[Path]:
    """A network and a fine-tune of it."""
    base = drawn(0)
    tuned = {n: t + 0.01 * drawn(7)[n] if t.is_floating_point() and n != "mask" else t for n, t in base.items()}
    for name, state in (("base.pt", base), ("tuned.pt", tuned)):
        torch.save(state, tmp_path / name)
    return [tmp_path / "base.pt", tmp_path / "tuned.pt"]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_kind_is_refused_in_every_wrapper_and_nothing_is_written(kind, verb, good, refuse, tmp_path):
    make, words = BAD[kind]
    for name, wrap in WRAPPERS.items():
        if name == "in the old format" and kind in NEW_DTYPES:
            continue
        wrap(make(drawn(1)), tmp_path / "checkpoint.pt")
        refuse(f"{kind}, {name}", lambda: run(verb, tmp_path, tmp_path / "checkpoint.pt", good), words)
        left = {path.name for path in tmp_path.iterdir()} - {"base.pt", "tuned.pt", "checkpoint.pt"}
        assert not left, f"{kind}, {name}: {left} was left"


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_only_looks_bad_is_taken(wrapper, kind, verb, good, tmp_path):
    WRAPPERS[wrapper](GOOD[kind](drawn(1)), tmp_path / "checkpoint.pt")
    run(verb, tmp_path, tmp_path / "checkpoint.pt", good)
    assert (tmp_path / "out" / "model.safetensors").exists()
