"""Text that ships with Python: which module of its standard library a dozen words come from.

Corpora that other packages read (scikit-learn, nltk, torchtext) are downloaded, so that no test could rely on them.
The modules are large ones that change little from one version of Python to the next; rows name the version.
"""

from __future__ import annotations

import re
import sysconfig
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from regraft.core.registry import register
from regraft.data import Dataset, MissingData, Split, stratified_split
from regraft.networks.papers import TransformerBlock

STANDARD_LIBRARY = "standard-library"
"""The name of the data set; its classes are names of modules."""

WORDS = 12
"""In one text."""

VOCABULARY = 1024
"""Words are told apart by a hash into so many numbers."""

TEST_SHARE = 0.2


def load_text(modules: Sequence[str], seed: int, validation: float) -> Dataset:
    """Texts as float32 [N, 1, 1, WORDS] of word numbers, in three splits; the test split does not depend on the seed.

    Raises MissingData where Python came without the sources of its library.
    """
    texts = [_read_texts(module) for module in modules]
    labels = torch.cat([torch.full((len(own),), number) for number, own in enumerate(texts)])
    everything = Split(torch.cat(texts), labels)
    kept, held = stratified_split(labels, TEST_SHARE, torch.Generator().manual_seed(0), modules)
    rest, test = everything.subset(kept), everything.subset(held)
    train, held_out = stratified_split(rest.labels, validation, torch.Generator().manual_seed(seed), modules)
    splits = rest.subset(train), rest.subset(held_out), test
    return Dataset(STANDARD_LIBRARY, *splits, tuple(modules), (0.0,), (1.0,))


@cache
def _read_texts(module: str) -> Tensor:
    path = Path(sysconfig.get_path("stdlib"), f"{module}.py")
    if not path.is_file():
        raise MissingData(f"{STANDARD_LIBRARY} is missing: there is no {path}")
    words = re.findall("[A-Za-z]+", path.read_text(encoding="utf-8"))
    numbers = [zlib.crc32(word.lower().encode()) % VOCABULARY for word in words[: len(words) // WORDS * WORDS]]
    return torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1, WORDS)


class TextTransformer(nn.Module):
    """Words with learnt positions, blocks of attention, and a linear layer on their mean."""

    def __init__(self, num_classes: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(WORDS, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, texts: Tensor) -> Tensor:
        tokens = self.words(texts.flatten(1).long()) + self.positions.weight
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


@register
def text_transformer(num_classes: int = 10, *, width: int = 64, depth: int = 2, heads: int = 4) -> nn.Module:
    """A small classifier of `load_text`'s texts. width: of a token; a multiple of ``heads``."""
    return TextTransformer(num_classes, width, depth, heads)
