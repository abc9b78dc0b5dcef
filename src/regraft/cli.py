"""The ``regraft`` command. Every verb is a typed function; what it needs is imported when it runs, not before."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

Text = Annotated[str | None, arg(metavar="STR")]
if TYPE_CHECKING:
    from regraft.symmetry import PermutationSpec

File = Annotated[Path | None, arg(metavar="PATH")]
Shape = Annotated[tuple[int, ...] | None, arg(metavar="INT ...")]


def symmetry(model: Positional[str], /, *, shape: Shape = None, save: File = None) -> int:
    """Print a model's permutation groups, and prove them by random permutations.

    Args:
        model: a classification model of torchvision, timm/NAME, hf/FOLDER (with a config.json of transformers), or
            module:factory, something importable without arguments.
        shape: of one input, batch first; the model's usual one if not given.
        save: a file for the proven groups, which `port`, `match` and `fuse` take as --spec.
    """
    spec = describe(model, shape)
    if save is not None:
        spec.save(save)
    return 0


@dataclass(frozen=True)
class Reading:
    """How checkpoints are read and written.

    Attributes:
        model: as `regraft symmetry` takes it.
        shape: of one input, batch first; the model's usual one if not given.
        spec: proven groups (`regraft symmetry MODEL --save FILE`), in place of the model where files are streamed.
        data: a folder {train,test or val}/CLASS/IMAGE, or module:function that gives batches.
        max_memory: such as 8GB; what the machine has if not given.
        device: where to compute, such as cpu or cuda.
        deterministic: only algorithms that give the same bits in every run.
        resume: go on from what an interrupted run has finished.
        json: print the result as JSON, for machines.
    """

    model: Text = None
    shape: Shape = None
    spec: File = None
    data: Text = None
    max_memory: Text = None
    device: str = "cpu"
    deterministic: bool = False
    resume: bool = False
    json: bool = False

    def asked(self) -> dict[str, Any]:
        """What the functions of `regraft.porting` take; and torch is told what it must not do."""

        if self.deterministic:
            from regraft.core.guard import make_deterministic

            make_deterministic()
        asked: dict[str, Any] = {
            "model": self.model,
            "inputs": self.shape,
            "spec": self.spec,
            "data": self.data,
        }
        return asked | {"max_memory": self.max_memory, "device": self.device}


READING = Reading()


def port(
    base: Positional[Path],
    tuned: Positional[Path],
    new_base: Positional[Path],
    /,
    *,
    out: Path = Path("ported"),
    method: str = "fgmt",
    steps: int = 30,
    dry_run: bool = False,
    reading: OmitArgPrefixes[Reading] = READING,
) -> int:
    """Bring a fine-tune onto a new base: BASE, what was fine-tuned from it, NEW_BASE -> a new checkpoint.

    Args:
        base: a checkpoint: safetensors (a file, an index, a folder), or a PyTorch file that holds tensors alone.
        tuned: the fine-tune of BASE.
        new_base: what it is to follow.
        out: a folder that is not there yet, for shards, index and README.md.
        method: weights, naive; or fgmt, gradfix, fgmt+gradfix, weights+gradfix, which need data and memory.
        steps: of the path of fgmt.
        dry_run: check everything, and print what would be done.
    """

    asked = reading.asked() | {"method": method, "steps": steps}
    files = (base, tuned, new_base)
    if dry_run:
        return _print_plan(files, out, asked, as_json=reading.json)
    return _port(files, out, asked, resume=reading.resume, as_json=reading.json)


def match(
    a: Positional[Path],
    b: Positional[Path],
    /,
    *,
    out: Path = Path("aligned"),
    reading: OmitArgPrefixes[Reading] = READING,
) -> int:
    """Write B with its units in the order of A's: the same function; with data, the loss barrier between the two.

    Args:
        a: a checkpoint, as `port` takes it.
        b: another of the same architecture.
        out: a folder that is not there yet, for shards, index and README.md.
    """

    return _match(a, b, out, reading.asked(), resume=reading.resume, as_json=reading.json)


def fuse(
    networks: Positional[tuple[Path, ...]],
    /,
    *,
    weights: tuple[float, ...],
    out: Path = Path("fused"),
    align: bool = False,
    reading: OmitArgPrefixes[Reading] = READING,
) -> int:
    """Write a weighted sum of networks; with --align each is first brought onto the first.

    Args:
        networks: checkpoints of one architecture, as `port` takes them.
        weights: one number a network.
        out: a folder that is not there yet, for shards, index and README.md.
        align: match the units of each network with the first's; needs a model, or a proven specification.
    """

    how = {"align": align, "resume": reading.resume, "as_json": reading.json}
    return _fuse(networks, weights, out, reading.asked(), **how)


def describe(name: str, shape: Sequence[int] | None = None) -> PermutationSpec:
    """What ``regraft symmetry NAME`` does: traces a model, prints its groups, and proves them.

    ``name`` and ``shape`` are those of :func:`regraft.porting.models.by_name`.
    Raises ValueError for a model that cannot be found, called, traced or proved.
    """
    from rich.console import Console

    from regraft.porting.models import by_name
    from regraft.symmetry import trace, verify
    from regraft.symmetry.spec import parameters_moved

    named = by_name(name, shape)
    console = Console()
    with console.status(f"tracing {name}"):
        spec = trace(named.model, named.inputs)
    console.print(spec.table())
    with console.status(f"proving {name}"):
        error = verify(spec, named.model, named.inputs)
    console.print(
        f"{name}: proved, relative error {error:.1e} in float64; "
        f"a random permutation moves {parameters_moved(spec, named.model):.1%} of the parameters"
    )
    return spec


def _print_plan(files: Sequence[Path], out: Path, asked: Mapping[str, Any], *, as_json: bool = False) -> int:
    """Check a port of (base, fine-tune, new base), and print what would be done."""
    from regraft import porting

    base, tuned, new_base = files
    made = porting.plan(base, tuned, new_base, out, **_in_bytes(asked))
    if as_json:
        print(json.dumps(made.told(), indent=1))
        return 0
    print("\n".join(made.lines()))
    if made.subject is not None:
        from rich.console import Console

        Console().print(made.subject.spec.table())
    return 0


def _port(
    files: Sequence[Path], out: Path, asked: Mapping[str, Any], *, resume: bool, as_json: bool = False
) -> int:
    """Port (base, fine-tune, new base), and print what came of it."""
    from regraft import porting

    base, tuned, new_base = files
    made = porting.port(base, tuned, new_base, out, resume=resume, **_in_bytes(asked))
    return _print_result(made, as_json)


def _match(
    a: Path, b: Path, out: Path, known: Mapping[str, Any], *, resume: bool, as_json: bool = False
) -> int:
    """Align one checkpoint to another, and print what came of it."""
    from regraft import porting

    return _print_result(porting.match_checkpoints(a, b, out, resume=resume, **_in_bytes(known)), as_json)


def _fuse(
    networks: Sequence[Path],
    weights: Sequence[float],
    out: Path,
    known: Mapping[str, Any],
    *,
    align: bool,
    resume: bool,
    as_json: bool = False,
) -> int:
    """Sum checkpoints, and print what came of it."""
    from regraft import porting

    asked = {"align": align, "resume": resume, **_in_bytes(known)}
    return _print_result(porting.fuse_checkpoints(networks, weights, out, **asked), as_json)


def _in_bytes(asked: Mapping[str, Any]) -> dict[str, Any]:
    from regraft.porting.checkpoint_files import parse_size

    limit = asked["max_memory"]
    return {**asked, "max_memory": None if limit is None else parse_size(limit)}


def _print_result(done: Any, as_json: bool) -> int:
    """done: what `regraft.porting` returns."""
    if as_json:
        print(json.dumps(done.told(), indent=1))
        return 0
    print("\n".join(done.plan.lines()))
    for name, value in done.found.items():
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        for part, one in parts:
            said = f"{one:.4g}" if isinstance(one, float) else one
            print(f"{name.replace('_', ' ')}{part and ', '}{part}: {said}")
    print(f"written: {done.out}")
    return 0


LIBRARY: dict[str, Callable[..., int]] = {
    "symmetry": symmetry,
    "port": port,
    "match": match,
    "fuse": fuse,
}


def verbs() -> dict[str, Callable[..., int]]:
    """Every verb: those that other distributions bring (the suite's bench, report, ...), then the library's own."""
    return {found.name: found.load() for found in entry_points(group="regraft.verbs")} | LIBRARY


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. What was asked for wrongly is one line on stderr and exit status 2; a missing or bad file 1.

    An interruption ends with status 130 and says how to go on. Errors of the program itself are not hidden.
    """
    from regraft import __version__
    from regraft.core.files import BadFile

    words = sys.argv[1:] if arguments is None else list(arguments)
    if words == ["--version"]:
        print(f"regraft {__version__}")
        return 0
    try:
        return tyro.extras.subcommand_cli_from_dict(
            verbs(),
            prog="regraft",
            description="Move learning from one neural network into another without training it again.",
            args=words,
        )
    except KeyboardInterrupt:
        print("regraft: interrupted; what is finished is kept, and --resume goes on from it", file=sys.stderr)
        return 130
    except BadFile as problem:
        print(f"regraft: {problem}", file=sys.stderr)
        return 1
    except ValueError as problem:
        print(f"regraft: {problem}", file=sys.stderr)
        return 2
    except OSError as problem:
        print(f"regraft: {problem}", file=sys.stderr)
        return 1
