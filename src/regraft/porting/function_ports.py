"""Port methods that carry what the fine-tune does, not what it changed: of inputs of the task, without labels; and
training on labels, which forgets the fine-tune, for comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from regraft.core.forward import examples, portion, split
from regraft.core.tensors import Inputs, Tensors
from regraft.porting.label_free import (
    activation_bytes,
    distil,
    fit_head,
    match_functions,
    train_on_targets,
    transport_by_activations,
)
from regraft.porting.methods import INPUTS, Ported, PortProblem, PortWork, port_method

UPDATES = 100
"""Of a training, where no number is given."""

FITTED = {"auto", "head", "functional", "functional+distil", "theseus", "distil"}
"""The methods that are fitted to inputs, so that they are to be judged on others."""

TRAINED = {"auto", "distil", "functional+distil", "few-shot"}
"""The methods that train."""


AT_ONCE = {"auto", "functional", "functional+distil"}
"""The methods that run inputs in one batch."""

ACTIVATIONS = 4 * 10**9
"""Bytes that this batch may take: of larger activations fewer inputs are looked at, as many on every machine."""


BEGUN_FROM = 512
"""Inputs that "functional" looks at where training on all of them follows: more cost more than they give."""


def count_affordable(model: nn.Module, inputs: Inputs) -> int:
    """How many inputs such as these may be run at once: `INPUTS`, or fewer so that they take no more than `ACTIVATIONS`
    bytes, and at least one."""
    return max(1, min(INPUTS, ACTIVATIONS // max(1, activation_bytes(model, inputs))))


def _take_affordable(model: nn.Module, inputs: Sequence[Inputs], wanted: int = INPUTS) -> list[Inputs]:
    left, taken = min(wanted, count_affordable(model, inputs[0])), []
    for batch in inputs:
        if left <= 0:
            break
        taken.append(portion(batch, 0, min(left, examples(batch))))
        left -= examples(batch)
    return taken


def copy_new_base(problem: PortProblem) -> Tensors:
    """The new base, with the fine-tune's own parts where no base has them."""
    return {
        name: (problem.tuned[name] if name in problem.carried else tensor).clone()
        for name, tensor in problem.new_base.items()
    }


Make = Callable[[nn.Module, Sequence[Inputs], Tensors], Tensors]
"""(the fine-tune's network, unlabelled inputs, the new base) -> the result."""


def _make_port(name: str, problem: PortProblem, work: PortWork, make: Make, *, keeps: bool = True) -> Ported:
    """What ``make`` gives, computed once. keeps: its BatchNorm statistics are meant."""
    model, inputs = work.model_and_inputs(f"method {name!r}")

    def compute() -> Tensors:
        with work.clock.phase(name):
            return make(model, inputs, copy_new_base(problem))

    return Ported(work.keep(f"by-{name}", compute), problem.spec.identity(), keeps_statistics=keeps)


@port_method("head", masked=False, any_model=True)
def port_head(problem: PortProblem, work: PortWork) -> Ported:
    """The new base with a head fitted to the fine-tune's logits: `regraft.porting.label_free.fit_head`."""

    def make(model: nn.Module, inputs: Sequence[Inputs], start: Tensors) -> Tensors:
        return fit_head(model, dict(problem.tuned.items()), start, inputs, new_model=work.new_model)

    return _make_port("head", problem, work, make)


@port_method("functional", masked=False)
def port_functions(problem: PortProblem, work: PortWork) -> Ported:
    """Every layer changes what it computes as the fine-tune's did: `regraft.porting.label_free.match_functions`."""

    def make(model: nn.Module, inputs: Sequence[Inputs], start: Tensors) -> Tensors:
        base, tuned = dict(problem.base.items()), dict(problem.tuned.items())
        return match_functions(model, base, tuned, start, _take_affordable(model, inputs))

    return _make_port("functional", problem, work, make)


@port_method("theseus", masked=False, any_model=True)
def port_by_activations(problem: PortProblem, work: PortWork) -> Ported:
    """The task vector, carried by maps between activations (`regraft.porting.label_free.transport_by_activations`);
    then a head fitted as by "head", since that of the task is not in the bases."""

    def make(model: nn.Module, inputs: Sequence[Inputs], start: Tensors) -> Tensors:
        base, tuned = dict(problem.base.items()), dict(problem.tuned.items())
        moved = transport_by_activations(model, base, tuned, start, inputs, new_model=work.new_model)
        return fit_head(model, tuned, moved, inputs, new_model=work.new_model)

    return _make_port("theseus", problem, work, make)


@port_method("distil", masked=False, any_model=True)
def port_by_training(problem: PortProblem, work: PortWork) -> Ported:
    """The new base, with a head fitted as by "head", trained on the fine-tune's predictions."""

    def make(model: nn.Module, inputs: Sequence[Inputs], start: Tensors) -> Tensors:
        tuned = dict(problem.tuned.items())
        begun = fit_head(model, tuned, start, inputs, new_model=work.new_model)
        return distil(model, tuned, begun, inputs, steps=work.steps, lr=work.lr, new_model=work.new_model)

    return _make_port("distil", problem, work, make, keeps=False)


@port_method("functional+distil", masked=False)
def port_functions_and_train(problem: PortProblem, work: PortWork) -> Ported:
    """As by "functional", then trained on the fine-tune's predictions."""

    def make(model: nn.Module, inputs: Sequence[Inputs], start: Tensors) -> Tensors:
        base, tuned = dict(problem.base.items()), dict(problem.tuned.items())
        begun = match_functions(model, base, tuned, start, _take_affordable(model, inputs, BEGUN_FROM))
        return distil(model, tuned, begun, inputs, steps=work.steps, lr=work.lr)

    return _make_port("functional+distil", problem, work, make, keeps=False)


@port_method("few-shot", masked=False, any_model=True)
def train_new_base(problem: PortProblem, work: PortWork) -> Ported:
    """No port: the new base trained on the labels of the same inputs, with a head that begins at zero."""
    model, train = work.model_and_batches("method 'few-shot'")
    if not work.labelled:
        raise ValueError("method 'few-shot' trains on labels, and these data have none: distil takes predictions")
    own = model if work.new_model is None else work.new_model
    batches = [split(batch, number) for number, batch in enumerate(train)]

    def compute() -> Tensors:
        with work.clock.phase("few-shot"):
            return train_on_targets(own, copy_new_base(problem), batches, steps=work.steps, lr=work.lr)

    return Ported(work.keep("by-few-shot", compute), problem.spec.identity())
