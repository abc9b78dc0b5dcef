"""Table 5 with the peers that it lacks: two tasks in one network, seven ways, and the theory behind one.

Everything is the residual network at the large scale of a :class:`regraft.fusion_study.Study`; both tasks
share one head, as in the paper.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from regraft.evaluation import reset_batchnorm
from regraft.forgetting import cancellation, consolidate, fisher, together
from regraft.fusion import Tensors, batch_statistics, fuse, gradient
from regraft.fusion_study import (
    BATCH,
    CIFAR10,
    CIFAR100,
    TWO_GRADIENTS,
    TWO_NETWORKS,
    Study,
    Task,
    Trained,
    at_scale,
    calibration,
    dataset,
    network,
    pair,
    pair_images,
    point,
    recipe_for,
    start,
    train_from,
    trained,
)
from regraft.fusion_tables import PaperTable
from regraft.grids import evaluate, harmonic_mean

NETWORK = "residual8"
# What task arithmetic starts from: classes that neither task has.
PRETRAINING = Task(
    "eight other classes of CIFAR-100",
    "cifar100",
    ("aquarium_fish", "butterfly", "cloud", "dolphin", "oak_tree", "otter", "tank", "whale"),
)
STRENGTHS = (10.0, 100.0, 1000.0)  # of elastic weight consolidation; the best on validation is reported
RATIOS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # alpha of the sums whose coefficients are chosen on validation
REPEAT = 5  # CIFAR-10 has about ten times the images; together, a third of a batch is CIFAR-100


def table_of_methods(study: Study, paper: PaperTable) -> dict[str, Any]:
    """Table 5 (sequential training, both ways), and every other way beside it."""
    p = pair(study, "large")
    first, second = (trained(study, NETWORK, task) for task in (CIFAR10, CIFAR100))
    then_b = continued(study, CIFAR100, p.theta_a, "after CIFAR-10")
    then_a = continued(study, CIFAR10, p.theta_b, "after CIFAR-100")
    ours = []
    for run in (then_b, then_a):
        on = {split: accuracies(study, run.tensors, split) for split in ("training", "test")}
        ours.append([*on["training"].values(), *on["test"].values()])

    both = together(at_scale(study, CIFAR10, "large"), at_scale(study, CIFAR100, "large"), repeat=REPEAT)
    recipe = recipe_for(study, NETWORK, CIFAR10, "large")
    joint = train_from(study, NETWORK, both, p.theta_0, recipe, ("together",))
    methods = {
        "theta_A (CIFAR-10 only)": row(study, p.theta_a, 0.0),
        "theta_B (CIFAR-100 only)": row(study, p.theta_b, 0.0),
        "CIFAR-10, then CIFAR-100": row(study, then_b.tensors, then_b.cpu_seconds),
        "CIFAR-100, then CIFAR-10": row(study, then_a.tensors, then_a.cpu_seconds),
        "fusion: alpha theta_A + (1 - alpha) theta_B": chosen(study, TWO_NETWORKS, p.sources(TWO_NETWORKS)),
        "assignment: theta_0 + alpha g_1 + (1 - alpha) g_2, times 2": chosen(
            study, TWO_GRADIENTS, p.sources(TWO_GRADIENTS), scale=2.0
        ),
        "elastic weight consolidation, CIFAR-10 then CIFAR-100": consolidated(study, p.theta_a),
        "task arithmetic from a shared pre-trained start": arithmetic(study),
        "trained on both together (upper bound)": row(study, joint.tensors, joint.cpu_seconds),
    }
    scratch = first.cpu_seconds + second.cpu_seconds
    for found in methods.values():
        found["share of training both alone"] = found["CPU seconds beyond theta_A and theta_B"] / scratch
    return {
        "columns": list(paper.columns),
        "ours": ours,
        "controls": {
            "Forgetting: test accuracy, cost": methods,
            "CPU seconds of training both alone": {
                "CPU seconds theta_A": first.cpu_seconds, "CPU seconds theta_B": second.cpu_seconds
            },
            "Appendix B.2 on the CNN: sequential training less assignment, beside its Hessian term": theory(study),
        },
        "notes": [study.note, f"Pre-training of task arithmetic: {PRETRAINING.label}."],
    }  # fmt: skip


def accuracies(study: Study, tensors: Tensors, split: str) -> dict[str, float]:
    """Accuracy on both tasks, with batch statistics."""
    model = batch_statistics(network(study, NETWORK))
    return {
        task.label: float(
            evaluate(
                model, [tensors], [[1.0]], *pair_images(study, task, split, "large"), batch_size=BATCH
            ).accuracy
        )
        for task in (CIFAR10, CIFAR100)
    }


def row(study: Study, tensors: Tensors, cpu_seconds: float, **chosen: float) -> dict[str, float]:
    """One method's line: test accuracy on both tasks, their harmonic mean, what it cost, what was chosen."""
    found = accuracies(study, tensors, "test")
    mean = harmonic_mean(*(torch.tensor(v, dtype=torch.float64) for v in found.values()))
    return {
        **found, "harmonic mean": float(mean), "CPU seconds beyond theta_A and theta_B": cpu_seconds, **chosen
    }  # fmt: skip


