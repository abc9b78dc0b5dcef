"""Tiles chosen by measurement on one device, and kept in a file. Off until `tune` is called."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch

from regraft_kernels.backend import HAS_TRITON, triton
from regraft_kernels.combine import combine
from regraft_kernels.launch import DeviceFamily, DotTile, FlatTile, MoveTile, device_family, use_tiles
from regraft_kernels.packing import Packing
from regraft_kernels.permute import permute
from regraft_kernels.similarity import similarity
from regraft_kernels.terms import Term

Tile = MoveTile | FlatTile | DotTile
CANDIDATES: dict[str, tuple[Tile, ...]] = {
    "gather": tuple(
        MoveTile(rows, columns, 8 // rows, warps)
        for rows, columns, warps in ((1, 1024, 4), (1, 1024, 8), (2, 1024, 8), (1, 2048, 8), (2, 512, 8), (8, 128, 4))
    ),
    "move": tuple(MoveTile(rows, 512, 32 // rows, warps) for rows, warps in ((4, 4), (8, 4), (8, 8), (16, 8))),
    "flat": tuple(FlatTile(block, warps) for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8))),
    "tf32x3": (
        DotTile(64, 64, 32, 4, 4),
        DotTile(64, 128, 32, 4, 3),
        DotTile(128, 64, 32, 8, 3),
        DotTile(128, 128, 16, 8, 4),
        DotTile(128, 128, 32, 8, 3),
        DotTile(128, 128, 32, 8, 4),
    ),
    "half": (DotTile(64, 64, 64, 4, 4), DotTile(128, 128, 64, 8, 3), DotTile(128, 256, 64, 8, 3)),
}
"""What is tried of each part of a family; what does not compile or fit is left out."""


def with_tile(tiles: DeviceFamily, part: str, tile: Any) -> DeviceFamily:
    """A family with another tile for one of CANDIDATES' parts: the wide one of gathers, the large one of products."""
    if part == "gather":
        return replace(tiles, gather=(*tiles.gather[:-1], tile))
    if part in tiles.dot:
        return replace(tiles, dot={**tiles.dot, part: (tiles.dot[part][0], tile)})
    return replace(tiles, **{part: tile})


def tune(device: torch.device | str = "cuda", *, cache: Path | None = None) -> dict[str, list[int]]:
    """Choose the tiles of a GPU by measurement (about a minute, most of it compiling), and launch by them from now on.

    The choice is read from `cache` where that has one of this GPU and version of Triton, and written there otherwise
    (default: regraft/tiles.json in the user's cache folder). Returns part -> the fields of its tile. Plans that were
    bound before keep their tiles. Raises ValueError for a device that is no GPU or where Triton is not installed.
    """
    device = torch.device(device)
    if device.type != "cuda" or not HAS_TRITON:
        raise ValueError(f"tune needs a GPU and Triton; the device is {device}")
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regraft"
    path = folder / "tiles.json" if cache is None else cache
    key = f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}"
    kept = _read_choices(path)
    try:
        tiles = {part: type(CANDIDATES[part][0])(*numbers) for part, numbers in kept[key].items()}
    except (KeyError, TypeError, AttributeError):  # of another version, or not there
        tiles = _measure_all(device)
        kept[key] = {part: list(astuple(tile)) for part, tile in tiles.items()}
        _write_choices(path, kept)
    use_tiles(device, None)
    family = device_family(device)
    for part, tile in tiles.items():
        family = with_tile(family, part, tile)
    use_tiles(device, family)
    return {part: list(astuple(tile)) for part, tile in tiles.items()}


def _measure_all(device: torch.device) -> dict[str, Tile]:
    chosen: dict[str, Tile] = {}
    use_tiles(device, None)
    table = device_family(device)
    try:
        for part, run in _workloads(device).items():
            times: dict[Tile, float] = {}
            for tile in CANDIDATES[part] if part not in table.substitutes else ():
                use_tiles(device, with_tile(table, part, tile))
                try:
                    times[tile] = seconds_of(run)
                except (RuntimeError, triton.compiler.errors.CompilationError, triton.runtime.errors.OutOfResources):
                    continue
            if times:
                chosen[part] = min(times, key=times.__getitem__)
    finally:
        use_tiles(device, None)
    return chosen


def _workloads(device: torch.device) -> dict[str, Callable[[], object]]:
    """What each part is timed on: weights and products as large networks have them."""
    names = [f"w{n}" for n in range(16)]
    weights = {name: torch.randn(1024, 2048, device=device) for name in names}
    shapes = {name: (1024, 2048) for name in names}
    columns, rows = (Packing.build(shapes, dict.fromkeys(names, axes)) for axes in ((None, "a"), ("a", None)))
    index = {"columns": torch.randperm(2048, device=device), "rows": torch.randperm(1024, device=device)}
    stacks = torch.randn(2, 1, 1024, 4608, device=device)
    terms = {kind: [Term(stacks[0].to(kind), stacks[1].to(kind), 0)] for kind in (torch.float32, torch.bfloat16)}
    return {
        "gather": lambda: permute(weights, {"a": index["columns"]}, columns),
        "move": lambda: permute(weights, {"a": index["rows"]}, rows),
        "flat": lambda: combine([weights, weights], [[0.5, 0.5]]),
        "tf32x3": lambda: similarity(terms[torch.float32]),
        "half": lambda: similarity(terms[torch.bfloat16]),
    }


def seconds_of(run: Callable[[], object], repeats: int = 10) -> float:
    """The median time of a call on the current GPU, after two that compile and warm up."""
    times: list[float] = []
    for number in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if number > 1:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _read_choices(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _write_choices(path: Path, choices: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(choices, indent=1))
    part.replace(path)
