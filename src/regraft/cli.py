"""The ``regraft`` command. Every verb is a typed function; what it needs is imported when it runs, not before."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, UseAppendAction, arg


def bench(
    pytest: Annotated[Positional[tuple[str, ...]], arg(metavar="-- ...")] = (),
    /,
    *,
    scenario: UseAppendAction[tuple[str, ...]] = (),
    device: str | None = None,
    seeds: int | None = None,
    data: Path | None = None,
    results: Path | None = None,
    cache: Path | None = None,
    resume: bool = False,
) -> int:
    """Measure every method beside plain training: ``pytest bench --benchmark-only`` with these options.

    Args:
        pytest: after ``--``: anything else for pytest, such as ``-k fgmt``.
        scenario: a scenario of bench/scenarios.py; may be given several times.
        device: where to compute, such as cpu or cuda.
        seeds: how many seeds, instead of the scenario's own number.
        data: folder of the data sets.
        results: folder for rows, tables and the page.
        cache: folder in which trainings that were interrupted go on.
        resume: keep rows of the same configuration and code, and measure only what is missing.
    """
    import pytest as runner

    folder = bench_folder()
    options = {"--device": device, "--seeds": seeds, "--data": data, "--results": results, "--cache": cache}
    return int(
        runner.main(
            [
                str(folder),
                "--benchmark-only",
                *(word for name in scenario for word in ("--scenario", name)),
                *(word for key, value in options.items() if value is not None for word in (key, str(value))),
                *(["--resume"] if resume else []),
                *pytest,
            ]
        )
    )


def bench_folder() -> Path:
    """The benches: of the checkout one stands in, or of the one that regraft was installed from, editable.

    Raises FileNotFoundError where there is neither: the benches are no part of the installed package.
    """
    places = [Path.cwd() / "bench", Path(__file__).parents[2] / "bench"]
    for place in places:
        if (place / "bench_transfer.py").is_file():
            return place
    raise FileNotFoundError(
        f"no benches in {' or '.join(map(str, places))}: run `regraft bench` in a checkout of the repository"
    )


def symmetry(model: Positional[str], /, *, shape: tuple[int, ...] | None = None) -> int:
    """Print a model's permutation groups, and prove them by random permutations.

    Args:
        model: a classification model of torchvision, or module:factory, something importable without arguments.
        shape: of one input, batch first; torchvision's usual one if not given.
    """
    from regraft.symmetry import describe

    describe(model, shape)
    return 0


def reproduce_fusion(
    *,
    table: UseAppendAction[tuple[str, ...]] = (),
    paper: bool = False,
    device: str = "cpu",
    data: Path | None = None,
    results: Path = Path("results/local/fusion"),
    cache: Path = Path(".cache/fusion"),
) -> int:
    """Run the tables of the gradient-assignment and fusion paper; print ours beside the paper's, and write them.

    Args:
        table: 1 to 6, A1 to A19 (the appendix), or a figure, F1 to F4; may be given several times. All by default.
        paper: full width, all images, as many epochs as the paper; wants a GPU.
        device: where to compute, such as cpu or cuda.
        data: folder of the data sets.
        results: folder for tables and figures.
        cache: folder of trained networks.
    """
    from regraft.fusion_pages import reproduce
    from regraft.fusion_study import Study, paper_study

    study = paper_study(data, cache, device) if paper else Study(data, cache, device=device)
    reproduce(study, table, results)
    return 0


def reproduce_fast(
    *,
    figure: UseAppendAction[tuple[str, ...]] = (),
    paper: bool = False,
    device: str = "cpu",
    data: Path | None = None,
    results: Path = Path("results/local/finetune"),
    cache: Path = Path(".cache/finetune"),
    seeds: int | None = None,
) -> int:
    """Run the experiments of the FAST paper that have no row yet; draw its figures and write its tables.

    Args:
        figure: 3 to 15, "table" or "main" (the comparison of methods); may be given several times. All by default.
        paper: the paper's models, data and batches; wants a GPU, ImageNet weights and the data.
        device: where to compute, such as cpu or cuda.
        data: folder of the data sets.
        results: folder for rows, figures and tables.
        cache: folder of source networks.
        seeds: how many seeds, instead of the scenario's own number.
    """
    from regraft.finetune_figures import reproduce

    return reproduce(
        figure, paper=paper, device=device, data=data, results_folder=results, cache=cache, seeds=seeds
    )


def reproduce(study: Positional[str], /) -> int:
    """Run a paper's tables and figures again, ours beside the paper's: ``reproduce fusion``, ``reproduce fast``.

    Args:
        study: fusion or fast; each has its own --help.
    """
    raise ValueError(f"there is no study {study!r} to reproduce: choose from {', '.join(STUDIES)}")


VERBS: dict[str, Callable[..., int]] = {"bench": bench, "symmetry": symmetry, "reproduce": reproduce}
STUDIES: dict[str, Callable[..., int]] = {"fusion": reproduce_fusion, "fast": reproduce_fast}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; a mistake in what was asked for is one line on stderr and exit status 2."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    prog, verbs = "regraft", VERBS
    if words[:1] == ["reproduce"] and words[1:2] and words[1] in STUDIES:
        prog, verbs, words = "regraft reproduce", STUDIES, words[1:]
    try:
        return tyro.extras.subcommand_cli_from_dict(
            dict(verbs),
            prog=prog,
            description="Move learning from one neural network into another without training it again.",
            args=words,
        )
    except (ValueError, FileNotFoundError) as problem:
        print(f"regraft: {problem}", file=sys.stderr)
        return 2
