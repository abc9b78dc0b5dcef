"""Atomic writes and checked reads.

Every file is written under a temporary name, flushed to disk and renamed, so that after a kill there is the old file or
the new one. JSON is parsed against a type (`parse_json`); files that only the library writes carry a hash, too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from filelock import lock_descriptor

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
    _write_beside(Path(path), [data])


SAFETENSORS_TYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "complex64": "C64",
}  # fmt: skip
"""The dtypes of files that are written, by their names in torch."""


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, as `write_text` does. tensors: on the CPU, contiguous.

    The library safetensors would write through a temporary file of its own, which a kill leaves behind.
    Raises ValueError, naming the tensor, for a dtype that such files do not have.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end, ordered = 0, sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # each is aligned
    for name in ordered:
        tensor, begin = tensors[name], end
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in SAFETENSORS_TYPES or name == "__metadata__" or str(tensor.layout) != "torch.strided":
            raise ValueError(f"{path}: tensor {name!r} of dtype {dtype} has no form in safetensors")
        end += tensor.nbytes
        header[name] = {
            "dtype": SAFETENSORS_TYPES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as problem:
        raise ValueError(f"{path}: a tensor's name is no text ({problem})") from problem
    text += b" " * (-len(text) % 8)
    data = (tensor_bytes(tensors[name]) for name in ordered)
    start: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
    _write_beside(path, chain(start, data), 8 + len(text) + end)


def tensor_bytes(tensor: Any) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    import torch

    # numpy has no bfloat16: view the bytes as uint8
    data: memoryview = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return data


def _write_beside(path: Path, chunks: Iterable[bytes | memoryview], size: int | None = None) -> None:
    """Write the chunks to a temporary file next to `path`, flush it to disk, then rename it."""
    if size is None:
        chunks = list(chunks)
        size = sum(map(len, chunks))
    path.parent.mkdir(parents=True, exist_ok=True)
    clean(path)
    part = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}-{threading.get_ident()}.part")
    try:
        with part.open("wb") as handle:
            for chunk in chunks:
                handle.write(chunk)
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(path)
    except OSError as problem:
        number = problem.errno or errno.EIO
        raise OSError(number, f"{path}: its {size} bytes could not be written ({problem})") from problem
    finally:
        part.unlink(missing_ok=True)


def clean(path: Path) -> None:
    """Remove temporary files of `path` that killed processes of this machine left: of another, numbers say nothing."""
    own = re.compile(rf"\.{re.escape(path.name)}\.{re.escape(platform.node())}-(\d+)-\d+\.part")
    for file in path.parent.iterdir() if path.parent.is_dir() else ():
        match = own.fullmatch(file.name)
        if match and not _is_alive(int(match[1])):
            file.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # signal 0 is Ctrl-C there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextmanager
def only_writer(folder: Path, lock: Path | None = None, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder: of a file in it, or of ``lock``, which is removed afterwards.

    Network file systems lock no folders. Raises BlockingIOError, naming the folder, if another process holds it (unless
    it waits), and OSError, naming it too, where the file system has no locks.
    """
    lock = lock or folder / ".lock"
    handle = _open_locked(lock, folder, wait)
    try:
        yield
    finally:
        if os.name != "nt":
            lock.unlink(missing_ok=True)
        os.close(handle)
        if os.name == "nt":  # no open file can be removed there, and so not one that the next has
            with suppress(OSError):
                lock.unlink()


def _open_locked(lock: Path, folder: Path, wait: bool) -> int:
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode) or os.fstat(handle).st_size:
                raise FileExistsError(errno.EEXIST, f"{lock} is no lock that regraft made: move it away")
            lock_file(handle, folder, wait=wait)
            if os.path.samestat(os.fstat(handle), lock.stat()):
                return handle
        except FileNotFoundError:  # its holder has removed it between the two calls
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is created if need be; another process waits for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        lock_file(handle.fileno(), path)
        yield


def lock_file(handle: int, path: Path, *, wait: bool = True) -> None:
    """Lock an open file. Raises OSError, naming the path, where somebody else has it (unless it waits), or where the
    file system has no locks."""
    try:
        locked = lock_descriptor(handle, blocking=wait, poll_interval=0.01)
    except OSError as problem:
        raise OSError(problem.errno, f"{path} cannot be locked here ({problem.strerror})") from problem
    if not locked:
        raise BlockingIOError(errno.EWOULDBLOCK, f"{path} is being written by somebody else")


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


# ---------------------------------------------------------------- code


def tree_hash(folder: Path) -> str:
    """Git's hash of the folder as a tree, from the files that lie there (compiled ones and hidden ones apart)."""
    entries = []
    for path in folder.iterdir():
        if path.name.startswith((".", "__pycache__")) or path.suffix == ".pyc":
            continue
        if path.is_dir():
            inner = tree_hash(path)
            if inner != _EMPTY_TREE:
                entries.append((path.name + "/", b"40000 " + path.name.encode(), inner))
        else:
            mode = b"100755 " if os.access(path, os.X_OK) else b"100644 "
            entries.append((path.name, mode + path.name.encode(), _git_hash(b"blob", path.read_bytes())))
    tree = b"".join(head + b"\0" + bytes.fromhex(name) for _, head, name in sorted(entries))
    return _git_hash(b"tree", tree)


def _git_hash(kind: bytes, data: bytes) -> str:
    return hashlib.sha1(kind + b" %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


_EMPTY_TREE = _git_hash(b"tree", b"")
