"""The FAST paper's figures and its table 1, drawn from result rows; what has no row yet is run first.

regraft reproduce fast                             # figures 3 to 15 and table 1, in the version for two cores
regraft reproduce fast --figure 3 --figure table   # some of them
regraft reproduce fast --figure main               # FAST beside every baseline, on four pairs of tasks
regraft reproduce fast --paper                     # at the paper's models and data
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from regraft import results
from regraft.finetune_runs import Scenario, measure
from regraft.finetune_scenarios import PAPER, TWO_CORES

Record = Mapping[str, Any]  # a row as plain data
Curve = tuple[Sequence[int], Sequence[float | None]]

EQUAL = ("fan-in", "fan-out", "xavier", "N(0, 0.01²)", "class means", "zero, equal rates")


# ---------------------------------------------------------------------------------------------------
# Rows


def newest(rows: Iterable[Record]) -> list[Record]:
    """The last row of every scenario, method and seed, of the settings that were run last."""
    rows = list(rows)
    last = {(row["scenario"], row["method"]): _setting(row) for row in rows}
    kept = {
        (row["scenario"], row["method"], row["seed"]): row
        for row in rows
        if _setting(row) == last[row["scenario"], row["method"]]
    }
    return list(kept.values())


def _setting(row: Record) -> str:
    return results.digest([row["config"], row["extra"]["own_config"]])


def by_method(rows: Iterable[Record], scenario: str) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for row in rows:
        if row["scenario"] == scenario:
            found.setdefault(row["method"], []).append(row)
    return found


# ---------------------------------------------------------------------------------------------------
# Curves


def deployed(row: Record) -> Curve:
    return _after_start(row["extra"]["deployed"], "top1")


def deployed_source(row: Record) -> Curve:
    return _after_start(row["extra"]["deployed"], "source")


def validated(row: Record) -> Curve:
    return _after_start(row["extra"]["validated"], "top1")


def head_norm(row: Record) -> Curve:
    return _after_start(row["extra"]["validated"], "head_norm")


def _after_start(table: Mapping[str, Any], name: str) -> Curve:
    """Without step 0, which a logarithmic axis has no place for."""
    return table["step"][1:], table[name][1:]


def band(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % confidence interval by Student's t; 0 for a single value)."""
    from scipy import stats

    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, 0.0
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)


@dataclass(frozen=True)
class Panel:
    """One plot of a figure: what of which rows. methods: those whose name begins so."""

    title: str
    scenario: str
    curve: Callable[[Record], Curve]
    axis: str
    methods: tuple[str, ...] = ("",)
    seeds: int | None = None
    logarithmic: bool = False


@dataclass(frozen=True)
class Figure:
    number: str
    title: str
    panels: tuple[Panel, ...]


def _target(scenario: str, title: str, *methods: str, **changes: Any) -> Panel:
    return Panel(title, scenario, deployed, "target ADP accuracy", methods or ("",), **changes)


def _forgetting(scenario: str) -> tuple[Panel, ...]:
    return (
        _target(scenario, "target task"),
        Panel("source task", scenario, deployed_source, "source ADP accuracy"),
    )


_NORM = "||W||_F"
FIGURES = {
    figure.number: figure
    for figure in (
        Figure("3", "Initial classifier and forgetting: the source task again", _forgetting("initial-same")),
        Figure(
            "4",
            "||W||_F in the runs of figure 3",
            (Panel("", "initial-same", head_norm, _NORM, logarithmic=True),),
        ),
        Figure("5", "Initial classifier and forgetting: an unrelated target task", _forgetting("initial-other")),
        Figure("6", "A random classifier that stays as it is", (_target("frozen-head", ""),)),
        Figure(
            "7",
            "Classifier warm-up (one seed)",
            (
                Panel("validation", "warm-up", validated, "validation accuracy", seeds=1),
                _target("warm-up", "deployed", seeds=1),
            ),
        ),
        *(
            Figure(
                number,
                f"Rates scaled together and apart: {network}",
                (
                    _target(scenario, "together", "c, c", "c/10, c/10", "10c, 10c"),
                    _target(scenario, "apart", "c, c", "c, c/10", "10c, c", "c, 10c"),
                    Panel("together", scenario, head_norm, _NORM, ("c, c", "c/10, c/10", "10c, 10c"), None, True),
                    Panel("apart", scenario, head_norm, _NORM, ("c, c", "c, c/10", "10c, c", "c, 10c"), None, True),
                ),
            )
            for number, network, scenario in (
                ("8", "residual network", "rates-resnet"),
                ("9", "VGG", "rates-vgg"),
            )
        ),
        *(
            Figure(
                number,
                title,
                tuple(
                    _target(f"optimisers-{network}", network, *methods) for network in ("densenet", "vgg")
                ),
            )
            for number, title, methods in (
                ("10", "FAST and fan-in baselines under SGD with momentum", ("sgd: ",)),
                ("11", "FAST and fan-in baselines under Adam", ("adam: ",)),
                ("12", "FAST and fan-in baselines under RAdam", ("radam: ",)),
                ("13", "FAST under every optimiser", ("sgd: fast", "nesterov: fast", "adam: fast", "radam: fast")),
            )
        ),
        Figure("14", "Convergence: the first data set", (_target("convergence-first", ""),)),
        Figure("15", "Convergence: the second data set", (_target("convergence-second", ""),)),
    )
}  # fmt: skip
# Other data sets in the two sizes.
CONVERGENCE = {
    False: {"convergence-first": "convergence-mnist", "convergence-second": "convergence-digits"},
    True: {
        "convergence-first": "convergence-cifar100-paper",
        "convergence-second": "convergence-caltech-paper",
    },
}
MAIN = ("digits", "fashion-mnist", "cifar10-cifar100", "cifar10-cifar100-other")


