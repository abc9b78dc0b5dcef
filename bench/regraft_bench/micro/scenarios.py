"""What is measured: an entry is a scenario. Every timed one is a list of contests."""

from __future__ import annotations

from regraft_bench.contests import Contest, Timed, of_case, timed_methods
from regraft_bench.kernels import assignment, compiled, gpu
from regraft_bench.micro import library, matching, reliability, systems
from regraft_bench.study import Scenario
from regraft_bench.symmetry import proofs
from regraft_bench.tracking import regressions
from regraft_kernels.cases import kernels


def timed(name: str, *contests: Contest, how: Timed | None = None) -> Scenario:
    """A scenario whose methods are the contenders of these contests."""
    return Scenario(name, timed_methods(contests), how or Timed(), seeds=1)


CASES = [case for kernel in kernels().values() for case in kernel.CASES]
FIRST = [kernel.CASES[0] for kernel in kernels().values()]
RESNET18 = [case for case in CASES if "ResNet-18" in case.name]
OTHERS = [case for case in CASES if case not in FIRST and case not in RESNET18]

SCENARIOS = (
    timed("kernels", *map(of_case, FIRST), how=Timed(budget=1.0)),
    timed("kernels-more", *map(of_case, OTHERS)),
    timed("kernels-resnet18", *map(of_case, RESNET18)),
    timed("kernels-resnet18-new-pages", *map(of_case, RESNET18), how=Timed(keep_pages=False)),
    timed("assignment", assignment.contest("real gradients", 512), how=Timed(budget=1.0)),
    *(
        timed(f"assignment-{n}", *(assignment.contest(kind, n) for kind in assignment.KINDS))
        for n in assignment.SIZES
    ),
    timed("assignment-small", *assignment.SMALL, how=Timed(budget=1.0)),
    timed("assignment-many", assignment.MANY, how=Timed(rounds=5, clock="wall")),
    timed("matching-mlp", matching.mlp_contest(1024), how=Timed(rounds=4, budget=60.0)),
    timed("matching-resnet18", matching.RESNET18, how=Timed(rounds=4, budget=60.0)),
    timed("matching-fgmt", matching.FGMT, how=Timed(rounds=3, budget=20.0)),
    timed("grids", library.grid(2_000), how=Timed(rounds=2, budget=60.0)),
    timed("grids-residual", library.grid(100, library.residual), how=Timed(rounds=2, budget=60.0)),
    timed("recorder", library.RECORDER),
    timed("systems", *systems.CONTESTS, how=Timed(budget=0.6)),
    Scenario("compiled", compiled.methods(), None, seeds=1),
    Scenario("gpu", gpu.methods(), None, seeds=1),
    Scenario("regressions", regressions.METHODS, None, seeds=10),
    Scenario("reliability", reliability.methods(), reliability.Campaign(), seeds=1),
    Scenario("symmetry-torchvision", proofs.methods("torchvision"), proofs.Proof(), seeds=1),
    Scenario(
        "symmetry-models",
        proofs.methods("timm", "transformers", "diffusers", "torch"),
        proofs.Proof(),
        seeds=1,
    ),
)
QUICK = ("kernels", "assignment")
