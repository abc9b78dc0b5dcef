"""Where a checkpoint's tensors lie: files, indices over several, folders; every kind that is not served is refused."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from msgspec import Raw, Struct
from safetensors import SafetensorError, safe_open
from torch import Tensor

from regraft.core.files import BadFile, check_file, parse_json, read_json
from regraft.porting.torch_files import GATHER_FIRST, read_network

IN_FOLDER = (
    "*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt"
)  # fmt: skip

LEFT_BY_TRAINING = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states).*")
"""Files that training loops leave beside the weights."""

ADAPTER = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|hada_w\d|lokr_w\d|vera_lambda_\w)\b")
"""In names of adapters, whose product, not themselves, is added to the weights."""

MERGE_FIRST = "an adapter is no network: merge it first (peft: model.merge_and_unload(), then save_pretrained)"

TORCH = (".bin", ".pt", ".pth", ".ckpt")

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""Of safetensors' names. Quantised weights (8-bit floats) mean nothing without their scales and are refused."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies, and what it is.

    place: of its bytes in a safetensors file: first and behind the last. held: itself, mapped into memory where that
    can be, of a PyTorch file.
    """

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    place: tuple[int, int] = (0, 0)
    held: Tensor | None = None

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def read(self) -> Tensor:
        """A new tensor. Raises BadFile, naming the file, where it cannot be read any more."""
        if self.held is not None:
            return self.held.detach().clone(memory_format=torch.contiguous_format)
        begin, end = self.place
        data = bytearray(end - begin)
        # Not mapped: pages of a mapped file count as the process's memory.
        with self.file.open("rb", buffering=0) as file:
            file.seek(begin)
            if file.readinto(data) != len(data):
                raise BadFile(f"{self.file}: tensor {self.key!r} cannot be read: the file has become shorter")
        if not data:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).view(self.shape)


class _Index(Struct):
    weight_map: dict[str, str]


class _Stored(Struct):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def check_there(path: Path) -> None:
    """Raises OSError, naming the path, where there is no plain file that may be read."""
    is_name = HUB_NAME.fullmatch(str(path)) and path.suffix not in (".safetensors", ".json", *TORCH)
    if is_name and not path.exists():
        where = "no such file or folder (a model of the Hub: download it, and name its folder)"
        raise FileNotFoundError(errno.ENOENT, where, str(path))
    check_file(path)
    path.open("rb").close()


def find_in_folder(folder: Path) -> Path:
    """The only checkpoint of a folder. Raises BadFile for several or an adapter's, FileNotFoundError for none."""
    if (folder / "adapter_config.json").exists():
        raise BadFile(f"{folder} holds an adapter: {MERGE_FIRST}")
    if any(folder.glob("*.distcp")):
        how = "torch.distributed.checkpoint.format_utils.dcp_to_torch_save(FOLDER, FILE)"
        raise BadFile(f"{folder} holds a distributed checkpoint: make one file of it first, by {how}")
    for pattern in IN_FOLDER:
        files = [f for f in sorted(folder.glob(pattern)) if not LEFT_BY_TRAINING.fullmatch(f.name)]
        if len(files) > 1:
            raise BadFile(f"{folder} holds {len(files)} files {pattern}: name one, such as {files[0]}")
        if files:
            return files[0]
    raise FileNotFoundError(errno.ENOENT, f"no checkpoint in the folder ({', '.join(IN_FOLDER)})", str(folder))


def _list_indexed(path: Path, key: str | None, max_memory: int | None) -> tuple[dict[str, Entry], list[str]]:
    """The entries of all files that an index names."""
    try:
        names = read_json(path, _Index, "an index of a sharded checkpoint").weight_map
    except ValueError as problem:
        raise BadFile(str(problem)) from problem
    entries: dict[str, Entry] = {}
    for file in sorted(set(names.values())):
        shard = path.parent / file
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise BadFile(f"{path} names {file!r}, which is outside its folder")
        if not shard.is_file():
            raise BadFile(f"{path} names {file!r}, which is missing")
        for name, entry in list_entries(shard, key, max_memory)[0].items():
            if names.get(name) != file:
                other = f"gives it to {names[name]}" if name in names else "does not name it"
                raise BadFile(f"{file} holds tensor {name!r}, and {path} {other}: write the checkpoint anew, as one")
            entries[name] = entry
    if missing := names.keys() - entries.keys():
        raise BadFile(f"{path} says that tensor {min(missing)!r} is in {names[min(missing)]}, which has none")
    return entries, []


def list_entries(path: Path, key: str | None, max_memory: int | None) -> tuple[dict[str, Entry], list[str]]:
    """Every tensor of a file, or of those that an index names, and notes of what was chosen and left out.

    Raises BadFile, naming file and tensor.
    """
    if path.name.endswith(".index.json"):
        return _list_indexed(path, key, max_memory)
    if path.suffix == ".safetensors":
        return _list_safetensors(path), []
    tensors, notes = read_network(path, key, max_memory)
    for name, tensor in tensors.items():
        if why := _explain_unserved(name, tensor):
            raise BadFile(f"{path}: tensor {name!r} {why}, which is not served")
    return {n: Entry(path, n, t.dtype, tuple(t.shape), held=t) for n, t in tensors.items()}, notes


def _list_safetensors(path: Path) -> dict[str, Entry]:
    check_there(path)
    try:
        with safe_open(path, framework="pt"):
            pass  # checks that the header is whole, and the places of the tensors are the file's
    except (SafetensorError, OSError) as problem:
        raise BadFile(f"{path} is truncated, or no safetensors file ({problem})") from problem
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(size), dict[str, Raw], str(path))
    header.pop("__metadata__", None)
    entries = {}
    for name, text in header.items():
        stored = parse_json(bytes(text), _Stored, f"{path}: tensor {name!r}")
        if stored.dtype not in DTYPES:
            raise BadFile(f"{path}: tensor {name!r} has dtype {stored.dtype}, which is not served")
        begin, end = (8 + size + offset for offset in stored.data_offsets)
        entries[name] = Entry(path, name, DTYPES[stored.dtype], stored.shape, (begin, end))
    return entries


def _explain_unserved(name: str, tensor: Tensor) -> str:
    """Why a tensor of a PyTorch file cannot be written to a safetensors file; "" where it can."""
    if type(tensor).__module__.startswith("torch.distributed"):  # not imported for this: it takes a second
        return f"is one process's part of a distributed tensor ({GATHER_FIRST})"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return "is sparse or nested"
    if tensor.is_quantized:
        return "is quantised"
    if tensor.is_meta:
        return "is on the meta device, without values"
    if tensor.dtype not in DTYPES.values():
        return f"has dtype {str(tensor.dtype).removeprefix('torch.')}"
    if name == "__metadata__" or name != name.encode(errors="replace").decode():
        return "has a name that no safetensors file can hold"
    return ""
