"""The studies by name: transfer, fusion, fast, micro. A study is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

from regraft_bench.study import Study, nearest

STUDIES = ("transfer", "fusion", "fast", "micro")


def study(name: str) -> Study:
    """A study by its name. Raises ValueError, with the nearest names, for an unknown one."""
    if name not in STUDIES:
        raise ValueError(f"there is no study {name!r}{nearest(name, STUDIES)}")
    return import_module(f"regraft_bench.{name}").STUDY
