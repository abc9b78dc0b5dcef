"""A result goes to a folder of its own: nothing of others is touched, and what cannot be written is said first."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from checkpoints import drawn, files, near, one_line, save, written

import regraft

VERBS = ["port", "match", "fuse"]


@pytest.fixture
def words(tmp_path, module):
    """(verb, out) -> the words of a command that writes there."""
    base, new = drawn(0), drawn(1)
    made = {"base": base, "tuned": near(base), "new": new}
    for name, tensors in made.items():
        save(tmp_path / f"{name}.safetensors", tensors)
    model = ["--model", f"{module()}:mlp", "--shape", 1, 6]

    def words(verb: str, out: Path | str) -> list[object]:
        b, t, n = (tmp_path / f"{name}.safetensors" for name in made)
        return {
            "port": ["port", b, t, n, "--method", "weights", *model, "--out", out],
            "match": ["match", b, n, *model, "--out", out],
            "fuse": ["fuse", b, n, "--weights", ".5", ".5", "--out", out],
        }[verb]

    return words


@pytest.mark.parametrize("verb", VERBS)
def test_a_hidden_folder_of_somebody_else_stays(verb, tmp_path, run, words):
    """`.OUT.part` with files and without our mark belongs to somebody else: refused by name, all files stay."""
    other = tmp_path / ".out.part"
    (other / "deep").mkdir(parents=True)
    (other / "thesis.txt").write_text("years of work")
    (other / "deep" / "notes.txt").write_text("more of it")
    done = run(*words(verb, tmp_path / "out"))
    assert files(other) == {"thesis.txt", "deep/notes.txt"}
    one_line(done, ".out.part")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", [[], ["--resume"]])
@pytest.mark.parametrize("verb", VERBS)
def test_a_symlink_in_place_of_the_hidden_folder_is_refused(verb, flag, tmp_path, run, words):
    """`.OUT.part` that is a symlink: what it points to is not emptied."""
    other = tmp_path / "home"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    (tmp_path / ".out.part").symlink_to(other)
    done = run(*words(verb, tmp_path / "out"), *flag)
    assert files(other) == {"thesis.txt"}
    one_line(done, ".out.part")


@pytest.mark.parametrize("verb", VERBS)
def test_a_plain_file_in_place_of_the_hidden_folder_is_refused(verb, tmp_path, run, words):
    """`.OUT.part` that is a file of somebody's stays as it is."""
    (tmp_path / ".out.part").write_text("mine")
    one_line(run(*words(verb, tmp_path / "out")), ".out.part")
    assert (tmp_path / ".out.part").read_text() == "mine"


def test_an_index_of_somebody_elses_is_no_mark_of_ours(tmp_path, run, words):
    """A file called as our mark, but without its seal, does not make a folder ours."""
    other = tmp_path / ".out.part"
    other.mkdir()
    (other / "identity.json").write_text('{"name": "somebody"}')
    (other / "thesis.txt").write_text("years of work")
    one_line(run(*words("fuse", tmp_path / "out")), ".out.part")
    assert files(other) == {"identity.json", "thesis.txt"}


def test_an_empty_hidden_folder_may_be_used(tmp_path, run, words):
    """An empty `.OUT.part` is nobody's loss."""
    (tmp_path / ".out.part").mkdir()
    assert run(*words("fuse", tmp_path / "out")).status == 0
    assert written(tmp_path / "out")


@pytest.fixture
def work(monkeypatch):
    """How many shards were renamed into place."""
    count, replace = [], os.replace

    def counted(source, target, **options):
        count.append(Path(target).name)
        return replace(source, target, **options)

    monkeypatch.setattr(os, "replace", counted)
    return count


@pytest.mark.parametrize("kind", ["dangling symlink", "symlink to an empty folder", ".", "./", ".."])
@pytest.mark.parametrize("verb", VERBS)
def test_a_place_that_cannot_be_renamed_onto_is_refused_before_work(
    verb, kind, tmp_path, run, words, work, monkeypatch
):
    """--out that is a symlink, or the working directory: said at once, before any shard is written."""
    out: Path | str = tmp_path / "out"
    if kind.startswith("."):
        empty = tmp_path / "empty"
        (empty / "inner").mkdir(parents=True)
        place = empty / "inner" if kind == ".." else empty
        if kind != "..":
            (empty / "inner").rmdir()
        command = words(verb, kind)
        module = next((str(w).partition(":")[0] for w in command if ":mlp" in str(w)), None)
        if module:  # the user's module stands where the command is run
            monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.chdir(place)
    else:
        (tmp_path / "target").mkdir()
        Path(out).symlink_to(tmp_path / ("target" if "empty" in kind else "nowhere"))
        command = words(verb, out)
    done = run(*command)
    one_line(done)
    assert work == []


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EACCES])
@pytest.mark.parametrize("verb", VERBS)
def test_a_failed_last_rename_keeps_what_is_finished(verb, number, tmp_path, run, words, monkeypatch):
    """Where only the last rename fails (a mount point), the finished folder stays, and the message says where."""
    rename, replace = os.rename, os.replace

    def refuse(step):
        def refused(source, target, **options):
            if Path(source).is_dir():
                raise OSError(number, os.strerror(number), str(source), None, str(target))
            return step(source, target, **options)

        return refused

    monkeypatch.setattr(os, "rename", refuse(rename))
    monkeypatch.setattr(os, "replace", refuse(replace))
    done = run(*words(verb, tmp_path / "out"))
    kept = [path for path in tmp_path.iterdir() if path.is_dir() and list(path.glob("*.safetensors"))]
    assert len(kept) == 1, "the finished folder was deleted"
    one_line(done, kept[0].name)


