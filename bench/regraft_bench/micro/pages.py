"""Tables of the microbenches: every contender against what one would write by hand, measured in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from regraft_bench.contests import TIME
from regraft_bench.report.tables import (
    Column,
    Group,
    Rows,
    Sheet,
    Table,
    by_method,
    mean,
    seconds,
    seeds,
    spread,
    value,
)


def beside_by_hand(group: Group) -> str:
    """A cell: this method's time over that of the same contest's "by hand"."""
    other = group.rows[0].config["method"].get("beside")
    pairs = [(own.values.get(TIME), hand.values.get(TIME)) for own, hand in group.beside(other or "")]
    return mean([own / hand for own, hand in pairs if own is not None and hand], "{:.3g}")


def lapjv_beside_lapx(group: Group) -> str:
    """A cell of lapjv's lines: its time over lapx's in the same contest; below 1 it is the faster."""
    prefix, _, name = group.rows[0].method.rpartition(": ")
    if name != "lapjv":
        return ""
    beside = f"{prefix}: lapx" if prefix else "lapx"
    pairs = [(own.values.get(TIME), lapx.values.get(TIME)) for own, lapx in group.beside(beside)]
    return mean([own / lapx for own, lapx in pairs if own is not None and lapx], "{:.3g}")


def milliseconds(group: Group) -> str:
    """A cell: the time, with four digits."""
    found = group.values(TIME)
    return spread(found, "{:.0f}" if found and min(found) >= 1000 else "{:.4g}")


SUMMARY = (
    Column("ms", milliseconds),
    Column("ratio to by hand", beside_by_hand),
)


def phase(name: str) -> Callable[[Group], str]:
    """A cell: the CPU seconds of one phase, the wall clock's where a row has none."""

    def cell(group: Group) -> str:
        return mean([row.cost[name].cpu or row.cost[name].wall for row in group.rows if name in row.cost], "{:.1f}")

    return cell


def format_warnings(group: Group) -> str:
    """A cell: what the tracer warned of."""
    return "; ".join(text for row in group.rows for text in row.notes.get("warnings", [])) or "–"


MODELS = (
    Column("error", value("error", "{:.1e}")),
    Column("moved", value("moved", "{:.2%}")),
    Column("weights moved on both axes", value("weights moved on both axes", "{:.2%}")),
    Column("groups", value("groups", "{:.0f}")),
    Column("blocks", value("blocks", "{:.0f}")),
    Column("parameters", value("parameters", "{:.0f}")),
    Column("trace, s", phase("trace")),
    Column("verify, s", phase("verify")),
    Column("check, s", phase("check")),
    Column("what stays, and why", format_warnings),
)
COMPILED = (
    *(
        Column(heading, value(heading, "{:.0f}"))
        for heading in (
            "registers",
            "spilled [bytes]",
            "shared memory [bytes]",
            "instructions",
            "loop instructions",
            "16-byte stores",
            "narrower stores",
            "divisions",
            "matrix instructions",
            "copies in flight",
        )
    ),
    Column("instructions per 16 bytes", value("instructions per 16 bytes", "{:.1f}")),
    Column("cache bytes over used", value("cache bytes over used", "{:.2f}")),
    *(Column(f"predicted share, {name}", value(f"predicted share, {name}", "{:.0%}")) for name in ("H100", "H200")),
)
MATCHING = (*SUMMARY, Column("objective", value("objective", "{:.4f}")))
KERNELS = (
    *SUMMARY,
    Column("GB/s", value("rate [GB/s]", "{:.1f}")),
    Column("Gflop/s", value("rate [Gflop/s]", "{:.1f}")),
)
ASSIGNMENT = (
    *SUMMARY,
    Column("lapjv over lapx", lapjv_beside_lapx),
    Column("relative error", value("relative error", "{:.1e}")),
)
GPU = (
    Column("ms", milliseconds),
    Column("by hand, ms", value("by hand [ms]", "{:.3f}")),
    Column("ratio to by hand", value("ratio to by hand", "{:.2f}")),
    Column("kernel alone, ms", value("kernel alone [ms]", "{:.3f}")),
    Column("one product over it", value("one product over it", "{:.0%}")),
    Column("share of the ceiling", value("share of the ceiling", "{:.0%}")),
    Column("seconds", seconds),
)


