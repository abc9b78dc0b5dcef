"""Several networks merged into one by published methods: TIES, DARE, SLERP, averages by importance, greedy soups.

A method is one function, ``prepare(problem) -> Merged``, with `merge_method` before it. ``read(name)`` of that makes
one tensor of the result, so that networks of any size are merged tensor by tensor. Integers and infinite buffers are
the first network's; running statistics are averaged: where there are data, estimate them anew
(`regraft.training.statistics.reset_batchnorm`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from regraft.core.arguments import Between, Finite, check_arguments, check_fields
from regraft.core.tensors import Batch, Tensors, check_alike, is_finite, sum_networks, weighted_sum
from regraft.fusion.fisher import estimate_fisher, merge_by_importance
from regraft.training.evaluation import accuracy
from regraft.training.statistics import reset_batchnorm

Read = Callable[[str], Tensor]
"""Makes one tensor of the result, by its name."""

Density = Annotated[float, Between(1e-6, 1)]

STATISTICS = ("running_mean", "running_var")
PARALLEL = 1e-4
"""Radians: below this angle an arc is a straight line."""


@dataclass(frozen=True, eq=False)
class MergeProblem:
    """What is to be merged: networks of equal names, shapes and dtypes, which may read a tensor each time.

    Attributes:
        networks: tensors by name, each.
        weights: one number for each; the method's own if not given.
        base: what all of them were trained from.
        density: the share of a change that is kept, a millionth at least; the method's own if not given.
        seed: of what is drawn.
        model, batches: to run the networks on data.
        validation: batches by which networks are chosen; ``batches`` if not given.
    """

    networks: Sequence[Mapping[str, Tensor]]
    weights: Sequence[Finite] | None = None
    base: Mapping[str, Tensor] | None = None
    density: Density | None = None
    seed: int = 0
    model: nn.Module | None = None
    batches: Iterable[Batch] | None = None
    validation: Iterable[Batch] | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def shares(self) -> list[float]:
        """The weights, made to sum to one; equal ones if not given."""
        weights = list(self.weights or [1.0] * len(self.networks))
        return [weight / sum(weights) for weight in weights]

    @property
    def names(self) -> list[str]:
        """Of all tensors that are weights."""
        return [name for name, tensor in self.networks[0].items() if is_weight(name, tensor)]

    def change(self, number: int, name: str) -> Tensor:
        """What training changed of a tensor of the base."""
        assert self.base is not None
        return self.networks[number][name] - self.base[name]

    def run_on(self) -> tuple[nn.Module, Iterable[Batch]]:
        """The model and its data."""
        assert self.model is not None and self.batches is not None
        return self.model, self.batches


@dataclass(frozen=True)
class Merged:
    """What a method gives: ``read`` makes one tensor of the result; found: what it chose, for the record."""

    read: Read
    found: Mapping[str, Any] = field(default_factory=dict)


Prepare = Callable[[MergeProblem], Merged]


@dataclass(frozen=True)
class MergeMethod:
    """A method: what it needs of a problem, and what else of it it looks at (names of fields)."""

    prepare: Prepare
    needs: Collection[str]
    takes: Collection[str]


MERGE_METHODS: dict[str, MergeMethod] = {}


def merge_method(
    name: str, *, needs: Collection[str] = (), takes: Collection[str] = ()
) -> Callable[[Prepare], Prepare]:
    """Decorator: the method has this name. needs, takes: of "weights", "base", "density", "seed", "data"."""

    def register(prepare: Prepare) -> Prepare:
        MERGE_METHODS[name] = MergeMethod(prepare, needs, {*needs, *takes})
        return prepare

    return register


@check_arguments
def merge(method: str, problem: MergeProblem) -> Tensors:
    """All networks merged by a method of `MERGE_METHODS`: a new dictionary.

    Raises ValueError as `check_merge`, and for networks that differ, naming the first tensor that does.
    """
    given = {name for name in ("weights", "base", "density") if getattr(problem, name) is not None}
    given |= {"data"} if problem.model is not None and problem.batches is not None else set()
    check_merge(method, len(problem.networks), problem.weights, given)
    others = {f"network {number}": network for number, network in enumerate(problem.networks)}
    for name, other in (others | ({} if problem.base is None else {"the base": problem.base})).items():
        check_alike(problem.networks[0], other, "network 0", name)
    read = MERGE_METHODS[method].prepare(problem).read
    return {name: read(name) for name in problem.networks[0]}


def check_merge(method: str, count: int, weights: Sequence[float] | None, given: Collection[str]) -> None:
    """Raise ValueError, before any work, for what a method lacks or does not look at.

    count: of the networks. given: of "weights", "base", "density", "data", what there is.
    """
    if method not in MERGE_METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(MERGE_METHODS)}")
    if count < 1:
        raise ValueError("there is no network to merge")
    known = MERGE_METHODS[method]
    if "weights" in known.needs and weights is None:
        raise ValueError(f"method {method!r} needs one number for each network (--weights); --method mean needs none")
    if "base" in known.needs and "base" not in given:
        raise ValueError(f"method {method!r} merges what training changed: it needs the base of the networks (--base)")
    if "data" in known.needs and "data" not in given:
        raise ValueError(f"method {method!r} runs the networks: it needs a model and data (--model, --data)")
    if unused := [name for name in ("weights", "base", "density") if name in given and name not in known.takes]:
        raise ValueError(f"method {method!r} does not use {unused[0]}: leave out --{unused[0]}")
    if weights is not None and len(weights) != count:
        raise ValueError(f"{count} networks need as many weights, not {len(weights)}")
    are_shares = not {"base", "weights"} & {*known.needs}
    if weights is not None and are_shares and not (min(weights) >= 0 and sum(weights) > 0):
        raise ValueError(f"weights of method {method!r} are shares: at least 0 and not all 0, not {list(weights)}")
    if method == "slerp" and count != 2:
        raise ValueError(f"method 'slerp' goes along the arc between two networks, not {count}")


def is_weight(name: str, tensor: Tensor) -> bool:
    """Whether methods look at a tensor: floating, finite, no running statistic."""
    return tensor.is_floating_point() and not name.endswith(STATISTICS) and is_finite(tensor)


# ---------------------------------------------------------------- the methods


@merge_method("sum", needs=["weights"])
def prepare_sum(problem: MergeProblem) -> Merged:
    """``sum_i weights[i] networks[i]``; running statistics are summed as weights are."""
    assert problem.weights is not None
    return Merged(partial(sum_networks, problem.networks, list(problem.weights)))


@merge_method("mean")
def prepare_mean(problem: MergeProblem) -> Merged:
    """The mean of all networks: a uniform soup (Wortsman et al., 2022)."""
    return Merged(partial(sum_networks, problem.networks, problem.shares))


@merge_method("slerp", takes=["weights"])
def prepare_slerp(problem: MergeProblem) -> Merged:
    """Along the arc between two networks (Shoemake, 1985), tensor by tensor, as far as the second one's share."""

    def read(name: str) -> Tensor:
        first, second = (network[name] for network in problem.networks)
        angle = _angle(first, second)
        shares = problem.shares
        if PARALLEL < angle < math.pi - PARALLEL:
            shares = [math.sin(share * angle) / math.sin(angle) for share in shares]
        return weighted_sum([first, second], shares)

    return Merged(_of_weights(problem, read))


