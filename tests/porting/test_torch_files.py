"""PyTorch files: every value comes back as torch reads it, or the file is refused by name; and it takes an end."""

from __future__ import annotations

import argparse
import collections
import pickle
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import drawn, one_line, save, written

import regraft
from regraft.porting import stored_tensors


@pytest.fixture
def limit():
    """A test that takes longer is stopped, by an exception that nothing takes for an answer."""

    def stop(*_):
        raise KeyboardInterrupt("took too long")

    before = signal.signal(signal.SIGALRM, stop)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def fused(run, tmp_path, *paths: Path, status: int = 0):
    """What `regraft fuse` makes of one file (weight 1): its own tensors."""
    weights = [1 / len(paths)] * len(paths)
    done = run("fuse", *paths, "--weights", *weights, "--out", tmp_path / "out")
    assert done.status == status, done.text
    return written(tmp_path / "out")


def repacked(path: Path, compressed: str) -> Path:
    """The same zip with some of its records compressed."""
    made = path.with_name(f"compressed{path.suffix}")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w") as new:
        for number, record in enumerate(old.infolist()):
            chosen = {
                "all": True,
                "pickle": record.filename.endswith(".pkl"),
                "tensors": "/data/" in record.filename,
                "one tensor": record.filename.endswith("/data/0"),
                "all but one": number,
            }[compressed]
            new.writestr(record.filename, old.read(record), zipfile.ZIP_DEFLATED if chosen else zipfile.ZIP_STORED)
    return made


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt"])
@pytest.mark.parametrize("compressed", ["all", "pickle", "tensors", "one tensor", "all but one"])
def test_compressed_records_are_read_as_torch_reads_them(compressed, suffix, tmp_path, run):
    """A zip tool compressed a .pt file: its values, not its compressed bytes, are what is read."""
    path = repacked(save(tmp_path / f"a{suffix}", drawn(0)), compressed)
    expected = torch.load(path, weights_only=True)
    for name, tensor in fused(run, tmp_path, path).items():
        assert torch.equal(tensor, expected[name])


def test_one_compressed_shard_among_stored_ones(tmp_path, run):
    """The same in an index over several .bin files."""
    import json

    tensors = drawn(0)
    names = list(tensors)
    parts = {"one.bin": names[:2], "two.bin": names[2:]}
    for file, own in parts.items():
        save(tmp_path / file, {name: tensors[name] for name in own})
    repacked(tmp_path / "two.bin", "all").replace(tmp_path / "two.bin")
    where = {name: file for file, own in parts.items() for name in own}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    for name, tensor in fused(run, tmp_path, tmp_path / "pytorch_model.bin.index.json").items():
        assert torch.equal(tensor, tensors[name])


def in_itself(kind: str) -> object:
    tensors = drawn(0)
    if kind == "dictionary":
        held: dict = dict(tensors)
        held["model"] = held
        return held
    if kind == "dictionary, under another key":
        held = dict(tensors)
        held["own"] = held
        return held
    if kind == "two dictionaries":
        one, two = {"model": None}, {"state_dict": None}
        one["model"], two["state_dict"] = two, one
        return one
    if kind == "ordered dictionary":
        ordered = collections.OrderedDict(tensors)
        ordered["state_dict"] = ordered
        return ordered
    if kind == "list":
        items: list = []
        items.append(items)
        return {"optimizer": items, **tensors}
    if kind == "list alone":
        items = []
        items.append(items)
        return items
    if kind == "two lists":
        one_list: list = []
        two_list = [one_list]
        one_list.append(two_list)
        return {"model": tensors, "history": one_list}
    first: list = []
    first.append((first,))
    return {"model": tensors, "args": first}


@pytest.mark.parametrize(
    "kind",
    [
        "dictionary", "dictionary, under another key", "two dictionaries", "ordered dictionary", "list", "list alone",
        "two lists", "tuple",
    ],
)  # fmt: skip
def test_what_holds_itself_comes_to_an_end(kind, tmp_path, run, limit):
    """Containers that contain themselves: the tensors beside them are read, or the file is refused; soon."""
    torch.save(in_itself(kind), tmp_path / "a.pt")
    run("--version")
    limit(10)
    done = run("fuse", tmp_path / "a.pt", "--weights", 1, "--out", tmp_path / "out")
    assert "took too long" not in done.text and done.status != 130
    if done.status:
        one_line(done, "a.pt")


