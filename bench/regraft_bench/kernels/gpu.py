"""What needs a CUDA device: correctness at real shapes, the ceilings, every kernel on the device, FGMT at full width.

Times are those of the device (its own clock, by the profiler), without the host's work, which the scenario "kernels"
has on any device. Ceilings are measured in the same run: a copy, and a matrix product in each precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

import regraft_kernels as rk
from regraft.core.clock import Clock
from regraft.data import MissingData
from regraft_bench.contests import BY_HAND, OURS, Contest, MicroSetting
from regraft_bench.kernels.networks import NETWORKS, Network
from regraft_bench.kernels.variants import operators
from regraft_bench.study import Measured, Method
from regraft_kernels.similarity import similarity_reference

REPEATS = 20
PRODUCTS = {
    "ieee": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "bfloat16": (torch.bfloat16, "ieee"),
    "float16": (torch.float16, "ieee"),
}


@dataclass(eq=False)
class GpuSetting(MicroSetting):
    """The ceilings of this device, measured once."""

    def check(self) -> None:
        """Raises MissingData where the device is not a CUDA device."""
        if not self.device.startswith("cuda") or not torch.cuda.is_available():
            raise MissingData(f"this scenario needs a CUDA device, not {self.device}: --device cuda")

    @cached_property
    def copy_rate(self) -> float:
        """Bytes a second of a copy, read and written."""
        source = torch.empty(1 << 28, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / device_seconds(lambda: target.copy_(source))

    @cached_property
    def product_rates(self) -> dict[str, float]:
        """Flop a second of a product of 8192 x 8192 by precision; that of tf32x3 is a third of tf32's."""
        n, found = 8192, {}
        for name, (dtype, precision) in PRODUCTS.items():
            a, b = torch.randn(2, n, n, device=self.device).to(dtype)
            with float32_products(precision):
                found[name] = 2 * n**3 / device_seconds(partial(torch.matmul, a, b), repeats=5)
        return {**found, "tf32x3": found["tf32"] / 3}


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Torch's own products of float32 in this precision, "ieee" or "tf32"."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def device_seconds(run: Callable[[], object], only: str = "", repeats: int = REPEATS) -> float:
    """Seconds on the device of one call: of all its kernels, or of those whose name contains `only`."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    return sum(e.self_device_time_total for e in trace.key_averages() if only in e.key) / repeats / 1e6


def gpu_methods() -> tuple[Method, ...]:
    """Ceilings, correctness, every contest of every kernel, similarity in each precision, FGMT."""
    return (
        Method("ceilings", _ceilings, about="What a plain copy and a matrix product reach on this device."),
        *(
            Method(
                f"correctness, {name}",
                partial(_correctness, name),
                about="Every kernel beside its reference in torch.",
            )
            for name in NETWORKS
        ),
        *(
            Method(
                contest.name,
                partial(_contest, name, contest),
                about="One case of a kernel, timed on the device.",
            )
            for name, operator in operators().items()
            for contest in operator.contests
        ),
        *(
            Method(
                f"similarity, [30, 512, 512, 9], {precision}",
                partial(_similarity, precision),
                about="Similarity at this precision, beside one product of as many operations.",
            )
            for precision in ("tf32x3", "tf32", "bfloat16")
        ),
        *(
            Method(
                f"FGMT, Conv8, T = 30, {run} run",
                _fgmt,
                about="A whole transfer; the second run finds its kernels compiled.",
            )
            for run in ("first", "second")
        ),
    )


def _ceilings(setting: GpuSetting) -> Measured:
    setting.check()
    products = {f"product {name} [Tflop/s]": rate / 1e12 for name, rate in setting.product_rates.items()}
    return Measured({"copy [TB/s]": setting.copy_rate / 1e12, **products})


def _contest(kernel: str, contest: Contest, setting: GpuSetting) -> Measured:
    """One contest on the device: regraft's whole call there (checks and tables included) against what one would write
    by hand, its share of the ceiling, and the kernel alone."""
    setting.check()
    contenders = {name: contender.run for name, contender in contest.make(setting).items()}
    own, by_hand = (device_seconds(contenders[name]) for name in (OURS, BY_HAND))
    values = {
        "time [ms]": 1e3 * own,
        "by hand [ms]": 1e3 * by_hand,
        "ratio to by hand": own / by_hand,
        "kernel alone [ms]": 1e3 * device_seconds(contenders[OURS], only=f"_{kernel}_kernel"),
    }
    if contest.bytes:
        values["share of the ceiling"] = contest.bytes / own / setting.copy_rate
    if contest.flop:
        values["share of the ceiling"] = contest.flop / own / setting.product_rates["tf32x3"]
    return Measured(values)


def _similarity(precision: str, setting: GpuSetting) -> Measured:
    """A 3x3 convolution of 512 channels, T = 30, channels last; float32 unless the precision is a dtype.

    One product is torch's of matrices of that shape, laid out already, in tf32 where ours is tf32 or three of them.
    """
    setting.check()
    dtype, steps, n = torch.bfloat16 if precision == "bfloat16" else torch.float32, 30, 512
    stacks = torch.randn(2, steps, n, 3, 3, n, device=setting.device).to(dtype).movedim(-1, 3)
    index = torch.randperm(n, device=setting.device)
    target, source = stacks
    term = rk.Term(target, source, 0, None, (None, index, None, None))
    asked = "tf32x3" if dtype == torch.bfloat16 else precision

    def by_hand() -> Tensor:
        left, right = term.target, term.source.index_select(2, index)
        return left.movedim(1, 0).reshape(n, -1) @ right.movedim(1, 0).reshape(n, -1).T

    left, right = (stack.movedim(1, 0).reshape(n, -1) for stack in stacks)
    with float32_products("tf32" if precision == "tf32" else "ieee"):
        theirs = device_seconds(by_hand, repeats=5)
    with float32_products("tf32"):
        product = device_seconds(lambda: left @ right.T, repeats=5)
    own = device_seconds(lambda: rk.similarity([term], precision=asked), repeats=5)
    rate = 2 * n * term.target.numel() / own
    return Measured(
        {
            "time [ms]": 1e3 * own,
            "by hand [ms]": 1e3 * theirs,
            "ratio to by hand": own / theirs,
            "one product over it": product / own,
            "rate [Tflop/s]": rate / 1e12,
            "share of the ceiling": rate / setting.product_rates[precision],
        }
    )


# ---------------------------------------------------------------- correctness


def _correctness(network: str, setting: GpuSetting) -> Measured:
    """Every kernel at a network's shapes, against float64 of the same inputs. Raises ArithmeticError where wrong."""
    setting.check()
    net = Network.of(NETWORKS[network](), torch.device(setting.device))
    values = {**_moves(net), **_products(net)}
    if wrong := {name: value for name, value in values.items() if not value <= 1}:
        raise ArithmeticError(f"{network}: {wrong}")
    return Measured(values)