def scenario_name(panel: Panel, paper: bool) -> str:
    return CONVERGENCE[paper].get(panel.scenario) or panel.scenario + ("-paper" if paper else "")


def draw(figure: Figure, rows: Sequence[Record], paper: bool = False):  # -> plotly.graph_objects.Figure
    """Mean over seeds and its 95 % band, one line a method, steps on a logarithmic axis."""
    from plotly.colors import qualitative
    from plotly.subplots import make_subplots

    count = len(figure.panels)
    columns = 1 if count == 1 else 2
    lines = math.ceil(count / columns)
    page = make_subplots(rows=lines, cols=columns, subplot_titles=[panel.title for panel in figure.panels])
    colours: dict[str, str] = {}
    for index, panel in enumerate(figure.panels):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        for method, own in by_method(rows, scenario_name(panel, paper)).items():
            if not any(_named(method, name) for name in panel.methods):
                continue
            own = sorted(own, key=lambda row: row["seed"])[: panel.seeds]
            first = method not in colours
            colour = colours.setdefault(method, qualitative.D3[len(colours) % 10])
            at, mean, low, high = _band_of([panel.curve(row) for row in own])
            if len(own) > 1:
                page.add_scatter(
                    x=[*at, *at[::-1]], y=[*high, *low[::-1]], fill="toself", fillcolor=colour, opacity=0.15,
                    line={"width": 0}, hoverinfo="skip", showlegend=False, legendgroup=method, **place,
                )  # fmt: skip
            page.add_scatter(
                x=at, y=mean, name=method, legendgroup=method, showlegend=first, mode="lines",
                line={"color": colour}, **place,
            )  # fmt: skip
        page.update_xaxes(type="log", title_text="step", **place)
        page.update_yaxes(type="log" if panel.logarithmic else "linear", title_text=panel.axis, **place)
    page.update_layout(
        title=f"Figure {figure.number}. {figure.title}", template="plotly_white", height=120 + 340 * lines
    )
    return page


def _named(method: str, wanted: str) -> bool:
    """A name in full, or, where it ends in a space or is empty, its beginning."""
    return method.startswith(wanted) if not wanted or wanted.endswith(" ") else method == wanted


