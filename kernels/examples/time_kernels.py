"""Time a kernel beside plain PyTorch: python time_kernels.py permute --device cuda --out DIR

Prints a line for each size, writes DIR/permute.csv and, where vl-convert-python is installed, DIR/permute.svg.
"""

import argparse
import csv
import json
from pathlib import Path
from statistics import median

import torch
from scipy.optimize import linear_sum_assignment
from torch.utils.benchmark import Timer

import regraft_kernels as rk

ROUNDS = 5
NAMES = ("regraft_kernels", "PyTorch")


def draw(n, device):
    """The packing of two layers of n units, three sets of their tensors, and a permutation for each layer."""
    shapes = {"w1": (n, n), "b1": (n,), "w2": (n, n), "b2": (n,)}
    axes = {"w1": ("a", None), "b1": ("a",), "w2": ("b", "a"), "b2": ("b",)}
    sets = [{name: torch.randn(shape, device=device) for name, shape in shapes.items()} for _ in range(3)]
    return rk.Packing.build(shapes, axes), sets, {slot: torch.randperm(n, device=device) for slot in "ab"}


def permute(n, device):
    packing, (theta, *_), perm = draw(n, device)

    def by_hand():
        a, b = perm["a"], perm["b"]
        return theta["w1"][a], theta["b1"][a], theta["w2"][b][:, a], theta["b2"][b]

    return lambda: rk.permute(theta, perm, packing), by_hand


def graft(n, device):
    packing, (base, start, end), perm = draw(n, device)

    def by_hand():
        change = {name: end[name] - start[name] for name in base}
        a, b = perm["a"], perm["b"]
        moved = change["w1"][a], change["b1"][a], change["w2"][b][:, a], change["b2"][b]
        return [tensor + 0.5 * change for tensor, change in zip(base.values(), moved, strict=True)]

    return lambda: rk.graft(base, start, end, [0.5], perm, packing), by_hand


def combine(n, device):
    _, sources, _ = draw(n, device)
    table = [[0.25 * k, 0.5, 1 - 0.25 * k] for k in range(4)]

    def by_hand():
        sums = [[sum(c * s[name] for c, s in zip(row, sources, strict=True)) for row in table] for name in sources[0]]
        return [torch.stack(results) for results in sums]

    return lambda: rk.combine(sources, table), by_hand


def similarity(n, device):
    target, source = (torch.randn(4, n, n, device=device) for _ in range(2))
    terms = [rk.Term(target, source, axis=1)]
    return lambda: rk.similarity(terms), lambda: torch.einsum("tki,tkj->ij", target, source)


def assign(n, device):
    matrix = torch.randn(n, n, device=device)
    return lambda: rk.assign(matrix), lambda: linear_sum_assignment(matrix.cpu().numpy(), maximize=True)


KERNELS = {kernel.__name__: kernel for kernel in (permute, graft, combine, similarity, assign)}


def measure(kernel, sizes, device, seconds):
    """Yields (n, name, milliseconds): medians of rounds in which the two take turns."""
    for n in sizes:
        timers = [Timer("run()", globals={"run": run}) for run in KERNELS[kernel](n, device)]
        rounds = [[timer.blocked_autorange(min_run_time=seconds).median for timer in timers] for _ in range(ROUNDS)]
        for name, times in zip(NAMES, zip(*rounds, strict=True), strict=True):
            yield n, name, 1e3 * median(times)


def plot(kernel, rows, path):
    import vl_convert

    scale = {"scale": {"type": "log"}, "type": "quantitative"}
    chart = {
        "title": f"{kernel}: time of a call",
        "data": {"values": [dict(zip(("n", "who", "ms"), row, strict=True)) for row in rows]},
        "mark": {"type": "line", "point": True},
        "encoding": {
            "x": {"field": "n", "title": "units", **scale},
            "y": {"field": "ms", "title": "time [ms]", **scale},
            "color": {"field": "who", "title": None},
        },
    }
    path.write_text(vl_convert.vegalite_to_svg(json.dumps(chart)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="*", help=f"of {', '.join(KERNELS)}; all where none is named")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024], metavar="N")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each of the rounds")
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args()
    if unknown := set(options.kernels) - set(KERNELS):
        parser.error(f"there is no kernel {', '.join(sorted(unknown))}; there are {', '.join(KERNELS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for kernel in options.kernels or KERNELS:
        rows = []
        for n, name, ms in measure(kernel, options.sizes, options.device, options.seconds):
            print(f"{kernel:12} n = {n:<6} {name:16} {ms:10.3f} ms", flush=True)
            rows.append((n, name, ms))
        with open(options.out / f"{kernel}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("n", "implementation", "milliseconds"), *rows])
        try:
            plot(kernel, rows, options.out / f"{kernel}.svg")
        except ImportError:
            print("not plotted: vl-convert-python is not installed")


if __name__ == "__main__":
    main()
