"""What `make` installs is named in requirements.lock, by version and by hashes, and by nothing else."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_package_has_a_version_and_hashes():
    blocks = re.sub(r"\\\n", " ", re.sub(r"^ *#.*\n", "", LOCK, flags=re.MULTILINE)).splitlines()
    assert len(blocks) > 100
    for block in blocks:
        assert re.match(r"[A-Za-z0-9._-]+==[^ ;]+ ", block), block
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", block), block
    assert "://" not in LOCK and "index" not in LOCK


def test_the_lock_has_what_the_project_asks_for():
    locked = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^ ;]+)", LOCK, flags=re.MULTILINE))
    wanted = [*PROJECT["dependencies"], *(one for extra in PROJECT["optional-dependencies"].values() for one in extra)]
    for requirement in map(Requirement, wanted):
        if requirement.name != "regraft":
            version = locked[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement}, not {version}: run `make lock`"


def test_nothing_is_installed_past_the_lock():
    """In the environment of `make`; the oldest versions, which are another's, are apart."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    installs = [line.strip() for line in makefile.splitlines() if line.startswith("\t@$(PIP)")]
    assert installs == ["@$(PIP) --require-hashes -r requirements.lock", "@$(PIP) --no-deps --no-build-isolation -e ."]