def resident() -> int:
    import os

    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "kind", ["compressed zeros", "compressed bytes beside", "compressed pickle", "expanded", "half and expanded"]
)
def test_what_unpacks_to_more_than_the_memory_is_refused(kind, tmp_path, run):
    """A small file whose tensors are large: --max-memory is checked before they are made."""
    count = 60_000_000
    path = tmp_path / "a.pt"
    if kind == "compressed zeros":
        torch.save({"w": torch.zeros(count)}, path)
        large, path = path, repacked(path, "all")
        large.unlink()
    elif kind == "compressed pickle":
        torch.save({"w": torch.zeros(3)}, tmp_path / "small.pt")
        with zipfile.ZipFile(tmp_path / "small.pt") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name) + bytes(4 * count if name.endswith("data.pkl") else 0))
    elif kind == "compressed bytes beside":
        torch.save({"w": torch.zeros(3)}, path)
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
            root = file.namelist()[0].partition("/")[0]
            file.writestr(f"{root}/data/9", bytes(count))
    else:
        dtype = torch.float16 if "half" in kind else torch.float32
        torch.save({"w": torch.ones(1, dtype=dtype).expand(count), "v": torch.ones(3, dtype=dtype)}, path)
    assert path.stat().st_size < 3_000_000
    allowed = resident() + 100_000_000
    done = run("fuse", path, "--weights", 1, "--out", tmp_path / "out", "--max-memory", allowed)
    if kind == "compressed bytes beside":  # what no tensor needs is not unpacked
        assert done.status == 0
    else:
        assert "memory" in one_line(done, status=[1])


@pytest.mark.parametrize("where", ["alone", "beside the weights", "deep inside"])
def test_a_namespace_of_arguments_is_read(where, tmp_path, run):
    """Reference training scripts keep their `args` beside the weights: a Namespace of numbers and words is no code."""
    args = argparse.Namespace(lr=0.1, name="run", layers=[1, 2])
    if where == "deep inside":
        args = argparse.Namespace(inner=argparse.Namespace(lr=0.1))
    held = {"args": args} | ({} if where == "alone" else {"model": drawn(0)})
    torch.save(held, tmp_path / "a.pt")
    if where == "alone":
        one_line(run("fuse", tmp_path / "a.pt", "--weights", 1, "--out", tmp_path / "out"), "a.pt", "no tensor")
        return
    for name, tensor in fused(run, tmp_path, tmp_path / "a.pt").items():
        assert torch.equal(tensor, drawn(0)[name])


class Config:
    """A class of the user's training script."""


class Flags(dict):
    """Another."""


def counting(x: int) -> int:
    return x + 1


FOREIGN = {
    "object": (Config, "Config"),
    "subclass": (Flags, "Flags"),
    "path": (lambda: Path("/somewhere"), "Path"),
    "function": (lambda: counting, "counting"),
    "module": (lambda: torch.nn.Linear(2, 2), "Linear"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_run_is_named(kind, tmp_path, run):
    """A file with an object of a class: one sentence of ours with that class's name, whole words, no terminal codes."""
    make, name = FOREIGN[kind]
    torch.save({"model": drawn(0), "extra": make()}, tmp_path / "a.pt")
    said = one_line(run("fuse", tmp_path / "a.pt", "--weights", 1, "--out", tmp_path / "out"), "a.pt", name, status=[1])
    assert "\x1b" not in said
    for of_torch in ("WeightsUnpickler", "weights_only", "Please file an issue", "re-running"):
        assert of_torch not in said
    assert "state_dict" in said or "safetensors" in said, "nothing says how to save without it"


def test_a_pickle_that_would_run_code_is_named(tmp_path, run):
    """A reduction to os.system is not run, and the message says what it would have called."""

    class Attack:
        def __reduce__(self):
            import os

            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"model": drawn(0), "extra": Attack()}, tmp_path / "a.pt")
    one_line(
        run("fuse", tmp_path / "a.pt", "--weights", 1, "--out", tmp_path / "out"),
        "a.pt",
        "system",
        status=[1],
    )
    assert not (tmp_path / "ran").exists()


