"""The kernels' torch path on a CPU against what a PyTorch user would write, and against a copy.

``pytest bench/bench_kernels.py --benchmark-only``. Contenders are alternated in one process on one thread, and
the medians of their thread's CPU seconds compared. Permute, graft and combine move ResNet-18 with its traced
permutations, into new tensors and into tensors that were given (`out=`); their floor, for each two tensors read or
written, is one copy, into new tensors again or into old. Pages that the system hands out and clears can cost more than
the work, and whether it has to depends on what ran before: so each case is measured twice, with an allocator that
returns large blocks to the system at once ("pages new") and with one that keeps them ("pages kept"). The floor of
similarity is one matrix product of the same shape. The table goes to ``results/kernels-cpu.md``.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import resnet18

import regraft
import regraft_kernels as rk
from regraft.results import environment, write

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("one_thread")]

Tensors = dict[str, Tensor]
RESULTS = Path(__file__).parents[1] / "results"
ROUNDS = 15
WANTED = "2x the loop, or within 1.3x of the floor"


@dataclass(frozen=True)
class Model:
    """ResNet-18's spec and three sets of its tensors, with random permutations."""

    axes: dict[str, tuple[str | None, ...]]
    packing: rk.Packing
    indices: dict[str, Tensor]
    sets: tuple[Tensors, Tensors, Tensors]

    def moved(self, name: str, tensor: Tensor) -> Tensor:
        """pi of one tensor, as one would write it: rows, then columns."""
        for axis, slot in enumerate(self.axes[name]):
            if slot is not None:
                tensor = tensor.index_select(axis, self.indices[slot])
        return tensor


@cache
def model() -> Model:
    network = resnet18()
    spec = regraft.trace(network, (torch.zeros(2, 3, 64, 64),))
    generator = torch.Generator().manual_seed(0)
    state = network.state_dict()

    def draw() -> Tensors:
        return {
            name: torch.randn(t.shape, generator=generator) if t.is_floating_point() else t.clone()
            for name, t in state.items()
        }

    packing = spec.packing()
    indices = spec.indices(spec.random(generator))
    return Model(packing.axes, packing, indices, (draw(), draw(), draw()))


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's mallopt


@pytest.fixture(scope="module", params=["pages new", "pages kept"])
def pages(request) -> str:
    """What the allocator does with large blocks that are free: return them at once, or keep them.

    For a module, so that all cases with new pages run first: a heap that has kept some goes on using them.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        pytest.skip("the C library has no mallopt")
    kept = request.param == "pages kept"
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 17)
    libc.mallopt(M_MMAP_MAX, 0 if kept else 1 << 16)
    libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1 if kept else 1 << 17)
    return request.param


def alternate(contenders: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median CPU milliseconds of the thread, of each contender in turn; the first round warms up."""
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            start = time.thread_time()
            run()
            spent[name].append(time.thread_time() - start)
    return {name: 1e3 * statistics.median(values[1:]) for name, values in spent.items()}


