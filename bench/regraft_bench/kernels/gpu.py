"""What needs a GPU, on a bare machine: it imports torch, triton, numpy and scipy alone (FGMT all that regraft needs).

    python -m regraft_bench.kernels.gpu --out DIR

Each case is printed and written to DIR/rows.jsonl as it is measured: correctness first, then ceilings, every kernel
beside what one would write by hand, a sweep of tiles, the host's time. A second call takes up what is missing.
`--dry-run` runs every case on tiny tensors of the CPU, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import regraft_kernels as rk
from regraft_bench.kernels import gpu_checks as checks
from regraft_bench.kernels.contenders import (
    Contenders,
    combine_contenders,
    graft_contenders,
    permute_contenders,
    similarity_contenders,
)
from regraft_bench.kernels.gpu_checks import Values
from regraft_bench.kernels.gpu_clock import (
    PRODUCTS,
    count_kernels,
    device_seconds,
    float32_products,
    host_seconds,
    synchronise,
)
from regraft_bench.kernels.networks import NETWORKS, Network, packing_bytes
from regraft_bench.timing import BY_HAND, COPY, OURS, PRODUCT
from regraft_kernels import tuning
from regraft_kernels.backend import HAS_TRITON, triton
from regraft_kernels.launch import device_family, use_tiles
from regraft_kernels.packing import Packing

TINY_SHAPES = Packing.build(
    {"a.weight": (12, 8, 3, 3), "a.bias": (12,), "b.weight": (16, 12), "head": (10, 16)},
    {"a.weight": ("x", "y", None, None), "a.bias": ("x",), "b.weight": ("z", "x"), "head": (None, "z")},
)
"""What a dry run moves."""


@dataclass(eq=False)
class Bench:
    """A device and what was measured of it; `dry`: tiny tensors on a CPU."""

    device: torch.device
    dry: bool = False
    _networks: dict[str, Network] = field(default_factory=dict)

    def network(self, name: str) -> Network:
        """One of NETWORKS, on the device."""
        if name not in self._networks:
            self._networks[name] = Network.of(TINY_SHAPES if self.dry else NETWORKS[name](), self.device)
        return self._networks[name]

    def size(self, full: int) -> int:
        """A length, small in a dry run."""
        return min(full, 16) if self.dry else full

    @cache  # noqa: B019  # a bench lives as long as the process
    def copy_rate(self) -> float:
        """Bytes a second of a copy, read and written."""
        source = torch.empty(self.size(1 << 28), device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / device_seconds(lambda: target.copy_(source), self.device)

    @cache  # noqa: B019
    def product_rates(self) -> Values:
        """Flop a second of a square product by precision; that of tf32x3 is a third of tf32's."""
        n, rates = self.size(8192), {}
        for name, (dtype, precision) in PRODUCTS.items():
            a, b = torch.randn(2, n, n, device=self.device).to(dtype)
            with float32_products(precision):
                rates[name] = 2 * n**3 / device_seconds(partial(torch.matmul, a, b), self.device, repeats=5)
        return {**rates, "tf32x3": rates["tf32"] / 3}


@dataclass(frozen=True)
class Case:
    """Something to measure, by a name that no other has."""

    name: str
    measure: Callable[[Bench], Mapping[str, float]]


# ---------------------------------------------------------------- speed


def _ceilings(bench: Bench) -> Values:
    products = {f"product {name} [Tflop/s]": rate / 1e12 for name, rate in bench.product_rates().items()}
    return {"copy [TB/s]": bench.copy_rate() / 1e12, **products}


def _moves(kernel: str, network: str, count: int, into_given: bool, bench: Bench) -> Values:
    """A whole call on the device (checks and tables too), the kernel alone, and the host's time of the call."""
    net = bench.network(network)
    make: dict[str, Callable[[], Contenders]] = {
        "permute": lambda: permute_contenders(net, into_given),
        "graft": lambda: graft_contenders(net, into_given, count),
        "combine": lambda: combine_contenders(net, into_given, count),
    }
    contenders = make[kernel]()
    sets = {"permute": 2, "graft": 3 + count, "combine": 2 + count}[kernel]
    own, by_hand, copy = (device_seconds(contenders[name], bench.device) for name in (OURS, BY_HAND, COPY))
    alone = device_seconds(contenders[OURS], bench.device, only=f"_{kernel}_kernel")
    return {
        "time [ms]": 1e3 * own,
        "by hand [ms]": 1e3 * by_hand,
        "copy [ms]": 1e3 * copy,
        "ratio to by hand": own / by_hand,
        "kernel alone [ms]": 1e3 * alone,
        "share of the ceiling": sets * packing_bytes(net.packing) / own / bench.copy_rate(),
        "kernel alone, share of the ceiling": sets * packing_bytes(net.packing) / alone / bench.copy_rate(),
        "host [ms]": 1e3 * host_seconds(contenders[OURS], bench.device),
        "host, by hand [ms]": 1e3 * host_seconds(contenders[BY_HAND], bench.device),
    }