def _band_of(curves: Sequence[Curve]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps, mean, and the band's two sides; at steps that all curves have, values that are finite."""
    tables = [dict(zip(*curve, strict=True)) for curve in curves]
    at, mean, low, high = [], [], [], []
    for step in tables[0]:
        values = [table.get(step) for table in tables]
        if all(value is not None for value in values):
            middle, half = band(values)
            at.append(step)
            mean.append(float(f"{middle:.4g}"))
            low.append(float(f"{middle - half:.4g}"))
            high.append(float(f"{middle + half:.4g}"))
    return at, mean, low, high


# ---------------------------------------------------------------------------------------------------
# Tables


def p_value(
    rows: Sequence[Record], others: Sequence[Record], value: Callable[[Record], float]
) -> tuple[int, float, float]:
    """(pairs, mean difference, p of the two-sided paired t-test over seeds; NaN where none is possible)."""
    from scipy import stats

    first = {row["seed"]: value(row) for row in rows}
    second = {row["seed"]: value(row) for row in others}
    seeds = sorted(first.keys() & second.keys())
    differences = [first[seed] - second[seed] for seed in seeds]
    if not seeds:
        return 0, math.nan, math.nan
    spread = max(differences) - min(differences)
    testable = len(seeds) > 1 and spread > 1e-12
    p = float(stats.ttest_1samp(differences, 0.0).pvalue) if testable else math.nan
    return len(seeds), sum(differences) / len(seeds), p


def area(row: Record) -> float:
    return row["extra"]["area"]


def distance(row: Record) -> float:
    return row["extra"]["distance"]


def _pm(values: Iterable[float | None], form: str = "{:.3f}") -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean, half = band(known)
    return form.format(mean) + (f" ± {form.format(half)}" if len(known) > 1 else "")


def _reached(rows: Sequence[Record], goal: float) -> str:
    """Mean first checkpoint at which the deployed accuracy is at least the goal."""
    steps = []
    for row in rows:
        table = row["extra"]["deployed"]
        steps.append(next((s for s, a in zip(table["step"], table["top1"], strict=True) if a >= goal), None))
    known = [step for step in steps if step is not None]
    if not known:
        return "never"
    mean = f"{sum(known) / len(known):.0f}"
    return mean if len(known) == len(steps) else f"{mean} ({len(known)} of {len(steps)})"


def _seconds(rows: Sequence[Record], step: str) -> float:
    return sum(row["phases"][step]["cpu"] for row in rows) / len(rows)


def comparison(rows: Sequence[Record], scenario: str) -> list[str]:
    """Markdown: every method of a scenario, and FAST against each."""
    methods = by_method(rows, scenario)
    if not methods:
        return []
    finals = {name: band([row["accuracy"] for row in own])[0] for name, own in methods.items()}
    goal = 0.95 * max(finals.values())
    start = max(own[0]["extra"]["source_start"] for own in methods.values())
    lines = [
        f"## {scenario}",
        "",
        f"Means over seeds, ± half the 95 % interval. The source network's accuracy on its own task was {start:.3f}. "
        f"Steps: to a deployed accuracy of {goal:.3f}, 95 % of the best at the end.",
        "",
        "| method | rates (head, body) | seeds | area | accuracy at the end | steps | source area | source at the end "
        "| distance | CPU seconds |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    order = sorted(methods, key=lambda name: -band([area(row) for row in methods[name]])[0])
    for name in order:
        own = methods[name]
        rates = ", ".join(
            "–" if rate is None else f"{rate:g}" for rate in own[0]["extra"]["own_config"]["rates"]
        )
        cells = [
            name + (" (diverged)" if any(row["extra"]["diverged"] for row in own) else ""),
            rates,
            str(len(own)),
            _pm(map(area, own)),
            _pm(row["accuracy"] for row in own),
            _reached(own, goal),
            _pm(row["extra"]["source_area"] for row in own),
            _pm(row["extra"]["source_end"] for row in own),
            _pm((row["extra"]["distance"] for row in own), "{:.2f}"),
            f"{_seconds(own, 'train') + _seconds(own, 'prepare'):.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    if "fast" in methods:
        for name in order:
            if name == "fast":
                continue
            n, more, p = p_value(methods["fast"], methods[name], area)
            _, further, q = p_value(methods["fast"], methods[name], distance)
            lines.append(
                f"- fast − {name}: area {more:+.3f} (n = {n}, p = {p:.2g}), distance {further:+.2f} (p = {q:.2g})"
            )
    return [*lines, "", *provenance(rows, scenario), ""]


def provenance(rows: Sequence[Record], scenario: str) -> list[str]:
    """How the rows of a scenario came to be."""
    own = [row for row in rows if row["scenario"] == scenario]
    if not own:
        return []
    last = own[-1]["environment"]
    commits = sorted({f"{row['environment']['commit'] or 'no commit'}"[:10] for row in own})
    dirty = " with changes not committed" if any(row["environment"]["dirty"] for row in own) else ""
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    return [
        f"- {last['machine']}, {last['threads']} thread(s), {last['device']}; {versions}",
        f"- commits {', '.join(commits)}{dirty}; `{last['command']}`",
    ]


def paper_table() -> Mapping[str, Any]:
    """Table 1 as published: data set -> method -> (value, ±) of each column."""
    return json.loads((files("regraft") / "paper" / "finetune" / "table_1.json").read_text(encoding="utf-8"))


def table_1(rows: Sequence[Record], paper: bool = False) -> list[str]:
    """Markdown: table 1, ours beside the paper's."""
    published = paper_table()
    ours = tuple(CONVERGENCE[paper].values())
    lines = [
        "## Table 1",
        "",
        f"The paper's: {published['network']}. Ours: "
        + (
            "the same."
            if paper
            else "a small ResNeXt pre-trained on Fashion-MNIST; MNIST for CIFAR-100, scikit-learn's digits for "
            "Caltech-256; 14x14 pixels, 987 steps."
        ),
        "",
        "| data set | method | top-1 error, % | the paper's | top-5 error, % | the paper's | distance | the paper's |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (name, theirs), scenario in zip(published["rows"].items(), ours, strict=True):
        methods = by_method(rows, scenario)
        for method, values in theirs.items():
            own = methods.get(method, [])
            measured = (
                _pm((100 * (1 - row["accuracy"]) for row in own), "{:.2f}"),
                _pm((100 * (1 - row["extra"]["top5"]) for row in own), "{:.2f}"),
                _pm((row["extra"]["distance"] for row in own), "{:.2f}"),
            )
            pairs = (
                cell for m, (v, s) in zip(measured, values, strict=True) for cell in (m, f"{v:g} ± {s:g}")
            )
            lines.append(f"| {name} | {method} | " + " | ".join(pairs) + " |")
    return [*lines, "", *(line for scenario in ours for line in provenance(rows, scenario)), ""]


# ---------------------------------------------------------------------------------------------------
# The command


def reproduce(
    figure: Sequence[str] = (),
    *,
    paper: bool = False,
    device: str = "cpu",
    data: Path | None = None,
    results_folder: Path = Path("results/finetune"),
    cache: Path = Path(".cache/finetune"),
    seeds: int | None = None,
    tell: Callable[[str], None] = print,
) -> int:
    """Run what has no row yet, draw figures, write tables. See the head of this module.

    Args:
        figure: "3" to "15", "table" or "main"; all of them if none is named.
        paper: at the paper's models, data and batches (wants a GPU, ImageNet weights and the data).
        device: where to compute.
        data: folder of the data sets.
        results_folder: for rows (rows.jsonl), figures (figure_3.html, ...) and tables (README.md, table_1.md).
        cache: folder of source networks, and of what was learned of rates.
        seeds: how many, instead of the scenario's own number.

    Raises ValueError for a figure that there is not, FileNotFoundError for data that are not there.
    """
    wanted = tuple(figure) or (*FIGURES, "table", *(() if paper else ("main",)))
    unknown = set(wanted) - {*FIGURES, "table", "main"}
    if unknown:
        raise ValueError(
            f"no figure {', '.join(sorted(unknown))}: there are {', '.join(FIGURES)}, table and main"
        )
    rows_file = results_folder / "rows.jsonl"
    command = " ".join(
        ["regraft reproduce fast", *(["--figure", *figure] if figure else []), *["--paper"] * paper]
    )
    environment = replace(results.environment(device), command=command)
    for scenario in scenarios(wanted, paper):
        measure(scenario, rows_file, cache=cache, environment=environment, root=data, seeds=seeds, tell=tell)
    for path in write(results_folder, wanted, paper):
        tell(str(path))
    return 0


def scenarios(wanted: Sequence[str], paper: bool) -> Iterator[Scenario]:
    """Those that the figures need, in their order."""
    names = set(MAIN) if "main" in wanted else set()
    names |= {
        scenario_name(panel, paper)
        for number in wanted
        if number in FIGURES
        for panel in FIGURES[number].panels
    }
    if "table" in wanted:
        names |= set(CONVERGENCE[paper].values())
    return (scenario for scenario in (*TWO_CORES, *PAPER) if scenario.name in names)


def write(folder: Path, wanted: Sequence[str], paper: bool = False) -> list[Path]:
    """Draw and write what is wanted from the rows in ``folder``; returns the files."""
    rows = newest(results.records(folder / "rows.jsonl"))
    suffix = "_paper" if paper else ""
    made = []
    for number in wanted:
        if number not in FIGURES:
            continue
        page = draw(FIGURES[number], rows, paper)
        made.append(folder / f"figure_{number}{suffix}.html")
        results.write(made[-1], page.to_html(include_plotlyjs="cdn") + "\n")
    if "table" in wanted:
        made.append(folder / f"table_1{suffix}.md")
        results.write(made[-1], "\n".join(table_1(rows, paper)))
    if "main" in wanted:
        made.append(folder / "main.md")
        lines = [
            "# FAST beside its baselines",
            "",
            *(line for name in MAIN for line in comparison(rows, name)),
        ]
        results.write(made[-1], "\n".join(lines))
    return made
