"""Everything that needs a GPU, in one run of under ten minutes: correctness, ceilings, every kernel, FGMT.

    python bench/gpu.py [--minutes 9] [--results results/gpu]

1. Every kernel against float64 (permute: to the bit), on the device, at real layer shapes.
2. The ceilings of this device: a copy, and a matrix product in each precision.
3. Every kernel beside its ceiling and beside what a PyTorch user would write, for Conv8, ResNet-18, ResNet-50,
   VGG-16 and ViT-B/16. "kernel" is the time on the device, "call" the time of a whole call with its checks.
4. FGMT, T = 30, on Conv8 at full width, on random images: seconds by phase.

Prints tables and writes them, with the numbers as JSON, named after the device. Exits with 1 where a result is
wrong, with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import regraft_kernels as rk
from regraft_kernels.similarity import similarity_reference

Tensors = dict[str, Tensor]
REPEATS = 20
STACK_BYTES = 2 << 30
COPY = "copy"


@dataclass
class Report:
    """The tables of one run, and what was found wrong."""

    deadline: float
    tables: dict[str, list[dict[str, object]]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, table: str, **row: object) -> None:
        rows = self.tables.setdefault(table, [])
        if not rows:
            print(f"\n## {table}\n", flush=True)
        rows.append(row)
        print("  ".join(f"{key} {_show(value)}" for key, value in row.items()), flush=True)

    def expect(self, what: str, good: bool) -> None:
        if not good:
            self.wrong.append(what)

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def markdown(self, title: str) -> str:
        lines = [f"# {title}", "", "Made by `python bench/gpu.py`."]
        for table, rows in self.tables.items():
            names = list(rows[0])
            lines += ["", f"## {table}", "", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
            lines += [f"| {' | '.join(_show(row.get(name, '')) for name in names)} |" for row in rows]
        return "\n".join([*lines, ""])


def _show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------- models


def factories() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """The networks whose layer shapes are measured, with the shape of their input."""
    models = torchvision.models
    found: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "ResNet-18": (models.resnet18, (2, 3, 64, 64)),
        "ResNet-50": (models.resnet50, (2, 3, 64, 64)),
        "VGG-16": (models.vgg16, (2, 3, 224, 224)),
        "ViT-B/16": (models.vit_b_16, (2, 3, 224, 224)),
    }
    try:
        from regraft.models import conv8
    except ImportError:
        return found
    return {"Conv8": (conv8, (2, 3, 32, 32)), **found}


@dataclass(frozen=True)
class Case:
    """A network's packing with random permutations, and how its axes are permuted."""

    name: str
    packing: rk.Packing
    indices: Tensors

    def draw(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensors:
        return {
            name: torch.randn(shape, generator=generator, device="cuda").to(dtype)
            for name, shape in self.packing.shapes.items()
        }

    def moved(self, name: str, tensor: Tensor) -> Tensor:
        """pi of one tensor as a PyTorch user would write it."""
        for axis, slot in enumerate(self.packing.axes[name]):
            if slot is not None:
                tensor = tensor.index_select(axis, self.indices[slot])
        return tensor


def cases() -> Iterator[Case]:
    """Every network, with its traced permutations where regraft is there, otherwise one for each length."""
    for name, (factory, shape) in factories().items():
        network = factory()
        shapes = {key: tuple(t.shape) for key, t in network.state_dict().items() if t.is_floating_point()}
        try:
            import regraft

            traced = regraft.trace(network, (torch.zeros(shape),)).packing()
            axes = {key: traced.axes[key] for key in shapes}
        except ImportError:
            axes = {
                key: tuple(f"n{n}" if n > 16 and axis < 2 else None for axis, n in enumerate(s))
                for key, s in shapes.items()
            }
        packing = rk.Packing.build(shapes, axes)
        generator = torch.Generator().manual_seed(0)
        indices = {s: torch.randperm(n, generator=generator).cuda() for s, n in packing.slots.items()}
        yield Case(name, packing, indices)


def terms(
    case: Case, steps: int, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, rk.Term]]:
    """The three largest tensors with a permuted first axis, the second axis gathered: channels last in memory."""
    large = sorted(case.packing.segments.values(), key=lambda segment: -segment.size)
    chosen = [s for s in large if case.packing.axes[s.name][0] is not None and len(s.shape) > 1][:3]
    for segment in chosen:
        t = max(1, min(steps, STACK_BYTES // (segment.size * dtype.itemsize)))
        first, second, *rest = segment.shape
        stacks = [
            torch.randn((t, first, *rest, second), generator=generator, device="cuda")
            .to(dtype)
            .movedim(-1, 2)
            for _ in range(2)
        ]
        slot = case.packing.axes[segment.name][1]
        gathers = (None, None if slot is None else case.indices[slot], *(None for _ in rest))
        yield (
            f"{segment.name} [{t}, {', '.join(map(str, segment.shape))}]",
            rk.Term(*stacks, 0, None, gathers),
        )


# ---------------------------------------------------------------- time


def call_seconds(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median seconds of a call, from an idle device to an idle device."""
    for _ in range(3):
        run()
    spent = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def device_seconds(run: Callable[[], object], only: str | None = None, repeats: int = REPEATS) -> float:
    """Seconds on the device per call: of all kernels and copies, or of the kernels with this name alone."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    events = [event for event in trace.key_averages() if only is None or only in event.key]
    return sum(event.self_device_time_total for event in events) / repeats / 1e6


# ---------------------------------------------------------------- parts


def ceilings(report: Report) -> dict[str, float]:
    """Bytes per second of a copy (read and written), flop per second of a product in each precision."""
    found = {}
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    found[COPY] = 2 * source.nbytes / device_seconds(lambda: target.copy_(source))
    report.add("ceilings", what="copy", rate=found[COPY] / 1e12, unit="TB/s")
    n = 8192
    for name, dtype, setting in (
        ("ieee", torch.float32, "ieee"),
        ("tf32", torch.float32, "tf32"),
        ("bfloat16", torch.bfloat16, None),
        ("float16", torch.float16, None),
    ):
        a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
        before = torch.backends.cuda.matmul.fp32_precision
        if setting:
            torch.backends.cuda.matmul.fp32_precision = setting
        found[name] = 2 * n**3 / device_seconds(lambda a=a, b=b: a @ b, repeats=5)
        torch.backends.cuda.matmul.fp32_precision = before
        report.add("ceilings", what=f"product {name}", rate=found[name] / 1e12, unit="Tflop/s")
    found["tf32x3"] = found["tf32"] / 3
    return found


def correctness(report: Report, case: Case, generator: torch.Generator) -> None:
    """Every kernel against float64 of the same inputs."""
    a, b, c = (case.draw(generator) for _ in range(3))
    moved = rk.permute(a, case.indices, case.packing, backend="triton")
    back = rk.permute(moved, case.indices, case.packing, inverse=True, backend="triton")
    exact = all(torch.equal(moved[name], case.moved(name, a[name])) for name in a)
    undone = all(torch.equal(back[name], a[name]) for name in a)
    report.expect(f"permute, {case.name}", exact and undone)
    grafted = rk.graft(a, b, c, [0.5, 1.0], case.indices, case.packing, backend="triton")
    combined = rk.combine([a, b, c], [[0.5, -1.0, 2.0]], backend="triton")
    worst = {"graft": 0.0, "combine": 0.0}
    for name in a:
        x, y, z = (tensors[name].double() for tensors in (a, b, c))
        graft_exact = x + 0.5 * case.moved(name, z - y)
        worst["graft"] = max(worst["graft"], float((grafted[name][0] - graft_exact).abs().max()))
        combine_exact = 0.5 * x - y + 2 * z
        worst["combine"] = max(worst["combine"], float((combined[name][0] - combine_exact).abs().max()))
    for kernel, error in worst.items():
        report.expect(f"{kernel}, {case.name}: {error}", error < 1e-5)
    report.add("correctness", kernel="permute", case=case.name, error="none" if exact and undone else "WRONG")
    for kernel, error in worst.items():
        report.add("correctness", kernel=kernel, case=case.name, error=error)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for label, term in terms(case, 3, dtype, generator):
            wide = rk.Term(term.target.double(), term.source.double(), 0, None, term.gathers)
            truth = similarity_reference([wide])
            theirs = float((similarity_reference([term]) - truth).abs().max())
            for precision in ("ieee", "tf32x3", "tf32") if dtype == torch.float32 else ("tf32x3",):
                found = rk.similarity([term], precision=precision, backend="triton")
                again = rk.similarity([term], precision=precision, backend="triton")
                error = float((found - truth).abs().max())
                report.expect(f"similarity {label} is not deterministic", torch.equal(found, again))
                if precision == "tf32":
                    report.expect(f"similarity {label} tf32", error < 5e-3 * float(truth.abs().max()))
                else:
                    limit = 2 * theirs + 1e-6 * float(truth.abs().max())
                    report.expect(
                        f"similarity {label} {precision} {dtype}: {error} against {theirs}", error <= limit
                    )
                kind = f"similarity {str(dtype).removeprefix('torch.')} {precision}"
                report.add("correctness", kernel=kind, case=f"{case.name} {label}", error=error)
            break


def moves(report: Report, case: Case, ceiling: dict[str, float], generator: torch.Generator) -> None:
    """permute, graft and combine of a whole network."""
    a, b, c = (case.draw(generator) for _ in range(3))
    size = sum(tensor.nbytes for tensor in a.values())
    scales = [0.25, 0.5, 0.75, 1.0]
    table = [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.7, 0.3]]

    def graft_loop() -> list[Tensor]:
        result = []
        for name in a:
            moved = case.moved(name, c[name] - b[name])
            result += [a[name] + scale * moved for scale in scales]
        return result

    def combine_loop() -> list[Tensor]:
        return [x * a[name] + y * b[name] for name in a for x, y in table]

    plans: list[tuple[str, int, Callable[[], object], Callable[[], object]]] = [
        (
            "permute", 2,
            lambda: rk.permute(a, case.indices, case.packing, backend="triton"),
            lambda: [case.moved(name, tensor) for name, tensor in a.items()],
        ),
        ("graft", 7, lambda: rk.graft(a, b, c, scales, case.indices, case.packing, backend="triton"), graft_loop),
        ("combine", 6, lambda: rk.combine([a, b], table, backend="triton"), combine_loop),
    ]  # fmt: skip
    for name, moved, ours, theirs in plans:
        kernel = device_seconds(ours, only=f"_{name}_kernel")
        user = device_seconds(theirs)
        report.add(
            "moving a whole network", kernel=name, network=case.name, MB=size / 1e6, kernel_us=1e6 * kernel,
            of_copy=moved * size / kernel / ceiling[COPY], user_us=1e6 * user, user_over_ours=user / kernel,
            call_us=1e6 * call_seconds(ours), user_call_us=1e6 * call_seconds(theirs),
        )  # fmt: skip


def similarities(report: Report, case: Case, ceiling: dict[str, float], generator: torch.Generator) -> None:
    """One term of a large layer, its other axis gathered, T = 30 (fewer where it would not fit)."""
    for dtype in (torch.float32, torch.bfloat16):
        for label, term in terms(case, 30, dtype, generator):
            n = term.units
            flop = 2 * n * term.target.numel()
            index = term.gathers[1]

            def user(term: rk.Term = term, index: Tensor | None = index, n: int = n) -> Tensor:
                source = term.source if index is None else term.source.index_select(2, index)
                left, right = (stack.movedim(1, 0).reshape(n, -1) for stack in (term.target, source))
                return left @ right.T

            for precision in ("tf32x3", "tf32") if dtype == torch.float32 else ("bfloat16",):
                asked = precision if dtype == torch.float32 else "tf32x3"
                before = torch.backends.cuda.matmul.fp32_precision
                torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
                theirs = device_seconds(user, repeats=5)
                torch.backends.cuda.matmul.fp32_precision = before
                run = lambda term=term, asked=asked: rk.similarity([term], precision=asked, backend="triton")  # noqa: E731
                kernel = device_seconds(run, repeats=5)
                report.add(
                    "similarity", network=case.name, tensor=label, precision=precision, kernel_ms=1e3 * kernel,
                    Tflops=flop / kernel / 1e12, of_product=flop / kernel / ceiling[precision],
                    user_ms=1e3 * theirs, user_over_ours=theirs / kernel, call_ms=1e3 * call_seconds(run, 5),
                )  # fmt: skip
            del term
            if report.late():
                return


def fgmt(report: Report) -> None:
    """FGMT, T = 30, on Conv8 at full width; random images, for the time alone."""
    try:
        import regraft
        from regraft.models import conv8, initialise
    except ImportError as missing:
        print(f"FGMT was left out: {missing}")
        return
    network = conv8()
    generator = torch.Generator().manual_seed(0)
    start, end, target = (
        {name: tensor.cuda() for name, tensor in initialise(network, generator).items()} for _ in range(3)
    )
    batches = [
        (
            torch.randn(128, 3, 32, 32, generator=generator).cuda(),
            torch.randint(10, (128,), generator=generator).cuda(),
        )
        for _ in range(8)
    ]
    network.cuda()
    path = regraft.Trajectory.linear(start, end, steps=30)
    for run in ("first (compiles)", "second"):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        result = regraft.transfer(network, path, target, batches, method="fgmt", gradient_batches=2)
        torch.cuda.synchronize()
        report.add(
            "FGMT, Conv8, T = 30", run=run, seconds=time.perf_counter() - begin, phases=dict(result.seconds)
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="start nothing new after so many")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results" / "gpu")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA GPU: torch finds none, so there is nothing to measure", file=sys.stderr)
        return 2
    report = Report(time.monotonic() + 60 * arguments.minutes)
    device = torch.cuda.get_device_name()
    title = f"{device}, torch {torch.__version__}, triton {__import__('triton').__version__}"
    print(title)
    generator = torch.Generator("cuda").manual_seed(0)
    ceiling = ceilings(report)
    networks = list(cases())
    for case in networks[:2]:
        correctness(report, case, generator)
    fgmt(report)
    for part in (moves, similarities):
        for case in networks:
            if report.late():
                print(f"no time left for {part.__name__} of {case.name}")
                continue
            part(report, case, ceiling, generator)
            torch.cuda.empty_cache()
    arguments.results.mkdir(parents=True, exist_ok=True)
    stem = "".join(letter if letter.isalnum() else "-" for letter in device.lower())
    for suffix, text in (
        (".md", report.markdown(title)),
        (".json", json.dumps(report.tables, indent=1, default=str)),
    ):
        beside = arguments.results / f"{stem}{suffix}.tmp"
        beside.write_text(text)
        beside.replace(arguments.results / f"{stem}{suffix}")
    for what in report.wrong:
        print(f"WRONG: {what}", file=sys.stderr)
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
