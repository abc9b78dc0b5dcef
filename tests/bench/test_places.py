"""Where the suite writes: checked before the first training, and nothing is left in temporary folders."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import tempfile
import types

import pytest

from regraft.cli import main
from regraft_bench.engines import on_ray

BENCH = "bench", "--scenario", "digits-mlp", "--method", "plain", "--seeds", "1", "--rows-only"


@pytest.mark.parametrize("place", ["/proc/regraft/deeper", "file", "file/results", "no locks"])
def test_results_that_cannot_be_written_are_said_before_any_training(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    if place == "no locks":

        def refuse_lock(*_):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", refuse_lock)
    assert main([*BENCH, "--results", place, "--cache", "cache"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and place.partition("/")[0] in said
    assert not (tmp_path / "cache").exists()


def test_a_bench_without_a_cache_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    assert main([*BENCH, "--results", str(tmp_path / "results")]) == 0
    assert not list((tmp_path / "tmp").glob("regraft-*"))  # torch keeps what it compiles there


@pytest.mark.parametrize(("address", "node"), [(None, "127.0.0.1"), ("10.0.0.1:6379", None)])
def test_a_ray_of_our_own_listens_on_loopback_alone(monkeypatch, address, node):
    seen = {}

    def init(**options):
        seen.update(options)
        raise ValueError("started")

    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(is_initialized=lambda: False, init=init))
    if address is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match="started"):
        next(on_ray([object()]))
    assert seen.get("_node_ip_address") == node


def start_no_driver():
    raise RuntimeError("Found no NVIDIA driver on your system.")


@pytest.mark.parametrize("device", ["foo", "meta", "cuda"])
def test_a_device_that_is_not_there_is_said_before_any_training(device, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda._lazy_init", start_no_driver)
    assert main([*BENCH, "--results", str(tmp_path / "results"), "--device", device]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and repr(device) in said
    assert not (tmp_path / "results").exists()
