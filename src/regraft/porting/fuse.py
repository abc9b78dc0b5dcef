"""Networks of one architecture summed or merged into one checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from regraft.core.arguments import Finite, check_arguments
from regraft.core.clock import EVALUATION, Clock
from regraft.fusion.merging import MERGE_METHODS, MergeProblem, check_merge
from regraft.porting.alignment import align as align_network
from regraft.porting.alignment import measure_accuracies, open_alike, permute_lazily
from regraft.porting.checkpoint_files import Lazy
from regraft.porting.job import Job
from regraft.porting.methods import PortWork, Weights, with_statistics
from regraft.porting.output_folder import keep_tensors
from regraft.porting.recipe import RECIPE, FuseSettings, MergeRecipe
from regraft.porting.result import Made, Result, run_job
from regraft.porting.spectral import with_singular_vectors

BASE = "base"


@check_arguments
def fuse_checkpoints(
    networks: Sequence[Path | str],
    weights: Sequence[Finite] | None,
    out: Path | str,
    *,
    align: bool = False,
    resume: bool = False,
    **settings: Unpack[FuseSettings],
) -> Result:
    """Write networks merged into one: ``sum_i weights[i] networks[i]``, or by another method, tensor by tensor.

    Integers and dtypes are the first's. With ``align`` each network is first brought onto the base, or onto the first
    where there is none. A model (or a proven specification) is needed to align, a model for methods that run networks
    and to measure accuracies. With data, BatchNorm statistics are estimated anew. Where all that was given has a name,
    `RECIPE` in the result does it again (`regraft fuse --recipe`).

    Settings: see `FuseSettings`; errors are those of `regraft.port`, and of `regraft.fusion.merging.check_merge`.
    """
    method, base = settings.get("method", "sum"), settings.get("base")
    given = {name for name in ("base", "density") if settings.get(name) is not None}
    given |= {"weights"} if weights is not None else set()
    given |= {"data"} if settings.get("model") is not None and settings.get("data") is not None else set()
    check_merge(method, len(networks), weights, given)
    if weights is not None and not sum(map(abs, weights)) < torch.finfo(torch.float32).max:
        raise ValueError(f"weights must be finite, and their sum in float32 too, not {list(weights)}")
    clock = Clock()
    roles = [(f"network {number}", path) for number, path in enumerate(networks)]
    with clock.phase("checks"):
        config = {
            "weights": None if weights is None else [float(w) for w in weights],
            "align": align,
            "density": settings.get("density"),
            "seed": settings.get("seed", 0),
        }
        title = "fuse" if method == "sum" else f"fuse by {method}"
        paths = roles if base is None else [(BASE, base), *roles]
        job = open_alike(title, paths, roles[0][0], out, settings, config, resume=resume)
        if weights is not None and (largest := max(map(abs, weights))) > torch.finfo(job.dtype).max:
            raise ValueError(f"weight {largest:g} is beyond {job.dtype}, in which the networks are summed")
    recipe = MergeRecipe.of(networks, weights, align, settings)
    return run_job(job, out, partial(_fuse, job, method, recipe), clock, resume=resume)


def _fuse(job: Job, method: str, recipe: MergeRecipe | None, part: Path, clock: Clock) -> Made:
    networks: dict[str, Weights] = dict(job.networks(job.model_spec.device if job.model_spec else "cpu"))
    perms = []
    for role in list(networks)[1:] if job.config["align"] else ():
        perms.append(align_network(job.spec, networks, role, part, clock))
        networks[role] = permute_lazily(job.spec, perms[-1], networks[role])
    base, model = networks.pop(BASE, None), _find_model(job)
    problem = MergeProblem(
        list(networks.values()), job.config["weights"], base, job.config["density"], job.config["seed"], model,
        *([job.data.train, job.data.validation] if job.data is not None else []),
    )  # fmt: skip
    with clock.phase("merging"):
        merged = MERGE_METHODS[method].prepare(problem)
    total: Weights = with_singular_vectors(Lazy(tuple(problem.networks[0]), merged.read))
    if job.data is not None:
        total = with_statistics(total, PortWork(model, job.data.train, keep=partial(keep_tensors, part), clock=clock))
    measured: dict[str, Any] = {key: job.config[key] for key in ("weights", "align")} | dict(merged.found)
    if job.data is not None:
        with clock.phase(EVALUATION):
            measured |= measure_accuracies(job, {**networks, "sum" if method == "sum" else method: total})
    return Made(total, tuple(perms), measured, {} if recipe is None else {RECIPE: recipe.to_yaml()})


def _find_model(job: Job) -> nn.Module | None:
    if job.data is None or job.model_spec is None:
        return None
    return job.model_spec.require_model().model
