"""PyTorch files: read with ``weights_only=True``, so that nothing in them is run, and the network in them found."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals, skip_data

from regraft.core.files import BadFile
from regraft.porting.sizes import check_memory

NESTED = ("state_dict", "model_state_dict", "model")
"""Where training scripts (Lightning, timm, ...) keep the state dictionary beside tensors of another kind."""

NO_NETWORK = re.compile(r"optim|sched|scaler|^(amp|callback|loops|hyper_?param|hparams|rng|random|metric|lr_)")
"""In the keys of what training loops keep beside a network, with tensors in it."""

GATHER_FIRST = (
    "gather it first: get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
    "torch.distributed.checkpoint.state_dict"
)
HOW_TO_SAVE = "save the weights alone, by torch.save(model.state_dict(), PATH) or as safetensors"


def read_network(path: Path, key: str | None, max_memory: int | None) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the network in a file, by name, and notes: where it was, and what was left out.

    Tensors are mapped into memory where every record of the file is stored as it is, else read. key: which of several
    networks. max_memory: bytes that a compressed file may come to. Raises BadFile, naming what is wrong; OSError for
    too little memory.
    """
    held, notes = _load(path, max_memory), []
    seen: set[int] = set()
    while True:
        if not isinstance(held, Mapping):
            raise BadFile(f"{path} holds a {type(held).__name__}, no state dictionary")
        seen.add(id(held))
        networks = {
            str(name): value for name, value in held.items() if id(value) not in seen and _is_network(str(name), value)
        }
        chosen = _choose(networks, held, key, path)
        if chosen is None:
            break
        held, key = networks[chosen], None if chosen == key else key
        notes.append(describe_choice(chosen))
    others = [str(name) for name, value in held.items() if not isinstance(value, Tensor)]
    if others:
        notes.append(f"left out {list_first(others)}: no tensors")
    tensors: dict[str, Tensor] = {}
    for name, value in held.items():
        if isinstance(value, Tensor):
            if str(name) in tensors:
                raise BadFile(f"{path} has two tensors {str(name)!r}: a number's and a text's")
            tensors[str(name)] = value
    return tensors, notes


def describe_choice(key: str) -> str:
    """A note: what of a file was read."""
    return f"read its entry {key!r}"


def describe_several(path: Path, keys: list[str], key: str | None) -> str:
    """Why no network of a file is read."""
    listed = ", ".join(map(repr, keys))
    if key is None:
        return f"{path} holds several networks, {listed}: choose one with --key (in Python: key=...)"
    return f"{path} has no network {key!r}: it holds {listed}"


def list_first(names: list[str], count: int = 4) -> str:
    """The first few of many."""
    return f"{', '.join(names[:count])}{' ...' if len(names) > count else ''}"


def _choose(networks: Mapping[str, Any], held: Mapping[Any, Any], key: str | None, path: Path) -> str | None:
    """The key of the network to go on with; None where ``held`` itself is the network."""
    if key in networks:
        return key
    beside = [str(name) for name, value in held.items() if isinstance(value, Tensor) and value.ndim]
    if len(networks) == 1 and (not beside or min(networks) in NESTED):
        return min(networks)
    if len(networks) == 1 and key is None:
        raise BadFile(
            f"{path} holds the tensor {beside[0]!r}, and more of them under {min(networks)!r}: save one flat state "
            "dictionary, or choose the inner one with --key"
        )
    if networks:
        raise BadFile(describe_several(path, list(networks), key))
    return None


def _is_network(name: str, value: object) -> bool:
    """Whether there are tensors with axes in a dictionary of this name, or in one within it."""
    if not isinstance(value, Mapping) or NO_NETWORK.search(name):
        return False
    waiting, seen = [value], set()
    while waiting:
        held = waiting.pop()
        if id(held) in seen or "param_groups" in held:
            continue
        seen.add(id(held))
        if any(isinstance(inner, Tensor) and inner.ndim for inner in held.values()):
            return True
        waiting += [v for k, v in held.items() if isinstance(v, Mapping) and not NO_NETWORK.search(str(k))]
    return False


def _load(path: Path, max_memory: int | None) -> Any:
    mapped = None
    # Arguments of reference training scripts: a namespace of numbers and texts.
    with safe_globals([argparse.Namespace]):
        try:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as file:
                    records = file.infolist()
                mapped = all(record.compress_type == zipfile.ZIP_STORED for record in records)
                if not mapped:
                    _check_unpacked(path, records, max_memory)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except OSError:
            raise
        except Exception as problem:  # torch raises anything for what is not its own file
            raise BadFile(_explain(path, str(problem))) from problem


def _check_unpacked(path: Path, records: list[zipfile.ZipInfo], max_memory: int | None) -> None:
    """Raises OSError where there is no memory for the tensors of a compressed file, or for what says which they are."""
    why = f"unpacking {path}, which is compressed,"
    check_memory(sum(record.file_size for record in records if "/data/" not in record.filename), why, max_memory)
    with skip_data():
        held = torch.load(path, map_location="cpu", weights_only=True)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors_in(held)}
    check_memory(sum(sizes.values()), why, max_memory)


def _tensors_in(held: object) -> Iterator[Tensor]:
    """All dense ones, in containers of any depth that may contain themselves."""
    waiting, seen = [held], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested:
            yield value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, Mapping) else value)


def _explain(path: Path, said: str) -> str:
    """Why torch does not read a file, in one sentence, with the names of what it would have to run."""
    try:
        names = sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # no zip file, or no whole one
        names = re.findall(r"GLOBAL ([\w.]+)", said)
    if any("distributed" in name for name in names):
        return f"{path} holds parts of distributed tensors ({list_first(names)}): {GATHER_FIRST}"
    if names:
        return f"{path} holds {list_first(names)}, which is no tensor and is not run: {HOW_TO_SAVE}"
    return f"{path} is damaged, or no PyTorch file of tensors alone: {HOW_TO_SAVE}"
