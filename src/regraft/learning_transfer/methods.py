"""The methods of learning transfer: ``theta_2^t = theta_2^0 + pi (theta_1^t - theta_1^0)``, each with its own pi.

(Chijiwa, Transferring Learning Trajectories of Neural Networks, sections 3 and 4.1.)

- ``naive``: pi is the identity.
- ``weights``: pi matches the two starts' weights, as a Git Re-Basin user would do.
- ``oracle``: pi matches what a real training of theta_2 learned with ``theta_1^T - theta_1^0``: an upper bound.
- ``gmt`` (Algorithm 1): for s = 1..T, pi_s matches the gradients along both paths up to s, all computed anew.
- ``fgmt`` (Algorithm 2): the same, but only the newest pair of gradients is computed and the earlier ones are kept.

A method is a generator ``method(problem, work)`` that yields (t, pi_t) for t = 1 .. T, in order: one permutation for
all targets, or a list with one for each. It is listed in `TRANSFER_METHODS`, or handed to `regraft.transfer`. The rest
(transferred parameters, BatchNorm statistics, evaluation, choice of the best step) is the driver's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from regraft.core.tensors import Perm
from regraft.learning_transfer.work import Problem, Work

Steps = Iterator[tuple[int, Perm | Sequence[Perm]]]

TransferMethod = Callable[[Problem, Work], Steps]


def naive(problem: Problem, work: Work) -> Steps:
    """The source's path as it is, no unit permuted."""
    return _at_every_step(problem, problem.identity())


def weights(problem: Problem, work: Work) -> Steps:
    """One permutation: that which matches the two starts' weights (Git Re-Basin, Ainsworth et al., 2023)."""
    source = problem.parameters(problem.path.start)
    return _at_every_step(problem, [work.match(problem.parameters(start), source) for start in problem.starts])


def oracle(problem: Problem, work: Work) -> Steps:
    """An upper bound, not a usable method: the target is trained after all, and one permutation matches what both have
    learned."""
    if not problem.ends:
        raise ValueError("method 'oracle' needs target_end, the end of a real training from target_start")
    source = problem.change(problem.path.end, problem.path.start)
    targets = map(problem.change, problem.ends, problem.starts)
    return _at_every_step(problem, [work.match(target, source) for target in targets])


def gmt(problem: Problem, work: Work) -> Steps:
    """Gradient matching along the transferred path, all gradients anew at every step (Algorithm 1)."""
    descents, perms = work.descents(), [problem.identity()] * len(problem.starts)
    for s in range(1, problem.path.steps + 1):
        for descent in descents:
            descent.clear_()
        for t in range(s):
            work.append_(descents, perms, t)
        perms = work.descend_(descents)
        yield s, perms


def fgmt(problem: Problem, work: Work) -> Steps:
    """Gradient matching along the transferred path, earlier gradients kept (Algorithm 2): two gradients a step."""
    descents, perms = work.descents(), [problem.identity()] * len(problem.starts)
    for s in range(1, problem.path.steps + 1):
        work.append_(descents, perms, s - 1)
        perms = work.descend_(descents)
        yield s, perms


TRANSFER_METHODS: dict[str, TransferMethod] = {
    "naive": naive,
    "weights": weights,
    "oracle": oracle,
    "fgmt": fgmt,
    "gmt": gmt,
}


def _at_every_step(problem: Problem, perms: Perm | Sequence[Perm]) -> Steps:
    return ((t, perms) for t in range(1, problem.path.steps + 1))
