"""Correctness on the device, against float64 of the same inputs. What may differ is derived from the formats' rounding:
each value is an error over what is allowed, at most 1."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import regraft_kernels as rk
from regraft_bench.kernels.networks import Network
from regraft_kernels.similarity import similarity_reference

Values = dict[str, float]

SINGLE = 2.0**-24
"""One rounding to float32, relative: half a unit in the last of its 24 places; bfloat16 has 8, float16 11."""
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

SIGMAS = 6.0
"""Errors of many products add like a random walk: a million sums stay within so many deviations."""

PRODUCT_ERROR = {"ieee": 0.0, "tf32x3": 2.0**-20, "tf32": 2.0**-9, "half": 0.0}
"""Relative error of one product as the precision cuts its factors: tf32 keeps 10 bits of each (cut off, not rounded),
tf32x3 twice as many and leaves out the product of both remainders; halves are multiplied exactly."""

ADDITIONS = {"ieee": 1.0, "tf32x3": 3 / 8, "tf32": 1 / 8, "half": 1 / 8}
"""How often a sum in float32 is cut off for each of its products: matrix units add eight or more at a time."""


def require(holds: bool, what: str) -> None:
    """Raise ArithmeticError unless it holds."""
    if not holds:
        raise ArithmeticError(what)


def _within(values: Values) -> Values:
    wrong = {name: value for name, value in values.items() if not value <= 1}
    require(not wrong, f"errors over what is allowed: {wrong}")
    return values


def check_network(net: Network) -> Values:
    """Every kernel at a network's shapes, in float32; the products in each precision and dtype."""
    return _within({**_check_moves(net, torch.float32), **_check_products(net)})


def _check_moves(net: Network, dtype: torch.dtype) -> Values:
    a, b, c = ({name: t.to(dtype) for name, t in net.draw(seed).items()} for seed in range(3))
    moved = rk.permute(a, net.indices, net.packing, backend=_backend(net))
    back = rk.permute(moved, net.indices, net.packing, inverse=True, backend=_backend(net))
    grafted = rk.graft(a, b, c, [0.5, 1.0], net.indices, net.packing, backend=_backend(net))
    combined = rk.combine([a, b, c], [[0.5, -1.0, 2.0]], backend=_backend(net))
    exact = all(torch.equal(moved[n], net.permute_by_hand(n, a[n])) and torch.equal(back[n], a[n]) for n in a)
    worst = {"permute": 0.0 if exact else math.inf, "graft": 0.0, "combine": 0.0}
    for name in a:
        x, y, z = (tensors[name].double() for tensors in (a, b, c))
        ends = net.permute_by_hand(name, z), net.permute_by_hand(name, y)
        truth, size = x + 0.5 * (ends[0] - ends[1]), x.abs() + 0.5 * (ends[0].abs() + ends[1].abs())
        worst["graft"] = max(worst["graft"], _error(grafted[name][0], truth, 3, size))
        truth, size = 0.5 * x - y + 2 * z, 0.5 * x.abs() + y.abs() + 2 * z.abs()
        worst["combine"] = max(worst["combine"], _error(combined[name][0], truth, 5, size))
    kind = str(dtype).removeprefix("torch.")
    return {f"{kernel} {kind}: error over allowed": value for kernel, value in worst.items()}


def _error(computed: Tensor, truth: Tensor, roundings: int, size: Tensor) -> float:
    """The largest error over what so many roundings in float32 of numbers of this size, and one of the result to its
    dtype, may add up to."""
    allowed = roundings * SINGLE * size + ROUNDING[computed.dtype] * truth.abs() * (1 + 2**-7) + 1e-30
    return float(((computed.double() - truth).abs() / allowed).max()) if truth.numel() else 0.0


