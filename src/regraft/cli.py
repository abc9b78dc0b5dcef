"""The ``regraft`` command. Every verb is a typed function, which imports what it needs when it runs, not before."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

if TYPE_CHECKING:
    from regraft.porting import FuseSettings, Job, PortSettings, Result, Settings
    from regraft.symmetry import PermutationSpec

Text = Annotated[str | None, arg(metavar="STR")]
File = Annotated[Path | None, arg(metavar="PATH")]
Numbers = Annotated[tuple[float, ...] | None, arg(metavar="FLOAT ...")]
InputShape = Annotated[tuple[int, ...] | None, arg(metavar="INT ...")]


def run_symmetry(
    model: Annotated[str, Positional, arg(metavar="MODEL")],
    /,
    *,
    shape: InputShape = None,
    save: File = None,
) -> int:
    """Print a model's permutation groups, and prove them with random permutations.

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
class CheckpointOptions:
    """How checkpoints are read and written.

    Attributes:
        model: as `regraft symmetry` takes it.
        shape: of one input, batch first; the model's usual one if not given.
        spec: proven groups (`regraft symmetry MODEL --save FILE`), instead of the model where files are streamed.
        data: a folder {train,test or val}/CLASS/IMAGE, or module:function that returns batches.
        key: which network of a file that holds several, such as ema.
        max_memory: such as 8GB; all that the machine has if not given.
        device: where to compute, such as cpu or cuda.
        deterministic: use only algorithms that give the same bits in every run.
        resume: continue from what an interrupted run has finished.
        json: print the result as JSON, for machines.
    """

    model: Text = None
    shape: InputShape = None
    spec: File = None
    data: Text = None
    key: Text = None
    max_memory: Text = None
    device: str = "cpu"
    deterministic: bool = False
    resume: bool = False
    json: bool = False

    def settings(self) -> Settings:
        """What the functions of `regraft.porting` take; makes torch deterministic if that is wanted."""
        from regraft.porting.sizes import parse_size

        if self.deterministic:
            from regraft.core.guard import make_deterministic

            make_deterministic()
        return {
            "model": self.model,
            "inputs": self.shape,
            "spec": self.spec,
            "data": self.data,
            "key": self.key,
            "max_memory": None if self.max_memory is None else parse_size(self.max_memory),
            "device": self.device,
        }


OPTIONS = CheckpointOptions()
IN_RECIPE = ("shape", "spec", "key")


def run_port(
    base: Annotated[Path, Positional, arg(metavar="BASE")],
    tuned: Annotated[Path, Positional, arg(metavar="TUNED")],
    new_base: Annotated[Path, Positional, arg(metavar="NEW_BASE")],
    /,
    *,
    out: Path = Path("ported"),
    method: Text = None,
    steps: Annotated[int | None, arg(metavar="INT")] = None,
    lr: Annotated[float | None, arg(metavar="FLOAT")] = None,
    labels: Literal["given", "none"] = "given",
    new_model: Text = None,
    dry_run: bool = False,
    checkpoint: OmitArgPrefixes[CheckpointOptions] = OPTIONS,
) -> int:
    """Move a fine-tune to a new base: add what changed from BASE to TUNED to NEW_BASE, and write a new checkpoint.

    Args:
        base: a checkpoint: safetensors (a file, an index or a folder), or a PyTorch file that holds only tensors.
        tuned: the fine-tune of BASE.
        new_base: the checkpoint to move it to.
        out: the folder to write (shards, index, README.md); it must not exist yet.
        method: naive or weights; with data head, functional, functional+distil, distil, theseus, which need no labels,
            auto, which measures which to take, fgmt, gmt, gradfix, fgmt+gradfix, weights+gradfix, few-shot. Without a
            choice fgmt where the data have labels, else auto.
        steps: number of steps along the path of fgmt and gmt (30), updates of what trains (100).
        lr: learning rate of what trains; chosen among three if not given.
        labels: none uses the fine-tune's predictions in place of the labels, as where the data have none.
        new_model: the model of NEW_BASE where it is another one, for head, distil, theseus and auto.
        dry_run: check everything, and print what would be done.
    """
    from regraft import porting

    settings: PortSettings = {
        **checkpoint.settings(),
        "method": method,
        "steps": steps,
        "lr": lr,
        "labels": labels,
        "new_model": new_model,
    }
    if dry_run:
        return _print_plan(porting.plan(base, tuned, new_base, out, **settings), checkpoint.json)
    result = porting.port(base, tuned, new_base, out, resume=checkpoint.resume, **settings)
    return _print_result(result, checkpoint.json)