def floors(tensors: Tensors, moved: int) -> dict[str, Callable[[], object]]:
    """Copy every tensor so often that as many bytes move as in `moved` tensors read or written."""
    parts = [
        t.flatten()[: t.numel() // 2] if half else t for half in _halves(moved) for t in tensors.values()
    ]
    old = [part.clone() for part in parts]

    def into_old() -> None:
        for there, part in zip(old, parts, strict=True):
            there.copy_(part)

    return {"floor": lambda: [part.clone() for part in parts], "floor, out": into_old}


def _halves(moved: int) -> list[bool]:
    """One False for each whole copy, True for half of one."""
    return [False] * (moved // 2) + [True] * (moved % 2)


def test_permute(pages: str, benchmark) -> None:
    m = model()
    a = m.sets[0]
    out = rk.permute(a, m.indices, m.packing)
    contenders = {
        "loop": lambda: {name: m.moved(name, tensor) for name, tensor in a.items()},
        "ours": lambda: rk.permute(a, m.indices, m.packing),
        "ours, out": lambda: rk.permute(a, m.indices, m.packing, out=out),
    }
    measure(benchmark, f"permute, ResNet-18, {pages}", contenders | floors(a, 2), WANTED)


@pytest.mark.parametrize("count", [1, 4])
def test_graft(count: int, pages: str, benchmark) -> None:
    m = model()
    base, start, end = m.sets
    scales = [(k + 1) / count for k in range(count)]
    out = rk.graft(base, start, end, scales, m.indices, m.packing)

    def loop() -> dict[str, list[Tensor]]:
        result = {}
        for name, tensor in base.items():
            if tensor.is_floating_point():
                moved = m.moved(name, end[name] - start[name])
                result[name] = [tensor + scale * moved for scale in scales]
        return result

    contenders = {
        "loop": loop,
        "ours": lambda: rk.graft(base, start, end, scales, m.indices, m.packing),
        "ours, out": lambda: rk.graft(base, start, end, scales, m.indices, m.packing, out=out),
    }
    name = f"graft, ResNet-18, {count} scale{'s' * (count > 1)}, {pages}"
    measure(benchmark, name, contenders | floors(base, 3 + count), WANTED)


@pytest.mark.parametrize("count", [1, 4])
def test_combine(count: int, pages: str, benchmark) -> None:
    m = model()
    a, b, _ = m.sets
    table = [[0.1 * k + 0.5, 0.5 - 0.1 * k] for k in range(count)]
    out = rk.combine([a, b], table)

    def loop() -> dict[str, list[Tensor]]:
        return {
            name: [x * a[name] + y * b[name] for x, y in table] for name in a if a[name].is_floating_point()
        }

    contenders = {
        "loop": loop,
        "ours": lambda: rk.combine([a, b], table),
        "ours, out": lambda: rk.combine([a, b], table, out=out),
    }
    name = f"combine, ResNet-18, 2 sources, {count} result{'s' * (count > 1)}, {pages}"
    measure(benchmark, name, contenders | floors(a, 2 + count), WANTED)


@pytest.mark.parametrize(("steps", "rows", "columns", "area"), [(10, 256, 256, 9), (10, 512, 512, 1)])
@pytest.mark.parametrize("axis", [0, 1])
def test_similarity(axis: int, steps: int, rows: int, columns: int, area: int, benchmark) -> None:
    """One term, the other axis gathered. Ours is given channels last, the user's way PyTorch's own order."""
    generator = torch.Generator().manual_seed(0)
    target, source = torch.randn(2, steps, rows, area, columns, generator=generator).movedim(-1, 3)
    plain = target.contiguous(), source.contiguous()
    other = torch.randperm((rows, columns)[1 - axis], generator=generator)
    gathers = (None, other, None) if axis == 0 else (other, None, None)
    n = (rows, columns)[axis]
    flat = [torch.randn(n, target.numel() // n, generator=generator) for _ in range(2)]

    def user() -> Tensor:
        moved = plain[1].index_select(2 - axis, other)
        return plain[0].movedim(axis + 1, 0).reshape(n, -1) @ moved.movedim(axis + 1, 0).reshape(n, -1).T

    term = rk.Term(target, source, axis, None, gathers)
    contenders = {
        "loop": user,
        "ours": lambda: rk.similarity([term]),
        "floor": lambda: flat[0] @ flat[1].T,
    }
    shape = f"[{steps}, {rows}, {columns}, {area}], axis {axis}"
    measure(benchmark, f"similarity, {shape}", contenders, "", rounds=5)


def test_similarity_update(benchmark) -> None:
    """5 % of a neighbour's 1024 units changed, against building the term again."""
    generator = torch.Generator().manual_seed(0)
    target, source = torch.randn(2, 1, 1024, 1024, generator=generator)
    old = torch.randperm(1024, generator=generator)
    new = old.clone()
    new[:50] = old[:50].roll(1)
    total = torch.zeros(1024, 1024)
    term = rk.Term(target, source, 0)
    contenders = {
        "loop": lambda: rk.similarity([rk.Term(target, source, 0, None, (None, new))]),
        "ours": lambda: rk.similarity_update_(total, term, 1, old, new),
    }
    name = "similarity_update_, [1, 1024, 1024], 5 % changed, against building anew"
    measure(benchmark, name, contenders, "", rounds=5)


def measure(
    benchmark,
    case: str,
    contenders: dict[str, Callable[[], object]],
    wanted: str,
    rounds: int = ROUNDS,
) -> None:
    """Measure, keep the row, and write the table so far."""
    times = alternate(contenders, rounds)
    benchmark.pedantic(contenders["ours"], rounds=1)
    row = {"case": case, "milliseconds": times, "wanted": wanted}
    benchmark.extra_info.update(row)
    keep(row)


def keep(row: dict[str, Any]) -> None:
    """Add a row to the results; it replaces an earlier one of its case, and the others stay."""
    path = RESULTS / "kernels-cpu.json"
    book = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    where = environment()
    row = {**row, "commit": where.commit, "dirty": where.dirty}
    known = [old["case"] for old in book["rows"]]
    if row["case"] in known:
        book["rows"][known.index(row["case"])] = row
    else:
        book["rows"].append(row)
    save({**book, "environment": asdict(where)})


def save(book: dict[str, Any]) -> None:
    """``results/kernels-cpu.json`` and the table made from it."""
    rows, where = book["rows"], book["environment"]
    write(RESULTS / "kernels-cpu.json", json.dumps(book, indent=1) + "\n")
    commits = sorted({row["commit"] + " (dirty)" * row["dirty"] for row in rows})
    lines = [
        "# Kernels on a CPU",
        "",
        __doc__ or "",
        f"Measured at {', '.join(commits)}, {where['machine']}, one thread, torch {torch.__version__}. Milliseconds.",
        "",
        "| case | user's way | ours | ours, out | floor | floor, out | user's way / ours | user's way / ours, out "
        "| ours / floor | ours, out / floor, out | wanted |",
        "|---|" + "---:|" * 9 + "---|",
    ]
    for row in rows:
        t = row["milliseconds"]
        times = [
            f"{t[name]:.2f}" if name in t else ""
            for name in ("loop", "ours", "ours, out", "floor", "floor, out")
        ]
        pairs = [("loop", "ours"), ("loop", "ours, out"), ("ours", "floor"), ("ours, out", "floor, out")]
        ratios = [f"{t[a] / t[b]:.2f}" if a in t and b in t else "" for a, b in pairs]
        lines.append(f"| {row['case']} | {' | '.join(times)} | {' | '.join(ratios)} | {row['wanted']} |")
    write(RESULTS / "kernels-cpu.md", "\n".join([*lines, ""]))
