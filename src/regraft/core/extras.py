"""Packages that not every install has: looked for before any work, and named with what installs them."""

from __future__ import annotations

from importlib.util import find_spec

PIP_NAMES = {"vl_convert": "vl-convert-python", "sklearn": "scikit-learn"}
"""Of modules that are called otherwise."""


def describe_install(extra: str) -> str:
    """The command that installs an extra of regraft, which is on no registry."""
    return f"pip install '.[{extra}]' in a checkout of regraft"


def require_packages(what: str, modules: tuple[str, ...], extra: str) -> None:
    """Raise ValueError, naming them, for modules that are not installed. what: needs them. extra: installs them."""
    if missing := [PIP_NAMES.get(name, name) for name in modules if find_spec(name) is None]:
        raise ValueError(f"{what} needs {', '.join(missing)}: {describe_install(extra)}")