def test_an_old_pickle_without_a_zip_is_read(tmp_path, run):
    """The format of torch before 1.6."""
    torch.save(drawn(0), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    for name, tensor in fused(run, tmp_path, tmp_path / "a.pt").items():
        assert torch.equal(tensor, drawn(0)[name])


@pytest.mark.parametrize("held", [b"", b"PK", pickle.dumps({"w": 1}), b"\x80\x02K\x01."])
def test_what_is_no_torch_file_is_one_sentence(held, tmp_path, run):
    """Empty, half a zip, or a plain pickle."""
    (tmp_path / "a.pt").write_bytes(held)
    one_line(run("fuse", tmp_path / "a.pt", "--weights", 1, "--out", tmp_path / "out"), "a.pt", status=[1])


def special(kind: str) -> torch.Tensor:
    full = torch.arange(48.0).view(8, 6)
    return {
        "sparse": lambda: full.to_sparse(),
        "sparse rows": lambda: full.to_sparse_csr(),
        "meta": lambda: full.to("meta"),
        "quantised": lambda: torch.quantize_per_tensor(full, 0.1, 0, torch.qint8),
        "quantised by channel": lambda: torch.quantize_per_channel(full, torch.ones(8), torch.zeros(8), 0, torch.qint8),
        "float8": lambda: full.to(torch.float8_e4m3fn),
        "float8, the other": lambda: full.to(torch.float8_e5m2),
        "complex": lambda: full.to(torch.complex64),
        "double complex": lambda: full.to(torch.complex128),
        "uint16": lambda: full.to(torch.uint16),
        "uint32": lambda: full.to(torch.uint32),
        "uint64": lambda: full.to(torch.uint64),
    }[kind]()


KINDS = [
    "sparse", "sparse rows", "meta", "quantised", "quantised by channel", "float8", "float8, the other", "complex",
    "double complex", "uint16", "uint32", "uint64",
]  # fmt: skip


@pytest.mark.parametrize("verb", ["fuse", "match"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_tensor_is_carried_or_refused_when_it_is_opened(kind, verb, tmp_path, run, module):
    """Layouts and dtypes: written as they are, or refused by file and tensor; no hidden folder, no traceback."""
    tensors = drawn(0) | {"0.weight": special(kind)}
    torch.save(tensors, tmp_path / "a.pt")
    how = [] if verb == "fuse" else ["--model", f"{module()}:mlp", "--shape", 1, 6]
    files = [tmp_path / "a.pt", *([tmp_path / "a.pt"] if verb == "match" else [])]
    weights = ["--weights", 1] if verb == "fuse" else []
    done = run(verb, *files, *weights, *how, "--out", tmp_path / "out")
    if done.status == 0:
        assert written(tmp_path / "out")["0.weight"].dtype == tensors["0.weight"].dtype
        return
    said = one_line(done, "a.pt", "0.weight", status=[1])
    assert ".part" not in said


DTYPES = {
    "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "complex64": torch.complex64,
    "uint16": torch.uint16, "uint32": torch.uint32, "uint64": torch.uint64, "float4_e2m1fn_x2": None,
}  # fmt: skip


@pytest.mark.parametrize("name", DTYPES)
def test_a_dtype_of_a_safetensors_file_is_carried_or_refused_when_it_is_opened(name, tmp_path, run):
    """The same of safetensors files."""
    dtype = DTYPES[name] or getattr(torch, name, None)
    if dtype is None:
        pytest.skip("this torch has no such dtype")
    value = torch.zeros(4, 4, dtype=torch.uint8).view(dtype) if "float4" in name else torch.ones(4, 4).to(dtype)
    try:
        path = save(tmp_path / "a.safetensors", {"v": torch.ones(2), "w": value})
    except (KeyError, ValueError, RuntimeError) as problem:
        pytest.skip(f"safetensors cannot save it: {problem}")
    done = run("fuse", path, "--weights", 1, "--out", tmp_path / "out")
    if done.status == 0:
        assert written(tmp_path / "out")["w"].dtype == dtype
    else:
        assert ".part" not in one_line(done, "a.safetensors", "'w'", status=[1])


NAMES = ["\ud800", "__metadata__", "", "a\x00b", "x" * 10_000]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_cannot_be_written_is_refused_when_it_is_opened(name, tmp_path, run):
    """Names that a safetensors file cannot hold: refused with the file's name before anything is written."""
    torch.save({"w": torch.ones(3), name: torch.ones(2)}, tmp_path / "a.pt")
    done = run("fuse", tmp_path / "a.pt", "--weights", 1, "--out", tmp_path / "out")
    if done.status == 0:
        assert written(tmp_path / "out").keys() == {"w", name}
    else:
        assert ".part" not in one_line(done, "a.pt", status=[1])


def test_keys_that_are_one_name_are_refused(tmp_path, run):
    """The number 1 and the text "1" would be one tensor's name: one of them would be lost."""
    torch.save({1: torch.ones(2), "1": torch.zeros(2)}, tmp_path / "a.pt")
    one_line(run("fuse", tmp_path / "a.pt", "--weights", 1, "--out", tmp_path / "out"), "a.pt", "1", status=[1])


def test_all_integers_are_one_sentence(tmp_path, run):
    """A file without a floating tensor: says so, by name."""
    for name in ("a", "b"):
        save(
            tmp_path / f"{name}.safetensors",
            {"codes": torch.arange(6), "other": torch.ones(2, dtype=torch.int32)},
        )
    done = run(
        "fuse",
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        "--weights",
        1,
        1,
        "--out",
        tmp_path / "out",
    )
    if done.status:
        assert "arg is an empty" not in one_line(done, "a.safetensors", status=[1])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".safetensors.index.json"])
def test_an_unreadable_file_is_not_called_truncated(suffix, tmp_path, run, monkeypatch):
    """No permission: the message says that, not that the file is damaged."""
    import builtins
    import errno
    import io
    import os

    path = save(tmp_path / "a.safetensors", drawn(0))
    if suffix != ".safetensors":
        path = tmp_path / f"a{suffix}"
        torch.save(drawn(0), path)
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything: stand in for a system that refuses

        def refuse(opener):
            def refused(file, *rest, **options):
                if str(file).endswith(path.name):
                    raise PermissionError(errno.EACCES, "Permission denied", str(file))
                return opener(file, *rest, **options)

            return refused

        for module, name in ((builtins, "open"), (io, "open"), (os, "open")):
            monkeypatch.setattr(module, name, refuse(getattr(module, name)))
        if suffix == ".safetensors":
            import safetensors

            denied = OSError(f"Permission denied (os error 13): {path}")
            monkeypatch.setattr(safetensors, "safe_open", lambda *_, **__: (_ for _ in ()).throw(denied))
            monkeypatch.setattr("regraft.porting.stored_tensors.safe_open", safetensors.safe_open, raising=False)
    said = one_line(run("fuse", path, "--weights", 1, "--out", tmp_path / "out"), path.name, "ermission", status=[1])
    assert "truncated" not in said and "damaged" not in said


def test_a_nested_encoder_beside_a_tensor_is_not_dropped_in_silence(tmp_path, run):
    """`{"encoder": {...}, "head": tensor}`: the encoder's tensors are read, or it is said that they are left out."""
    torch.save({"encoder": drawn(0), "head": torch.ones(3)}, tmp_path / "a.pt")
    done = run("fuse", tmp_path / "a.pt", "--weights", 1, "--out", tmp_path / "out")
    if done.status == 0:
        assert len(written(tmp_path / "out")) == 5, "the encoder was dropped"
    else:
        one_line(done, "a.pt", "encoder", status=[1])


def test_a_file_is_parsed_once(tmp_path, run, monkeypatch):
    """How often a checkpoint's table is read does not depend on how many tensors it holds."""
    parsed, own = [], stored_tensors.safe_open
    monkeypatch.setattr(stored_tensors, "safe_open", lambda *a, **k: (parsed.append(a), own(*a, **k))[1])
    tensors = {f"layers.{number}.weight": torch.ones(2) for number in range(60)}
    paths = [save(tmp_path / f"{name}.safetensors", tensors) for name in "ab"]
    assert run("fuse", *paths, "--weights", 0.5, 0.5, "--out", tmp_path / "out").status == 0
    assert len(parsed) <= 4


def test_the_library_reads_what_the_command_reads(tmp_path):
    """`regraft.fuse_checkpoints` of a compressed file gives torch's values."""
    path = repacked(save(tmp_path / "a.pt", drawn(0)), "all")
    regraft.fuse_checkpoints([path], [1.0], tmp_path / "out")
    for name, tensor in written(tmp_path / "out").items():
        assert torch.equal(tensor, drawn(0)[name])