def _similarity(shape: tuple[int, int, int, int], precision: str, bench: Bench) -> Values:
    """One term, the other axis gathered; in bfloat16 where the precision is that."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    asked = "tf32x3" if precision == "bfloat16" else precision
    sizes = tuple(bench.size(n) for n in shape)
    contenders = similarity_contenders(sizes, 0, bench.device, dtype, asked)  # type: ignore[arg-type]
    with float32_products("tf32" if precision == "tf32" else "ieee"):
        by_hand, product = (device_seconds(contenders[k], bench.device, repeats=5) for k in (BY_HAND, PRODUCT))
    own = device_seconds(contenders[OURS], bench.device, repeats=5)
    alone = device_seconds(contenders[OURS], bench.device, only="_similarity_kernel", repeats=5)
    flop = 2 * sizes[1] * sizes[0] * sizes[1] * sizes[2] * sizes[3]
    return {
        "time [ms]": 1e3 * own,
        "by hand [ms]": 1e3 * by_hand,
        "ratio to by hand": own / by_hand,
        "one product over it": product / own,
        "kernel alone [ms]": 1e3 * alone,
        "rate [Tflop/s]": flop / own / 1e12,
        "share of the ceiling": flop / own / bench.product_rates()[precision],
    }


def _sweep(part: str, place: int, bench: Bench) -> Values:
    """A tile that `regraft_kernels.tune` tries too: the kernel alone, at the shapes that it is for."""
    tile = tuning.CANDIDATES[part][place]
    table = device_family(bench.device)
    if part in ("tf32x3", "half"):
        dtype = torch.float32 if part == "tf32x3" else torch.bfloat16
        shape = (bench.size(10), bench.size(512), bench.size(512), 9)
        runs = {"[10, 512, 512, 9]": similarity_contenders(shape, 0, bench.device, dtype)[OURS]}
        kernel = "_similarity_kernel"
    elif part == "flat":
        runs = {"ResNet-50": combine_contenders(bench.network("ResNet-50"), False, 1)[OURS]}
        kernel = "_combine_kernel"
    else:
        names = ("ResNet-50", "ViT-B/16") if part == "gather" else ("ResNet-50",)
        runs = {name: permute_contenders(bench.network(name), False)[OURS] for name in names}
        kernel = "_permute_kernel"
    if part == "move":  # rows alone: nothing gathers a column
        net = bench.network("ResNet-50")
        rows = Packing.build(
            net.packing.shapes, {n: (a[0], *(None,) * (len(a) - 1)) for n, a in net.packing.axes.items()}
        )
        tensors = net.draw(0)
        runs = {"ResNet-50, rows": lambda: rk.permute(tensors, {s: net.indices[s] for s in rows.slots}, rows)}
    use_tiles(bench.device, tuning.with_tile(table, part, tile))
    try:
        return {f"{name} [ms]": 1e3 * device_seconds(run, bench.device, only=kernel) for name, run in runs.items()}
    finally:
        use_tiles(bench.device, None)


def _host(bench: Bench) -> Values:
    """Milliseconds of Python a call of ResNet-50: with a dictionary of indices, prepared, and as a bound plan."""
    net = bench.network("ResNet-50")
    a, out, prepared = net.draw(0), net.draw(1), net.packing.prepare(net.indices)
    plan = rk.plan_permute(a, prepared, net.packing, out=out)
    runs: dict[str, Callable[[], object]] = {
        "indices": lambda: rk.permute(a, net.indices, net.packing),
        "prepared": lambda: rk.permute(a, prepared, net.packing, out=out),
        "plan": plan,
    }
    return {f"{name} [ms]": 1e3 * host_seconds(run, bench.device) for name, run in runs.items()}


def _graph(bench: Bench) -> Values:
    """permute of ResNet-50 captured in a CUDA graph: the same bits, and the time of a replay."""
    net = bench.network("ResNet-50")
    a, out = net.draw(0), net.draw(1)
    plan = rk.plan_permute(a, net.packing.prepare(net.indices), net.packing, out=out)
    plan()
    replay: Callable[[], object] = plan
    if bench.device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plan()
        replay = graph.replay
    for tensor in out.values():
        tensor.zero_()
    replay()
    checks.require(all(torch.equal(out[n], net.permute_by_hand(n, a[n])) for n in a), "a replayed permute differs")
    return {"replay [ms]": 1e3 * host_seconds(replay, bench.device, wait=True)}


def _many(bench: Bench) -> Values:
    """similarity_many: a group for every weight of ResNet-50, and its largest group alone; kernels on the device."""
    net = bench.network("ResNet-50")
    a, b = net.draw(0), net.draw(1)
    groups: dict[str, list[rk.Term]] = {}
    for name, axes in net.packing.axes.items():
        for axis, slot in enumerate(axes):
            if slot is not None:
                gathers = tuple(None if s is None or n == axis else net.indices[s] for n, s in enumerate(axes))
                groups.setdefault(slot, []).append(rk.Term(a[name][None], b[name][None], axis, None, gathers))
    largest = max(groups.values(), key=len)
    values: Values = {"groups": len(groups), "terms of the largest": len(largest)}
    for name, run in (
        ("all", lambda: rk.similarity_many(list(groups.values()))),
        ("largest", lambda: rk.similarity(largest)),
    ):
        values[f"{name} [ms]"] = 1e3 * device_seconds(run, bench.device, repeats=5)
        values[f"{name}, host [ms]"] = 1e3 * host_seconds(run, bench.device)
        values[f"{name}, kernels and copies"] = count_kernels(run, bench.device)
    return values


def _fgmt(bench: Bench) -> Values:
    """FGMT, T = 30, on Conv8 at full width; random images, for the time alone: first and second run."""
    if bench.dry:
        raise Skipped("it takes minutes on a CPU")
    from regraft.learning_transfer.driver import transfer
    from regraft.learning_transfer.trajectory import Trajectory
    from regraft.networks.papers import conv8, initialise

    network, g = conv8(), torch.Generator().manual_seed(0)
    start, end, target = ({n: t.to(bench.device) for n, t in initialise(network, g).items()} for _ in range(3))
    images = torch.randn(8, 128, 3, 32, 32, generator=g).to(bench.device)
    labels = torch.randint(10, (8, 128), generator=g).to(bench.device)
    batches, values = list(zip(images, labels, strict=True)), {}
    for name in ("first", "second"):
        path = Trajectory.linear(start, end, steps=30)
        before = time.perf_counter()
        transfer(network.to(bench.device), path, target, batches, method="fgmt", gradient_batches=2)
        synchronise(bench.device)
        values[f"{name} run [ms]"] = 1e3 * (time.perf_counter() - before)
    return values


COUNTERS = ("dram__bytes.sum", "lts__t_bytes.sum", "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum")


def _counters(bench: Bench) -> Values:
    """What Nsight Compute counts of one permute of ViT-B/16: bytes of memory and of the second-level cache."""
    tool = shutil.which("ncu")
    if tool is None or bench.dry:
        raise Skipped("ncu is not installed")
    script = (
        "import torch, regraft_kernels as rk; from regraft_bench.kernels.networks import *;"
        "n = Network.of(vit_b_16(), torch.device('cuda')); a = n.draw(0);"
        "rk.permute(a, n.indices, n.packing); torch.cuda.synchronize()"
    )
    command = [tool, "--csv", "--kernel-name", "_permute_kernel", "--metrics", ",".join(COUNTERS), sys.executable]
    done = subprocess.run([*command, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    values: Values = {}
    for line in done.stdout.splitlines():
        cells = [cell.strip('"') for cell in line.split('","')]
        if len(cells) > 2 and cells[-3] in COUNTERS:
            values[f"{cells[-3]} [{cells[-2]}]"] = values.get(f"{cells[-3]} [{cells[-2]}]", 0.0) + float(
                cells[-1].replace(",", "")
            )
    return values


# ---------------------------------------------------------------- the run


class Skipped(Exception):
    """A case that this machine cannot run; said in its row, and tried again by the next call."""


def cases() -> list[Case]:
    """All cases, in the order in which they are run: what decides most comes first."""
    found = [Case(f"correctness, {name}", partial(_correctness, name)) for name in NETWORKS]
    found += [
        Case(f"correctness, {check.__name__.strip('_').replace('_', ' ')}", partial(_check, check))
        for check in checks.CHECKS
    ]
    found.append(Case("ceilings", _ceilings))
    for network in ("ResNet-50", "ViT-B/16"):
        found.append(Case(f"permute, {network}", partial(_moves, "permute", network, 1, False)))
        for kernel, count in (("graft", 1), ("graft", 4), ("combine", 1), ("combine", 4)):
            found.append(Case(f"{kernel}, {network}, K = {count}", partial(_moves, kernel, network, count, False)))
    found.append(Case("permute, ResNet-18, out", partial(_moves, "permute", "ResNet-18", 1, True)))
    for precision in ("tf32x3", "tf32", "bfloat16"):
        shape = (30, 512, 512, 9)
        found.append(Case(f"similarity, {list(shape)}, {precision}", partial(_similarity, shape, precision)))
    for part, tiles in tuning.CANDIDATES.items():
        for place, tile in enumerate(tiles):
            label = " x ".join(map(str, astuple(tile)))
            found.append(Case(f"tile of {part}, {label}", partial(_sweep, part, place)))
    found += [
        Case("host, ResNet-50", _host),
        Case("graph replay, ResNet-50", _graph),
        Case("similarity_many, ResNet-50", _many),
        Case("FGMT, Conv8, T = 30", _fgmt),
        Case("counters, permute, ViT-B/16", _counters),
    ]
    return found


def _correctness(network: str, bench: Bench) -> Values:
    return checks.check_network(bench.network(network))


def _check(check: Callable[[Network], Values], bench: Bench) -> Values:
    return check(bench.network("ResNet-18"))


def measure_case(case: Case, bench: Bench) -> dict[str, Any]:
    """The row of a case; what it raises stands in "failure"."""
    before, values, failure = time.perf_counter(), {}, None
    try:
        values = {name: float(value) for name, value in case.measure(bench).items()}
        synchronise(bench.device)
    except (Skipped, ModuleNotFoundError) as error:
        failure = f"not run: {error}"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        failure = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
    return {
        "case": case.name,
        "values": values,
        "failure": failure,
        "seconds": round(time.perf_counter() - before, 3),
        "device": _device_name(bench),
        "versions": {"torch": torch.__version__, "triton": triton.__version__ if HAS_TRITON else None},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _device_name(bench: Bench) -> str:
    if bench.device.type == "cuda":
        return torch.cuda.get_device_name(bench.device)
    return f"dry run on {platform.machine()}"


def read_gpu_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of earlier calls; a last line that was cut off is none."""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 where every case has its row, 1 where one failed, 3 where time ran out first."""
    parser = argparse.ArgumentParser(prog="python -m regraft_bench.kernels.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of rows.jsonl; a second call goes on there")
    parser.add_argument(
        "--seconds", type=float, default=480, help="no case starts after so many (default: %(default)s)"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--case", action="append", help="only cases whose name contains this; may be given several times"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny tensors on the CPU, to try the script itself")
    given = parser.parse_args(argv)
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --dry-run tries the script without one")
    begun, bench = time.monotonic(), Bench(torch.device("cpu" if given.dry_run else given.device), given.dry_run)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "rows.jsonl"
    device = _device_name(bench)
    done = {row["case"] for row in read_gpu_rows(path) if row["failure"] is None and row["device"] == device}
    left = [c for c in cases() if c.name not in done and (not given.case or any(k in c.name for k in given.case))]
    failed = 0
    if path.exists() and not path.read_bytes().endswith(b"\n"):  # a last line that was cut off takes no other along
        with path.open("a") as file:
            file.write("\n")
    for number, case in enumerate(left):
        if time.monotonic() - begun > given.seconds:
            print(f"time is up: {len(left) - number} cases are left for the next call")
            return 3
        row = measure_case(case, bench)
        with path.open("a") as file:
            print(json.dumps(row), file=file, flush=True)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in row["values"].items())
        print(f"{case.name}: {row['failure'] or shown} ({row['seconds']:.1f} s)", flush=True)
        failed += row["failure"] is not None and not row["failure"].startswith("not run")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