def run_match(
    a: Annotated[Path, Positional, arg(metavar="A")],
    b: Annotated[Path, Positional, arg(metavar="B")],
    /,
    *,
    out: Path = Path("aligned"),
    activations: bool = False,
    checkpoint: OmitArgPrefixes[CheckpointOptions] = OPTIONS,
) -> int:
    """Write B with its units in the order of A's: the same function. With data, measure the loss barrier between both.

    Args:
        a: a checkpoint, as `port` takes it.
        b: another of the same architecture.
        out: the folder to write (shards, index, README.md); it must not exist yet.
        activations: match units by what they compute on the data, not by weights; needs --model, --data and memory.
    """
    from regraft import porting

    how = {"activations": activations, "resume": checkpoint.resume}
    result = porting.match_checkpoints(a, b, out, **how, **checkpoint.settings())
    return _print_result(result, checkpoint.json)


@dataclass(frozen=True)
class MergeOptions:
    """How networks are merged.

    Attributes:
        method: sum, mean, slerp, ties, dare; or fisher, greedy-soup, which need data and memory.
        weights: one number for each network: factors (sum, ties, dare) or shares (slerp, fisher).
        base: what all networks were trained from, for ties and dare.
        density: the share of a change that is kept: 0.2 (ties) or 0.1 (dare) if not given.
        seed: of what dare and fisher draw.
        align: match the units of each network with the base's or the first's; needs a model, or proven groups.
    """

    method: str = "sum"
    weights: Numbers = None
    base: File = None
    density: Annotated[float | None, arg(metavar="FLOAT")] = None
    seed: int = 0
    align: bool = False


MERGE = MergeOptions()


def run_fuse(
    networks: Annotated[tuple[Path, ...], Positional, arg(metavar="PATH ...")] = (),
    /,
    *,
    recipe: File = None,
    out: Path = Path("fused"),
    merge: OmitArgPrefixes[MergeOptions] = MERGE,
    checkpoint: OmitArgPrefixes[CheckpointOptions] = OPTIONS,
) -> int:
    """Write networks merged into one: a weighted sum, TIES, DARE, SLERP, Fisher, a greedy soup; aligned with --align.

    Args:
        networks: checkpoints of one architecture, as `port` takes them.
        recipe: a file recipe.yaml beside a result: what it says is done again, from the folder where it was done.
        out: the folder to write (shards, index, README.md, recipe.yaml); it must not exist yet.
    """
    from regraft import porting

    settings: FuseSettings = {
        **checkpoint.settings(),
        "method": merge.method,
        "base": merge.base,
        "density": merge.density,
        "seed": merge.seed,
    }
    paths, align = list(networks), merge.align
    weights: Sequence[float] | None = merge.weights
    if recipe is not None:
        if networks or merge != MERGE or any(getattr(checkpoint, name) is not None for name in IN_RECIPE):
            raise ValueError("--recipe says what is merged: leave out networks, --method, --weights, --shape ...")
        made = porting.MergeRecipe.read(recipe)
        settings |= made.settings(checkpoint.model, checkpoint.data)
        paths, weights, align = list(map(Path, made.networks)), made.weights, made.align
    result = porting.fuse_checkpoints(paths, weights, out, align=align, resume=checkpoint.resume, **settings)
    return _print_result(result, checkpoint.json)


