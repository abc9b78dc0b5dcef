"""A process that the system kills within a write leaves nothing that is published later, and nothing that stays.

Writes in native code are seen, too: beyond a limit of a file's size the kernel kills the process at the system call.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import regraft
from regraft.core import files

LIMITED = """
import platform, resource, signal, sys
import torch
from regraft import Trajectory
from regraft.core import files
platform.node = lambda: sys.argv[3]
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
tensors = {"w": torch.ones(20_000)}
if sys.argv[1] == "tensors":
    files.write_tensors(files.Path(sys.argv[2]) / "a.safetensors", tensors)
else:
    Trajectory.recorded([tensors, tensors]).save(sys.argv[2])
"""


def write_and_die(kind: str, folder: Path, host: str) -> None:
    code = subprocess.run([sys.executable, "-c", LIMITED, kind, str(folder), host], check=False).returncode
    assert code < 0 and [file for file in folder.iterdir() if file.stat().st_size], "nothing was left to clean"


def test_half_a_file_goes_with_the_next_write(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.node", lambda: "here")
    write_and_die("tensors", tmp_path, "here")
    files.write_tensors(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_half_a_file_of_another_machine_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.node", lambda: "here")
    write_and_die("tensors", tmp_path, "elsewhere")
    files.write_tensors(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_half_an_anchor_goes_with_the_next_save(tmp_path, host):
    """Whoever left it: only the holder of the folder's lock writes there."""
    write_and_die("path", tmp_path, host)
    regraft.Trajectory.linear({"w": torch.zeros(2)}, {"w": torch.ones(2)}, 2).save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_files_are_those_of_safetensors(tmp_path):
    """Tensors of any dtype, size and name, and metadata, are read as they were."""
    tensors = {
        "a": torch.ones(3, dtype=torch.bool), "b.ä": torch.randn(2, 3), "c": torch.tensor(2),
        "d": torch.zeros(0, 4), "e": torch.randn(5).bfloat16(), "f": torch.ones(1, dtype=torch.float64),
        "g": torch.arange(7, dtype=torch.uint8),
    }  # fmt: skip
    files.write_tensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in read)


@pytest.mark.parametrize(
    "tensors", [{"a": torch.ones(2).to_sparse()}, {"\udcff": torch.ones(2)}, {"__metadata__": torch.ones(2)}]
)
def test_what_no_file_can_hold_is_refused_before_writing(tmp_path, tensors):
    with pytest.raises(ValueError, match="tensor"):
        files.write_tensors(tmp_path / "a.safetensors", tensors)
    assert not list(tmp_path.iterdir())