def _moves(net: Network) -> dict[str, float]:
    """Errors over what is allowed: of permute no bit (infinite where one differs), of graft and combine 1e-5."""
    a, b, c = (net.draw(seed) for seed in range(3))
    moved = rk.permute(a, net.indices, net.packing, backend="triton")
    back = rk.permute(moved, net.indices, net.packing, inverse=True, backend="triton")
    grafted = rk.graft(a, b, c, [0.5, 1.0], net.indices, net.packing, backend="triton")
    combined = rk.combine([a, b, c], [[0.5, -1.0, 2.0]], backend="triton")
    exact = all(torch.equal(moved[n], net.permute_by_hand(n, a[n])) and torch.equal(back[n], a[n]) for n in a)
    worst = {"permute": 0.0 if exact else math.inf, "graft": 0.0, "combine": 0.0}
    for name in a:
        x, y, z = (tensors[name].double() for tensors in (a, b, c))
        for kernel, found, truth in (
            ("graft", grafted[name][0], x + 0.5 * net.permute_by_hand(name, z - y)),
            ("combine", combined[name][0], 0.5 * x - y + 2 * z),
        ):
            worst[kernel] = max(worst[kernel], float((found - truth).abs().max()) / 1e-5)
    return {f"{kernel}: error over allowed": value for kernel, value in worst.items()}


def _products(net: Network) -> dict[str, float]:
    """Errors of similarity on the largest weight, in units of what each precision may err (twice torch's own)."""
    segment = max(net.packing.segments.values(), key=lambda s: s.size * (len(s.shape) > 1))
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        target, source = torch.randn(2, 3, *segment.shape, device=net.device).to(dtype)
        term = rk.Term(target, source, 0)
        truth = similarity_reference([rk.Term(target.double(), source.double(), 0)])
        theirs = float((similarity_reference([term]) - truth).abs().max())
        largest = float(truth.abs().max())
        for precision in ("ieee", "tf32x3", "tf32") if dtype == torch.float32 else ("tf32x3",):
            ours, again = (rk.similarity([term], precision=precision, backend="triton") for _ in range(2))
            if not torch.equal(ours, again):
                raise ArithmeticError(f"similarity of {segment.name} is not deterministic")
            allowed = 5e-3 * largest if precision == "tf32" else 2 * theirs + 1e-6 * largest
            kind = f"similarity {str(dtype).removeprefix('torch.')} {precision}"
            found[f"{kind}: error over allowed"] = float((ours - truth).abs().max()) / allowed
    return found


# ---------------------------------------------------------------- FGMT


def _fgmt(setting: GpuSetting) -> Measured:
    """FGMT, T = 30, on Conv8 at full width; random images, for the time alone. The first run compiles."""
    from regraft.learning_transfer.driver import transfer
    from regraft.learning_transfer.trajectory import Trajectory
    from regraft.networks.papers import conv8, initialise

    setting.check()
    network, g = conv8(), setting.generator("fgmt")
    start, end, target = ({n: t.to(setting.device) for n, t in initialise(network, g).items()} for _ in range(3))
    batches = [
        (
            torch.randn(128, 3, 32, 32, generator=g).to(setting.device),
            torch.randint(10, (128,), generator=g).to(setting.device),
        )
        for _ in range(8)
    ]
    clock = Clock()
    path = Trajectory.linear(start, end, steps=30)
    with clock.phase("all", setting.device):
        result = transfer(network.to(setting.device), path, target, batches, method="fgmt", gradient_batches=2)
    return Measured({"time [ms]": 1e3 * clock.cost.wall}, cost=result.seconds)
