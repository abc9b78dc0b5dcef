"""What is measured: an entry is a scenario. Every timed one is a list of contests."""

from __future__ import annotations

from regraft_bench.contests import Contest, Timed, timed_methods
from regraft_bench.kernels import assignment, compiled
from regraft_bench.kernels.variants import operators
from regraft_bench.micro import gpu, library, matching, systems
from regraft_bench.study import Scenario
from regraft_bench.symmetry import proofs
from regraft_bench.tracking import regressions


def timed_scenario(name: str, *contests: Contest, how: Timed | None = None) -> Scenario:
    """A scenario whose methods are the contenders of these contests."""
    return Scenario(name, timed_methods(contests), how or Timed(), seeds=1)


ON_KERNELS = [contest for operator in operators().values() for contest in operator.contests]
FIRST = [operator.contests[0] for operator in operators().values()]
ON_RESNET18 = [contest for contest in ON_KERNELS if "ResNet-18" in contest.name]
REST = [contest for contest in ON_KERNELS if contest not in FIRST and contest not in ON_RESNET18]

SCENARIOS = (
    timed_scenario("kernels", *FIRST, how=Timed(budget=1.0)),
    timed_scenario("kernels-more", *REST),
    timed_scenario("kernels-resnet18", *ON_RESNET18),
    timed_scenario("kernels-resnet18-new-pages", *ON_RESNET18, how=Timed(keep_pages=False)),
    timed_scenario("assignment", assignment.contest("real gradients", 512), how=Timed(budget=1.0)),
    *(
        timed_scenario(f"assignment-{n}", *(assignment.contest(kind, n) for kind in assignment.MATRIX_KINDS))
        for n in assignment.MATRIX_SIZES
    ),
    timed_scenario("assignment-small", *assignment.SMALL, how=Timed(budget=1.0)),
    timed_scenario("assignment-many", assignment.MANY, how=Timed(rounds=5, clock="wall")),
    timed_scenario("matching-mlp", matching.mlp_contest(1024), how=Timed(rounds=4, budget=60.0)),
    timed_scenario("matching-resnet18", matching.RESNET18, how=Timed(rounds=4, budget=60.0)),
    timed_scenario("matching-fgmt", matching.FGMT, how=Timed(rounds=3, budget=20.0)),
    timed_scenario("grids", library.grid(2_000), how=Timed(rounds=2, budget=60.0)),
    timed_scenario("grids-residual", library.grid(100, library.residual), how=Timed(rounds=2, budget=60.0)),
    timed_scenario("recorder", library.RECORDER),
    timed_scenario("systems", *systems.SYSTEMS, how=Timed(budget=0.6)),
    Scenario("compiled", compiled.compile_methods(), None, seeds=1),
    Scenario("gpu", gpu.gpu_methods(), None, seeds=1),
    Scenario("regressions", regressions.REGRESSION_METHODS, None, seeds=10),
    Scenario("symmetry-torchvision", proofs.proof_methods("torchvision"), proofs.Proof(), seeds=1),
    Scenario(
        "symmetry-models",
        proofs.proof_methods("timm", "transformers", "diffusers", "torch"),
        proofs.Proof(),
        seeds=1,
    ),
)
QUICK = ("kernels", "assignment")
