"""What stands beside the weights and goes with the result: configuration, tokenizer, processor, labels."""

from __future__ import annotations

import os
import re
from pathlib import Path

from regraft.core.files import BadFile

WEIGHTS = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".npz",
    ".pkl",
}

OURS_OR_LEFT = re.compile(
    r"\..*|README\.md|recipe\.yaml|identity\.json|.*\.(index\.json|log|kept|part)|\w+_(results|state)\.json"
)
"""Hidden files, what `regraft` itself writes, indices of weights, and the records of a training."""

USUAL = re.compile(
    r"(\w+_)?config\.json|tokenizer.*|(special_tokens_map|added_tokens)\.json|vocab\..*|merges\.txt|.*\.model|chat_template.*"
)
"""Of a model; all that is taken from a folder that was not itself given."""


def list_travelling(path: Path, is_folder: bool) -> tuple[Path, ...]:
    """The files that go with the weights at ``path``: of a folder all that are no weights, beside a file the `USUAL`
    ones, where there is a config.json.

    Raises BadFile, naming them, for links out of the folder (the Hub's own store of a snapshot is none).
    """
    folder = path.parent
    if not is_folder and not (folder / "config.json").exists():
        return ()
    within = [Path(os.path.realpath(folder))]
    if within[0].parent.name == "snapshots":
        within.append(within[0].parent.parent / "blobs")
    files: list[Path] = []
    outside: list[Path] = []
    for file in sorted(folder.iterdir()):
        is_weights = any(suffix in WEIGHTS for suffix in file.suffixes)
        if is_weights or OURS_OR_LEFT.fullmatch(file.name) or not (is_folder or USUAL.fullmatch(file.name)):
            continue
        if not os.path.isfile(file):  # a folder, a pipe, a link to nothing or to itself
            continue
        target = Path(os.path.realpath(file))
        (files if any(target.is_relative_to(place) for place in within) else outside).append(file)
    if outside:
        names = ", ".join(file.name for file in outside)
        raise BadFile(f"{folder}: links to files outside of it ({names}) are not copied: put the files there")
    return tuple(files)
