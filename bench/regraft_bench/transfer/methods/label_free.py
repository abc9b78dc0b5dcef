"""A fine-tune moved onto a new base without labels, by the library's port methods: images are all that they see."""

from __future__ import annotations

from functools import partial

from regraft.core.clock import Clock
from regraft.core.tensors import Tensors
from regraft.porting import PORT_METHODS
from regraft.porting.label_free import predict
from regraft.porting.methods import PortProblem, PortWork, with_statistics
from regraft_bench.study import Method
from regraft_bench.transfer.methods.ports import (
    FewShotData,
    base,
    few_shot_finetune,
    fine_tune_base,
    finetune_on_all,
    fit_probe,
    head_names,
    keep_new_base,
    make_method,
    new_base,
)
from regraft_bench.transfer.setting import TransferSetting

DISTIL_UPDATES = 30
"""Of the methods that train."""


def run_port_method(name: str, setting: TransferSetting, seen: FewShotData, clock: Clock) -> Tensors:
    """`regraft.porting.PORT_METHODS`, with the fine-tune's predictions in the place of labels."""
    model, tuned = setting.model, fine_tune_base(setting).tensors
    problem = PortProblem(setting.spec, base(setting), tuned, new_base(setting), head_names(model))
    with clock.phase("predictions"):
        images = [images for images, _ in seen.batches]
        labels = [logits.argmax(1) for logits in predict(model, tuned, images)]
    trains = "distil" in name or name == "auto"
    steps = DISTIL_UPDATES if trains else setting.settings.steps
    work = PortWork(model, list(zip(images, labels, strict=True)), steps=steps, labelled=False, clock=clock)
    ported = PORT_METHODS[name](problem, work)
    return dict(ported.tensors if ported.keeps_statistics else with_statistics(ported.tensors, work))


def _make(name: str, about: str) -> Method:
    return make_method(name, partial(run_port_method, name), about)


FITTED = (
    _make("head", "A head fitted to the fine-tune's logits, in closed form."),
    _make("functional", "Layer by layer, what the new base computes changes as the fine-tune's did, in closed form."),
    _make("distil", f"A fitted head, then {DISTIL_UPDATES} updates of all layers on the fine-tune's predictions."),
    _make("functional+distil", f"As functional, then {DISTIL_UPDATES} updates on the fine-tune's predictions."),
    _make("theseus", "The task vector carried by maps between activations (THESEUS), and a fitted head."),
    _make("auto", "The candidate that agrees most with the fine-tune on held-out images."),
)
"""Methods that are fitted to unlabelled images."""


def related_methods(few_shot_rate: float) -> tuple[Method, ...]:
    """The library's methods without labels, and what the same images would give with labels."""
    return (
        Method("own base", partial(finetune_on_all, "tuned", base), about="The fine-tune where it was made."),
        _make("naive", "The task vector added as it is."),
        _make("weights", "The task vector, permuted by matching the bases' weights (TransFusion)."),
        _make("fgmt", "The task vector, permuted by matching gradients of the fine-tune's predictions."),
        _make("gradfix", "What of the task vector descends, by majority of images, with the fine-tune's predictions."),
        *FITTED,
        make_method("probe", fit_probe, "With labels: logistic regression on the new base's features."),
        make_method(
            "few-shot",
            partial(few_shot_finetune, keep_new_base, few_shot_rate, 1),
            "With labels: the new base trained on the images, 2 T updates.",
        ),
    )