@merge_method("ties", needs=["base"], takes=["weights", "density"])
def prepare_ties(problem: MergeProblem) -> Merged:
    """The base and the changes of all networks, trimmed to the largest, signs elected (Yadav et al., 2023).

    density: the share of each network's change that is kept, 0.2 if not given. weights: a factor of each change, 1 if
    not given.
    """
    share = 0.2 if problem.density is None else problem.density
    numbers, names = range(len(problem.networks)), problem.names
    factors = problem.weights or [1.0] * len(numbers)

    def read_changes(number: int) -> Iterable[Tensor]:
        return (problem.change(number, name) for name in names)

    least = [find_magnitude(partial(read_changes, number), share) for number in numbers]

    def read(name: str) -> Tensor:
        parts = [
            {name: keep_large(problem.change(number, name), least[number]) * factors[number]} for number in numbers
        ]
        assert problem.base is not None
        return problem.base[name] + merge_ties(parts)[name]

    return Merged(_of_weights(problem, read))


@merge_method("dare", needs=["base"], takes=["weights", "density", "seed"])
def prepare_dare(problem: MergeProblem) -> Merged:
    """The base and the changes of all networks, of each change a random part, scaled up (Yu et al., 2024).

    density: the chance of an entry to be kept, 0.1 if not given. weights: a factor of each change, equal ones that sum
    to one if not given. What is drawn depends on seed, network and name alone.
    """
    share = 0.1 if problem.density is None else problem.density
    factors = problem.weights or problem.shares

    def read(name: str) -> Tensor:
        assert problem.base is not None
        total = problem.base[name].clone()
        for number, factor in enumerate(factors):
            change = problem.change(number, name)
            kept = torch.rand(change.shape, generator=_generator(problem.seed, number, name)) < share
            total += torch.where(kept.to(change.device), change, 0) * (factor / share)
        return total

    return Merged(_of_weights(problem, read))


@merge_method("fisher", needs=["data"], takes=["weights", "seed"])
def prepare_fisher(problem: MergeProblem) -> Merged:
    """Parameters averaged by their importance to each network (Matena and Raffel, 2022)."""
    model, batches = problem.run_on()
    importances = [
        estimate_fisher(model, dict(network.items()), batches, generator=_generator(problem.seed, number, ""))
        for number, network in enumerate(problem.networks)
    ]

    def read(name: str) -> Tensor:
        parts = [{name: network[name]} for network in problem.networks]
        own = [{name: of[name]} if name in of else {} for of in importances]
        return merge_by_importance(parts, own, problem.shares)[name]

    return Merged(_of_weights(problem, read))


