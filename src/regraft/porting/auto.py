"""Which method to port by: candidates tried on a part of the data, judged on what they have not seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from regraft.core.clock import Clock
from regraft.core.forward import portion, split
from regraft.core.tensors import Batch, Tensors
from regraft.porting.label_free import fit_head
from regraft.porting.methods import INPUTS, PORT_METHODS, Ported, PortProblem, PortWork, port_method, with_statistics
from regraft.symmetry import apply
from regraft.training.evaluation import accuracy
from regraft.training.landscape import interpolate
from regraft.training.loop import Diverged

AUTO = "auto"

PART = 256
"""Inputs that candidates are tried on, at most, and at most three fifths of them all."""

JUDGES = 1024
"""Held-out inputs that they are judged on, at most."""

CANDIDATES = ("functional+distil", "functional", "head", "weights", "naive")
"""In the order of preference where two are as good; for a new base of another model `OTHER_CANDIDATES`."""

OTHER_CANDIDATES = ("distil", "head")


@dataclass(frozen=True)
class Trial:
    """One candidate on a part of the data: the share of right answers (0 to 1), and what it took."""

    method: str
    score: float
    seconds: float
    ported: Ported

    def to_json(self) -> dict[str, float]:
        """What the table of candidates shows."""
        return {"score": self.score, "cpu_seconds": self.seconds}


@port_method(AUTO, masked=False, any_model=True)
def choose_port(problem: PortProblem, work: PortWork) -> Ported:
    """By the candidate that answers best on held-out data; few-shot training on the same inputs is tried for comparison
    where there are labels, and never chosen.

    Candidates are tried on three fifths of the inputs, `PART` at most, with a third of the updates. Judged are right
    answers on ``work.validation``, or on the other two fifths where there is none; by the labels, which are the
    fine-tune's predictions where the data have none. The winner is made anew from all inputs.
    """
    trial, judges = _divide(work)
    names = CANDIDATES if work.new_model is None else OTHER_CANDIDATES
    trials = {name: _try_method(name, problem, trial, judges) for name in names + ("few-shot",) * work.labelled}
    tried = {name: result for name, result in trials.items() if isinstance(result, Trial) and name in names}
    if not tried:
        raise ValueError(f"no method could be tried: {trials[names[-1]]}")
    best = max(tried, key=lambda name: tried[name].score)
    measured: dict[str, Any] = {
        "chosen": best,
        "judged_by": f"{'labels' if work.labelled else 'agreement with the fine-tune'} of {_count(judges)} others",
        "tried_on": _count(list(trial.train or ())),
        "candidates": {name: result.to_json() for name, result in trials.items() if isinstance(result, Trial)},
        "not_tried": {name: result for name, result in trials.items() if isinstance(result, str)},
    }
    if "weights" in tried:
        measured["relation"] = measure_relation(problem, trial, tried["weights"].ported, judges)
    work.clock.add({"trials": trial.clock.cost})
    return replace(_run(best, problem, work), keeps_statistics=True, measured=measured)


def _divide(work: PortWork) -> tuple[PortWork, list[Batch]]:
    """What candidates are tried with, and what they are judged on."""
    _, train = work.model_and_batches("method 'auto'")
    kept: list[Batch] = []
    held: list[Batch] = []
    for inputs, labels in map(split, _take(train, INPUTS)):
        count = len(labels)
        cut = min(count - count * 2 // 5, PART - _count(kept))
        kept += [(portion(inputs, 0, cut), labels[:cut])] if cut else []
        held += [(portion(inputs, count - count * 2 // 5, count), labels[count - count * 2 // 5 :])] * (count > 2)
    judges = held if work.validation is None else _take(work.validation, JUDGES)
    if not judges:
        raise ValueError("method 'auto' judges candidates on inputs that they have not seen: give at least three")
    steps = max(1, work.steps // 3)
    trial = replace(work, train=kept, inputs=None, steps=steps, keep=PortWork().keep, clock=Clock())
    return trial, judges


def _run(method: str, problem: PortProblem, work: PortWork) -> Ported:
    """The method's result, its BatchNorm statistics with it."""
    ported = PORT_METHODS[method](problem, work)
    return ported if ported.keeps_statistics else replace(ported, tensors=with_statistics(ported.tensors, work))


def _try_method(method: str, problem: PortProblem, work: PortWork, judges: Sequence[Batch]) -> Trial | str:
    """The candidate; or why it could not be tried."""
    clock = Clock()
    own = work.model if work.new_model is None else work.new_model
    assert own is not None
    try:
        with clock.phase("trial"):
            ported = _run(method, problem, replace(work, clock=Clock()))
            tensors = dict(ported.tensors.items())
        with clock.phase("judging"):
            score = accuracy(own, tensors, judges)
    except (ValueError, Diverged) as problem_found:
        return str(problem_found)
    finally:
        work.clock.add(clock.seconds)
    return Trial(method, score, clock.seconds["trial"].cpu, replace(ported, tensors=tensors))


def measure_relation(
    problem: PortProblem, work: PortWork, matched: Ported, judges: Sequence[Batch]
) -> dict[str, float]:
    """How related the bases are: the cosine of their weights, as they are and after their units are matched; and the
    loss barrier on the line between them after that, both with heads fitted to the fine-tune's logits.

    matched: a port with the permutation that matches them.
    """
    model, inputs = work.model_and_inputs("the relation of two bases")
    aligned = apply(problem.spec, matched.perm, dict(problem.base.items()))
    new_base, tuned = dict(problem.new_base.items()), dict(problem.tuned.items())
    names = [name for name, tensor in new_base.items() if tensor.ndim > 1 and name not in problem.carried]
    relation = {
        "cosine": _cosine(dict(problem.base.items()), new_base, names),
        "cosine_matched": _cosine(aligned, new_base, names),
    }
    with work.clock.phase("relation"):
        a, b = (fit_head(model, tuned, end, inputs) for end in (aligned, new_base))
        line = interpolate(model, a, b, judges, 3, statistics=work.train)
    return relation | {"barrier_matched": line.barrier}


def _cosine(a: Tensors, b: Tensors, names: Sequence[str]) -> float:
    dot, squares = 0.0, [0.0, 0.0]
    for name in names:
        x, y = a[name].double().flatten(), b[name].double().flatten()
        dot += float(x @ y)
        squares = [squares[0] + float(x @ x), squares[1] + float(y @ y)]
    return dot / max(math.sqrt(squares[0] * squares[1]), 1e-300)


def _take(batches: Iterable[Batch], count: int) -> list[Batch]:
    """The first batches, until they hold so many examples."""
    taken: list[Batch] = []
    stream = iter(batches)
    while _count(taken) < count and (batch := next(stream, None)) is not None:
        taken.append(batch)
    return taken


def _count(batches: Sequence[Batch]) -> int:
    return sum(len(split(batch)[1]) for batch in batches)
