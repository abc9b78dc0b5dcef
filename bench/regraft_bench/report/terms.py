"""The words that tables and documents use, each explained once: docs/glossary.md, and hints on the page."""

from __future__ import annotations

TERMS = {
    "accuracy": "Share of right answers on the test images, from 0 to 1.",
    "ADP": "Anytime deployment performance: the test accuracy, at a step, of the weights that were best on validation "
    "until then.",
    "area": "Mean height of an ADP curve over the logarithm of the steps: how early a method learns.",
    "assignment": "The choice of one partner for each unit that collects the largest sum of similarities.",
    "barrier": "The highest rise of the loss above the straight line between two networks' losses.",
    "base": "A pre-trained network that a fine-tune begins from.",
    "chance": "The accuracy of guessing: one over the number of classes.",
    "control": "The method that was measured in the same run and that a cost is divided by.",
    "CPU s": "Seconds of processor time, evaluation not counted.",
    "‖Δ‖ / ‖θ₁⁰‖": "How far training moved the source's weights, in units of their norm at the start.",
    "FGMT": "Fast gradient matching along transferred trajectories: matches gradients that are computed once a step.",
    "GMT": "The same with all gradients of the path computed anew in each step.",
    "graft": "Adding a permuted change of weights to other weights.",
    "group": "Units that may be exchanged, with all the tensors in which they stand.",
    "matching": "Finding the permutation that brings one network's units into the order of another's.",
    "naive": "Adding the change of weights as it is, without a permutation.",
    "oracle": "The permutation found by training the target after all: an upper bound, not a usable method.",
    "plain": "Training the network in the usual way: what every method is compared with.",
    "REPAIR": "Setting each layer's statistics in a merged network to those of the networks it is made of.",
    "task vector": "The change of weights that fine-tuning made: the fine-tune minus its base.",
    "weights": "Matching the two starts' weights, as Git Re-Basin does.",
}
