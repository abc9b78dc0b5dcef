"""The recipe of a merge: a YAML file beside its result, from which `regraft fuse --recipe` makes it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from regraft.core.files import LARGEST_JSON, BadFile, check_file
from regraft.fusion.merging import Density
from regraft.porting.model_spec import Settings

RECIPE = "recipe.yaml"

NAMED = ("method", "base", "density", "seed", "model", "spec", "data", "key")
"""Of the settings, those that decide what is merged, by the names they have in a recipe."""


class FuseSettings(Settings, total=False):
    """What `fuse_checkpoints` takes besides the networks: `Settings`, and

    method: of `regraft.fusion.merging.MERGE_METHODS`; "sum" if not given. "fisher" and "greedy-soup" need ``data``.
    base: the checkpoint that all networks were trained from, which "ties" and "dare" need.
    density: the share of a change that "ties" and "dare" keep; the method's own if not given.
    seed: of what "dare" and "fisher" draw; 0 if not given.
    """

    method: str
    base: Path | str | None
    density: Density | None
    seed: int


class MergeRecipe(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What is merged, and how. Paths are as they were given, so a recipe is run from the same folder.

    Its fields are the options of `regraft fuse`.
    """

    networks: list[str]
    method: str = "sum"
    weights: list[float] | None = None
    base: str | None = None
    density: float | None = None
    seed: int = 0
    align: bool = False
    model: str | None = None
    shape: list[int] | None = None
    spec: str | None = None
    data: str | None = None
    key: str | None = None

    @classmethod
    def of(
        cls, networks: Sequence[Path | str], weights: Sequence[float] | None, align: bool, settings: Mapping[str, Any]
    ) -> MergeRecipe | None:
        """None where something that was given is an object of Python, and not its name."""
        named = {key: settings[key] for key in NAMED if settings.get(key) is not None}
        shape = settings.get("inputs")
        if shape is not None and not (isinstance(shape, Sequence) and all(isinstance(n, int) for n in shape)):
            return None
        if not all(isinstance(value, str | Path | int | float) for value in named.values()):
            return None
        named = {key: str(value) if isinstance(value, Path) else value for key, value in named.items()}
        listed = None if weights is None else [float(weight) for weight in weights]
        return cls(
            [str(path) for path in networks],
            weights=listed,
            align=align,
            shape=None if shape is None else list(shape),
            **named,
        )

    @classmethod
    def read(cls, path: Path | str) -> MergeRecipe:
        """Raises OSError where there is no file, BadFile, naming the path, for anything but a recipe."""
        path = Path(path)
        check_file(path)
        if path.stat().st_size > LARGEST_JSON:
            raise BadFile(f"{path}: {path.stat().st_size} bytes are more than a recipe has")
        try:
            return msgspec.yaml.decode(path.read_bytes(), type=cls)
        except (msgspec.MsgspecError, ValueError, RecursionError) as problem:
            raise BadFile(f"{path}: not a recipe of regraft fuse: {' '.join(str(problem).split())}") from problem

    def to_yaml(self) -> str:
        """As a file's text."""
        return msgspec.yaml.encode(self).decode()

    def settings(self, model: str | None = None, data: str | None = None) -> FuseSettings:
        """Its part of `FuseSettings`; ``model`` and ``data`` take the place of its own.

        Raises ValueError where it names a ``module:function`` itself: what a file says is not run.
        """
        named = {key: getattr(self, key) for key in NAMED}
        for key, given in (("model", model), ("data", data)):
            if given is not None:
                named[key] = given
            elif named[key] is not None and ":" in named[key] and not Path(named[key]).exists():
                raise ValueError(f"the recipe names code: if you trust it, say so by --{key} {named[key]}")
        return cast(FuseSettings, {"inputs": self.shape, **named})
