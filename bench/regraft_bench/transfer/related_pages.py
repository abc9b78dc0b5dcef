"""Ports between related bases: their tables and figures, functions of rows and of nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from regraft.porting.auto import AUTO, CANDIDATES
from regraft_bench.report.figures import Figure, Line, Panel
from regraft_bench.report.tables import (
    Column,
    Group,
    Rows,
    Sheet,
    Table,
    by_scenario,
    groups,
    make_sheet,
    spread,
    value,
)
from regraft_bench.rows import Row
from regraft_bench.transfer import scenarios
from regraft_bench.transfer.bases import LADDER, RELATED_NETWORKS
from regraft_bench.transfer.methods.ports import metric_name
from regraft_bench.transfer.pages import compare_ports, list_ports
from regraft_bench.transfer.relatedness import BARRIER, COSINE, MATCHED

RELATED_METHODS = ("naive", "fgmt", "head", "functional", "distil", "few-shot")
"""The lines of the figures."""

RELATED_QUESTIONS = (
    *((method, "naive") for method in ("gradfix", "weights", "fgmt", "theseus", "head", "functional", "distil")),
    *((method, "distil") for method in ("head", "functional", "functional+distil")),
    *((method, "few-shot") for method in ("naive", "head", "functional", "functional+distil", "auto")),
)
RELATED_COUNTS = scenarios.RELATED_PORTS[0].settings.images


def share_of_gain(own: Row, fine_tune: Row, images: int) -> float:
    """What a port keeps of what fine-tuning gained over chance, on the base where it was made."""
    chance = 1 / len(own.config["settings"]["task"]["classes"])
    values = own.values[metric_name(images)], fine_tune.values["accuracy"]
    kept, gained = (float(accuracy or 0) - chance for accuracy in values)
    return kept / gained


def share_by_method(rows: Rows, images: int) -> dict[str, list[float]]:
    """Of one scenario, over the seeds that have the method's row and the fine-tune's."""
    return {
        method: [share_of_gain(*pair, images) for pair in pairs]
        for method, group in groups(rows).items()
        if method != "own base" and (pairs := [p for p in group.beside("own base") if not p[0].failure])
    }


def split_relations(rows: Rows, network: str) -> dict[str, Rows]:
    """A network's scenarios, by how the bases are related."""
    beginning = f"related-{network}-"
    return {n.removeprefix(beginning): own for n, own in by_scenario(rows).items() if n.startswith(beginning)}


# ---------------------------------------------------------------- tables


def list_relations(rows: Rows) -> Iterator[Sheet]:
    """A sheet a network and number of images; a line for each relation: how related, and what each method keeps."""
    for network in RELATED_NETWORKS:
        relations = split_relations(rows, network)
        methods = list(dict.fromkeys(r.method for own in relations.values() for r in own if r.method != "own base"))
        for images in RELATED_COUNTS if relations else ():
            columns = [
                *(Column(heading, partial(_format_value, name)) for heading, name in MEASURES.items()),
                *(Column(method, partial(_format_share, method, images)) for method in methods),
            ]
            title = f"{network}-{images}"
            yield make_sheet(title, "the bases share", columns, relations)


MEASURES = {
    "cosine": COSINE,
    "matched": COSINE + MATCHED,
    "barrier [nats]": BARRIER,
    "matched [nats]": BARRIER + MATCHED,
}


def _format_value(name: str, rows: Rows) -> str:
    return value(name, "{:.2f}")(Group("", [row for row in rows if row.method == rows[0].method], rows))


def _format_share(method: str, images: int, rows: Rows) -> str:
    return spread(share_by_method(rows, images).get(method, []), "{:.2f}")


def list_choices(rows: Rows) -> Iterator[Sheet]:
    """How far ``auto`` is behind the best of its candidates on test data, over all relations and seeds."""
    for network in RELATED_NETWORKS:
        relations = split_relations(rows, network)
        choices = {f"{n} images of each class": list(find_choices(relations, n)) for n in RELATED_COUNTS}
        columns = (
            Column("rows", lambda own: str(len(own))),
            Column("within .01 of the best", lambda own: f"{statistics.fmean(c.behind <= 0.01 for c in own):.0%}"),
            Column("mean behind", lambda own: f"{statistics.fmean(c.behind for c in own):.3f}"),
            Column("most behind", lambda own: f"{(worst := max(own, key=_behind)).behind:.3f} ({worst.where})"),
            Column("CPU s, of the best one's", lambda own: f"{statistics.median(c.cost_ratio for c in own):.1f}"),
        )
        if any(choices.values()):
            yield make_sheet(network, "auto", columns, {name: own for name, own in choices.items() if own})


