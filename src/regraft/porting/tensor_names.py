"""Names of tensors as libraries write them: wrappers, prefixes, older forms of the same."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping

INNER_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and checkpointed activations put into names, wherever a module is wrapped."""

OUTER_WRAPPER = "module."
"""What DataParallel and AveragedModel put before every name."""

AVERAGED = "n_averaged"
"""The counter that AveragedModel keeps beside the network."""

PREFIXES = (OUTER_WRAPPER, "model.", "net.")
"""That, and what Lightning modules usually call their network: put before names where the model has them."""

OLD_NAMES = (("_g", "original0"), ("_v", "original1"), ("_orig", "original"), ("_u", "0._u"), ("_v", "0._v"))
"""Of weight and spectral norm: the ends of a name X.weight_g as older hooks write it, and of
X.parametrizations.weight.original0."""


def strip_wrappers(names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """The names without wrappers -> as they are; and what was taken away."""
    kept = [name for name in names if name != AVERAGED] if _is_averaged(names) else list(names)
    bare, taken = {INNER_WRAPPERS.sub("", name): name for name in kept}, []
    if len(bare) < len(kept):  # two names would become one
        return {name: name for name in names}, []
    if wrappers := {part for name in kept for part in INNER_WRAPPERS.findall(name)}:
        taken.append(f"took {', '.join(map(repr, sorted(wrappers)))} away from names")
    if len(kept) < len(names):
        taken.append(f"left out {AVERAGED}: the network is an average")
    outer = ""
    while bare and all(name.startswith(OUTER_WRAPPER) for name in bare):
        bare, outer = (
            {name.removeprefix(OUTER_WRAPPER): own for name, own in bare.items()},
            outer + OUTER_WRAPPER,
        )
    return bare, [*taken, f"took {outer!r} away from all names"] if outer else taken


def _is_averaged(names: Collection[str]) -> bool:
    return AVERAGED in names and all(name.startswith(OUTER_WRAPPER) for name in names if name != AVERAGED)


def count_wanted(names: Collection[str], wanted: Collection[str]) -> Counter[str]:
    """Prefix -> how many of the wanted names there are behind it."""
    counts: Counter[str] = Counter()
    for name in names:
        at = 0
        while True:
            if name[at:] in wanted:
                counts[name[:at]] += 1
            at = name.find(".", at) + 1
            if not at:
                break
    return counts


def rename_forms(names: Collection[str], wanted: Collection[str]) -> Mapping[str, str]:
    """Name -> the other form of it, where that is wanted and the name is not."""
    renamed = {}
    for name in names:
        if name in wanted:
            continue
        for old, new in OLD_NAMES:
            older = re.sub(rf"parametrizations\.([^.]+)\.{re.escape(new)}$", rf"\1{old}", name)
            newer = re.sub(rf"([^.]+){old}$", rf"parametrizations.\1.{new}", name)
            if form := next((form for form in (older, newer) if form != name and form in wanted), None):
                renamed[name] = form
    return renamed
