"""What tests of checkpoints share: the command run in this process, a user's module, small networks on disk."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import MLP, Ended, drawn, near, save


@pytest.fixture
def run(capsys) -> Callable[..., Ended]:
    """Run the command in this process; an error that is not one line for the user fails the test with its traceback."""
    from regraft.cli import main

    def run(*words: object) -> Ended:
        capsys.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as ended:  # of the parser of arguments
            status = ended.code if isinstance(ended.code, int) else 2
        return Ended(status, *capsys.readouterr())

    return run


@pytest.fixture
def python() -> Callable[..., Ended]:
    """Run Python code in a process of its own."""

    def python(code: str, *words: object, cwd: Path | None = None) -> Ended:
        argv = [sys.executable, "-c", code, *map(str, words)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=cwd, check=False)
        return Ended(done.returncode, done.stdout, done.stderr)

    return python


_number = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch) -> Callable[[str], str]:
    """Write a module of the user's where the command is run; returns its name, which no other test uses."""
    monkeypatch.chdir(tmp_path)

    def module(text: str = MLP) -> str:
        name = f"networks_{os.getpid()}_{next(_number)}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return module


@pytest.fixture
def three(tmp_path) -> list[Path]:
    """BASE, a fine-tune of it and NEW_BASE."""
    base, new = drawn(0), drawn(1)
    networks = {"base": base, "tuned": near(base), "new": new}
    return [save(tmp_path / f"{name}.safetensors", tensors) for name, tensors in networks.items()]


@pytest.fixture
def two(tmp_path) -> list[Path]:
    """Two networks of one architecture."""
    return [save(tmp_path / f"{name}.safetensors", drawn(seed)) for seed, name in enumerate("ab")]
