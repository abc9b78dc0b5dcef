"""One colour and one mark a method, in every figure: a table of names, so that adding a method changes no other one.

styles = choose_styles(["plain", "fgmt", "lr 0.1"])    # names that the table lacks take what is left, in their order
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import NamedTuple


class Style(NamedTuple):
    """A colour that is legible on white and on black, and a mark of Vega-Lite."""

    colour: str
    shape: str


COLOURS = {
    "blue": "#1f77c9", "red": "#d1343f", "green": "#2c9169", "orange": "#d9822b", "violet": "#9067c6",
    "cyan": "#1799b0", "pink": "#cf5a9d", "olive": "#8d9a26", "brown": "#a0705a", "grey": "#7d8590",
}  # fmt: skip
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")

METHODS = {
    # Learning transfer, and ports of fine-tunes
    "plain": "grey circle",
    "naive": "orange square",
    "weights": "green triangle-up",
    "weights (Git Re-Basin)": "brown triangle-up",
    "oracle": "olive diamond",
    "fgmt": "blue circle",
    "gmt": "violet diamond",
    "own base": "grey square",
    "all images": "olive cross",
    "few-shot": "red circle",
    "probe": "pink square",
    "head": "pink diamond",
    "functional": "cyan triangle-up",
    "theseus": "brown cross",
    "distil": "violet triangle-down",
    "auto": "olive circle",
    "gradfix, mean": "brown triangle-down",
    "fgmt + gradfix, mean": "cyan square",
    "fgmt, then few-shot": "violet cross",
    # Gradient assignment and fusion
    "theta_A alone": "grey triangle-up",
    "theta_B alone": "cyan triangle-down",
    "g alone": "brown circle",
    "sum": "blue square",
    "average": "orange circle",
    "ensemble": "olive square",
    "Fisher merging": "green square",
    "TIES": "violet square",
    "EWC": "pink circle",
    "aligned": "green circle",
    "REPAIR": "cyan circle",
    # FAST
    "fast": "blue triangle-up",
    "fan-in": "orange triangle-up",
    "fan-out": "violet circle",
    "xavier": "brown square",
    "feature extraction": "red square",
    "lp-ft": "pink triangle-up",
    "warm-up": "cyan diamond",
    "class means": "green diamond",
}


def choose_styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for each name of one figure, no two alike.

    Names that the table lacks take colours that the figure does not use yet; where there is none left, marks that its
    colours have not. Raises ValueError for more names than there are pairs of both.
    """
    names = list(dict.fromkeys(names))
    styles = {name: _parse(METHODS[name]) for name in names if name in METHODS}
    used = {style.colour for style in styles.values()}
    pairs = [
        (turn, colour in used, Style(colour, SHAPES[(number + turn) % len(SHAPES)]))
        for turn, (number, colour) in product(range(len(SHAPES)), enumerate(COLOURS.values()))
    ]
    pairs.sort(key=lambda pair: pair[:2])  # a colour comes again only when there is no other, with another mark
    left = [style for *_, style in pairs if style not in styles.values()]
    others = [name for name in names if name not in styles]
    if len(others) > len(left):
        raise ValueError(f"one figure cannot tell {len(names)} lines apart")
    styles |= zip(others, left, strict=False)
    return {name: styles[name] for name in names}


def _parse(words: str) -> Style:
    colour, _, shape = words.partition(" ")
    return Style(COLOURS[colour], shape)