@merge_method("greedy-soup", needs=["data"])
def prepare_greedy_soup(problem: MergeProblem) -> Merged:
    """The mean of those networks that do not make it worse on validation (Wortsman et al., 2022, recipe 1)."""
    chosen = choose_soup(problem)
    networks = [problem.networks[number] for number in chosen]
    return Merged(partial(sum_networks, networks, [1 / len(chosen)] * len(chosen)), {"chosen": chosen})


def choose_soup(problem: MergeProblem) -> list[int]:
    """The networks of a greedy soup, the most accurate one first.

    Networks are tried in the order of their accuracy on validation; one stays where the mean with it is as accurate.
    BatchNorm statistics of each mean are estimated anew.
    """
    model, batches = problem.run_on()
    validation = batches if problem.validation is None else problem.validation

    def score(chosen: Sequence[int]) -> float:
        networks = [problem.networks[number] for number in chosen]
        mean = {name: sum_networks(networks, [1 / len(chosen)] * len(chosen), name) for name in networks[0]}
        return accuracy(model, mean if len(chosen) == 1 else reset_batchnorm(model, mean, batches), validation)

    alone = [score([number]) for number in range(len(problem.networks))]
    first, *others = sorted(range(len(alone)), key=lambda number: -alone[number])
    chosen, best = [first], alone[first]
    for number in others:
        if (with_it := score([*chosen, number])) >= best:
            chosen, best = [*chosen, number], with_it
    return chosen


# ---------------------------------------------------------------- parts of them


def _of_weights(problem: MergeProblem, read_weight: Read) -> Read:
    """Weights as they are read, running statistics averaged, all else the first's."""

    def read(name: str) -> Tensor:
        if is_weight(name, problem.networks[0][name]):
            return read_weight(name)
        return sum_networks(problem.networks, problem.shares, name)

    return read


def find_magnitude(read: Callable[[], Iterable[Tensor]], share: float) -> Tensor:
    """The largest magnitude, float32, that at least a share of all entries have or exceed.

    ``read()`` gives the tensors one after the other; it is called twice, and none is kept. Magnitudes are counted by
    the upper and then by the lower half of their bits, which for numbers that are not negative sort as the numbers do.
    """
    half = 1 << 16

    def bits(tensor: Tensor) -> Tensor:
        return tensor.abs().float().contiguous().view(torch.int32).flatten()

    upper = sum((torch.bincount(bits(t) >> 16, minlength=half) for t in read()), torch.zeros(half, dtype=torch.int64))
    rank = max(1, round(share * int(upper.sum())))  # from the largest
    top, above = _find_rank(upper, rank)
    lower = torch.zeros(half, dtype=torch.int64)
    for tensor in read():
        own = bits(tensor)
        lower = lower + torch.bincount(own[own >> 16 == top] & (half - 1), minlength=half)
    rest, _ = _find_rank(lower, rank - above)
    return torch.tensor(top << 16 | rest, dtype=torch.int32).view(torch.float32)


def _find_rank(counts: Tensor, rank: int) -> tuple[int, int]:
    """(the bin that holds the entry of this rank, counted from the last bin; how many entries lie in bins above)."""
    from_last = counts.flip(0).cumsum(0)
    place = int((from_last >= rank).nonzero()[0])
    return len(counts) - 1 - place, int(from_last[place] - counts.flip(0)[place])


def keep_large(tensor: Tensor, least: Tensor) -> Tensor:
    """The tensor, with zeros for entries of a smaller magnitude."""
    return torch.where(tensor.abs().float() >= least.to(tensor.device), tensor, 0)


def trim(g: Tensors, names: Sequence[str], share: float) -> Tensors:
    """`g`, with zeros but for the `share` of the named tensors' values that are largest by magnitude."""
    least = find_magnitude(lambda: (g[name] for name in names), share)
    return g | {name: keep_large(g[name], least) for name in names}


def merge_ties(parts: Sequence[Tensors]) -> Tensors:
    """Value by value the mean of those parts that are not zero and have the sign of the parts' sum."""
    merged = {}
    for name, first in parts[0].items():
        stack = torch.stack([part[name] for part in parts])
        agree = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
        total = torch.where(agree, stack, 0).sum(0)
        merged[name] = (total / agree.sum(0).clamp_min(1)).to(first.dtype)
    return merged


def _angle(a: Tensor, b: Tensor) -> float:
    """Between two tensors as vectors, in radians; 0 where one is zero."""
    a, b = a.double(), b.double()
    lengths = float(a.norm() * b.norm())
    return math.acos(max(-1.0, min(1.0, float((a * b).sum()) / lengths))) if lengths else 0.0


def _generator(seed: int, number: int, name: str) -> torch.Generator:
    """One for each tensor of each network, so that the order of reading does not matter."""
    digest = hashlib.sha256(f"{seed} {number} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