def continued(study: Study, task: Task, begin: Tensors, purpose: str) -> Trained:
    """Train on a task at the large scale from `begin`."""
    data, recipe = at_scale(study, task, "large"), recipe_for(study, NETWORK, task, "large")
    return train_from(study, NETWORK, data, begin, recipe, (purpose,))


def chosen(study: Study, formula: str, sources: Sequence[Tensors], scale: float = 1.0) -> dict[str, float]:
    """The sum whose alpha : beta is best on validation; its cost is the search."""
    began = time.process_time()
    rows = [point(formula, scale * a, scale * (1 - a)) for a in RATIOS]
    model = batch_statistics(network(study, NETWORK))
    held = [
        evaluate(model, sources, rows, *pair_images(study, task, "validation", "large"), batch_size=BATCH)
        for task in (CIFAR10, CIFAR100)
    ]
    k = int(harmonic_mean(*(grid.accuracy for grid in held)).argmax())
    spent = time.process_time() - began
    alpha, beta = rows[k][-2:]
    return row(study, fuse(sources, rows[k]), spent, alpha=alpha, beta=beta)


def consolidated(study: Study, theta_a: Tensors) -> dict[str, float]:
    """EWC on CIFAR-100 after CIFAR-10, its strength chosen on validation; the search is charged."""
    model, generator = network(study, NETWORK), study.generator("fisher")
    began = time.process_time()
    # The Fisher information is taken image by image, so BatchNorm must not look at a batch.
    settled = reset_batchnorm(model, theta_a, calibration(study, "large")[:2])
    images, _ = pair_images(study, CIFAR10, "training", "large")
    importance = fisher(model, settled, images, generator=generator, batch_size=50)
    spent = time.process_time() - began
    data, recipe = at_scale(study, CIFAR100, "large"), recipe_for(study, NETWORK, CIFAR100, "large")
    recipe = replace(recipe, epochs=max(1, recipe.epochs // 2), lr=recipe.lr / 5)
    best: tuple[float, float, Tensors] | None = None
    for strength in STRENGTHS:
        try:
            run = consolidate(
                model, theta_a, importance, strength, data, recipe,
                generator=study.generator("consolidate"), device=study.device,
            )  # fmt: skip
        except FloatingPointError:
            continue  # a strength that the learning rate cannot carry is no candidate
        spent += run.cpu_seconds
        held = accuracies(study, run.tensors, "validation")
        mean = float(harmonic_mean(*(torch.tensor(v, dtype=torch.float64) for v in held.values())))
        if best is None or mean > best[0]:
            best = (mean, strength, run.tensors)
    if best is None:
        raise ValueError(f"elastic weight consolidation diverged at every strength of {STRENGTHS}")
    return row(study, best[2], spent, strength=best[1])


def arithmetic(study: Study) -> dict[str, float]:
    """theta_pre + alpha (theta_A - theta_pre) + beta (theta_B - theta_pre), both trained from theta_pre."""
    recipe = recipe_for(study, NETWORK, CIFAR100, "large")
    before = train_from(
        study, NETWORK, dataset(study, PRETRAINING), start(study, NETWORK), recipe, ("pre-training",)
    )
    runs = [continued(study, task, before.tensors, "after pre-training") for task in (CIFAR10, CIFAR100)]
    vectors = [gradient(before.tensors, run.tensors) for run in runs]
    found = chosen(study, TWO_GRADIENTS, [before.tensors, *vectors], scale=1.2)
    found["CPU seconds beyond theta_A and theta_B"] += sum(r.cpu_seconds for r in (before, *runs))
    return found


def theory(
    study: Study, rates: Sequence[float] = (0.1, 0.01, 1e-3, 1e-4, 1e-5)
) -> dict[str, dict[str, float]]:
    """Appendix B.2 on the CNN: how much of theta_BA - theta'_BA is the Hessian term, by learning rate.

    In float64, with 100 training images of each task; one step a task, and five. ReLU and max-pooling have
    kinks, where the gradient jumps: the Hessian does not see them, and the term explains the difference
    only at rates so small that no unit of any image crosses one.
    """
    model = network(study, "small_cnn")
    double = {name: tensor.double() for name, tensor in start(study, "small_cnn").items()}
    batches = []
    for task in (CIFAR10, CIFAR100):
        split = at_scale(study, task, "medium").train
        order = study.generator("theory", task.label)
        images, labels = next(iter(split.batches(100, generator=order, device=study.device)))
        batches.append([(images.double(), labels)])
    found = {}
    for steps in (1, 5):
        for rate in rates:
            c = cancellation(model, double, *batches, rate, steps=steps)
            found[f"{steps} step{'s' * (steps > 1)} a task at rate {rate:g}"] = {
                "difference": c.difference, "predicted": c.predicted,
                "relative error": c.relative_error, "cosine": c.cosine,
            }  # fmt: skip
    return found