def _check_products(net: Network) -> Values:
    """similarity of three steps of the largest weight; and of a few of its entries, whose sums are so short that a
    lesser precision would show."""
    segment = max(net.packing.segments.values(), key=lambda s: s.size * (len(s.shape) > 1))
    stacks = torch.randn(2, 3, *segment.shape, device=net.device)
    short = stacks[:, :1].flatten(3)[..., :256].contiguous()
    values: Values = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for precision in ("ieee", "tf32x3", "tf32") if dtype == torch.float32 else ("half",):
            errors = [_product_error(part.to(dtype), precision, _backend(net)) for part in (stacks, short)]
            values[f"similarity {str(dtype).removeprefix('torch.')} {precision}: error over allowed"] = max(errors)
    return values


def _product_error(stacks: Tensor, precision: str, backend: str) -> float:
    """The partial sums are about as large as the deviation of the whole; each addition cuts one off."""
    target, source = stacks
    wide = stacks.double()
    truth = similarity_reference([rk.Term(wide[0], wide[1], 0)])
    deviation = similarity_reference([rk.Term(wide[0].square(), wide[1].square(), 0)]).sqrt()
    term, asked = [rk.Term(target, source, 0)], "tf32x3" if precision == "half" else precision
    ours, again = (rk.similarity(term, precision=asked, backend=backend) for _ in range(2))
    require(torch.equal(ours, again), "similarity is not deterministic")
    additions = ADDITIONS[precision] * target.numel() / len(truth)
    allowed = SIGMAS * deviation * (PRODUCT_ERROR[precision] + (1 + additions) * SINGLE)
    return float(((ours.double() - truth).abs() / allowed).max())


def _halves(net: Network) -> Values:
    """Moves and sums in bfloat16 and float16."""
    return _within({**_check_moves(net, torch.bfloat16), **_check_moves(net, torch.float16)})


def _odd_addresses(net: Network) -> Values:
    """Tensors that begin at an odd element, which no 16-byte access can read."""
    a = net.draw(0)
    odd = {name: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for name, t in a.items()}
    moved = rk.permute(odd, net.indices, net.packing, backend=_backend(net))
    require(all(torch.equal(moved[n], net.permute_by_hand(n, a[n])) for n in a), "an unaligned permute differs")
    return {"tensors": len(a)}


def _several_targets(net: Network) -> Values:
    """graft for three targets, each with permutations of its own, is three grafts of one."""
    base, start, end = (net.draw(seed) for seed in range(3))
    targets = {name: torch.stack([t, 2 * t, -t]) for name, t in base.items()}
    indices = {slot: torch.stack([v, v.flip(0), v.roll(1)]) for slot, v in net.indices.items()}
    whole = rk.graft(targets, start, end, [0.5, 1.0], indices, net.packing, backend=_backend(net))
    for p in range(3):
        own = {slot: v[p].contiguous() for slot, v in indices.items()}
        one = rk.graft(
            {n: t[p] for n, t in targets.items()}, start, end, [0.5, 1.0], own, net.packing, backend=_backend(net)
        )
        require(all(torch.equal(whole[n][p], one[n]) for n in one), f"target {p} of three differs")
    return {"targets": 3}


def _two_streams(net: Network) -> Values:
    """Prepared indices used on a second stream while the first works."""
    a, prepared = net.draw(0), net.packing.prepare(net.indices, backend=_backend(net))
    if net.device.type != "cuda":
        rk.permute(a, prepared, net.packing, backend=_backend(net))
        return {"calls": 1}
    streams, results = [torch.cuda.Stream(net.device) for _ in range(2)], []
    torch.cuda.synchronize()
    for number in range(20):
        with torch.cuda.stream(streams[number % 2]):
            results.append(rk.permute(a, prepared, net.packing, backend=_backend(net)))
    torch.cuda.synchronize()
    wanted = {n: net.permute_by_hand(n, t) for n, t in a.items()}
    require(all(torch.equal(r[n], wanted[n]) for r in results for n in a), "a permute on two streams differs")
    return {"calls": len(results)}


def _backend(net: Network) -> str:
    return "triton" if net.device.type == "cuda" or rk.backend.INTERPRETING else "torch"


CHECKS: tuple[Callable[[Network], Values], ...] = (_halves, _odd_addresses, _several_targets, _two_streams)
