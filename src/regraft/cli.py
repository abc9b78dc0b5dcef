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


VERBS: dict[str, Callable[..., int]] = {"bench": bench, "symmetry": symmetry}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; a mistake in what was asked for is one line on stderr and exit status 2."""
    verbs = dict(VERBS)
    try:
        return tyro.extras.subcommand_cli_from_dict(
            verbs,
            prog="regraft",
            description="Move learning from one neural network into another without training it again.",
            args=None if arguments is None else list(arguments),
        )
    except (ValueError, FileNotFoundError) as problem:
        print(f"regraft: {problem}", file=sys.stderr)
        return 2