def of_models(rows: Rows) -> Iterator[Sheet]:
    """What was proved of each model, and of all in one line."""
    for sheet in by_method(MODELS)(rows):
        rows_here = [row for row in rows if row.scenario == sheet.title]
        proved = [row for row in rows_here if not row.failure]
        worst = max((row.values["error"] or 0.0 for row in proved), default=0.0)
        spent = sum(c.cpu or c.wall for row in proved for c in row.cost.values())
        memory = max((row.values.get("peak_memory [bytes]") or 0.0 for row in proved), default=0.0)
        line = f"{len(proved)} of {len(rows_here)} models proved, largest error {worst:.1e}, {spent:.0f} s in all, "
        yield Sheet(
            sheet.title,
            sheet.heading,
            sheet.lines,
            (f"{line}{memory / 2**30:.1f} GiB of memory at most", *sheet.notes),
        )


MODEL = (
    "Predicted, not measured: the share of the copy's bandwidth (permute, graft with one scale, combine of two) or of "
    "the matrix unit's rate (similarity) that the sm_90 code allows. Moves: the lesser of what can be issued (4 x 32 "
    "threads' instructions a clock and multiprocessor), what loads in flight fetch (600 ns latency) and what the "
    "second-level cache gives (5.5 TB/s), which reads whole sectors of gathered columns. Products: a "
    "step takes as long as its products, its instructions, or its bytes from the second-level cache (5.5 TB/s)."
)


def of_compiled(rows: Rows) -> Iterator[Sheet]:
    """Every variant's code, the model of the predictions, and what is beyond its goal."""
    for sheet in by_method(COMPILED)(rows):
        missed = [f"{row.method}: {text}" for row in rows for text in row.notes.get("beyond its goal", [])]
        goals = "Beyond its goal: " + "; ".join(missed) if missed else "All code is within its goals."
        yield Sheet(sheet.title, sheet.heading, sheet.lines, (MODEL, goals, *sheet.notes))


def total(name: str) -> Callable[[Group], str]:
    """A cell: the sum of a value over all trials."""
    return lambda group: f"{sum(group.values(name)):.0f}"


REGRESSIONS = (
    Column("trials", seeds),
    Column("found", total("found")),
    Column("false alarms", total("false alarms")),
    Column("comparisons", total("comparisons")),
    Column("change of what was planted, else the largest", value("change", "{:+.3f}")),
    Column("pairs of runs, a trial", value("pairs of turns", "{:.1f}")),
)


KERNEL_SCENARIOS = ("kernels", "kernels-more", "kernels-resnet18", "kernels-resnet18-new-pages")
ASSIGNMENT_SCENARIOS = (
    "assignment",
    *(f"assignment-{n}" for n in (128, 512, 1024)),
    "assignment-small",
    "assignment-many",
)
TABLES = (
    Table("kernels", "Kernels", KERNEL_SCENARIOS, by_method(KERNELS)),
    Table("assignment", "Assignment", ASSIGNMENT_SCENARIOS, by_method(ASSIGNMENT)),
    Table("matching", "Matching", ("matching-mlp", "matching-resnet18", "matching-fgmt"), by_method(MATCHING)),
    Table(
        "library",
        "Grids, the recorder, training",
        ("grids", "grids-residual", "recorder", "systems"),
        by_method(SUMMARY),
    ),
    Table("compiled", "The kernels, compiled ahead of time", ("compiled",), of_compiled),
    Table("gpu", "Kernels on a GPU", ("gpu",), by_method(GPU)),
    Table(
        "regressions",
        "Planted regressions, and none: what is told by turns",
        ("regressions",),
        by_method(REGRESSIONS),
    ),
    Table(
        "symmetry",
        "Symmetry of the models that people have",
        ("symmetry-models", "symmetry-torchvision"),
        of_models,
    ),
)
