"""Files: permissions, disks that are full, leftovers of writers that were killed, seals."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from campaigns import subjects
from campaigns.subjects import path
from regraft import Trajectory
from regraft.core import files
from regraft.learning_transfer.trajectory import TRAJECTORY_INDEX
from regraft.symmetry import PermutationSpec
from regraft.training.loop import Epoch
from regraft_bench.rows import append

DEAD = 2**22 + 1  # no process has this number
HOST = platform.node()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_that_the_user_wants(tmp_path, mask):
    before = os.umask(mask)
    try:
        path().save(tmp_path / "path")
        files.write_text(tmp_path / "page.md", "text")
    finally:
        os.umask(before)
    paths = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(paths) == 4
    assert {stat.S_IMODE(file.stat().st_mode) for file in paths} == {0o666 & ~mask}


@pytest.mark.parametrize(("owner", "failing"), [(Path, "open"), (Path, "replace"), (os, "fsync")])
def test_a_full_disk_is_told_with_file_and_bytes_and_leaves_nothing(tmp_path, monkeypatch, owner, failing):
    file = tmp_path / "page.md"
    files.write_text(file, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(owner, failing, full)
    with pytest.raises(OSError, match=r"page.md: its 5 bytes could not be written .*No space") as caught:
        files.write_text(file, "newer")
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert [f.name for f in tmp_path.iterdir()] == ["page.md"] and file.read_text() == "old"


def test_a_path_that_cannot_be_saved_leaves_the_earlier_one(tmp_path, monkeypatch):
    path(0).save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    calls, write = [], files.write_tensors

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "its 84 bytes could not be written")
        write(*arguments)

    monkeypatch.setattr("regraft.learning_transfer.trajectory.write_tensors", full)
    with pytest.raises(OSError, match="bytes"):
        path(1).save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_leftovers_go_at_the_next_start_and_those_of_the_living_and_of_other_machines_stay(tmp_path):
    names = {
        f".page.md.{HOST}-{DEAD}-1.part",
        f".page.md.{HOST}-{os.getpid()}-1.part",
        f".page.md.elsewhere-{DEAD}-1.part",
        f".other.md.{HOST}-{DEAD}-1.part",
        "page.part",
    }
    for name in names:
        (tmp_path / name).write_text("half")
    files.clean(tmp_path / "page.md")
    assert {file.name for file in tmp_path.iterdir()} == names - {f".page.md.{HOST}-{DEAD}-1.part"}


def test_a_killed_saves_leftovers_go_before_anything_is_written(tmp_path, monkeypatch):
    path(0).save(tmp_path)
    orphans = [
        f"{'0' * 24}.safetensors",
        f".{'1' * 24}.safetensors.{HOST}-{DEAD}-1.part",
        f".{TRAJECTORY_INDEX}.{HOST}-{DEAD}-1.part",
    ]
    for name in orphans:
        (tmp_path / name).write_text("half")
    seen = []

    def stopped(*_):
        seen.extend(file.name for file in tmp_path.iterdir())
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("regraft.learning_transfer.trajectory.write_tensors", stopped)
    with pytest.raises(OSError, match="full"):
        path(1).save(tmp_path)
    assert not set(seen) & set(orphans) and len(seen) == 4  # and the lock


def test_one_writer_at_a_time(tmp_path):
    with files.only_writer(tmp_path), pytest.raises(BlockingIOError, match="is being written by somebody"):
        path().save(tmp_path)
    path().save(tmp_path)
    assert Trajectory.open(tmp_path).steps == 4


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=20,
    )
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_sealed_comes_back(tmp_path, content):
    files.write_sealed(tmp_path / "file.json", "form-1", {"content": content})
    content = json.loads(json.dumps(content))
    assert files.read_sealed(tmp_path / "file.json", "form-1", dict) == {"content": content}


@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bit_of_an_index_can_change_unseen(tmp_path, at, bit):
    if not (tmp_path / TRAJECTORY_INDEX).exists():
        path().save(tmp_path)
        (tmp_path / "whole").write_bytes((tmp_path / TRAJECTORY_INDEX).read_bytes())
    data = bytearray((tmp_path / "whole").read_bytes())
    at %= len(data) - 1  # the last byte ends the last line
    data[at] ^= 1 << bit
    if bytes(data).split() == (tmp_path / "whole").read_bytes().split():
        return  # another blank
    (tmp_path / TRAJECTORY_INDEX).write_bytes(data)
    with pytest.raises(ValueError, match=TRAJECTORY_INDEX):
        Trajectory.open(tmp_path)


@given(data=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_break_the_reader(tmp_path, data):
    (tmp_path / "file.json").write_bytes(data)
    for read in (
        lambda file: files.read_sealed(file, "form-1", dict),
        lambda file: files.read_json(file, dict[str, int], "counts"),
    ):
        try:
            read(tmp_path / "file.json")
        except ValueError as problem:
            assert "file.json" in str(problem)
        else:
            assert json.loads(data) is not None
    with pytest.raises((ValueError, OSError), match=r"file\.json"):
        PermutationSpec.load(tmp_path / "file.json")


@pytest.mark.parametrize("content", [{"a": float("nan")}, {"a": object()}, {"a": {1, 2}}])
def test_what_is_no_json_is_not_written(tmp_path, content):
    with pytest.raises(ValueError, match=r"file\.json: not JSON"):
        files.write_sealed(tmp_path / "file.json", "form-1", content)
    assert not list(tmp_path.iterdir())


def test_the_reader_names_the_key():
    with pytest.raises(ValueError, match=r"here: .*`\$\.epoch`"):
        files.parse_json('{"epoch": "x"}', Epoch, "here")


def test_who_wants_what_another_is_at_waits_for_it(tmp_path):
    order = []

    def second():
        with files.alone(tmp_path / "training.lock"):
            order.append("second")

    with files.alone(tmp_path / "training.lock"):
        other = threading.Thread(target=second)
        other.start()
        other.join(0.2)
        assert other.is_alive()
        order.append("first")
    other.join(10)
    assert order == ["first", "second"]


def lock_as_nfs_does(handle, operation):
    """Linux's NFS makes a lock of bytes of it: an exclusive one needs a file that is open for writing."""
    writable = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE
    if operation & fcntl.LOCK_EX and not writable:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def test_a_network_folder_can_be_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lock_as_nfs_does)
    for version in range(2):
        path(version).save(tmp_path / "path")
    assert Trajectory.open(tmp_path / "path").steps == 4
    assert not list(tmp_path.glob("**/.*"))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("lock", ["folder", "file", "rows"])
def test_a_file_system_without_locks_is_told_with_the_path(tmp_path, monkeypatch, number, lock):
    def refuse_lock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse_lock)
    with pytest.raises(OSError, match=r"named.* cannot be locked") as caught:
        if lock == "folder":
            path().save(tmp_path / "named")
        elif lock == "file":
            with files.alone(tmp_path / "named"):
                pass
        else:
            append(tmp_path / "named", subjects.row(0))
    assert caught.value.errno == number
