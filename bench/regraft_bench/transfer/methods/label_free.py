"""A fine-tune moved onto a new base without labels: what the fine-tune answers to the images stands for them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from regraft.core.clock import Clock
from regraft.core.forward import call
from regraft.core.guard import evaluating
from regraft.core.tensors import Tensors
from regraft.porting import label_free
from regraft_bench.study import Method
from regraft_bench.transfer.methods.ports import (
    FewShotData,
    Port,
    add_task_vector,
    base,
    estimate_statistics,
    few_shot_finetune,
    fine_tune_base,
    finetune_on_all,
    fit_probe,
    full_task_vector,
    keep_by_mean,
    keep_new_base,
    leave_in_place,
    make_method,
    match_base_weights,
    match_gradients,
    new_base,
)
from regraft_bench.transfer.setting import TransferSetting

DISTIL_STEPS = 50


def without_labels(port: Port, setting: TransferSetting, seen: FewShotData, clock: Clock) -> Tensors:
    """A port that has the fine-tune's predictions in the place of labels."""
    tuned = fine_tune_base(setting).tensors
    with clock.phase("predictions"):
        labels = [predict_classes(setting.model, tuned, images) for images, _ in seen.batches]
    return port(setting, replace(seen, split=replace(seen.split, labels=torch.cat(labels))), clock)


def predict_classes(model: nn.Module, theta: Tensors, images: Tensor) -> Tensor:
    with torch.inference_mode(), evaluating(model):
        return call(model, theta, images).argmax(1).clone()


def unlabelled(seen: FewShotData) -> list[Tensor]:
    """The images alone."""
    return [images for images, _ in seen.batches]


def fit_head_to_logits(setting: TransferSetting, seen: FewShotData, clock: Clock) -> Tensors:
    """The new base with a head by ridge regression of its features on the fine-tune's logits."""
    tuned = fine_tune_base(setting).tensors
    with clock.phase("training"):
        return label_free.fit_head(setting.model, tuned, new_base(setting), unlabelled(seen))


def distil_fine_tune(steps: int, setting: TransferSetting, seen: FewShotData, clock: Clock) -> Tensors:
    """The new base with that head, then trained as a whole on the fine-tune's predictions."""
    start = fit_head_to_logits(setting, seen, clock)
    with clock.phase("training"):
        return label_free.distil(setting.model, fine_tune_base(setting).tensors, start, unlabelled(seen), steps=steps)


def match_layers(setting: TransferSetting, seen: FewShotData, clock: Clock) -> Tensors:
    """`regraft.porting.label_free.match_functions`, with BatchNorm statistics held."""
    networks = base(setting), fine_tune_base(setting).tensors, new_base(setting)
    with clock.phase("training"):
        return label_free.match_functions(setting.model, *networks, unlabelled(seen))


def transport_task_vector(setting: TransferSetting, seen: FewShotData, clock: Clock) -> Tensors:
    """`regraft.porting.label_free.transport_by_activations`, BatchNorm statistics estimated anew."""
    networks = base(setting), fine_tune_base(setting).tensors, new_base(setting)
    with clock.phase("training"):
        moved = label_free.transport_by_activations(setting.model, *networks, unlabelled(seen))
    with clock.phase("batchnorm"):
        return estimate_statistics(setting, moved, seen)


LABEL_FREE = (
    make_method("head", fit_head_to_logits, "A head by ridge regression on the fine-tune's logits."),
    make_method(
        "distil",
        partial(distil_fine_tune, DISTIL_STEPS),
        f"That head, then {DISTIL_STEPS} updates of all layers on the fine-tune's predictions.",
    ),
    make_method("functional", match_layers, "Layer by layer, the new base's outputs change as the fine-tune's did."),
    make_method("theseus", transport_task_vector, "The task vector between activations' Procrustes maps (THESEUS)."),
)
"""What `regraft.porting.label_free` has."""


def related_methods(few_shot_rate: float) -> tuple[Method, ...]:
    """Those that need no labels, and what the same images would give with labels."""
    vectors = (
        ("naive", leave_in_place, full_task_vector, "The task vector added as it is"),
        ("gradfix, mean", leave_in_place, keep_by_mean, "What of the task vector descends, by the mean gradient"),
        ("weights", match_base_weights, full_task_vector, "Permuted by matching the bases' weights (TransFusion)"),
        ("fgmt", match_gradients, full_task_vector, "Permuted by gradients along the line from base to fine-tune"),
    )
    return (
        Method("own base", partial(finetune_on_all, "tuned", base), about="The fine-tune where it was made."),
        *(
            make_method(
                name,
                partial(without_labels, partial(add_task_vector, find, keep)),
                f"{about}; the fine-tune's predictions in the place of labels.",
            )
            for name, find, keep, about in vectors
        ),
        *LABEL_FREE,
        make_method("probe", fit_probe, "With labels: logistic regression on the new base's features."),
        make_method(
            "few-shot",
            partial(few_shot_finetune, keep_new_base, few_shot_rate, 1),
            "With labels: the new base trained on the images, 2 T updates.",
        ),
    )