@pytest.fixture
def interrupted_on_a_full_disk(tmp_path, run, words, monkeypatch):
    """A sum that was interrupted before its index was there, and from then on a disk without room."""
    replace = os.replace

    def interrupted(source, target, **options):
        if str(target).endswith("index.json"):
            raise KeyboardInterrupt
        return replace(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        assert run(*words("fuse", tmp_path / "out")).status == 130
    assert (tmp_path / ".out.part").is_dir()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))


@pytest.mark.usefixtures("interrupted_on_a_full_disk")
def test_what_an_interrupted_run_holds_is_named_where_the_disk_is_full(tmp_path, run, words):
    """A leftover `.OUT.part` takes room: the refusal for too little disk names it."""
    one_line(run(*words("fuse", tmp_path / "out")), ".out.part")


@pytest.mark.usefixtures("interrupted_on_a_full_disk")
def test_resuming_needs_no_room_for_what_is_written_already(tmp_path, run, words):
    """With --resume, finished shards do not count against the disk a second time."""
    assert run(*words("fuse", tmp_path / "out"), "--resume").status == 0


def test_the_library_refuses_the_same_places(tmp_path):
    """`regraft.fuse_checkpoints` and the command agree on what a place for a result is."""
    path = save(tmp_path / "a.safetensors", drawn(0))
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="out"):
        regraft.fuse_checkpoints([path], [1.0], tmp_path / "out")
    assert not (tmp_path / ".out.part").exists() and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("flag", [[], ["--resume"]])
@pytest.mark.parametrize("verb", VERBS)
def test_what_a_failed_rename_left_does_not_stand_in_the_way(verb, flag, tmp_path, run, words, monkeypatch):
    """The finished folder keeps our mark, so that the next run takes its place instead of refusing it for ever."""

    def refuse(source, target, **options):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    with monkeypatch.context() as broken:
        broken.setattr(os, "rename", refuse)
        said = one_line(run(*words(verb, tmp_path / "out")), ".out.part")
    assert "the finished result is in" in said
    assert run(*words(verb, tmp_path / "out"), *flag).status == 0 and written(tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("name", [".out.mark", ".out.lock"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_files_of_somebody_else_with_names_of_ours_stay(name, kind, tmp_path, run, words):
    """`.OUT.mark` and `.OUT.lock` with a content, or as links, are neither overwritten nor removed."""
    (tmp_path / "thesis.txt").write_text("years of work")
    if kind == "link":
        (tmp_path / name).symlink_to(tmp_path / "thesis.txt")
    else:
        (tmp_path / name).write_text("years of work")
    one_line(run(*words("fuse", tmp_path / "out")), name)
    assert (tmp_path / name).read_text() == "years of work" and (tmp_path / name).is_symlink() == (kind == "link")


def test_a_mark_that_outlived_its_folder_makes_no_other_ours(tmp_path, run, words, monkeypatch):
    """A kill after the rename leaves `.OUT.mark`: a folder that somebody makes later stays."""
    unlink = Path.unlink

    def die(path, **options):
        if path.name == ".out.mark" and path.exists():
            raise RuntimeError("killed")
        unlink(path, **options)

    with monkeypatch.context() as dying, pytest.raises(RuntimeError):
        dying.setattr(Path, "unlink", die)
        run(*words("fuse", tmp_path / "out"))
    assert (tmp_path / ".out.mark").exists()
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "thesis.txt").write_text("years of work")
    one_line(run(*words("fuse", tmp_path / "out")), ".out.part")
    assert files(tmp_path / ".out.part") == {"thesis.txt"}


def test_a_place_within_a_file_is_said_as_that(tmp_path, run, words):
    """--out FILE/NAME: the file is no folder."""
    assert "no folder" in one_line(run(*words("fuse", tmp_path / "base.safetensors" / "out")), "base.safetensors")