@dataclass(frozen=True)
class Choice:
    """What ``auto`` came to in one scenario, with one seed: accuracy behind the best candidate's, cost over its."""

    where: str
    behind: float
    cost_ratio: float


def _behind(choice: Choice) -> float:
    return choice.behind


def find_choices(relations: Mapping[str, Rows], images: int) -> Iterator[Choice]:
    """Of every seed that has rows of all candidates."""
    name = metric_name(images)
    for relation, rows in relations.items():
        for seed in dict.fromkeys(row.seed for row in rows):
            own = {row.method: row for row in rows if row.seed == seed and row.values.get(name) is not None}
            if AUTO in own and own.keys() >= set(CANDIDATES):
                best = max((own[method] for method in CANDIDATES), key=lambda row: row.values[name] or 0)
                accuracies = [float(row.values[name] or 0) for row in (best, own[AUTO])]
                costs = [dict(row.series["cost by images [CPU s]"].points())[images] for row in (best, own[AUTO])]
                where = f"{relation}, seed {seed}: {best.method}"
                yield Choice(where, accuracies[0] - accuracies[1], costs[1] / costs[0])


# ---------------------------------------------------------------- figures


def draw_relations(network: str, images: int, measure: str, rows: Rows) -> Iterator[Line]:
    """A line a method along the ladder, and a point for each base that was trained further."""
    relations = split_relations(rows, network)
    at = {name: _mean_measure(own, measure) for name, own in relations.items()}
    shares = {name: share_by_method(own, images) for name, own in relations.items()}
    for method in RELATED_METHODS:
        there = sorted((name for name in relations if shares[name].get(method)), key=at.__getitem__)
        ladder = [name for name in there if name in LADDER]
        for joined in (ladder, *([name] for name in there if name not in LADDER)):
            if joined:
                yield _draw_line(method, [at[name] for name in joined], [shares[name][method] for name in joined])


def _mean_measure(rows: Rows, measure: str) -> float:
    by_seed: Mapping[int, float | None] = {row.seed: row.values.get(measure) for row in rows}
    return statistics.fmean(v for v in by_seed.values() if v is not None)


def _draw_line(method: str, x: Sequence[float], seeds: Sequence[Sequence[float]]) -> Line:
    y = tuple(map(statistics.fmean, seeds))
    if min(map(len, seeds)) == 1:
        return Line(method, tuple(x), y)
    low, high = (tuple(m + s * statistics.stdev(v) for m, v in zip(y, seeds, strict=True)) for s in (-1, 1))
    return Line(method, tuple(x), y, low, high)


def _figure(name: str, measure: str, x: str, direction: str) -> Figure:
    panels = tuple(
        Panel(
            f"{network}, {images} images of each class",
            x,
            "share of the fine-tune's gain kept",
            partial(draw_relations, network, images, measure),
            bars=True,
        )
        for network in RELATED_NETWORKS
        for images in RELATED_COUNTS[1:]
    )
    title = "What a port keeps of a fine-tune, without labels (few-shot: with), by how related the bases are"
    caption = f"1: all that fine-tuning gained over chance is kept. To the right the bases have {direction} in common."
    return Figure(name, title, scenarios.list_names(scenarios.RELATED_PORTS), panels, caption, columns=3)


RELATED_FIGURES = (
    _figure("related", COSINE, "cosine of the bases' weights", "more"),
    _figure("related-barrier", BARRIER, "barrier between the bases [nats]", "less"),
)


def _table(name: str, title: str, sheets: Callable[[Rows], Iterator[Sheet]]) -> Table:
    return Table(name, title, scenarios.list_names(scenarios.RELATED_PORTS), sheets)


RELATED_TABLES = (
    _table("related", "Share of the fine-tune's gain that a port keeps, by how related the bases are", list_relations),
    _table("related-ports", "Test accuracy between related bases, by images of each class", list_ports),
    _table(
        "related-questions",
        "Which port between related bases is ahead",
        partial(compare_ports, questions=RELATED_QUESTIONS),
    ),
    _table("related-auto", "How often auto takes the best of its candidates", list_choices),
)