def describe(name: str, shape: Sequence[int] | None = None) -> PermutationSpec:
    """What ``regraft symmetry NAME`` does: traces a model, prints its groups, and proves them.

    ``name`` and ``shape`` are those of :func:`regraft.porting.models.by_name`.
    Raises ValueError for a model that cannot be found, called, traced or proved.
    """
    from rich.console import Console
    from rich.text import Text

    from regraft.core.text import clean_text
    from regraft.porting.models import by_name
    from regraft.symmetry import trace, verify
    from regraft.symmetry.spec import parameters_moved

    named, name = by_name(name, shape), clean_text(name)
    console = Console(markup=False)
    with console.status(Text(f"tracing {name}")):
        spec = trace(named.model, named.inputs, verify=False)
    try:
        with console.status(Text(f"proving {name}")):
            error = verify(spec, named.model, named.inputs)
    finally:
        console.print(spec.table())
    console.print(
        f"{name}: proved, relative error {error:.1e} in float64; "
        f"a random permutation moves {parameters_moved(spec, named.model):.1%} of the parameters"
    )
    return spec


def _print_plan(job: Job, as_json: bool) -> int:
    if as_json:
        print(json.dumps(job.to_json(), indent=1))
        return 0
    from rich.console import Console

    from regraft.core.text import clean_text

    print("\n".join(map(clean_text, job.lines())))
    Console(markup=False).print(job.spec.table())
    return 0


def _print_result(result: Result, as_json: bool) -> int:
    if as_json:
        print(json.dumps(result.to_json(), indent=1))
        return 0
    from regraft.core.text import clean_text

    print("\n".join(map(clean_text, result.plan.lines())))
    for name, value in result.measured.items():
        for part, number in value.items() if isinstance(value, Mapping) else [("", value)]:
            print(f"{name.replace('_', ' ')}{part and ', '}{part}: {_show(number)}")
    files = list(result.out.glob("*.safetensors"))
    print(clean_text(f"written: {files[0] if len(files) == 1 else result.out}"))
    return 0


def _show(value: object) -> str:
    """A measured value, or several by name, on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_show(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


LIBRARY: dict[str, Callable[..., int]] = {
    "symmetry": run_symmetry,
    "port": run_port,
    "match": run_match,
    "fuse": run_fuse,
}


GREETING = """\
regraft moves what one neural network has learned into another without training it again.

  regraft port BASE TUNED NEW_BASE --model resnet18   a fine-tune follows a new base
  regraft match A B --model resnet18                  B with its units in the order of A's
  regraft fuse A B --weights 0.5 0.5                  one network of several
  regraft symmetry resnet18                           which units may trade places, and the proof
  regraft bench                                       what every method is worth (regraft list: all)

regraft VERB --help tells the options of one, regraft --help lists every verb.\
"""


def verbs() -> dict[str, Callable[..., int]]:
    """Every verb: those that other distributions bring (the suite's bench, report, ...), then the library's own."""
    return {entry.name: entry.load() for entry in entry_points(group="regraft.verbs")} | LIBRARY


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status.

    An error of the user is one line on stderr: status 2 for bad arguments, 1 for a missing or bad file. An interruption
    ends with status 130 and says how to continue. Errors of the program itself are not hidden.
    """
    from regraft import __version__
    from regraft.core.files import BadFile
    from regraft.core.text import describe_error

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may know ASCII alone
    argv = sys.argv[1:] if arguments is None else list(arguments)
    if argv in ([], ["--version"]):
        print(f"regraft {__version__}" if argv else GREETING)
        return 0
    try:
        status: int = tyro.extras.subcommand_cli_from_dict(
            verbs(),
            prog="regraft",
            description="Move learning from one neural network into another without training it again.",
            args=argv,
        )
        return status
    except KeyboardInterrupt:
        print("regraft: interrupted; finished work is kept, continue with --resume", file=sys.stderr)
        return 130
    except (ValueError, OSError) as problem:
        print(f"regraft: {describe_error(problem)}", file=sys.stderr)
        return 1 if isinstance(problem, BadFile | OSError) else 2
