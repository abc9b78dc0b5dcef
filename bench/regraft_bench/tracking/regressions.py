"""Are regressions found, and is unchanged code left in peace? Faults are planted in a copy of the packages, and the
copy is compared with another that has none, as `regraft against` does it.

A method is a fault (or none), a seed a trial.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from regraft.core.clock import Cost
from regraft_bench.study import Measured, Method, Setting
from regraft_bench.tracking.against import copy_packages, measure_by_turns
from regraft_bench.tracking.compare import Change, Limits, is_cost


@dataclass(frozen=True)
class Fault:
    """What is added to the end of a module, and where it must be found.

    text: Python; TRIAL in it becomes the trial's number. seen: the quantity that must be reported ("error": with all
    values but costs; "cost of assignment": with all costs), and the only method (None: any) that may be. argv: of
    `regraft bench`. limits: how it is judged.
    """

    module: str
    text: str
    seen: tuple[str, str | None] | None
    argv: tuple[str, ...]
    limits: Limits = field(default_factory=Limits)
    about: str = "The packages beside a copy of themselves: whatever is told is a false alarm."


SLOW = """

def _slowed(work):
    import time

    def slow(*arguments, **options):
        begun = time.thread_time()
        found = work(*arguments, **options)
        end = time.thread_time()
        end += SHARE * (end - begun)
        while time.thread_time() < end:
            pass
        return found

    return slow

"""


def slow_down(share: float, *names: str) -> str:
    """Functions of a module wait for this share of their time after every call."""
    return SLOW.replace("SHARE", str(share)) + "".join(f"\n{name} = _slowed({name})\n" for name in names)


LOSS = """

_spoiled, _right_rows = torch.Generator().manual_seed(TRIAL), rows_that_count


def rows_that_count(logits, labels, where):
    rows, wanted = _right_rows(logits, labels, where)
    spoiled = torch.rand(len(rows), 1, generator=_spoiled) < 0.01
    return torch.where(spoiled.to(rows.device), -rows, rows), wanted
"""
"""One answer in a hundred, drawn anew in every evaluation."""

TRAINING_MODE = """

from contextlib import contextmanager

_evaluating = evaluating


@contextmanager
def evaluating(model):
    with _evaluating(model):
        model.train()
        yield
"""

SPEED = (
    *("--scenario", "systems", "--method", "training: by hand", "--method", "training: regraft"),
    *("--method", "fast: by hand", "--method", "fast: regraft"),
)
ACCURACY = ("--scenario", "digits-mlp", "--method", "plain", "--method", "fgmt", "--seeds", "3")
_NORMALISED = ("--scenario", "digits-batchnorm", "--method", "plain", "--method", "fgmt", "--seeds", "2")
_MATCHING = (*ACCURACY, "--method", "weights", "--method", "gmt")
ONCE = Limits(least=1, most=1)
SLOWER = "Training waits for 15 % of its time after every call."
LESS_ACCURATE = "Every evaluation spoils one answer in a hundred, at random."
FAULTS = {
    "slower by 15 %": Fault(
        "training/loop.py", slow_down(0.15, "train"), ("cost", "training: regraft"), SPEED, about=SLOWER
    ),
    "less accurate by a point": Fault("training/evaluation.py", LOSS, ("error", None), ACCURACY, ONCE, LESS_ACCURATE),
    "matching at twice the price": Fault(
        "matching/descent.py",
        slow_down(1.0, "similarity", "similarity_update_", "assign_many"),
        ("cost of assignment", None),
        _MATCHING,
        Limits(slowdown=1, least=2, most=4),
        "Similarity and assignment wait for as long as they took; a method's whole cost may double here, as in CI.",
    ),
    "accuracy in training mode": Fault(
        "training/evaluation.py",
        TRAINING_MODE,
        ("error", None),
        _NORMALISED,
        ONCE,
        "Every evaluation normalises by its own batch.",
    ),
    "the same code, speed": Fault("training/loop.py", "", None, SPEED),
    "the same code, accuracy": Fault("training/evaluation.py", "", None, ACCURACY, ONCE),
}


def plant_fault(fault: Fault, trial: int, folder: Path) -> Path:
    """A copy of the packages with the fault in it."""
    copy_packages(folder)
    module = folder / "src" / "regraft" / fault.module
    text = module.read_text("utf-8") + fault.text.replace("TRIAL", str(trial))
    module.write_text(text, encoding="utf-8")
    return folder


def _measure(name: str, setting: Setting) -> Measured:
    fault = FAULTS[name]
    with tempfile.TemporaryDirectory(prefix="regraft-regressions-") as place:
        folder, begun = Path(place), time.perf_counter()
        sides = copy_packages(folder / "a"), plant_fault(fault, setting.seed, folder / "b")
        changes = measure_by_turns(*sides, fault.argv, folder / "rows", fault.limits)
        return judge_changes(fault, changes, time.perf_counter() - begun)


def judge_changes(fault: Fault, changes: list[Change], wall: float) -> Measured:
    """Whether what was planted was reported, and what else was."""
    reported = [change for change in changes if fault.limits.is_exceeded_by(change)]
    due = [change for change in reported if fault.seen and _is(change, *fault.seen)]
    planted = [change for change in changes if fault.seen and _is(change, *fault.seen)]
    values = {
        "found": float(bool(due)),
        "false alarms": float(len(reported) - len(due)),
        "comparisons": float(len(changes)),
        "change": max((c.change for c in planted or changes if c.change is not None), default=None),
        "pairs of turns": float(max(change.n for change in changes)),
    }
    notes = {"told": [f"{c.method}: {c.quantity} {c.verdict} {c.change or 0:+.4f}" for c in reported]}
    return Measured(values, cost={"turns": Cost(wall, 0.0)}, notes=notes)


def _is(change: Change, quantity: str, method: str | None) -> bool:
    return change.is_cost == is_cost(quantity) and method in (None, change.method)


REGRESSION_METHODS = tuple(
    Method(name, partial(_measure, name), {"words": f.argv, "limits": asdict(f.limits)}, about=f.about)
    for name, f in FAULTS.items()
)
