"""Atomic writes and checked reads.

Every file is written under a temporary name, flushed to disk and renamed, so that after a kill there is the old file or
the new one. JSON is parsed against a type (`parse_json`); files that only the library writes carry a hash, too.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

_T = TypeVar("_T")

LARGEST_JSON = 1 << 30
"""Bytes; no JSON file of the library comes near it."""


class BadFile(ValueError):
    """A file is damaged, or does not fit what it is to be used for."""


# ---------------------------------------------------------------- writing


def write_text(path: Path | str, text: str) -> None:
    """Write `text` to `path`, making its folder: the old file or the new one, never a mixture.

    Raises OSError, naming the file and the bytes that it takes, where it cannot be written; nothing is left of it then.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path | str, data: bytes) -> None:
    """The same, of bytes."""
    _write_beside(Path(path), len(data), lambda part: part.write_bytes(data))


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, as `write_text` does. tensors: on the CPU, contiguous, none sharing memory."""
    from safetensors.torch import save_file

    size = sum(tensor.nbytes for tensor in tensors.values())
    _write_beside(path, size, lambda part: save_file(dict(tensors), part, metadata))


def _write_beside(path: Path, size: int, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file next to `path`, flush it to disk, then rename it."""
    from safetensors import SafetensorError

    path.parent.mkdir(parents=True, exist_ok=True)
    clean(path)
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode  # by the umask; safetensors makes files that only their owner can read
        write(part)
        part.chmod(mode)
        with part.open("rb") as handle:
            os.fsync(handle.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as problem:
        number = getattr(problem, "errno", None) or errno.EIO
        raise OSError(number, f"{path}: its {size} bytes could not be written ({problem})") from problem
    finally:
        part.unlink(missing_ok=True)


def clean(path: Path) -> None:
    """Remove temporary files of `path` that killed processes left."""
    own = re.compile(rf"\.{re.escape(path.name)}\.(\d+)-\d+\.part")
    for file in path.parent.iterdir() if path.parent.is_dir() else ():
        match = own.fullmatch(file.name)
        if match and not _is_alive(int(match[1])):
            file.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. Raises BlockingIOError, naming it, if another process holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(errno.EWOULDBLOCK, f"{folder} is being written by somebody else") from None
        yield
    finally:
        os.close(handle)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is created if need be; another process waits for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------- reading


def check_file(path: Path) -> None:
    """Raise FileNotFoundError, or OSError for a folder, a pipe or a device, naming the path."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, f"{path} is not a plain file")


def read_json(path: Path, kind: type[_T], what: str) -> _T:
    """A file's JSON as a ``kind``. Raises as `check_file` and `parse_json`, naming the path and what it should be."""
    check_file(path)
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path}: {path.stat().st_size} bytes are more than any file of its kind has")
    return parse_json(path.read_bytes(), kind, f"{path}: not {what}")


def parse_json(data: bytes | str, kind: type[_T], where: str) -> _T:
    """JSON as a ``kind`` (a msgspec.Struct, a dataclass, a dictionary of ...).

    Raises ValueError that names the place and the key for invalid JSON or UTF-8, unbounded nesting, or another type.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as problem:
        raise ValueError(f"{where}: {problem}") from problem


class _Sealed(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    sha256: str
    content: msgspec.Raw


def write_sealed(path: Path, name: str, content: Any) -> None:
    """Write JSON data, the name of their format and their hash.

    Raises ValueError for what JSON cannot hold (a NaN, an object), and as `write_text`.
    """
    try:
        text = json.dumps(content, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as problem:
        raise ValueError(f"{path}: not JSON data ({problem})") from problem
    seal = json.dumps(hashlib.sha256(text.encode()).hexdigest())
    write_text(path, f'{{"format": {json.dumps(name)}, "sha256": {seal},\n"content": {text}}}\n')


def read_sealed(path: Path, name: str, kind: type[_T]) -> _T:
    """What `write_sealed` wrote, as a ``kind``.

    Raises as `read_json`, and ValueError for another format or a content that does not match its hash.
    """
    what = f"a {name} file"
    sealed = read_json(path, _Sealed, what)
    if sealed.format != name:
        raise ValueError(f"{path}: its format is {sealed.format!r}, not {name!r}")
    if hashlib.sha256(bytes(sealed.content)).hexdigest() != sealed.sha256:
        raise ValueError(f"{path}: its content does not have the hash that was written with it")
    return parse_json(bytes(sealed.content), kind, f"{path}: not {what}")
