"""Matching and FGMT against their straightforward and literal forms: the same objective, in how much less time.

``pytest bench/bench_matching.py --benchmark-only``. Contenders are alternated in one process on one thread
(the assignments of one colour apart, which may use two), and the medians of their CPU seconds compared:
what another process does to the machine does to all of them. The table goes to ``results/matching.md``.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.models import resnet18

import regraft
from regraft import data, models
from regraft.matching import colours
from regraft.reference import learning_transfer as literal_transfer
from regraft.reference import matching as literal
from regraft.results import environment, write

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("one_thread")]

Tensors = dict[str, Tensor]
Perm = dict[str, Tensor]
RESULTS = Path(__file__).parents[1] / "results"
ROUNDS = 3


def straightforward(spec: regraft.PermutationSpec, target: Tensors, source: Tensors) -> Perm:
    """What one would write first: at every step the whole similarity by torch in float32, scipy, no memory."""
    perm = spec.identity()
    order = [group for members in colours(spec, frozenset(target)) for group in members]
    improved = True
    while improved:
        improved = False
        for group in order:
            total = torch.zeros(spec.groups[group], spec.groups[group])
            for name, axis in spec.tensors_of(group):
                if name not in target:
                    continue
                moved = source[name]
                for other in range(moved.dim()):
                    index = spec.axis_index(name, other, perm)
                    if other != axis and index is not None:
                        moved = moved.index_select(other, index)
                positions = spec.positions(name, axis, group)
                rows = [tensor.movedim(axis, 0)[positions].flatten(1) for tensor in (target[name], moved)]
                total += rows[0] @ rows[1].T
            score = total.double().numpy()
            _, columns = linear_sum_assignment(score, maximize=True)
            before = score[range(len(score)), perm[group].numpy()].sum()
            after = score[range(len(score)), columns].sum()
            if after > before + 1e-7 * abs(before):
                perm = {**perm, group: torch.from_numpy(columns)}
                improved = True
    return perm


def alternate(contenders: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median CPU seconds of each contender, run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def two_starts(model: nn.Module) -> tuple[Tensors, Tensors]:
    """Two independent initialisations' parameters."""
    names = [name for name, _ in model.named_parameters()]
    starts = [models.initialise(model, torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    return tuple({name: start[name] for name in names} for start in starts)  # type: ignore[return-value]


MATCHINGS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "MLP 784-2048-2048-2048-10": (lambda: models.mlp((784, 2048, 2048, 2048, 10)), (2, 1, 28, 28), 8.0),
    "resnet18": (resnet18, (2, 3, 64, 64), 2.0),
}


@pytest.mark.parametrize("name", MATCHINGS)
def test_matching_two_random_starts(name: str, benchmark, request) -> None:
    factory, shape, wanted = MATCHINGS[name]
    model = factory()
    spec = regraft.trace(model, (torch.zeros(shape),))
    target, source = two_starts(model)
    order = [group for members in colours(spec, frozenset(target)) for group in members]
    perms: dict[str, Perm] = {}

    def fast() -> None:
        perms["fast"] = regraft.match(spec, target, source).perm

    def simple() -> None:
        perms["straightforward"] = straightforward(spec, target, source)

    def by_the_book() -> None:
        perms["literal"] = literal.match(spec, [target], [source], order)[0]

    seconds = alternate({"straightforward": simple, "fast": fast})
    seconds |= alternate({"literal": by_the_book}, 1)
    benchmark.pedantic(fast, rounds=1)
    objectives = {name: literal.objective(spec, [target], [source], perm) for name, perm in perms.items()}
    record(benchmark, request, name, seconds, objectives, {"straightforward": wanted, "literal": 5.0})


def test_fgmt_on_mnist(benchmark, request) -> None:
    """784-512-10, T = 10, one batch of 128 a gradient: everything but the gradients."""
    try:
        mnist = data.load("mnist")
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    model = models.mlp((784, 512, 10))
    spec = regraft.trace(model, (torch.zeros(2, 1, 28, 28),))
    start, target = (models.initialise(model, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    generator = torch.Generator().manual_seed(3)
    batches = [
        batch for batch, _ in zip(mnist.train.batches(128, generator=generator), range(310), strict=False)
    ]
    end = dict(start)
    for batch in batches[:300]:
        g = literal_transfer.gradient(model, end, [batch])
        end = {name: tensor - 0.1 * g[name] for name, tensor in end.items()}
    path = regraft.Trajectory.linear(start, end, 10)
    sample = batches[300:]
    order = list(spec.groups)
    books: dict[str, list[float]] = {"fast": [], "literal": []}
    objectives: dict[str, float] = {}

    def fast() -> None:
        found = regraft.transfer(model, path, target, sample, "fgmt", spec=spec)
        books["fast"].append(found.cpu_cost - found.cpu_seconds["gradients"])
        objectives["fast"] = found.objectives[-1]

    def by_the_book() -> None:
        spent = 0.0
        pairs: tuple[list[Tensors], list[Tensors]] = ([], [])
        perm, theta = spec.identity(), [target]
        for s in range(1, path.steps + 1):
            pairs[0].append(literal_transfer.gradient(model, path[s - 1], [sample[s - 1]]))
            pairs[1].append(literal_transfer.gradient(model, theta[s - 1], [sample[s - 1]]))
            begin = time.process_time()
            perm, found = literal.match(spec, pairs[1], pairs[0], order, start=perm)
            theta = literal_transfer.rebuild(spec, list(path), target, perm, s)
            spent += time.process_time() - begin
        books["literal"].append(spent)
        objectives["literal"] = found[-1]

    for _ in range(ROUNDS):
        by_the_book()
        fast()
    benchmark.pedantic(fast, rounds=1)
    seconds = {contender: statistics.median(values) for contender, values in books.items()}
    record(benchmark, request, "FGMT on mnist, 784-512-10", seconds, objectives, {"literal": 5.0})


def record(
    benchmark,
    request,
    name: str,
    seconds: dict[str, float],
    objectives: dict[str, float],
    wanted: dict[str, float],
) -> None:
    """Keep what was measured beside what is wanted; a speed-up at the price of the objective is none, and fails."""
    rows = [
        {
            "case": name,
            "against": contender,
            "seconds": seconds[contender],
            "fast_seconds": seconds["fast"],
            "ratio": seconds[contender] / seconds["fast"],
            "wanted": wanted[contender],
            "objective": objectives["fast"],
            "difference": objectives["fast"] / objectives[contender] - 1,
        }
        for contender in wanted
    ]
    benchmark.extra_info["rows"] = rows
    request.config.stash.setdefault(ROWS, []).extend(rows)
    save(request.config.stash[ROWS])
    for row in rows:
        assert row["difference"] > -1e-6, row


ROWS = pytest.StashKey[list]()


def save(rows: Sequence[dict[str, object]]) -> None:
    """``results/matching.json`` and the table made from it."""
    where = environment()
    write(
        RESULTS / "matching.json", json.dumps({"environment": asdict(where), "rows": rows}, indent=1) + "\n"
    )
    head = "| case | against | CPU seconds | fast | ratio | wanted | objective, relative difference |"
    lines = [
        f"| {r['case']} | {r['against']} | {r['seconds']:.3f} | {r['fast_seconds']:.3f} | {r['ratio']:.1f} "
        f"| {r['wanted']:g} | {r['difference']:+.1e} |"
        for r in rows
    ]
    source = f"`{where.command}` at {where.commit}{' (dirty)' if where.dirty else ''}, {where.machine}, one thread."
    write(
        RESULTS / "matching.md",
        "\n".join(
            [
                "# Matching",
                "",
                (__doc__ or "").strip(),
                "",
                source,
                "",
                head,
                "|---|---|---:|---:|---:|---:|---:|",
                *lines,
                "",
            ]
        ),
    )
