"""The folder of a result: filled beside its place, resumed after a kill, and renamed when it is complete.

Of a result OUT, all in the same folder: ``.OUT.part`` is filled, ``.OUT.lock`` is held meanwhile, and ``.OUT.mark``
has the mark of the filled folder while that is renamed. The mark, ``identity.json`` in ``.OUT.part``, says that the
folder is ours, which one (its inode), and what it is made of; beside a finished file, ``.NAME.sha256`` has its digest.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from regraft.core.files import only_writer, read_sealed, write_sealed, write_tensors
from regraft.core.tensors import Tensors

PART_FORMAT, DIGEST_FORMAT = "regraft-part-1", "regraft-digest-1"
MARK, FOLDER = "identity.json", "folder"


@contextmanager
def beside(out: Path, identity: Mapping[str, Any], *, resume: bool) -> Iterator[Path]:
    """A folder beside ``out`` to fill, which takes its place when the body is done.

    What fails leaves nothing; a kill or an interruption leaves the folder, hidden, for ``resume``, which goes on where
    it was made for an equal ``identity`` (JSON data), or else for the next run to clear away. A failure of the last
    rename leaves the finished folder with its mark, and says where: the next run may clear it away.

    Raises as `check_output`, and ValueError, saying what differs, where what is to be resumed was made for something
    else.
    """
    check_output(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part, moved = part_of(out), _beside(out, "mark")
    with only_writer(out, _beside(out, "lock")):
        if _is_mark_of(part, moved):
            moved.replace(part / MARK)
        moved.unlink(missing_ok=True)
        part.mkdir(exist_ok=True)
        _prepare(part, identity, resume)
        try:
            yield part
            for kept in (*part.glob("*.kept"), *part.glob(".*")):
                kept.unlink()
        except Exception:
            _clear(part, {part / MARK})  # the mark goes last, so that a kill leaves a folder that is known as ours
            (part / MARK).unlink(missing_ok=True)
            part.rmdir()
            raise
        (part / MARK).replace(moved)
        try:
            if out.exists():
                out.rmdir()
            part.rename(out)
        except OSError as problem:
            moved.replace(part / MARK)
            said = f"{out}: cannot be put in its place ({problem.strerror}); the finished result is in {part}: move it"
            raise OSError(problem.errno, said) from problem
        moved.unlink()


def part_of(out: Path) -> Path:
    """Where a result is filled."""
    return _beside(out, "part")


def unfinished_bytes(out: Path) -> int:
    """What an interrupted run holds of the disk."""
    return sum(file.stat().st_size for file in part_of(out).glob("*"))


def _beside(out: Path, what: str) -> Path:
    return out.parent / f".{out.name}.{what}"


def _prepare(part: Path, identity: Mapping[str, Any], resume: bool) -> None:
    """Leave in the folder what may be resumed: files that are as they were finished; all else goes."""
    mark = part / MARK
    begun = read_sealed(mark, PART_FORMAT, dict[str, Any]) if resume and mark.exists() else None
    if begun is not None and (different := sorted(k for k in identity if begun.get(k) != identity[k])):
        raise ValueError(f"{part} was begun with another {' and '.join(different)}: run without --resume")
    finished = {mark, *([] if begun is None else _list_finished(part))}
    _clear(part, finished)
    if begun is None:
        write_sealed(mark, PART_FORMAT, {**identity, FOLDER: part.stat().st_ino})


def _clear(folder: Path, kept: Collection[Path]) -> None:
    for path in folder.iterdir():
        if path not in kept:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _list_finished(part: Path) -> Iterator[Path]:
    """The files with their digests."""
    for digest in part.glob(".*.sha256"):
        file = part / digest.name[1:].removesuffix(".sha256")
        if file.is_file() and _has_digest(file, digest):
            yield from (file, digest)


def _has_digest(file: Path, digest: Path) -> bool:
    try:
        return read_sealed(digest, DIGEST_FORMAT, str) == _sha256(file)
    except ValueError:
        return False


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_output(out: Path) -> None:
    """What can be known of a place for a result before any work.

    Raises OSError, naming the path: FileExistsError unless there is nothing, or an empty folder, which can be renamed
    onto; where the folder to be filled, which would be cleared, is not ours; BlockingIOError where somebody else writes
    there; PermissionError, or another, where nothing can be written or locked.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(errno.EEXIST, "there is something already", str(out))
    if out.is_symlink() or out.name in ("", "..") or os.path.ismount(out):
        raise OSError(errno.EINVAL, f"{out} is no place for a result: give the name of a new folder")
    place = out.absolute().parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is no folder", str(place))
    _check_ours(part_of(out), _beside(out, "mark"))
    with only_writer(out, _beside(place / out.name, "lock")):
        pass


def _check_ours(part: Path, moved: Path) -> None:
    """Raise OSError for what we have not made, or of which that cannot be told."""
    not_ours = "is not what regraft made: move it away, or choose another place for the result"
    for place, mark in ((moved, moved), (part, part / MARK)):
        try:
            if place.is_symlink():
                raise ValueError("a symbolic link")
            read_sealed(mark, PART_FORMAT, dict[str, Any])
        except FileNotFoundError:
            pass
        except (ValueError, OSError) as problem:
            raise FileExistsError(errno.EEXIST, f"{place} {not_ours} ({problem})") from problem
    known = not part.is_dir() or (part / MARK).exists() or _is_mark_of(part, moved)
    if not known and not all(file.name.startswith(f".{MARK}.") for file in part.iterdir()):
        raise FileExistsError(errno.EEXIST, f"{part} {not_ours}")


def _is_mark_of(part: Path, moved: Path) -> bool:
    """Whether a mark was moved out of this very folder: a run was killed between its last two steps."""
    begun = read_sealed(moved, PART_FORMAT, dict[str, Any]) if moved.exists() and part.is_dir() else {}
    return bool(begun) and begun.get(FOLDER) == part.stat().st_ino


def write_once(path: Path, make: Callable[[], Tensors], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a file of the folder of `beside`, and its digest, unless a run before has finished it."""
    digest = path.with_name(f".{path.name}.sha256")
    if not digest.exists():
        write_tensors(path, make(), metadata)
        write_sealed(digest, DIGEST_FORMAT, _sha256(path))


def keep_tensors(folder: Path, name: str, make: Callable[[], Tensors]) -> Tensors:
    """What ``make`` gives, or, where it was kept in a folder of `beside` before, that."""
    path = folder / f"{name}.kept"
    if path.exists():
        return load_file(path)
    made = make()
    write_once(path, lambda: {key: tensor.cpu().contiguous() for key, tensor in made.items()})
    return made
