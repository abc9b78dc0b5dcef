"""What reproduces the papers and compares methods: scenarios, methods, tables and figures over one runner.

STUDIES: transfer, fusion, fast, micro; a study is imported when it is asked for.
"""

from __future__ import annotations

from importlib import import_module

from regraft.studies.study import Study, nearest

STUDIES = ("transfer", "fusion", "fast", "micro")


def study(name: str) -> Study:
    """A study by its name. Raises ValueError, with the nearest names, for an unknown one."""
    if name not in STUDIES:
        raise ValueError(f"there is no study {name!r}{nearest(name, STUDIES)}")
    return import_module(f"regraft.studies.{name}").STUDY
